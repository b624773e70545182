"""A folder of drawn images. A drawing that is killed at any moment goes on at the first batch that is missing.

    FOLDER/00000.png ...    image i, of seed + i
    FOLDER/grid.png         the first 256
    FOLDER/tokens.npz       disc (num, N) where there is a prior, vq (num, M), labels (num,), int32
    FOLDER/samples.json     labels, classes and the request that fixes every byte; written last: the folder is whole
    FOLDER/journal.json     while drawing: the request, and how many images are done (beside NAME.partial.npy)

Threads write the PNGs of a batch while the next one is drawn; no more than three batches are in memory. The files end
byte-identical to those of a drawing that was never killed, on the same kind of device.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from digit import __version__, pictures
from digit.data.rows import ArrayFile
from digit.drawn import Drawn
from digit.errors import DigitError, MismatchError
from digit.files import atomic_path, differences, disk_errors, plain, read_json, sha256_tensors, write_json
from digit.pipeline import DigitPipeline, SamplingConfig

GRID_IMAGES = 256  # the first so many go into grid.png
WRITERS = min(8, os.cpu_count() or 1)  # threads; compressing a PNG of 256 px takes 10 ms of one core
WAITING = 1  # batches that may be in the writers' hands while another is drawn
GRID, TOKENS, SAMPLES, JOURNAL = "grid.png", "tokens.npz", "samples.json", "journal.json"
OURS = re.compile(r"\d{5,}\.png|grid\.png|tokens\.npz|samples\.json|journal\.json|(disc|vq)\.partial\.npy")
LEFT_BY_A_KILL = re.compile(rf"\.({OURS.pattern})\..+")  # what `atomic_path` had not renamed yet
SHOWN_DIGITS, SHOWN_LETTERS = 12, 60  # of a hash, of any other value in a message
OTHER_FOLDER = "choose another --out"


def sample(
    pipe: DigitPipeline,
    folder: str | Path,
    num: int | None = None,
    labels: Sequence[int] | int | None = None,
    seed: int = 0,
    *,
    overwrite: bool = False,
    **sampling: Any,
) -> list[Path]:
    """Draw images into a folder, or go on where the same drawing stopped; returns the files of the images.

    Args:
        num, labels, seed, sampling: as for `DigitPipeline.stream`. Without a batch size a drawing goes on with the one
            that it began with.
        overwrite: replace the images of another request; otherwise they are refused.

    Raises:
        MismatchError: the folder holds images of another request; names the setting and both values.
        DigitError: a setting out of range, other images in the folder, a full disk (make room and run again).
    """
    folder, classes = Path(folder), pipe.labels(num, labels)
    cfg = pipe.settings(**sampling)
    try:
        there = recorded(folder)
        if there is not None and cfg.batch_size is None:
            cfg = replace(cfg, batch_size=there.get("batch_size"))
        cfg = pipe.sized(cfg)
        request = describe_request(pipe, len(classes), labels, seed, cfg)
        if there is not None:
            refuse_other(folder, there, request)
    except DigitError:
        if not overwrite:
            raise
        void(folder)
        cfg = pipe.sized(pipe.settings(**sampling))
        request = describe_request(pipe, len(classes), labels, seed, cfg)
    lengths = {"vq": pipe.renderer.cfg.target_len}
    if pipe.renderer.cfg.prefix_len:
        lengths["disc"] = pipe.renderer.cfg.prefix_len
    names = [pipe.classes[k] if 0 <= k < len(pipe.classes) else None for k in classes.tolist()]
    whole = SampleFolder(folder, request, lengths, classes, names)
    write_samples(whole, lambda start: pipe.stream(num, labels, seed, start, **vars(cfg)))
    return [whole.picture(i) for i in range(whole.num)]


def write_samples(whole: "SampleFolder", draw: Callable[[int], Iterator[Drawn]]) -> None:
    """Write what is missing of a folder; `draw(start)` gives the batches from image `start` on."""
    if whole.finished:
        return
    whole.begin()
    if whole.done < whole.num:
        with whole, closing(draw(whole.done)) as batches:
            for batch in batches:
                whole.append(batch)
            whole.settle(0)
    whole.finish()


# -------------------------------------------------------------------- request


def describe_request(
    pipe: DigitPipeline, num: int, labels: Sequence[int] | int | None, seed: int, cfg: SamplingConfig
) -> dict[str, Any]:
    """Everything that decides the images, as JSON has it. Two requests are the same if these are."""
    models = {"renderer": pipe.renderer} | ({"prior": pipe.prior} if pipe.renderer.cfg.prefix_len else {})
    weights = {name: sha256_tensors(model.state_dict()) for name, model in models.items()}
    if labels is not None:
        labels = [labels] if isinstance(labels, int) else [int(k) for k in labels]
    return plain(
        {
            "num": num,
            "seed": seed,
            "labels": "every class in turn" if labels is None else labels,
            "batch_size": cfg.batch_size,
            "precision": cfg.precision,
            **{name: asdict(getattr(cfg, name)) for name in models},
            "weights": weights | {"vqgan": pipe.vq.fingerprint},
            "rounding": pipe.vq.rounding,
            "device": pipe.device.type,
        }
    )


def recorded(folder: Path) -> dict[str, Any] | None:
    """The request whose images lie in a folder; None where there are none. Raises DigitError for foreign images."""
    for name in (SAMPLES, JOURNAL):
        if not (folder / name).exists():
            continue
        about = read_json(folder / name)
        if not isinstance(about, dict) or not isinstance(about.get("request"), dict):
            raise DigitError(f"{folder / name} names no request (an older version wrote it): {OTHER_FOLDER}")
        return about["request"] if about.get("done") != 0 else None  # nothing done yet: another request may begin
    foreign = [name for name in listed(folder) if OURS.fullmatch(name)]
    if foreign:
        raise DigitError(f"{folder} holds {min(foreign)} but no {SAMPLES}: {OTHER_FOLDER}")
    return None


def refuse_other(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise MismatchError that names a setting with both values where two requests differ."""
    for name, here, wanted in differences(there, asked):
        raise MismatchError(
            f"{folder} holds images drawn with {name} = {shown(here)}, now asked for {shown(wanted)}: "
            f"{OTHER_FOLDER}, or the old setting"
        )


