"""Labels as data sets store them: which column holds them, what a value means, and the classes they make."""

import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from digit.data.source import readable

LABEL_NAMES = (  # of columns and keys, in order of preference; case, "-" and " " do not matter
    "label", "labels", "class", "cls", "target", "category", "class_name", "class_label", "label_name", "category_name",
    "class_id", "label_id", "category_id", "target_id", "class_index", "label_index", "class_idx", "label_idx",
    "fine_label", "coarse_label",
)  # fmt: skip
MAX_DIGITS = 18  # of a label that is a number; int() refuses thousands of digits
INTEGER = re.compile(rf"-?\d{{1,{MAX_DIGITS}}}", re.ASCII)
FLOAT = re.compile(r"-?\d{1,18}\.\d*(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
Label = int | str | None


def label_names(names: Iterable[str]) -> list[str]:
    """Those of the names of columns or keys that usually hold labels, the likeliest first."""
    known = [(LABEL_NAMES.index(plain), name) for name in names if (plain := _plain(name)) in LABEL_NAMES]
    return [name for _, name in sorted(known, key=lambda pair: pair[0])]


def find_name(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is `name`, if need be but for case, "-" and " "."""
    names = list(names)
    alike = [other for other in names if _plain(other) == _plain(name)]
    return name if name in names else alike[0] if len(alike) == 1 else None


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def as_label(value: Any) -> Label:
    """A stored value as a class number or name; None is unlabelled, as are "", -1 and NaN.

    Whole floats are numbers, also as text ("2.0"), booleans are the names false and true, a list of one is its item.
    Raises ValueError for anything else; its text says what it is.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if hasattr(value, "tolist"):  # NumPy
        value = value.tolist()
    if value is None or isinstance(value, str):
        return _of_text((value or "").strip())
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return None if value == -1 else value
    if isinstance(value, float | Decimal):
        return _whole(float(value))
    if isinstance(value, list | tuple):
        return _single(value)
    raise ValueError(f"a {type(value).__name__}")


def _whole(value: float) -> Label:
    if math.isnan(value) or value == -1:
        return None
    if not value.is_integer():
        raise ValueError(f"{value:g}, which is no whole number")
    return int(value)


def _of_text(text: str) -> Label:
    if text in ("", "-1") or text.lower() == "nan":
        return None
    return _whole(float(text)) if FLOAT.fullmatch(text) else text


def as_labels(values: Sequence[Any]) -> list[Label]:
    """A column of stored values as labels. Lists of one length, of zeros and a single one, are one-hot.

    Raises ValueError as `as_label` does.
    """
    plain = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    stated = [value for value in plain if value is not None]
    if stated and all(map(_is_one_hot, stated)) and len(set(map(len, stated))) == 1:
        return [None if value is None else list(value).index(1) for value in plain]
    return [as_label(value) for value in plain]


def _is_one_hot(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) < 2 or not all(isinstance(x, int | float) for x in value):
        return False
    return set(value) <= {0, 1} and sum(value) == 1


def _single(values: Sequence[Any]) -> Label:
    if not values:
        return None
    if len(values) == 1 and not isinstance(values[0], list | tuple):
        return as_label(values[0])
    raise ValueError(f"a list of {len(values)}, so several labels for one image")


def index_classes(values: Sequence[Label], *, merge: bool = True) -> tuple[list[str], np.ndarray]:
    """Returns the distinct values, sorted, as class names, and each value's index, int64; None, "" and -1 are -1.

    If all values are integers ("10", 9), they are sorted as numbers, otherwise as text. Texts that are the same number
    ("7", "007") are one class; without `merge`, as for names of folders, they are two.
    """
    known = {value for value in values if value is not None and value not in ("", -1)}
    numeric = all(isinstance(value, int) or INTEGER.fullmatch(value) for value in known)
    if numeric and merge:
        meaning: dict[Any, Any] = {value: int(value) for value in known}
        order = sorted(set(meaning.values()))
    else:
        meaning = {value: str(value) for value in known}
        order = sorted(set(meaning.values()), key=(lambda name: (int(name), name)) if numeric else None)
    place = {name: index for index, name in enumerate(order)}
    look_up: dict[Any, int] = {value: place[meaning[value]] for value in known}
    labels = np.array([look_up.get(value, -1) for value in values], dtype=np.int64)
    return [readable(str(name)) for name in order], labels
