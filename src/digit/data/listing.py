"""Lists the files of a folder and sorts them by kind. What digit itself wrote is left out: it is no data."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from digit.data.decode import EXTENSIONS
from digit.errors import DigitError
from digit.runtime.files import OUTPUT_MARK
from digit.runtime.lock import NAME as LOCK

PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
TARS = (".tar", *PACKED_TARS)
LABEL_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "dataset.json")  # of Hugging Face, of StyleGAN
KINDS = dict.fromkeys(EXTENSIONS, "images") | {".parquet": "Parquet files", ".tar": "tar files", ".zip": "zip files"}
OUTPUT_MARKS = (OUTPUT_MARK, LOCK)  # a lock while the folder is filled, a mark afterwards
CONTACT_SHEET = re.compile(r"contact_sheet(-\d+)?\.png")
SOFTWARE = b"tEXtSoftware\0DiGIT"  # in the pictures of `digit inspect`
NUM_NAMED = 3  # names that a note gives


_shared: ContextVar[dict[Path, "Listing"] | None] = ContextVar("shared listings", default=None)


@dataclass(frozen=True, slots=True)
class File:
    """One file of a folder or of an archive."""

    name: str  # relative to the root, with "/"
    size: int  # bytes
    stamp: int  # changes with the contents: time of the last change (ns) of a file, CRC-32 of an archive's member


@dataclass
class Listing:
    """The files below a root, sorted by name, and what was left out of it."""

    files: list[File]
    own: list[str] = field(default_factory=list)  # folders and pictures that digit wrote
    linked: list[str] = field(default_factory=list)  # links to folders that are listed under another name
    num_hidden: int = 0

    @cached_property
    def by_kind(self) -> dict[str, list[File]]:
        """Files by kind: images, Parquet files, tar files, zip files, label files, others. Empty kinds are absent."""
        kinds: dict[str, list[File]] = {}
        for file in self.files:
            kinds.setdefault(kind_of(file.name), []).append(file)
        return kinds

    def notes(self, used: Collection[str] = ()) -> Iterator[str]:
        """Says what was left out; `used` names files of no kind that were read after all."""
        if self.own:
            yield f"not read, because DiGIT wrote it: {some(self.own)}"
        if self.linked:
            yield f"not read twice: {some(self.linked)}, links to folders that are read already"
        if others := [file.name for file in self.by_kind.get("other files", ()) if file.name not in used]:
            suffixes = Counter(suffix_of(name) or "without suffix" for name in others)
            listed = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(12))
            yield f"not used: {listed} (such as {some(others)})"
        if self.num_hidden:
            yield f"not used: {self.num_hidden} hidden files or folders, whose names begin with a dot"


def kind_of(name: str) -> str:
    """What a file is, by its name."""
    base = name.rpartition("/")[2].lower()
    if base in LABEL_FILES:
        return "label files"
    if base.endswith(PACKED_TARS):
        return "tar files"
    return KINDS.get(suffix_of(base), "other files")


def own_folders(names: Iterable[str]) -> tuple[str, ...]:
    """The folders of an archive that digit filled, as 'run/', by the names of its files; not its root."""
    marked = (name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in OUTPUT_MARKS)
    return tuple(sorted({f"{folder}/" for folder in marked if folder}))


def is_hidden(name: str) -> bool:
    """Whether a file of an archive or a folder that it lies in begins with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def suffix_of(name: str) -> str:
    """'a/B.PNG' -> '.png'; '' for a name without one."""
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return dot + suffix.lower() if stem else ""


def some(names: Iterable[str]) -> str:
    """'a, b, c and 4 more'."""
    names = list(names)
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def list_folder(root: Path) -> Listing:
    """Lists every file below `root`; skips hidden files, folder loops, and folders that digit wrote below it.

    If there is nothing else to read, it lists these folders too: then they are what is wanted. Raises DigitError for a
    folder that cannot be listed.
    """
    shared = _shared.get()
    if shared is None:
        return _list_all(root)
    if root not in shared:
        shared[root] = _list_all(root)
    return shared[root]


@contextmanager
def shared_listings() -> Iterator[None]:
    """Lists each folder once while it lasts, for the splits of one data set: ImageNet has 1.33 million files."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def _list_all(root: Path) -> Listing:
    listing = _list(root, with_own=False)
    if listing.own and not any(kind in listing.by_kind for kind in set(KINDS.values())):
        return _list(root, with_own=True)
    return listing


def _list(root: Path, *, with_own: bool) -> Listing:
    listing = Listing([])
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in seen:
                listing.linked.append(folder)
                continue  # a link back to a folder already listed
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(root / folder), key=lambda entry: (not entry.is_symlink(), entry.name))
        except OSError as error:
            raise DigitError(f"cannot list the folder {root / folder}: {error.strerror}") from error
        if folder and not with_own and any(entry.name in OUTPUT_MARKS for entry in entries):
            listing.own.append(folder + "/")
            continue
        pending += _take(listing, folder, entries)
    listing.files.sort(key=lambda file: file.name)
    listing.own.sort()
    return listing


def _take(listing: Listing, folder: str, entries: list["os.DirEntry[str]"]) -> Iterator[str]:
    """Adds the files of one folder to `listing`; yields its subfolders."""
    for entry in entries:
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.name.startswith("."):
            listing.num_hidden += entry.name not in OUTPUT_MARKS
            continue
        try:
            if entry.is_dir():
                yield name
            elif CONTACT_SHEET.fullmatch(entry.name) and is_contact_sheet(entry.path):
                listing.own.append(name)
            elif entry.is_file():
                status = entry.stat()
                listing.files.append(File(name, status.st_size, status.st_mtime_ns))
            elif entry.is_symlink():
                listing.files.append(File(name, 0, 0))  # points nowhere: found bad, with its name, when it is read
        except OSError:  # a link that leads back to itself, a folder that may not be entered
            listing.files.append(File(name, 0, 0))


def is_contact_sheet(path: str | Path) -> bool:
    """Whether `digit inspect` wrote this picture."""
    try:
        with open(path, "rb") as file:
            return SOFTWARE in file.read(1024)
    except OSError:
        return False
