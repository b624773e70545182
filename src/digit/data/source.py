"""The protocol of image sources, subsets of one, and fingerprints."""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from digit.data.decode import decode_image
from digit.errors import DigitError
from digit.runtime.scalars import as_int

MAX_DIGITS = 18  # of a label that is a number; int() refuses thousands of digits


@runtime_checkable
class ImageSource(Protocol):
    """An indexed collection of RGB images, optionally with labels. Sources can be pickled and read from threads.

    A source of encoded files implements `raw`; one that renders its images overrides `read`.
    """

    name: str
    classes: list[str]  # [] if unlabelled; label k means classes[k]
    fingerprint: str  # SHA-256 over names and sizes, 64 hex digits

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """Name of image `index` in messages; the same in every run."""
        ...

    def labels(self) -> np.ndarray | None:
        """int64 (len,), -1 = none; None if it would take reading every image."""
        return None

    def raw(self, index: int) -> bytes | Path | None:
        """The encoded image: its bytes or its file; None for rendered images."""
        return None

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Returns (PIL image of mode RGB, label or -1). Raises BadImageError that names the image."""
        data, labels = self.raw(index), self.labels()
        assert data is not None, "a source without raw() has its own read()"
        return decode_image(data, name=self.key(index)), -1 if labels is None else int(labels[index])

    def subset(self, indices: Sequence[int] | np.ndarray) -> "SubsetSource":
        """The images at `indices`, in that order."""
        return SubsetSource(self, indices)

    def limit(self, num: int | None) -> "ImageSource":
        """`num` images spread evenly over the source, hence over its classes; the source itself if it has no more."""
        if num is None or as_int("limit", num, least=1) >= len(self):
            return self
        return SubsetSource(self, np.arange(num, dtype=np.int64) * len(self) // num)

    def with_classes(self, classes: Sequence[str]) -> "ImageSource":
        """The same images, labels numbered as in `classes` (a test split as its training set); others become -1."""
        return self if list(classes) == self.classes else RelabelledSource(self, classes)


class SubsetSource(ImageSource):
    """Some images of another source, with the same classes."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray):
        self.source = source
        self.indices = np.asarray(indices).reshape(-1)
        if self.indices.size and self.indices.dtype.kind not in "iu":
            kind = self.indices.dtype
            raise DigitError(f"subset asks for images by {kind}: give whole numbers, of a mask np.flatnonzero(mask)")
        self.indices = self.indices.astype(np.int64)
        if self.indices.size and (self.indices.min() < 0 or self.indices.max() >= len(source)):
            low, high = self.indices.min(), self.indices.max()
            raise DigitError(f"subset asks for images {low}..{high}, {source.name} has 0..{len(source) - 1}")
        self.name = f"{source.name}[{len(self.indices)} of {len(source)}]"
        self.classes = source.classes
        self.fingerprint = digest([source.fingerprint.encode(), self.indices.astype("<i8").tobytes()])

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def labels(self) -> np.ndarray | None:
        labels = self.source.labels()
        return None if labels is None else labels[self.indices]

    def raw(self, index: int) -> bytes | Path | None:
        return self.source.raw(int(self.indices[index]))

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.source.read(int(self.indices[index]))


class RelabelledSource(SubsetSource):
    """A source whose labels are numbered by another list of class names."""

    def __init__(self, source: ImageSource, classes: Sequence[str]):
        super().__init__(source, np.arange(len(source)))
        place = {name: number for number, name in enumerate(classes)}
        self._number = np.array([*(place.get(name, -1) for name in source.classes), -1], dtype=np.int64)  # [-1] is -1
        self.name, self.classes = source.name, list(classes)
        self.fingerprint = digest([source.fingerprint.encode(), *(name.encode() for name in classes)])

    def labels(self) -> np.ndarray | None:
        labels = super().labels()
        return None if labels is None else self._number[labels]

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = super().read(index)
        return image, int(self._number[label])


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 over byte strings, each preceded by its length, as 64 hex digits."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def readable(name: str | Path) -> str:
    """A path or name as valid UTF-8 for JSON; other bytes become backslash escapes."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return str(name).encode("utf-8", "backslashreplace").decode()


def file_digest(files: Iterable[tuple[str, int]]) -> str:
    """SHA-256 over (path relative to the root, size in bytes) of files, independent of the root's location."""
    return digest(part for name, size in files for part in (os.fsencode(name), str(size).encode()))


def index_classes(values: Sequence[int | str | None], numeric: bool = True) -> tuple[list[str], np.ndarray]:
    """Returns the distinct values, sorted, as class names, and each value's index; None, '' and -1 are unlabelled (-1).

    With `numeric`, values that are all integers ("10", 9) are sorted as numbers; otherwise all are sorted as text.
    """
    known = {value for value in values if value is not None and value not in ("", -1)}
    numeric = numeric and all(_is_integer(value) for value in known)
    meaning = {value: int(value) if numeric else str(value) for value in known}
    order = sorted(set(meaning.values()))
    place = {name: index for index, name in enumerate(order)}
    look_up: dict[Any, int] = {value: place[meaning[value]] for value in known}
    labels = np.array([look_up.get(value, -1) for value in values], dtype=np.int64)
    return [readable(str(name)) for name in order], labels


def _is_integer(value: int | str) -> bool:
    return isinstance(value, int) or (len(value) <= MAX_DIGITS and value.removeprefix("-").isdecimal())
