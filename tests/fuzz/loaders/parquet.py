"""Parquet in the Hub's layout: damaged bytes, page headers and footers, and columns of other types."""

import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from digit.data.images import open_source

from ..mutate import damage, json_bytes, number, strange_json
from .images import read_all, samples

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"},
}


class ParquetLoader:
    """Opens a file or a folder of shards with open_source, and reads every image."""

    name = "parquet"

    def build(self, folder: Path, rng: random.Random) -> None:
        for shard in range(rng.choice((1, 1, 1, 2))):
            data = odd_table(rng) if rng.random() < 0.35 else rng.choice(seeds())
            action = rng.random()
            if action < 0.3:
                data = damage(data, rng, seeds())
            elif action < 0.55:
                data = damage(data, rng, seeds(), slice(max(0, len(data) - 900), len(data)))
            elif action < 0.6:
                data = data[:-8] + number(rng)[:4].ljust(4, b"\0") + data[-4:]
            (folder / f"train-{shard:05d}-of-00002.parquet").write_bytes(data)

    def load(self, folder: Path) -> None:
        read_all(open_source(folder))


@cache
def seeds() -> tuple[bytes, ...]:
    """Whole files: the Hub's layout with ClassLabel, text labels, none; with every usual compression."""
    pictures = [samples()["PNG"][0], samples()["JPEG"][0], samples()["PNG"][3]] * 3
    image = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(pictures)]
    numbers, words = [0, 1, 2, 0, 1, 2, 0, None, 1], list("abcabcabc")
    tables = (
        ({"image": image, "label": numbers}, "snappy", {}),
        ({"image": image, "label": words}, "gzip", {}),
        ({"image": image}, "zstd", {"use_dictionary": False}),
        ({"jpg": pictures, "cls": numbers}, "none", {"use_dictionary": False}),
        ({"image": image, "label": pa.array(words).dictionary_encode()}, "lz4", {"data_page_version": "2.0"}),
        ({"img": image, "label": numbers}, "brotli", {"write_page_checksum": True}),
    )
    return tuple(_write(*table) for table in tables)


def _write(columns: dict[str, Any], compression: str, options: dict[str, Any], features: bytes | None = None) -> bytes:
    table = pa.table(columns)
    text = json.dumps({"info": {"features": FEATURES}}).encode() if features is None else features
    table = table.replace_schema_metadata({"huggingface": text})
    out = io.BytesIO()
    pq.write_table(table, out, compression=compression, row_group_size=4, **options)
    return out.getvalue()


def odd_table(rng: random.Random) -> bytes:
    """A well-formed file whose columns hold what nobody expects."""
    png, rows = samples()["PNG"][0], rng.choice((0, 1, 5, 9))
    images = [
        [{"bytes": png, "path": None}] * rows,
        [{"bytes": None, "path": "../../etc/passwd"}] * rows,
        [None] * rows,
        [{"bytes": "text", "path": "x"}] * rows,
        [{"bytes": 5}] * rows,
        [png] * rows,
        [[png]] * rows,
        [{"bytes": {"bytes": png}}] * rows,
        [{"bytes": b"", "path": ""}] * rows,
        [{"bytes": [1, 2]}] * rows,
        ["text"] * rows,
        pa.array([png] * rows, pa.large_binary()),
        pa.array([png[:9]] * rows, pa.binary(9)),
        pa.array([png] * rows, pa.binary_view()),
        pa.array([png] * rows).dictionary_encode(),
    ]
    labels = [
        [0, 1, 2, 3, 4, 5, 6, 7, 8][:rows],
        [-1] * rows,
        [-(2**63)] * rows,
        [2**63 - 1] * rows,
        [0.5] * rows,
        [float("nan")] * rows,
        [None] * rows,
        [[1]] * rows,
        ["a\nb"] * rows,
        ["", "1", "02", "²", "-", "x", "9", "1" * 5000, "٣"][:rows],
        [{"a": 1}] * rows,
        [True] * rows,
        [b"\xff"] * rows,
        [b"cat"] * rows,
        pa.array([2**64 - 1] * rows, pa.uint64()),
        pa.array([5] * rows, pa.int8()),
        pa.array(["a"] * rows).dictionary_encode(),
        pa.array([7] * rows).dictionary_encode(),
        pa.array([1] * rows, pa.timestamp("s")),
        pa.array([b"\xff"] * rows, pa.binary()),
        pa.array(["a"] * rows, pa.string_view()),
        pa.array(["a"] * rows, pa.large_string()),
        pa.nulls(rows),
    ]
    columns = {rng.choice(("image", "img", "jpg", "picture", "a\nb")): rng.choice(images)}
    if rng.random() < 0.85:
        columns[rng.choice(("label", "label", "label", "cls", "image.bytes", "fine_label"))] = rng.choice(labels)
    if rng.random() < 0.2:
        columns["other"] = rng.choice(labels)
    features = (
        strange_json({"info": {"features": FEATURES}}, rng) if rng.random() < 0.5 else {"info": {"features": FEATURES}}
    )
    text = damage(b'{"info": {}}', rng) if rng.random() < 0.1 else json_bytes(features, rng)
    try:
        return _write(columns, rng.choice(("snappy", "none", "zstd")), {}, text)
    except (pa.ArrowException, ValueError, TypeError):
        return rng.choice(seeds())  # not every mixture can be written
