"""Writes files atomically (a reader finds the old file or the new one, never a part), and reads JSON and tensors."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from digit.errors import DigitError
from digit.runtime.paths import nearest
from digit.runtime.scalars import shown

if TYPE_CHECKING:  # the command line answers --help without either
    import numpy as np
    import torch


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path as callers give it, `~` as the home folder. Raises DigitError for an empty one and for anything else."""
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise DigitError(f"a path is {shown(path)}: give it as text or as a pathlib.Path")
    try:
        return Path(path).expanduser()
    except (RuntimeError, TypeError, ValueError) as error:  # ~NAME of no user, bytes
        raise DigitError(f"no such path: {path} ({error})") from error


def cache_folder() -> Path:
    """The folder for files that can be computed again: DIGIT_CACHE, or `digit` in the user's cache folder."""
    if chosen := os.environ.get("DIGIT_CACHE"):
        return as_path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "digit"


MAKE_AGAIN = "delete it and run the command again that makes it"
REFUSALS = (
    errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP
)  # fmt: skip
FIXED_OUTSIDE = {errno.EROFS: "make it writable", errno.EIO: "have the disk checked"}


def check_writable(path: str | Path, *, folder: bool = False) -> None:
    """Raise DigitError before the work where its result cannot be written to `path`.

    It creates nothing: a command that fails before it has a result leaves no folder behind.
    """
    path = as_path(path)
    target = path if folder else path.parent
    with disk_errors(path):
        if not folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        above = (target, *target.absolute().parents)
        there = next(place for place in above if place.exists() or place.is_symlink())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK):
            read_only = hasattr(os, "statvfs") and os.statvfs(there).f_flag & os.ST_RDONLY
            raise OSError(number := errno.EROFS if read_only else errno.EACCES, os.strerror(number))


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """A context that turns a full disk or a refused write into a DigitError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DigitError(
                f"disk full while writing {path}: free some space and run again, the work continues"
            ) from error
        elsewhere = "choose another --out"
        if Path(path).is_relative_to(cache_folder()):
            elsewhere = "set DIGIT_CACHE to another folder"
        if error.errno in FIXED_OUTSIDE:
            hint = f"{FIXED_OUTSIDE[error.errno]} and run again, the work continues, or {elsewhere}"
            raise DigitError(f"cannot write {path}: {error.strerror}; {hint}") from error
        if error.errno in REFUSALS:
            raise DigitError(f"cannot write {path}: {error.strerror}; {elsewhere}") from error
        raise


def require_space(folder: str | Path, needed: int, what: str) -> None:
    """Raise DigitError where the file system of `folder` has fewer than `needed` bytes free; `what` names the files."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DigitError(
            f"disk full: {what} takes {format_bytes(needed)} and {folder} has {format_bytes(free)} free: "
            "free some space and run again, the work continues"
        )


