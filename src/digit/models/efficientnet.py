"""EfficientNet-Lite 0 and 2 (Tan & Le 2019 without squeeze-excite, with ReLU6, fixed stem and head), for inference.

Shapes: B images, S input side, C channels. Strides of the stages: 2, 4, 8, 16, 16, 32, 32.
BatchNorm is folded into the convolutions when weights are converted (digit.convert.efficientnet), so that a block is
three biased convolutions. Padding is TensorFlow's SAME for the input that comes in: on even sizes a stride-2
convolution pads one pixel more on the right and below than on the left and above. The PyTorch package fixes the
padding for its nominal size (224 for Lite0, 260 for Lite2) instead: both agree for Lite0 on every multiple of 32 and
for Lite2 at 260; elsewhere the package shifts the grid by a pixel and so differs from the TensorFlow original, which
is followed here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from digit.errors import DigitError

# (repeats, kernel, stride, expansion, channels) of the seven stages before scaling
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280  # the Lite family scales neither
MAX_MULTIPLIER = 32  # larger numbers in a file are errors


@dataclass(frozen=True, kw_only=True)
class EfficientNetConfig:
    """Size of an EfficientNet-Lite and how much of it is kept."""

    width: float = 1.0
    """Channel multiplier; channels are rounded to multiples of 8."""
    depth: float = 1.0
    """Block multiplier of the five middle stages, rounded up."""
    num_blocks: int | None = None
    """Blocks kept; None keeps all."""
    head: bool = True
    """Keep the 1x1 convolution to 1280 channels behind the last block (needs all blocks)."""

    def __post_init__(self) -> None:
        for name in ("width", "depth"):
            if not 0 < getattr(self, name) <= MAX_MULTIPLIER:
                raise DigitError(f"EfficientNet: {name} is {getattr(self, name)}: above 0, up to {MAX_MULTIPLIER}")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise DigitError(f"EfficientNet: {self.num_blocks} blocks are kept: at least 1")

    @property
    def blocks(self) -> list["BlockShape"]:
        """The shape of every block that is kept, in order."""
        shapes, channels = [], STEM_CHANNELS
        for stage, (repeats, kernel, stride, expansion, width) in enumerate(STAGES):
            fixed = stage in (0, len(STAGES) - 1)
            out = round_channels(width * self.width)
            for repeat in range(repeats if fixed else math.ceil(repeats * self.depth)):
                shapes.append(BlockShape(channels, out, kernel, stride if repeat == 0 else 1, expansion))
                channels = out
        return shapes[: self.num_blocks]

    @property
    def default_layer(self) -> int:
        """Index of the last block at stride 16, the counterpart of a ViT's third-to-last layer."""
        stride, last = 2, 0
        for index, block in enumerate(replace(self, num_blocks=None).blocks):
            stride *= block.stride
            last = index if stride == 16 else last
        return last

    @property
    def stride(self) -> int:
        """Input pixels per output cell."""
        return 2 * math.prod(block.stride for block in self.blocks)

    @property
    def dim(self) -> int:
        """Channels of the output."""
        return HEAD_CHANNELS if self.head else self.blocks[-1].out_channels


SIZES = {
    "efficientnet_lite0": EfficientNetConfig(),
    "efficientnet_lite2": EfficientNetConfig(width=1.1, depth=1.2),
}


def round_channels(channels: float) -> int:
    """Nearest multiple of 8, never more than 10 % below `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


@dataclass(frozen=True)
class BlockShape:
    """One inverted-residual block."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    expansion: int


class SameConv(nn.Conv2d):
    """Biased convolution with TensorFlow's SAME padding, computed for the size that comes in."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, input: Tensor) -> Tensor:
        x, kernel, stride = input, self.kernel_size[0], self.stride[0]
        if stride > 1:
            height, width = (max((math.ceil(s / stride) - 1) * stride + kernel - s, 0) for s in x.shape[-2:])
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


class Block(nn.Module):
    """Expand 1x1, depthwise k x k, project 1x1; the input is added where the shape allows."""

    def __init__(self, shape: BlockShape):
        super().__init__()
        hidden = shape.in_channels * shape.expansion
        self.expand = SameConv(shape.in_channels, hidden, 1) if shape.expansion > 1 else None
        self.depthwise = SameConv(hidden, hidden, shape.kernel, shape.stride, groups=hidden)
        self.project = SameConv(hidden, shape.out_channels, 1)
        self.residual = shape.stride == 1 and shape.in_channels == shape.out_channels

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else F.relu6(self.expand(x), inplace=True)  # (B, 6 C, s, s)
        out = self.project(F.relu6(self.depthwise(hidden), inplace=True))  # (B, C', s', s')
        return out.add_(x) if self.residual else out


class EfficientNet(nn.Module):
    """The kept part of an EfficientNet-Lite: stem, blocks and perhaps the head; no BatchNorm, no dropout."""

    def __init__(self, cfg: EfficientNetConfig):
        super().__init__()
        total = len(replace(cfg, num_blocks=None).blocks)
        assert not cfg.head or len(cfg.blocks) == total, "the head needs every block"
        self.cfg = cfg
        self.stem = SameConv(3, STEM_CHANNELS, 3, 2)
        self.blocks = nn.ModuleList(Block(shape) for shape in cfg.blocks)
        self.head = SameConv(cfg.blocks[-1].out_channels, HEAD_CHANNELS, 1) if cfg.head else None

    @property
    def dim(self) -> int:
        """Channels D of the features."""
        return self.cfg.dim

    def grid(self, size: int) -> tuple[int, int]:
        """(rows, columns) of the features of a square input of `size` pixels."""
        side = math.ceil(size / self.cfg.stride)
        return side, side

    def forward(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N D"]:
        """Normalised images, (255 x - 127) / 128 for x in 0..1, to the output cells in raster order."""
        return self.with_inner_map(x, None)[0]

    def with_inner_map(
        self, x: Float[Tensor, "B 3 S S"], layer: int | None
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B C H W"] | None]:
        """As `forward`, and beside it the map (B, C, s, s) that block `layer` of the same pass gave."""
        inner = None
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)))  # (B, 32, S/2, S/2)
        for index, block in enumerate(self.blocks):
            x = block(x)
            inner = x if index == layer else inner
        if self.head is not None:
            x = F.relu6(self.head(x))  # (B, 1280, S/32, S/32)
        return x.flatten(2).transpose(1, 2), inner  # (B, N, D)

    def layer_outputs(self, x: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[Float[Tensor, "B N C"]]:
        """The output cells of these blocks, as nets cut behind each of them give them, in one pass."""
        found: dict[int, Tensor] = {}
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)))
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in layers:
                found[index] = x.flatten(2).transpose(1, 2)
        return [found[layer] for layer in layers]

    def layer_dim(self, layer: int) -> int:
        """Channels of a block's output."""
        return self.cfg.blocks[layer].out_channels

    def layer_grid(self, layer: int, size: int) -> tuple[int, int]:
        """(rows, columns) of a block's output, of a square input of `size` pixels."""
        side = math.ceil(size / replace(self.cfg, num_blocks=layer + 1, head=False).stride)
        return side, side

    def pooled(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Mean of the output cells."""
        return self(x).mean(1)
