"""ImageNet-1k as it lies on disks: labels of a flat validation split, synsets in the names of files, their words.

A flat split (ILSVRC2012_val_00000001.JPEG, ...) has its labels in a file of its own, of one of these forms:

    LOC_val_solution.csv                          Kaggle: ILSVRC2012_val_00000001,n01751748 111 108 ...
    imagenet_2012_validation_synset_labels.txt    TensorFlow: line 1 is the synset of image 1
    ILSVRC2012_validation_ground_truth.txt        devkit: line 1 is the ILSVRC id (1..1000) of image 1
    val.txt, val_labels.txt, val_list.txt         Caffe, OpenMMLab: ILSVRC2012_val_00000001.JPEG 65 (sorted synsets)

It is looked for in the data, in the folders above them and in the devkit's folder there.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from digit.data.synsets import READERS, WNID, Synsets, are_synsets
from digit.errors import DigitError

VALIDATION = re.compile(r"ILSVRC\d{4}_val_(\d{8})(?:_n\d{8})?(?:\.\w+)?", re.ASCII)
IN_NAME = re.compile(r"(?:(?:n\d{8}|ILSVRC\d{4}_val)_\d+_)?(n\d{8})(?:_\d+)?\.\w+", re.ASCII)
OWN_NAMES = (
    "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt", "ILSVRC2012_validation_ground_truth.txt",
)  # fmt: skip
COMMON_NAMES = ("val.txt", "val_labels.txt", "val_list.txt")  # which other data may have, too: only close by
KNOWN_NAMES = (*OWN_NAMES, *COMMON_NAMES, *READERS)
LOWER_NAMES = frozenset(name.lower() for name in KNOWN_NAMES)
DEVKITS = ("ILSVRC2012_devkit_t12/data", "ILSVRC/devkit/data", "devkit/data", "meta")  # folders beside the data
LISTS_OF_NAMES = "imagesets"  # Kaggle's folder of lists that count images: ILSVRC2012_val_00000001 1
LEVELS = 5  # folders above the data that are looked into: those above TOP/ILSVRC/Data/CLS-LOC/val, and one more
HELP = (
    "put LOC_val_solution.csv (Kaggle), or ILSVRC2012_validation_ground_truth.txt with map_clsloc.txt or meta.mat "
    "(devkit), beside the folder, or name one by --labels_from FILE"
)


def is_known(name: str) -> bool:
    """Whether a file has the name of one of ImageNet's files of labels or synsets."""
    return name.rpartition("/")[2].lower() in LOWER_NAMES


def is_list(path: Path) -> bool:
    """Whether a file that was named may list labels of the validation images in one of these forms."""
    return is_known(path.name) or path.suffix.lower() == ".txt"


@dataclass(frozen=True)
class Found:
    """A file that may tell labels or names."""

    name: str  # as messages show it
    read: Callable[[], bytes]
    inside: str = ""  # its name relative to the data; "" where it lies above them


@dataclass
class Nearby:
    """The files that may tell about a tree of images: some of its own, and those in folders above it."""

    start: Path  # the lowest folder to look into, beside `inside`
    inside: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)  # by name relative to the data
    images: Iterable[str] = ()  # all images of the tree, of every split

    def find(self, wanted: Iterable[str]) -> Iterator[Found]:
        """Files of these names, in their order; of one name the closest first."""
        for name in wanted:
            inner = [own for own in self.inside if own.rpartition("/")[2].lower() == name.lower()]
            inner = [own for own in inner if LISTS_OF_NAMES not in own.lower().split("/")]
            for own in sorted(inner, key=lambda own: (own.count("/"), own)):
                yield Found(own, self.inside[own], own)
            for path in self._above[: 1 if name in COMMON_NAMES else LEVELS]:
                yield from (Found(str(file), file.read_bytes) for file in path if file.name == name)

    @cached_property
    def _above(self) -> list[list[Path]]:
        """Files of known names in each folder above the data, and in devkits there; the closest first."""
        folders = [self.start, *self.start.parents][:LEVELS]
        return [
            [file for place in (folder, *(folder / inner for inner in DEVKITS)) for file in known_files(place)]
            for folder in folders
        ]

    def synsets(self, refused: list[str]) -> Iterator[tuple[Synsets, Found]]:
        """What files tell of synsets; what is wrong with files that cannot be read goes to `refused`."""
        for found in self.find(READERS):
            try:
                yield READERS[Path(found.name).name](found.read()), found
            except (DigitError, OSError, KeyError) as error:
                refused.append(f"{found.name} is not used: {error}")

    def folders(self) -> list[str]:
        """The synsets that folders of the tree, or a folder train beside it, are named after; sorted."""
        found = {part for name in self.images for part in name.split("/")[:-1] if WNID.fullmatch(part)}
        for beside in (self.start / "train", self.start.parent / "train"):
            if not found and beside.is_dir():
                found = {name for path in beside.iterdir() if WNID.fullmatch(name := path.name.removesuffix(".tar"))}
        return sorted(found)


def known_files(folder: Path) -> list[Path]:
    """Files of a folder, not below it, with the names of ImageNet's files; none where it cannot be entered."""
    try:
        return [path for name in KNOWN_NAMES if (path := folder / name).is_file()] if folder.is_dir() else []
    except OSError:
        return []


@dataclass
class SynsetLabels:
    """The synset of each image, None without one."""

    values: list[str | None]
    notes: list[str]
    used: list[str] = field(default_factory=list)  # files of the tree that were read


def label_by_name(names: Sequence[str]) -> SynsetLabels | None:
    """Synsets in the names of all files: n01440764_18.JPEG, or ILSVRC2012_val_00000001_n01751748.JPEG of the Hub."""
    found = [IN_NAME.fullmatch(name.rpartition("/")[2]) for name in names]
    if not found or not all(found):
        return None
    return SynsetLabels([match[1] for match in found if match], ["classes are the synsets in the names of the files"])


