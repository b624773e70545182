"""Reads WebDataset shards: plain tar files in which 0001.jpg and 0001.cls (or 0001.json) are one sample.

As in the webdataset library, a sample's name ends at the first dot of the file's name, and what follows is the member's
key. A tar without labels of that form is read as a folder of the same files.
"""

import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from digit.data.decode import EXTENSIONS
from digit.data.imagenet import Nearby
from digit.data.labels import Label, as_label, find_name, index_classes, label_names
from digit.data.layout import Split, choose_packed_split
from digit.data.listing import TARS, is_hidden, kind_of, own_folders, some
from digit.data.source import ContainerSource, readable
from digit.data.synsets import are_synsets
from digit.data.tree import Labelled, label_tree
from digit.errors import BadImageError, DigitError
from digit.runtime.bounded_reader import BoundedReader
from digit.runtime.progress import track

LABEL_KEYS = ("cls", "class", "label")  # of members that are a label
TREE = ("auto", "folders", "top")  # settings of labels_from that may read a tar as a folder
MAX_LABEL_BYTES, MAX_LABEL_FILE_BYTES = 2**20, 2**29  # of a sample's member, of a file for all samples
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
REGULAR_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)  # no links, no devices
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
MANY_SHARDS = 8  # with more shards, indexing shows its progress


@dataclass(slots=True)
class Member:
    """A file of a tar, and what it says if it is a small .cls, .json or .txt."""

    name: str
    offset: int
    size: int
    content: Any = None  # text; of .json the value; of label files bytes


@dataclass(slots=True)
class Sample:
    """The members of one name, by key such as 'jpg', 'cls' or 'seg.png'."""

    name: str
    members: dict[str, Member] = field(default_factory=dict)
    image: str = ""  # the key of its image; "" if it has none


