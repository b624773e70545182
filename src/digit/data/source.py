"""The base class of image sources, and subsets of one."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from digit.data.decode import decode_image, deep_size, largest_value
from digit.data.fingerprint import data_fingerprint, digest, file_times, stamps_of
from digit.data.pixel_range import PixelRange, find_pixel_range
from digit.data.synsets import class_key
from digit.errors import DigitError
from digit.runtime.scalars import as_int


class ImageSource(ABC):
    """An indexed collection of RGB images, optionally with labels. Sources can be pickled and read from threads.

    A source of encoded files implements `raw`; one that renders its images overrides `read`.
    """

    name: str
    classes: list[str]  # [] if unlabelled; label k means classes[k]
    notes: tuple[str, ...] = ()  # sentences on what was assumed and what is not used, each with the option against it
    pixel_range: PixelRange | None = None  # of images of more than 8 bits; None judges each by itself (`decode_image`)
    reading: dict[str, Any] | None = (
        None  # "path" and the other arguments that `open_source` was given; None: not by it
    )

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits; others whenever a pixel, a label or the name of a class may have changed."""
        own, white = self.find_fingerprint(), self.pixel_range and self.pixel_range.white
        return own if white is None else digest([own.encode(), str(white).encode()])

    def find_fingerprint(self) -> str:
        """The fingerprint but for the white of `pixel_range`."""
        raise NotImplementedError

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
        image = decode_image(data, name=self.key(index), pixel_max=self.pixel_range)
        return image, -1 if labels is None else int(labels[index])

    def find_pixel_range(self, pixel_max: int | None = None) -> None:
        """Sets `pixel_range` by what the user says, or by images spread over the source; the fingerprint covers it.

        Raises DigitError for a pixel_max below 1.
        """

        def measure(function: Callable[[bytes | Path], int], index: int) -> int:
            data = self.raw(index)
            return 0 if data is None else function(data)  # rendered images have 8 bits

        read = partial(measure, deep_size), partial(measure, largest_value)
        self.pixel_range = find_pixel_range(*read, len(self), pixel_max)

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
        self.classes, self.notes, self.pixel_range = source.classes, source.notes, source.pixel_range

    def find_fingerprint(self) -> str:
        return digest([self.source.fingerprint.encode(), self.indices.astype("<i8").tobytes()])

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
        place = {class_key(name): number for number, name in enumerate(classes)}  # a synset with and without words
        numbers = [place.get(class_key(name), -1) for name in source.classes]
        self._number = np.array([*numbers, -1], dtype=np.int64)  # [-1] is -1
        self.name, self.classes = source.name, list(classes)

    def find_fingerprint(self) -> str:
        return digest([self.source.fingerprint.encode(), *(name.encode() for name in self.classes)])

    def labels(self) -> np.ndarray | None:
        labels = super().labels()
        return None if labels is None else self._number[labels]

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = super().read(index)
        return image, int(self._number[label])


class ContainerSource(ImageSource):
    """Images packed in files: Parquet or tar. A subclass sets `classes` and `_labels`."""

    _labels: np.ndarray

    def __init__(self, root: Path, files: list[Path], read_contents: bool | None):
        self.name, self.files, self.read_contents = readable(root), files, read_contents
        self.short_names = [os.path.relpath(file, root) if file != root else file.name for file in files]

    def labels(self) -> np.ndarray:
        return self._labels

    def find_fingerprint(self) -> str:
        sizes, times = file_times(self.files)
        stamps = stamps_of(self.files, sizes, times, self.read_contents)
        return data_fingerprint(self.short_names, sizes, stamps, self.classes, self._labels)


def readable(name: str | Path) -> str:
    """A path or name as valid UTF-8 for JSON; other bytes become backslash escapes."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return str(name).encode("utf-8", "backslashreplace").decode()
