"""Names and journals in a folder of sampled images, and how a folder is emptied. Only rank 0 calls these functions."""

import os
import re
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.runtime.files import read_json
from digit.runtime.ledger import Ledger, collect

GRID, TOKENS, SAMPLES, JOURNAL = "grid.png", "tokens.npz", "samples.json", "journal.json"
WHILE_SAMPLING = r"journal(\.\d+)?\.json|(discriminative|vq)\.partial\.npy"
OURS = re.compile(rf"\d{{5,}}\.png|grid\.png|tokens\.npz|samples\.json|{WHILE_SAMPLING}")
LEFT_BY_A_KILL = re.compile(rf"\.({OURS.pattern})\..+")  # temporary files of `atomic_path`
NEEDLESS = re.compile(rf"{WHILE_SAMPLING}|{LEFT_BY_A_KILL.pattern}")  # once all images are sampled
RUN_FILES = {"config.json", "model.json", "pipeline.json", "manifest.json", "codebook.json", "vqgan.json"}
OTHER_FOLDER = "choose another --out"


def recorded(folder: Path) -> dict[str, Any] | None:
    """The request of a folder's images; None without images. Raises DigitError for images without a request."""
    if (folder / SAMPLES).exists():
        return _request(folder / SAMPLES)
    if (folder / JOURNAL).exists():
        ledger = read_ledger(folder)
        return ledger.request if len(ledger.done) else None  # without finished images, another request may begin
    if parts := sorted(RUN_FILES & set(listed(folder))):
        raise DigitError(f"{folder} holds {parts[0]}, a part of a run: {OTHER_FOLDER}")
    foreign = [name for name in listed(folder) if OURS.fullmatch(name)]
    if foreign:
        raise DigitError(f"{folder} holds {min(foreign)} but no {SAMPLES}: {OTHER_FOLDER}")
    return None


def read_ledger(folder: Path) -> Ledger:
    """Images that any rank has recorded as done. Raises DigitError for a damaged journal."""
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
    """File names in a folder; empty where it does not exist."""
    return os.listdir(folder) if folder.is_dir() else []


def void(folder: Path) -> None:
    """Declare a folder's content void, so that any request may begin there, even after an interruption."""
    Ledger({}, 0).save(folder / JOURNAL)
    (folder / SAMPLES).unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove the files of a request, the journal last."""
    void(folder)
    for name in listed(folder):
        if name != JOURNAL and (OURS.fullmatch(name) or LEFT_BY_A_KILL.fullmatch(name)):
            (folder / name).unlink(missing_ok=True)
    (folder / JOURNAL).unlink(missing_ok=True)
