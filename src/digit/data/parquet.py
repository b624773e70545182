"""Images in Parquet files of the Hugging Face Hub's layout: a struct column {bytes, path} and a label column."""

import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from digit.data.labels import Label, as_labels, find_name, index_classes, label_names
from digit.data.source import ContainerSource, readable
from digit.errors import BadImageError, DigitError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
CACHE_BYTES = 2**28  # row groups kept in memory, per process
BOMB_BYTES, BOMB_RATIO = 2**28, 50  # a row group larger than this and 50 times its file is a decompression bomb


class ParquetSource(ContainerSource):
    """Rows of one or several Parquet files, read one row group at a time; the last used ones stay in memory.

    Classes are the ClassLabel names in the files' metadata if there are any, else the distinct labels, sorted. Files
    that number the same names differently are joined by name. Reading in order is fast; random access to more data
    than the cache holds decodes a row group for each image.
    """

    def __init__(
        self,
        root: Path,
        files: list[Path],
        labels_from: str = "auto",
        read_contents: bool | None = None,
        notes: Sequence[str] = (),
    ):
        super().__init__(root, files, read_contents)
        metas = [_open(file) for file in files]
        for file, meta in zip(files, metas, strict=True):
            _refuse_bomb(file, meta.metadata)
        columns = [_find_image(file, meta.schema_arrow) for file, meta in zip(files, metas, strict=True)]
        self.image_columns = [column for column, _ in columns]
        groups = [(f, g, meta.metadata.row_group(g).num_rows) for f, meta in enumerate(metas)
                  for g in range(meta.num_row_groups)]  # fmt: skip
        self.groups = [(file, group) for file, group, _ in groups]
        self.ends = np.cumsum([rows for *_, rows in groups], dtype=np.int64)  # rows up to and including each group
        self.starts = np.cumsum([0, *(meta.metadata.num_rows for meta in metas[:-1])], dtype=np.int64)  # of each file
        if not groups or self.ends[-1] == 0:
            raise DigitError(f"{root} holds no rows")
        parts = [
            _read_labels(file, meta, labels_from, column.removesuffix(".bytes"))
            for file, meta, column in zip(files, metas, self.image_columns, strict=True)
        ]
        self.classes, self._labels, found = _join_labels(self.name, files, parts)
        images = [note for _, others in columns for note in others]
        self.notes = (*notes, *dict.fromkeys(images), *found)
        self._forget()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def key(self, index: int) -> str:
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        return readable(f"{self.short_names[file]} row {index - int(self.starts[file])}")

    def raw(self, index: int) -> bytes:
        group = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[group - 1]) if group else 0)
        try:
            data = _guard(self.files[self.groups[group][0]], lambda: self._column(group)[row].as_py())
        except DigitError as error:
            raise BadImageError(str(error)) from error
        if not isinstance(data, bytes):  # a path is refused: decode_image would open it
            raise BadImageError(f"{self.key(index)}: no image bytes, perhaps only a path")
        return data

    def _column(self, group: int) -> "pa.Array":
        """The encoded images of one row group, a binary array."""
        if self._pid != os.getpid():
            self._forget()  # forked: the parent's file handles and lock cannot be shared
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            column = self._load(group)
            self._cache[group] = column
            while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
            return column

    def _load(self, group: int) -> "pa.Array":
        file, number = self.groups[group]
        path = self.files[file]
        if file not in self._handles:
            self._handles[file] = _open(path)
        handle, name = self._handles[file], self.image_columns[file]
        table = _guard(path, lambda: handle.read_row_group(number, columns=[name], use_threads=False))
        column = _only_column(path, table, name, handle.metadata.row_group(number).num_rows).combine_chunks()
        column = column.chunk(0) if hasattr(column, "chunk") else column
        return column.field(0) if column.type.num_fields else column

    def _forget(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._handles: dict[int, Any] = {}
        self._cache: OrderedDict[int, pa.Array] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_handles", "_cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()


def _guard(file: Path, action: Any) -> Any:
    import pyarrow as pa

    try:
        return action()
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        text = " ".join(str(error).split())[:200]
        raise DigitError(f"{file} cannot be read as Parquet ({text}): fetch it again") from error


def _open(file: Path) -> Any:
    import pyarrow.parquet as pq

    handle = _guard(file, lambda: pq.ParquetFile(file))
    _guard(file, lambda: handle.schema_arrow)
    return handle


def _only_column(file: Path, table: "pa.Table", name: str, rows: int) -> "pa.ChunkedArray":
    """Returns the requested column. Raises DigitError if the file has none or two of that name."""
    if table.num_columns != 1 or len(table) != rows:
        got = f"{table.num_columns} columns {name} of {len(table)} rows"
        raise DigitError(f"{file} has {got}, wanted one of {rows}: its parts differ, or it is damaged")
    return table.column(0)


def _refuse_bomb(file: Path, metadata: Any) -> None:
    """Raises DigitError if a row group would unpack to far more than encoded images do.

    It reads the row groups' totals, because pyarrow crashes on a column's metadata if its statistics are damaged.
    """
    packed = file.stat().st_size
    for number in range(metadata.num_row_groups):
        whole = metadata.row_group(number).total_byte_size
        if whole > max(BOMB_BYTES, BOMB_RATIO * packed):
            raise DigitError(f"{file}: {packed} bytes that unpack to {whole} (a decompression bomb?): refused")


def _find_image(file: Path, schema: "pa.Schema") -> tuple[str, list[str]]:
    """Finds the column of encoded images by type, usual names first; structs are read as 'name.bytes'. Also notes."""
    import pyarrow as pa

    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0
               and _is_binary(f.type.field("bytes").type)]  # fmt: skip
    binary = [f.name for f in schema if _is_binary(f.type) and f.name.lower() in IMAGE_NAMES]
    found = [*sorted(structs, key=lambda name: name.lower() not in IMAGE_NAMES), *binary]
    if not found:
        have = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DigitError(f"{file} has no image column {{bytes, path}}; its columns are {have}")
    notes = [f"images are the column {found[0]}; not used: images in {', '.join(found[1:])}"] if found[1:] else []
    return f"{found[0]}.bytes" if found[0] in structs else found[0], notes


