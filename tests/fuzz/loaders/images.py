"""Folders of image files: damaged images of every format with right, wrong and odd names."""

import io
import os
import random
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from digit.data.decode import EXTENSIONS, probe_image
from digit.data.images import open_source
from digit.data.preprocess import PreprocessConfig, crop_image
from digit.data.source import ImageSource
from digit.errors import BadImageError

from ..mutate import EDGES, damage, number

MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "GIF": ("P", "L"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "I;16", "F", "1", "CMYK", "LAB", "RGBA"),
    "BMP": ("RGB", "P", "1"),
    "PPM": ("RGB", "I;16", "1"),
    "TGA": ("RGBA", "L"),
    "JPEG2000": ("RGB", "L"),
    "AVIF": ("RGB",),
    "MPO": ("RGB",),
}
CROP = PreprocessConfig(image_size=8)
ODD_NAMES = (b"a\nb.png", b"\xff\xfe.png", b"x" * 240 + b".png", b" .png", b"-rf.png", b"*.png", b"\x1b[31m.png")


class ImagesLoader:
    """Opens a folder with open_source; reads, crops and probes every image."""

    name = "images"

    def build(self, folder: Path, rng: random.Random) -> None:
        for index in range(rng.choice((1, 1, 2))):
            place = folder / rng.choice(("", "", "cat", "dog/x"))
            place.mkdir(parents=True, exist_ok=True)
            extension = rng.choice(sorted(EXTENSIONS) if rng.random() < 0.9 else (".parquet", ".tar", ".txt"))
            name = rng.choice(ODD_NAMES) if rng.random() < 0.05 else f"{index}{extension}".encode()
            path = os.path.join(os.fsencode(place), name)
            if rng.random() < 0.02:
                os.symlink(rng.choice((b".", b"..", name, b"/nowhere", b"/dev/null")), path)
                continue
            with open(path, "wb") as file:
                file.write(picture(rng))

    def load(self, folder: Path) -> None:
        read_all(open_source(folder))


def read_all(source: ImageSource) -> None:
    """Reads every image of a source; errors must name the image."""
    labels = source.labels()
    assert labels is None or (len(labels) == len(source) and labels.max(initial=-1) < max(1, len(source.classes)))
    for text in (source.name, *source.classes, *(source.key(index) for index in range(min(len(source), 50)))):
        text.encode()  # a manifest can hold it
    for index in range(min(len(source), 50)):
        try:
            image, label = source.read(index)
            assert image.mode == "RGB" and -1 <= label < max(1, len(source.classes))
            assert crop_image(image, CROP, seed=0, index=index, crop=0).shape == (8, 8, 3)
        except BadImageError as error:
            assert "\n" not in str(error), "a message of several lines"
            if isinstance(error.__cause__, MemoryError):
                raise  # counts as a memory finding
        try:
            probe_image(source.raw(index))
        except BadImageError as error:
            assert "\n" not in str(error), "a message of several lines"


@cache
def samples() -> dict[str, tuple[bytes, ...]]:
    """Small undamaged images by format, the same in every run."""
    rng = np.random.default_rng(0)
    return {kind: tuple(_make(kind, mode, rng) for mode in modes) for kind, modes in MODES.items()}


def noise_image(mode: str, rng: np.random.Generator) -> Image.Image:
    """A 17 x 12 image of random pixels in a PIL mode."""
    image = Image.fromarray(rng.integers(0, 256, (12, 17, 3), dtype=np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (12, 17), dtype=np.uint16))
    if mode == "LAB":
        return Image.frombytes("LAB", image.size, image.tobytes())
    return image if mode == "RGB" else image.convert(mode)


def _make(kind: str, mode: str, rng: np.random.Generator) -> bytes:
    image = noise_image(mode, rng)
    out, options = io.BytesIO(), {}
    if kind in ("JPEG", "WEBP", "PNG", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    if kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO") and mode in ("RGB", "P"):
        options |= {"save_all": True, "append_images": [image.rotate(90)]}
    if kind == "TIFF" and mode == "RGB":
        options["compression"] = "tiff_lzw"
    image.save(out, kind, **options)
    return out.getvalue()


def picture(rng: random.Random) -> bytes:
    """A damaged image, sometimes a decompression bomb."""
    kind = rng.choice(sorted(samples()))
    data = rng.choice(samples()[kind])
    others = tuple(one for many in samples().values() for one in many)
    action = rng.random()
    if action < 0.02:
        return b""
    if action < 0.05:
        return png_bomb(rng)
    if kind == "PNG" and action < 0.5:
        return png_with_changed_chunks(data, rng)
    if action < 0.85:
        return damage(data, rng, others, slice(0, 200) if rng.random() < 0.7 else slice(None))
    return data if action < 0.9 else data + damage(rng.choice(others), rng)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG chunk with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with_changed_chunks(data: bytes, rng: random.Random) -> bytes:
    """Changed contents under right checksums."""
    out, place = data[:8], 8
    while place + 8 <= len(data):
        (length,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        content = data[place + 8 : place + 8 + length]
        if rng.random() < 0.4:
            content = damage(content, rng)
        if kind == b"IHDR" and rng.random() < 0.5:
            width, height = (rng.choice((*EDGES[3:13], 9000, 20000)) & 0x7FFFFFFF for _ in range(2))
            content = struct.pack(">II", width, height) + content[8:]
        if rng.random() < 0.9:
            out += chunk(kind, content) * rng.choice((1, 1, 1, 1, 2))
        place += 12 + length
    return out + (number(rng) if rng.random() < 0.1 else b"")


def png_bomb(rng: random.Random) -> bytes:
    """Few bytes that claim, or unpack to, many."""
    side = rng.choice((9400, 20000, 60000, 2**31 - 1))
    depth, colour = rng.choice(((8, 0), (8, 2), (8, 6), (16, 6), (1, 3), (16, 0)))
    zeros = zlib.compress(bytes(rng.choice((10, 10**5, 3 * 10**7))))
    extra = rng.choice(
        (
            b"",
            chunk(b"zTXt", b"k\0\0" + zeros),
            chunk(b"iTXt", b"k\0\1\0\0\0" + zeros),
            chunk(b"iCCP", b"k\0\0" + zeros),
        )
    )
    header = struct.pack(">IIBBBBB", side, rng.choice((1, side)), depth, colour, 0, 0, rng.choice((0, 1)))
    palette = chunk(b"PLTE", bytes(6)) if colour == 3 else b""
    body = chunk(b"IHDR", header) + extra + palette + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