class TarSource(ContainerSource):
    """Samples of uncompressed tar files: lists each shard once, then reads an image at its offset.

    A sample's label is its .cls, .class or .label (a number or a name), else a key of its .json with a usual name
    (`digit.data.labels.LABEL_NAMES`). Raises DigitError for damaged shards, for two members of one name, for samples
    with several images, and for labels that cannot be read.
    """

    def __init__(
        self,
        root: Path,
        files: list[Path],
        labels_from: str = "auto",
        read_contents: bool | None = None,
        notes: Sequence[str] = (),
        split: str | None = None,
    ):
        super().__init__(root, files, read_contents)
        shards = [
            Shard(file, labels_from) for file in (track(files, "list shards") if len(files) > MANY_SHARDS else files)
        ]
        samples = [(number, sample) for number, shard in enumerate(shards) for sample in shard.samples]
        if not samples:
            packed = [name for shard in shards for name in shard.packed]
            hint = f"; it holds {some(packed)}: unpack it and give the folder" if packed else ""
            raise DigitError(f"{root} holds no images: wanted members such as 0001.jpg and 0001.cls{hint}")
        labelled = _label_samples([sample for _, sample in samples], labels_from)
        if split is not None or (labels_from in TREE and (labels_from != "auto" or not labelled.classes)):
            nearby = Nearby(Path(root).absolute() if Path(root).is_dir() else Path(root).absolute().parent)
            samples, labelled = _label_as_folder(samples, labelled, shards, labels_from, split, nearby)
        images = ((number, sample.members[sample.image]) for number, sample in samples)
        self.samples = [(number, image.name, image.offset, image.size) for number, image in images]
        self.classes, self._labels = labelled.classes, labelled.labels
        self.notes = (*notes, *dict.fromkeys(note for shard in shards for note in shard.notes), *labelled.notes)

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, index: int) -> str:
        shard, name, _, _ = self.samples[index]
        return readable(f"{self.short_names[shard]}:{name}")

    def raw(self, index: int) -> bytes:
        shard, _, offset, size = self.samples[index]
        try:
            with open(self.files[shard], "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadImageError(f"{self.key(index)}: {error.strerror}") from error


# ---------------------------------------------------------------- samples of a shard


class Shard:
    """The samples with an image of one tar, in its order, and notes on the rest. Raises DigitError as `TarSource`."""

    def __init__(self, file: Path, labels_from: str):
        self.file, self.notes, self.label_files = file, list[str](), dict[str, Member]()
        members, num_hidden, links = [], 0, list[str]()
        listed = list(list_members(file, labels_from))
        own = own_folders(member.name for member in listed)
        for member in listed:
            if member.name.startswith(own):
                continue
            if member.size < 0:
                links.append(member.name)
            elif is_hidden(member.name):
                num_hidden += 1
            elif kind_of(member.name) == "label files":
                self.label_files[member.name] = member
            else:
                members.append(member)
        samples = group(members, str.partition)
        if any(len(_images(sample)) > 1 for sample in samples):
            samples = self._group_at_last_dot(members, samples)
        self.samples = [sample for sample in samples if sample.image]
        self.packed = [member.name for member in members if member.name.lower().endswith(TARS)]
        self._note_rest([sample for sample in samples if not sample.image], labels_from)
        if links:
            self.notes.append(f"{file.name}: not used: {len(links)} links ({some(links)})")
        if own:
            self.notes.append(f"{file.name}: not read, because DiGIT wrote it: {some(own)}")
        if num_hidden:
            self.notes.append(f"{file.name}: not used: {num_hidden} hidden files, whose names begin with a dot")

    def _group_at_last_dot(self, members: list[Member], samples: list[Sample]) -> list[Sample]:
        """Samples whose names end at the last dot, if that leaves one image and all labels to each."""
        split = next(sample for sample in samples if len(_images(sample)) > 1)
        others = group(members, str.rpartition)
        if any(len(_images(sample)) > 1 or not sample.image for sample in others):
            raise DigitError(
                f"{self.file}: the sample {split.name} holds several images ({some(_images(split))}); a sample's name "
                "ends at the first dot, as in webdataset: keep one image a sample, or give each a name of its own"
            )
        self.notes.append(
            f"{self.file.name}: names of samples end at the last dot, as {others[0].name}, not at the first as in "
            f"webdataset, where {split.name} would hold {len(_images(split))} images"
        )
        return others

    def _note_rest(self, without: list[Sample], labels_from: str) -> None:
        used = {labels_from, *LABEL_KEYS, "json"} if labels_from != "none" else set()
        unused = Counter(key for sample in self.samples for key in sample.members if key not in {sample.image, *used})
        if unused:
            listed = ", ".join(f"{count} .{key}" for key, count in unused.most_common(12))
            hint = "; --labels_from txt takes the .txt as labels" if "txt" in unused else ""
            self.notes.append(f"{self.file.name}: not used: {listed}{hint}")
        if without:
            names = [f"{sample.name}.{key}" for sample in without for key in sample.members]
            self.notes.append(f"{self.file.name}: not used: {len(without)} samples without an image ({some(names)})")


def group(members: Sequence[Member], cut: Any) -> list[Sample]:
    """Samples of a shard; `cut` is str.partition or str.rpartition, which end a sample's name at the first or last dot.

    The image is the member whose key is a suffix alone (jpg), else the only one that ends in a suffix (left.jpg); a
    sample with several has none.
    """
    samples: dict[str, Sample] = {}
    for member in members:
        folder, base = posixpath.split(member.name)
        stem, _, key = cut(base, ".")
        name = posixpath.join(folder, stem)
        samples.setdefault(name, Sample(name)).members[key.lower()] = member
    for sample in samples.values():
        images = _images(sample)
        sample.image = images[0] if len(images) == 1 else ""
    return list(samples.values())


def _images(sample: Sample) -> list[str]:
    """Keys that may be the sample's image; several are ambiguous."""
    found = [key for key in sample.members if f".{key.rpartition('.')[2]}" in EXTENSIONS]
    return [key for key in found if "." not in key] or found


def list_members(file: Path, labels_from: str) -> Iterator[Member]:
    """The files of a tar in its order, links with size -1. Raises DigitError for a damaged tar or repeated names."""
    names: set[str] = set()
    named: dict[str, Member] = {}
    try:
        with open(file, "rb") as raw:
            _refuse_compressed(file, raw.read(2))
        with BoundedReader(file) as reader, tarfile.open(fileobj=reader, mode="r:") as tar:
            previous = -1
            for info in tar:
                if info.offset <= previous or info.size < 0 or info.offset_data > reader.size:
                    raise ValueError(f"{info.name!r} has a size that leads backwards")
                previous = info.offset
                name = info.name.replace("\\", "/").removeprefix("./")
                if info.type in REGULAR_FILES and not info.sparse:
                    if info.offset_data + info.size > reader.size:
                        raise ValueError(f"{info.name!r} reaches past the end")
                    member = Member(name, info.offset_data, info.size, _content(tar, info, labels_from))
                elif info.type == tarfile.LNKTYPE and info.linkname in named:
                    member = replace(named[info.linkname], name=name)  # a second name of a file in this tar
                else:
                    if info.type in LINKS:
                        yield Member(name, 0, -1)
                    continue
                stem, suffix = posixpath.splitext(name)
                if (same := stem + suffix.lower()) in names:
                    raise DigitError(
                        f"{file} holds two members {same}: name each differently, as webdataset wants it too"
                    )
                names.add(same)
                named[info.name] = member
                yield member
            reader.seek(tar.offset)
            if reader.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile reads a damaged header as the end of the file
                raise ValueError(f"no header at byte {tar.offset}")
    except DigitError:
        raise
    except Exception as error:  # damaged headers raise nearly any exception
        where = f"after {len(names)} files" if names else "from its start"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DigitError(f"{file} is damaged or cut short {where} ({reason}): fetch it again") from error


def _refuse_compressed(file: Path, magic: bytes) -> None:
    if magic in COMPRESSED:
        raise DigitError(f"{file} is packed with {COMPRESSED[magic]}: unpack it to a plain .tar (random access)")


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo, labels_from: str) -> Any:
    """What a member says that may be a label: text, a .json's keys that matter, a label file's bytes; else None."""
    key = posixpath.basename(info.name).lower().partition(".")[2]
    kind = key.rpartition(".")[2]
    is_file = kind_of(info.name) == "label files"
    if info.size > (MAX_LABEL_FILE_BYTES if is_file else MAX_LABEL_BYTES):
        return None
    if not is_file and kind not in (*LABEL_KEYS, "json") and labels_from not in (key, kind):
        return None
    file = tar.extractfile(info)
    assert file is not None, "only regular files come here"
    data = file.read()
    if is_file:
        return data
    return _record(data, labels_from) if kind == "json" else data.decode("utf-8", "replace").strip()


