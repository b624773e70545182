"""Archives of images: damaged bytes, odd names, members that unpack to far more, label files with strange values."""

import io
import random
import zipfile
from functools import cache
from pathlib import Path

from digit.data.images import open_source

from ..mutate import NAMES, damage, json_bytes, strange_json
from .images import read_all, samples

ODD = (
    "../1.png",
    "/1.png",
    "a//1.png",
    "a/./1.png",
    "__MACOSX/1.png",
    ".png",
    "a/.png",
    "1.png/",
    "é.png",
    "train/1.png",
)


class ZipLoader:
    """Opens a .zip with open_source, and reads every image."""

    name = "zip"

    def build(self, folder: Path, rng: random.Random) -> None:
        data = odd_zip(rng) if rng.random() < 0.6 else rng.choice(seeds())
        if rng.random() < 0.7:
            tail = slice(max(0, len(data) - rng.choice((22, 400, len(data)))), len(data))  # the central directory
            data = damage(data, rng, seeds(), tail)
        (folder / "0000.zip").write_bytes(data)

    def load(self, folder: Path) -> None:
        read_all(open_source(folder / "0000.zip"))


@cache
def seeds() -> tuple[bytes, ...]:
    """Undamaged archives, stored and deflated."""
    names = {f"{kind}/{number}.png": samples()["PNG"][0] for kind in "ab" for number in range(3)}
    labels = b'{"labels": [["a/0.png", 1], ["b/1.png", 0]]}'
    return tuple(
        _pack({**names, "dataset.json": labels}, method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    )


def odd_zip(rng: random.Random) -> bytes:
    """A well-formed archive of odd members."""
    members: dict[str, bytes] = {}
    for number in range(rng.randrange(8)):
        name = rng.choice((*ODD, *NAMES)) if rng.random() < 0.3 else f"{rng.choice('ab')}/{number}.png"
        members[name] = rng.choice((samples()["PNG"][0], samples()["JPEG"][0], b"", bytes(10**6)))
    if rng.random() < 0.5:
        record = {"labels": [[name, number] for number, name in enumerate(members)]}
        members["dataset.json"] = json_bytes(strange_json(record, rng), rng)
    try:
        return _pack(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    except (ValueError, IndexError):
        return rng.choice(seeds())  # not every name can be written


def _pack(members: dict[str, bytes], method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()
