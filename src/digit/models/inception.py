"""The InceptionV3 of FID: the TensorFlow graph inception-2015-12-05 (Szegedy et al. 2016, Heusel et al. 2017).

Shapes: B images, H x W any size, resized to 299; maps of 35, 17 and 8 cells a side. Against the InceptionV3 of other
libraries, which gives other numbers: average pools leave the padding out of the mean, the last block pools by maximum,
there are 1008 logits, and the input is (x - 128) / 128 of a stated resize. BatchNorm is folded into the convolutions
when weights are converted (digit.convert.inception), and modules keep the names of the released state dict.
"""

from collections import OrderedDict
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from digit.errors import DigitError

INPUT_SIZE = 299  # px
DIM, NUM_LOGITS = 2048, 1008
SPATIAL_CHANNELS = 7  # of sFID: 7 * 17 * 17 = 2023, about as many numbers as the pooled features
Resize = Literal["tensorflow", "clean"]


class InceptionFeatures(NamedTuple):
    """Everything that the metrics need, from one forward pass, float32."""

    pooled: Tensor  # (B, 2048): FID, KID, precision and recall
    spatial: Tensor  # (B, 2023): sFID, in the order row, column, channel
    logits: Tensor  # (B, 1008): with the bias
    logits_unbiased: Tensor  # (B, 1008): without; the Inception Score of torch-fidelity and of ADM's evaluator


# -------------------------------------------------------------------- input


def resize_tensorflow(images: Float[Tensor, "B 3 H W"], size: int = INPUT_SIZE) -> Float[Tensor, "B 3 {size} {size}"]:
    """src = dst in / out;  out = lo + (hi - lo) frac(src): TensorFlow 1's resize_bilinear, used by torch-fidelity.

    No half-pixel centres and no antialiasing: a larger image is sampled at single points (Parmar et al. 2022).
    """
    for dim in (3, 2):
        length = images.shape[dim]
        source = torch.arange(size, device=images.device) * torch.tensor(length / size, dtype=torch.float32)
        low = source.long()
        share = (source - low).view(-1, *(1,) * (3 - dim))
        first = images.index_select(dim, low)
        images = first + (images.index_select(dim, (low + 1).clamp_max(length - 1)) - first) * share
    return images


