"""Settings that come out of a file: JSON to a config dataclass, every value of the type that its field says."""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar

from digit.errors import DigitError

T = TypeVar("T")
MAX_INTEGER = 2**63 - 1  # what tensors and NumPy can count to


def from_json(cfg: type[T], value: Any, source: str) -> T:
    """The dataclass `config` out of a JSON object; nested ones too, lists become tuples.

    `source` names the object in errors. Raises DigitError for anything but an object, for unknown and missing names,
    values of another type, NaN and Inf, and whatever the dataclass refuses itself.
    """
    if not isinstance(value, Mapping):
        raise DigitError(f"{source} is damaged: {_shown(value)} instead of an object")
    known = {field.name: field for field in fields(cfg)}
    if unknown := [name for name in value if name not in known]:
        raise DigitError(f"{source} has a setting {_shown(unknown[0])} that this version does not know: update digit")
    needed = (f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING)
    if missing := [name for name in needed if name not in value]:
        raise DigitError(f"{source} is damaged: {missing[0]} is missing")
    kinds = typing.get_type_hints(cfg)
    given = {name: _checked(kinds[name], entry, f"{source}: {name}") for name, entry in value.items()}
    try:
        return cfg(**given)
    except DigitError as error:
        raise DigitError(f"{source}: {error}") from error


def _checked(kind: Any, value: Any, source: str) -> Any:
    """`value` as `kind` wants it. Raises DigitError where it is of another type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for choice in inner:
            try:
                return _checked(choice, value, source)
            except DigitError:
                continue
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in inner):
            return value
    elif is_dataclass(kind):
        return from_json(kind, value, source)
    elif origin is tuple:
        entries = value if isinstance(value, list | tuple) else ()
        wanted = [inner[0]] * len(entries) if inner[1:] == (...,) else inner
        if entries and len(wanted) == len(entries):
            return tuple(_checked(k, v, f"{source}[{n}]") for n, (k, v) in enumerate(zip(wanted, entries, strict=True)))
    elif kind is Any or _is_plain(origin or kind, value):
        return float(value) if kind is float else value
    name = getattr(kind, "__name__", None) if origin is None else str(kind).replace("typing.", "")
    raise DigitError(f"{source} is {_shown(value)}, wanted {name or kind}: the file is damaged, make it again")


def _is_plain(kind: type, value: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and abs(value) <= MAX_INTEGER and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) <= MAX_INTEGER
    return isinstance(value, kind)


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) <= MAX_INTEGER else "a number past all use"
    return text if len(text) <= 80 else f"{text[:80]}..."
