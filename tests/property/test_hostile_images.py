"""Whatever bytes come, decoding gives a plain RGB picture or a BadImageError of one line that names the file."""

import io
import random
import tarfile
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from digit.data.decode import decode_image
from digit.data.images import open_source
from digit.data.loader import CropLoader
from digit.data.preprocess import PreprocessConfig, crop_image
from digit.errors import BadImageError, DigitError
from fuzz.loaders.images import noise_image

RNG = np.random.default_rng(0)
MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "GIF": ("P", "L"),
    "WEBP": ("RGB",), "TIFF": ("RGB", "I;16", "F", "1", "CMYK", "LAB"), "BMP": ("RGB", "P", "1"),
    "PPM": ("RGB", "I;16", "1"), "TGA": ("RGBA", "L"), "JPEG2000": ("RGB", "L"),
}  # fmt: skip


def make(kind: str, mode: str) -> bytes:
    out = io.BytesIO()
    noise_image(mode, RNG).save(out, kind)
    return out.getvalue()


SAMPLES = [make(kind, mode) for kind, modes in MODES.items() for mode in modes]


def check(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about damaged metadata
        try:
            image = decode_image(data, name="some.file", max_pixels=10**6)
        except BadImageError as error:
            assert str(error).startswith("some.file: ") and "\n" not in str(error) and "0x" not in str(error)
            return
    assert image.mode == "RGB"
    try:
        assert crop_image(image, PreprocessConfig(image_size=8), seed=0, index=0, crop=0).shape == (8, 8, 3)
    except BadImageError as error:
        assert "too long and thin" in str(error)


@pytest.mark.parametrize("data", SAMPLES, ids=[f"{kind}-{mode}" for kind, modes in MODES.items() for mode in modes])
def test_every_type_is_read_or_refused_in_words(data):
    check(data)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(SAMPLES), st.integers(1, 30), st.randoms(use_true_random=False))
def test_flipped_bytes(data: bytes, num: int, rng: random.Random):
    damaged = bytearray(data)
    for _ in range(num):
        damaged[rng.randrange(min(len(damaged), 200) if rng.random() < 0.5 else len(damaged))] = rng.randrange(256)
    check(bytes(damaged))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(SAMPLES), st.floats(0, 1))
def test_cut_short(data: bytes, part: float):
    check(data[: int(part * len(data))])


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes):
    check(data)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 40), st.integers(0, 2**70), st.integers(0, 2**40))
def test_any_size_gives_a_crop(width: int, height: int, size: int, seed: int, index: int):
    cfg = PreprocessConfig(image_size=size)
    assert crop_image(Image.new("RGB", (width, height)), cfg, seed=seed, index=index, crop=3).shape == (size, size, 3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5119), st.integers(1, 200), st.integers(0, 255))
def test_damaged_tar(tmp_path, start: int, length: int, value: int):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("0.png", SAMPLES[0]), ("0.cls", b"3"), ("1.png", SAMPLES[2])):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    damaged = bytearray(path.read_bytes())
    damaged[start : start + length] = bytes([value]) * length
    path.write_bytes(damaged)
    try:
        source = open_source(path)
    except DigitError:
        return
    for index in range(len(source)):
        try:
            source.read(index)
        except BadImageError as error:
            assert "x.tar" in str(error)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["good", "cut", "empty", "text"]), min_size=1, max_size=6))
def test_a_folder_of_anything_is_skipped_or_refused(tmp_path_factory, kinds: list[str]):
    root = tmp_path_factory.mktemp("any")
    content = {"good": SAMPLES[0], "cut": SAMPLES[0][:99], "empty": b"", "text": b"hello"}
    for number, kind in enumerate(kinds):
        (root / f"{number}.png").write_bytes(content[kind])
    loader = CropLoader(open_source(root), PreprocessConfig(image_size=8), batch_size=2, max_bad_fraction=1.0)
    if "good" not in kinds:
        with pytest.raises(DigitError, match="none of the"):
            list(loader)
        return
    assert [bool(ok) for batch in loader for ok in batch.ok] == [kind == "good" for kind in kinds]
    assert len(loader.bad) == len(kinds) - kinds.count("good")
