"""Plain .npy files that are filled row by row, and that can be resumed after a kill or a full disk."""

import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from digit.errors import DigitError
from digit.runtime import distributed
from digit.runtime.files import atomic_path, disk_errors

COPY_ROWS = 65536
CRC_BYTES = 2**22
AGAIN = "delete the folder and make the tokens again (digit tokenize ...)"


def open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory-maps a .npy read-only. Raises DigitError if it is missing, truncated or of another shape."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            data = _data_offset(file, shape, dtype)
            size, expected = os.fstat(file.fileno()).st_size, data + math.prod(shape) * dtype.itemsize
        if size != expected:
            raise DigitError(f"{path} was truncated: it holds {size} bytes, its header says {expected}: {AGAIN}")
        return np.load(path, mmap_mode="r", allow_pickle=False) if math.prod(shape) else np.zeros(shape, dtype)
    except FileNotFoundError as error:
        raise DigitError(f"no such file: {path}; {AGAIN}") from error
    except DigitError:
        raise
    except Exception as error:  # a damaged header raises nearly any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DigitError(f"{path} cannot be read ({reason}): {AGAIN}") from error


def crc32_file(path: Path) -> int:
    """CRC-32 of a file's bytes: 6 GB per second, and it detects any single burst of flipped bits up to 32 long."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(CRC_BYTES):
            total = zlib.crc32(block, total)
    return total


def check_range(path: Path, array: np.ndarray, low: int, high: int, what: str) -> None:
    """Raises DigitError unless all numbers of `array`, which was read from `path`, lie in low..high."""
    least, most = int(array.min()), int(array.max())
    if least < low or most > high:
        raise DigitError(f"{path} holds {what} {least}..{most}, its manifest allows {low}..{high}: {AGAIN}")


def _data_offset(file: Any, shape: tuple[int, ...], dtype: np.dtype) -> int:
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a .npy file of version 1.0")
    got_shape, fortran, got_dtype = np.lib.format.read_array_header_1_0(file)
    if (got_shape, got_dtype) != (shape, dtype) or fortran:
        raise ValueError(f"its header says {got_dtype} {got_shape}, the manifest {dtype} {shape}")
    return file.tell()


def _opener(path: str, flags: int) -> int:
    """Opens for writing; with several ranks, every write is synced.

    Otherwise an NFS client would write back a whole page of memory, with an old state of another rank's rows in it.
    """
    return os.open(path, flags | (getattr(os, "O_DSYNC", 0) if distributed.world_size() > 1 else 0))


class ArrayFile:
    """A .npy that is filled row by row. It is allocated in full first, so that a full disk fails at once.

    Rows go through write(), not a memory map: on a full disk write() raises, while a map kills the process by signal.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str):
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self.row_bytes = int(np.prod(shape[1:])) * self.dtype.itemsize

    def allocate(self) -> None:
        """Writes the header and zeros up to the full length, so that the disk blocks are allocated."""
        with disk_errors(self.path), open(self.path, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            remaining = self.shape[0] * self.row_bytes
            while remaining > 0:
                remaining -= file.write(bytes(min(remaining, 2**22)))
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> "ArrayFile":
        with open(self.path, "rb") as file:
            self.offset = _data_offset(file, self.shape, self.dtype)
        self.file = open(self.path, "r+b", buffering=0, opener=_opener)
        return self

    def write(self, row: int, values: np.ndarray) -> None:
        """Writes `values` to rows row..row + len(values) - 1."""
        with disk_errors(self.path):
            data = np.ascontiguousarray(values, dtype=self.dtype).data.cast("B")
            self.file.seek(self.offset + row * self.row_bytes)
            while data:
                data = data[self.file.write(data) :]

    def sync(self) -> None:
        """Waits until all rows are on disk."""
        with disk_errors(self.path):
            os.fsync(self.file.fileno())

    def __exit__(self, *_: object) -> None:
        self.file.close()


def copy_rows(partial: Path, final: Path, keep: np.ndarray, array: ArrayFile) -> None:
    """Writes the rows of `partial` where `keep` is True to `final`, which is replaced atomically."""
    if keep.all():
        os.replace(partial, final)
        return
    whole = np.load(partial, mmap_mode="r", allow_pickle=False)
    with atomic_path(final) as temporary:
        kept = ArrayFile(temporary, (int(keep.sum()), *array.shape[1:]), array.dtype.str)
        kept.allocate()
        row = 0
        with kept:
            for start in range(0, len(keep), COPY_ROWS):
                values = whole[start : start + COPY_ROWS][keep[start : start + COPY_ROWS]]
                kept.write(row, values)
                row += len(values)
