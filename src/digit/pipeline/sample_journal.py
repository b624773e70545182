"""What lies in a folder of drawn images: names, journals, and how a folder is declared empty. For rank 0 alone."""

import os
import re
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.runtime.files import read_json
from digit.runtime.ledger import Ledger, collect

GRID, TOKENS, SAMPLES, JOURNAL = "grid.png", "tokens.npz", "samples.json", "journal.json"
WHILE_DRAWING = r"journal(\.\d+)?\.json|(discriminative|vq)\.partial\.npy"
OURS = re.compile(rf"\d{{5,}}\.png|grid\.png|tokens\.npz|samples\.json|{WHILE_DRAWING}")
LEFT_BY_A_KILL = re.compile(rf"\.({OURS.pattern})\..+")  # what `atomic_path` had not renamed yet
NEEDLESS = re.compile(rf"{WHILE_DRAWING}|{LEFT_BY_A_KILL.pattern}")  # once all is drawn
OTHER_FOLDER = "choose another --out"


def recorded(folder: Path) -> dict[str, Any] | None:
    """The request whose images lie in a folder; None where there are none. Raises DigitError for foreign images."""
    if (folder / SAMPLES).exists():
        return _request(folder / SAMPLES)
    if (folder / JOURNAL).exists():
        ledger = read_ledger(folder)
        return ledger.request if len(ledger.done) else None  # nothing done yet: another request may begin
    foreign = [name for name in listed(folder) if OURS.fullmatch(name)]
    if foreign:
        raise DigitError(f"{folder} holds {min(foreign)} but no {SAMPLES}: {OTHER_FOLDER}")
    return None


def read_ledger(folder: Path) -> Ledger:
    """Images that some rank has entered as done. Raises DigitError where the journal is no such list."""
    num = _request(folder / JOURNAL).get("num", 0)
    try:
        return collect(folder / JOURNAL, num) or Ledger({}, 0)
    except (TypeError, ValueError) as error:
        raise DigitError(f"{folder / JOURNAL} is damaged ({error!r}): {OTHER_FOLDER}") from error


def _request(path: Path) -> dict[str, Any]:
    about = read_json(path)
    if not isinstance(about, dict) or not isinstance(about.get("request"), dict):
        raise DigitError(f"{path} names no request (an older version wrote it): {OTHER_FOLDER}")
    return about["request"]


def listed(folder: Path) -> list[str]:
    """Names in a folder; none where it does not exist."""
    return os.listdir(folder) if folder.is_dir() else []


def void(folder: Path) -> None:
    """Declare that a folder holds nothing that counts: whatever comes in between, the next drawing may begin."""
    Ledger({}, 0).save(folder / JOURNAL)
    (folder / SAMPLES).unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove what a drawing wrote, the journal last."""
    void(folder)
    for name in listed(folder):
        if name != JOURNAL and (OURS.fullmatch(name) or LEFT_BY_A_KILL.fullmatch(name)):
            (folder / name).unlink(missing_ok=True)
    (folder / JOURNAL).unlink(missing_ok=True)
