"""Suggests the name that a person may have meant."""

import difflib
from collections.abc import Iterable


def closest(word: str, names: Iterable[str]) -> list[str]:
    """At most three names like `word`, the likeliest first; an option may be known by its last part alone."""
    names = list(dict.fromkeys(names))
    last = word.lstrip("-").rpartition(".")[2]
    if same_end := [name for name in names if "." in name and name.rpartition(".")[2] == last and "." not in word]:
        return same_end[:3]
    return difflib.get_close_matches(word, names, n=1, cutoff=0.65)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`: did you mean X?`, or nothing where no name is like the word."""
    found = closest(word, names)
    return f": did you mean {' or '.join(found)}?" if found else ""
