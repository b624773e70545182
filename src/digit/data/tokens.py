"""The token store: discriminative and VQ tokens of the same crops, aligned row by row, with labels.

    FOLDER/discriminative.npy  (R, N) uint16   discriminative tokens; (R, N L) of a codebook with L levels
    FOLDER/vq.npy              (R, M) uint16   VQ tokens of the same crops
    FOLDER/labels.npy          (R,)   int32    -1 = none
    FOLDER/manifest.json       the settings they were made with; written last, so a folder with a manifest is complete

Tokens beyond a few GiB lie in shards, vq-00002-of-00017.npy. Row r is crop r % C of readable image r // C, with
C = crops_per_image. Written by token_writer.py.
"""

import math
import mmap
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from digit.data.epochs import AllBut, EpochOrder, crop_numbers
from digit.data.rows import AGAIN, Shards, check_range, crc32_file, open_array, shard_stem
from digit.errors import DigitError, MismatchError
from digit.runtime import distributed
from digit.runtime.config_json import from_json
from digit.runtime.files import as_path, read_json
from digit.runtime.hardware import physical_memory

if TYPE_CHECKING:
    import torch


FORMAT = 2  # format 1, of digit 0.1, called the first array disc.npy
MAX_VOCAB = 65536  # uint16
WHOLE_CHECK_BYTES = (
    2**31
)  # stores up to this size are read and checked whole whenever they are opened, in a second or two
MEMORY_SHARE = 0.25  # of this machine's memory that the training processes on it may fill with tokens, together
MOST_IN_MEMORY = 2**32  # bytes of one process; beyond, one copy in the system's cache serves all of them
AHEAD = 4  # batches that threads read ahead of use from mapped files


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The manifest's entry for one kind of tokens."""

    grid: tuple[int, int]
    length: int
    vocab_size: int
    levels: int = 1
    """Tokens of each cell of the grid, one after another."""

    def __post_init__(self) -> None:
        cells, valid = math.prod(self.grid), min(self.grid) >= 1 and self.levels >= 1
        if not valid or cells * self.levels != self.length or not 1 <= self.vocab_size <= MAX_VOCAB:
            levels = f" of {self.levels} levels" if self.levels != 1 else ""
            raise DigitError(
                f"{self.length} tokens of {self.vocab_size} on a grid of {self.grid}{levels} are impossible: {AGAIN}"
            )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The manifest's entry for the images."""

    name: str
    fingerprint: str
    num_images: int
    subset: str | None


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """The part of a manifest that describes the arrays."""

    rows: int
    discriminative: _Layout | None
    vq: _Layout | None
    classes: list
    source: _Source
    crops_per_image: int = 1
    shards: list | None = None
    """Rows in each file of tokens; None in stores with one file."""
    crc32: dict | None = None
    """CRC-32 of each array's file; None in stores that were written without it."""

    def __post_init__(self) -> None:
        if self.rows < 1 or not all(isinstance(name, str) for name in self.classes):
            raise DigitError(f"{self.rows} rows and {len(self.classes)} classes are impossible: {AGAIN}")
        if self.crops_per_image < 1 or self.rows % self.crops_per_image:
            raise DigitError(f"{self.rows} rows of {self.crops_per_image} crops an image are impossible: {AGAIN}")
        if self.shards is not None:
            whole = all(type(rows) is int and 0 <= rows <= self.rows for rows in self.shards)
            if not whole or sum(self.shards) != self.rows:
                raise DigitError(f"shards of {str(self.shards)[:80]} rows do not make {self.rows}: {AGAIN}")

    @property
    def files(self) -> "list[_File]":
        """Every file of the store."""
        shards, files = self.shards or [self.rows], []
        for name, layout in (("discriminative", self.discriminative), ("vq", self.vq)):
            if layout is None:
                continue
            for number, rows in enumerate(shards):
                stem = shard_stem(name, number, len(shards))
                files.append(_File(name, stem, (rows, layout.length), "<u2", layout.vocab_size - 1))
        return [*files, _File("labels", "labels", (self.rows,), "<i4", len(self.classes) - 1)]

    def open(self, folder: Path) -> "dict[str, Any]":
        """Memory-maps the arrays: one or several of NumPy's. Raises DigitError for a file of another size or kind."""
        parts: dict[str, list[np.ndarray]] = {"discriminative": [], "vq": [], "labels": []}
        for file in self.files:
            parts[file.array].append(open_array(file.path(folder), file.shape, np.dtype(file.dtype)))
        return {n: None if not p else p[0] if len(p) == 1 else Shards(p) for n, p in parts.items()}

    def check(self, folder: Path) -> None:
        """Reads everything. Raises DigitError that names a file with numbers out of range or flipped bits."""
        for file in self.files:
            path, low = file.path(folder), -1 if file.array == "labels" else 0
            array = open_array(path, file.shape, np.dtype(file.dtype))
            if len(array):  # a shard may hold unreadable images alone
                check_range(path, array, low, file.most, "labels" if low else "tokens")
            if self.crc32 is not None and self.crc32.get(file.stem) != (found := crc32_file(path)):
                raise DigitError(
                    f"{path} has CRC-32 {found}, its manifest {self.crc32.get(file.stem)}: bits flipped; {AGAIN}"
                )


