"""Reads a config dataclass from JSON and checks every value against the type of its field."""

import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, cast

from digit.errors import DigitError
from digit.runtime.files import MAKE_AGAIN

T = TypeVar("T")
MAX_INTEGER = 2**63 - 1  # the largest int64: tensors and NumPy hold no larger integer


def from_json(config_class: type[T], value: Any, source: str) -> T:
    """Build a `config_class` from a JSON object; nested dataclasses too. Lists become tuples.

    `source` names the object in errors. Raises DigitError for anything but an object, for unknown and missing names,
    for values of another type, for NaN and Inf, and where the dataclass itself refuses a value.
    """
    if not isinstance(value, Mapping):
        raise DigitError(f"{source} is damaged: {_shown(value)} instead of an object")
    known = {field.name: field for field in fields(cast(Any, config_class))}
    if unknown := [name for name in value if name not in known]:
        raise DigitError(f"{source} has a setting {_shown(unknown[0])} that this version does not know: update digit")
    required = (f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING)
    if missing := [name for name in required if name not in value]:
        raise DigitError(f"{source} is damaged: {missing[0]} is missing")
    types = typing.get_type_hints(config_class)
    kwargs = {name: _checked(types[name], entry, f"{source}: {name}") for name, entry in value.items()}
    try:
        return config_class(**kwargs)
    except DigitError as error:
        raise DigitError(f"{source}: {error}") from error


def _checked(kind: Any, value: Any, source: str) -> Any:
    """`value` as the type `kind` has it. Raises DigitError where it is of another type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        for choice in inner:
            try:
                return _checked(choice, value, source)
            except DigitError:
                continue
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in inner):
            return value
    elif is_dataclass(kind):
        return from_json(cast(type, kind), value, source)
    elif origin is tuple:
        entries = value if isinstance(value, list | tuple) else ()
        kinds = [inner[0]] * len(entries) if inner[1:] == (...,) else inner
        if entries and len(kinds) == len(entries):
            return tuple(_checked(k, v, f"{source}[{n}]") for n, (k, v) in enumerate(zip(kinds, entries, strict=True)))
    elif kind is Any or _is_plain(origin or kind, value):
        return float(value) if kind is float else value
    name = getattr(kind, "__name__", None) if origin is None else str(kind).replace("typing.", "")
    raise DigitError(f"{source} is {_shown(value)}, wanted {name or kind}: the file is damaged, {MAKE_AGAIN}")


def _is_plain(kind: type, value: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and abs(value) <= MAX_INTEGER and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) <= MAX_INTEGER
    return isinstance(value, kind)


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) <= MAX_INTEGER else "an integer beyond 64 bits"
    return text if len(text) <= 80 else f"{text[:80]}..."
