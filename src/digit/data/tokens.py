"""The token store: discriminative and VQ tokens of the same crops, aligned row by row, with labels.

    FOLDER/disc.npy       (R, N) uint16   discriminative tokens
    FOLDER/vq.npy         (R, M) uint16   VQ tokens of the same crops
    FOLDER/labels.npy     (R,)   int32    -1 = none
    FOLDER/manifest.json  what made them; written last, so a folder with a manifest is whole
    FOLDER/journal.json   while writing: the request, the rows that are done, the rows to drop (beside NAME.partial.npy)

A run that is killed at any moment goes on at the last journal entry, and its files end byte-identical to those of a run
that was never killed (same batch size). Row r is crop r % crops_per_image of image r // crops_per_image, less the rows
of images that could not be read.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from digit.data.rows import AGAIN, ArrayFile, copy_rows, open_array
from digit.errors import DigitError, MismatchError
from digit.files import disk_errors, plain, read_json, write_json
from digit.progress import Progress

if TYPE_CHECKING:
    import torch

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
        """Raises DigitError where the folder is missing, unfinished, of another version or holds a file cut short."""
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            if (folder / "journal.json").exists():
                raise DigitError(f"tokens in {folder} are not finished: run the same command again, it goes on")
            raise DigitError(f"{folder} holds no tokens (no manifest.json): make them first (digit tokenize ...)")
        manifest = read_json(folder / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            got = manifest.get("format") if isinstance(manifest, dict) else manifest
            raise DigitError(f"tokens in {folder} have format {got}, this version reads {FORMAT}: {AGAIN}")
        try:
            shapes = {name: (manifest["rows"], manifest[name]["length"]) for name in ("disc", "vq") if manifest[name]}
            labels = open_array(folder / "labels.npy", (manifest["rows"],), np.dtype("<i4"))
        except (KeyError, TypeError) as error:
            raise DigitError(f"{folder / 'manifest.json'} is damaged ({error!r}): {AGAIN}") from error
        arrays = {name: open_array(folder / f"{name}.npy", shape, np.dtype("<u2")) for name, shape in shapes.items()}
        return cls(folder, manifest, arrays.get("disc"), arrays.get("vq"), labels)

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
    ) -> Callable[[int], dict[str, "torch.Tensor"]]:
        """`step -> batch(...)`, a pure function of (seed, step): every epoch is a new permutation of the rows.

        The arrays in `names` are read into RAM, 2 bytes a token; absent tokens are left out. `rows` restricts it to
        some rows (all by default). A batch that reaches past an epoch's end goes on with the next epoch's permutation.
        """
        chosen = np.arange(len(self)) if rows is None else np.arange(len(self))[np.asarray(rows, dtype=np.int64)]
        if batch_size < 1 or not len(chosen):
            raise DigitError(f"batches of {batch_size} from {len(chosen)} token rows: both must be at least 1")
        held = {name: getattr(self, name) for name in names}
        arrays = {name: np.array(array) for name, array in held.items() if array is not None}
        order = _EpochOrder(len(chosen), seed)
        return lambda step: _gather(arrays, chosen[order.take(step * batch_size, batch_size)])


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

    Args:
        tokenizer, vq: discriminative and VQ tokenizer; one of them may be None.
        crops_per_image: random crops (with flips) of each image.
        indices: images of the source to take; all by default.

    Raises:
        MismatchError: the folder holds tokens of another request; names the first setting that differs, both values.
        DigitError: a vocabulary beyond 65536, too many unreadable images, a full disk (make room and run again).
    """
    from digit.data.loader import CropLoader, on_device

    writer = _Writer(Path(folder), _request(source, preprocess, tokenizer, vq, crops_per_image, seed, indices))
    if writer.finished:
        return TokenStore.open(folder)
    writer.begin()
    loader = CropLoader(
        source, preprocess, indices=indices, crops_per_image=crops_per_image, seed=seed, batch_size=batch_size,
        num_workers=num_workers, max_bad_fraction=max_bad_fraction, start_row=writer.done,
    )  # fmt: skip
    with writer, loader.sharing_cores(), Progress("tokens", writer.num_rows, done=writer.done) as bar:
        device = next((t.device for t in (tokenizer, vq) if hasattr(t, "device")), "cpu")
        for batch in on_device(loader, device):
            ok, reasons = batch.ok.numpy(), dict(loader.bad)
            keys = {index: source.key(index) for index in batch.indices[~batch.ok].tolist()}
            writer.check_bad(bad := {index: (key, reasons[key]) for index, key in keys.items()}, max_bad_fraction)
            values = {"labels": batch.labels.numpy()}
            for name, encoder in (("disc", tokenizer), ("vq", vq)):
                if encoder is not None:
                    values[name] = _encode(encoder, batch.images, ok)
            writer.append(values, ~ok, bad)
            bar.update(len(ok), bad=len(writer.bad))
    writer.finish()
    return TokenStore.open(folder)


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


