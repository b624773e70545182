"""Opens any kind of image source: open_source(folder | Parquet | WebDataset tar | "shapes")."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from digit.data.decode import EXTENSIONS, decode_image
from digit.data.source import ImageSource, SubsetSource, file_digest, index_classes, readable
from digit.errors import DigitError
from digit.runtime.files import as_path

__all__ = ["FolderSource", "ImageSource", "SubsetSource", "as_source", "decode_image", "open_source"]

SHAPES = "shapes"
SHAPES_OPTIONS = ("num", "size", "seed")
SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
WANTED = "a folder of images, a Parquet file or folder, WebDataset .tar shards, or 'shapes'"


def open_source(spec: str | Path, *, split: str | None = None, limit: int | None = None) -> ImageSource:
    """Opens a source of images by its path, or the built-in shapes by name.

    Args:
        spec: a folder of images (nested: one folder per class), a Parquet file in the Hub's layout or a folder of them,
            a WebDataset .tar or a folder of them, or "shapes" / "shapes:num=16000,size=64,seed=0" (rendered scenes).
        split: the part of a folder with files train-*, validation-*, test-* or subfolders train, val, test. Default:
            train if there is one beside others, else everything.
        limit: number of images to keep, spread evenly over all.

    Raises:
        DigitError: missing path, empty folder, a mixture of kinds, unknown split, unreadable container.
    """
    if isinstance(spec, str) and (spec == SHAPES or spec.startswith(SHAPES + ":")):
        source = _open_shapes(spec, split)
    else:
        source = _open_path(as_path(spec), split)
    return ImageSource.limit(source, limit)


def as_source(data: str | Path | ImageSource, *, split: str | None = None) -> ImageSource:
    """`data` itself where it is a source, else what `open_source` opens. Raises DigitError for a source's split."""
    if not isinstance(data, ImageSource):
        return open_source(data, split=split)
    if split is not None:
        raise DigitError(f"split is {split!r}, but {data.name} is a source already open: open that split instead")
    return data


def hold_out(source: ImageSource, every: int = 5) -> tuple[ImageSource, ImageSource]:
    """Splits off every fifth image as a test set, for data without one. Returns (train, test)."""
    if len(source) < 2:
        raise DigitError(f"{source.name} holds {len(source)} image: a split into training and test needs at least 2")
    held_out = np.arange(len(source)) % every == 0
    return source.subset(np.flatnonzero(~held_out)), source.subset(np.flatnonzero(held_out))


def _open_shapes(spec: str, split: str | None) -> ImageSource:
    from digit.data.shapes import ShapesSource

    if split is not None:
        raise DigitError(f"split is {split!r}, but shapes has no splits: choose another seed (shapes:seed=1)")
    options = {}
    for part in filter(None, spec.partition(":")[2].split(",")):
        name, _, value = part.partition("=")
        if name not in SHAPES_OPTIONS or not value.isdecimal():
            raise DigitError(f"{spec!r}: cannot read {part!r}; wanted shapes:num=16000,size=64,seed=0")
        options[name] = int(value)
    return ShapesSource(**options)


def _open_path(path: Path, split: str | None) -> ImageSource:
    try:
        os.stat(path)
        exists = True
    except FileNotFoundError:
        exists = False
    except (OSError, ValueError) as error:  # a name too long, a zero byte, no permission
        reason = getattr(error, "strerror", None) or error
        raise DigitError(f"cannot open ({reason}): {path}; wanted {WANTED}") from error
    if not exists:
        raise DigitError(f"no such path: {path}; wanted {WANTED}")
    if path.is_dir():
        return _open_folder(path, split)
    if split is not None:
        raise DigitError(f"split is {split!r}, but {path} is one file: give the folder that holds the splits")
    return _open_files(path, [path])


def _open_files(root: Path, files: list[Path]) -> ImageSource:
    """Opens containers of one kind; `root` names the source."""
    if files[0].suffix.lower() == ".parquet":
        from digit.data.parquet import ParquetSource

        return ParquetSource(root, files)
    if files[0].name.lower().endswith((".tar", *PACKED_TARS)):
        from digit.data.webdataset import TarSource

        return TarSource(root, files)
    if files[0].suffix.lower() in EXTENSIONS:
        raise DigitError(f"{root} is one image: give the folder that holds it and others")
    raise DigitError(f"{root} is a {files[0].suffix or 'nameless kind of'} file, wanted {WANTED}")


