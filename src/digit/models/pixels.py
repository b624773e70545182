"""A renderer from discriminative tokens straight to pixels: one pass, no VQ tokens (the paper's future work, A.1).

    tokens (B, P) > embedding + place, class, noise > bidirectional Transformer > (B, z, h, w) > decoder > (B, 3, S, S)

The Transformer lets the tokens agree with each other. Its output becomes the input of a decoder of the VQGAN's layout
(`models/vqgan.py`), which can start from the weights of a trained one: what is left to learn then is the way from
discriminative tokens into the VQGAN's latent space.

Shapes: B images, P tokens on a grid (r, c) (cells of it, where each has tokens of several levels), D width, z and
(h, w) channels and grid of the decoder's input, S pixels a side, n noise channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.aligned import check_grid
from digit.models.depth import embed_codes
from digit.models.sequence import SequenceConfig, SequenceModel, grid_positions, lift
from digit.models.tokens import Integers, as_tokens
from digit.models.transformer import Transformer
from digit.models.vqgan import VQGAN, Decoder, VQGANConfig


@dataclass(frozen=True, kw_only=True)
class PixelConfig(SequenceConfig):
    """Sizes of a renderer straight to pixels: of its tokens, its Transformer and its decoder."""

    image_size: int
    """Side S of the images in pixels."""
    vocab_size: int = 1
    """It predicts no tokens: always 1."""
    target_len: int = 1
    """It predicts no tokens: always 1."""
    noise_channels: int = 0
    """Numbers of Gaussian noise at each token, from the image's seed; 0 renders equal tokens equally."""
    channels: int = 16
    """Channels of the decoder's full-resolution level, as in VQGANConfig; so are the four settings that follow."""
    channel_mult: tuple[int, ...] = (1, 2, 8, 8)
    """Channels of each level in units of `channels`; every level after the first halves the side."""
    num_res_blocks: int = 1
    """Residual blocks per level."""
    z_channels: int = 32
    """Channels of the decoder's input."""
    num_groups: int = 4
    """Groups of every GroupNorm of the decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        check_grid("prefix", self.prefix_places, self.prefix_rows)
        if not self.prefix_len:
            raise DigitError("a renderer straight to pixels needs a prefix: set prefix_len and prefix_vocab_size")
        if self.masked or self.aligned or self.prefix_dropout or self.dropout:
            raise DigitError("a renderer straight to pixels knows no masks, guidance and dropout: leave them out")
        if self.rotary != "none" or self.tied_embeddings or self.random_order or not self.learned_positions:
            raise DigitError(
                "rotary, learned_positions, tied_embeddings and random_order are not of a renderer straight to pixels: "
                "leave them out"
            )
        if self.noise_channels < 0:
            raise DigitError(f"noise_channels is {self.noise_channels}: it cannot be below 0")
        _ = self.decoder  # refuses sizes that do not fit each other

    @property
    def kind(self) -> str:
        return "pixels"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the discriminative tokens."""
        return self.prefix_rows, self.prefix_places // self.prefix_rows

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(P, n): shape of an image's noise."""
        return self.prefix_places, self.noise_channels

    @property
    def decoder(self) -> VQGANConfig:
        """Sizes of the decoder, as those of a VQGAN."""
        return VQGANConfig(
            resolution=self.image_size,
            channels=self.channels,
            channel_mult=self.channel_mult,
            num_res_blocks=self.num_res_blocks,
            z_channels=self.z_channels,
            vocab_size=1,
            num_groups=self.num_groups,
        )


