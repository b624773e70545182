"""Layers of convolutional VQ tokenizers: norms, residual blocks, attention, down- and upsampling.

Shapes: B images, C channels, H and W the side of a map, D channels of a code.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.models.vq_layout import VQLayout

EPS = 1e-6


def conv3x3(in_channels: int, out_channels: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


class Norm(nn.GroupNorm):
    """GroupNorm in the input's own precision; the statistics are accumulated in fp32 by the kernel."""

    def __init__(self, num_groups: int, channels: int) -> None:
        super().__init__(num_groups, channels, eps=EPS)

    def forward(self, input: Tensor) -> Tensor:
        # on CUDA autocast would run group_norm in fp32 and return fp32 maps, twice the memory traffic
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class NormSwish(Norm):
    """swish(GroupNorm(x))."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input), inplace=not torch.is_grad_enabled())


class AdaptiveNorm(nn.Module):
    """GroupNorm without weights of its own; scale and shift of each channel come from the codes of the whole picture.

    gamma = W sqrt(var + eps) + b and beta = V mean + c, with the unbiased variance and the mean of each code channel.
    """

    def __init__(self, channels: int, z_channels: int, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.gamma = nn.Linear(z_channels, channels)
        self.beta = nn.Linear(z_channels, channels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # (B, C, H, W), codes (B, D, h, w) -> (B, C, H, W)
        with torch.autocast(x.device.type, enabled=False):
            places = z.float().flatten(2)  # (B, D, h w)
            gamma = self.gamma((places.var(2) + EPS).sqrt()).to(x.dtype)[..., None, None]
            beta = self.beta(places.mean(2)).to(x.dtype)[..., None, None]
            return F.group_norm(x, self.num_groups, eps=EPS) * gamma + beta


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int, layout: VQLayout) -> None:
        super().__init__()
        self.norm1 = NormSwish(num_groups, in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, layout.bias)
        self.norm2 = NormSwish(num_groups, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels, layout.bias)
        # MAGE's net feeds the branch's output, not x, to the shortcut; its weights only make sense that way
        self.shortcut_of_branch = layout.shortcut == "branch"
        if in_channels != out_channels:
            source = out_channels if self.shortcut_of_branch else in_channels
            self.nin_shortcut = nn.Conv2d(source, out_channels, 1, bias=layout.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, in, H, W) -> (B, out, H, W)
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        skip = x
        if hasattr(self, "nin_shortcut"):
            skip = self.nin_shortcut(h if self.shortcut_of_branch else x)
        return skip + h if torch.is_grad_enabled() else h.add_(skip)


class Attention(nn.Module):
    """x + W softmax(q k^T / sqrt(C)) v with one head over all positions; q, k, v from the normalised x."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = Norm(num_groups, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))  # (B, 1, H W, C)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed[:, 0].transpose(1, 2).reshape(h.shape))


class Downsample(nn.Module):
    """A strided 3x3 convolution: of a map padded below and to the right ("corner"), or on all sides ("strided")."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.corner = kind == "corner"
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.corner else 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H / 2, W / 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.corner else x)


class Upsample(nn.Module):
    """A 3x3 convolution after nearest upsampling, or before its 4 C channels become 2 x 2 pixels."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.depth_to_space = kind == "depth_to_space"
        self.conv = conv3x3(channels, channels * (4 if self.depth_to_space else 1), bias=True)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2 H, 2 W)
        if not self.depth_to_space:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        batch, channels, height, width = x.shape
        # the place in the 2 x 2 block is the slowest part of the channel index; in F.pixel_shuffle it is the fastest
        blocks = self.conv(x).view(batch, 2, 2, channels, height, width)
        return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels, 2 * height, 2 * width)


class Middle(nn.Sequential):
    """block_1, attn_1 where the layout has it, block_2, ..."""

    def __init__(self, channels: int, num_groups: int, layout: VQLayout) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, layout.mid_blocks + 1):
            layers[f"block_{number}"] = ResBlock(channels, channels, num_groups, layout)
            if layout.mid_attention and number == 1:
                layers["attn_1"] = Attention(channels, num_groups)
        super().__init__(layers)


class Level(nn.Module):
    """The blocks of one resolution, with attention after each where the layout has it."""

    def __init__(self, widths: list[int], num_groups: int, layout: VQLayout, *, attention: bool) -> None:
        """`widths`: channels of the input, then those that each block gives."""
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b, num_groups, layout) for a, b in pairwise(widths))
        if attention:
            self.attn = nn.ModuleList(Attention(width, num_groups) for width in widths[1:])

    def blocks(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H, W)
        for index, block in enumerate(self.block):
            x = block(x)
            if hasattr(self, "attn"):
                x = self.attn[index](x)
        return x


class EncoderLevel(Level):
    """A level, and the downsampling after it."""

    def __init__(
        self, widths: list[int], num_groups: int, layout: VQLayout, *, attention: bool, downsample: bool
    ) -> None:
        super().__init__(widths, num_groups, layout, attention=attention)
        if downsample:
            pooling = layout.downsample == "average"
            self.downsample = nn.AvgPool2d(2) if pooling else Downsample(widths[-1], layout.downsample)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H / 2, W / 2)
        x = self.blocks(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class DecoderLevel(Level):
    """The adaptive norm before a level where the layout has it, the level, and the upsampling after it."""

    def __init__(
        self, widths: list[int], num_groups: int, layout: VQLayout, *, attention: bool, upsample: bool, z_channels: int
    ) -> None:
        super().__init__(widths, num_groups, layout, attention=attention)
        if layout.adaptive_norm:
            self.adaptive = AdaptiveNorm(widths[0], z_channels, num_groups)
        if upsample:
            self.upsample = Upsample(widths[-1], layout.upsample)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # (B, C, H, W), codes (B, D, h, w) -> (B, C', 2 H, 2 W)
        x = self.blocks(self.adaptive(x, z) if hasattr(self, "adaptive") else x)
        return self.upsample(x) if hasattr(self, "upsample") else x
