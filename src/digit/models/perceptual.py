"""Perceptual distance between images from the features of a trained VGG16 or AlexNet (LPIPS, Zhang et al. 2018, Eq. 1).

The weights are the shift-tolerant ones that the package `stlpips-pytorch` ships: trunks whose striding is a stride-1
pool followed by a binomial blur. Only its weight files are read; the package itself is never imported (it needs
torchvision). Without the package `load_perceptual` returns None and training goes on without this term.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.efficientnet import EfficientNet

logger = logging.getLogger(__name__)

# One row per stage, whose output is compared: (convolution index in the file, kernel, padding), "pool" k and "blur".
# AlexNet here has stride 1 in its first convolution and blurs after it.
TRUNKS: dict[str, tuple[tuple, ...]] = {
    "vgg": (
        ((0, 1), (2, 1)),
        ("pool2", "blur", (6, 1), (8, 1)),
        ("pool2", "blur", (12, 1), (14, 1), (16, 1)),
        ("pool2", "blur", (20, 1), (22, 1), (24, 1)),
        ("pool2", "blur", (28, 1), (30, 1), (32, 1)),
    ),
    "alex": (
        ((0, 2, "blur"),),
        ("pool3", "blur", (5, 2)),
        ("pool3", "blur", (9, 1)),
        ((11, 1),),
        ((13, 1),),
    ),
}


def reflect(x: Tensor, dim: int, width: int = 2) -> Tensor:
    """x with `width` reflected pixels at both ends of a dimension.

    F.pad's reflection has no deterministic backward on a GPU, which a deterministic run would refuse.
    """
    size = x.shape[dim]
    before, after = x.narrow(dim, 1, width).flip(dim), x.narrow(dim, size - 1 - width, width).flip(dim)
    return torch.cat([before, x, after], dim)


def blur_downsample(x: Tensor) -> Tensor:
    """Binomial [1 2 1] x [1 2 1] / 16 with stride 2 after reflecting two pixels on every side."""
    x = reflect(reflect(x, -1), -2)
    # [1 1]/2 twice is [1 2 1]/4; two poolings are several times faster than a depthwise convolution on CPU
    return F.avg_pool2d(F.avg_pool2d(x, 2, 1), 2, 2)


class PerceptualDistance(nn.Module):
    """LPIPS distance, differentiable in both images; its own parameters are frozen.

    `num_stages` keeps the first stages only: at 64 px the last ones see a few pixels and cost a third of the time.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, name: str, weights: dict[str, Tensor], num_stages: int = 5) -> None:
        super().__init__()
        self.stages = TRUNKS[name][:num_stages]
        self.convs = nn.ModuleDict()
        for number, stage in enumerate(self.stages, 1):
            for index, padding, *_ in (op for op in stage if isinstance(op, tuple)):
                prefix = f"net.slice{number}.{index}"
                self.convs[str(index)] = frozen_conv(weights[f"{prefix}.weight"], weights[f"{prefix}.bias"], padding)
        self.heads = nn.ParameterList(
            nn.Parameter(weights[f"lin{n}.model.1.weight"], requires_grad=False) for n in range(len(self.stages))
        )
        self.register_buffer("shift", weights["scaling_layer.shift"])  # (1, 3, 1, 1)
        self.register_buffer("scale", weights["scaling_layer.scale"])

    def features(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Unit-length feature maps of every stage for images in [0, 1]."""
        x = (images * 2 - 1 - self.shift) / self.scale
        maps = []
        for stage in self.stages:
            for op in stage:
                x = self.apply_op(op, x)
            maps.append(x)
        return [unit_length(x) for x in maps]

    def apply_op(self, op: str | tuple, x: Tensor) -> Tensor:
        if op == "blur":
            return blur_downsample(x)
        if isinstance(op, str):
            return F.max_pool2d(x, int(op.removeprefix("pool")), 1)
        x = self.convs[str(op[0])](x)
        return F.relu(blur_downsample(x) if "blur" in op else x)

    def forward(self, image: Float[Tensor, "B 3 H W"], target: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """Distance (B,) >= 0 between images in [0, 1]; 0 for identical ones, about 0.3 to 0.7 for a strong blur."""
        # d = sum_l mean_hw sum_c w_lc (y_hat_lhwc - y_lhwc)^2  (Zhang et al. 2018, Eq. 1)
        pairs = zip(self.heads, self.features(image), self.features(target), strict=True)
        distances = (F.conv2d((a - b).square(), head).float().mean((1, 2, 3)) for head, a, b in pairs)
        return reduce(torch.add, distances)


class EncoderDistance(nn.Module):
    """Perceptual distance in the features of a frozen EfficientNet classifier.

    Args:
        net: the network with its head or without; its parameters are frozen.
        layers: blocks whose output is compared; by default the last at strides 4, 8, 16 and 32 of EfficientNet-Lite0.
        size: side in pixels at which the net sees the images.
    """

    def __init__(self, net: EfficientNet, layers: tuple[int, ...] = (2, 4, 10, 15), size: int = 128) -> None:
        super().__init__()
        self.net, self.layers, self.size = net.eval().requires_grad_(False), set(layers), size

    def features(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Unit-length feature maps of the chosen blocks for images in [0, 1]."""
        x = (F.interpolate(images, size=(self.size, self.size), mode="bilinear") * 255 - 127) / 128
        x = F.relu6(self.net.stem(x.contiguous(memory_format=torch.channels_last)))
        maps = []
        for number, block in enumerate(self.net.blocks):
            x = block(x)
            if number in self.layers:
                maps.append(unit_length(x))
        return maps

    def forward(self, image: Float[Tensor, "B 3 H W"], target: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """Distance (B,) in 0..4 between images in [0, 1]; 0 for identical ones."""
        # d = mean_l mean_hw ||y_hat_lhw - y_lhw||^2 with unit-length features y
        with torch.no_grad():
            wanted = self.features(target)
        pairs = list(zip(self.features(image), wanted, strict=True))
        return reduce(torch.add, ((a - b).float().square().sum(1).mean((1, 2)) for a, b in pairs)) / len(pairs)


def unit_length(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def frozen_conv(weight: Tensor, bias: Tensor, padding: int) -> nn.Conv2d:
    out_channels, in_channels, kernel, _ = weight.shape
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding)
    conv.load_state_dict({"weight": weight, "bias": bias})
    return conv.requires_grad_(False)


def perceptual_weights_path(name: str) -> Path | None:
    """Where the installed `stlpips-pytorch` keeps the weights of a trunk; None without the package."""
    spec = importlib.util.find_spec("stlpips_pytorch")  # locates, does not import
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "weights" / "vST0.0" / f"{name}_shift_tolerant.pth"
    return path if path.exists() else None


def load_perceptual(name: str = "vgg", num_stages: int = 5) -> PerceptualDistance | None:
    """The perceptual distance of trunk `vgg` or `alex`; None, with a log line, where its weights are not installed."""
    if name not in TRUNKS:
        raise DigitError(f"perceptual trunk {name!r} is unknown: choose one of {', '.join(TRUNKS)}")
    path = perceptual_weights_path(name)
    if path is None:
        logger.warning("no perceptual weights (pip install --no-deps stlpips-pytorch): training without that term")
        return None
    return PerceptualDistance(name, torch.load(path, map_location="cpu", weights_only=True), num_stages)