@dataclass
class _Writer:
    """The files and the journal of one unfinished store. The journal only ever names rows that are on the disk."""

    folder: Path
    request: dict[str, Any]
    done: int = 0
    dropped: list[int] = field(default_factory=list)  # rows of unreadable images
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)  # image -> (key, reason)

    def __post_init__(self) -> None:
        self.num_images = self.request["source"]["num_images"]
        self.num_rows = self.num_images * self.request["crops_per_image"]
        self.journal, self.manifest = self.folder / "journal.json", self.folder / "manifest.json"
        lengths = {name: self.request[name]["length"] for name in ("disc", "vq") if self.request[name]}
        shapes = {name: ((self.num_rows, length), "<u2") for name, length in lengths.items()}
        shapes["labels"] = ((self.num_rows,), "<i4")
        self.opened: list[ArrayFile] = []
        self.saved = time.monotonic()
        self.arrays = {name: ArrayFile(self._partial(name), *shape) for name, shape in shapes.items()}

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.partial.npy"

    @property
    def finished(self) -> bool:
        """Whether the store is whole already. Raises MismatchError where it answers another request."""
        if not self.manifest.exists():
            return False
        self._compare(read_json(self.manifest))
        self._clean()
        return True

    def _compare(self, here: Any) -> None:
        known, asked = dict(_leaves(here)), dict(_leaves(self.request))
        for name in asked:
            if name != "source.name" and known.get(name) != asked[name]:  # a path as typed; the fingerprint decides
                raise MismatchError(
                    f"tokens in {self.folder} were made with {name} = {known.get(name)}, now asked for {asked[name]}: "
                    "choose another folder, or the old setting"
                )

    def begin(self) -> None:
        """Go on with the journal that is there, or allocate the files and begin one."""
        if self.journal.exists():
            journal = read_json(self.journal)
            try:
                if not isinstance(journal["request"], dict):
                    raise TypeError("request")
                self._compare(journal["request"])
                self.done, self.dropped = journal["done"], journal["dropped"]
                self.bad = {index: (key, reason) for index, key, reason in journal["bad"]}
            except (KeyError, TypeError, ValueError) as error:
                raise DigitError(f"{self.journal} is damaged ({error!r}): {AGAIN}") from error
            return
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
        self._save()

    def __enter__(self) -> "_Writer":
        if self.done < self.num_rows:
            try:
                self.opened = [array.__enter__() for array in self.arrays.values()]
            except (OSError, ValueError) as error:
                raise DigitError(f"tokens in {self.folder} cannot be continued ({error}): {AGAIN}") from error
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(DigitError, OSError):  # what ended the run matters more; the older journal is valid too
            self._save()
        for array in self.opened:
            array.__exit__()

    def check_bad(self, more: dict[int, tuple[str, str]], max_bad_fraction: float) -> None:
        """Raises DigitError where too many images are unreadable, over every run that wrote to this store."""
        bad = self.bad | more
        if bad and len(bad) > max_bad_fraction * self.num_images:
            key, reason = next(iter(bad.values()))
            raise DigitError(
                f"{len(bad)} of {self.num_images} images unreadable, more than max_bad_fraction {max_bad_fraction:g}: "
                f"see digit inspect; the first: {key} ({reason})"
            )

    def append(self, values: dict[str, np.ndarray], dropped: np.ndarray, bad: dict[int, tuple[str, str]]) -> None:
        """Write the next rows of every array; `dropped` (bool, a row each) are of the unreadable images `bad`."""
        for name, array in self.arrays.items():
            array.write(self.done, values[name])
        self.dropped += (self.done + np.flatnonzero(dropped)).tolist()
        self.bad |= bad
        self.done += len(dropped)
        if time.monotonic() - self.saved >= JOURNAL_EVERY_SECONDS or self.done == self.num_rows:
            self._save()

    def _save(self) -> None:
        """The journal, once the rows it names are on the disk."""
        for array in self.opened:
            array.sync()
        self.saved = time.monotonic()
        bad = [[index, key, reason] for index, (key, reason) in self.bad.items()]
        write_json(self.journal, {"request": self.request, "done": self.done, "dropped": self.dropped, "bad": bad})

    def finish(self) -> None:
        """Drop the unreadable rows, give the files their names, write the manifest. Can be cut short and repeated."""
        assert self.done == self.num_rows, "every row is written before the store is finished"
        keep = np.ones(self.num_rows, dtype=bool)
        keep[self.dropped] = False
        if not keep.any():
            raise DigitError(f"none of the {self.num_images} images can be read: see digit inspect")
        for name, array in self.arrays.items():
            if not (self.folder / f"{name}.npy").exists():
                copy_rows(self._partial(name), self.folder / f"{name}.npy", keep, array)
        bad = [list(entry) for entry in self.bad.values()]
        write_json(self.manifest, self.request | {"rows": int(keep.sum()), "bad": bad})
        self._clean()

    def _clean(self) -> None:
        """Remove what only an unfinished store needs."""
        for path in (self.journal, *map(self._partial, self.arrays)):
            path.unlink(missing_ok=True)