@dataclass(frozen=True)
class _File:
    """One file of a store: a whole array, or one shard of it."""

    array: str
    stem: str
    shape: tuple[int, ...]
    dtype: str
    most: int
    """Its largest number possible."""

    def path(self, folder: Path) -> Path:
        return folder / f"{self.stem}.npy"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass
class TokenStore:
    """Finished tokens, memory-mapped: `discriminative` (R, N), `vq` (R, M) uint16, `labels` (R,) int32, `manifest`.

    Tokens in one file are a NumPy array, in several files `Shards`, which give rows and turn into an array.
    `checked` says that every number has been checked; if not, each batch's are.
    """

    folder: Path
    manifest: dict[str, Any]
    discriminative: "np.ndarray | Shards | None"
    vq: "np.ndarray | Shards | None"
    labels: np.ndarray
    checked: bool = True

    @classmethod
    def open(cls, folder: str | Path, *, whole: bool | None = None) -> "TokenStore":
        """Opens a finished store: checks the kind and size of every file, and `whole` also what `verify` does.

        By default stores up to 2 GiB are checked whole. Raises DigitError if the folder is missing, unfinished or of
        another format, or if a file is damaged.
        """
        folder = as_path(folder)
        if not (folder / "manifest.json").exists():
            if (folder / "journal.json").exists():
                raise DigitError(f"tokens in {folder} are not finished: run the same command again to resume")
            raise DigitError(f"{folder} holds no tokens (no manifest.json): make them first (digit tokenize ...)")
        manifest = read_json(folder / "manifest.json")
        contents = _contents(folder, manifest)
        arrays = contents.open(folder)
        if whole is None:
            whole = sum(file.nbytes for file in contents.files) <= WHOLE_CHECK_BYTES
        if whole:
            contents.check(folder)
        return cls(folder, manifest, **arrays, checked=whole)

    def verify(self) -> None:
        """Reads every file. Raises DigitError for a token or label out of range, and for a checksum that differs."""
        _contents(self.folder, self.manifest).check(self.folder)
        self.checked = True

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def crops_per_image(self) -> int:
        """Crops of each image; an image's rows follow one another."""
        return self.manifest.get("crops_per_image", 1)

    @property
    def num_images(self) -> int:
        """Readable images."""
        return len(self) // self.crops_per_image

    def check(self, *, codebook_hash: str | None = None, vqgan_hash: str | None = None) -> None:
        """Raises MismatchError, naming both values, if these tokens were made with another codebook or VQGAN.

        `codebook_hash` is the fingerprint of the codebook or of the whole tokenizer (encoder and codebook). None skips
        the check.
        """
        keys = {"codebook": ("tokenizer_hash", "codebook_hash"), "VQGAN": ("vqgan_hash",)}
        for what, requested in (("codebook", codebook_hash), ("VQGAN", vqgan_hash)):
            recorded = [self.manifest.get(key) for key in keys[what]]
            if requested is not None and requested not in recorded:
                raise MismatchError(
                    f"tokens in {self.folder} were made with {what} {_short(recorded[0])}, asked for "
                    f"{_short(requested)}: "
                    f"give that {what}, or other tokens (digit tokenize ...)"
                )

    def batch(self, rows: Sequence[int] | np.ndarray | slice) -> dict[str, "torch.Tensor"]:
        """Returns {"discriminative": (B, N), "vq": (B, M), "labels": (B,)} int64 of `rows`, without absent tokens."""
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        if len(rows) and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a store of {len(self)}")
        rows = np.where(rows < 0, rows + len(self), rows)
        held = {"discriminative": self.discriminative, "vq": self.vq, "labels": self.labels}
        return self._gather({name: array for name, array in held.items() if array is not None}, rows)

    def batches(
        self,
        batch_size: int,
        seed: int,
        images: "Sequence[int] | np.ndarray | AllBut | None" = None,
        names: Sequence[str] = ("discriminative", "vq", "labels"),
        *,
        in_memory: bool | None = None,
    ) -> "TokenBatches":
        """Returns `step -> batch`, a pure function of (seed, step).

        An epoch is one pass over the images, in an order of its own, with one crop of each; the crops take turns, so
        that C epochs in a row use each of an image's C crops once. A batch that passes an epoch's end continues with
        the next.

        Args:
            images: numbers of readable images, 0 .. num_images - 1; all by default.
            names: arrays to read; absent tokens are left out.
            in_memory: read them into RAM, 2 bytes a token, or leave them mapped and let threads read ahead. By default
                in RAM where they take 4 GiB or less, and fit a quarter of this machine's memory for all of the job's
                processes on it.
        """
        chosen = AllBut(self.num_images) if images is None else images
        chosen = chosen if isinstance(chosen, AllBut) else np.asarray(chosen, dtype=np.int64)
        if batch_size < 1 or not len(chosen):
            raise DigitError(f"batches of {batch_size} from {len(chosen)} images: both must be at least 1")
        if isinstance(chosen, np.ndarray) and not 0 <= chosen.min() <= chosen.max() < self.num_images:
            raise DigitError(f"images {chosen.min()}..{chosen.max()} of a store of {self.num_images}: give 0 and more")
        arrays = {name: array for name in names if (array := getattr(self, name)) is not None}
        if in_memory is None:
            needed = sum(array.nbytes for array in arrays.values()) * distributed.local_size()
            own = needed // distributed.local_size()
            in_memory = needed <= MEMORY_SHARE * physical_memory() and own <= MOST_IN_MEMORY
        if in_memory:
            arrays = {name: np.array(array) for name, array in arrays.items()}
        return TokenBatches(self, arrays, chosen, batch_size, seed, ahead=0 if in_memory else AHEAD)

    def _gather(self, arrays: dict[str, Any], rows: np.ndarray) -> dict[str, "torch.Tensor"]:
        """Copies these rows into int64 tensors, with numpy's take and torch's conversion: the fastest of each.

        Raises DigitError for a number out of range, unless the whole store has been checked.
        """
        import torch

        found = {name: array.take(rows, axis=0) for name, array in arrays.items()}
        for name, values in found.items() if not self.checked else ():
            if name == "labels":
                check_range(self.folder / name, values, -1, len(self.manifest["classes"]) - 1, name)
            else:
                check_range(self.folder / name, values, 0, self.manifest[name]["vocab_size"] - 1, name)
        return {name: torch.from_numpy(values).long() for name, values in found.items()}


