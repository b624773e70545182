"""Writes a token store: both kinds of tokens of the same image crops, on one or several ranks.

    FOLDER/journal.json      while writing: the request, the rows that are done, the rows to drop
    FOLDER/NAME.partial.npy  while writing: the arrays, in full length; tokens beyond `shard_bytes` in several files

Several ranks (torchrun) write their rows into the same files, on a file system that all of them see. A run that is
killed at any moment resumes at the last journal entry, on any number of ranks. The finished files are byte-identical
to those of an uninterrupted run on one rank (same batch size, same kind of device). Row r is crop r % crops_per_image
of image r // crops_per_image; the rows of unreadable images are left out.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from digit.data.rows import AGAIN, ArrayFiles, copy_rows, crc32_files, shard_stems
from digit.data.taken_tokens import TakenTokens
from digit.data.tokens import FORMAT, MAX_VOCAB, TokenStore, check_format
from digit.errors import DigitError, Stopped
from digit.runtime import distributed
from digit.runtime.files import as_path, disk_errors, plain, read_json, remove_leftovers, write_json
from digit.runtime.ledger import Ledger, Spans, collect, discard
from digit.runtime.progress import Progress
from digit.runtime.request import require_same_request
from digit.runtime.signals import StopSignals

if TYPE_CHECKING:
    import torch

    from digit.data.loader import CropBatch, CropLoader
    from digit.data.preprocess import PreprocessConfig
    from digit.data.source import ImageSource
    from digit.models.tokenizer import ImageTokenizer

JOURNAL_EVERY_SECONDS = 5.0  # a killed run repeats at most this much work
SHARD_BYTES = 2**32  # of one file of tokens


def write_tokens(
    folder: str | Path,
    source: "ImageSource",
    preprocess: "PreprocessConfig",
    tokenizer: "ImageTokenizer | None",
    vq: "ImageTokenizer | None",
    *,
    crops_per_image: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | np.ndarray | None = None,
    num_workers: int | None = None,
    max_bad_fraction: float = 0.01,
    shard_bytes: int = SHARD_BYTES,
    vq_tokens: str | Path | None = None,
) -> TokenStore:
    """Tokenizes every crop in one pass over the images, resuming an interrupted run.

    Every rank of a job makes the same call and processes its share of the batches.

    Args:
        tokenizer, vq: discriminative and VQ tokenizer; one of them may be None.
        crops_per_image: random crops (with flips) of each image.
        indices: images of the source to use; all by default.
        shard_bytes: about the most bytes in one file of tokens. A run is resumed with the value that it began with; a
            finished store opens whatever the value.
        vq_tokens: folder of a finished store of the same crops and the same VQGAN. Its VQ tokens are taken, as hard
            links where that is possible, and only the discriminative tokens are made. Images that could not be read
            for that store are left out here too. A finished store in `folder` is opened without looking there.

    Raises:
        MismatchError: the folder holds tokens made with other settings, or `vq_tokens` holds those of other crops or of
            another VQGAN; names the first setting that differs, and both values.
        DigitError: a vocabulary beyond 65536, too many unreadable images, a full disk (free some space and run again).
        Stopped: a signal asked the run to stop; the finished rows are saved.
    """
    from digit.data.loader import CropLoader

    request = _request(source, preprocess, tokenizer, vq, crops_per_image, seed, indices)
    request |= _sharding(request, shard_bytes)
    finished = distributed.on_main((as_path(folder) / "manifest.json").is_file)  # then nothing is taken
    taken = None if vq_tokens is None or finished else TakenTokens(TokenStore.open(vq_tokens), request)
    writer = _Writer(as_path(folder), request, taken)
    if not writer.begin():
        return TokenStore.open(folder)
    if taken is not None:
        writer.leave_out(taken.unreadable(source, indices))
        vq = None
    blocks = writer.ledger.done.missing_blocks(writer.num_rows, batch_size)  # the same on every rank
    starts = [blocks[place] for place in distributed.share(len(blocks))]  # of this rank's batches
    crops = partial(
        CropLoader, source, preprocess, indices=indices, crops_per_image=crops_per_image, seed=seed,
        batch_size=batch_size, num_workers=num_workers, max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    device: Any = next((d for t in (tokenizer, vq) if (d := getattr(t, "device", None)) is not None), "cpu")
    done = len(writer.ledger.done)
    remaining = sum(min(batch_size, writer.num_rows - row) for row in starts)
    with StopSignals() as signals, writer, Progress("tokens", done + remaining, done) as bar:
        for row, batch, reasons in _batches(crops, starts, batch_size, device):
            ok = batch.ok.numpy()
            bad: dict[str, Any] = {}
            for place in np.flatnonzero(~ok).tolist():
                key = source.key(index := int(batch.indices[place]))
                bad.setdefault(str(index), [row + place, key, reasons[key]])
            writer.check_bad(bad, max_bad_fraction)
            values = {"labels": batch.labels.numpy()}
            for name, encoder in (("discriminative", tokenizer), ("vq", vq)):
                if encoder is not None:
                    values[name] = _encode(encoder, batch.images, ok)
            writer.write(row, values, ~ok, bad)
            bar.update(len(ok), broken=len(writer.ledger.notes))
            if signals.asked:
                break
    writer.finish(signals.asked, max_bad_fraction)
    return TokenStore.open(folder)


def _batches(
    crops: "Callable[..., CropLoader]", starts: list[int], batch_size: int, device: "str | torch.device"
) -> "Iterator[tuple[int, CropBatch, dict[str, str]]]":
    """Yields (first row, batch, {key: reason} of the bad images so far) for the batches that begin at `starts`."""
    from digit.data.loader import on_device

    for first, count in _stretches(starts, batch_size):
        loader = crops(start_row=first)
        rows = itertools.count(first, batch_size)
        for row, batch in zip(rows, on_device(itertools.islice(loader, count), device), strict=False):
            yield row, batch, dict(loader.bad)


def _stretches(starts: list[int], size: int) -> Iterator[tuple[int, int]]:
    """Groups consecutive batches as (first row, number of batches): [0, 4, 8, 20, 24] of size 4 -> (0, 3), (20, 2)."""
    for _, group in itertools.groupby(enumerate(starts), lambda entry: entry[1] - entry[0] * size):
        members = [start for _, start in group]
        yield members[0], len(members)


def _encode(tokenizer: "ImageTokenizer", images: "torch.Tensor", ok: np.ndarray) -> np.ndarray:
    """Returns (B, N) int64 tokens; rows of unreadable images are 0."""
    from digit.models.tokenizer import tokens_of

    length = tokens_of(tokenizer)
    tokens = np.zeros((len(ok), length), dtype=np.int64)
    if ok.any():
        tokens[ok] = tokenizer.encode(images if ok.all() else images[ok]).cpu().numpy().reshape(int(ok.sum()), -1)
    assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size, (
        "a tokenizer returned a token outside its vocabulary"
    )
    return tokens


def _request(
    source: "ImageSource",
    preprocess: "PreprocessConfig",
    tokenizer: "ImageTokenizer | None",
    vq: "ImageTokenizer | None",
    crops_per_image: int,
    seed: int,
    indices: Sequence[int] | np.ndarray | None,
) -> dict[str, Any]:
    """Returns every setting that decides the tokens, which the manifest records. Equal requests give equal tokens."""
    if tokenizer is None and vq is None:
        raise DigitError("no tokenizer was given: the store needs a discriminative tokenizer, a VQ tokenizer or both")
    images = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    if not len(images) or crops_per_image < 1:
        raise DigitError(f"{len(images)} images with {crops_per_image} crops each: both must be at least 1")
    subset = None if indices is None else hashlib.sha256(images.astype("<i8").tobytes()).hexdigest()
    described = {"encoder": None, "encoder_hash": None, "layer": None, "codebook_hash": None, "tokenizer_hash": None}
    if tokenizer is not None:
        describe: Any = getattr(tokenizer, "describe", dict)
        own = describe()
        described |= {"codebook_hash": tokenizer.fingerprint, "tokenizer_hash": tokenizer.fingerprint} | own
    request = {"format": FORMAT} | described | {
        "vqgan_hash": None if vq is None else vq.fingerprint,
        "preprocessing": preprocess.described(),
        "source": {"name": source.name, "fingerprint": source.fingerprint, "num_images": len(images), "subset": subset},
        "crops_per_image": crops_per_image,
        "seed": seed,
        "discriminative": _layout(tokenizer),
        "vq": _layout(vq),
        "classes": list(source.classes),
    }  # fmt: skip
    return plain(request)


def _layout(tokenizer: "ImageTokenizer | None") -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    if tokenizer.vocab_size > MAX_VOCAB:
        raise DigitError(f"a vocabulary of {tokenizer.vocab_size} does not fit the token store: {MAX_VOCAB} at most")
    from digit.models.tokenizer import levels_of, tokens_of

    layout = {"grid": list(tokenizer.grid), "length": tokens_of(tokenizer), "vocab_size": tokenizer.vocab_size}
    levels = levels_of(tokenizer)
    return layout | ({"levels": levels} if levels > 1 else {})


def _sharding(request: dict[str, Any], shard_bytes: int) -> dict[str, Any]:
    """Rows of one file of tokens, {"shard_rows": ...}; {} where one file holds them all, as in every older store."""
    lengths = [request[name]["length"] for name in ("discriminative", "vq") if request[name]]
    rows = max(1, shard_bytes // (2 * max(lengths)))
    num_rows = request["source"]["num_images"] * request["crops_per_image"]
    return {"shard_rows": rows} if rows < num_rows else {}


class _Writer:
    """The files of one unfinished store. A journal only names rows that are already on disk.

    Every rank writes its own rows of the same files and its own journal; rank 0 allocates and finishes the files. The
    VQ tokens that are `taken` from another store have no partial file.
    """

    def __init__(self, folder: Path, request: dict[str, Any], taken: TakenTokens | None = None) -> None:
        self.folder, self.taken = folder, taken
        self.request: dict[str, Any] = request | ({} if taken is None else {"vq_tokens": taken.checksums})
        self.num_images = request["source"]["num_images"]
        self.num_rows = self.num_images * request["crops_per_image"]
        self.journal, self.manifest = folder / "journal.json", folder / "manifest.json"
        self.ledger = Ledger(self.request, self.num_rows)  # notes: {unreadable image: [row, key, reason]}
        self.shard_rows = request.get("shard_rows", self.num_rows)
        self.opened: list[ArrayFiles] = []
        self.saved = time.monotonic()
        self.arrays = {
            name: ArrayFiles(folder, name, (self.num_rows, request[name]["length"]), "<u2", self.shard_rows)
            for name in ("discriminative", "vq")
            if request[name] and not (name == "vq" and taken)
        }
        self.arrays["labels"] = ArrayFiles(folder, "labels", (self.num_rows,), "<i4", self.num_rows)  # never sharded

    @property
    def _stems(self) -> list[str]:
        """Names of the finished files without .npy."""
        stems = {name: array.stems for name, array in self.arrays.items()} | {"vq": self._vq_stems}
        return [stem for name in ("discriminative", "vq", "labels") for stem in stems.get(name, [])]

    @property
    def _vq_stems(self) -> list[str]:
        return shard_stems("vq", self.num_rows, self.shard_rows) if self.request["vq"] else []

    def begin(self) -> bool:
        """Returns whether any work is left. Raises MismatchError if the folder or another rank has other settings.

        Only rank 0 reads the folder: network file systems cache for a while that a file is missing.
        """
        existing = distributed.on_main(self._open_or_allocate)
        if existing is None:
            return False
        self._compare(existing.request)
        self.ledger = Ledger(self.request, self.num_rows, existing.done, existing.dropped, existing.notes)
        return True

    def _open_or_allocate(self) -> Ledger | None:
        """Returns the progress so far, or None if the store is complete."""
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
        foreign = [f"{stem}.npy" for stem in self._stems if (self.folder / f"{stem}.npy").exists()]
        if foreign:
            raise DigitError(f"{self.folder} holds {foreign[0]} but no manifest.json: choose another folder")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for array in self.arrays.values():
                array.allocate()
        except DigitError:
            self._clean()  # free the space that was allocated so far
            raise
        self.ledger.save(self.journal)
        return self.ledger

    def _compare(self, existing: Any) -> None:
        """Raises MismatchError if `existing`, a manifest or a journal's request, differs from this request."""
        check_format(self.folder, existing)
        ignored = ["source.name"]  # a path as typed; the fingerprint decides
        if (
            "rows" in existing
        ):  # a finished store says itself how it is sharded, and is equal wherever its tokens are from
            ignored += ["shard_rows", "vq_tokens"]
        wanted = {"shard_rows": None, "vq_tokens": None} | self.request
        existing = {name: existing.get(name) for name in wanted}  # without rows and checksums
        advice = "choose another folder, or the old setting"
        require_same_request(self.folder, existing, wanted, advice, ignore=lambda name: name.startswith(tuple(ignored)))

    def __enter__(self) -> "_Writer":
        if not self.ledger.complete:
            try:
                self.opened = [array.__enter__() for array in self.arrays.values()]
            except (OSError, ValueError) as error:
                where = (
                    "" if distributed.is_main() else f" on rank {distributed.rank()}, which must see rank 0's folder"
                )
                raise DigitError(f"tokens in {self.folder} cannot be continued{where} ({error}): {AGAIN}") from error
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            # report what ended the run, not that the journal cannot be saved: the older journal is valid too
            with suppress(*(() if kind is None else (DigitError, OSError))):
                self._save()
        finally:
            for array in self.opened:
                array.__exit__()

    def check_bad(self, more: dict[str, Any], max_bad_fraction: float) -> None:
        """Raises DigitError if too many images are unreadable, counted over every run that wrote to this store."""
        bad = self.ledger.notes | more
        if bad and len(bad) > max_bad_fraction * self.num_images:
            _, key, reason = min(bad.values())
            raise DigitError(
                f"{len(bad)} of {self.num_images} images unreadable, more than max_bad_fraction {max_bad_fraction:g}: "
                f"see digit inspect; the first: {key} ({reason})"
            )

    def leave_out(self, unreadable: dict[str, Any]) -> None:
        """Drops images, {index: [first row, key, reason]}, whatever can be read of them now."""
        rows = Spans((row, row + self.request["crops_per_image"]) for row, _, _ in unreadable.values())
        self.ledger.join(Ledger(self.request, self.num_rows, Spans(), rows, unreadable))

    def write(self, row: int, values: dict[str, np.ndarray], dropped: np.ndarray, bad: dict[str, Any]) -> None:
        """Writes rows from `row` on of every array; `dropped`, (B,) bool, marks the rows of the `bad` images."""
        for name, array in self.arrays.items():
            array.write(row, values[name])
        dropped_rows = Spans((row + int(place), row + int(place) + 1) for place in np.flatnonzero(dropped))
        rows = Spans([(row, row + len(dropped))])
        self.ledger.join(Ledger(self.request, self.num_rows, rows, dropped_rows, bad))
        if time.monotonic() - self.saved >= JOURNAL_EVERY_SECONDS:
            self._save()

    def _save(self) -> None:
        """Saves the journal once the rows it names are on disk."""
        for array in self.opened:
            array.sync()
        self.saved = time.monotonic()
        self.ledger.save(self.journal)

    def finish(self, asked_to_stop: bool, max_bad_fraction: float) -> None:
        """Joins the ranks' ledgers and finishes the store. Raises Stopped if any rank was asked to stop."""
        everyone = distributed.gather((self.ledger, asked_to_stop))
        for ledger, _ in everyone:
            self.ledger.join(ledger)
        if any(asked for _, asked in everyone):
            raise Stopped(f"tokens: {len(self.ledger.done)} of {self.num_rows} rows are done")
        self.check_bad({}, max_bad_fraction)
        distributed.on_main(self._finish)

    def _finish(self) -> None:
        """Drops the unreadable rows, renames the files and writes the manifest. Can be interrupted and repeated."""
        assert self.ledger.complete, "every row is written before the store is finished"
        keep = self._readable_rows()
        if not keep.any():
            raise DigitError(f"none of the {self.num_images} images can be read: see digit inspect")
        for array in self.arrays.values():
            for shard, (stem, part) in enumerate(zip(array.stems, array.parts, strict=True)):
                first = shard * array.shard_rows
                if not (self.folder / f"{stem}.npy").exists():
                    copy_rows(part.path, self.folder / f"{stem}.npy", keep[first : first + len(part)], part)
        self._take(keep)
        bad = [[key, reason] for _, key, reason in sorted(self.ledger.notes.values())]
        sums = crc32_files([self.folder / f"{stem}.npy" for stem in self._stems])
        about: dict[str, Any] = {
            "rows": int(keep.sum()),
            "bad": bad,
            "crc32": dict(zip(self._stems, sums, strict=True)),
        }
        if "shard_rows" in self.request:
            about["shards"] = [
                int(keep[at : at + self.shard_rows].sum()) for at in range(0, len(keep), self.shard_rows)
            ]
        write_json(self.manifest, {k: v for k, v in self.request.items() if k != "vq_tokens"} | about)
        self._clean()

    def _take(self, keep: np.ndarray) -> None:
        """Takes the VQ tokens of the rows to keep, bool (num_rows,), from the other store."""
        if self.taken is None:
            return
        left_out = {key for key, _ in self.taken.store.manifest["bad"]}
        known, crops = np.ones(self.num_rows, dtype=bool), self.request["crops_per_image"]
        for row, key, _ in self.ledger.notes.values():
            if key in left_out:
                known[row // crops * crops : (row // crops + 1) * crops] = False
        if known.sum() != len(self.taken.store):
            raise DigitError(
                f"{self.taken.store.folder} holds {len(self.taken.store)} rows, {known.sum()} were expected: {AGAIN}"
            )
        numbers = np.cumsum(known) - 1  # (num_rows,): the other store's row of each row here
        for stem, first in zip(self._vq_stems, range(0, self.num_rows, self.shard_rows), strict=True):
            here = slice(first, first + self.shard_rows)
            if not (self.folder / f"{stem}.npy").exists():
                self.taken.copy(self.folder / f"{stem}.npy", numbers[here][keep[here]])

    def _readable_rows(self) -> np.ndarray:
        """bool (num_rows,): the rows to keep. An image keeps all of its crops or none, also one that was read once."""
        keep, crops = np.ones(self.num_rows, dtype=bool), self.request["crops_per_image"]
        for start, stop in self.ledger.dropped.spans:
            keep[start // crops * crops : -(-stop // crops) * crops] = False
        return keep

    def _clean(self) -> None:
        """Removes the files that only an unfinished store needs."""
        for array in self.arrays.values():
            for part in array.parts:
                part.path.unlink(missing_ok=True)
        discard(self.journal)
