"""New crops of the images in every epoch, decoded ahead by worker processes: training beside stored tokens."""

import atexit
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from digit.data.epochs import EpochOrder
from digit.data.loader import FORKS, BadImages, CropBatch, held_signals, pass_on, read_resized
from digit.data.preprocess import PreprocessConfig, cut
from digit.data.source import ImageSource
from digit.errors import BadImageError, DigitError
from digit.runtime import distributed

MAX_WORKERS = 16
PARTS_AHEAD = 2  # of each worker


class FreshCrops:
    """`part(step, start, stop)` gives rows start .. stop - 1 of training batch `step`.

    A pure function of (seed, step, row): epochs are permutations of the images, those of `TokenStore.batches` over as
    many images with the same seed, and in epoch e image i is crop_image(..., seed=seed, index=i, crop=e). The next
    readable image replaces a broken one.

    Args:
        images: images of the source to use, in the order of the token store; all by default.
        num_workers: processes that decode ahead; by default one for each core of this process but one, or none where
            processes cannot fork.
    """

    def __init__(
        self,
        source: ImageSource,
        cfg: PreprocessConfig,
        *,
        batch_size: int,
        seed: int = 0,
        images: Sequence[int] | np.ndarray | None = None,
        num_workers: int | None = None,
        max_bad_fraction: float = 0.01,
    ):
        indices = np.arange(len(source), dtype=np.int64) if images is None else np.asarray(images, dtype=np.int64)
        if batch_size < 1 or not len(indices):
            raise DigitError(f"batches of {batch_size} from {len(indices)} images: both must be at least 1")
        self.num_workers = default_workers() if num_workers is None else num_workers
        self._rows = _Rows(source, cfg, indices, batch_size, seed, int(max_bad_fraction * len(indices)))
        self._bad = BadImages(len(indices), max_bad_fraction)
        self._coming: Iterator[Any] | None = None
        self._next: tuple[int, int, int] | None = None
        self._workers: list[Any] = []

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(key, reason) of the broken images so far."""
        return list(self._bad.found.values())

    def images(self, step: int) -> np.ndarray:
        """(batch_size,) int64: the images of a batch; broken ones are still among them."""
        return self._rows.images(step, 0, self._rows.batch_size)[0]

    def part(self, step: int, start: int, stop: int) -> CropBatch:
        """Rows start .. stop - 1 of batch `step`. Raises DigitError past max_bad_fraction of broken images."""
        if not self.num_workers:
            arrays, bad = self._rows.read(step, start, stop)
        else:
            if self._coming is None or self._next != (step, start, stop):
                self._coming = self._start(step, start, stop)
            arrays, bad = next(self._coming)
            self._next = (step + 1, start, stop)
        for index, key, reason in bad:
            self._bad.add(index, key, reason)
        return CropBatch(*map(torch.from_numpy, arrays))

    def _start(self, step: int, start: int, stop: int) -> Iterator[Any]:
        """Worker processes that make this part of `step` and of all steps after it."""
        from torch.utils.data import DataLoader

        self.close()
        generator = torch.Generator()  # else DataLoader advances the global generator
        loader = DataLoader(
            _Parts(self._rows, step, start, stop), batch_size=None, num_workers=self.num_workers, collate_fn=pass_on,
            generator=generator, prefetch_factor=PARTS_AHEAD,
        )  # fmt: skip
        before = set(multiprocessing.active_children())
        with held_signals():
            coming = iter(loader)
        self._workers = [child for child in multiprocessing.active_children() if child not in before]
        atexit.register(self._kill)  # Python would wait for them for ever: they heed no SIGTERM
        return coming

    def close(self) -> None:
        """Ends the worker processes."""
        self._coming = self._next = None
        self._kill()

    def _kill(self) -> None:
        atexit.unregister(self._kill)
        for worker in self._workers:
            worker.kill()  # whatever still holds the iterator
        self._workers.clear()


def default_workers() -> int:
    """The cores of this process but one, shared among the job's processes on this machine; 0 where none can fork."""
    forks = multiprocessing.get_start_method(allow_none=True) in (None, "fork") and FORKS
    if not forks or multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bound = cores < (os.cpu_count() or 1)  # the launcher gave this process cores of its own
    return min(MAX_WORKERS, max(0, (cores if bound else cores // distributed.local_size()) - 1))


class _Rows:
    """Makes any rows of any batch, here or in a worker process."""

    def __init__(
        self,
        source: ImageSource,
        cfg: PreprocessConfig,
        indices: np.ndarray,
        batch_size: int,
        seed: int,
        most_bad: int,
    ):
        self.source, self.cfg, self.indices, self.batch_size, self.seed = source, cfg, indices, batch_size, seed
        self.order, self.most_bad = EpochOrder(len(indices), seed), most_bad
        self.broken: dict[int, tuple[int, str, str]] = {}  # place in `indices` -> (image, key, reason)

    def images(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(images, epochs) of some rows, int64."""
        places, epochs = self.order.take(step * self.batch_size + start, stop - start)
        return self.indices[places], epochs

    def read(self, step: int, start: int, stop: int) -> tuple[tuple[np.ndarray, ...], list[tuple[int, str, str]]]:
        """The fields of a CropBatch and the broken images that were found, which others replace."""
        places, epochs = self.order.take(step * self.batch_size + start, stop - start)
        size, count, found = self.cfg.crop_size, len(places), dict(self.broken)
        images = np.zeros((count, 3, size, size), dtype=np.uint8)
        labels, indices, ok = np.full(count, -1), np.full(count, -1), np.zeros(count, dtype=bool)
        for row, (place, epoch) in enumerate(zip(places.tolist(), epochs.tolist(), strict=True)):
            taken = self._take(place)
            if taken is None:  # too many are broken: the caller's count of them ends the run
                break
            (resized, labels[row]), index = taken
            square = cut(resized, self.cfg, seed=self.seed, index=index, crop=epoch)  # (S, S, 3)
            images[row], indices[row], ok[row] = square.transpose(2, 0, 1), index, True
        bad = [entry for place, entry in self.broken.items() if place not in found]
        return (images, labels, indices, epochs, ok), bad

    def _take(self, place: int) -> tuple[tuple[np.ndarray, int], int] | None:
        """((resized image, label), image) at a place, or of the next readable one; None if more are broken than may."""
        while len(self.broken) <= self.most_bad and len(self.broken) < len(self.indices):
            index = int(self.indices[place])
            if place not in self.broken:
                try:
                    return read_resized(self.source, index, self.cfg), index
                except BadImageError as error:
                    self.broken[place] = index, self.source.key(index), str(error)
            place = (place + 1) % len(self.indices)
        return None


class _Parts(torch.utils.data.Dataset):
    """The same rows of every batch from `step` on."""

    def __init__(self, rows: _Rows, step: int, start: int, stop: int):
        self.rows, self.step, self.start, self.stop = rows, step, start, stop

    def __len__(self) -> int:
        return 2**31  # steps: without end

    def __getitem__(self, number: int) -> tuple[tuple[np.ndarray, ...], list[tuple[int, str, str]]]:
        return self.rows.read(self.step + number, self.start, self.stop)