def _open_folder(root: Path, split: str | None) -> ImageSource:
    root = _split_folder(root, split) or root
    in_subfolder = split is not None and root.name in _aliases(split)
    found = sorted(walk_files(root))
    kinds = {
        "Parquet files": [name for name, _ in found if name.lower().endswith(".parquet")],
        "tar files": [name for name, _ in found if name.lower().endswith((".tar", *PACKED_TARS))],
        "images": [name for name, _ in found if os.path.splitext(name)[1].lower() in EXTENSIONS],
    }
    present = {kind: names for kind, names in kinds.items() if names}
    if not present:
        raise DigitError(f"no images in {root} ({len(found)} other files); wanted {WANTED}")
    if len(present) > 1:
        counts = " and ".join(f"{len(names)} {kind}" for kind, names in present.items())
        raise DigitError(f"{root} holds {counts}: give a folder or a file with one kind only")
    names = next(iter(present.values()))
    if "images" not in present:
        names = names if in_subfolder else _split_names(root, names, split)
        return _open_files(root, [root / name for name in names])
    if split is not None and not in_subfolder:
        raise DigitError(f"{root} has no split {split!r}: wanted a subfolder of that name")
    chosen = set(names)
    return FolderSource(root, [(name, size) for name, size in found if name in chosen])


def _aliases(split: str) -> tuple[str, ...]:
    return next((names for names in SPLIT_NAMES.values() if split in names), (split,))


def _split_folder(root: Path, split: str | None) -> Path | None:
    """The subfolder of `split`; without one, root/train if train stands beside val or test, else None."""
    if split is not None:
        return next((root / name for name in _aliases(split) if (root / name).is_dir()), None)
    others = SPLIT_NAMES["validation"] + SPLIT_NAMES["test"]
    pair = (root / "train").is_dir() and any((root / name).is_dir() for name in others)
    return root / "train" if pair else None


def _split_names(root: Path, names: list[str], split: str | None) -> list[str]:
    """Selects a split's files by a word of their path (train-00000-of-00001.parquet, default/test/0000.parquet)."""
    known = {alias for aliases in SPLIT_NAMES.values() for alias in aliases}
    words = {name: re.split(r"[/\\._-]", name.lower()) for name in names}
    of = {name: next((word for word in words[name] if word in known or word == split), None) for name in names}
    chosen = [name for name in names if of[name] in _aliases(split or "train")]
    if split is not None and not chosen:
        have = ", ".join(sorted({word for word in of.values() if word})) or "none"
        raise DigitError(f"{root} has no split {split!r}; it has {have}")
    return chosen or names


def walk_files(root: Path) -> Iterator[tuple[str, int]]:
    """Yields (path relative to the root with '/', size) of every file below; skips hidden files and folder loops."""
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in seen:
                continue  # a link back to a folder already listed
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(root / folder), key=lambda entry: (not entry.is_symlink(), entry.name))
        except OSError as error:
            raise DigitError(f"cannot list the folder {root / folder}: {error.strerror}") from error
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    pending.append(name)
                elif entry.is_file():
                    yield name, entry.stat().st_size
                elif entry.is_symlink():
                    yield name, 0  # points nowhere: found bad, with its name, when it is read
            except OSError:  # a link that leads back to itself, a folder that may not be entered
                yield name, 0


class FolderSource(ImageSource):
    """Image files below a folder. A file's class is the path of its folder below the root; in the root, none."""

    def __init__(self, root: Path, files: list[tuple[str, int]]):
        self.root, self.name = root, readable(root)
        self.files = [name for name, _ in files]
        self.fingerprint = file_digest(files)
        self.classes, self._labels = index_classes(
            [readable(os.path.dirname(name)) for name in self.files], numeric=False
        )

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return readable(self.root / self.files[index])

    def labels(self) -> np.ndarray:
        return self._labels

    def raw(self, index: int) -> Path:
        return self.root / self.files[index]