def resize_clean(images: Float[Tensor, "B 3 H W"], size: int = INPUT_SIZE) -> Float[Tensor, "B 3 {size} {size}"]:
    """Resize by antialiased bicubic interpolation, neither rounded nor clipped (Parmar et al. 2022).

    It equals Pillow's BICUBIC on channels in mode F, which clean-fid uses, hence the coefficients in float64.
    """
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images.double(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.to(images.dtype)


RESIZES = {"tensorflow": resize_tensorflow, "clean": resize_clean}


def first_channels(cells: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H*W*7"]:
    """Map (B, C, h, w) -> (B, h * w * 7), the first 7 channels in the order row, column, channel."""
    return cells[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


# -------------------------------------------------------------------- blocks


class Conv(nn.Conv2d):
    """Biased convolution and ReLU. Padded to keep the size at stride 1 unless `valid`."""

    def __init__(self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, valid: bool = False):
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid or stride > 1 else (height // 2, width // 2)
        super().__init__(channels, out, (height, width), stride, padding)

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input), inplace=True)


class Parallel(nn.ModuleList):
    """Branches over one map, joined by channel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


def chain(**steps: nn.Module) -> nn.Sequential:
    """Named modules one after another."""
    return nn.Sequential(OrderedDict(steps))


def average_pool() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def halve() -> nn.Module:
    return nn.MaxPool2d(3, 2)


def mixed_a(channels: int, pooled: int) -> Parallel:
    """35 x 35: 1x1, 5x5 and twice 3x3."""
    return Parallel([
        chain(branch1x1=Conv(channels, 64, 1)),
        chain(branch5x5_1=Conv(channels, 48, 1), branch5x5_2=Conv(48, 64, 5)),
        chain(branch3x3dbl_1=Conv(channels, 64, 1), branch3x3dbl_2=Conv(64, 96, 3), branch3x3dbl_3=Conv(96, 96, 3)),
        chain(pool=average_pool(), branch_pool=Conv(channels, pooled, 1)),
    ])  # fmt: skip


def mixed_b(channels: int) -> Parallel:
    """35 x 35 to 17 x 17."""
    dbl = {"branch3x3dbl_1": Conv(channels, 64, 1), "branch3x3dbl_2": Conv(64, 96, 3)}
    return Parallel([
        chain(branch3x3=Conv(channels, 384, 3, 2)),
        chain(**dbl, branch3x3dbl_3=Conv(96, 96, 3, 2)),
        chain(pool=halve()),
    ])  # fmt: skip


def mixed_c(channels: int, inner: int) -> Parallel:
    """17 x 17: 7x7 and twice 7x7 as rows and columns."""
    row, column = (1, 7), (7, 1)
    return Parallel([
        chain(branch1x1=Conv(channels, 192, 1)),
        chain(
            branch7x7_1=Conv(channels, inner, 1),
            branch7x7_2=Conv(inner, inner, row),
            branch7x7_3=Conv(inner, 192, column),
        ),
        chain(
            branch7x7dbl_1=Conv(channels, inner, 1),
            branch7x7dbl_2=Conv(inner, inner, column),
            branch7x7dbl_3=Conv(inner, inner, row),
            branch7x7dbl_4=Conv(inner, inner, column),
            branch7x7dbl_5=Conv(inner, 192, row),
        ),
        chain(pool=average_pool(), branch_pool=Conv(channels, 192, 1)),
    ])  # fmt: skip


def mixed_d(channels: int) -> Parallel:
    """17 x 17 to 8 x 8."""
    return Parallel([
        chain(branch3x3_1=Conv(channels, 192, 1), branch3x3_2=Conv(192, 320, 3, 2)),
        chain(
            branch7x7x3_1=Conv(channels, 192, 1),
            branch7x7x3_2=Conv(192, 192, (1, 7)),
            branch7x7x3_3=Conv(192, 192, (7, 1)),
            branch7x7x3_4=Conv(192, 192, 3, 2),
        ),
        chain(pool=halve()),
    ])  # fmt: skip


def mixed_e(channels: int, pool: nn.Module) -> Parallel:
    """8 x 8: two branches that end in a row beside a column."""
    row, column = (1, 3), (3, 1)
    return Parallel([
        chain(branch1x1=Conv(channels, 320, 1)),
        chain(
            branch3x3_1=Conv(channels, 384, 1),
            ends=Parallel([
                chain(branch3x3_2a=Conv(384, 384, row)),
                chain(branch3x3_2b=Conv(384, 384, column)),
            ]),
        ),
        chain(
            branch3x3dbl_1=Conv(channels, 448, 1),
            branch3x3dbl_2=Conv(448, 384, 3),
            ends=Parallel([
                chain(branch3x3dbl_3a=Conv(384, 384, row)),
                chain(branch3x3dbl_3b=Conv(384, 384, column)),
            ]),
        ),
        chain(pool=pool, branch_pool=Conv(channels, 192, 1)),
    ])  # fmt: skip


# -------------------------------------------------------------------- network


class InceptionV3(nn.Module):
    """The network behind FID, KID, sFID and the Inception Score, resize included."""

    def __init__(self, resize: Resize = "tensorflow"):
        super().__init__()
        if resize not in RESIZES:
            raise DigitError(f"unknown resize {resize!r} for Inception: choose {' or '.join(get_args(Resize))}")
        self.resize = resize
        self.blocks = chain(
            Conv2d_1a_3x3=Conv(3, 32, 3, 2),
            Conv2d_2a_3x3=Conv(32, 32, 3, valid=True),
            Conv2d_2b_3x3=Conv(32, 64, 3),
            pool_1=halve(),  # (B, 64, 73, 73)
            Conv2d_3b_1x1=Conv(64, 80, 1),
            Conv2d_4a_3x3=Conv(80, 192, 3, valid=True),
            pool_2=halve(),  # (B, 192, 35, 35)
            Mixed_5b=mixed_a(192, 32),
            Mixed_5c=mixed_a(256, 64),
            Mixed_5d=mixed_a(288, 64),
            Mixed_6a=mixed_b(288),  # (B, 768, 17, 17)
            Mixed_6b=mixed_c(768, 128),
            Mixed_6c=mixed_c(768, 160),
            Mixed_6d=mixed_c(768, 160),
            Mixed_6e=mixed_c(768, 192),
            Mixed_7a=mixed_d(768),  # (B, 1280, 8, 8)
            Mixed_7b=mixed_e(1280, average_pool()),
            Mixed_7c=mixed_e(2048, nn.MaxPool2d(3, 1, 1)),  # (B, 2048, 8, 8)
        )
        self.fc = nn.Linear(DIM, NUM_LOGITS)

    def prepare(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B 3 299 299"]:
        """Resize uint8 RGB in float32 and bring it to -1..1. Raises DigitError for other types and shapes."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DigitError(f"Inception got {images.dtype} {tuple(images.shape)}, wanted uint8 (B, 3, H, W) RGB")
        return (RESIZES[self.resize](images.to(self.fc.weight.device).float()) - 128) / 128

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> InceptionFeatures:
        """Features of uint8 images.

        `spatial` is what ADM's evaluator (guided-diffusion) calls mixed_6/conv:0, channels 0 to 6: in that graph
        mixed_6 is the block Mixed_6d and conv its 1x1 branch after the ReLU, which comes first in the joined map.
        """
        x = self.prepare(images).contiguous(memory_format=torch.channels_last)
        spatial: Tensor | None = None
        for name, block in self.blocks.named_children():
            x = block(x)
            if name == "Mixed_6d":
                spatial = first_channels(x)  # (B, 2023)
        assert spatial is not None, "Mixed_6d is one of the blocks"
        pooled = x.mean((2, 3))  # (B, 2048)
        unbiased = pooled @ self.fc.weight.T  # (B, 1008)
        return InceptionFeatures(pooled, spatial, unbiased + self.fc.bias, unbiased)
