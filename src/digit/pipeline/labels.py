"""Class labels as people give them: names, numbers, or one for all images.

A text is the name of a class, else a number in text, else a part of one name alone ("tench", "Tinca tinca" and
"n01440764" are parts of "tench, Tinca tinca" and "n01440764 tench"). A number is the class of that name
where the names of all classes are whole numbers ("0", "2", "10"), otherwise the position 0..n-1 in the list of classes.
None, -1 and the text "none" stand for no class, as the unlabelled images of a training set have it.
So class 2 is the same class on the command line, in Python, and in the folders that the images came from.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from digit.errors import DigitError
from digit.models.sequence import SequenceModel
from digit.runtime.names import did_you_mean
from digit.runtime.scalars import as_int, shown

UNLABELLED = -1  # position of an image without a class
NO_CLASS = "none"
SYNSET = re.compile(r"(n\d{8}) ", re.ASCII)  # at the start of a class's name, as `digit.data.synsets` gives it
SHOWN = 8  # names of classes in an error
MAX_DIGITS = 18  # of a number in text; int() refuses thousands of digits


@dataclass(frozen=True)
class ClassPositions:
    """Labels as positions 0..n-1 in the list of classes, whatever the classes are called."""

    positions: Sequence[int]


Labels = ClassPositions | str | int | np.integer | np.ndarray | Tensor | Iterable[Any]
"""A label, a sequence of labels (list, array, tensor of any integer type), or positions."""


def class_positions(labels: Labels, classes: Sequence[str], num_classes: int, unlabelled: bool = False) -> list[int]:
    """The position of each label in the list of classes, -1 for no class; one for a single label.

    Args:
        labels: names or numbers, as this module's text says.
        classes: the names of the classes; may be empty for a model whose classes have none.
        num_classes: how many classes the model knows.
        unlabelled: whether it also knows images without a class.

    Raises DigitError for unknown names, numbers out of range, fractions, booleans, and for no label at all.
    """
    if isinstance(labels, ClassPositions):
        found = [as_int("label", position) for position in labels.positions]
    else:
        known_classes = ClassList(classes)
        found = [known_classes.position(label) for label in as_list(labels)]
    if not found:
        raise DigitError("labels is empty: give at least one class name or number")
    for position in found:
        if position == UNLABELLED and unlabelled:
            continue
        if position == UNLABELLED:
            raise DigitError(
                "a label stands for no class, but this model was trained with a class for every image: give one of "
                f"its classes{listed(classes, ': ')}"
            )
        if not 0 <= position < num_classes:
            known = f"this model knows classes 0 to {num_classes - 1}"
            raise DigitError(f"label {position} is out of range: {known}{listed(classes, ': ')}")
    return found


def as_list(labels: Any) -> list[Any]:
    """The labels one by one. Raises DigitError for what has no order (a set) or no meaning (a dictionary, bytes)."""
    if isinstance(labels, Mapping | AbstractSet | bytes):
        raise DigitError(f"labels are {shown(labels)}: give class names or numbers in a list")
    if isinstance(labels, np.ndarray | Tensor) or hasattr(labels, "tolist"):
        labels = labels.tolist()
    return [labels] if isinstance(labels, str) or not isinstance(labels, Iterable) else list(labels)


class ClassList:
    """Finds classes by name or number."""

    def __init__(self, classes: Sequence[str]):
        self.classes = classes
        self.named_by_numbers = bool(classes) and all(map(is_number, classes))
        self.places: dict[str | int, list[int]] = {}  # by name, and by number where the names are numbers
        for place, name in enumerate(classes):
            for key in (name, int(name)) if self.named_by_numbers else (name,):
                self.places.setdefault(key, []).append(place)

    def position(self, label: Any) -> int:
        """The position of one label; of a number it may be out of range."""
        if label is None:
            return UNLABELLED
        if not isinstance(label, str):
            return self._of_number(as_int("label", label, wanted="the name of a class or a whole number"))
        if label in self.places:
            return self._only(label)
        if label == NO_CLASS:
            return UNLABELLED
        if is_number(label):
            return self._of_number(int(label))
        if (part := label.strip().lower()) in self.parts:
            return self._only(label, self.parts[part])
        known = f"classes are{listed(self.classes, ' ')}" if self.classes else "the classes have no names, give numbers"
        raise DigitError(f"no class named {label!r}{did_you_mean(label, [*self.classes, *self.parts]) or ':'} {known}")

    def _of_number(self, number: int) -> int:
        if not self.named_by_numbers or (number == UNLABELLED and number not in self.places):
            return number
        if number not in self.places:
            known = listed(self.classes, " ")
            raise DigitError(f"no class named {number}: the class names are numbers, classes are{known}")
        return self._only(number)

    @cached_property
    def parts(self) -> dict[str, list[int]]:
        """Places of classes by each of their words, in lower case, and by their synset: 'tench', 'n01440764'."""
        found: dict[str, list[int]] = {}
        for place, name in enumerate(self.classes):
            synset = SYNSET.match(name)
            words = name[synset.end() :] if synset else name
            parts = {word.strip().lower() for word in words.split(",")} | ({synset[1]} if synset else set())
            for part in parts - {""}:
                found.setdefault(part, []).append(place)
        return found

    def _only(self, label: str | int, places: Sequence[int] = ()) -> int:
        first, *others = places or self.places[label]
        if others:
            names = " and ".join(f"{self.classes[place]!r} at position {place}" for place in (first, others[0]))
            raise DigitError(f"label {label!r} fits several classes, {names}: give ClassPositions([{first}])")
        return first


def is_number(name: str) -> bool:
    """Whether the text is a whole number."""
    return len(name) <= MAX_DIGITS and name.removeprefix("-").isdecimal()


def listed(classes: Sequence[str], before: str) -> str:
    """The first names of classes, and how many there are; nothing where there are none."""
    more = f" ... ({len(classes)} in all)" if len(classes) > SHOWN else ""
    return f"{before}{', '.join(classes[:SHOWN])}{more}" if classes else ""


def most_likely_classes(model: SequenceModel, tokens: Int64[Tensor, "B N"], batch_size: int) -> Int64[Tensor, " B"]:
    """The class under which a next-token model gives each image's tokens the most likelihood (equal priors)."""
    scores = torch.empty(len(tokens), model.cfg.num_classes)
    for label in range(model.cfg.num_classes):
        for rows in torch.arange(len(tokens)).split(batch_size):
            logits = model(tokens[rows], labels=torch.full((len(rows),), label, device=tokens.device))
            nll = F.cross_entropy(logits.transpose(1, 2).float(), tokens[rows], reduction="none")
            scores[rows, label] = -nll.sum(1).cpu()
    return scores.argmax(1)
