"""Synsets of WordNet as class names: "n01440764", or "n01440764 tench" where a file beside the data names them.

ImageNet-1k's classes are 1,000 synsets, numbered in the sorted order of their ids (0 is n01440764, tench). ILSVRC's
devkit numbers them otherwise (1 is n02119789, kit fox): only map_clsloc.txt and meta.mat say how.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from digit.errors import DigitError

WNID = re.compile(r"n\d{8}", re.ASCII)
NAMED = re.compile(r"(n\d{8})(?=$| )", re.ASCII)  # at the start of a class's name
NEEDS_SCIPY = "it takes scipy to read (pip install scipy); the devkit's map_clsloc.txt says the same"


def class_key(name: str) -> str:
    """What tells a class from others: the synset of "n01440764 tench", else the whole name."""
    found = NAMED.match(name)
    return found[1] if found else name


def short_name(name: str) -> str:
    """'n01440764 tench' -> 'tench', where there is little room; another name as it is."""
    found = NAMED.match(name)
    return name[9:].strip() or name if found else name


@dataclass
class Synsets:
    """What one file says of synsets."""

    words: dict[str, str] = field(default_factory=dict)  # n01440764 -> "tench, Tinca tinca"
    ids: dict[int, str] = field(default_factory=dict)  # ILSVRC's ids, 1..1000 -> synset; {} where it does not say

    def named(self, wnid: str) -> str:
        """'n01440764' -> 'n01440764 tench', by the first of its words; the id alone where no words are known."""
        first = self.words.get(wnid, "").partition(",")[0].strip()
        return f"{wnid} {first}" if first else wnid


def read_text(data: bytes) -> Synsets:
    """Reads LOC_synset_mapping.txt, synset_words.txt ("n01440764 tench, Tinca tinca") or map_clsloc.txt ("n02119789 1
    kit_fox"). Raises DigitError for another file."""
    found = Synsets()
    for line in data.decode("utf-8", "replace").splitlines():
        wnid, _, rest = line.strip().partition("\t" if "\t" in line else " ")
        if not WNID.fullmatch(wnid):
            if wnid:
                raise DigitError(f"its line {line.strip()[:60]!r} begins with no synset such as n01440764")
            continue
        if numbered := re.fullmatch(r"(\d+)\s+(\S+)", rest.strip()):
            found.ids[int(numbered[1])] = wnid
            rest = numbered[2].replace("_", " ")
        found.words[wnid] = rest.strip()
    return found


def read_matlab(data: bytes) -> Synsets:
    """Reads the devkit's meta.mat; synsets with children are no classes. Raises DigitError without scipy."""
    try:
        from scipy.io import loadmat  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DigitError(NEEDS_SCIPY) from error
    try:
        rows: Any = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        leaves = [row for row in rows if not int(row["num_children"])]
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        return Synsets({str(row["WNID"]): str(row["words"]) for row in leaves}, ids)
    except Exception as error:  # a damaged file raises nearly any type
        raise DigitError(f"it is no meta.mat of ILSVRC's devkit ({type(error).__name__}: {error})") from error


READERS: dict[str, Callable[[bytes], Synsets]] = {  # by the names of files, in the order of preference
    "LOC_synset_mapping.txt": read_text,  # Kaggle
    "synset_words.txt": read_text,  # Caffe
    "map_clsloc.txt": read_text,  # devkits since 2014
    "meta.mat": read_matlab,  # devkit of 2012
}


def are_synsets(classes: Sequence[str]) -> bool:
    """Whether all classes are ids of synsets without words."""
    return bool(classes) and all(WNID.fullmatch(name) for name in classes)
