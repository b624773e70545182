"""White of a source's images of more than 8 bits: found by probing, said, and part of the fingerprint."""

import io
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deep_files import png_16
from PIL import Image

from digit.data import pixel_range
from digit.data.images import open_source
from digit.data.pixel_range import find_pixel_range, require_same_white
from digit.errors import BadImageError, DigitError

CASES = {4012: 4095, 900: 1023, 255: 255, 1: 1, 16000: 16383, 40000: 65535, 6000: 16383}


def picture(largest: int, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, largest + 1, (6, 8, 3)).astype(np.uint16)
    values[0, 0] = largest
    return png_16(values)


def write(folder, largest: list[int]):
    folder.mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(largest):
        (folder / f"{number:04d}.png").write_bytes(picture(value, number))
    return folder


@pytest.mark.parametrize("largest", CASES)
def test_white_is_the_usual_value_at_or_above_the_largest(tmp_path, largest):
    source = open_source(write(tmp_path, [largest, largest // 2, largest]))
    assert source.pixel_range.white == CASES[largest]
    said = f"pixels of more than 8 bits: white is {CASES[largest]} (largest value of 3 images probed: {largest})"
    assert str(source.pixel_range) == said + "; --pixel_max says otherwise"
    brightest = np.asarray(source.read(0)[0]).max()
    assert brightest == pytest.approx(255 * largest / CASES[largest], abs=1)


def test_every_kind_of_source_is_probed(tmp_path):
    data = [picture(4000, seed) for seed in range(3)]
    column = pa.array([{"bytes": one, "path": None} for one in data])
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, one in enumerate(data):
            entry = tarfile.TarInfo(f"{number}.png")
            entry.size = len(one)
            tar.addfile(entry, io.BytesIO(one))
    for name in ("x.parquet", "x.tar"):
        source = open_source(tmp_path / name)
        assert source.pixel_range.white == 4095 and np.asarray(source.read(0)[0]).max() == 249


def test_another_white_is_another_fingerprint(tmp_path):
    folder = write(tmp_path, [4000, 4000])
    found, same, other = (open_source(folder, pixel_max=white) for white in (None, 4095, 8191))
    assert found.fingerprint == same.fingerprint != other.fingerprint
    assert str(other.pixel_range) == "pixels of more than 8 bits: white is 8191 (as --pixel_max says)"
    assert found.limit(1).pixel_range is found.pixel_range and found.with_classes(["a"]).pixel_range.white == 4095


def test_8_bits_are_left_alone(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    source, given = open_source(tmp_path), open_source(tmp_path, pixel_max=4095)
    assert source.pixel_range.white is None
    assert "none of 1 images probed has more than 8 bits" in str(given.pixel_range)
    assert open_source("shapes:num=3,size=32").pixel_range.white is None


def test_a_mixture_is_said_and_its_dark_part_refused(tmp_path):
    source = open_source(write(tmp_path, [65535, 4095, 1023, 40000]))
    assert "2 nearly black by it, refused" in str(source.pixel_range)
    for index in (1, 2):
        with pytest.raises(BadImageError, match="a folder of their own"):
            source.read(index)
    given = open_source(tmp_path, pixel_max=65535)
    assert [np.asarray(given.read(index)[0]).max() for index in range(4)] == [255, 15, 3, 156]


def test_broken_images_and_what_files_state_are_left_out_of_the_probe(tmp_path):
    write(tmp_path, [1000, 1000])
    (tmp_path / "0002.png").write_bytes(picture(1000)[:60])
    (tmp_path / "0003.png").write_bytes(png_16(np.full((2, 2), 4001, np.uint16), (b"sBIT", b"\x0c")))
    source = open_source(tmp_path)
    assert source.pixel_range.white == 1023 and np.asarray(source.read(3)[0]).max() == 249


@pytest.mark.parametrize("value", [0, -1])
def test_pixel_max_is_at_least_1(tmp_path, value):
    with pytest.raises(DigitError, match=f"pixel_max is {value}, wanted"):
        open_source(write(tmp_path, [9]), pixel_max=value)


def test_few_headers_and_pixels_are_read(monkeypatch):
    asked, decoded = [], []

    def largest(index):
        decoded.append(index)
        return 4000

    found = find_pixel_range(lambda index: asked.append(index) or 1000, largest, 1_281_167, None)
    assert len(asked) == len(set(asked)) == len(decoded) == pixel_range.MAX_HEADERS
    assert max(asked) > 1_200_000 and found.white == 4095
    decoded.clear()
    monkeypatch.setattr(pixel_range, "MAX_PIXELS", 2500)
    find_pixel_range(lambda index: 1000, largest, 100, None)
    assert len(decoded) == 2


def test_probing_a_folder_of_8_bits_takes_no_time(tmp_path):
    for number in range(200):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.jpg")
    source = open_source(tmp_path)
    start = time.perf_counter()
    source.find_pixel_range()
    assert time.perf_counter() - start < 0.5


def test_training_and_test_images_have_one_white(tmp_path):
    train, test = (open_source(write(tmp_path / name, [value])) for name, value in (("a", 4000), ("b", 900)))
    with pytest.raises(DigitError, match="4095 in the training images .* and 1023 in the test .*--pixel_max"):
        require_same_white(train.pixel_range, test.pixel_range)
    require_same_white(train.pixel_range, train.pixel_range)
    require_same_white(train.pixel_range, None)


def test_a_photograph_of_12_bits_is_as_bright_as_the_original(shared, tmp_path):
    paths = sorted((shared / "data/grocery/train").rglob("*.jpg"))[:4]
    for number, path in enumerate(paths):
        values = np.asarray(Image.open(path).convert("RGB").resize((64, 64))).astype(np.float64)
        (tmp_path / f"{number}.png").write_bytes(png_16(np.rint(values / 255 * 4095).astype(np.uint16)))
    source = open_source(tmp_path)
    for number, path in enumerate(paths):
        original = np.asarray(Image.open(path).convert("RGB").resize((64, 64)))
        np.testing.assert_array_equal(np.asarray(source.read(number)[0]), original)
