"""Files that are either the old one or the new one, never half of one."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from digit.errors import DigitError

if TYPE_CHECKING:
    import torch


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn a full disk or a refused write into one line that names the file; what was there before stays."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DigitError(f"disk full while writing {path}: free some space and run again, work goes on") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise DigitError(f"cannot write {path}: {error.strerror}; choose another --out") from error
        raise


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on failure removed.

    Raises DigitError where the disk is full or the folder cannot be written; the previous file stays untouched.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples become lists, keys strings, NumPy's numbers Python's."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises DigitError where the file is missing or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DigitError(f"no such file: {path}") from error
    except (ValueError, OSError) as error:
        raise DigitError(f"cannot read {path} as JSON ({error}): delete it and make it again") from error


def save_npy(path: str | Path, array: np.ndarray) -> None:
    """Write one array as .npy without pickle, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        np.save(out, array, allow_pickle=False)


def save_tensors(
    path: str | Path, tensors: Mapping[str, "torch.Tensor"], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically; they are copied to contiguous CPU memory first."""
    from safetensors.torch import save_file

    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(copies, temporary, metadata=metadata)


def load_tensors(path: str | Path) -> dict[str, "torch.Tensor"]:
    """Memory-map a safetensors file to CPU tensors. Raises DigitError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise DigitError(f"no such file: {path}") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise DigitError(f"{path} is no readable safetensors file ({error}): delete it and make it again") from error


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tensors(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, whatever their order, as 64 hex digits."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
