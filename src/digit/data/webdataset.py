"""Reads WebDataset shards: plain tar files in which 0001.jpg and 0001.cls (or 0001.json) are one sample."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from digit.data.decode import EXTENSIONS
from digit.data.source import ImageSource, file_digest, index_classes, readable
from digit.errors import BadImageError, DigitError
from digit.runtime.bounded_reader import BoundedReader
from digit.runtime.progress import track

LABEL_KEYS = ("label", "cls", "class")
MAX_LABEL_BYTES = 2**20
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
REGULAR_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)  # no links, no devices
MANY_SHARDS = 8  # with more shards, indexing shows its progress


class TarSource(ImageSource):
    """Samples of uncompressed tar files: lists each shard once, then reads an image at its offset.

    A sample's label is its .cls (a number or a name), else `label`, `cls` or `class` in its .json, else none.
    """

    def __init__(self, root: Path, files: list[Path]):
        self.name, self.files = readable(root), files
        self.short_names = [os.path.relpath(file, root) if file != root else file.name for file in files]
        self.samples: list[tuple[int, str, int, int]] = []  # (shard, name, offset, size)
        values: list[int | str | None] = []
        for number, file in enumerate(track(files, "list shards") if len(files) > MANY_SHARDS else files):
            for sample in _list_shard(file).values():
                if "image" in sample:
                    self.samples.append((number, *sample["image"]))
                    values.append(sample.get("cls", sample.get("json")))
        if not self.samples:
            raise DigitError(f"{root} holds no images: wanted members such as 0001.jpg and 0001.cls")
        sizes = [file.stat().st_size for file in files]
        self.fingerprint = file_digest(zip(self.short_names, sizes, strict=True))
        self.classes, self._labels = index_classes(values)

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, index: int) -> str:
        shard, name, _, _ = self.samples[index]
        return readable(f"{self.short_names[shard]}:{name}")

    def labels(self) -> np.ndarray:
        return self._labels

    def raw(self, index: int) -> bytes:
        shard, _, offset, size = self.samples[index]
        try:
            with open(self.files[shard], "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadImageError(f"{self.key(index)}: {error.strerror}") from error


def _list_shard(file: Path) -> dict[str, dict[str, Any]]:
    """{sample: {"image": (name, offset, size), "cls": text, "json": label}} in the order of the tar."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with open(file, "rb") as raw:
            _refuse_compressed(file, raw.read(2))
        with BoundedReader(file) as reader, tarfile.open(fileobj=reader, mode="r:") as tar:
            previous = -1
            for member in tar:
                if member.offset <= previous or member.size < 0 or member.offset_data > reader.size:
                    raise ValueError(f"{member.name!r} has a size that leads backwards")
                previous = member.offset
                if member.type in REGULAR_FILES and not member.sparse:
                    if member.offset_data + member.size > reader.size:
                        raise ValueError(f"{member.name!r} reaches past the end")
                    _add_member(samples, tar, member)
            reader.seek(tar.offset)
            if reader.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile reads a damaged header as the end of the file
                raise ValueError(f"no header at byte {tar.offset}")
    except DigitError:
        raise
    except Exception as error:  # damaged headers raise nearly any exception
        where = f"after {len(samples)} samples" if samples else "from its start"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DigitError(f"{file} is damaged or cut short {where} ({reason}): fetch it again") from error
    return samples


def _refuse_compressed(file: Path, magic: bytes) -> None:
    if magic in COMPRESSED:
        raise DigitError(f"{file} is packed with {COMPRESSED[magic]}: unpack it to a plain .tar (random access)")


def _add_member(samples: dict[str, dict[str, Any]], tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    folder, base = os.path.split(member.name)
    stem, _, extension = base.partition(".")
    if not stem:
        return  # hidden
    sample = samples.setdefault(f"{folder}/{stem}", {})
    kind = extension.lower().rpartition(".")[2]
    if f".{kind}" in EXTENSIONS:
        sample.setdefault("image", (member.name, member.offset_data, member.size))
    elif kind in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
        file = tar.extractfile(member)
        assert file is not None, "only regular files come here"
        text = file.read().decode("utf-8", "replace")
        sample[kind] = text.strip() if kind == "cls" else _json_label(text)


def _json_label(text: str) -> int | str | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    values = [record[key] for key in LABEL_KEYS if key in record] if isinstance(record, dict) else [record]
    return next((value for value in values if isinstance(value, int | str) and not isinstance(value, bool)), None)
