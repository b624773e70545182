"""Images in Parquet files of the Hugging Face Hub's layout: a struct column {bytes, path} and a label column."""

import json
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from digit.data.source import ImageSource, file_digest, index_classes, readable
from digit.errors import BadImageError, DigitError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "class", "cls")
CACHE_BYTES = 2**28  # row groups kept in memory, per process
BOMB_BYTES, BOMB_RATIO = 2**28, 50  # a row group larger than this and 50 times its file is a decompression bomb


class ParquetSource(ImageSource):
    """Rows of one or several Parquet files, read one row group at a time; the last used ones stay in memory.

    Classes are the ClassLabel names in the file's metadata if there are any, else the distinct labels, sorted. Reading
    in order is fast; random access to more data than the cache holds decodes a row group for each image.
    """

    def __init__(self, root: Path, files: list[Path]):
        self.name, self.files = readable(root), files
        self.short_names = [os.path.relpath(file, root) if file != root else file.name for file in files]
        metas = [_open(file) for file in files]
        schema = metas[0].schema_arrow
        self.image_column = _find_image(files[0], schema)
        for file, meta in zip(files, metas, strict=True):
            _refuse_bomb(file, meta.metadata)
        self.label_column, names = _find_label(schema)
        groups = [(f, g, meta.metadata.row_group(g).num_rows) for f, meta in enumerate(metas)
                  for g in range(meta.num_row_groups)]  # fmt: skip
        self.groups = [(file, group) for file, group, _ in groups]
        self.ends = np.cumsum([rows for *_, rows in groups], dtype=np.int64)  # rows up to and including each group
        self.starts = np.cumsum([0, *(meta.metadata.num_rows for meta in metas[:-1])], dtype=np.int64)  # of each file
        if not groups or self.ends[-1] == 0:
            raise DigitError(f"{root} holds no rows")
        sizes = [file.stat().st_size for file in files]
        self.fingerprint = file_digest(zip(self.short_names, sizes, strict=True))
        self.classes, self._labels = self._read_labels(metas, names)
        self._forget()

    def _read_labels(self, metas: list[Any], names: list[str] | None) -> tuple[list[str], np.ndarray]:
        if self.label_column is None:
            return [], np.full(len(self), -1, dtype=np.int64)
        values: list[Any] = []
        for file, meta in zip(self.files, metas, strict=True):
            table = _guard(file, lambda meta=meta: meta.read(columns=[self.label_column], use_threads=False))
            values += _only_column(file, table, self.label_column, meta.metadata.num_rows).to_pylist()
        if odd := [value for value in values if value is not None and not isinstance(value, int | str)]:
            raise DigitError(f"{self.name}: column {self.label_column} holds {odd[0]!r}, wanted a number or a name")
        if names is None:
            return index_classes(values)
        if odd := [value for value in values if isinstance(value, str)]:
            raise DigitError(f"{self.name}: column {self.label_column} holds numbers and {odd[0]!r}: its parts differ")
        numbers = [-1 if value is None else value for value in values]
        if max(numbers) >= len(names) or min(numbers) < -1:
            raise DigitError(f"{self.name}: labels {min(numbers)}..{max(numbers)}, but {len(names)} class names")
        return names, np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def key(self, index: int) -> str:
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        return readable(f"{self.short_names[file]} row {index - int(self.starts[file])}")

    def labels(self) -> np.ndarray:
        return self._labels

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
        handle, name = self._handles[file], self.image_column
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
        self.__dict__.update(state)
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


def _find_image(file: Path, schema: "pa.Schema") -> str:
    """Finds the column of encoded images by type, usual names first; structs are read as 'name.bytes'."""
    import pyarrow as pa

    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0
               and _is_binary(f.type.field("bytes").type)]  # fmt: skip
    binary = [f.name for f in schema if _is_binary(f.type)]
    for name in sorted(structs, key=lambda name: name.lower() not in IMAGE_NAMES):
        return f"{name}.bytes"
    for name in binary:
        if name.lower() in IMAGE_NAMES:
            return name
    have = ", ".join(f"{field.name}: {field.type}" for field in schema)
    raise DigitError(f"{file} has no image column {{bytes, path}}; its columns are {have}")


def _is_binary(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _find_label(schema: "pa.Schema") -> tuple[str | None, list[str] | None]:
    """Finds (label column or None, its ClassLabel names or None): by the usual names, else the first ClassLabel."""
    import pyarrow as pa

    features = _features(schema)
    named = {name: feature["names"] for name, feature in features.items()
             if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
             and isinstance(feature.get("names"), list) and name in schema.names}  # fmt: skip
    simple = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary)
    usable = [field.name for field in schema if any(test(field.type) for test in simple)]
    for name in (*LABEL_NAMES, *named):
        if name in usable:
            integers = pa.types.is_integer(schema.field(schema.names.index(name)).type)
            return name, [readable(str(text)) for text in named[name]] if name in named and integers else None
    return None, None


def _features(schema: "pa.Schema") -> dict[str, Any]:
    """The 'features' entry of the metadata that the datasets library writes; {} if there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}
