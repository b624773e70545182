"""The token store: discriminative and VQ tokens of the same crops, aligned row by row, with labels.

    FOLDER/disc.npy       (R, N) uint16   discriminative tokens
    FOLDER/vq.npy         (R, M) uint16   VQ tokens of the same crops
    FOLDER/labels.npy     (R,)   int32    -1 = none
    FOLDER/manifest.json  what made them; written last, so a folder with a manifest is whole
    FOLDER/journal.json   while writing: the request, the rows that are done, the rows to drop (beside NAME.partial.npy)

Several ranks (torchrun) write their rows into the same files, on a file system that all of them see. A run that is
killed at any moment goes on at the last journal entries, on any number of ranks, and its files end byte-identical to
those of one rank that was never killed (same batch size, same kind of device). Row r is crop r % crops_per_image of
image r // crops_per_image, less the rows of images that could not be read.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from digit import ranks
from digit.data.rows import AGAIN, ArrayFile, check_range, copy_rows, crc32_file, open_array
from digit.errors import DigitError, MismatchError, Stopped
from digit.files import disk_errors, plain, read_json, remove_leftovers, write_json
from digit.ledger import Ledger, Spans, collect, discard
from digit.progress import Progress
from digit.settings import from_json
from digit.stop import StopSignals

if TYPE_CHECKING:
    import torch

    from digit.data.loader import CropBatch, CropLoader
    from digit.data.preprocess import PreprocessConfig
    from digit.data.source import ImageSource

FORMAT = 1
MAX_VOCAB = 65536  # uint16
JOURNAL_EVERY_SECONDS = 5.0  # at most this much work is done twice after a kill


class Tokenizer(Protocol):
    """What of an ImageTokenizer is needed here; see digit.tokenizers.base."""

    vocab_size: int
    grid: tuple[int, int]
    fingerprint: str

    def encode(self, images: "torch.Tensor") -> "torch.Tensor": ...


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What a manifest says of one kind of tokens."""

    grid: tuple[int, int]
    length: int
    vocab_size: int

    def __post_init__(self) -> None:
        if math.prod(self.grid) != self.length or min(self.grid) < 1 or not 1 <= self.vocab_size <= MAX_VOCAB:
            raise DigitError(f"{self.length} tokens of {self.vocab_size} on a grid of {self.grid} cannot be: {AGAIN}")


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What a manifest says of the images."""

    name: str
    fingerprint: str
    num_images: int
    subset: str | None


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """What of a manifest says how the arrays look."""

    rows: int
    disc: _Layout | None
    vq: _Layout | None
    classes: list
    source: _Source
    crc32: dict | None = None
    """CRC-32 of each array's file; stores from before there was one have none."""

    def __post_init__(self) -> None:
        if self.rows < 1 or not all(isinstance(name, str) for name in self.classes):
            raise DigitError(f"{self.rows} rows and {len(self.classes)} classes cannot be: {AGAIN}")

    def open(self, folder: Path) -> dict[str, np.ndarray | None]:
        """The arrays, mapped and verified. Raises DigitError naming the file that is damaged."""
        layouts = {"disc": self.disc, "vq": self.vq}
        arrays: dict[str, np.ndarray | None] = dict.fromkeys(layouts)
        expected = {
            n: ((self.rows, of.length), "<u2", 0, of.vocab_size - 1, "tokens") for n, of in layouts.items() if of
        }
        expected["labels"] = ((self.rows,), "<i4", -1, len(self.classes) - 1, "labels")
        for name, (shape, dtype, low, high, what) in expected.items():
            path = folder / f"{name}.npy"
            arrays[name] = open_array(path, shape, np.dtype(dtype))
            check_range(path, arrays[name], low, high, what)
            if self.crc32 is not None and self.crc32.get(name) != (found := crc32_file(path)):
                raise DigitError(
                    f"{path} has CRC-32 {found}, its manifest {self.crc32.get(name)}: bits flipped; {AGAIN}"
                )
        return arrays


