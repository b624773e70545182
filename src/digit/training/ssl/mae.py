"""MAE: masked autoencoders (He et al. 2022). Figure 4a's P+R: patch level, reconstructive.

Most patches are hidden. The encoder sees only the others, from which a small decoder reconstructs the hidden ones.

    L = mean over hidden patches p of || (x_p - mean(x_p)) / std(x_p) - d(e(visible))_p ||^2 / P   (section 3)

Shapes: B images, N patches, V of them visible, D embed_dim, E decoder_dim, P = 3 * patch_size^2 values per patch.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from digit.models.vit import Block, ViT, ViTConfig
from digit.runtime.settings import check_settings, within
from digit.training.log import Metrics
from digit.training.ssl.method import Method, embed, encode, initialise, require, sine_positions
from digit.training.ssl.views import ViewConfig, random_views

CROP_AND_FLIP = ViewConfig(jitter=0.0, grey=0.0, blur=0.0)  # the paper's "cropping-only"


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Masking and decoder (paper: a decoder of 8 blocks of width 512, an encoder of 24 blocks of width 1024)."""

    mask_ratio: float = within("(0, 1)", 0.75)
    """Fraction of the patches that are hidden."""
    decoder_depth: int = within("[1, inf)", 2)
    """Transformer blocks of the decoder."""
    decoder_dim: int = within("[1, inf)", 96)
    """Width of the decoder, a multiple of 4 and of decoder_heads."""
    decoder_heads: int = within("[1, inf)", 3)
    """Attention heads of the decoder."""
    views: ViewConfig = field(default=CROP_AND_FLIP)
    """Random views of the images: crop and flip only, as in the paper."""

    def __post_init__(self) -> None:
        check_settings(self, of="MAE")
        fits = self.decoder_dim % 4 == 0 and self.decoder_dim % self.decoder_heads == 0
        require(self, "decoder_dim", fits, f"a multiple of 4 and of decoder_heads {self.decoder_heads}")


class MAE(Method):
    """The encoder is `vit`; the decoder is discarded after training."""

    decoder_positions: Tensor

    def __init__(self, vit: ViT, cfg: MAEConfig):
        super().__init__(vit)
        self.cfg, dim, side = cfg, cfg.decoder_dim, vit.cfg.table_side
        shape = ViTConfig(embed_dim=dim, num_heads=cfg.decoder_heads, layer_scale=False)
        self.decoder_embed = nn.Linear(vit.dim, dim)
        self.decoder_blocks = nn.ModuleList(Block(shape) for _ in range(cfg.decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim)
        self.decoder_out = nn.Linear(dim, 3 * vit.cfg.patch_size**2)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("decoder_positions", sine_positions(side, dim))
        initialise(self, vit)

    def views(self, images: Tensor, generator: torch.Generator) -> list[Tensor]:
        return [random_views(images, self.size, self.cfg.views, generator)]

    def loss(self, views: list[Tensor], generator: torch.Generator, progress: float) -> tuple[Tensor, Metrics]:
        (images,) = views
        visible, hidden = random_hidden(len(images), self.vit.cfg.table_side**2, self.cfg.mask_ratio, generator)
        visible, hidden = visible.to(images.device), hidden.to(images.device)
        reconstruction = self.decode(self.encode_visible(images, visible), visible, hidden)
        target = normalised_patches(images, self.vit.cfg.patch_size)
        return F.mse_loss(reconstruction.float(), torch.take_along_dim(target, hidden[..., None], dim=1)), {}

    def encode_visible(self, images: Tensor, visible: Int64[Tensor, "B V"]) -> Float[Tensor, "B V+1 D"]:
        """Class token and visible patches, encoded without the hidden patches."""
        patches = torch.take_along_dim(embed(self.vit, images), visible[..., None], dim=1)
        first, patches = encode(self.vit, patches)
        return torch.cat((first[:, None], patches), dim=1)

    def decode(self, encoded: Tensor, visible: Tensor, hidden: Tensor) -> Float[Tensor, "B H P"]:
        """Predict the hidden patches' normalised pixels; the decoder's input has the mask token in their place."""
        x = self.decoder_embed(encoded)  # (B, V + 1, E)
        num_patches = visible.shape[1] + hidden.shape[1]
        patches = self.mask_token.to(x.dtype).expand(len(x), num_patches, -1)
        patches = patches.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])
        x = torch.cat((x[:, :1], patches), dim=1) + self.decoder_positions  # (B, 1 + N, E)
        for block in self.decoder_blocks:
            x = block(x)
        x = torch.take_along_dim(x[:, 1:], hidden[..., None], dim=1)
        return self.decoder_out(self.decoder_norm(x))


def random_hidden(
    num_images: int, num_patches: int, ratio: float, generator: torch.Generator
) -> tuple[Int64[Tensor, "B V"], Int64[Tensor, "B H"]]:
    """Random (visible, hidden) patch indices of each image; int(N (1 - ratio)) are visible, as in MAE's code."""
    order = torch.rand(num_images, num_patches, generator=generator).argsort(dim=1)
    num_visible = max(1, int(num_patches * (1 - ratio)))
    return order[:, :num_visible], order[:, num_visible:]


def normalised_patches(images: Float[Tensor, "B 3 S S"], patch_size: int) -> Float[Tensor, "B N P"]:
    """(x - mean(x)) / std(x): the pixels x of each patch with mean 0 and variance 1."""
    patches = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
