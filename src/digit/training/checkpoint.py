"""Atomic checkpoints that any number of processes can write and read.

    OUT/checkpoints/config.json                         the run's config, compared when the run resumes
    OUT/checkpoints/step_00001000/shard-*.safetensors   tensors, one or more files per process
    OUT/checkpoints/step_00001000/state.json            everything else: numbers, strings, the place of each tensor
    OUT/checkpoints/step_00001000/manifest.json         SHA-256 and size of each file, the step, validation metrics

A folder is written under a temporary name with a leading dot, synced and renamed, so a folder without the dot is whole.
Its hashes are verified before it is loaded. torch.distributed.checkpoint writes and reads the tensors: the processes
share the work for replicated tensors, each writes its own part of sharded ones (fully_shard), and any number of
processes can read both. All files are safetensors or JSON, so reading a stranger's checkpoint runs no code.
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
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from digit.errors import DigitError, MismatchError, Stopped
from digit.runtime import distributed
from digit.runtime.files import as_path, disk_errors, read_json, require_space, sha256_file, sync_folder, write_json
from digit.runtime.version import __version__

log = logging.getLogger(__name__)
FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
TENSOR, PAIRS, TUPLE = "$tensor", "$pairs", "$tuple"  # in state.json, types that JSON lacks
MALFORMED_ERRORS = (  # that malformed files may raise while they are read
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError, RuntimeError,
    SafetensorError, TypeError, ValueError,
)  # fmt: skip
HEADER_BYTES = 400  # per tensor, in the header of its file


class DamagedError(DigitError):
    """A checkpoint is torn or has flipped bits."""


def step_folder(folder: str | Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return as_path(folder) / f"step_{step:08d}"


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of each checkpoint in `folder`, oldest first. Raises DigitError for those of an older version."""
    checkpoints = []
    for path in as_path(folder).glob("step_*"):
        if path.suffix == ".pt":
            raise DigitError(f"{path} was written by an older version, which this version cannot read: move it away")
        if (match := re.fullmatch(r"step_(\d+)", path.name)) is not None:
            checkpoints.append((int(match[1]), path))
    return sorted(checkpoints)


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
    is lowest. Removes checkpoints after `step`: the run found them damaged and resumed from an earlier one.

    Raises DigitError, before it writes anything, if the disk has too little space.
    """
    path, tensors = step_folder(folder, step), {}
    partial = path.with_name(f".{path.name}.partial")
    skeleton = _extract_tensors(content, (), tensors)
    distributed.on_main(lambda: _prepare(partial, tensors))
    with _raise_disk_errors(path):
        _write_tensors(partial, tensors)
    distributed.on_main(lambda: _publish(partial, path, step, skeleton, metrics or {}))
    distributed.on_main(lambda: prune(as_path(folder), step, keep, keep_best))
    return path


def _prepare(partial: Path, tensors: dict[str, Tensor]) -> None:
    """Create the temporary folder and check that the disk has space for the tensors."""
    size = sum(t.numel() * t.element_size() + HEADER_BYTES for t in tensors.values())
    with disk_errors(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(partial.parent)  # first, because they take space
        partial.mkdir()
    require_space(partial, size, "a checkpoint")


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write one synced file per process."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _without_torch_warning():
        state_dict_saver.save(
            dict(tensors),
            storage_writer=writer,
            process_group=distributed.control(),
            no_dist=distributed.world_size() == 1,
        )


def _publish(partial: Path, path: Path, step: int, skeleton: Any, metrics: dict[str, float]) -> None:
    """Write state and manifest, sync, and give the folder its final name."""
    write_json(partial / STATE, skeleton)
    files = {f.name: {"sha256": sha256_file(f), "bytes": f.stat().st_size} for f in sorted(partial.iterdir())}
    manifest = {"format": FORMAT, "version": __version__, "step": step, "processes": distributed.world_size()}
    manifest |= {"metrics": metrics, "files": files}
    write_json(partial / MANIFEST, manifest | {"digest": _digest(manifest)})
    with disk_errors(path):
        sync_folder(partial)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():  # damaged, or the run would not have reached this step again
            os.replace(path, old)
        os.replace(partial, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove folders that a killed process left half written or half removed. Only rank 0 calls this."""
    for path in folder.glob(".step_*"):
        if path.suffix in (".partial", ".old", ".stale"):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, step: int, keep: int, keep_best: bool) -> None:
    """Keep the newest `keep` checkpoints up to `step`, with `keep_best` the best too. Only rank 0 calls this."""
    existing = list_checkpoints(folder)
    kept = {path for s, path in existing if s <= step}
    kept = set(sorted(kept)[-max(1, keep) :])
    if keep_best and (scored := best(folder, up_to=step)) is not None:
        kept.add(scored[0])
    with disk_errors(folder):
        for path in {p for _, p in existing} - kept:
            os.replace(path, path.with_name(f".{path.name}.stale"))  # atomic: a kill leaves no half checkpoint
    remove_leftovers(folder)