def shown(value: Any) -> str:
    """A value in a message: hashes and long lists cut short."""
    text = str(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:SHOWN_DIGITS]
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]} ..."


def listed(folder: Path) -> list[str]:
    """Names in a folder; none where it does not exist."""
    return os.listdir(folder) if folder.is_dir() else []


def void(folder: Path) -> None:
    """Declare that a folder holds nothing that counts: whatever comes in between, the next drawing may begin."""
    write_json(folder / JOURNAL, {"request": {}, "done": 0})
    (folder / SAMPLES).unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove what a drawing wrote, the journal last."""
    void(folder)
    for name in listed(folder):
        if name != JOURNAL and (OURS.fullmatch(name) or LEFT_BY_A_KILL.fullmatch(name)):
            (folder / name).unlink(missing_ok=True)
    (folder / JOURNAL).unlink(missing_ok=True)


# -------------------------------------------------------------------- files


class SampleFolder:
    """Files and journal of one drawing. The journal only ever names images whose files are on the disk.

    Attributes:
        done: images that are on the disk, a multiple of the batch size, or all.
    """

    def __init__(
        self,
        folder: Path,
        request: dict[str, Any],
        lengths: dict[str, int],
        labels: Tensor,
        names: Sequence[str | None],
    ):
        """`request` has num, seed, batch_size and rounding at least; `lengths` are tokens an image by kind; `labels`
        (num,) and their `names` go into samples.json."""
        self.folder, self.request, self.labels, self.names = folder, request, labels, names
        self.num, self.done = request["num"], 0
        paths = {name: folder / f"{name}.partial.npy" for name in lengths}
        self.arrays = {name: ArrayFile(path, (self.num, lengths[name]), "<i4") for name, path in paths.items()}
        self.opened: list[ArrayFile] = []
        self.waiting: deque[Future] = deque()  # one a batch in the writers' hands

    def picture(self, index: int) -> Path:
        """The file of an image; names sort as numbers do."""
        return self.folder / f"{index:0{max(5, len(str(self.num - 1)))}d}.png"

    @property
    def finished(self) -> bool:
        """Whether every file is there already."""
        if not (self.folder / SAMPLES).exists():
            return False
        wanted = {GRID, TOKENS, *(self.picture(i).name for i in range(self.num))}
        if not wanted <= set(listed(self.folder)):
            return False  # some were deleted since: they are drawn again
        self._clean()
        return True

    def begin(self) -> None:
        """Go on with the journal that is there, or begin one; raises DigitError now where the disk is too full."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        journal = self.folder / JOURNAL
        if journal.exists() and (done := read_json(journal).get("done")):
            names = set(listed(self.folder))
            missing = (i for i in range(done) if self.picture(i).name not in names)
            first, size = next(missing, done), self.request["batch_size"]
            self.done = first if first == self.num else first // size * size
            return
        clear(self.folder)
        self._save()
        try:
            for array in self.arrays.values():
                array.allocate()
        except DigitError:
            self._give_back()
            raise

    def __enter__(self) -> "SampleFolder":
        try:
            self.opened = [array.__enter__() for array in self.arrays.values()]
        except (OSError, ValueError) as error:
            raise DigitError(f"images in {self.folder} cannot be continued ({error}): delete the folder") from error
        self.writers, self.keeper = ThreadPoolExecutor(WRITERS), ThreadPoolExecutor(1)
        return self

    def append(self, batch: Drawn) -> None:
        """Hand a batch to the writers, and wait for the one before."""
        paths = [self.picture(batch.first + i) for i in range(len(batch))]
        writing = [self.writers.submit(write_picture, path, batch, i) for i, path in enumerate(paths)]
        self.waiting.append(self.keeper.submit(self._keep, batch, writing))
        self.settle(WAITING)

    def settle(self, left: int) -> None:
        """Wait until at most `left` batches are in the writers' hands. Raises what stopped a writer."""
        while len(self.waiting) > left:
            self.waiting.popleft().result()

    def _keep(self, batch: Drawn, writing: list[Future]) -> None:
        """Enter a batch into the journal as soon as it is on the disk; one after another, in a thread of its own."""
        for future in writing:
            future.result()
        if batch.first != self.done:
            return  # the batch before failed
        for name, array in self.arrays.items():
            array.write(batch.first, batch.tokens[name].numpy())
            array.sync()
        self.done = batch.first + len(batch)
        self._save()

    def _save(self) -> None:
        write_json(self.folder / JOURNAL, {"request": self.request, "done": self.done})

    def __exit__(self, kind: type | None, *_: object) -> None:
        for pool in (self.writers, self.keeper):
            pool.shutdown(wait=True, cancel_futures=kind is not None)
        for array in self.opened:
            array.__exit__()
        if kind is not None and not self.done:
            self._give_back()

    def finish(self) -> None:
        """Grid, tokens.npz and, last, samples.json. Can be cut short and repeated."""
        assert self.done == self.num, "every image is written before the folder is finished"
        labels = self.labels.numpy().astype(np.int32)
        with atomic_path(self.folder / TOKENS) as temporary, open(temporary, "wb") as out:
            # mapped, so that they are compressed from the disk piece by piece
            tokens = {name: np.load(array.path, mmap_mode="r") for name, array in sorted(self.arrays.items())}
            np.savez_compressed(out, **tokens, labels=labels)
        images = read_pictures([self.picture(i) for i in range(min(self.num, GRID_IMAGES))])
        columns = min(len(images), max(8, round(len(images) ** 0.5)))
        scale = max(1, 128 // images.shape[-1])
        pictures.save_png(self.folder / GRID, pictures.grid(images, columns, scale=scale))
        about = {"version": __version__, "seed": self.request["seed"], "seeds": "image i: seed + i"}
        about |= {"rounding": self.request["rounding"], "request": self.request}  # `digit evaluate` reads the rounding
        write_json(self.folder / SAMPLES, about | {"labels": labels.tolist(), "classes": list(self.names)})
        self._clean()

    def _give_back(self) -> None:
        """Leave nothing of a drawing that never got as far as one batch."""
        with suppress(DigitError, OSError):  # what ended it matters more
            clear(self.folder)

    def _clean(self) -> None:
        """Remove what only an unfinished folder needs, and what a kill left half written."""
        for name in listed(self.folder):
            if name == JOURNAL or name.endswith(".partial.npy") or LEFT_BY_A_KILL.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)


def write_picture(path: Path, batch: Drawn, row: int) -> None:
    """One PNG of a batch; waits for the batch where it is still on its way from a GPU."""
    pictures.save_png(path, batch.images[row])


def read_pictures(paths: Sequence[Path]) -> Tensor:
    """PNGs of one size -> (B, 3, H, W) uint8."""
    arrays = []
    for path in paths:
        with Image.open(path) as image:
            arrays.append(np.asarray(image.convert("RGB")))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
