"""Checkpoints that are whole or not there, whatever the number of processes that write or read them.

    OUT/checkpoints/config.json                 the run's config, compared when it goes on
    OUT/checkpoints/step_00001000/shard-*.safetensors   tensors, a file (or several) a process
    OUT/checkpoints/step_00001000/state.json    everything else: numbers, strings, and which tensor stands where
    OUT/checkpoints/step_00001000/manifest.json SHA-256 and size of each file, the step, validation metrics

A folder is written aside, synced and renamed, so that one without the leading dot is whole; its hashes are compared
before it is used. torch.distributed.checkpoint writes and reads the tensors: replicated ones are shared out over the
processes, sharded ones (fully_shard) are written where they lie, and both can be read by any number of processes. All
files are safetensors or JSON: reading a stranger's checkpoint runs no code.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from digit.errors import DigitError, MismatchError
from digit.runtime import distributed
from digit.runtime.files import disk_errors, read_json, require_space, sha256_file, sync_folder, write_json
from digit.version import __version__

log = logging.getLogger(__name__)
FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
TENSOR, PAIRS, TUPLE = "$tensor", "$pairs", "$tuple"  # what JSON lacks, in state.json
STRANGE = (  # what reading the files of a stranger may raise
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError, RuntimeError,
    SafetensorError, TypeError, ValueError,
)  # fmt: skip
HEADER_BYTES = 400  # of a tensor, in the header of its file


class DamagedError(DigitError):
    """A checkpoint is torn or has flipped bits."""


def step_folder(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(folder) / f"step_{step:08d}"


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of each checkpoint in `folder`, oldest first. Raises DigitError for those of an older version."""
    found = []
    for path in Path(folder).glob("step_*"):
        if path.suffix == ".pt":
            raise DigitError(f"{path} was written by an older version, which this one cannot go on from: move it away")
        if (match := re.fullmatch(r"step_(\d+)", path.name)) is not None:
            found.append((int(match[1]), path))
    return sorted(found)


# -------------------------------------------------------------------- writing


def save(
    folder: str | Path,
    step: int,
    content: dict[str, Any],
    keep: int,
    *,
    metrics: dict[str, float] | None = None,
    keep_best: bool = False,
) -> Path:
    """Write `content` (tensors, numbers, strings, lists, tuples and dicts of them) as step `step`. All ranks call this.

    Keeps the newest `keep` checkpoints, and with `keep_best` the one whose validation metric (`val_...` in `metrics`)
    is lowest. Checkpoints past `step` are removed: they are damaged ones that the run fell back from.

    Raises DigitError, before anything is written, where the disk has too little room.
    """
    path, tensors = step_folder(folder, step), {}
    aside = path.with_name(f".{path.name}.partial")
    skeleton = _take_apart(content, (), tensors)
    distributed.on_main(lambda: _prepare(aside, tensors))
    with _full_disk_is_an_os_error(path):
        _write_tensors(aside, tensors)
    distributed.on_main(lambda: _seal(aside, path, step, skeleton, metrics or {}))
    distributed.on_main(lambda: prune(Path(folder), step, keep, keep_best))
    return path


def _prepare(aside: Path, tensors: dict[str, Tensor]) -> None:
    size = sum(t.numel() * t.element_size() + HEADER_BYTES for t in tensors.values())
    with disk_errors(aside):
        aside.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(aside.parent)  # they may hold the room that is wanted now
        aside.mkdir()
    require_space(aside, size, "a checkpoint")


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """One file a process, synced."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _torch_is_quiet():
        dcp.save(
            dict(tensors),
            storage_writer=writer,
            process_group=distributed.control(),
            no_dist=distributed.world_size() == 1,
        )


def _seal(aside: Path, path: Path, step: int, skeleton: Any, metrics: dict[str, float]) -> None:
    """Write the manifest over what is there, sync, and give the folder its name."""
    write_json(aside / STATE, skeleton)
    files = {f.name: {"sha256": sha256_file(f), "bytes": f.stat().st_size} for f in sorted(aside.iterdir())}
    manifest = {"format": FORMAT, "version": __version__, "step": step, "processes": distributed.world_size()}
    manifest |= {"metrics": metrics, "files": files}
    write_json(aside / MANIFEST, manifest | {"digest": _digest(manifest)})
    with disk_errors(path):
        sync_folder(aside)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():  # a damaged one, else the run would not be at this step again
            os.replace(path, old)
        os.replace(aside, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left half written or half removed. For rank 0 alone."""
    for path in folder.glob(".step_*"):
        if path.suffix in (".partial", ".old", ".stale"):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, step: int, keep: int, keep_best: bool) -> None:
    """Leave the newest `keep` checkpoints up to `step`, and the best of them. For rank 0 alone."""
    there = list_checkpoints(folder)
    wanted = {path for s, path in there if s <= step}
    wanted = set(sorted(wanted)[-max(1, keep) :])
    if keep_best and (found := best(folder, up_to=step)) is not None:
        wanted.add(found[0])
    with disk_errors(folder):
        for path in {p for _, p in there} - wanted:
            os.replace(path, path.with_name(f".{path.name}.stale"))  # at one stroke: a kill leaves no half of one
    remove_leftovers(folder)


