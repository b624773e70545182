"""Single numbers as callers give them (Python, NumPy or torch), as Python's own."""

import math
import operator
from typing import Any

from digit.errors import DigitError


def as_int(name: str, value: Any, *, least: int | None = None, wanted: str = "a whole number") -> int:
    """A whole number of any integer type as an int.

    Raises DigitError, which says what is `wanted`, for anything else, and for a number below `least`.
    """
    try:
        number = None if _is_boolean(value) else operator.index(value)
    except (TypeError, RuntimeError):  # torch raises RuntimeError for more than one number
        number = None
    if number is None:
        raise DigitError(f"{name} is {shown(value)}: it must be {wanted}")
    if least is not None and number < least:
        raise DigitError(f"{name} is {number}: it must be at least {least}")
    return number


def as_number(name: str, value: Any) -> float:
    """A finite real number of any type as a float. Raises DigitError for anything else."""
    try:
        number = math.nan if isinstance(value, str | bytes) or _is_boolean(value) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DigitError(f"{name} is {shown(value)}: it must be a finite number")
    return number


def shown(value: Any) -> str:
    """The value on one line of an error, shortened to 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
