"""A folder of sampled images. Interrupted sampling resumes at the first missing batch; so does a request for more.

    FOLDER/00000.png ...    image i, of seed + i
    FOLDER/grid.png         the first 256
    FOLDER/tokens.npz       discriminative (num, N) where there is a prior, vq (num, M), labels (num,), int32
    FOLDER/samples.json     labels, classes and the request that determines every byte; written last, when all is done
    FOLDER/journal.json     during sampling: the request, and which images are done (beside NAME.partial.npy)
    FOLDER/journal.R.json   which images rank R has added since

A request for more images than a folder holds keeps those that are there, since every image has a seed of its own.

Threads write the PNGs of a batch while the next one is sampled; at most three batches are in memory. Several processes
(ranks) each sample a share of the missing batches into one folder that all of them see. On the same kind of device the
files are byte-identical to those of one uninterrupted process: on every rank, batches begin at multiples of the batch
size.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from digit.data.rows import ArrayFile
from digit.errors import DigitError, MismatchError, Stopped
from digit.pipeline.batch import SampleBatch
from digit.pipeline.labels import ClassPositions, Labels
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.sample_journal import (
    GRID,
    JOURNAL,
    NEEDLESS,
    OTHER_FOLDER,
    SAMPLES,
    TOKENS,
    clear,
    listed,
    read_ledger,
    recorded,
    void,
)
from digit.runtime import distributed, plots
from digit.runtime.files import as_path, atomic_path, plain, sha256_tensors, write_result
from digit.runtime.ledger import Ledger, Spans
from digit.runtime.lock import lock_folder, release_folder
from digit.runtime.request import defaults_of, require_same_request
from digit.runtime.scalars import as_int
from digit.runtime.signals import StopSignals
from digit.runtime.version import __version__
from digit.sampling.config import SamplingConfig, StageSampling

GRID_IMAGES = 256  # images in grid.png, from the first on
WRITERS = min(8, os.cpu_count() or 1)  # threads; compressing a PNG of 256 px takes 10 ms of one core
WAITING = 1  # batches that the writers may hold while another is sampled
Stream = Callable[[int, int], Iterator[SampleBatch]]


def sample(
    pipe: DigitPipeline,
    folder: str | Path,
    num: int | None = None,
    labels: Labels | None = None,
    seed: int = 0,
    *,
    overwrite: bool = False,
    **sampling: Any,
) -> list[Path]:
    """Sample images into a folder, resume the same request there, or add to it; returns the files of the images.

    Args:
        num, labels, seed, sampling: as for `DigitPipeline.stream`. Without a batch size, resumed sampling keeps
            the one that it began with.
        overwrite: replace the images of another request instead of raising MismatchError.

    All ranks of a job call it together; rank 0 chooses the batch size and writes the final files.

    Raises:
        MismatchError: the folder holds images of another request, or more images; the error names both values.
        DigitError: a setting out of range, other images in the folder, a full disk (make room and run again).
        Stopped: SIGINT or SIGTERM came; finished batches are written, and the same call resumes.
    """
    folder, seed = as_path(folder), as_int("seed", seed)
    chosen = None if labels is None else ClassPositions(pipe.class_positions(labels))
    classes = pipe.labels(num, chosen)

    def settle() -> tuple[SamplingConfig, dict[str, Any]]:
        return settle_request(pipe, folder, len(classes), chosen, seed, pipe.settings(**sampling), overwrite)

    cfg, request = distributed.on_main(settle)
    assert pipe.renderer is not None, "pipe.labels checked the parts"
    lengths = {} if pipe.renders_pixels else {"vq": pipe.renderer.cfg.target_len}
    if pipe.renderer.cfg.prefix_len:
        lengths["discriminative"] = pipe.renderer.cfg.prefix_len
    names = [pipe.classes[k] if 0 <= k < len(pipe.classes) else None for k in classes.tolist()]
    whole = SampleFolder(folder, request, lengths, classes, names)
    write_samples(whole, lambda start, end: pipe.stream(num, chosen, seed, start, end, **vars(cfg)))
    return [whole.picture(i) for i in range(whole.num)]


def write_samples(whole: "SampleFolder", stream: Stream) -> None:
    """Write this rank's share of the missing images; `stream(start, end)` samples images `start` .. `end - 1`.

    Raises Stopped where a signal came, on any rank, before all images were sampled.
    """
    if distributed.on_main(lambda: whole.finished):
        return
    whole.begin()
    with StopSignals() as signals:
        if spans := whole.share():
            with whole, closing(sample_spans(spans, stream)) as batches:
                for batch in batches:
                    whole.append(batch)
                    if signals.asked:
                        break
                whole.settle(0)
        whole.gather()
    if whole.done < whole.num:
        raise Stopped(f"{whole.done} of {whole.num} images are sampled")
    distributed.on_main(whole.finish)
    release_folder(whole.folder)


def sample_spans(spans: list[tuple[int, int]], stream: Stream) -> Generator[SampleBatch, None, None]:
    """The batches of several spans of images."""
    for start, end in spans:
        yield from stream(start, end)


# -------------------------------------------------------------------- request


def settle_request(
    pipe: DigitPipeline,
    folder: Path,
    num: int,
    labels: ClassPositions | None,
    seed: int,
    asked: SamplingConfig,
    overwrite: bool,
) -> tuple[SamplingConfig, dict[str, Any]]:
    """Sampling settings with a batch size, and the request; with `overwrite`, images of another request are voided.

    Raises as `sample` does.
    """
    if (folder / JOURNAL).exists():
        lock_folder(folder)  # before reading journals that other processes may be writing
    try:
        there, cfg = recorded(folder), asked
        if there is not None and cfg.batch_size is None and isinstance(size := there.get("batch_size"), int):
            cfg = replace(cfg, batch_size=size)
        cfg = pipe.sized(cfg)
        request = describe_request(pipe, num, labels, seed, cfg)
        if there is not None:
            advice = f"{OTHER_FOLDER}, or the old setting"
            usual = {stage: defaults_of(StageSampling) for stage in ("prior", "renderer")}
            require_same_request(folder, there | {"num": num}, request, advice, defaults=usual)
            require_no_fewer(folder, there, num)
    except DigitError:
        if not overwrite:
            raise
        lock_folder(folder)
        void(folder)
        cfg = pipe.sized(asked)
        request = describe_request(pipe, num, labels, seed, cfg)
    return cfg, request


def require_no_fewer(folder: Path, there: dict[str, Any], num: int) -> None:
    """Raise MismatchError where a folder holds more images than `num`, or where `num` needs longer names."""
    existing = there.get("num")
    if not isinstance(existing, int):
        require_same_request(folder, {"num": existing}, {"num": num}, OTHER_FOLDER)
    elif existing > num:
        raise MismatchError(
            f"{folder} was made with num = {existing}, now asked for {num}, which is fewer: give --num {existing} or "
            f"more, or {OTHER_FOLDER}"
        )
    elif num_digits(existing) != num_digits(num):
        raise MismatchError(
            f"{folder} was made with num = {existing}, and the names of {num} images are longer: {OTHER_FOLDER}"
        )


def describe_request(
    pipe: DigitPipeline, num: int, labels: ClassPositions | None, seed: int, cfg: SamplingConfig
) -> dict[str, Any]:
    """Everything that determines the images, as JSON gives it back. Equal requests give equal images."""
    assert pipe.renderer is not None, "pipe.labels checked the parts"
    models = {"renderer": pipe.renderer}
    if pipe.renderer.cfg.prefix_len:
        assert pipe.prior is not None, "pipe.labels checked the parts"
        models["prior"] = pipe.prior
    weights = {name: sha256_tensors(model.state_dict()) for name, model in models.items()}
    rounding = "nearest"  # of a renderer straight to pixels
    if not pipe.renders_pixels:
        assert pipe.vq is not None, "pipe.labels checked the parts"
        weights, rounding = weights | {"vqgan": pipe.vq.fingerprint}, pipe.vq.rounding
    return plain(
        {
            "num": num,
            "seed": seed,
            "labels": "every class in turn" if labels is None else list(labels.positions),
            "batch_size": cfg.batch_size,
            "precision": cfg.precision,
            **{name: asdict(getattr(cfg, name)) for name in models},
            "weights": weights,
            "rounding": rounding,
            "device": pipe.device.type,
        }
    )


# -------------------------------------------------------------------- files


class SampleFolder:
    """Files and journals of one request. A journal names only images whose files are on the disk.

    Where the folder holds fewer images of the same request, the missing ones are added.
    """

    def __init__(
        self,
        folder: Path,
        request: dict[str, Any],
        lengths: dict[str, int],
        labels: Int64[Tensor, " B"],
        names: Sequence[str | None],
    ):
        """`request` has num, seed, batch_size and rounding at least; `lengths` are tokens an image by kind; `labels`
        (num,) and their `names` go into samples.json."""
        self.folder, self.request, self.labels, self.names = folder, request, labels, names
        self.num, self.size = request["num"], request["batch_size"]
        self.ledger = Ledger(request, self.num)
        paths = {name: folder / f"{name}.partial.npy" for name in lengths}
        self.arrays = {name: ArrayFile(path, (self.num, lengths[name]), "<i4") for name, path in paths.items()}
        self.opened: list[ArrayFile] = []
        self.existing = Spans()  # images that were there when this process began; they stay as they are
        self.waiting: deque[Future] = deque()  # one per batch that is being written

    def picture(self, index: int) -> Path:
        """The file of an image; names sort in the order of the images."""
        return self.folder / f"{index:0{num_digits(self.num)}d}.png"

    @property
    def done(self) -> int:
        """Number of images on the disk, as far as this rank knows."""
        return len(self.ledger.done)

    @property
    def finished(self) -> bool:
        """Whether every file exists already."""
        if not (self.folder / SAMPLES).exists():
            return False
        wanted = {GRID, TOKENS, *(self.picture(i).name for i in range(self.num))}
        if not wanted <= set(listed(self.folder)):
            return False  # deleted files are sampled again
        self._clean()
        return True

    def begin(self) -> None:
        """Resume from the existing journals, or begin one. Raises DigitError at once where the disk is too full."""
        self.ledger = distributed.on_main(self._begin)
        self.existing = Spans(self.ledger.done.spans)

    def _begin(self) -> Ledger:
        lock_folder(self.folder)
        if (recorded_done := self._recorded_done()) is not None:
            names, done = set(listed(self.folder)), Spans()
            for i in filter(lambda i: self.picture(i).name in names, recorded_done):  # deleted ones are sampled again
                done.add(i, i + 1)
            ledger = Ledger(self.request, self.num, done)
            ledger.save(self.folder / JOURNAL)
            (self.folder / SAMPLES).unlink(missing_ok=True)  # of a request for fewer images
            return ledger
        clear(self.folder)
        ledger = Ledger(self.request, self.num)
        ledger.save(self.folder / JOURNAL)
        try:
            for array in self.arrays.values():
                array.allocate()
        except DigitError:
            self._give_back()
            raise
        return ledger

    def _recorded_done(self) -> Spans | None:
        """Images that an interrupted process or a request for fewer has left, their tokens in place; None for none."""
        there = read_ledger(self.folder) if (self.folder / JOURNAL).exists() else Ledger({}, 0)
        begun = there.request.get("num") if len(there.done) else None
        if (self.folder / SAMPLES).exists() and begun != self.num:
            finished = (recorded(self.folder) or {}).get("num", self.num)
            if finished < self.num:
                self._grow(self.folder / TOKENS, finished)
                return Spans([(0, finished)])
        elif begun is not None:
            if begun < self.num:
                self._grow(None, begun)
            return there.done
        return None

    def _grow(self, tokens: Path | None, num: int) -> None:
        """Lengthen the arrays of tokens, from a tokens.npz or from the unfinished arrays of `num` images."""
        for name, array in self.arrays.items():
            rows = read_rows(tokens or array.path, name)[:num]
            if rows.shape != (num, *array.shape[1:]):
                raise DigitError(f"{self.folder} holds {rows.shape} {name} tokens of {num} images: {OTHER_FOLDER}")
            with atomic_path(array.path) as temporary:
                longer = ArrayFile(temporary, array.shape, array.dtype.str)
                longer.allocate()
                with longer:
                    longer.write(0, rows)

    def share(self) -> list[tuple[int, int]]:
        """This rank's share of the missing batches, as spans of images."""
        missing = self.ledger.done.missing_blocks(self.num, self.size)
        mine = [missing[place] for place in distributed.share(len(missing))]
        return Spans((first, min(first + self.size, self.num)) for first in mine).spans

    def gather(self) -> None:
        """Wait for the other ranks, and add the images that they have done."""
        for ledger in distributed.gather(self.ledger):
            self.ledger.join(ledger)

    def __enter__(self) -> "SampleFolder":
        try:
            self.opened = [array.__enter__() for array in self.arrays.values()]
        except (OSError, ValueError) as error:
            raise DigitError(f"images in {self.folder} cannot be continued ({error}): delete the folder") from error
        self.writers, self.keeper = ThreadPoolExecutor(WRITERS), ThreadPoolExecutor(1)
        return self

    def append(self, batch: SampleBatch) -> None:
        """Pass the new images of a batch to the writers, and wait for the previous one."""
        first = batch.first
        rows = [i for i in range(len(batch)) if not self.existing.covers(first + i, first + i + 1)]
        writing = [self.writers.submit(write_picture, self.picture(first + i), batch, i) for i in rows]
        self.waiting.append(self.keeper.submit(self._keep, batch, rows, writing))
        self.settle(WAITING)

    def settle(self, left: int) -> None:
        """Wait until at most `left` batches are being written. Raises a writer's error."""
        while len(self.waiting) > left:
            self.waiting.popleft().result()

    def _keep(self, batch: SampleBatch, rows: list[int], writing: list[Future]) -> None:
        """Record a batch in the journal once its new rows are on the disk; runs in a thread, one batch at a time."""
        for future in writing:
            future.result()
        for name, array in self.arrays.items():
            for i in rows:
                array.write(batch.first + i, batch.tokens[name][i : i + 1].numpy())
            array.sync()
        self.ledger.done.add(batch.first, batch.first + len(batch))
        self.ledger.save(self.folder / JOURNAL)

    def __exit__(self, kind: type | None, *_: object) -> None:
        for pool in (self.writers, self.keeper):
            pool.shutdown(wait=True, cancel_futures=kind is not None)
        for array in self.opened:
            array.__exit__()
        if kind is not None and not self.done and distributed.world_size() == 1:
            self._give_back()

    def finish(self) -> None:
        """Grid, tokens.npz and, last, samples.json. Can be interrupted and repeated."""
        assert self.done == self.num, "every image is written before the folder is finished"
        labels = self.labels.numpy().astype(np.int32)
        with atomic_path(self.folder / TOKENS) as temporary, open(temporary, "wb") as out:
            # memory-mapped, so that compression reads them from the disk piece by piece
            tokens = {name: np.load(array.path, mmap_mode="r") for name, array in sorted(self.arrays.items())}
            np.savez_compressed(out, **tokens, labels=labels)
        images = read_pictures([self.picture(i) for i in range(min(self.num, GRID_IMAGES))])
        columns = min(len(images), max(8, round(len(images) ** 0.5)))
        scale = max(1, 128 // images.shape[-1])
        plots.save_png(self.folder / GRID, plots.grid(images, columns, scale=scale))
        about = {"version": __version__, "seed": self.request["seed"], "seeds": "image i: seed + i"}
        about |= {"rounding": self.request["rounding"], "request": self.request}  # `digit evaluate` reads the rounding
        write_result(self.folder / SAMPLES, about | {"labels": labels.tolist(), "classes": list(self.names)})
        self._clean()

    def _give_back(self) -> None:
        """Remove all files of a request that completed no batch."""
        with suppress(DigitError, OSError):  # the original error matters more
            clear(self.folder)

    def _clean(self) -> None:
        """Remove the files that only an unfinished folder needs, and files that a kill left half written."""
        for name in filter(NEEDLESS.fullmatch, listed(self.folder)):
            (self.folder / name).unlink(missing_ok=True)


def num_digits(num: int) -> int:
    """Digits in the names of `num` images."""
    return max(5, len(str(num - 1)))


def read_rows(path: Path, name: str) -> np.ndarray:
    """Read tokens (num, N) from an .npy, or by name from an .npz. Raises DigitError for a missing or damaged file."""
    try:
        if path.suffix != ".npz":
            return np.load(path, allow_pickle=False)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DigitError(f"{path} cannot be read ({error}), so more images cannot be added: {OTHER_FOLDER}") from error


def write_picture(path: Path, batch: SampleBatch, row: int) -> None:
    """Write one PNG of a batch; waits for the batch's copy from a GPU."""
    plots.save_png(path, batch.images[row])


def read_pictures(paths: Sequence[Path]) -> UInt8[Tensor, "B 3 H W"]:
    """Read PNGs of one size."""
    arrays = []
    for path in paths:
        with Image.open(path) as image:
            arrays.append(np.asarray(image.convert("RGB")))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
