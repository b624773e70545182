"""Image sets to evaluate: a folder, .npz, tensor or any other source."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from digit.data import pictures
from digit.data.decode import probe_image
from digit.data.fingerprint import digest
from digit.data.images import FolderSource, open_source
from digit.data.preprocess import centre_crop
from digit.data.source import ImageSource, readable
from digit.errors import BadImageError, DigitError
from digit.evaluation.npz import read_npz_images
from digit.pipeline.sample_journal import GRID, JOURNAL, SAMPLES
from digit.runtime import distributed
from digit.runtime.files import read_json

PIXELS = "pixels"  # the format of images without a file of their own
MAX_PROBED = 64  # images of an array whose range is looked at
READERS = 4  # threads that read and decode
FIRST = re.compile(r"0{5,}\.png")  # in folders of `digit sample` and `digit complete`, whose grid.png is no sample
Images = str | Path | ImageSource | pictures.Images


class ArraySource(ImageSource):
    """A source without labels: uint8 (N, H, W, 3) in memory or memory-mapped from a file."""

    def __init__(self, images: np.ndarray, name: str):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
            raise DigitError(f"{name} holds {images.dtype} {images.shape}, wanted uint8 (N, H, W, 3), RGB in 0..255")
        if images[:: max(1, len(images) // MAX_PROBED)].max() == 1:
            raise DigitError(
                f"{name} holds no value above 1, nearly black: floats of 0..1 become uint8 by np.rint(255 * x)"
            )
        self.images, self.name, self.classes = images, name, []
        self.fingerprint = digest([str(images.shape).encode()])

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.ascontiguousarray(self.images[index])), -1


@dataclass(frozen=True)
class Survey:
    """What the files of a set contain, read without decoding them."""

    digests: tuple[bytes, ...]  # SHA-256 of each encoded image, in order
    sizes: Counter[tuple[int, int]]  # (width, height) -> images
    kinds: Counter[str]  # file format -> images
    modes: Counter[str]  # Pillow's pixel type as stored -> images

    @property
    def side(self) -> int | None:
        """Side in pixels if all images are squares of one size, else None."""
        (width, height), *others = self.sizes
        return width if not others and width == height else None


class ImageSet:
    """The images of a source and, where known, the names of their classes and how they were rounded to uint8."""

    def __init__(
        self,
        source: ImageSource,
        class_names: list[str] | None = None,
        rounding: str | None = None,
        remarks: tuple[str, ...] = (),
    ):
        """`remarks` are sentences about what was odd when the set was opened."""
        self.source, self.name, self.class_names, self.rounding = source, source.name, class_names, rounding
        self.remarks = remarks

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def survey(self) -> Survey:
        """Formats, sizes and content hashes; reads every file once. Raises BadImageError naming the first broken one.

        Each rank reads a share, so all of them must access this property.
        """
        parts = distributed.on_every_rank(lambda: self._read_all(self._inspect, distributed.share(len(self))))
        digests, sizes, kinds, modes = zip(*chain.from_iterable(parts), strict=True)
        return Survey(tuple(digests), Counter(sizes), Counter(kinds), Counter(modes))

    def _inspect(self, index: int) -> tuple[bytes, tuple[int, int], str, str]:
        data = self.source.raw(index)
        if data is None:
            image = self.source.read(index)[0]
            return hashlib.sha256(image.tobytes()).digest(), image.size, PIXELS, image.mode
        try:
            data = data.read_bytes() if isinstance(data, Path) else data
            kind, mode, size = probe_image(data)
        except (BadImageError, OSError) as error:
            raise BadImageError(f"{self.source.key(index)}: {error}; repair or remove it") from error
        return hashlib.sha256(data).digest(), size, kind, mode

    def pixels(self, rows: Iterable[int], side: int | None) -> UInt8[Tensor, "B 3 H W"]:
        """uint8 (B, 3, H, W): unchanged, or with the short side resized to `side` (PIL bicubic) and centre-cropped."""

        def read(index: int) -> np.ndarray:
            image = self.source.read(index)[0]
            try:
                return np.array(image) if side is None else centre_crop(image, side)
            except BadImageError as error:
                raise BadImageError(f"{self.source.key(index)}: {error}") from error

        return torch.from_numpy(np.stack(self._read_all(read, rows)).transpose(0, 3, 1, 2).copy())

    def _read_all(self, read: Callable[[int], Any], rows: Iterable[int]) -> list[Any]:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(read, rows))


def open_images(spec: Images, num: int | None = None, pixel_max: int | None = None) -> ImageSet:
    """Open the images to evaluate.

    Args:
        spec: uint8 tensor (N, 3, H, W) or what else `digit.data.pictures.as_images` takes, .npz with arr_0 uint8
            (N, H, W, 3), an ImageSource, or what `open_source` takes. In a folder of `digit sample`,
            grid.png is left out and samples.json gives the labels.
        num: keep the first `num`; of a set that is sorted by class, `num` spread evenly over it.
        pixel_max: as of `open_source`.

    Raises DigitError for fewer than 2 images and for sources that cannot be read.
    """
    if num is not None and num < 2:
        raise DigitError(f"num is {num}: a covariance needs at least 2 images")
    source = _open(spec, pixel_max)
    about = _samples_json(source) if isinstance(source, FolderSource) else {}
    source = _without_grid(source) if isinstance(source, FolderSource) else source
    names = _class_names(source, about)
    if len(source) < 2:
        raise DigitError(f"{source.name} holds {len(source)} images: a covariance needs at least 2")
    remarks = tuple(_remarks(source, about, num))
    if num is not None and num < len(source):
        rows = np.arange(num)
        if names is not None and len(set(names)) > 1 and in_runs(names):
            rows = rows * len(source) // num
        source, names = source.subset(rows), names and [names[row] for row in rows]
    return ImageSet(source, names, about.get("rounding"), remarks)


def _remarks(source: ImageSource, about: dict[str, Any], num: int | None) -> Iterator[str]:
    """What is odd about the number of images."""
    if num is not None and num > len(source):
        yield f"{num} images of {source.name} were asked for, and it holds {len(source)}"
    listed = about.get("labels")
    if isinstance(listed, list) and len(listed) != len(source):
        yield (
            f"{SAMPLES} in {source.name} lists {len(listed)} images, and the folder holds {len(source)}: their classes "
            "are unknown"
        )


def _open(spec: Images, pixel_max: int | None) -> ImageSource:
    if isinstance(spec, ImageSource):
        return spec
    if not isinstance(spec, str | Path):
        return ArraySource(pictures.as_images(spec).permute(0, 2, 3, 1).cpu().numpy(), type(spec).__name__.lower())
    if Path(spec).suffix.lower() == ".npz":
        return ArraySource(read_npz_images(spec), str(spec))
    return open_source(spec, pixel_max=pixel_max)


def _without_grid(source: FolderSource) -> ImageSource:
    """The source without any grid.png that lies beside images numbered as in a folder of `digit sample`."""
    paths = [PurePosixPath(name) for name in source.files]
    sampled = {path.parent for path in paths if FIRST.fullmatch(path.name)}
    rows = [row for row, path in enumerate(paths) if path.name != GRID or path.parent not in sampled]
    if len(rows) == len(paths):
        return source
    kept = source.subset(rows)
    kept.name = source.name
    return kept


def _samples_json(source: FolderSource) -> dict[str, Any]:
    """samples.json of a folder of `digit sample`, {} for others. Raises DigitError where sampling is not finished."""
    for folder in sorted({(source.root / name).parent for name in source.files}):
        if (folder / JOURNAL).is_file():
            raise DigitError(f"{readable(folder)} is not finished: run the same `digit sample` again to continue it")
    path = source.root / SAMPLES
    about = read_json(path) if path.is_file() else {}
    return about if isinstance(about, dict) else {}


def _class_names(source: ImageSource, about: dict[str, Any]) -> list[str] | None:
    """Class of each image; None where some have no label, or samples.json has another number of images."""
    labels, names = about.get("labels"), about.get("classes")
    if labels is not None:
        if not isinstance(labels, list) or len(labels) != len(source) or any(label in (None, -1) for label in labels):
            return None
        named = isinstance(names, list) and len(names) == len(labels) and all(isinstance(name, str) for name in names)
        return names if named else [str(label) for label in labels]
    source_labels = source.labels()
    if source_labels is None or not source.classes or (source_labels < 0).any():
        return None
    return [source.classes[label] for label in source_labels]


def in_runs(names: list[str]) -> bool:
    """Whether the images of each class are consecutive."""
    return sum(a != b for a, b in pairwise(names)) == len(set(names)) - 1
