"""docs/inputs.md is true: every example of its tables is built and read, and gives what the table says."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from written_images import picture, write_folder, write_rows, write_tar, write_zip

from digit.data.decode import EXTENSIONS
from digit.data.images import open_source
from digit.data.inspect import inspect_source
from digit.data.labels import LABEL_NAMES
from digit.errors import BadImageError, DigitError

PAGE = (Path(__file__).parents[2] / "docs/inputs.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    assert table, f"no table below {heading}"
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]


def members(cell: str) -> dict[str, bytes]:
    """'a/1.png 1.cls=cat' -> the files and their contents."""
    found = {}
    for number, part in enumerate(re.sub("^`|`$", "", cell).split(" ")):
        name, _, content = part.partition("=")
        is_image = Path(name).suffix.lower() in EXTENSIONS
        found[name] = picture(number, name) if is_image else content.replace("\\n", "\n").replace("\\s", " ").encode()
    return found


WRITERS = {"Folders": write_folder, "Label files": write_folder, "A .zip": write_zip, "WebDataset .tar": write_tar}
EXAMPLES = [(heading, *row) for heading in WRITERS for row in rows(heading)]


@pytest.mark.parametrize(("heading", "files", "num", "classes", "note"), EXAMPLES)
def test_examples_of_files(tmp_path, heading, files, num, classes, note):
    path = WRITERS[heading](tmp_path / "data", members(files))
    if num == "refused":
        with pytest.raises(DigitError, match=re.escape(note)):
            open_source(path)
        return
    source = open_source(path)
    assert (len(source), source.classes) == (int(num), re.findall("`(.+?)`", classes))
    assert any(note in said for said in source.notes) if note else not source.notes
    for index in range(len(source)):
        assert source.read(index)[0].size == (8, 6)


@pytest.mark.parametrize(("files", "split", "num", "classes", "note"), rows("ImageNet"))
def test_examples_of_imagenet(tmp_path, files, split, num, classes, note):
    path = write_folder(tmp_path / "data", members(files))
    source = open_source(path, split=split.strip("`"))
    assert (len(source), source.classes) == (int(num), re.findall("`(.+?)`", classes))
    assert any(note in said for said in source.notes), source.notes
    assert [source.read(index)[0].size for index in range(len(source))] == [(8, 6)] * len(source)


@pytest.mark.parametrize(("columns", "classes", "unlabelled", "note"), rows("Parquet"))
def test_examples_of_columns(tmp_path, columns, classes, unlabelled, note):
    values = json.loads(columns.strip("`"))
    source = open_source(write_rows(tmp_path / "x", values))
    assert source.classes == re.findall("`(.+?)`", classes)
    assert (source.labels() < 0).sum() == int(unlabelled)
    assert any(note in said for said in source.notes)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def deep(values: list, dtype: type, kind: str) -> bytes:
    return saved(Image.fromarray(np.array([values], dtype=dtype)), kind)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.new("L", (8, 6), 200), "JPEG", exif=exif)


RED, GREEN = Image.new("RGB", (8, 6), (255, 0, 0)), Image.new("RGB", (8, 6), (0, 255, 0))
PIXELS = {
    "PNG, grey, 200": saved(Image.new("L", (8, 6), 200), "PNG"),
    "PNG, 1 bit, 1": saved(Image.new("1", (8, 6), 1), "PNG"),
    "PNG, palette, 10 20 30": saved(Image.new("RGB", (8, 6), (10, 20, 30)).quantize(4), "PNG"),
    "PNG, RGBA, red, transparent": saved(Image.new("RGBA", (8, 6), (255, 0, 0, 0)), "PNG"),
    "PNG, grey and alpha, half transparent black": saved(Image.new("LA", (8, 6), (0, 128)), "PNG"),
    "TIFF, CMYK, no ink": saved(Image.new("CMYK", (8, 6)), "TIFF"),
    "GIF, two frames, red first": saved(RED, "GIF", save_all=True, append_images=[GREEN]),
    "TIFF, two pages, red first": saved(RED, "TIFF", save_all=True, append_images=[GREEN]),
    "JPEG, grey, turned by EXIF": turned(),
    "PNG, 16 bits, 65535 is white": deep([65535, 0], np.uint16, "PNG"),
    "PNG, 16 bits, 4095 is white": deep([4095, 0], np.uint16, "PNG"),
    "PNG, 16 bits, 1023 is white": deep([1023, 0], np.uint16, "PNG"),
    "TIFF, 32 bits, 255 is white": deep([255, 0], np.int32, "TIFF"),
    "TIFF, floats": deep([0.5, 0.0], np.float32, "TIFF"),
    "TIFF, 32 bits, 1000000 is white": deep([1000000, 0], np.int32, "TIFF"),
}


@pytest.mark.parametrize(("image", "becomes", "said"), rows("Pixels"))
def test_examples_of_pixels(tmp_path, image, becomes, said):
    (tmp_path / "0.png").write_bytes(PIXELS[image.strip("`")])  # the bytes decide, not the name
    source = open_source(tmp_path)
    if becomes == "refused":
        with pytest.raises(BadImageError, match=re.escape(said)):
            source.read(0)
        return
    assert source.read(0)[0].getpixel((0, 0)) == tuple(map(int, becomes.split()))
    assumed = list(inspect_source(source).assumed)
    assert any(text.startswith(said) for text in assumed) if said else not assumed


def test_names_of_label_columns():
    section = PAGE.split("\n## Parquet\n")[1].split("(in any case)")[0]
    listed = re.findall("`(.+?)`", section)
    assert tuple(listed) == LABEL_NAMES
