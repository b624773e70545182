"""Opens any kind of image source: open_source(folder | .zip | Parquet | WebDataset tar | "shapes")."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from digit.data.decode import EXTENSIONS, decode_image
from digit.data.imagenet import is_known
from digit.data.layout import split_of, words_of
from digit.data.listing import TARS, list_folder, some
from digit.data.source import ImageSource, SubsetSource, readable
from digit.data.tree import FolderSource, ZipSource
from digit.errors import DigitError, NoSplitError
from digit.runtime.files import as_path
from digit.runtime.paths import nearest

__all__ = ["FolderSource", "ImageSource", "SubsetSource", "as_source", "decode_image", "open_source"]

SHAPES = "shapes"
SHAPES_OPTIONS = ("num", "size", "seed")
log = logging.getLogger(__name__)
WANTED = "a folder or .zip of images, a Parquet file or folder, WebDataset .tar shards, or 'shapes'"


@dataclass(frozen=True)
class Reading:
    """How a source is read: the arguments of `open_source` but for the number of images."""

    split: str | None = None
    labels_from: str = "auto"
    read_contents: bool | None = None


def open_source(
    spec: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    labels_from: str = "auto",
    read_contents: bool | None = None,
    pixel_max: int | None = None,
) -> ImageSource:
    """Opens a source of images by its path, or the built-in shapes by name. docs/inputs.md lists all layouts.

    Args:
        spec: a folder or .zip of images (nested: one folder per class), a Parquet file in the Hub's layout or a folder
            of them, a WebDataset .tar or a folder of them, or "shapes" / "shapes:num=16000,size=64,seed=0" (rendered
            scenes).
        split: the part of a folder with files train-*, validation-*, test-* or subfolders train, val, test. Default:
            train if there is one beside others, else everything.
        limit: number of images to keep, spread evenly over all.
        labels_from: where labels come from. "auto": label files, columns, keys or members of the usual names, else
            folders. "none": no labels. "folders" or "top": whole paths of folders or their first parts. Else the name
            of a column or key, or the path of a label file (PATH or PATH:COLUMN).
        read_contents: whether the fingerprint reads the contents of all files, or, for speed, takes the times of their
            last change instead. None reads up to 10,000 files of 512 MB in all.
        pixel_max: the value that is white in images of more than 8 bits per channel (4095 for 12 bits in a 16-bit PNG).
            By default a file's own metadata says so, else the source's `pixel_range`, which some of its images show.

    What was assumed and what is not used stands in the source's `notes`, and in the log (level INFO).

    Raises:
        DigitError: missing path, empty folder, a mixture of kinds, unknown split, container that cannot be read.
    """
    reading = Reading(split, labels_from, read_contents)
    if isinstance(spec, str) and (spec == SHAPES or spec.startswith(SHAPES + ":")):
        source = _open_shapes(spec, split)
        if labels_from not in ("auto", "none"):
            raise DigitError(f"labels_from is {labels_from!r}, but shapes has labels of its own: auto or none")
        source = source.with_classes([]) if labels_from == "none" else source
    else:
        source = _open_path(as_path(spec), reading)
    source.find_pixel_range(pixel_max)
    for note in source.notes:
        log.info("%s: %s", source.name, note)
    found = ImageSource.limit(source, limit)
    texts = {"path": spec, "split": split, "labels_from": None if labels_from == "auto" else labels_from}
    others = {"limit": limit, "pixel_max": pixel_max, "read_contents": read_contents}
    found.reading = {name: readable(text) for name, text in texts.items() if text is not None}
    found.reading |= {name: value for name, value in others.items() if value is not None}
    return found


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
        raise NoSplitError(f"split is {split!r}, but shapes has no splits: choose another seed (shapes:seed=1)")
    options = {}
    for part in filter(None, spec.partition(":")[2].split(",")):
        name, _, value = part.partition("=")
        if name not in SHAPES_OPTIONS or not value.isdecimal():
            raise DigitError(f"{spec!r}: cannot read {part!r}; wanted shapes:num=16000,size=64,seed=0")
        options[name] = int(value)
    source = ShapesSource(**options)
    if Path(SHAPES).exists():
        source.notes = (f"these are the built-in scenes; ./{SHAPES} reads what has that name here",)
    return source


def _open_path(path: Path, reading: Reading) -> ImageSource:
    try:
        os.stat(path)
        exists = True
    except FileNotFoundError:
        exists = False
    except (OSError, ValueError) as error:  # a name too long, a zero byte, no permission
        reason = getattr(error, "strerror", None) or error
        raise DigitError(f"cannot open ({reason}): {path}; wanted {WANTED}") from error
    if not exists:
        raise DigitError(f"no such path: {path}{nearest(path)}; wanted {WANTED}")
    if path.is_dir():
        return _open_folder(path, reading)
    if path.suffix.lower() == ".zip":
        return ZipSource(path, reading.split, reading.labels_from)
    is_tar = path.name.lower().endswith(TARS)
    if reading.split is not None and not is_tar:
        raise NoSplitError(f"split is {reading.split!r}, but {path} is one file: give the folder that holds the splits")
    return _open_files(path, [path], reading, split=reading.split)


def _open_files(
    root: Path, files: list[Path], reading: Reading, notes: Sequence[str] = (), split: str | None = None
) -> ImageSource:
    """Opens containers of one kind; `root` names the source, and `split` is one of the folders packed in a tar."""
    if files[0].suffix.lower() == ".parquet":
        from digit.data.parquet import ParquetSource

        return ParquetSource(root, files, reading.labels_from, reading.read_contents, notes)
    if files[0].name.lower().endswith(TARS):
        from digit.data.webdataset import TarSource

        return TarSource(root, files, reading.labels_from, reading.read_contents, notes, split)
    if files[0].suffix.lower() in EXTENSIONS:
        raise DigitError(f"{root} is one image: give the folder that holds it and others")
    raise DigitError(f"{root} is a {files[0].suffix or 'nameless kind of'} file, wanted {WANTED}")


def _open_folder(root: Path, reading: Reading) -> ImageSource:
    listing = list_folder(root)
    found = listing.by_kind
    present = {kind: found[kind] for kind in ("Parquet files", "tar files", "zip files", "images") if kind in found}
    if not present:
        left_out = "".join(f"; {note}" for note in listing.notes())
        raise DigitError(f"no images in {root} ({len(listing.files)} other files); wanted {WANTED}{left_out}")
    if len(present) > 1:
        counts = " and ".join(f"{len(files)} {kind}" for kind, files in present.items())
        raise DigitError(f"{root} holds {counts}: give a folder or a file with one kind only")
    if "images" in present:
        return FolderSource(root, listing, reading.split, reading.labels_from, reading.read_contents)
    names = [file.name for file in next(iter(present.values()))]
    if "zip files" in present:
        raise DigitError(f"{root} holds .zip files: give one of them ({some(names)}), or unpack them")
    names, notes = _choose_files(root, names, reading.split)
    if "label files" in found:
        notes.append(f"not used: {some([file.name for file in found['label files']])}, which label folders of images")
    if len(folders := sorted({name.rpartition("/")[0] for name in names})) > 1:
        notes.append(
            f"files of {len(folders)} folders are read as one ({some(folders)}): give one folder to read it alone"
        )
    imagenets = [file.name for file in found.get("other files", ()) if is_known(file.name)]  # labels of packed images
    return _open_files(root, [root / name for name in names], reading, [*listing.notes(imagenets), *notes])


def _choose_files(root: Path, names: list[str], split: str | None) -> tuple[list[str], list[str]]:
    """Selects a split's files by a word of their paths (train-00000-of-00001.parquet, default/test/0000.parquet)."""
    of = {name: _split_of_file(name, split) for name in names}
    there = sorted({word for word in of.values() if word})
    wanted = "train" if split is None else split_of(split) or split
    chosen = [name for name in names if of[name] == wanted]
    if split is not None and not chosen:
        if root.name.lower() == split.lower():  # the folder is the split
            return names, []
        raise NoSplitError(f"{root} has no split {split!r}; it has {', '.join(there) or 'none'}")
    if not chosen:
        return names, [f"all splits together: {', '.join(there)}; --split takes one"] if len(there) > 1 else []
    notes = []
    if len(there) > 1:
        notes.append(
            f"split {wanted} of {', '.join(there)} ({len(chosen)} of {len(names)} files); --split takes another"
        )
    if rest := [name for name in names if of[name] is None]:
        notes.append(f"not used: {len(rest)} files of no split ({some(rest)})")
    return chosen, notes


def _split_of_file(name: str, split: str | None) -> str | None:
    words = words_of(name, split)
    return words[0] if words else None