def validation_numbers(names: Sequence[str]) -> list[int] | None:
    """The numbers of images of ImageNet's validation split by their names; None for other images."""
    found = [VALIDATION.fullmatch(name.rpartition("/")[2]) for name in names]
    return [int(match[1]) for match in found if match] if found and all(found) else None


def label_validation(names: Sequence[str], nearby: Nearby, given: Found | None = None) -> SynsetLabels | None:
    """Labels the images of a flat validation split by the first file that tells them; `given` is one that was named.

    Returns None for other images. Without a usable file all are unlabelled, and notes say what would help.
    Raises DigitError where `given` cannot be used.
    """
    numbers = validation_numbers(names)
    if numbers is None:
        return None
    refused = []
    for found in [given] if given else nearby.find((*OWN_NAMES, *COMMON_NAMES)):
        try:
            synset_of, about, used = read_validation(found, nearby)
        except (DigitError, OSError) as error:
            if given:
                raise DigitError(f"{found.name} gives no labels: {error}") from error
            refused.append(f"{found.name} gives no labels: {error}")
            continue
        values = [synset_of.get(number) for number in numbers]
        notes = [f"labels of the validation images are {found.name}{about}"]
        if missing := sum(value is None for value in values):
            notes.append(f"{missing} images have no label in it: unlabelled")
        return SynsetLabels(values, [*refused, *notes], used)
    return SynsetLabels([None] * len(names), [*refused, f"the validation images have no labels: {HELP}"])


def read_validation(found: Found, nearby: Nearby) -> tuple[dict[int, str], str, list[str]]:
    """(number of an image -> synset, words for messages, files of the tree that were read) of a file of labels.

    Raises DigitError for a file of another form, and for numbers whose synsets nothing tells.
    """
    rows = list(parse_rows(found.read()))
    if not rows:
        raise DigitError("it is empty")
    used = [found.inside] if found.inside else []
    if all(WNID.fullmatch(value) for _, value, _ in rows):
        return {number: value for number, value, _ in rows}, "", used
    if not all(value.isdecimal() and len(value) < 9 for _, value, _ in rows):
        raise DigitError("its labels are neither synsets such as n01440764 nor numbers")
    values = {number: int(value) for number, value, _ in rows}
    if all(number == value for number, value in values.items()):
        raise DigitError("its numbers count the images, they are no classes")
    if rows[0][2]:
        synsets, about, more = sorted_synsets(nearby)
        by_number = dict(enumerate(synsets))
    else:
        by_number, about, more = ilsvrc_ids(nearby, found)
    if odd := sorted(set(values.values()) - by_number.keys()):
        low, high = min(by_number), max(by_number)
        raise DigitError(f"it holds class {odd[-1]}, {about} has {low} to {high}")
    return {number: by_number[value] for number, value in values.items()}, f", its numbers by {about}", [*used, *more]


def parse_rows(data: bytes) -> Iterator[tuple[int, str, bool]]:
    """(number of the image, its class, whether the row names the image) of each row; a header is passed over.

    Raises DigitError for rows that name other images than those of the validation split.
    """
    for place, line in enumerate(data.decode("utf-8", "replace").split("\n")):
        name, *rest = re.split(r"[,;\s]+", line.strip())
        match = VALIDATION.fullmatch(name.rpartition("/")[2])
        if match and rest:
            yield int(match[1]), rest[0], True
        elif name and not rest:
            yield place + 1, name, False
        elif name and place:
            raise DigitError(f"its line {line.strip()[:60]!r} names no image such as ILSVRC2012_val_00000001.JPEG")


def sorted_synsets(nearby: Nearby) -> tuple[list[str], str, list[str]]:
    """(all synsets in the usual order, where they were found, files of the tree that were read)."""
    refused: list[str] = []
    for synsets, found in nearby.synsets(refused):
        return sorted(synsets.words), f"the sorted synsets of {found.name}", [found.inside] if found.inside else []
    if folders := nearby.folders():
        return folders, f"the {len(folders)} sorted folders of synsets", []
    raise DigitError("its numbers count sorted synsets, which LOC_synset_mapping.txt or folders of synsets would tell")


def ilsvrc_ids(nearby: Nearby, labels: Found) -> tuple[dict[int, str], str, list[str]]:
    """(ILSVRC's ids -> synsets, where they were found, files of the tree that were read); not the sorted order."""
    refused: list[str] = []
    beside = [] if labels.inside else known_files(Path(labels.name).parent)
    for place in (Nearby(nearby.start, {str(path): path.read_bytes for path in beside}), nearby):
        for synsets, found in place.synsets(refused):
            if synsets.ids:
                inside = [found.inside] if place is nearby and found.inside else []
                return synsets.ids, f"the ids of {found.name}", inside
    why = f" ({'; '.join(dict.fromkeys(refused))})" if refused else ""
    raise DigitError(f"its numbers are ILSVRC's ids, which the devkit's map_clsloc.txt or meta.mat tell: add one{why}")


def name_classes(classes: Sequence[str], nearby: Nearby) -> tuple[list[str], list[str], list[str]]:
    """(names of classes with words, notes, files of the tree that were read) of classes that are synsets.

    They keep their names where no file tells words of theirs.
    """
    refused: list[str] = []
    if are_synsets(classes):
        for synsets, found in nearby.synsets(refused):
            if any(name in synsets.words for name in classes):
                inside = [found.inside] if found.inside else []
                return [synsets.named(name) for name in classes], [f"names of the synsets are {found.name}'s"], inside
    return list(classes), refused, []
