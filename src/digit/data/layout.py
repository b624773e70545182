"""What the folders of a data set mean: splits, classes, or nothing. Every assumption comes with a note that says it."""

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from digit.data.listing import some
from digit.errors import NoSplitError

SPLITS = {  # and the words for them, as in Hugging Face's datasets
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
WORDS = {word: split for split, words in SPLITS.items() for word in words}
SPLIT_NAME = re.compile(rf"({'|'.join(WORDS)})(?:[ _.-]*(?:set|split|data|images?|imgs?|pictures?|photos?|\d+))*", re.I)
LIKELY = re.compile(rf"(?<![a-z0-9])({'|'.join(WORDS)})(?![a-z])")  # in names of files
FOLDERS = "--labels_from folders makes every folder a class"


def split_of(name: str) -> str | None:
    """'Train', 'val2017' and 'test_images' -> train, validation and test; None for other names."""
    match = SPLIT_NAME.fullmatch(name.strip())
    return WORDS[match[1].lower()] if match else None


def words_of(name: str, also: str | None = None) -> list[str]:
    """The splits that a file's path names: 'default/test/0000.parquet' -> ['test']. `also` is one more split."""
    words = re.split(r"[/\\._ -]", name)
    return [split for word in words if (split := split_of(word) or (also if word == also else None))]


@dataclass
class Split:
    """The images of one split of a tree of files."""

    names: list[str]  # of its images, relative to the root
    inner: list[str]  # the same without the folder that names the split
    folder: str = ""  # the one folder that holds all of them; "" if there is none
    notes: list[str] = field(default_factory=list)


def choose_split(names: Sequence[str], split: str | None) -> Split:
    """Chooses the images of `split` where folders name splits; without a `split`, train if there are several.

    Folders name splits if they are the first ones of the paths, and there are two different ones or nothing else; or if
    they are the last ones, and there is nothing else. Raises NoSplitError if there is no such split.
    """
    if (found := _find_split(names, split)) is not None:
        return found
    wrapped = without_common_folder(names)
    if wrapped != list(names) and (inner := _find_split(wrapped, split)) is not None:
        whole = dict(zip(wrapped, names, strict=True))
        common = names[0][: len(names[0]) - len(wrapped[0])]
        folder = f"{common}{inner.folder}" if inner.folder else ""
        return Split([whole[name] for name in inner.names], inner.inner, folder, inner.notes)
    if split is not None:
        raise NoSplitError(f"there is no split {split!r}: no folder has that name")
    first = Counter(name.partition("/")[0] if "/" in name else "" for name in names)
    return Split(list(names), list(names), notes=_suspicious(names, first))


def _find_split(names: Sequence[str], split: str | None) -> Split | None:
    """The images of a split by the first or the last folders of their paths; None if these name no splits."""
    first = Counter(name.partition("/")[0] if "/" in name else "" for name in names)
    last = Counter(name.rpartition("/")[0].rpartition("/")[2] for name in names)
    for parts, place in ((first, 0), (last, -1)):
        found = _splits(parts, split)
        others = [part for part in parts if part not in {folder for folders in found.values() for folder in folders}]
        several = len(found) > 1
        if found and (not others if place else several or not others or split is not None):
            return _take_split(names, split, found, place, parts)
    loose: dict[str, list[str]] = {}
    for part in sorted(first):  # words within names, such as images_train, if no folder has another name
        for name in dict.fromkeys(words_of(part)):
            loose.setdefault(name, []).append(part)
    if len(loose) > 1 and sorted(part for group in loose.values() for part in group) == sorted(first):
        return _take_split(names, split, loose, 0, first)
    return None


def _splits(parts: Counter[str], split: str | None) -> dict[str, list[str]]:
    """Split -> folders of it. A split asked for may have any name."""
    found: dict[str, list[str]] = {}
    for part in sorted(parts):
        if part and (name := split_of(part) or (part if part == split else None)):
            found.setdefault(name, []).append(part)
    return found


def _take_split(
    names: Sequence[str], split: str | None, found: dict[str, list[str]], place: int, parts: Counter[str]
) -> Split:
    wanted = ("train" if "train" in found else None) if split is None else split_of(split) or split
    counts = {name: sum(parts[folder] for folder in folders) for name, folders in found.items()}
    if wanted is not None and wanted not in found:
        raise NoSplitError(f"there is no split {split!r}; there are {', '.join(found)}")
    if split is not None and split in parts:
        folders = [split]  # typed as the folder is called
    else:
        folders = found[wanted] if wanted is not None else [folder for group in found.values() for folder in group]
    chosen = [name for name in names if _part(name, place) in folders]
    inner = [_without(name, place) for name in chosen]
    notes = []
    if len(found) > 1 or wanted is None:
        there = ", ".join(f"{name} ({', '.join(found[name])}: {count} images)" for name, count in counts.items())
        used = f"split {wanted} of" if wanted else "all splits together:"
        notes.append(f"{used} {there}; --split takes another")
    left = sum(parts.values()) - sum(counts.values())
    if left:
        others = [part or "the folder itself" for part in parts if all(part not in group for group in found.values())]
        notes.append(f"not used: {left} images beside the splits, in {some(others)}")
    return Split(chosen, inner, folders[0] if place == 0 and len(folders) == 1 else "", notes)


def _part(name: str, place: int) -> str:
    if place == 0:
        return name.partition("/")[0] if "/" in name else ""
    return posixpath.dirname(name).rpartition("/")[2]


def _without(name: str, place: int) -> str:
    if place == 0:
        return name.partition("/")[2]
    folder, base = posixpath.split(name)
    return posixpath.join(posixpath.dirname(folder), base)


def _suspicious(names: Sequence[str], folders: Counter[str]) -> list[str]:
    """Notes on names that look like splits and are not taken for them."""
    notes = [
        f"the folder {folder} counts as a class, not as a split, because it stands beside others; "
        f"--split {folder} reads it alone"
        for folder in sorted(folders)
        if folder and split_of(folder)
    ]
    words = Counter(LIKELY.findall("\n".join(name.rpartition("/")[2].lower() for name in names)))
    bases: Counter[str] = Counter()
    for word, count in words.items():
        bases[WORDS[word]] += count
    if len(bases) > 1:
        listed = ", ".join(f"{split} ({count})" for split, count in bases.items())
        notes.append(f"file names that look like splits are not used as such: {listed}; a folder for each would be")
    return notes


def folder_classes(names: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """The class of each image by its folder, None for images outside, and notes.

    An image's class is the path of its folder. But where a folder holds more images itself than all folders below it,
    these count as it: they are no classes of their own. For the root this means that there are no classes.
    """
    folder = [name.rpartition("/")[0] for name in names]
    direct = Counter(folder)
    below: Counter[str] = Counter()
    for path, count in direct.items():
        for above in _above(path):
            below[above] += count
    meaning, joined, notes = {}, Counter(), []
    for path, count in direct.items():
        meaning[path] = next((above for above in _above(path) if direct[above] > below[above]), path)
        if meaning[path] != path:
            joined[meaning[path]] += count
    for path, count in sorted(joined.items()):
        inside = some(sorted(other for other in direct if other != path and meaning[other] == path))
        if not path:
            where = f"{direct['']} images lie in the folder itself, {count} in folders below it ({inside})"
            notes.append(f"no classes: {where}; {FOLDERS}")
        else:
            notes.append(f"{count} images of {inside} count as class {path}, which holds more itself; {FOLDERS}")
    classes = [meaning[path] or None for path in folder]
    return classes, [*notes, *_class_notes(classes)]


def _class_notes(classes: Sequence[str | None]) -> list[str]:
    known = sorted({name for name in classes if name})
    notes = []
    if len(known) == 1:
        notes.append(f"all images that have a class are of one, {known[0]}; --labels_from none takes no classes")
    if known and (outside := sum(name is None for name in classes)):
        notes.append(f"{outside} images lie beside the folders of the {len(known)} classes: unlabelled")
    if deep := [name for name in known if "/" in name]:
        notes.append(f"classes are whole paths, such as {deep[0]}; --labels_from top takes the first folder alone")
    return notes


def _above(path: str) -> list[str]:
    """'a/b/c' -> ['', 'a', 'a/b']; '' -> []."""
    parts = path.split("/") if path else []
    return ["/".join(parts[:count]) for count in range(len(parts))]


def plain_folders(names: Sequence[str], *, top: bool = False) -> list[str | None]:
    """The folder of each image as its class, its whole path or only the first part; None in the root."""
    folders = (name.rpartition("/")[0] for name in names)
    return [(folder.partition("/")[0] if top else folder) or None for folder in folders]


def without_common_folder(names: Sequence[str]) -> list[str]:
    """Names without the one folder that holds all of them, if there is one: archives often are a packed folder."""
    while names and all("/" in name for name in names) and len({name.partition("/")[0] for name in names}) == 1:
        names = [name.partition("/")[2] for name in names]
    return list(names)


def choose_packed_split(names: Sequence[str], split: str | None) -> Split:
    """As `choose_split`, for an archive: one folder that holds everything is no class."""
    stripped = without_common_folder(names)
    whole = dict(zip(stripped, names, strict=True))
    chosen = choose_split(stripped, split)
    return Split([whole[name] for name in chosen.names], chosen.inner, chosen.folder, chosen.notes)