def best(folder: str | Path, up_to: int | None = None) -> tuple[Path, float] | None:
    """(path, value) of the checkpoint, up to a step, with the lowest validation metric; None where none has one."""
    scored = []
    for step, path in list_checkpoints(folder):
        if up_to is not None and step > up_to:
            continue
        try:
            metrics = read_manifest(path)["metrics"]
        except DigitError:
            continue
        value = next((v for name, v in sorted(metrics.items()) if name.startswith("val_")), None)
        scored += [(value, path)] if value is not None else []
    return min(scored)[::-1] if scored else None


@contextmanager
def _full_disk_is_an_os_error(path: Path) -> Iterator[None]:
    """torch wraps what went wrong in the ranks' writers; a full disk is a user's to mend."""
    try:
        yield
    except CheckpointException as error:  # no Exception, so that it is not overlooked
        _raise_interrupt(error)
        with disk_errors(path):
            for cause in _causes(error):
                if isinstance(cause, OSError):
                    raise cause from error
        raise RuntimeError(f"checkpoint {path} could not be written") from error


def _raise_interrupt(error: CheckpointException) -> None:
    """A second Ctrl-C, which torch catches too, ends the run as ever."""
    for cause in _causes(error):
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for failure, _ in error.failures.values():
                yield from _causes(failure)
        error = error.__cause__ or error.__context__


# -------------------------------------------------------------------- reading


def newest(folder: str | Path) -> Path | None:
    """The newest checkpoint that is whole, its hashes compared, or None where there is none at all. All ranks call it.

    A damaged one is passed over with a warning line; raises DigitError where all of them are.
    """
    return distributed.on_main(lambda: _newest(Path(folder)))


def _newest(folder: Path) -> Path | None:
    checkpoints = list_checkpoints(folder)
    for _, path in reversed(checkpoints):
        try:
            verify(path)
            return path
        except DamagedError as error:
            log.warning("%s; falling back to the checkpoint before it", error)
    if checkpoints:
        raise DigitError(f"no checkpoint in {folder} can be read, {len(checkpoints)} tried: delete it to begin again")
    return None


def verify(path: Path) -> dict[str, Any]:
    """The manifest, once every file is the one that was written. Raises DamagedError where one is not."""
    manifest = read_manifest(path)
    if extra := {p.name for p in path.glob("*.safetensors")} - manifest["files"].keys():
        raise _damaged(path, f"{min(extra)} is not in {MANIFEST}")
    for name, wanted in manifest["files"].items():
        try:
            if (path / name).exists() and not (path / name).is_file():
                raise _damaged(path, f"{name} is no file")
            got = sha256_file(path / name)
        except FileNotFoundError as error:
            raise _damaged(path, f"{name} is missing") from error
        except OSError as error:
            raise DigitError(f"cannot read checkpoint {path / name}: {error.strerror}") from error
        if got != wanted["sha256"]:
            raise _damaged(path, f"the hash of {name} is wrong")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """What is known of a checkpoint without reading its tensors: step, metrics, files. Raises DamagedError."""
    if not path.is_dir():
        raise _damaged(path, "no folder")
    try:
        manifest = read_json(path / MANIFEST)
    except DigitError as error:
        raise _damaged(path, f"{MANIFEST} cannot be read") from error
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _digest(manifest):
        raise _damaged(path, f"the hash of {MANIFEST} is wrong")
    if not _well_formed(manifest):
        raise _damaged(path, f"{MANIFEST} is none of ours")
    if manifest["format"] != FORMAT:
        raise DigitError(f"checkpoint {path} has format {manifest['format']}, this version reads {FORMAT}")
    return manifest