@dataclass
class TokenStore:
    """Finished tokens, memory-mapped: `disc` (R, N) and `vq` (R, M) uint16, `labels` (R,) int32, `manifest`."""

    folder: Path
    manifest: dict[str, Any]
    disc: np.ndarray | None
    vq: np.ndarray | None
    labels: np.ndarray

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        """Reads every file once, to see that it is whole and that every token is in its vocabulary.

        Raises DigitError where the folder is missing, unfinished, of another version, or a file is damaged.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            if (folder / "journal.json").exists():
                raise DigitError(f"tokens in {folder} are not finished: run the same command again, it goes on")
            raise DigitError(f"{folder} holds no tokens (no manifest.json): make them first (digit tokenize ...)")
        manifest = read_json(folder / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            got = manifest.get("format") if isinstance(manifest, dict) else manifest
            raise DigitError(f"tokens in {folder} have format {got}, this version reads {FORMAT}: {AGAIN}")
        names = [field.name for field in fields(_Contents)]
        stated = {name: manifest[name] for name in names if name in manifest}
        return cls(folder, manifest, **from_json(_Contents, stated, str(folder / "manifest.json")).open(folder))

    def __len__(self) -> int:
        return len(self.labels)

    def check(self, *, codebook_hash: str | None = None, vqgan_hash: str | None = None) -> None:
        """Refuse a model of other tokens: MismatchError that names both values.

        `codebook_hash` is the codebook's fingerprint, or the whole tokenizer's (encoder and codebook); None skips.
        """
        keys = {"codebook": ("tokenizer_hash", "codebook_hash"), "VQGAN": ("vqgan_hash",)}
        for what, asked in (("codebook", codebook_hash), ("VQGAN", vqgan_hash)):
            here = [self.manifest.get(key) for key in keys[what]]
            if asked is not None and asked not in here:
                raise MismatchError(
                    f"tokens in {self.folder} were made with {what} {_short(here[0])}, asked for {_short(asked)}: "
                    f"give that {what}, or other tokens (digit tokenize ...)"
                )

    def batch(self, rows: Sequence[int] | np.ndarray | slice) -> dict[str, "torch.Tensor"]:
        """{"disc": (B, N), "vq": (B, M), "labels": (B,)} int64 of the given rows; absent tokens are left out."""
        rows = np.arange(len(self))[rows if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)]
        held = {"disc": self.disc, "vq": self.vq, "labels": self.labels}
        return _gather({name: array for name, array in held.items() if array is not None}, rows)

    def batches(
        self,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | np.ndarray | None = None,
        names: Sequence[str] = ("disc", "vq", "labels"),
    ) -> "TokenBatches":
        """`step -> batch(...)`, a pure function of (seed, step): every epoch is a new permutation of the rows.

        The arrays in `names` are read into RAM, 2 bytes a token; absent tokens are left out. `rows` restricts it to
        some rows (all by default). A batch that reaches past an epoch's end goes on with the next epoch's permutation.
        """
        chosen = np.arange(len(self)) if rows is None else np.arange(len(self))[np.asarray(rows, dtype=np.int64)]
        if batch_size < 1 or not len(chosen):
            raise DigitError(f"batches of {batch_size} from {len(chosen)} token rows: both must be at least 1")
        held = {name: getattr(self, name) for name in names}
        arrays = {name: np.array(array) for name, array in held.items() if array is not None}
        return TokenBatches(arrays, chosen, batch_size, seed)


class TokenBatches:
    """`batches(step)` -> tokens and labels of one batch; `batches.rows(step)` -> the rows of the store it holds."""

    def __init__(self, arrays: dict[str, np.ndarray], chosen: np.ndarray, batch_size: int, seed: int):
        self.arrays, self.chosen, self.batch_size = arrays, chosen, batch_size
        self.order = _EpochOrder(len(chosen), seed)

    def __call__(self, step: int) -> dict[str, "torch.Tensor"]:
        return _gather(self.arrays, self.rows(step))

    def rows(self, step: int) -> np.ndarray:
        """(batch_size,) int64."""
        return self.chosen[self.order.take(step * self.batch_size, self.batch_size)]


class _EpochOrder:
    """Positions along an endless row of permutations, epoch e's drawn from (seed, e) alone."""

    def __init__(self, num: int, seed: int):
        self.num, self.seed = num, seed
        self._cached: tuple[int, np.ndarray] | None = None

    def take(self, start: int, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            epoch, place = divmod(start, self.num)
            parts.append(self._permutation(epoch)[place : place + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = epoch, np.random.default_rng([self.seed & (2**64 - 1), epoch]).permutation(self.num)
        return self._cached[1]


def _gather(arrays: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, "torch.Tensor"]:
    """New int64 tensors of these rows. numpy's take and torch's conversion are the fastest at both."""
    import torch

    return {name: torch.from_numpy(array.take(rows, axis=0)).long() for name, array in arrays.items()}


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)


def write_tokens(
    folder: str | Path,
    source: "ImageSource",
    preprocess: "PreprocessConfig",
    tokenizer: Tokenizer | None,
    vq: Tokenizer | None,
    *,
    crops_per_image: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | np.ndarray | None = None,
    num_workers: int | None = None,
    max_bad_fraction: float = 0.01,
) -> TokenStore:
    """One pass over the images: both kinds of tokens of the same crops. Goes on where an interrupted run stopped.

    Every rank of a job calls this alike and makes its share of the batches.

    Args:
        tokenizer, vq: discriminative and VQ tokenizer; one of them may be None.
        crops_per_image: random crops (with flips) of each image.
        indices: images of the source to take; all by default.

    Raises:
        MismatchError: the folder holds tokens of another request; names the first setting that differs, both values.
        DigitError: a vocabulary beyond 65536, too many unreadable images, a full disk (make room and run again).
        Stopped: a signal asked for it; what is done is saved.
    """
    from digit.data.loader import CropLoader

    writer = _Writer(Path(folder), _request(source, preprocess, tokenizer, vq, crops_per_image, seed, indices))
    if not writer.begin():
        return TokenStore.open(folder)
    blocks = writer.ledger.done.missing_blocks(writer.num_rows, batch_size)  # the same on every rank
    mine = [blocks[place] for place in ranks.share(len(blocks))]
    crops = partial(
        CropLoader, source, preprocess, indices=indices, crops_per_image=crops_per_image, seed=seed,
        batch_size=batch_size, num_workers=num_workers, max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    device = next((t.device for t in (tokenizer, vq) if hasattr(t, "device")), "cpu")
    done = len(writer.ledger.done)
    left = sum(min(batch_size, writer.num_rows - row) for row in mine)
    with StopSignals() as signals, writer, Progress("tokens", done + left, done) as bar:
        for row, batch, reasons in _batches(crops, mine, batch_size, device):
            ok = batch.ok.numpy()
            bad: dict[str, Any] = {}
            for place in np.flatnonzero(~ok).tolist():
                key = source.key(index := int(batch.indices[place]))
                bad.setdefault(str(index), [row + place, key, reasons[key]])
            writer.check_bad(bad, max_bad_fraction)
            values = {"labels": batch.labels.numpy()}
            for name, encoder in (("disc", tokenizer), ("vq", vq)):
                if encoder is not None:
                    values[name] = _encode(encoder, batch.images, ok)
            writer.write(row, values, ~ok, bad)
            bar.update(len(ok), bad=len(writer.ledger.notes))
            if signals.asked:
                break
    writer.finish(signals.asked, max_bad_fraction)
    return TokenStore.open(folder)


def _batches(
    crops: "Callable[..., CropLoader]", starts: list[int], batch_size: int, device: "str | torch.device"
) -> "Iterator[tuple[int, CropBatch, dict[str, str]]]":
    """(first row, batch, {key: reason} of the bad images so far) for each of the batches that begin at `starts`."""
    from digit.data.loader import on_device

    for first, count in _stretches(starts, batch_size):
        loader = crops(start_row=first)
        with loader.sharing_cores():
            rows = itertools.count(first, batch_size)
            for row, batch in zip(rows, on_device(itertools.islice(loader, count), device), strict=False):
                yield row, batch, dict(loader.bad)


def _stretches(starts: list[int], size: int) -> Iterator[tuple[int, int]]:
    """[0, 4, 8, 20, 24] in steps of 4 -> (0, 3), (20, 2)."""
    for _, group in itertools.groupby(enumerate(starts), lambda entry: entry[1] - entry[0] * size):
        members = [start for _, start in group]
        yield members[0], len(members)


def _encode(tokenizer: Tokenizer, images: "torch.Tensor", ok: np.ndarray) -> np.ndarray:
    """(B, N) int64; rows of unreadable images are 0."""
    length = int(np.prod(tokenizer.grid))
    tokens = np.zeros((len(ok), length), dtype=np.int64)
    if ok.any():
        tokens[ok] = tokenizer.encode(images if ok.all() else images[ok]).cpu().numpy().reshape(int(ok.sum()), -1)
    assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size, "a tokenizer gave a token outside its vocabulary"
    return tokens


def _request(
    source: "ImageSource",
    preprocess: "PreprocessConfig",
    tokenizer: Tokenizer | None,
    vq: Tokenizer | None,
    crops_per_image: int,
    seed: int,
    indices: Sequence[int] | np.ndarray | None,
) -> dict[str, Any]:
    """Everything that decides the tokens: the manifest without its results. Two requests are the same if these are."""
    if tokenizer is None and vq is None:
        raise DigitError("no tokenizer was given: the store needs a discriminative tokenizer, a VQ tokenizer or both")
    images = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    if not len(images) or crops_per_image < 1:
        raise DigitError(f"{len(images)} images with {crops_per_image} crops each: both must be at least 1")
    subset = None if indices is None else hashlib.sha256(images.astype("<i8").tobytes()).hexdigest()
    described = {"encoder": None, "encoder_hash": None, "layer": None, "codebook_hash": None, "tokenizer_hash": None}
    if tokenizer is not None:
        own = tokenizer.describe() if hasattr(tokenizer, "describe") else {}
        described |= {"codebook_hash": tokenizer.fingerprint, "tokenizer_hash": tokenizer.fingerprint} | own
    request = {"format": FORMAT} | described | {
        "vqgan_hash": None if vq is None else vq.fingerprint,
        "preprocessing": asdict(preprocess),
        "source": {"name": source.name, "fingerprint": source.fingerprint, "num_images": len(images), "subset": subset},
        "crops_per_image": crops_per_image,
        "seed": seed,
        "disc": _layout(tokenizer),
        "vq": _layout(vq),
        "classes": list(source.classes),
    }  # fmt: skip
    return plain(request)


def _layout(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    if tokenizer.vocab_size > MAX_VOCAB:
        raise DigitError(f"a vocabulary of {tokenizer.vocab_size} does not fit the token store: {MAX_VOCAB} at most")
    return {"grid": list(tokenizer.grid), "length": int(np.prod(tokenizer.grid)), "vocab_size": tokenizer.vocab_size}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _leaves(entry, f"{name}.{key}" if name else key)
    else:
        yield name, value


class _Writer:
    """The files of one unfinished store and what is known of them. A journal only ever names rows that are on the disk.

    Every rank writes its own rows of the same files and its own journal; rank 0 allocates and finishes.
    """

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self.folder, self.request = folder, request
        self.num_images = request["source"]["num_images"]
        self.num_rows = self.num_images * request["crops_per_image"]
        self.journal, self.manifest = folder / "journal.json", folder / "manifest.json"
        self.ledger = Ledger(request, self.num_rows)  # notes: image -> [row, key, reason] of those that are unreadable
        lengths = {name: request[name]["length"] for name in ("disc", "vq") if request[name]}
        shapes = {name: ((self.num_rows, length), "<u2") for name, length in lengths.items()}
        shapes["labels"] = ((self.num_rows,), "<i4")
        self.opened: list[ArrayFile] = []
        self.saved = time.monotonic()
        self.arrays = {name: ArrayFile(self._partial(name), *shape) for name, shape in shapes.items()}

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.partial.npy"

    def begin(self) -> bool:
        """Whether anything is left to do. Raises MismatchError where the folder, or another rank, has another request.

        Only rank 0 looks: a shared file system may remember for a while that a file was not there.
        """
        there = ranks.on_main(self._open_or_allocate)
        if there is None:
            return False
        self._compare(there.request)
        self.ledger = Ledger(self.request, self.num_rows, there.done, there.dropped, there.notes)
        return True

    def _open_or_allocate(self) -> Ledger | None:
        """What is done so far; None where the store is whole already."""
        remove_leftovers(self.folder)
        if self.manifest.exists():
            self._compare(read_json(self.manifest))
            self._clean()
            return None
        try:
            ledger = collect(self.journal, self.num_rows)
        except (TypeError, ValueError) as error:
            raise DigitError(f"{self.journal} is damaged ({error!r}): {AGAIN}") from error
        if ledger is not None:
            return ledger
        foreign = [f"{name}.npy" for name in self.arrays if (self.folder / f"{name}.npy").exists()]
        if foreign:
            raise DigitError(f"{self.folder} holds {foreign[0]} but no manifest.json: choose another folder")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for array in self.arrays.values():
                array.allocate()
        except DigitError:
            self._clean()  # give the disk back what could not be used
            raise
        self.ledger.save(self.journal)
        return self.ledger

    def _compare(self, here: Any) -> None:
        known, asked = dict(_leaves(here)), dict(_leaves(self.request))
        for name in asked:
            if name != "source.name" and known.get(name) != asked[name]:  # a path as typed; the fingerprint decides
                raise MismatchError(
                    f"tokens in {self.folder} were made with {name} = {known.get(name)}, now asked for {asked[name]}: "
                    "choose another folder, or the old setting"
                )

    def __enter__(self) -> "_Writer":
        if not self.ledger.complete:
            try:
                self.opened = [array.__enter__() for array in self.arrays.values()]
            except (OSError, ValueError) as error:
                where = "" if ranks.is_main() else f" on rank {ranks.rank()}, which has to see the folder of rank 0"
                raise DigitError(f"tokens in {self.folder} cannot be continued{where} ({error}): {AGAIN}") from error
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            # what ended the run matters more than a journal that cannot be saved: the older one is valid too
            with suppress(*(() if kind is None else (DigitError, OSError))):
                self._save()
        finally:
            for array in self.opened:
                array.__exit__()

    def check_bad(self, more: dict[str, Any], max_bad_fraction: float) -> None:
        """Raises DigitError where too many images are unreadable, over every run that wrote to this store."""
        bad = self.ledger.notes | more
        if bad and len(bad) > max_bad_fraction * self.num_images:
            _, key, reason = min(bad.values())
            raise DigitError(
                f"{len(bad)} of {self.num_images} images unreadable, more than max_bad_fraction {max_bad_fraction:g}: "
                f"see digit inspect; the first: {key} ({reason})"
            )

    def write(self, row: int, values: dict[str, np.ndarray], dropped: np.ndarray, bad: dict[str, Any]) -> None:
        """Write rows from `row` on of every array; `dropped` (bool, a row each) are of the unreadable images `bad`."""
        for name, array in self.arrays.items():
            array.write(row, values[name])
        dropped_rows = Spans((row + int(place), row + int(place) + 1) for place in np.flatnonzero(dropped))
        rows = Spans([(row, row + len(dropped))])
        self.ledger.join(Ledger(self.request, self.num_rows, rows, dropped_rows, bad))
        if time.monotonic() - self.saved >= JOURNAL_EVERY_SECONDS:
            self._save()

    def _save(self) -> None:
        """The journal, once the rows it names are on the disk."""
        for array in self.opened:
            array.sync()
        self.saved = time.monotonic()
        self.ledger.save(self.journal)

    def finish(self, asked_to_stop: bool, max_bad_fraction: float) -> None:
        """What every rank does once its rows are on the disk. Raises Stopped where any of them was asked to stop."""
        everyone = ranks.gather((self.ledger, asked_to_stop))
        for ledger, _ in everyone:
            self.ledger.join(ledger)
        if any(asked for _, asked in everyone):
            raise Stopped(f"tokens: {len(self.ledger.done)} of {self.num_rows} rows are done")
        self.check_bad({}, max_bad_fraction)
        ranks.on_main(self._finish)

    def _finish(self) -> None:
        """Drop the unreadable rows, give the files their names, write the manifest. Can be cut short and repeated."""
        assert self.ledger.complete, "every row is written before the store is finished"
        keep = np.ones(self.num_rows, dtype=bool)
        keep[list(self.ledger.dropped)] = False
        if not keep.any():
            raise DigitError(f"none of the {self.num_images} images can be read: see digit inspect")
        for name, array in self.arrays.items():
            if not (self.folder / f"{name}.npy").exists():
                copy_rows(self._partial(name), self.folder / f"{name}.npy", keep, array)
        bad = [[key, reason] for _, key, reason in sorted(self.ledger.notes.values())]
        crc32 = {name: crc32_file(self.folder / f"{name}.npy") for name in self.arrays}
        write_json(self.manifest, self.request | {"rows": int(keep.sum()), "bad": bad, "crc32": crc32})
        self._clean()

    def _clean(self) -> None:
        """Remove what only an unfinished store needs."""
        for path in map(self._partial, self.arrays):
            path.unlink(missing_ok=True)
        discard(self.journal)