def _record(data: bytes, labels_from: str) -> Any:
    """A .json's labels: {key: value} of the keys that matter, or the value if it is no object; {} if it is broken."""
    try:
        record = json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {"label": record}
    found = find_name(labels_from, record)
    keys = [found] if found else label_names(record)
    return {key: record[key] for key in keys}


# ---------------------------------------------------------------- labels


def _label_samples(samples: list[Sample], labels_from: str) -> Labelled:
    """Labels by webdataset's convention: members cls, class, label; keys of the .json; or the one asked for."""
    if labels_from in ("none", *TREE[1:]):
        return Labelled([], np.full(len(samples), -1, dtype=np.int64))
    values: list[Label] = []
    refused: list[str] = []
    used: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    disagree = []
    for sample in samples:
        stated, odd = _stated(sample, labels_from)
        refused += [f"{sample.name}, whose {text}" for text in odd]
        if odd and labels_from != "auto":
            raise DigitError(f"{refused[-1]}: --labels_from names another key, or none")
        values.append(next(iter(stated.values()), None))
        used.update(list(stated)[:1])
        unused.update(list(stated)[1:])
        if len({str(value) for value in stated.values()}) > 1:
            disagree.append(f"{sample.name} ({', '.join(f'{key} says {value}' for key, value in stated.items())})")
    if labels_from != "auto" and not used:
        raise DigitError(
            f"labels_from is {labels_from!r}: no sample has such a member or such a key in its .json; wanted auto, "
            "folders, top, none, or a key"
        )
    classes, labels = index_classes(values)
    notes = [f"labels are {' and '.join(f'{key} of {count} images' for key, count in used.items())}"] if used else []
    if disagree:
        notes.append(f"{len(disagree)} samples have labels that differ, such as {disagree[0]}; the first one counts; "
                     f"--labels_from {next(iter(unused)).rpartition(' ')[2]} takes the other")  # fmt: skip
    if refused:
        notes.append(f"{len(refused)} labels are none (such as {refused[0]})")
    if used and (without := sum(value is None for value in values)):
        notes.append(f"{without} samples have no label: unlabelled")
    return Labelled(classes, labels, notes)


def _stated(sample: Sample, labels_from: str) -> tuple[dict[str, Label], list[str]]:
    """All labels of a sample by where they stand, the one that counts first; and what is no label."""
    stated: dict[str, Label] = {}
    odd: list[str] = []
    values: list[tuple[str, Any]] = []
    for key in LABEL_KEYS if labels_from == "auto" else (labels_from,):
        for own, member in sample.members.items():
            if own != sample.image and (own == key or own.endswith(f".{key}")) and isinstance(member.content, str):
                values.append((f".{own}", member.content))
    for own, member in sample.members.items():
        if isinstance(member.content, dict):
            values += [(f".{own} {key}", value) for key, value in member.content.items()]
    for place, value in values:
        try:
            stated[place] = as_label(value)
        except ValueError as error:
            odd.append(f"{place} is {error}")
    return stated, odd


def _label_as_folder(
    samples: list[tuple[int, Sample]],
    labelled: Labelled,
    shards: Sequence["Shard"],
    labels_from: str,
    split: str | None,
    nearby: Nearby,
) -> tuple[list[tuple[int, Sample]], Labelled]:
    """The samples of tars that are packed folders, of one split, and their labels by label files or folders.

    Tars that are named after synsets (n01440764.tar, as ImageNet's training images come) are the folders themselves.
    """
    names = [f"{shards[number].file.name}/{sample.members[sample.image].name}" for number, sample in samples]
    plain = [sample.members[sample.image].name for _, sample in samples]
    if len(set(plain)) == len(plain):
        chosen = choose_packed_split(plain, split)
        places = dict(zip(plain, names, strict=True))
        chosen.names = [places[name] for name in chosen.names]
    else:
        chosen = Split(names, plain)
    if are_synsets([shard.file.stem for shard in shards]) and split is None:
        stems = [shards[number].file.stem for number, _ in samples]
        chosen = Split(names, [f"{stem}/{name.replace('/', '_')}" for stem, name in zip(stems, plain, strict=True)])
        chosen.notes = ["each .tar is a class, the synset of its name"]
    files = {
        f"{shard.file.name}/{name}": lambda member=member: member.content or b""
        for shard in shards
        for name, member in shard.label_files.items()
    }
    found = label_tree(chosen, files, labels_from, nearby)
    found.notes = [*labelled.notes, *chosen.notes, *found.notes]
    kept = set(chosen.names)
    return [pair for pair, name in zip(samples, names, strict=True) if name in kept], found
