"""Batches of crops from a source: CropLoader passes over it once, CachedCrops serves training without end."""

import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from digit.data.preprocess import ORDER_STREAM, PreprocessConfig, cut, philox, squared
from digit.data.source import ImageSource
from digit.errors import BadImageError, DigitError
from digit.runtime import distributed
from digit.runtime.hardware import cores_of_this_process
from digit.runtime.progress import Progress
from digit.runtime.signals import SIGNALS

CHUNK = 256  # images decoded between two checks of the budget
MIN_ROWS_FOR_WORKERS = 1000  # below, starting processes costs more than it saves
MAX_WORKERS = 8
FORKS = sys.platform.startswith("linux") and sys.version_info < (3, 14)  # elsewhere processes do not fork


@dataclass(frozen=True)
class CropBatch:
    """Rows of a CropLoader, in order."""

    images: UInt8[Tensor, "B 3 S S"]  # RGB, 0..255; zeros if not ok
    labels: Int64[Tensor, " B"]  # -1 = none
    indices: Int64[Tensor, " B"]  # which image of the source
    crops: Int64[Tensor, " B"]  # which crop of the image
    ok: Bool[Tensor, " B"]  # False if the image could not be read

    def __len__(self) -> int:
        return len(self.images)


def on_device(batches: Iterable[CropBatch], device: torch.device | str) -> Iterator[CropBatch]:
    """Yields the same batches with their images on `device`.

    On a GPU it copies the next batch from pinned memory on a separate stream while the caller uses this one.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    ahead: tuple[CropBatch, Any] | None = None  # with the event of its copy
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = replace(batch, images=batch.images.pin_memory().to(device, non_blocking=True))
            done = copies.record_event()
        if ahead is not None:
            yield _received(*ahead)
        ahead = moved, done
    if ahead is not None:
        yield _received(*ahead)


def _received(batch: CropBatch, done: "torch.cuda.Event") -> CropBatch:
    """Returns the batch after making the current stream wait for its copy."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(done)
    batch.images.record_stream(stream)  # else the copying stream could reuse its memory too early
    return batch


class BadImages:
    """Counts the broken images of one run, each once, and ends the run if there are too many."""

    def __init__(self, total: int, max_fraction: float):
        self.total, self.max_fraction = total, max_fraction
        self.found: dict[int, tuple[str, str]] = {}  # image -> (key, reason)
        self._lock = threading.Lock()

    def add(self, index: int, key: str, reason: str) -> None:
        """Records one. Raises DigitError above `max_fraction`, or if every image is bad."""
        with self._lock:
            self.found.setdefault(index, (key, reason))
            count = len(self.found)
        if count < self.total and count <= self.max_fraction * self.total:
            return
        first = next(iter(self.found.values()))[1]
        if count == self.total:
            raise DigitError(f"none of the {count} images can be read; the first: {first}")
        limit = f"more than max_bad_fraction {self.max_fraction:g}"
        raise DigitError(f"{count} of {self.total} images unreadable, {limit}: see digit inspect; the first: {first}")


def read_resized(source: ImageSource, index: int, cfg: PreprocessConfig) -> tuple[np.ndarray, int]:
    """Returns (uint8 (H, W, 3) of which crops are cut, label). Raises BadImageError naming the image."""
    image, label = source.read(index)
    try:
        return np.asarray(squared(image, cfg)), label
    except BadImageError as error:
        raise BadImageError(f"{source.key(index)}: {error}") from error


def read_rows(
    source: ImageSource, cfg: PreprocessConfig, rows: np.ndarray, *, crops_per_image: int = 1, seed: int = 0
) -> UInt8[Tensor, "B 3 S S"]:
    """(B, 3, S, S) uint8: some rows of a `CropLoader` over the whole source. Raises BadImageError for broken images."""
    images = np.empty((len(rows), 3, cfg.crop_size, cfg.crop_size), dtype=np.uint8)
    for place, row in enumerate(rows):
        index, crop = divmod(int(row), crops_per_image)
        square = cut(read_resized(source, index, cfg)[0], cfg, seed=seed, index=index, crop=crop)  # (S, S, 3)
        images[place] = square.transpose(2, 0, 1)
    return torch.from_numpy(images)


