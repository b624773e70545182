"""VQGAN: convolutional encoder, nearest-code quantiser, convolutional decoder (Esser et al. 2021; the paper, 3.3).

The layout is that of MAGE's `vqgan_jax_strongaug.ckpt`, which the paper's renderer was trained on, so that its weights
load without surgery. It differs from the original VQGAN: no attention, no quant_conv / post_quant_conv, residual
convolutions without bias, 2x2 average pooling for downsampling, a 1x1 encoder output, and a channel-changing residual
block whose 1x1 shortcut reads the residual BRANCH's output, not the block's input.

Shapes: B images, S pixels a side, f = 2 ** (levels - 1) the reduction, H = S / f, M = H * H tokens, C = z_channels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from digit.errors import DigitError
from digit.runtime.settings import check_settings, within

MAX_LEVELS, MAX_RES_BLOCKS = 12, 64  # larger numbers in a file are errors


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sizes of a VQGAN. The defaults are MAGE's 256 px, f16 tokenizer (54 M parameters)."""

    resolution: int = within("[1, 4096]", 256)
    """Image side in pixels, a multiple of the reduction 2 ** (len(channel_mult) - 1)."""
    channels: int = within("[1, inf)", 128)
    """Channels of the full-resolution level."""
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level in units of `channels`; every level after the first halves the side."""
    num_res_blocks: int = within("[1, inf)", 2)
    """Residual blocks per level, the same in encoder and decoder."""
    z_channels: int = within("[1, inf)", 256)
    """Features of a code vector."""
    vocab_size: int = within("[1, inf)", 1024)
    """Number of codes."""
    num_groups: int = within("[1, inf)", 32)
    """Groups of every GroupNorm. The released layout has 32; a small net needs several channels per group."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        check_settings(self)
        if not 1 <= len(self.channel_mult) <= MAX_LEVELS or min(self.channel_mult) < 1:
            raise DigitError(f"channel_mult is {self.channel_mult}: wanted 1 to {MAX_LEVELS} numbers of at least 1")
        if self.num_res_blocks > MAX_RES_BLOCKS:
            raise DigitError(f"num_res_blocks is {self.num_res_blocks}: choose 1 to {MAX_RES_BLOCKS}")
        if self.resolution % self.reduction:
            raise DigitError(
                f"resolution {self.resolution} is not a multiple of {self.reduction}, the reduction of "
                f"{len(self.channel_mult)} levels: choose another resolution or fewer channel_mult entries"
            )
        uneven = [c for c in self.level_channels if c % self.num_groups]
        if uneven:
            raise DigitError(
                f"GroupNorm wants channels divisible by num_groups {self.num_groups}, got {uneven[0]}: "
                "choose other channels or num_groups"
            )

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(self.channels * mult for mult in self.channel_mult)

    @property
    def reduction(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.resolution // self.reduction
        return side, side

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def to_dict(self) -> dict:
        return {**asdict(self), "channel_mult": list(self.channel_mult)}


def conv3x3(in_channels: int, out_channels: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


class NormSwish(nn.GroupNorm):
    """swish(GroupNorm(x)) in the input's own precision; the statistics are accumulated in fp32 by the kernel."""

    def __init__(self, num_groups: int, channels: int) -> None:
        super().__init__(num_groups, channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        # on CUDA autocast would run group_norm in fp32 and return fp32 maps, twice the memory traffic
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            normalised = F.group_norm(input, self.num_groups, weight, bias, self.eps)
            return F.silu(normalised, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = NormSwish(num_groups, in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = NormSwish(num_groups, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, in, H, W) -> (B, out, H, W)
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        # the released net feeds h, not x, to the shortcut; its weights only make sense that way
        skip = self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x
        return skip + h if torch.is_grad_enabled() else h.add_(skip)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, num_groups)
        self.block_2 = ResBlock(channels, channels, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Level(nn.Module):
    """The residual blocks of one resolution, and for the decoder the upsampling after them."""

    def __init__(self, in_channels: int, out_channels: int, cfg: VQGANConfig, upsample: bool = False) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * cfg.num_res_blocks
        self.block = nn.ModuleList(ResBlock(a, b, cfg.num_groups) for a, b in pairwise(widths))
        if upsample:
            self.upsample = Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Encoder(nn.Module):
    def __init__(self, cfg: VQGANConfig) -> None:
        super().__init__()
        widths = cfg.level_channels
        self.conv_in = conv3x3(3, widths[0])
        inputs = (widths[0], *widths[:-1])
        self.down = nn.ModuleList(Level(a, b, cfg) for a, b in zip(inputs, widths, strict=True))
        self.mid = Middle(widths[-1], cfg.num_groups)
        self.norm_out = NormSwish(cfg.num_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], cfg.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, C, H, H)
        x = self.conv_in(x)
        for index, level in enumerate(self.down):
            x = level(F.avg_pool2d(x, 2) if index else x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    def __init__(self, cfg: VQGANConfig) -> None:
        super().__init__()
        widths = cfg.level_channels
        self.conv_in = conv3x3(cfg.z_channels, widths[-1], bias=True)
        self.mid = Middle(widths[-1], cfg.num_groups)
        inputs = (*widths[1:], widths[-1])
        self.up = nn.ModuleList(
            Level(a, b, cfg, upsample=index > 0) for index, (a, b) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norm_out = NormSwish(cfg.num_groups, widths[0])
        self.conv_out = conv3x3(widths[0], 3, bias=True)

    def forward(self, z: Tensor) -> Tensor:  # (B, C, H, H) -> (B, 3, S, S)
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))


class Quantizer(nn.Module):
    """Nearest code vector, in fp32 whatever the precision around it. `embedding.weight` is (vocab_size, C)."""

    def __init__(self, vocab_size: int, z_channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, z_channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / vocab_size, 1.0 / vocab_size)

    def forward(self, z: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Int64[Tensor, "B H W"]]:
        """z (B, C, H, W) -> code vectors (B, C, H, W) float32 and indices (B, H, W) int64."""
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().movedim(1, -1)  # (B, H, W, C)
            indices = nearest_code(flat.reshape(-1, flat.shape[-1]), self.embedding.weight).view(flat.shape[:-1])
            return self.lookup(indices), indices

    def lookup(self, indices: Int64[Tensor, "B H W"]) -> Float[Tensor, "B C H W"]:
        return self.embedding(indices).movedim(-1, 1)  # (B, C, H, W)


def nearest_code(points: Float[Tensor, "N C"], codes: Float[Tensor, "K C"]) -> Int64[Tensor, " N"]:
    """Index of the nearest code for each point."""
    # ||x - c||^2 = ||x||^2 - 2 x.c + ||c||^2, and ||x||^2 does not move the minimum
    return torch.addmm(codes.square().sum(1), points, codes.t(), alpha=-2.0).argmin(1)


class VQGAN(nn.Module):
    """Image tokenizer. Images and reconstructions are float in [0, 1]; reconstructions may overshoot, clamp them."""

    def __init__(self, cfg: VQGANConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quantize = Quantizer(cfg.vocab_size, cfg.z_channels)

    def encode(self, images: Float[Tensor, "B 3 S S"]) -> tuple[Float[Tensor, "B C H H"], Int64[Tensor, "B M"]]:
        """Images in [0, 1] -> features before quantisation (B, C, H, H) and tokens (B, M), row by row."""
        z = self.encoder(images)
        return z, self.quantize(z)[1].flatten(1)

    def decode(self, z: Float[Tensor, "B C H H"]) -> Float[Tensor, "B 3 S S"]:
        return self.decoder(z)

    def decode_tokens(self, tokens: Int64[Tensor, "B M"]) -> Float[Tensor, "B 3 S S"]:
        """Tokens (B, M) in [0, vocab_size) -> images (B, 3, S, S), nominally in [0, 1]."""
        return self.decoder(self.quantize.lookup(tokens.view(-1, *self.cfg.grid)))

    def forward(
        self, images: Float[Tensor, "B 3 S S"]
    ) -> tuple[Float[Tensor, "B 3 S S"], Float[Tensor, "B C H H"], Int64[Tensor, "B M"]]:
        """Reconstruction (B, 3, S, S) with a straight-through gradient, z (B, C, H, H), tokens (B, M)."""
        z = self.encoder(images)
        codes, indices = self.quantize(z)
        codes = z + (codes - z).detach()
        return self.decoder(codes), z, indices.flatten(1)