def _is_binary(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


@dataclass
class LabelColumn:
    """The labels of one file as they are stored."""

    values: list[Label]  # one per row; with `names`, numbers of names
    column: str | None = None
    names: list[str] | None = None  # of its ClassLabel
    notes: list[str] = field(default_factory=list)


def _read_labels(file: Path, meta: Any, labels_from: str, image: str) -> LabelColumn:
    """Reads the column of labels of one file; without one, every row is unlabelled."""
    schema, num = meta.schema_arrow, meta.metadata.num_rows
    named = {name: feature["names"] for name, feature in _features(schema).items()
             if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
             and isinstance(feature.get("names"), list) and name in schema.names}  # fmt: skip
    columns = [field.name for field in schema if not _is_image(field.type)]
    binary = [field.name for field in schema if _is_image(field.type) and field.name != image]
    candidates = list(dict.fromkeys([*label_names(columns), *named]))
    if labels_from == "none":
        return LabelColumn([None] * num, notes=_unused([*columns, *binary]))
    if labels_from != "auto":
        wanted = find_name(labels_from, columns)
        if wanted is None:
            raise DigitError(f"{file} has no column {labels_from!r} for labels; its columns are {', '.join(columns)}")
        candidates = [wanted]
    refused = []
    for name in candidates:
        table = _guard(file, lambda name=name: meta.read(columns=[name], use_threads=False))
        try:
            values = as_labels(_only_column(file, table, name, num).to_pylist())
        except ValueError as error:  # also of a time that Python cannot hold
            if labels_from != "auto":
                raise DigitError(f"{file}: column {name} holds {error}, wanted one number or name a row") from error
            refused.append(f"column {name} gives no labels: it holds {error}")
            continue
        numbers = all(value is None or isinstance(value, int) for value in values)
        names = [readable(str(text)) for text in named[name]] if name in named and numbers else None
        rest = [column for column in [*columns, *binary] if column != name]
        return LabelColumn(values, name, names, [*refused, f"labels are the column {name}", *_unused(rest)])
    return LabelColumn(
        [None] * num, notes=[*refused, *_unused([name for name in [*columns, *binary] if name not in candidates])]
    )


def _unused(columns: list[str]) -> list[str]:
    listed = ", ".join(columns)
    return [f"columns that are not used: {listed}; --labels_from COLUMN takes one as labels"] if columns else []


def _is_image(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return _is_binary(kind) or pa.types.is_struct(kind)


def _join_labels(name: str, files: list[Path], parts: list[LabelColumn]) -> tuple[list[str], np.ndarray, list[str]]:
    """Classes, labels and notes of all files. Raises DigitError where they disagree beyond what names can tell."""
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    with_names = [part for part in parts if part.names is not None]
    for file, part in zip(files, parts, strict=True):
        if part.names is not None:
            _check_numbers(file, part)
        if part.column is None and any(other.column for other in parts):
            notes.append(f"{file.name} has no column of labels: its {len(part.values)} images are unlabelled")
        numbers = [value for value in part.values if value is not None]
        if with_names and numbers and part.names is None and not all(isinstance(value, str) for value in numbers):
            raise DigitError(f"{name}: {file.name} numbers its classes, other files name them: its parts differ")
    kinds = {type(value) for part in parts if part.names is None for value in part.values if value is not None}
    if len(kinds) > 1:
        raise DigitError(f"{name}: its labels are numbers in one place and names in another: its parts differ")
    if empty := sum(value is None for part in parts if part.column for value in part.values):
        notes.append(f"{empty} rows have no label (empty, null or -1): unlabelled")
    if not with_names:
        return *index_classes([value for part in parts for value in part.values]), notes
    if len({tuple(part.names or ()) for part in with_names}) > 1:
        notes.append("its files number the classes differently: they are joined by the names of the classes")
    classes = list(dict.fromkeys(text for part in with_names for text in part.names or ()))
    texts = {value for part in parts if part.names is None for value in part.values if isinstance(value, str)}
    classes += sorted(texts - set(classes))
    place = {text: number for number, text in enumerate(classes)}
    labels = [
        -1 if value is None else place[value if isinstance(value, str) else (part.names or [])[value]]
        for part in parts
        for value in part.values
    ]
    return classes, np.array(labels, dtype=np.int64), notes


def _check_numbers(file: Path, part: LabelColumn) -> None:
    numbers = [value for value in part.values if isinstance(value, int)]
    if numbers and (max(numbers) >= len(part.names or ()) or min(numbers) < 0):
        raise DigitError(f"{file}: labels {min(numbers)}..{max(numbers)}, but {len(part.names or ())} class names")
    if repeated := [text for text, count in Counter(part.names).items() if count > 1]:
        raise DigitError(f"{file} names two classes {repeated[0]!r}: repair its metadata")


def _features(schema: "pa.Schema") -> dict[str, Any]:
    """The 'features' entry of the metadata that the datasets library writes; {} if there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}