class PixelRenderer(SequenceModel):
    """Discriminative tokens to images, float in about [0, 1]; they may overshoot, clamp them."""

    cfg: PixelConfig

    def __init__(self, cfg: PixelConfig) -> None:
        nn.Module.__init__(self)  # it has no target, and so none of the other tables
        self.cfg = cfg
        width = cfg.embed_dim
        self.prefix_embed = nn.Embedding(cfg.prefix_levels * cfg.prefix_vocab_size, width)
        self.prefix_positions = nn.Parameter(torch.empty(cfg.prefix_places, width))
        if cfg.num_classes:
            self.label_embed = nn.Embedding(1 + cfg.num_classes, width)  # row 0 no class, row 1 + c class c
        if cfg.noise_channels:
            self.noise_embed = nn.Linear(cfg.noise_channels, width, bias=False)
        self.transformer = Transformer(cfg)
        self.to_z = nn.Linear(width, cfg.z_channels * math.prod(self.spread))
        self.decoder = Decoder(cfg.decoder)  # torch's own initialisation, as in the VQGAN
        self.reset_parameters()

    @property
    def spread(self) -> tuple[int, int]:
        """Rows and columns of the decoder's cells that one token fills; (1, 1) where the grids do not divide."""
        (rows, columns), (height, width) = self.cfg.grid, self.cfg.decoder.grid
        return (height // rows, width // columns) if height % rows == 0 == width % columns else (1, 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Tables and matrices as in every sequence model; the decoder keeps what torch gave it."""
        decoder = [p.clone() for p in self.decoder.parameters()]
        super().reset_parameters()
        for parameter, own in zip(self.decoder.parameters(), decoder, strict=True):
            parameter.copy_(own)
        nn.init.zeros_(self.to_z.bias)
        if self.cfg.num_classes:
            nn.init.zeros_(self.label_embed.weight)

    @torch.no_grad()
    def start_from_codes(self, codes: Tensor | None, prefix_codes: Float[Tensor, "K E"] | None = None) -> None:
        """Set the token table from the codebook's vectors, so that near codes start with near embeddings."""
        assert prefix_codes is not None, "its tokens are its prefix"
        self.prefix_embed.weight.copy_(lift(prefix_codes, self.cfg.embed_dim))

    @torch.no_grad()
    def start_from_places(self, grid: tuple[int, int] | None, prefix_grid: tuple[int, int] | None = None) -> None:
        """Set the position table from the tokens' places in the picture."""
        rows, columns = prefix_grid or self.cfg.grid
        self.prefix_positions.copy_(grid_positions((rows, columns), self.cfg.embed_dim, max(rows, columns)))

    @torch.no_grad()
    def start_from_vqgan(self, vqgan: VQGAN) -> None:
        """Take a VQGAN's decoder, and give its input the mean and the spread of that VQGAN's code vectors.

        Raises DigitError where the decoder has another shape.
        """
        try:
            self.decoder.load_state_dict(vqgan.decoder.state_dict())
        except RuntimeError as error:
            raise DigitError(
                "the decoder cannot start from this VQGAN, which has another shape: give pixels the same sizes, or set "
                "pixels.start to scratch"
            ) from error
        table = vqgan.quantize.embedding.weight.float()
        levels = table.unflatten(0, (vqgan.cfg.num_levels, -1))  # (L, K, z): the decoder takes a sum of one of each
        mean, std = levels.mean(1).sum(0), levels.var(1).sum(0).sqrt()
        cells = math.prod(self.spread)
        # the Transformer ends in a LayerNorm: D features of variance 1
        nn.init.normal_(self.to_z.weight, std=self.cfg.embed_dim**-0.5)
        self.to_z.weight.mul_(std.repeat(cells)[:, None])
        self.to_z.bias.copy_(mean.repeat(cells))

    @property
    def device(self) -> torch.device:
        return self.prefix_embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.prefix_embed.weight.dtype

    def hidden_matrices(self) -> list[tuple[nn.Parameter, int]]:
        return [(p, 3 if "qkv" in name else 1) for name, p in self.transformer.named_parameters() if p.ndim == 2]

    # ---------------------------------------------------------------- forward

    def latent(
        self,
        prefix: Int64[Tensor, "B P"],
        noise: Float[Tensor, "B N n"] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B z h w"]:
        """The decoder's input."""
        embedded = embed_codes(self.prefix_embed, prefix, self.cfg.prefix_levels)
        x = self.with_positions(embedded, self.prefix_positions)  # (B, P, D)
        if self.cfg.num_classes or labels is not None:
            rows = self._start_rows(labels, x.shape[0], x.device)  # refuses labels of a model without classes
            x = x + self.label_embed(rows)[:, None]
        if self.cfg.noise_channels:
            assert noise is not None, "this renderer takes noise: pass the result of noise()"
            x = x + self.noise_embed(noise)
        x = self.to_z(self.transformer(x, causal=False))  # (B, P, z) or, where a token fills s cells, (B, P, s z)
        (rows, columns), (high, wide) = self.cfg.grid, self.spread
        x = x.view(x.shape[0], rows, columns, high, wide, -1).permute(0, 5, 1, 3, 2, 4)  # (B, z, r, high, c, wide)
        x = x.reshape(x.shape[0], -1, rows * high, columns * wide)
        if x.shape[2:] != self.cfg.decoder.grid:
            x = F.interpolate(x, self.cfg.decoder.grid, mode="bilinear", align_corners=False, antialias=True)
        return x

    def render(
        self,
        prefix: Int64[Tensor, "B P"],
        noise: Float[Tensor, "B N n"] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
        *,
        cells: tuple[slice, slice] | None = None,
    ) -> Float[Tensor, "B 3 S S"]:
        """Images of discriminative tokens, and of classes (-1 or None for none) where the model knows them, nominally
        in [0, 1]; or of a window of the decoder's input (z, h, w) alone, rows and columns `cells`. All tokens are read
        for either. Raises DigitError for labels of a model without classes."""
        z = self.latent(prefix, noise, labels)
        return self.decoder(z if cells is None else z[..., *cells])

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # it has no target
        self, prefix: Integers, noise: Float[Tensor, "B N n"] | None = None, labels: Integers | None = None
    ) -> Float[Tensor, "B 3 S S"]:
        """As `render`, of tokens and labels of any integer type. Raises MismatchError for tokens and labels that the
        model does not know."""
        cfg, labels = self.cfg, None if labels is None else self._known_labels(labels, len(prefix))
        tokens = as_tokens(prefix, vocab_size=cfg.prefix_vocab_size, num_tokens=cfg.prefix_len, owner="the renderer")
        return self.render(tokens.to(self.device), noise, labels)

    def noise(self, batch: Mapping[str, Tensor | None], generator: torch.Generator | None) -> dict[str, Tensor]:
        """Of a batch, what the model uses of: "noise" (B, P, n), standard Gaussian, and "drop_labels" (B,) bool."""
        prefix, found = batch["prefix"], {}
        assert prefix is not None, "its tokens are its prefix"
        device = prefix.device if generator is None else generator.device
        if self.cfg.noise_channels:
            found["noise"] = torch.randn(len(prefix), *self.cfg.noise_shape, generator=generator, device=device)
        if self.cfg.label_dropout and batch.get("labels") is not None:
            found["drop_labels"] = torch.rand(len(prefix), generator=generator, device=device) < self.cfg.label_dropout
        return found

    def loss(  # pyright: ignore[reportIncompatibleMethodOverride]  # it has no tokens to hide or to drop
        self,
        target: UInt8[Tensor, "B 3 S S"],
        prefix: Int64[Tensor, "B P"] | None = None,
        labels: Tensor | None = None,
        noise: Float[Tensor, "B N n"] | None = None,
        drop_labels: Bool[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Mean |x - x_hat| of images in [0, 1], and {"l1", "psnr"}: what validation reports. Training adds other losses
        (`training/pixels.py`)."""
        assert prefix is not None, "its tokens are its prefix"
        images = target.float() / 255
        if drop_labels is not None and labels is not None:
            labels = labels.masked_fill(drop_labels, -1)
        output = self.render(prefix, noise, labels).float()
        l1 = F.l1_loss(output, images)
        mse = (output.clamp(0, 1) - images).square().mean((1, 2, 3)).clamp(min=1e-10)
        return l1, {"l1": l1.detach(), "psnr": (-10 * mse.log10()).mean().detach()}
