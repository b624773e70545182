"""Plain .npy files that are filled row by row, and that can be resumed after a kill or a full disk.

A long array lies in several files, its shards: NAME.npy if there is one, else NAME-00002-of-00017.npy and so on.
"""

import math
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from digit.errors import DigitError
from digit.runtime import distributed
from digit.runtime.files import atomic_path, disk_errors

COPY_ROWS = 65536
CRC_BYTES = 2**22
CRC_THREADS = 4
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


def crc32_files(paths: Sequence[Path]) -> list[int]:
    """CRC-32 of several files, a few at a time."""
    with ThreadPoolExecutor(CRC_THREADS, "digit-crc") as pool:
        return list(pool.map(crc32_file, paths))


def shard_stem(name: str, shard: int, num_shards: int) -> str:
    """Name of a shard's file without its ending: vq if it is the only one, else vq-00002-of-00017."""
    return name if num_shards == 1 else f"{name}-{shard:05d}-of-{num_shards:05d}"


def shard_stems(name: str, num_rows: int, shard_rows: int) -> list[str]:
    """Names of the files of an array of `num_rows` rows, `shard_rows` in each but the last."""
    num = max(1, -(-num_rows // shard_rows))
    return [shard_stem(name, shard, num) for shard in range(num)]


class Shards:
    """The rows of several arrays, one array after another, read as if they were one array (R, N)."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, self.parts)], dtype=np.int64)  # (S + 1,)
        self.shape, self.dtype = (int(self.starts[-1]), *self.parts[0].shape[1:]), self.parts[0].dtype
        self.nbytes = sum(part.nbytes for part in self.parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Rows by number, slice, list or array of numbers; copies them."""
        if isinstance(key, slice):
            return self.take(np.arange(*key.indices(len(self)), dtype=np.int64))
        rows = np.asarray(key, dtype=np.int64)
        return self.take(np.where(rows < 0, rows + len(self), rows).reshape(-1)).reshape(*rows.shape, *self.shape[1:])

    def take(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """Copies `rows`, (n,) int64 from 0 on: (n, N). As numpy's take along axis 0, the only one."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {len(self)}")
        found = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self.parts[shard].take(rows[here] - self.starts[shard], axis=0)
        return found


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

    def __len__(self) -> int:
        return self.shape[0]

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
        if not len(values):  # an empty view has no bytes to cast
            return
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


class ArrayFiles:
    """One array in an ArrayFile for every `shard_rows` rows; the last holds the rest."""

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], dtype: str, shard_rows: int):
        self.shard_rows, self.stems = shard_rows, shard_stems(name, shape[0], shard_rows)
        self.parts = [
            ArrayFile(folder / f"{stem}.partial.npy", (min(shard_rows, shape[0] - first), *shape[1:]), dtype)
            for stem, first in zip(self.stems, range(0, len(self.stems) * shard_rows, shard_rows), strict=True)
        ]
        self.opened: list[ArrayFile] = []
        self.written: set[ArrayFile] = set()  # since the last sync

    def allocate(self) -> None:
        """As `ArrayFile.allocate`, for all shards."""
        for part in self.parts:
            part.allocate()

    def __enter__(self) -> "ArrayFiles":
        try:
            for part in self.parts:
                self.opened.append(part.__enter__())
        except BaseException:
            self.__exit__()
            raise
        return self

    def write(self, row: int, values: np.ndarray) -> None:
        """Writes `values` to rows row..row + len(values) - 1, across shards where need be."""
        while len(values):
            shard, place = divmod(row, self.shard_rows)
            part, count = self.parts[shard], min(len(values), self.shard_rows - place)
            part.write(place, values[:count])
            self.written.add(part)
            row, values = row + count, values[count:]

    def sync(self) -> None:
        """Waits until all rows are on disk."""
        for part in self.written:
            part.sync()
        self.written.clear()

    def __exit__(self, *_: object) -> None:
        for part in self.opened:
            part.__exit__()


def link_or_copy(source: Path, final: Path) -> None:
    """Makes `final` a hard link of a finished file; a copy where the file system has no links or is another one."""
    with disk_errors(final):
        try:
            os.link(source.resolve(), final)
        except OSError:
            with atomic_path(final) as temporary:
                shutil.copyfile(source, temporary)


def copy_rows(partial: Path, final: Path, keep: np.ndarray, array: ArrayFile) -> None:
    """Writes the rows of `partial` where `keep` is True to `final`, which is replaced atomically."""
    if keep.all():
        os.replace(partial, final)
        return
    whole = np.load(partial, mmap_mode="r", allow_pickle=False)
    starts = range(0, len(keep), COPY_ROWS)
    parts = (whole[start : start + COPY_ROWS][keep[start : start + COPY_ROWS]] for start in starts)
    write_rows(final, (int(keep.sum()), *array.shape[1:]), array.dtype.str, parts)


def write_rows(final: Path, shape: tuple[int, ...], dtype: str, parts: Iterable[np.ndarray]) -> None:
    """Writes an array (R, ...) part by part to `final`, which is replaced atomically."""
    with atomic_path(final) as temporary:
        written, row = ArrayFile(temporary, shape, dtype), 0
        written.allocate()
        with written:
            for values in parts:
                written.write(row, values)
                row += len(values)