class TokenBatches:
    """`batches(step)` returns one batch of tokens and labels; `batches.rows(step)` its rows in the store.

    `ahead` batches are read by threads before they are asked for, as long as one part of consecutive steps is read.
    """

    def __init__(
        self,
        store: TokenStore,
        arrays: dict[str, Any],
        images: "np.ndarray | AllBut",
        batch_size: int,
        seed: int,
        ahead: int = 0,
    ):
        self.store, self.arrays, self.images, self.batch_size, self.seed = store, arrays, images, batch_size, seed
        self.order, self.ahead = EpochOrder(len(images), seed), ahead
        self._pool = ThreadPoolExecutor(ahead, "digit-tokens") if ahead else None
        self._reading: dict[tuple[int, int, int], Future] = {}
        for array in arrays.values() if ahead else ():
            _read_at_random(array)

    def __call__(self, step: int) -> dict[str, "torch.Tensor"]:
        return self.part(step, 0, self.batch_size)

    def part(self, step: int, start: int, stop: int) -> dict[str, "torch.Tensor"]:
        """Rows start .. stop - 1 of batch `step`: what one of several processes reads."""
        if self._pool is None:
            return self.store._gather(self.arrays, self.rows(step)[start:stop])
        wanted = [(step + more, start, stop) for more in range(self.ahead + 1)]
        for stale in self._reading.keys() - set(wanted):
            self._reading.pop(stale).cancel()
        for key in wanted:
            if key not in self._reading:
                rows = self.rows(key[0])[start:stop]
                self._reading[key] = self._pool.submit(self.store._gather, self.arrays, rows)
        return self._reading.pop(wanted[0]).result()

    def rows(self, step: int) -> np.ndarray:
        """(batch_size,) int64."""
        places, epochs = self.order.take(step * self.batch_size, self.batch_size)
        images, crops = self.images[places], self.store.crops_per_image
        return images * crops + crop_numbers(images, epochs, crops, self.seed)

    def close(self) -> None:
        """Ends the threads that read ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._reading.clear()


def check_format(folder: Path, manifest: Any) -> None:
    """Raises DigitError if `manifest`, or a journal's request, is of a store that this version cannot read."""
    got = manifest.get("format") if isinstance(manifest, dict) else None
    if got == 1:
        raise DigitError(
            f"tokens in {folder} have format 1, written by digit 0.1; this version reads format {FORMAT}: {AGAIN}, or "
            "use digit 0.1"
        )
    if got != FORMAT:
        raise DigitError(f"tokens in {folder} have format {got}, this version reads {FORMAT}: {AGAIN}")


def _contents(folder: Path, manifest: Any) -> _Contents:
    """What a manifest says of the arrays. Raises DigitError where it is damaged or of another format."""
    check_format(folder, manifest)
    stated = {field.name: manifest[field.name] for field in fields(_Contents) if field.name in manifest}
    return from_json(_Contents, stated, str(folder / "manifest.json"))


def _read_at_random(array: Any) -> None:
    """Tells the system that a mapped array is read row by row; it would read many rows that nobody asked for."""
    for part in array.parts if isinstance(array, Shards) else [array]:
        mapped = getattr(part, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)