def best(folder: str | Path, up_to: int | None = None) -> tuple[Path, float] | None:
    """(path, value) of the checkpoint with the lowest finite validation metric, up to a step; None for none."""
    scored = []
    for step, path in list_checkpoints(folder):
        if up_to is not None and step > up_to:
            continue
        try:
            metrics = read_manifest(path)["metrics"]
        except DigitError:
            continue
        value = next((v for name, v in sorted(metrics.items()) if name.startswith("val_")), math.nan)
        scored += [(value, path)] if math.isfinite(value) else []
    return min(scored)[::-1] if scored else None


@contextmanager
def _raise_disk_errors(path: Path) -> Iterator[None]:
    """Unwrap the errors of torch's writers: a full disk on any rank raises DigitError, others RuntimeError."""
    try:
        yield
    except CheckpointException as error:  # a BaseException
        _raise_interrupt(error)
        with disk_errors(path):
            for cause in _causes(error):
                if isinstance(cause, OSError):
                    raise cause from error
        raise RuntimeError(f"checkpoint {path} could not be written") from error


def _raise_interrupt(error: CheckpointException) -> None:
    """Raise what a signal raised and torch has caught: a stop request, or the second Ctrl-C."""
    for cause in _causes(error):
        if isinstance(cause, (KeyboardInterrupt, Stopped)):
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
    """The newest undamaged checkpoint, or None if there is no checkpoint. All ranks call this.

    Verifies the hashes. Skips damaged checkpoints with a warning; raises DigitError if all are damaged.
    """
    return distributed.on_main(lambda: _newest(as_path(folder)))


def _newest(folder: Path) -> Path | None:
    checkpoints = list_checkpoints(folder)
    for _, path in reversed(checkpoints):
        try:
            verify(path)
            return path
        except DamagedError as error:
            log.warning("%s; falling back to the checkpoint before it", error)
    if checkpoints:
        raise DigitError(
            f"no checkpoint in {folder} can be read, {len(checkpoints)} are damaged: delete it to begin again"
        )
    return None


