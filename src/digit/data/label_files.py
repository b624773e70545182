"""Files that label images: metadata.csv, .jsonl and .parquet of Hugging Face's imagefolder, StyleGAN's dataset.json."""

import csv
import io
import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from digit.data.labels import Label, as_labels, find_name, label_names
from digit.data.listing import some
from digit.errors import DigitError

PATH_NAMES = ("file_name", "filename", "file", "image", "image_path", "path", "img", "name", "image_id", "id")
HELP = "--labels_from COLUMN names the column, --labels_from folders takes the folders' names, none no labels"


@dataclass
class LabelFile:
    """What a label file says, row by row."""

    name: str
    column: str | None  # where the labels stand; None if no column is one of labels
    labels: dict[str, Label]  # path of the image relative to the root -> label
    others: list[str]  # columns that are not used


def read_label_file(name: str, data: bytes, column: str | None, folder: str | None = None) -> LabelFile:
    """Reads a label file by its suffix: .csv, .tsv, .json, .jsonl or .parquet.

    Args:
        name: its name in messages; without `folder`, paths in it are relative to its own folder.
        column: the column of labels; None finds it by its name.

    Raises DigitError for a file that cannot be read, without a column of paths, or without the column asked for.
    """
    folder = posixpath.dirname(name) if folder is None else folder
    try:
        rows = _rows(name, data)
    except (ValueError, RecursionError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise DigitError(f"{name} cannot be read as a label file ({reason}): repair it, or {HELP}") from error
    columns = list(dict.fromkeys(key for row in rows for key in row))
    paths = next((found for wanted in PATH_NAMES if (found := find_name(wanted, columns))), None)
    if rows and paths is None:
        raise DigitError(f"{name} has no column file_name; its columns are {some(columns)}: add it, or {HELP}")
    rest = [key for key in columns if key != paths]
    found = _column(name, rest, column)
    try:
        values = as_labels([row.get(found) for row in rows]) if found else [None] * len(rows)
    except ValueError as error:
        raise DigitError(f"{name}: its column {found} holds {error}: choose another column, or {HELP}") from error
    labels: dict[str, Label] = {}
    for row, label in zip(rows, values, strict=True):
        path = posixpath.normpath(posixpath.join(folder, str(row.get(paths or "")).replace("\\", "/")))
        if labels.setdefault(path, label) != label:
            raise DigitError(f"{name} gives {path} two labels, {labels[path]!r} and {label!r}: leave one")
    return LabelFile(name, found, labels, [key for key in rest if key != found])


def _column(name: str, columns: Sequence[str], wanted: str | None) -> str | None:
    if wanted is None:
        return next(iter(label_names(columns)), None)
    if (found := find_name(wanted, columns)) is None:
        raise DigitError(f"{name} has no column {wanted!r}; its columns are {', '.join(columns) or 'none'}")
    return found


def _rows(name: str, data: bytes) -> list[dict[str, Any]]:
    suffix = posixpath.splitext(name)[1].lower()
    if suffix == ".parquet":
        return _parquet_rows(name, data)
    text = data.decode("utf-8-sig")
    if suffix == ".json":
        return _stylegan_rows(json.loads(text))
    if suffix in (".jsonl", ".ndjson"):
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no JSON object")
        return rows
    first = text.partition("\n")[0]
    delimiter = max(",;\t|", key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    return [{key.strip(): value for key, value in row.items() if isinstance(key, str)} for row in reader]


def _parquet_rows(name: str, data: bytes) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
        usable = [field.name for field in table.schema if not pa.types.is_temporal(field.type)]
        return table.select(usable).to_pylist()
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise ValueError(str(error)) from error


def _stylegan_rows(content: Any) -> list[dict[str, Any]]:
    """dataset.json: {"labels": [["00000/img.png", 6], ...]}, or a mapping instead of the pairs; null is no labels."""
    labels = content.get("labels") if isinstance(content, dict) else content
    if labels is None:
        return []
    pairs = labels.items() if isinstance(labels, dict) else labels
    if not isinstance(labels, dict | list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise ValueError('wanted {"labels": [["picture.png", 6], ...]}')
    return [{"file_name": path, "label": value} for path, value in pairs]


def match_images(names: Sequence[str], files: Sequence[LabelFile]) -> tuple[list[Label], list[str]]:
    """The label of each image, None without one, and notes on what does not match."""
    rows: dict[str, Label] = {}
    for file in files:
        for path, label in file.labels.items():
            if rows.setdefault(path, label) != label:
                others = " and ".join(other.name for other in files if path in other.labels)
                raise DigitError(f"{others} give {path} different labels, {rows[path]!r} and {label!r}: leave one")
    found = [rows.get(name) for name in names]
    known = set(names)
    without, lost = sum(name not in rows for name in names), [path for path in rows if path not in known]
    notes = []
    if without:
        notes.append(f"{without} images stand in no label file: unlabelled")
    if empty := sum(name in rows and rows[name] is None for name in names):
        notes.append(f"{empty} images have an empty label or -1: unlabelled")
    if lost:
        notes.append(f"{len(lost)} rows of label files name images that are not here, such as {some(lost)}")
    return found, notes
