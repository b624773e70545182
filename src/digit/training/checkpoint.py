"""Checkpoints that are whole or not there: out/checkpoints/step_00001000.pt and the run's config.json beside them."""

import errno
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from digit.errors import DigitError, MismatchError
from digit.files import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from digit.training.loop import LoopConfig

log = logging.getLogger(__name__)
# These may change between two halves of one run (num_steps too, where the schedule does not end there).
FREE_FIELDS = {
    "accumulate", "checkpoint_activations", "compile", "log_every", "save_every", "keep_checkpoints", "tensorboard"
}  # fmt: skip


class DamagedError(DigitError):
    """A checkpoint is torn or has flipped bits."""


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of each checkpoint file in `folder`, oldest first."""
    found = [(re.fullmatch(r"step_(\d+)\.pt", path.name), path) for path in Path(folder).glob("step_*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match)


def save(folder: str | Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Write `content` (tensors, numbers, strings, lists and dicts of them) as step `step`; keep the newest `keep`.

    Checkpoints past `step` are removed: they are damaged ones that the run fell back from.
    """
    path = Path(folder) / f"step_{step:08d}.pt"
    with atomic_path(path) as temporary, _full_disk_is_an_os_error(), open(temporary, "wb") as out:
        torch.save(content, out)
    older = [p for s, p in list_checkpoints(folder) if s <= step]
    for stale in set(p for _, p in list_checkpoints(folder)) - set(older[-max(1, keep) :]):
        stale.unlink(missing_ok=True)
    return path


@contextmanager
def _full_disk_is_an_os_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's writer hides the OSError of a failed write behind its own error
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                raise cause from error
            cause = cause.__context__
        raise


def load(path: str | Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU; no code in it runs. Raises DamagedError where it is torn or bits flipped."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the CRCs
            if (name := archive.testzip()) is not None:
                raise ValueError(f"checksum of {name} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise nearly anything, EINVAL for a bad offset among it
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise DigitError(f"cannot read checkpoint {path}: {error.strerror}") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(f"checkpoint {path} is damaged ({reason}): delete it and run again") from error


def newest(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None where there is none at all.

    A damaged one is passed over with a warning line; raises DigitError where all of them are.
    """
    checkpoints = list_checkpoints(folder)
    for _, path in reversed(checkpoints):
        try:
            return path, load(path)
        except DamagedError as error:
            log.warning("%s; falling back to the checkpoint before it", error)
    if checkpoints:
        raise DigitError(f"no checkpoint in {folder} can be read, {len(checkpoints)} tried: delete it to begin again")
    return None


def describe_run(cfg: "LoopConfig", about: dict[str, Any] | None) -> dict[str, Any]:
    """What config.json holds: every field of the config, and what the caller says the run is about."""
    return json.loads(json.dumps({"train": asdict(cfg), "about": about or {}}))  # as it will be read: tuples are lists


def save_config(folder: str | Path, cfg: "LoopConfig", about: dict[str, Any] | None) -> None:
    """Write config.json beside the checkpoints."""
    write_json(Path(folder) / "config.json", describe_run(cfg, about))


def check_config(folder: str | Path, cfg: "LoopConfig", about: dict[str, Any] | None) -> None:
    """Raise MismatchError where the run in `folder` was begun with another config that matters; names both values."""
    if not (path := Path(folder) / "config.json").exists():
        return
    then, now = read_json(path), describe_run(cfg, about)
    then["train"] = describe_run(type(cfg)(), None)["train"] | then.get("train", {})  # settings younger than the run
    free = FREE_FIELDS | ({"num_steps"} if cfg.may_grow else set())
    for room in ("train", "about"):
        before, after = then.get(room, {}), now[room]
        for name in sorted(set(before) | set(after)):
            if before.get(name) != after.get(name) and not (room == "train" and name in free):
                raise MismatchError(
                    f"{name} was {before.get(name)!r} when the run in {Path(folder).parent} began and is "
                    f"{after.get(name)!r} now: give the old value to go on, or choose another --out"
                )