def _well_formed(manifest: dict[str, Any]) -> bool:
    step, metrics, files = (manifest.get(name) for name in ("step", "metrics", "files"))
    return (
        type(step) is int
        and step >= 0
        and "format" in manifest
        and isinstance(metrics, dict)
        and all(type(value) in (int, float) for value in metrics.values())
        and isinstance(files, dict)
        and STATE in files
        and all("/" not in n and isinstance(f, dict) and isinstance(f.get("sha256"), str) for n, f in files.items())
    )


def _damaged(path: Path, reason: str) -> DamagedError:
    return DamagedError(f"checkpoint {path} is damaged ({reason}): delete it and run again")


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def load(path: Path, templates: dict[str, Any], parameters: dict[str, list[Tensor]] | None = None) -> dict[str, Any]:
    """The content of a verified checkpoint, its tensors in those of `templates` (the same content, as it is now).

    A tensor without a template is made on the CPU; one of an optimizer in `parameters`, which has no state before its
    first step, like the parameter it belongs to. All ranks call this. Raises MismatchError for another shape,
    DamagedError for what no run of ours can have written.
    """
    try:
        return _load(path, templates, parameters or {})
    except CheckpointException as error:
        _raise_interrupt(error)
        raise DigitError(f"cannot read checkpoint {path}: {distributed.first_line([*_causes(error)][-1])}") from error
    except STRANGE as error:
        if distributed.lost_peer(error) is not None:
            raise
        raise _damaged(path, distributed.first_line(error)) from error


def _load(path: Path, templates: dict[str, Any], parameters: dict[str, list[Tensor]]) -> dict[str, Any]:
    here: dict[str, Tensor] = {}
    _take_apart(templates, (), here)
    reader = HuggingFaceStorageReader(str(path))
    sizes = {k: m for k, m in reader.read_metadata().state_dict_metadata.items() if hasattr(m, "size")}
    skeleton, tensors = read_json(path / STATE), {}
    room = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if sum(math.prod(m.size) * m.properties.dtype.itemsize for m in sizes.values()) > room:
        raise _damaged(path, "its tensors claim more than its files hold")
    for name, found in sizes.items():
        like = here.get(name, _parameter_of(name, parameters, tuple(found.size)))
        if like is not None and tuple(like.shape) != tuple(found.size):
            raise MismatchError(f"{name} in {path} is {tuple(found.size)}, here {tuple(like.shape)}")
        dtype = found.properties.dtype
        tensors[name] = torch.empty(found.size, dtype=dtype) if like is None else like
    with _torch_is_quiet():
        dcp.load(
            tensors, storage_reader=reader, process_group=distributed.control(), no_dist=distributed.world_size() == 1
        )
    return _put_together(skeleton, tensors)


def _parameter_of(name: str, parameters: dict[str, list[Tensor]], size: tuple[int, ...]) -> Tensor | None:
    """An empty tensor for 'optimizer/state/3/exp_avg': cut up among the ranks as parameter 3 is."""
    thing, *place = name.split("/")
    known = thing in parameters and len(place) == 3 and place[0] == "state" and place[1].isdecimal()
    if not known or int(place[1]) >= len(parameters[thing]):
        return None
    parameter = parameters[thing][int(place[1])]
    return torch.empty_like(parameter) if tuple(parameter.shape) == size else None


@contextmanager
def _torch_is_quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


# -------------------------------------------------------------------- tensors apart from the rest


def _take_apart(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go into `tensors` by name."""
    if isinstance(value, Tensor):
        name = "/".join(path)
        tensors[name] = value.detach().contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        parts = {key: _take_apart(entry, (*path, str(key)), tensors) for key, entry in value.items()}
        return parts if all(isinstance(key, str) for key in parts) else {PAIRS: [[k, v] for k, v in parts.items()]}
    if isinstance(value, list | tuple):
        parts = [_take_apart(entry, (*path, str(i)), tensors) for i, entry in enumerate(value)]
        return {TUPLE: parts} if isinstance(value, tuple) else parts
    assert value is None or isinstance(value, bool | int | float | str), f"{'/'.join(path)} is {type(value).__name__}"
    return value


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_together(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if PAIRS in value:
        return {key: _put_together(entry, tensors) for key, entry in value[PAIRS]}
    if TUPLE in value:
        return tuple(_put_together(entry, tensors) for entry in value[TUPLE])
    return {key: _put_together(entry, tensors) for key, entry in value.items()}
