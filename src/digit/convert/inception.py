"""Weights of the FID InceptionV3 as pytorch-fid and torch-fidelity release them, BatchNorm folded in."""

from pathlib import Path

import torch
from torch import Tensor

from digit.convert.efficientnet import fold_batch_norm
from digit.convert.reading import check_state, check_tensors, listed, read_torch, require_state, unfit
from digit.errors import DigitError
from digit.models.inception import InceptionV3, Resize

RELEASED_SHA256 = "6726825d"  # first digits; both releases are named after it
HOW_TO_GET = (
    f"take pt_inception-2015-12-05-{RELEASED_SHA256}.pth from the GitHub releases of mseitzer/pytorch-fid, or "
    f"weights-inception-2015-12-05-{RELEASED_SHA256}.pth from those of toshas/torch-fidelity; "
    "without a file EfficientNet-Lite2 judges, under metric names of its own"
)
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


def load_inception(path: str | Path, resize: Resize = "tensorflow") -> InceptionV3:
    """The network with a released file's weights, on CPU, in evaluation mode and without gradients.

    Raises DigitError that says how to get the weights where the file is missing, unreadable or another network's.
    """
    with torch.device("meta"):
        net = InceptionV3(resize)
    try:
        state = convert_inception(require_state(read_torch(path), str(path)), str(path))
    except DigitError as error:
        raise DigitError(f"{error}; {HOW_TO_GET}") from error
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def convert_inception(foreign: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Released names to ours, float32. Every foreign tensor is used, or is a training counter; the rest is an error."""
    with torch.device("meta"):
        net = InceptionV3()
    left = {name: tensor for name, tensor in foreign.items() if not name.endswith(".num_batches_tracked")}
    convs = {name: released_names(name) for name, module in net.named_modules() if isinstance(module, torch.nn.Conv2d)}
    wanted = {"fc.weight", "fc.bias"}.union(*convs.values())
    absent, unexpected = sorted(wanted - left.keys()), sorted(left.keys() - wanted)
    if absent or unexpected:
        faults = [f"{what} {listed(some)}" for what, some in (("missing", absent), ("unexpected", unexpected)) if some]
        raise DigitError(f"{source} is not the Inception of FID: {'; '.join(faults)}")
    check_tensors(left, source)
    state = {name: left[name].float() for name in ("fc.weight", "fc.bias")}
    with unfit(source):
        for ours, theirs in convs.items():
            folded = fold_batch_norm(*(left[name] for name in theirs))
            state[f"{ours}.weight"], state[f"{ours}.bias"] = folded
        check_state(state, net, source)
    return state


def released_names(module: str) -> list[str]:
    """blocks.Mixed_5b.1.branch5x5_2 -> the released names of its convolution and BatchNorm, Mixed_5b.branch5x5_2.*"""
    scaffolding = {"blocks", "ends"}  # ours alone, as are the numbers of parallel branches
    name = ".".join(part for part in module.split(".") if part not in scaffolding and not part.isdigit())
    return [f"{name}.conv.weight", *(f"{name}.bn.{part}" for part in NORM_PARTS)]
