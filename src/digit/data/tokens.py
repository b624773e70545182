"""The token store: discriminative and VQ tokens of the same crops, aligned row by row, with labels.

    FOLDER/discriminative.npy  (R, N) uint16   discriminative tokens
    FOLDER/vq.npy              (R, M) uint16   VQ tokens of the same crops
    FOLDER/labels.npy          (R,)   int32    -1 = none
    FOLDER/manifest.json       the settings they were made with; written last, so a folder with a manifest is complete

Written by token_writer.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from digit.data.rows import AGAIN, check_range, crc32_file, open_array
from digit.errors import DigitError, MismatchError
from digit.runtime.config_json import from_json
from digit.runtime.files import as_path, read_json

if TYPE_CHECKING:
    import torch


FORMAT = 2  # format 1, of digit 0.1, called the first array disc.npy
MAX_VOCAB = 65536  # uint16


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The manifest's entry for one kind of tokens."""

    grid: tuple[int, int]
    length: int
    vocab_size: int

    def __post_init__(self) -> None:
        if math.prod(self.grid) != self.length or min(self.grid) < 1 or not 1 <= self.vocab_size <= MAX_VOCAB:
            raise DigitError(
                f"{self.length} tokens of {self.vocab_size} on a grid of {self.grid} are impossible: {AGAIN}"
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
    crc32: dict | None = None
    """CRC-32 of each array's file; None in stores that were written without it."""

    def __post_init__(self) -> None:
        if self.rows < 1 or not all(isinstance(name, str) for name in self.classes):
            raise DigitError(f"{self.rows} rows and {len(self.classes)} classes are impossible: {AGAIN}")

    def open(self, folder: Path) -> dict[str, np.ndarray | None]:
        """Memory-maps and verifies the arrays. Raises DigitError naming the damaged file."""
        layouts = {"discriminative": self.discriminative, "vq": self.vq}
        arrays: dict[str, np.ndarray | None] = dict.fromkeys(layouts)
        expected: dict[str, tuple[tuple[int, ...], str, int, int, str]] = {
            n: ((self.rows, of.length), "<u2", 0, of.vocab_size - 1, "tokens") for n, of in layouts.items() if of
        }
        expected["labels"] = ((self.rows,), "<i4", -1, len(self.classes) - 1, "labels")
        for name, (shape, dtype, low, high, what) in expected.items():
            path = folder / f"{name}.npy"
            array = arrays[name] = open_array(path, shape, np.dtype(dtype))
            check_range(path, array, low, high, what)
            if self.crc32 is not None and self.crc32.get(name) != (found := crc32_file(path)):
                raise DigitError(
                    f"{path} has CRC-32 {found}, its manifest {self.crc32.get(name)}: bits flipped; {AGAIN}"
                )
        return arrays


@dataclass
class TokenStore:
    """Finished tokens, memory-mapped: `discriminative` (R, N), `vq` (R, M) uint16, `labels` (R,) int32, `manifest`."""

    folder: Path
    manifest: dict[str, Any]
    discriminative: np.ndarray | None
    vq: np.ndarray | None
    labels: np.ndarray

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        """Opens a finished store, checking every file's checksum and every token against its vocabulary.

        Raises DigitError if the folder is missing, unfinished or of another format, or if a file is damaged.
        """
        folder = as_path(folder)
        if not (folder / "manifest.json").exists():
            if (folder / "journal.json").exists():
                raise DigitError(f"tokens in {folder} are not finished: run the same command again to resume")
            raise DigitError(f"{folder} holds no tokens (no manifest.json): make them first (digit tokenize ...)")
        manifest = read_json(folder / "manifest.json")
        check_format(folder, manifest)
        names = [field.name for field in fields(_Contents)]
        stated = {name: manifest[name] for name in names if name in manifest}
        arrays: dict[str, Any] = from_json(_Contents, stated, str(folder / "manifest.json")).open(folder)
        return cls(folder, manifest, **arrays)

    def __len__(self) -> int:
        return len(self.labels)

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
        rows = np.arange(len(self))[rows if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)]
        held = {"discriminative": self.discriminative, "vq": self.vq, "labels": self.labels}
        return _gather({name: array for name, array in held.items() if array is not None}, rows)

    def batches(
        self,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | np.ndarray | None = None,
        names: Sequence[str] = ("discriminative", "vq", "labels"),
    ) -> "TokenBatches":
        """Returns `step -> batch`, a pure function of (seed, step). Every epoch is a new permutation of the rows.

        The arrays in `names` are read into RAM, 2 bytes a token; absent tokens are left out. `rows` selects some rows
        (all by default). A batch that passes an epoch's end continues with the next epoch's permutation.
        """
        chosen = np.arange(len(self)) if rows is None else np.arange(len(self))[np.asarray(rows, dtype=np.int64)]
        if batch_size < 1 or not len(chosen):
            raise DigitError(f"batches of {batch_size} from {len(chosen)} token rows: both must be at least 1")
        held = {name: getattr(self, name) for name in names}
        arrays = {name: np.array(array) for name, array in held.items() if array is not None}
        return TokenBatches(arrays, chosen, batch_size, seed)


class TokenBatches:
    """`batches(step)` returns one batch of tokens and labels; `batches.rows(step)` its rows in the store."""

    def __init__(self, arrays: dict[str, np.ndarray], chosen: np.ndarray, batch_size: int, seed: int):
        self.arrays, self.chosen, self.batch_size = arrays, chosen, batch_size
        self.order = _EpochOrder(len(chosen), seed)

    def __call__(self, step: int) -> dict[str, "torch.Tensor"]:
        return _gather(self.arrays, self.rows(step))

    def rows(self, step: int) -> np.ndarray:
        """(batch_size,) int64."""
        return self.chosen[self.order.take(step * self.batch_size, self.batch_size)]


class _EpochOrder:
    """An endless sequence of permutations; epoch e's depends on (seed, e) only."""

    def __init__(self, num: int, seed: int):
        self.num, self.seed = num, seed
        self._cached: tuple[int, np.ndarray] | None = None

    def take(self, start: int, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            epoch, place = divmod(start, self.num)
            parts.append(self._permutation(epoch)[place : place + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = epoch, np.random.default_rng([self.seed & (2**64 - 1), epoch]).permutation(self.num)
        return self._cached[1]


def check_format(folder: Path, manifest: Any) -> None:
    """Raises DigitError if `manifest`, or a journal's request, is of a store that this version cannot read."""
    got = manifest.get("format") if isinstance(manifest, dict) else manifest
    if got == 1:
        raise DigitError(
            f"tokens in {folder} have format 1, written by digit 0.1; this version reads format {FORMAT}: {AGAIN}, or "
            "use digit 0.1"
        )
    if got != FORMAT:
        raise DigitError(f"tokens in {folder} have format {got}, this version reads {FORMAT}: {AGAIN}")


def _gather(arrays: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, "torch.Tensor"]:
    """Copies these rows into int64 tensors, with numpy's take and torch's conversion: the fastest of each."""
    import torch

    return {name: torch.from_numpy(array.take(rows, axis=0)).long() for name, array in arrays.items()}


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)
