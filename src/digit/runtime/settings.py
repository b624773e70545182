"""Which values a setting may have, declared beside its field; and whether a run would use it at all.

@dataclass(frozen=True, kw_only=True)
class Training:
    learning_rate: float = within("(0, inf)", 3e-4)

    def __post_init__(self) -> None:
        check_settings(self)
"""

import dataclasses
import math
import re
import typing
from collections.abc import Iterable
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal

from digit.errors import DigitError
from digit.runtime.config_json import MAX_INTEGER

INTERVAL = "interval"  # in a field's metadata
SEED = f"[0, {MAX_INTEGER}]"
Rule = tuple[bool, str, str]  # applies; pattern of the settings that the run then ignores; why, and what to do


def within(interval: str, default: Any) -> Any:
    """A dataclass field whose number, or each of whose numbers, lies in an interval such as "[0, 1)" or "(0, inf)"."""
    return dataclasses.field(default=default, metadata={INTERVAL: interval})


def check_settings(cfg: Any, of: str = "") -> None:
    """Raise DigitError for a value of a config dataclass that is none of its field's choices, or out of its interval.

    None passes where the field's type has it. NaN lies in no interval, and infinity in none that ends with "inf)".
    The error names the field, and `of`, what the config is of, if it is given.
    """
    for field in dataclasses.fields(cfg):
        kind, value = type_hints(type(cfg))[field.name], getattr(cfg, field.name)
        name, parts = f"{field.name} of {of}" if of else field.name, (kind, *typing.get_args(kind))
        if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
            raise DigitError(f"{name} is {value!r}: it must be {one_of(typing.get_args(kind))}")
        if INTERVAL in field.metadata and (value is not None or type(None) not in parts):
            check_number(name, value, field.metadata[INTERVAL], whole=int in parts)


@cache
def type_hints(cls: type) -> dict[str, Any]:
    """The type of every field of a dataclass."""
    return typing.get_type_hints(cls)


def check_number(name: str, value: Any, interval: str, *, whole: bool = False) -> None:
    """Raise DigitError unless a number, or each number of a tuple, lies in the interval; `whole` allows integers only.

    `name` is what a person types: a field of a config, or an option such as --price.
    """
    for number in value if isinstance(value, tuple | list) else (value,):
        if not isinstance(number, Integral if whole else Real) or isinstance(number, bool):
            raise DigitError(f"{name} is {value!r}: it must be {'a whole number' if whole else 'a number'}")
        if not contains(interval, in_float(number)):
            finite = "" if math.isfinite(in_float(number)) else ", a finite number"
            raise DigitError(f"{name} is {value!r}: it must be {in_words(interval)}{finite}")


def in_float(number: Any) -> float:
    """A number as a float; one beyond 64 bits as infinity, since no tensor holds it."""
    return float(number) if -MAX_INTEGER <= number <= MAX_INTEGER else math.copysign(math.inf, number)


def contains(interval: str, number: float) -> bool:
    """Whether a number lies in an interval. NaN lies in none."""
    low, high = bounds(interval)
    above = low <= number if interval.startswith("[") else low < number
    return above and (number <= high if interval.endswith("]") else number < high)


def bounds(interval: str) -> tuple[float, float]:
    """The two ends of "[low, high)"."""
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def in_words(interval: str) -> str:
    """ "[1, inf)" as "at least 1", "[0, 1)" as "at least 0 and below 1"."""
    low, high = (end.strip().replace("_", ",") for end in interval[1:-1].split(","))
    if interval[0] + interval[-1] == "[]":
        return f"{low} to {high}"
    least = f"{'at least' if interval.startswith('[') else 'above'} {low}"
    if high == "inf":
        return least
    return f"{least} and {'at most' if interval.endswith(']') else 'below'} {high}"


def one_of(choices: Iterable[Any]) -> str:
    """Choices as "a or b or c"."""
    return " or ".join(map(str, choices))


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting of a nested config, a dataclass or its JSON object, by its dotted name; lists as tuples."""
    found: dict[str, Any] = {}
    for name, value in (cfg if isinstance(cfg, dict) else vars(cfg)).items():
        if isinstance(value, dict) or dataclasses.is_dataclass(value):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = tuple(value) if isinstance(value, list) else value
    return found


def changed(cfg: Any, base: Any) -> list[str]:
    """Dotted names of the settings in which a config differs from another of its class."""
    before = flat(base)
    return [name for name, value in flat(cfg).items() if before.get(name, value) != value]


def refuse_unused(cfg: Any, chosen: Iterable[str], rules: Iterable[Rule]) -> None:
    """Raise DigitError for the first of the `chosen` settings, dotted names, that the run of a config would ignore."""
    values = flat(cfg)
    applying = [(re.compile(pattern), why) for applies, pattern, why in rules if applies]
    for name in chosen:
        for pattern, why in applying:
            if name in values and pattern.fullmatch(name):
                raise DigitError(f"{name} is {values[name]}, which this run would not use: {why}")
