"""How the pictures of a run are read: DATA and the options beside it, which OUT/config.json keeps.

A command that continues the run takes them over, and commands that a person is told carry them.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.runtime.files import read_json

OPTIONS: dict[str, type] = {  # of the commands that train, with the type of their values; as `open_source` has them
    "split": str,
    "limit": int,
    "labels_from": str,
    "pixel_max": int,
    "read_contents": bool,
}
PLACE_OF_DATA = {"fit": 1, "codebook": 1, "tokenize": 1, "train": 2}  # words after the name of the command


def recorded_reading(out: Path) -> dict[str, Any]:
    """{"path": DATA} with those of OPTIONS that were given; {} where config.json does not tell, as in a folder of an
    older version."""
    path = out / "config.json"
    try:
        config = read_json(path) if path.is_file() else None
    except (DigitError, OSError):
        return {}
    found = config.get("reading") if isinstance(config, dict) else None
    if not isinstance(found, dict) or not is_value(found.get("path"), str):
        return {}
    kinds = {"path": str} | OPTIONS
    return {name: found[name] for name, kind in kinds.items() if is_value(found.get(name), kind)}


def is_value(value: Any, kind: type) -> bool:
    """Whether a value of a file that anybody may have written can stand in a command."""
    return type(value) is kind and (kind is not str or value.isprintable())


def same_data(path: str, other: str) -> bool:
    """Whether two texts name the same DATA: photos and photos/ do."""
    return os.path.normpath(path) == os.path.normpath(other)


def option_words(reading: Mapping[str, Any]) -> list[str]:
    """The options of a reading as words of a command line."""
    given = {name: reading[name] for name in OPTIONS if name in reading}
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in given.items()}
    return [word for name, text in texts.items() for word in (f"--{name}", text)]


def with_reading(command: str, reading: Mapping[str, Any]) -> str:
    """A command line of a run with DATA and its options as they are recorded, whatever it says of them itself.

    The last command in a folder's lock may lack them, or may have been refused because it names others.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # no command line
        return command
    start = words.index("digit") + 1 if "digit" in words else len(words)
    start += words[start : start + 1] == ["--"]  # of torchrun
    data = start + PLACE_OF_DATA.get("".join(words[start : start + 1]), len(words))
    if not reading or data >= len(words) or words[data].startswith("-"):  # options stand in front of DATA
        return command
    words[data] = reading["path"]
    return shlex.join([*without_options(words), *option_words(reading)])


def without_options(words: Sequence[str]) -> list[str]:
    """A command line without OPTIONS and their values."""
    named, kept = {f"--{name}" for name in OPTIONS}, []
    for place, word in enumerate(words):
        is_value_of_one = place > 0 and words[place - 1] in named
        if not is_value_of_one and word.partition("=")[0] not in named:
            kept.append(word)
    return kept
