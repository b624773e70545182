"""Folders of images with odd names, splits that are none, and damaged label files of every kind."""

import io
import random
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from digit.data.images import open_source

from ..mutate import damage, json_bytes, strange_json
from .images import read_all, samples

FOLDERS = ("", "a", "b", "a/b", "train", "Val2017", "test", "test/a", "7", "007", "a\nb", "é", "-1", "none")
CSV = (
    b"file_name,label\n0.png,1\n1.png,2\n",
    b"file_name;Class\n0.png;x\n",
    b"\xef\xbb\xbffile_name,label\r\n0.png,1\r\n",
    b'file_name,label\n"0.png","a ""b"", c"\n',
    b"file_name,label\n0.png\n1.png,1,2,3\n",
    b"label\n1\n",
    b"\n\n",
    b"",
    b"file_name,label\n0.png,1\n0.png,2\n",
    b"file_name,label\n0.png,\xe9\n",
    b"file_name,label\n\0\0,1\n",
)
ODD = ("none", "folders", "top", "label", "Class", "x", "metadata.csv", ":label", "/dev/null", "")


class FolderLoader:
    """Opens a folder with open_source, and reads every image."""

    name = "folder"

    def build(self, folder: Path, rng: random.Random) -> None:
        for number in range(rng.randrange(1, 6)):
            place = folder / "data" / rng.choice(FOLDERS)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(samples()["PNG"][0])
        for name in rng.sample(
            ("metadata.csv", "metadata.jsonl", "metadata.parquet", "dataset.json"), rng.choice((0, 1, 1, 2))
        ):
            place = folder / "data" / rng.choice(("", "", "", "a"))
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(label_file(name, rng))
        (folder / "labels_from").write_text(rng.choice(("auto", "auto", rng.choice(ODD))))

    def load(self, folder: Path) -> None:
        source = open_source(folder / "data", labels_from=(folder / "labels_from").read_text())
        assert len(source.fingerprint) == 64
        read_all(source)


def label_file(name: str, rng: random.Random) -> bytes:
    """The bytes of a label file, more often than not damaged."""
    if name == "metadata.csv":
        return damage(rng.choice(CSV), rng, CSV) if rng.random() < 0.5 else rng.choice(CSV)
    if name == "metadata.jsonl":
        return b"\n".join(json_bytes(strange_json({"file_name": "0.png", "label": 1}, rng), rng) for _ in range(3))
    if name == "dataset.json":
        return json_bytes(strange_json({"labels": [["0.png", 1], ["a/1.png", [0, 1]]]}, rng), rng)
    return damage(_table(), rng) if rng.random() < 0.7 else _table()


@cache
def _table() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"file_name": ["0.png", "a/1.png"], "label": [1, 2]}), out)
    return out.getvalue()
