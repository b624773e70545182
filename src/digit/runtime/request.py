"""One folder answers one request: the settings, data and weights that decide a result. Any other request is refused."""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from digit.errors import MismatchError
from digit.runtime.files import differences, plain

MAX_SHOWN = 80  # characters of a value in an error
HASH_SHOWN = 12  # hex digits of a SHA-256 in an error


def require_same_request(
    path: str | Path,
    existing: Any,
    requested: Mapping[str, Any],
    advice: str,
    ignore: Callable[[str], object] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Raise MismatchError where `path` was made with other settings than `requested`; name one, its old and new value.

    Both requests are nested dictionaries as JSON gives them back (see `files.plain`).

    Args:
        existing: the request that the folder or file records. Anything but a dictionary has no setting in common.
        requested: the request of this command.
        advice: the next step, such as "choose another --out, or the old setting".
        ignore: says of a setting's dotted name (`train.log_every`) whether it may differ; a set's `__contains__` or a
            pattern's `fullmatch` will do.
        defaults: values, at any depth, of settings that a request of an older version lacks (`defaults_of`): one that
            has its default now is the same. Without a default, a setting that is missing differs.
    """
    existing = existing if isinstance(existing, Mapping) else {}
    for name, old, new in differences(completed(existing, requested, defaults or {}), requested):
        if ignore is None or not ignore(name):
            raise MismatchError(f"{path} was made with {name} = {shown(old)}, now asked for {shown(new)}: {advice}")


def completed(existing: Any, requested: Any, defaults: Any) -> Any:
    """`existing` with the settings of `requested` that it lacks, at any depth, where they have a default."""
    if not (isinstance(existing, Mapping) and isinstance(requested, Mapping) and isinstance(defaults, Mapping)):
        return existing
    asked = {name: value for name, value in defaults.items() if name in requested}
    return asked | {name: completed(old, requested.get(name), defaults.get(name)) for name, old in existing.items()}


def with_defaults(config: type, given: Any) -> Any:
    """Settings of a config dataclass as JSON has them: `given`, with what it lacks, at any depth, at its default."""
    usual = defaults_of(config)
    return completed(given, usual, usual)


def defaults_of(config: type) -> dict[str, Any]:
    """The defaults of a config dataclass as JSON gives them back, nested configs with all their settings."""
    found: dict[str, Any] = {}
    for field in fields(cast(Any, config)):
        value = field.default if field.default_factory is MISSING else field.default_factory()
        if value is not MISSING:
            found[field.name] = asdict(cast(Any, value)) if is_dataclass(value) else value
    return plain(found)


def shown(value: Any) -> str:
    """A value as an error shows it: hashes and long lists are cut short."""
    text = str(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:HASH_SHOWN]
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."
