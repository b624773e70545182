"""Images in a tree of files, a folder or a .zip: classes come from a label file if there is one, else from folders."""

import os
import posixpath
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from digit.data.fingerprint import data_fingerprint, stamps_of
from digit.data.imagenet import (
    Found,
    Nearby,
    SynsetLabels,
    is_known,
    is_list,
    label_by_name,
    label_validation,
    name_classes,
)
from digit.data.label_files import LabelFile, match_images, read_label_file
from digit.data.labels import index_classes
from digit.data.layout import Split, choose_packed_split, choose_split, folder_classes, plain_folders
from digit.data.listing import OUTPUT_MARKS, File, Listing, is_hidden, own_folders, some
from digit.data.source import ImageSource, readable
from digit.data.synsets import are_synsets
from digit.errors import BadImageError, DigitError

MAX_RATIO, MAX_MEMBER = 1000, 2**29  # of a .zip's members: unpacked to packed size, and unpacked bytes
JUNK = "__MACOSX/"
READ_FROM_ZIP = ("images", "label files", "other files")  # the last are noted by `Listing.notes`


@dataclass
class Labelled:
    """Classes and labels of the images of a tree."""

    classes: list[str]
    labels: np.ndarray  # int64 (len,), -1 = none
    notes: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)  # ImageNet's files of the tree that were read


def label_tree(
    split: Split, label_files: Mapping[str, Callable[[], bytes]], labels_from: str, nearby: Nearby
) -> Labelled:
    """Labels the images of a tree of files.

    Args:
        split: the images.
        label_files: name relative to the root -> reads it.
        labels_from: "auto": the label files, if there are any with labels, else the folders; "folders" or "top": the
            folders' whole paths or first parts; "none"; the column of a label file; or PATH or PATH:COLUMN of one.
        nearby: where ImageNet's files of labels and synsets are looked for.

    Raises DigitError for label files that cannot be read, and for anything else as `labels_from`.
    """
    labelled = _label(split, label_files, labels_from, nearby)
    found = labelled.classes
    labelled.classes, notes, used = name_classes(found, nearby)
    labelled.notes += notes
    labelled.used += [*used, *(nearby.inside if are_synsets(found) else ())]  # no file of ImageNet's is called unused
    return labelled


def _label(split: Split, label_files: Mapping[str, Callable[[], bytes]], labels_from: str, nearby: Nearby) -> Labelled:
    num = len(split.names)
    if labels_from == "none":
        unused = [f"label files are not used: {some(label_files)}"] if label_files else []
        return Labelled([], np.full(num, -1, dtype=np.int64), unused)
    if labels_from in ("folders", "top"):
        return Labelled(*index_classes(plain_folders(split.inner, top=labels_from == "top"), merge=False))
    if (given := _given_file(labels_from)) is not None:
        path, column = given
        if column is None and is_list(path) and (synsets := _of_validation(split, path, nearby)) is not None:
            return synsets
        folders = folder_classes(split.inner)[0] if column is None and is_known(path.name) else []
        if are_synsets(
            list({name or "" for name in folders})
        ):  # training images, beside the validation images it names
            return Labelled(
                *index_classes(folders, merge=False), [f"{path} is of validation images: folders are classes"]
            )
        return _match_loosely(split, path, column)
    files = _read_all(label_files, labels_from)
    if with_labels := [file for file in files if file.column is not None]:
        return _by_files(split, with_labels)
    notes = [f"{file.name} has no column of labels (its columns: {', '.join(file.others) or 'none'})" for file in files]
    classes, more = folder_classes(split.inner)
    if not any(classes) and (synsets := label_by_name(split.names) or label_validation(split.names, nearby)):
        return _of_synsets(synsets, notes)
    return Labelled(*index_classes(classes, merge=False), [*notes, *more])


def _of_synsets(found: SynsetLabels, notes: Sequence[str] = ()) -> Labelled:
    return Labelled(*index_classes(found.values, merge=False), [*notes, *found.notes], found.used)


def _of_validation(split: Split, path: Path, nearby: Nearby) -> Labelled | None:
    """Labels of ImageNet's validation images by a file that the person named; None for other images."""
    found = label_validation(split.names, nearby, Found(str(path), partial(_read, path)))
    return None if found is None else _of_synsets(found)