def format_bytes(count: float) -> str:
    """3_400_000 -> '3.2 MiB'."""
    units = ("B", "KiB", "MiB", "GiB")
    power = min(len(units) - 1, int(math.log(max(count, 1), 1024)))
    return f"{count / 1024**power:.{1 if power else 0}f} {units[power]}"


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's list of names to the disk, where the file system supports it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`, on failure remove it.

    Raises DigitError where the disk is full or the folder cannot be written; the previous file stays untouched.
    """
    path = as_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".aside{path.suffix}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


OUTPUT_MARK = ".digit"  # this file marks a folder that digit fills


def mark_output(folder: str | Path) -> None:
    """Mark an existing folder as one that digit fills, so that its pictures are never read as data of a folder above.

    A process that is killed between the mark's creation and its text leaves it empty: the next one writes the text.
    An output that cannot be marked is complete all the same, so errors are left to the work itself.
    """
    mark = Path(folder) / OUTPUT_MARK
    with suppress(OSError):
        if Path(folder).is_dir() and not (mark.exists() and mark.stat().st_size):
            mark.write_text("DiGIT made this folder. Its pictures do not count as images of a folder above it.\n")


ASIDE = re.compile(r"\..+\.[a-z0-9_]{8}\.aside(\.[^.]+)?")  # temporary names of `atomic_path`


def remove_leftovers(*folders: str | Path) -> None:
    """Remove temporary files of killed writers; call it only while no other process writes there (`lock_folder`)."""
    for folder in map(Path, folders):
        for path in folder.glob(".*.aside*"):  # empty where the folder is missing
            if ASIDE.fullmatch(path.name):
                with suppress(OSError):  # the work reports a read-only disk when it writes
                    path.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def plain(value: Any) -> Any:
    """The value that JSON would give back: tuples become lists, keys strings, NumPy's numbers Python's."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    import numpy as np

    return value.item() if isinstance(value, np.generic) else value


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves in which two nested dictionaries differ: (dotted name, old, new), in the order of `new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{name}.{k}" if name else k)]
    return [] if old == new else [(name, old, new)]


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_result(path: str | Path, value: Any) -> None:
    """Write `value` as `write_json` does, into a folder that digit fills (`mark_output`)."""
    write_json(path, value)
    mark_output(Path(path).parent)


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises DigitError where the file is missing or does not hold JSON."""
    path = as_path(path)
    try:
        if path.exists() and not path.is_file():  # a folder, a pipe, an endless device
            raise ValueError("not a regular file")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DigitError(f"no such file: {path}") from error
    except (ValueError, OSError, RecursionError) as error:
        raise DigitError(f"cannot read {path} as JSON ({error}): {MAKE_AGAIN}") from error


def save_npy(path: str | Path, array: "np.ndarray") -> None:
    """Write one array as .npy without pickle, atomically."""
    import numpy as np

    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        np.save(out, array, allow_pickle=False)


@dataclass(frozen=True)
class Stacked:
    """A float32 tensor given as parts, which are concatenated along dimension 0 only when the tensor is written.

    The parts may be memory-mapped, so that a checkpoint is converted with one tensor in memory at a time.
    """

    parts: "tuple[torch.Tensor, ...]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the concatenated tensor."""
        rest = {tuple(part.shape[1:]) for part in self.parts if part.ndim}
        if len(rest) != 1 or not all(part.ndim for part in self.parts):
            raise ValueError(f"tensors of shapes {[tuple(part.shape) for part in self.parts]} cannot be stacked")
        return (sum(len(part) for part in self.parts), *rest.pop())

    def tensor(self) -> "torch.Tensor":
        """The concatenated tensor, contiguous float32."""
        import torch

        whole = self.parts[0] if len(self.parts) == 1 else torch.cat([part.float() for part in self.parts])
        return whole.float().contiguous()


def save_tensors(
    path: str | Path, tensors: "Mapping[str, torch.Tensor | Stacked]", metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically; the bytes are those of `safetensors.torch.save_file`.

    Copies at most one tensor at a time: `save_file` wants them all in memory, contiguous and without shared storage
    (measured in docs/libraries.md). Format: a little-endian uint64, so many bytes of JSON, the tensors' bytes.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    # the largest elements first, so that every tensor is aligned
    order = sorted(tensors, key=lambda name: (-_dtype(tensors[name]).itemsize, name))
    for name in order:
        dtype, shape, begin = _dtype(tensors[name]), tuple(tensors[name].shape), end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[str(dtype)], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = tensors[name]
            tensor = value.tensor() if isinstance(value, Stacked) else value.detach().cpu().contiguous()
            out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


SAFETENSORS_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


def _dtype(value: "torch.Tensor | Stacked") -> "torch.dtype":
    import torch

    return torch.float32 if isinstance(value, Stacked) else value.dtype


def load_tensors(path: str | Path) -> dict[str, "torch.Tensor"]:
    """Memory-map a safetensors file as CPU tensors. Raises DigitError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if (path := as_path(path)).exists() and not path.is_file():
            raise ValueError("not a regular file")
        return load_file(path)
    except FileNotFoundError as error:
        raise DigitError(f"no such file: {path}{nearest(path)}; run the command again that makes it") from error
    except (SafetensorError, ValueError, OSError, KeyError, AttributeError, RuntimeError) as error:
        raise DigitError(f"{path} is no readable safetensors file ({error}): {MAKE_AGAIN}") from error


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits."""
    with open(as_path(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tensors(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors, in the order of their names, as 64 hex digits."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
