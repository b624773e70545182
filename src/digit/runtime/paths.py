"""Paths as people type them: what a missing one may have meant, and what is a path rather than the name of a model."""

import difflib
from pathlib import Path


def nearest(path: str | Path) -> str:
    """ " (did you mean runs/demo?)" for a missing path with one of a like name beside it, else nothing.

    The first part of the path that is missing is compared with what stands in its place.
    """
    missing = Path(path).expanduser()
    rest: list[str] = []
    try:
        while not missing.parent.is_dir() and missing.parent != missing:
            rest.insert(0, missing.name)
            missing = missing.parent
        beside = {entry.name.lower(): entry for entry in missing.parent.iterdir() if not entry.name.startswith(".")}
        found = difflib.get_close_matches(missing.name.lower(), beside, n=1, cutoff=0.65)
    except (OSError, ValueError):  # a folder that may not be listed, a zero byte
        return ""
    if missing.exists() or not found:
        return ""
    meant = beside[found[0]]
    whole = meant.joinpath(*rest)
    return f" (did you mean {whole if whole.exists() else meant}?)"


def is_path(name: str) -> bool:
    """Whether a name that could be a model's on a hub, owner/model, is a path: how it is written, or what is there."""
    written_as_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/")
    return written_as_path or Path(name).exists() or ("/" in name and Path(name).parent.is_dir())