def _given_file(labels_from: str) -> tuple[Path, str | None] | None:
    """(path, column or None) where `labels_from` is a file, or FILE:COLUMN."""
    file, _, column = labels_from.rpartition(":")
    for text, name in ((labels_from, None), (file, column)):
        if text and (path := Path(text).expanduser()).is_file():
            return path, name
    return None


def _read_all(label_files: Mapping[str, Callable[[], bytes]], labels_from: str) -> list[LabelFile]:
    if labels_from != "auto" and not label_files:
        raise DigitError(
            f"labels_from is {labels_from!r}: no such file, and there is no metadata.csv or other label file with such "
            "a column; wanted auto, folders, top, none, a column or a file"
        )
    column = None if labels_from == "auto" else labels_from
    return [read_label_file(name, read(), column) for name, read in label_files.items()]


def _by_files(split: Split, files: list[LabelFile]) -> Labelled:
    found, notes = match_images(split.names, files)
    about = [f"labels are the column {file.column} of {file.name}" for file in files]
    about += [
        f"columns of {file.name} that are not used: {', '.join(file.others)}; --labels_from COLUMN takes another"
        for file in files
        if file.others
    ]
    return Labelled(*index_classes(found), [*about, *notes])


def _match_loosely(split: Split, path: Path, column: str | None) -> Labelled:
    """Labels of a file that the person named: its paths may be whole, or names of files with or without suffix."""
    file = read_label_file(str(path), _read(path), column, folder="")
    if file.column is None:
        raise DigitError(
            f"{path} has no column of labels; its columns are {', '.join(file.others)}: add :COLUMN to name it"
        )
    ways: dict[str, Callable[[str], str]] = {
        "whole paths": lambda name: name,
        "file names": posixpath.basename,
        "file names without suffix": lambda name: posixpath.splitext(posixpath.basename(name))[0],
    }
    best, used, keys = -1, "", list(split.names)
    for way, key in ways.items():
        for names in (split.names, split.inner):
            short = [key(name) for name in names]
            found = sum(name in file.labels for name in short)
            if len(set(short)) == len(short) and found > best:
                best, used, keys = found, way, short
    if not best:
        raise DigitError(f"{path} names none of the {len(keys)} images, such as {some(split.names)}")
    found, notes = match_images(keys, [file])
    about = f"labels are the column {file.column} of {path}, matched by {used}"
    return Labelled(*index_classes(found), [about, *notes])


class TreeSource(ImageSource):
    """Images of a tree of files."""

    def __init__(self, name: str | Path, split: Split, labelled: Labelled, notes: Sequence[str]):
        self.name, self.files, self.inner = readable(name), split.names, split.inner
        self.classes, self._labels = labelled.classes, labelled.labels
        self.notes = (*notes, *split.notes, *labelled.notes)

    def __len__(self) -> int:
        return len(self.files)

    def labels(self) -> np.ndarray:
        return self._labels


class FolderSource(TreeSource):
    """Image files below a folder.

    Raises DigitError where it holds no split or no labels as asked for.
    """

    def __init__(
        self,
        root: Path,
        listing: Listing,
        split: str | None = None,
        labels_from: str = "auto",
        read_contents: bool | None = None,
    ):
        kinds = listing.by_kind
        images = {file.name: file for file in kinds["images"]}
        chosen = _choose(root, list(images), split)
        label_files = {file.name: partial(_read, root / file.name) for file in kinds.get("label files", ())}
        others = [file.name for file in kinds.get("other files", ()) if is_known(file.name)]
        nearby = Nearby(root.absolute().parent, {name: partial(_read, root / name) for name in others}, images)
        labelled = label_tree(chosen, label_files, labels_from, nearby)
        super().__init__(root / chosen.folder, chosen, labelled, list(listing.notes(labelled.used)))
        self.root, self.read_contents = root, read_contents
        self._about = [images[name] for name in chosen.names]

    def find_fingerprint(self) -> str:
        sizes, times = [file.size for file in self._about], [file.stamp for file in self._about]
        stamps = stamps_of((self.root / name for name in self.files), sizes, times, self.read_contents)
        return data_fingerprint(self.inner, sizes, stamps, self.classes, self._labels)

    def key(self, index: int) -> str:
        return readable(self.root / self.files[index])

    def raw(self, index: int) -> Path:
        return self.root / self.files[index]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DigitError(f"{path} cannot be read ({error.strerror}): repair or remove it") from error