def verify(path: Path) -> dict[str, Any]:
    """Check the hash of every file and return the manifest. Raises DamagedError if one is wrong."""
    manifest = read_manifest(path)
    if extra := {p.name for p in path.glob("*.safetensors")} - manifest["files"].keys():
        raise _damaged(path, f"{min(extra)} is not in {MANIFEST}")
    for name, entry in manifest["files"].items():
        try:
            if (path / name).exists() and not (path / name).is_file():
                raise _damaged(path, f"{name} is not a file")
            sha256 = sha256_file(path / name)
        except FileNotFoundError as error:
            raise _damaged(path, f"{name} is missing") from error
        except OSError as error:
            raise DigitError(f"cannot read checkpoint {path / name}: {error.strerror}") from error
        if sha256 != entry["sha256"]:
            raise _damaged(path, f"the hash of {name} is wrong")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: step, metrics, files. Raises DamagedError."""
    if not path.is_dir():
        raise _damaged(path, "it is not a folder")
    try:
        manifest = read_json(path / MANIFEST)
    except DigitError as error:
        raise _damaged(path, f"{MANIFEST} cannot be read") from error
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _digest(manifest):
        raise _damaged(path, f"the hash of {MANIFEST} is wrong")
    if not _well_formed(manifest):
        raise _damaged(path, f"{MANIFEST} is malformed")
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
    """The content of a verified checkpoint, its tensors loaded into those of `templates` (the present content).

    An optimizer has no state before its first step: its tensors are created like those of `parameters`, by optimizer
    name. Other tensors without a template are created on the CPU. All ranks call this. Raises MismatchError if a shape
    differs, DamagedError if the content is malformed.
    """
    try:
        return _load(path, templates, parameters or {})
    except CheckpointException as error:
        _raise_interrupt(error)
        raise DigitError(f"cannot read checkpoint {path}: {distributed.first_line([*_causes(error)][-1])}") from error
    except MALFORMED_ERRORS as error:
        if distributed.lost_peer(error) is not None:
            raise
        raise _damaged(path, distributed.first_line(error)) from error


def _load(path: Path, templates: dict[str, Any], parameters: dict[str, list[Tensor]]) -> dict[str, Any]:
    existing: dict[str, Tensor] = {}
    _extract_tensors(templates, (), existing)
    reader = HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    sizes = {k: m for k, m in saved.items() if isinstance(m, TensorStorageMetadata)}
    skeleton, tensors = read_json(path / STATE), {}
    file_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if sum(math.prod(m.size) * m.properties.dtype.itemsize for m in sizes.values()) > file_bytes:
        raise _damaged(path, "its tensors are larger than its files")
    for name, metadata in sizes.items():
        like = existing.get(name, _like_parameter(name, parameters, tuple(metadata.size)))
        if like is not None and tuple(like.shape) != tuple(metadata.size):
            got, wanted = tuple(metadata.size), tuple(like.shape)
            raise MismatchError(f"{name} in {path} has shape {got}, this run has {wanted}: choose another --out")
        dtype = metadata.properties.dtype
        tensors[name] = torch.empty(metadata.size, dtype=dtype) if like is None else like
    with _without_torch_warning():
        state_dict_loader.load(
            tensors, storage_reader=reader, process_group=distributed.control(), no_dist=distributed.world_size() == 1
        )
    return _insert_tensors(skeleton, tensors)


def _like_parameter(name: str, parameters: dict[str, list[Tensor]], size: tuple[int, ...]) -> Tensor | None:
    """An empty tensor for 'optimizer/state/3/exp_avg', sharded like the optimizer's parameter 3; else None."""
    optimizer, *keys = name.split("/")
    is_state = optimizer in parameters and len(keys) == 3 and keys[0] == "state" and keys[1].isdecimal()
    if not is_state or int(keys[1]) >= len(parameters[optimizer]):
        return None
    parameter = parameters[optimizer][int(keys[1])]
    return torch.empty_like(parameter) if tuple(parameter.shape) == size else None


@contextmanager
def _without_torch_warning() -> Iterator[None]:
    """Silence the warning that torch gives with one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


# -------------------------------------------------------------------- tensors and the rest


def _extract_tensors(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, with a reference for each tensor; collects the tensors by name."""
    if isinstance(value, Tensor):
        name = "/".join(path)
        tensors[name] = value.detach().contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        parts = {key: _extract_tensors(entry, (*path, str(key)), tensors) for key, entry in value.items()}
        return parts if all(isinstance(key, str) for key in parts) else {PAIRS: [[k, v] for k, v in parts.items()]}
    if isinstance(value, list | tuple):
        parts = [_extract_tensors(entry, (*path, str(i)), tensors) for i, entry in enumerate(value)]
        return {TUPLE: parts} if isinstance(value, tuple) else parts
    assert value is None or isinstance(value, bool | int | float | str), f"{'/'.join(path)} is {type(value).__name__}"
    return value


def _insert_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `_extract_tensors` turned into JSON."""
    if isinstance(value, list):
        return [_insert_tensors(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if PAIRS in value:
        return {key: _insert_tensors(entry, tensors) for key, entry in value[PAIRS]}
    if TUPLE in value:
        return tuple(_insert_tensors(entry, tensors) for entry in value[TUPLE])
    return {key: _insert_tensors(entry, tensors) for key, entry in value.items()}