class CropLoader:
    """Yields every crop of every image, in order, in batches; broken images are marked, not dropped.

    Row r is crop r % crops_per_image of image indices[r // crops_per_image]. Its content depends on (seed, image, crop)
    only, not on the batch size, the workers or the row at which the loader started.
    """

    def __init__(
        self,
        source: ImageSource,
        cfg: PreprocessConfig,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        crops_per_image: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int | None = None,
        max_bad_fraction: float = 0.01,
        start_row: int = 0,
    ):
        """num_workers: processes that read ahead; None uses a third of torch's threads, or 0 for few rows."""
        if crops_per_image < 1 or batch_size < 1:
            raise DigitError(f"crops_per_image is {crops_per_image}, batch_size {batch_size}; wanted 1 or more of each")
        self.source, self.cfg, self.seed = source, cfg, seed
        self.indices = np.asarray(range(len(source)) if indices is None else indices, dtype=np.int64).reshape(-1)
        self.crops_per_image, self.batch_size, self.start_row = crops_per_image, batch_size, start_row
        self.num_workers = self._default_workers() if num_workers is None else num_workers
        assert not len(self.indices) or (self.indices.min() >= 0 and self.indices.max() < len(source)), "indices"
        self._bad = BadImages(len(np.unique(self.indices)), max_bad_fraction)

    @property
    def num_rows(self) -> int:
        """Number of rows, counted from row 0, not from `start_row`."""
        return len(self.indices) * self.crops_per_image

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(key, reason) of the broken images so far, each once."""
        return list(self._bad.found.values())

    def __len__(self) -> int:
        """Number of batches in one pass."""
        return -(-max(0, self.num_rows - self.start_row) // self.batch_size)

    def __iter__(self) -> Iterator[CropBatch]:
        """Yields the batches. Raises DigitError above max_bad_fraction, or if every image is bad."""
        for batch, bad in self._batches():
            for index, key, reason in bad:
                self._bad.add(index, key, reason)
            yield batch

    def _default_workers(self) -> int:
        """0 if processes would not pay off or cannot fork. Counts all rows, so that a resumed run uses as many."""
        # torchrun gives each process one thread of torch's, however many cores there are; on a GPU the others are free
        threads = max(torch.get_num_threads(), cores_of_this_process() if distributed.launched_size() > 1 else 1)
        process = multiprocessing.current_process()
        forks = multiprocessing.get_start_method(allow_none=True) in (None, "fork") and FORKS
        if threads < 2 or self.num_rows < MIN_ROWS_FOR_WORKERS or process.daemon or not forks:
            return 0
        return min(max(1, threads // 3), MAX_WORKERS)

    def _batches(self) -> Iterator[tuple[CropBatch, list[tuple[int, str, str]]]]:
        batches = _Batches(self)
        made = map(batches.__getitem__, range(len(self)))
        if self.num_workers:
            from torch.utils.data import DataLoader

            generator = torch.Generator()  # else DataLoader advances the global generator
            workers = min(self.num_workers, max(1, len(self)))
            made = DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=pass_on, generator=generator)
            with held_signals():
                made = iter(made)
        for arrays, bad in made:
            yield CropBatch(*map(torch.from_numpy, arrays)), bad


def pass_on(item: object) -> object:
    return item


@contextmanager
def held_signals() -> Iterator[None]:
    """Blocks stop signals: processes started inside ignore them, and this process handles them afterwards.

    Batch systems and terminals signal every process of a job. The parent decides when to stop, because it may still
    need the current batch; the workers end with it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Batches(torch.utils.data.Dataset):
    """The fields of batch b of a CropLoader, computed here or in a worker process.

    NumPy arrays go through a pipe; tensors would use shared memory and file descriptors.
    """

    def __init__(self, loader: CropLoader):
        self.source, self.cfg, self.seed, self.indices = loader.source, loader.cfg, loader.seed, loader.indices
        self.crops_per_image, self.batch_size = loader.crops_per_image, loader.batch_size
        self.start_row, self.num_rows, self.num_batches = loader.start_row, loader.num_rows, len(loader)
        self.known = self.source.labels()

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> tuple[tuple[np.ndarray, ...], list[tuple[int, str, str]]]:
        start = self.start_row + number * self.batch_size
        rows = np.arange(start, min(start + self.batch_size, self.num_rows))
        indices, crops = self.indices[rows // self.crops_per_image], rows % self.crops_per_image
        size, known = self.cfg.crop_size, self.known
        images = np.zeros((len(rows), size, size, 3), dtype=np.uint8)
        labels = np.full(len(rows), -1) if known is None else known[indices]
        ok, bad = np.ones(len(rows), dtype=bool), []
        for index in dict.fromkeys(indices.tolist()):
            own_rows = np.flatnonzero(indices == index)
            try:
                resized, labels[own_rows] = read_resized(self.source, index, self.cfg)
            except BadImageError as error:
                ok[own_rows] = False
                bad.append((index, self.source.key(index), str(error)))
                continue
            for row in own_rows:
                images[row] = cut(resized, self.cfg, seed=self.seed, index=index, crop=int(crops[row]))
        nchw = images.transpose(0, 3, 1, 2).copy()  # (B, 3, S, S)
        return (nchw, labels.astype(np.int64), indices, crops, ok), bad


class CachedCrops:
    """Endless random batches for training. Resized images stay in memory; every epoch crops and flips them again.

    Batch `step` is a pure function of (seed, step, batch size): epochs are permutations, and in epoch e image i is
    crop_image(..., seed=seed, index=i, crop=e). The next readable image replaces a broken one. If the images exceed
    `budget_bytes`, threads decode the rest ahead of use; the batches are the same.
    """

    def __init__(
        self,
        source: ImageSource,
        cfg: PreprocessConfig,
        *,
        seed: int = 0,
        budget_bytes: int = 2**31,
        indices: Sequence[int] | np.ndarray | None = None,
        num_workers: int = 2,
        prefetch: int = 4,
        max_bad_fraction: float = 0.01,
    ):
        self.source, self.cfg, self.seed, self.budget_bytes = source, cfg, seed, budget_bytes
        self.indices = np.asarray(range(len(source)) if indices is None else indices, dtype=np.int64).reshape(-1)
        if not len(self.indices):
            raise DigitError(f"no images to train on in {source.name}")
        self.prefetch, self._pool = prefetch, ThreadPoolExecutor(max(1, num_workers), "digit-crops")
        self._bad = BadImages(len(np.unique(self.indices)), max_bad_fraction)
        self._cache: list[tuple[np.ndarray, int] | None] = []  # (uint8 (H, W, 3), label) in the order of `indices`
        self._orders: dict[int, np.ndarray] = {}
        self._ahead: dict[tuple[int, int], Future] = {}
        self._fill()

    def _fill(self) -> None:
        used = 0
        with Progress("decode images", len(self.indices)) as bar:
            for start in range(0, len(self.indices), CHUNK):
                for entry in self._pool.map(self._decode, range(start, min(start + CHUNK, len(self.indices)))):
                    used += entry[0].nbytes if entry else 0
                    if used > self.budget_bytes:
                        return
                    self._cache.append(entry)
                    bar.update()
        self._pool.shutdown(wait=False)

    def _decode(self, position: int) -> tuple[np.ndarray, int] | None:
        index = int(self.indices[position])
        if index in self._bad.found:
            return None
        try:
            return read_resized(self.source, index, self.cfg)
        except BadImageError as error:
            self._bad.add(index, self.source.key(index), str(error))
            return None

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(key, reason) of the broken images so far."""
        return list(self._bad.found.values())

    @property
    def num_cached(self) -> int:
        """Number of images in memory."""
        return len(self._cache)

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, step: int, batch_size: int) -> tuple[UInt8[Tensor, "B 3 S S"], Int64[Tensor, " B"]]:
        """Returns (images uint8 (B, 3, S, S) RGB 0..255, labels int64 (B,), -1 = none) of one step."""
        if self.num_cached == len(self):
            return self._make(step, batch_size)
        upcoming = [(step + ahead, batch_size) for ahead in range(self.prefetch + 1)]
        for stale in set(self._ahead) - set(upcoming):
            self._ahead.pop(stale).cancel()
        for key in upcoming:
            if key not in self._ahead:
                self._ahead[key] = self._pool.submit(self._make, *key)
        return self._ahead.pop(upcoming[0]).result()

    def _make(self, step: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        size, count = self.cfg.crop_size, len(self)
        images = np.empty((batch_size, 3, size, size), dtype=np.uint8)
        labels = np.empty(batch_size, dtype=np.int64)
        for row, turn in enumerate(range(step * batch_size, (step + 1) * batch_size)):
            epoch, place = divmod(turn, count)
            (resized, labels[row]), index = self._take(int(self._order(epoch)[place]))
            square = cut(resized, self.cfg, seed=self.seed, index=index, crop=epoch)  # (S, S, 3)
            images[row] = square.transpose(2, 0, 1)
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _take(self, position: int) -> tuple[tuple[np.ndarray, int], int]:
        """((image, label), image index) at a position, or of the next readable image."""
        while True:
            entry = self._cache[position] if position < len(self._cache) else self._decode(position)
            if entry is not None:
                return entry, int(self.indices[position])
            position = (position + 1) % len(self)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            kept = {old: order for old, order in self._orders.items() if abs(old - epoch) <= 1}
            self._orders = kept | {epoch: philox(self.seed, ORDER_STREAM, epoch, 0).permutation(len(self))}
        return self._orders[epoch]

    def close(self) -> None:
        """Stops the threads and frees the images."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self._cache.clear()
