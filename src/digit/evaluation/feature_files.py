"""Features of many images on the disk, in half precision: each rank writes its share once, then they are read by rows.

FOLDER/NAME.RANK.rows    bare rows of one rank, in order
FOLDER/features.json     what they are of, written last; with another request the files are made again
FOLDER/KEY.STAGE.state   weights and momentum of a probe's sgd, while it runs (`probe_state`)

A folder that is whole is used again, so that classifiers that were cut short need no second pass of the networks.

Shapes: N images, B images of a batch, L layers, D features.
"""

import os
import secrets
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.errors import DigitError
from digit.evaluation.sharing import rows_to_main
from digit.metrics.feature_rows import Features, HeldRows
from digit.runtime import distributed
from digit.runtime.files import (
    MAKE_AGAIN,
    atomic_path,
    disk_errors,
    plain,
    read_json,
    remove_leftovers,
    require_space,
    sha256_tensors,
)
from digit.runtime.files import write_json as commit

READERS = 8  # threads that wait for the disk together
COMMIT = "features.json"
LABELS, STATE = "labels", ".state"
Batches = Callable[[], Iterator[Mapping[str, Tensor]]]  # this rank's share: name -> (B, L, D) float, or labels (B,)


class FeatureFiles:
    """Rows (N, L, D) float16 in files, one after another; reading leaves nothing in memory but what was asked for."""

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], layers: int, dim: int, made: str = ""):
        self.shape = sum(counts), layers, dim
        self.made = made  # text that changes whenever files are made again
        self.row_bytes = 2 * layers * dim
        for path, count in zip(paths, counts, strict=True):
            size = path.stat().st_size if path.is_file() else -1
            if size != count * self.row_bytes:
                raise DigitError(f"{path} holds {size} bytes, wanted {count * self.row_bytes}: {MAKE_AGAIN}")
        self.starts = np.array(list(accumulate(counts, initial=0)))  # first row of each file, and the end
        self.paths, self.handles = list(paths), [os.open(path, os.O_RDONLY) for path in paths]
        self.readers = ThreadPoolExecutor(READERS)
        self.close = weakref.finalize(self, _close, self.handles, self.readers)

    def take(self, rows: Tensor) -> Tensor:
        """The rows (B,) as (B, L, D) float16."""
        wanted = rows.numpy()
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.shape[0]):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} of {self.shape[0]}")
        found = np.empty((len(wanted), *self.shape[1:]), np.float16)
        cuts = (np.diff(wanted) != 1) | np.isin(wanted[1:], self.starts)  # neighbours in one file are read at once
        runs = np.flatnonzero(np.concatenate([[True], cuts])) if len(wanted) else np.zeros(0, np.int64)
        ends = np.append(runs[1:], len(wanted))
        share = max(1, -(-len(runs) // READERS))

        def read(first: int) -> None:
            for begin, end in zip(runs[first : first + share], ends[first : first + share], strict=True):
                self._read(int(wanted[begin]), found[begin:end])

        list(self.readers.map(read, range(0, len(runs), share)))
        return torch.from_numpy(found)

    def _read(self, row: int, into: np.ndarray) -> None:
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        view, place = into.reshape(-1).view(np.uint8).data, (row - int(self.starts[file])) * self.row_bytes
        while view:
            if not (got := os.preadv(self.handles[file], [view], place)):
                raise DigitError(f"{self.paths[file]} was truncated while it was read: {MAKE_AGAIN}")
            view, place = view[got:], place + got


def _close(handles: list[int], readers: ThreadPoolExecutor) -> None:
    readers.shutdown()
    for handle in handles:
        os.close(handle)


@dataclass(frozen=True)
class FeatureCache:
    """Where features are kept, and what decides them."""

    folder: Path
    """Holds nothing else."""
    request: Callable[[], Mapping[str, Any]]
    """What the features depend on, JSON values; the files of another request are not used."""
    budget: int
    """Bytes in float32 up to which features stay in memory, and no file is written."""

    def collect(self, batches: Batches, sizes: Mapping[str, tuple[int, int]], num: int) -> dict[str, Features]:
        """Features by name, and the labels, of all ranks' batches in rank order; rank 0 gets them, the others none.

        sizes: (L, D) of each name, without labels; num: images of all ranks, at most. Raises DigitError for values
        that float16 cannot hold, and where the disk has no room.
        """
        size = num * sum(layers * dim for layers, dim in sizes.values())
        if 4 * size <= self.budget:
            return dict(rows_to_main(lambda: _joined(batches())))
        request = distributed.on_main(lambda: plain(dict(self.request())))
        if not distributed.on_main(lambda: self._is_whole(request)):
            distributed.on_main(lambda: self._make_room(2 * size))
            shares = distributed.on_every_rank(lambda: self._write(batches()))
            known = {"request": request, "sizes": plain(dict(sizes)), "shares": shares}
            distributed.on_main(lambda: commit(self.folder / COMMIT, known | {"made": secrets.token_hex(16)}))
        return self._open() if distributed.is_main() else {}

    def _is_whole(self, request: Mapping[str, Any]) -> bool:
        """Whether the folder holds whole files of this request."""
        with suppress(DigitError, KeyError, TypeError, ValueError):
            if read_json(self.folder / COMMIT)["request"] == request:
                self._open()
                return True
        return False

    def _make_room(self, needed: int) -> None:
        discard(self.folder)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        require_space(self.folder, needed, "the probe's features in half precision")

    def _write(self, batches: Iterator[Mapping[str, Tensor]]) -> dict[str, int]:
        """Write this rank's rows; returns how many of each name."""
        counts: dict[str, int] = {}
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for batch in batches:
                for name, rows in batch.items():
                    if name not in files:
                        files[name] = stack.enter_context(_writing(self._path(name, distributed.rank())))
                    files[name].write(_as_stored(name, rows).data)
                    counts[name] = counts.get(name, 0) + len(rows)
        return counts

    def _path(self, name: str, rank: int) -> Path:
        return self.folder / f"{name}.{rank}.rows"

    def _open(self) -> dict[str, Features]:
        """Everything that features.json names. Raises DigitError where a file has another size."""
        known, found = read_json(self.folder / COMMIT), {}
        for name in dict.fromkeys(name for share in known["shares"] for name in share):
            counts = {self._path(name, rank): share.get(name, 0) for rank, share in enumerate(known["shares"])}
            counts = {path: count for path, count in counts.items() if count}
            if name == LABELS:
                found[name] = torch.cat([_read_labels(path, count) for path, count in counts.items()])
            else:
                layers, dim = known["sizes"][name]
                made = f"{known['made']} {name}"
                found[name] = FeatureFiles(list(counts), list(counts.values()), layers, dim, made)
        return found


def identity(features: Features) -> str:
    """Text that changes with the features: a hash of those in memory; of files, when they were made."""
    if isinstance(features, Tensor | HeldRows):
        return sha256_tensors({"features": features.tensor if isinstance(features, HeldRows) else features})
    if isinstance(features, FeatureFiles):
        return features.made
    raise TypeError(f"features in a {type(features).__name__} have no identity: give a tensor or files")


def discard(folder: Path) -> None:
    """Delete the files of a folder of features, features.json first, and of the folders in it."""
    (folder / COMMIT).unlink(missing_ok=True)
    for path in folder.glob("*"):
        if path.is_dir():
            discard(path)
        elif path.suffix in (".rows", STATE):
            path.unlink()
    remove_leftovers(folder)
    with suppress(OSError):  # never made, or not ours alone
        folder.rmdir()


def _read_labels(path: Path, count: int) -> Tensor:
    labels = np.fromfile(path, np.int64)
    if len(labels) != count:
        raise DigitError(f"{path} holds {len(labels)} labels, wanted {count}: {MAKE_AGAIN}")
    return torch.from_numpy(labels)


@contextmanager
def _writing(path: Path) -> Iterator[Any]:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def _as_stored(name: str, rows: Tensor) -> np.ndarray:
    """Labels as int64, features (B, L, D) as float16. Raises DigitError for values that it cannot hold."""
    if name == LABELS:
        return rows.long().cpu().numpy()
    half = rows.half()
    if not torch.isfinite(half).all():
        worst = float(rows.float().abs().max())
        raise DigitError(f"{name} features hold {worst:g}, beyond float16: check the images and the network's weights")
    return np.ascontiguousarray(half.cpu().numpy())


def _joined(batches: Iterator[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    parts = defaultdict(list)
    for batch in batches:
        for name, rows in batch.items():
            parts[name].append(rows.cpu())
    return {name: torch.cat(part) for name, part in parts.items()}
