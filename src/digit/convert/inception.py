"""Weights of the FID InceptionV3 as released by pytorch-fid and torch-fidelity, with BatchNorm folded in."""

from pathlib import Path

import torch
from torch import Tensor

from digit.convert.efficientnet import fold_batch_norm
from digit.convert.reading import check_state, check_tensors, listed, read_weights, unfit
from digit.convert.weight_sets import choose_set
from digit.errors import DigitError
from digit.models.inception import InceptionV3, Resize
from digit.models.memory_format import channels_last

RELEASED_SHA256 = "6726825d"  # first digits, which both file names contain
HOW_TO_GET = (
    f"download pt_inception-2015-12-05-{RELEASED_SHA256}.pth from the GitHub releases of mseitzer/pytorch-fid, or "
    f"weights-inception-2015-12-05-{RELEASED_SHA256}.pth from those of toshas/torch-fidelity; "
    "without a file, EfficientNet-Lite2 computes the features and the metrics have other names"
)
STEM = "Conv2d_1a_3x3.conv.weight"
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


def load_inception(path: str | Path, resize: Resize = "tensorflow") -> InceptionV3:
    """Loads the network with a released file's weights, on CPU, in eval mode and without gradients.

    Raises DigitError that says how to get the weights if the file is missing, unreadable or of another network.
    """
    with torch.device("meta"):
        net = InceptionV3(resize)
    try:
        state = convert_inception(choose_set(read_weights(path), STEM, str(path)), str(path))
    except DigitError as error:
        raise DigitError(f"{error}; {HOW_TO_GET}") from error
    net.load_state_dict(state, assign=True)
    return channels_last(net.eval().requires_grad_(False))


def convert_inception(foreign: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Renames and folds a released state dict, to float32. Raises DigitError for tensors it does not use."""
    with torch.device("meta"):
        net = InceptionV3()
    remaining = {name: tensor for name, tensor in foreign.items() if not name.endswith(".num_batches_tracked")}
    convs = {name: released_names(name) for name, module in net.named_modules() if isinstance(module, torch.nn.Conv2d)}
    expected = {"fc.weight", "fc.bias"}.union(*convs.values())
    absent, unexpected = sorted(expected - remaining.keys()), sorted(remaining.keys() - expected)
    if absent or unexpected:
        faults = [f"{what} {listed(some)}" for what, some in (("missing", absent), ("unexpected", unexpected)) if some]
        raise DigitError(f"{source} is not the InceptionV3 of FID: {'; '.join(faults)}")
    check_tensors(remaining, source)
    state = {name: remaining[name].float() for name in ("fc.weight", "fc.bias")}
    with unfit(source):
        for ours, theirs in convs.items():
            folded = fold_batch_norm(*(remaining[name] for name in theirs))
            state[f"{ours}.weight"], state[f"{ours}.bias"] = folded
        check_state(state, net, source)
    return state


def released_names(module: str) -> list[str]:
    """blocks.Mixed_5b.1.branch5x5_2 -> the released names of its convolution and BatchNorm, Mixed_5b.branch5x5_2.*"""
    scaffolding = {"blocks", "ends"}  # names that only our modules have, like the numbers of parallel branches
    name = ".".join(part for part in module.split(".") if part not in scaffolding and not part.isdigit())
    return [f"{name}.conv.weight", *(f"{name}.bn.{part}" for part in NORM_PARTS)]