def _choose(root: Path, names: Sequence[str], split: str | None) -> Split:
    try:
        return choose_split(names, split)
    except DigitError as error:
        if split is not None and root.name.lower() == split.lower():  # the folder is the split
            return choose_split(names, None)
        raise type(error)(f"{root}: {error}") from error


class ZipSource(TreeSource):
    """Images in a .zip, such as StyleGAN's dataset tool writes; read as a folder of the same files.

    Raises DigitError for a damaged or an encrypted archive and where it holds no images, split or labels as asked for.
    """

    def __init__(self, path: Path, split: str | None, labels_from: str):
        self.path = path
        self._packed_as: dict[str, str] = {}  # our names -> the archive's, which may begin with ./ or hold backslashes
        self._forget()
        listing = self._list()
        kinds = listing.by_kind
        if "images" not in kinds:
            raise DigitError(f"{path} holds no images ({len(listing.files)} other files)")
        images = {file.name: file for file in kinds["images"]}
        try:
            chosen = choose_packed_split(list(images), split)
        except DigitError as error:
            raise type(error)(f"{path}: {error}") from error
        label_files = {file.name: lambda name=file.name: self._read(name) for file in kinds.get("label files", ())}
        others = [file.name for file in kinds.get("other files", ()) if is_known(file.name)]
        nearby = Nearby(path.absolute().parent, {name: partial(self._read, name) for name in others}, images)
        labelled = label_tree(chosen, label_files, labels_from, nearby)
        unread = [f"not used: {len(kinds[kind])} {kind}" for kind in kinds if kind not in READ_FROM_ZIP]
        super().__init__(path, chosen, labelled, [*listing.notes(labelled.used), *unread])
        self._about = [images[name] for name in chosen.names]

    def _list(self) -> Listing:
        listing = Listing([])
        seen: set[str] = set()
        marks: list[str] = []
        for info in _guard(self.path, lambda: self._open().infolist()):
            name = info.filename.replace("\\", "/").removeprefix("./")
            if not name or name.endswith("/"):
                continue  # a folder
            if name.startswith(JUNK) or is_hidden(name):
                if name.rpartition("/")[2] in OUTPUT_MARKS:
                    marks.append(name)
                else:
                    listing.num_hidden += 1
                continue
            if info.flag_bits & 1:
                raise DigitError(f"{self.path} is encrypted ({name}): unpack it and give the folder")
            if name in seen:
                raise DigitError(f"{self.path} holds two files {name}: pack it anew")
            seen.add(name)
            self._packed_as[name] = info.filename
            listing.files.append(File(name, info.file_size, info.CRC))
        own = own_folders(marks)
        listing.own += own
        listing.files = [file for file in listing.files if not file.name.startswith(own)]
        listing.files.sort(key=lambda file: file.name)
        return listing

    def find_fingerprint(self) -> str:
        """An archive lists the CRC-32 of every member, so its contents need not be read."""
        stamps = [file.stamp.to_bytes(4, "little") for file in self._about]
        return data_fingerprint(self.inner, [file.size for file in self._about], stamps, self.classes, self._labels)

    def key(self, index: int) -> str:
        return readable(f"{self.path}:{self.files[index]}")

    def raw(self, index: int) -> bytes:
        try:
            return self._read(self.files[index])
        except DigitError as error:
            raise BadImageError(f"{self.key(index)}: {error}") from error

    def _read(self, name: str) -> bytes:
        if self._pid != os.getpid():
            self._forget()  # forked: the parent's file position cannot be shared
        with self._lock:
            archive = self._open()

            def read() -> bytes:
                info = archive.getinfo(self._packed_as[name])
                if info.file_size > MAX_MEMBER or info.file_size > MAX_RATIO * max(1, info.compress_size):
                    raise ValueError(f"{name} unpacks to {info.file_size} bytes (a decompression bomb?): refused")
                with archive.open(info) as member:
                    return member.read(MAX_MEMBER)

            return _guard(self.path, read)

    def _open(self) -> zipfile.ZipFile:
        archive = self._archive or _guard(self.path, lambda: zipfile.ZipFile(self.path))
        self._archive = archive
        return archive

    def _forget(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._archive: zipfile.ZipFile | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_archive")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()


def _guard(path: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:  # damaged archives raise nearly any type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DigitError(f"{path} cannot be read as .zip ({reason}): fetch it again") from error
