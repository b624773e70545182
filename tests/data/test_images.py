"""Decoding of every pixel type, and the four kinds of sources."""

import io
import json
import os
import pickle
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from written_images import write_tar

from digit.data.decode import decode_image
from digit.data.images import ImageSource, as_source, open_source
from digit.data.labels import index_classes
from digit.errors import BadImageError, DigitError


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def flat(colour: int | tuple = (200, 30, 60), size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def pixel(data: bytes, where: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return image.getpixel(where)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(data)), upright)


def test_grey_bilevel_and_palette():
    assert pixel(encode(flat(77, mode="L"))) == (77, 77, 77)
    assert pixel(encode(flat(1, mode="1"))) == (255, 255, 255)
    assert pixel(encode(flat((10, 20, 30)).quantize(4))) == (10, 20, 30)


def test_alpha_lies_over_white():
    assert pixel(encode(flat((255, 0, 0, 0), mode="RGBA"))) == (255, 255, 255)
    assert pixel(encode(flat((200, 0, 0, 255), mode="RGBA"))) == (200, 0, 0)
    assert pixel(encode(flat((0, 0, 0, 51), mode="RGBA"))) == (204, 204, 204)  # 255 * (1 - 51 / 255)
    assert pixel(encode(flat((100, 0), mode="LA"))) == (255, 255, 255)
    assert pixel(encode(flat((1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)
    palette = flat(0, mode="P")
    palette.putpalette([9, 9, 9, 200, 200, 200])
    assert pixel(encode(palette, transparency=0)) == (255, 255, 255)
    assert pixel(encode(palette, "GIF", transparency=0)) == (255, 255, 255)
    assert pixel(encode(palette)) == (9, 9, 9)


def test_cmyk_white_is_white():
    red, green, blue = pixel(encode(flat((0, 0, 0, 0), mode="CMYK"), "JPEG"))
    assert min(red, green, blue) > 250
    assert max(pixel(encode(flat((0, 0, 0, 255), mode="CMYK"), "TIFF"))) < 5


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 128, 257, 1000], [12345, 32768, 65000, 65535]], dtype=np.uint16)
    grey = np.asarray(decode_image(encode(Image.fromarray(values), kind)))[..., 0]
    np.testing.assert_array_equal(grey, np.rint(values / 257).astype(np.uint8))


def test_16_bit_transparent_value_is_white():
    values = np.array([[5000, 6000]], dtype=np.uint16)
    data = encode(Image.fromarray(values), transparency=5000)
    assert pixel(data) == (255,) * 3 and pixel(data, (1, 0)) == (23,) * 3


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_16_bit_colour_is_scaled():
    values = np.array([[[0, 1000, 65535], [300, 32768, 65000]]], dtype=">u2")  # (1, 2, 3); Pillow cannot write these
    header = (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    pixels = zlib.compress(b"\0" + values.tobytes())
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    np.testing.assert_allclose(np.asarray(decode_image(data)), values / 257, atol=1)


def test_values_without_a_range_are_refused():
    with pytest.raises(BadImageError, match="floating-point"):
        decode_image(encode(flat(0.5, mode="F"), "TIFF"))
    with pytest.raises(BadImageError, match="32-bit pixels"):
        decode_image(encode(flat(70000, mode="I"), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(kind):
    frames = [flat((255, 0, 0)), flat((0, 255, 0))]
    exact = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **exact)
    assert pixel(data) == (255, 0, 0)


def test_broken_files_name_themselves(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name, data in {"cut.jpg": encode(noise, "JPEG")[:2000], "text.png": b"hello", "empty.gif": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadImageError, match=name) as caught:
            decode_image(tmp_path / name)
        assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)
    with pytest.raises(BadImageError, match="no such file"):
        decode_image(tmp_path / "absent.jpg")


def test_decompression_bomb_is_refused_before_decoding():
    with pytest.raises(BadImageError, match="bomb"):
        decode_image(encode(flat(size=(100, 100))), max_pixels=9999)
    bomb = bytearray(encode(flat(0, mode="1")))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # IHDR claims 3.6 gigapixels
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(BadImageError, match="bomb"):
        decode_image(bytes(bomb))


def test_foreign_programs_are_never_started():
    with pytest.raises(BadImageError, match="known format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


# ---------------------------------------------------------------- folders


def write_tree(root, names, size=(8, 6)):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        flat((number, 0, 0), size).save(root / name, "PNG")
    return root


def test_nested_folders_are_classes(tmp_path):
    names = ["b/x.png", "a/deep/y.PNG", "a/z.png", "top.png", ".hidden.png", ".git/w.png"]
    source = open_source(write_tree(tmp_path, names))
    assert isinstance(source, ImageSource) and len(source) == 4
    assert source.classes == ["a", "a/deep", "b"]
    named = {os.path.basename(source.key(i)): source.read(i)[1] for i in range(4)}
    assert named == {"x.png": 2, "y.PNG": 1, "z.png": 0, "top.png": -1}
    assert source.labels().tolist() == [source.read(i)[1] for i in range(4)]


def test_flat_folder_is_unlabelled(tmp_path):
    source = open_source(str(write_tree(tmp_path, ["2.png", "1.png", "notes.png/3.png"][:2])))
    assert source.classes == [] and source.labels().tolist() == [-1, -1]
    assert [os.path.basename(source.key(i)) for i in range(2)] == ["1.png", "2.png"]


def test_links_in_a_circle_end(tmp_path):
    write_tree(tmp_path, ["a/1.png", "b/2.png"])
    (tmp_path / "a/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b/over").symlink_to(tmp_path / "a", target_is_directory=True)
    assert len(open_source(tmp_path)) == 2


def test_a_link_to_nothing_is_a_bad_image(tmp_path):
    write_tree(tmp_path, ["1.png"])
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(BadImageError, match=r"2\.png: no such file"):
        open_source(tmp_path).read(1)


def test_fingerprint_follows_names_and_sizes_not_the_place(tmp_path):
    first, second = (open_source(write_tree(tmp_path / name, ["a/1.png", "b/2.png"])) for name in ("x", "y"))
    assert first.fingerprint == second.fingerprint
    write_tree(tmp_path / "y", ["b/3.png"])
    assert open_source(tmp_path / "y").fingerprint != first.fingerprint


def test_split_subfolders(tmp_path):
    write_tree(tmp_path, ["train/a/1.png", "train/b/2.png", "val/b/3.png"])
    assert open_source(tmp_path).classes == ["a", "b"]
    validation = open_source(tmp_path, split="validation")
    assert len(validation) == 1 and validation.labels().tolist() == [0]
    assert validation.with_classes(["a", "b"]).read(0)[1] == 1
    assert validation.with_classes(["a"]).labels().tolist() == [-1]
    with pytest.raises(DigitError, match="no split 'test'"):
        open_source(tmp_path, split="test")


def test_mistakes_are_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    write_tree(tmp_path, ["one/x.png", "mixed/x.png"])
    (tmp_path / "mixed/y.tar").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.parquet").write_text("hello")
    cases = {
        "missing": "no such path", "empty": "no images", "one/x.png": "is one image",
        "mixed": "1 tar files and 1 images", "notes.txt": r"is a \.txt file",
        "bad.parquet": "cannot be read as Parquet",
    }  # fmt: skip
    for name, text in cases.items():
        with pytest.raises(DigitError, match=text) as caught:
            open_source(tmp_path / name)
        assert "\n" not in str(caught.value)
    for spec in ("shapes:nun=3", "shapes:num=x", "shapes:num"):
        with pytest.raises(DigitError, match="wanted shapes:"):
            open_source(spec)


def test_limit_and_subset_spread_over_the_source(tmp_path, unchecked):
    names = [f"{folder}/{i}.png" for folder in "abcd" for i in range(3)]
    source = open_source(write_tree(tmp_path, names))
    assert open_source(tmp_path, limit=4).labels().tolist() == [0, 1, 2, 3]
    assert open_source(tmp_path, limit=99).fingerprint == source.fingerprint
    part = source.subset([11, 0])
    assert part.labels().tolist() == [3, 0] and part.key(0) == source.key(11)
    assert part.fingerprint != source.subset([0, 11]).fingerprint
    for bad in ([12], [-1]):
        with pytest.raises(DigitError, match=r"has 0\.\.11"):
            source.subset(bad)
    for bad in (0, -3, 2.5, True, "4"):
        with pytest.raises(DigitError, match=f"limit is {bad!r}: it must be"):
            open_source(tmp_path, limit=bad)
    assert len(open_source(tmp_path, limit=np.int64(4))) == 4
    for bad in ([0.5], np.ones(12, dtype=bool), ["0"]):
        with pytest.raises(DigitError, match="subset asks for images by .*: give whole numbers"):
            source.subset(bad)


def test_sources_are_opened_by_path_of_any_kind_or_are_open_already(tmp_path, monkeypatch, unchecked):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = open_source(write_tree(tmp_path / "photos", ["a/1.png", "b/2.png"])).fingerprint
    for spec in ("~/photos", tmp_path / "photos", str(tmp_path / "photos"), open_source("~/photos")):
        assert as_source(spec).fingerprint == names
    with pytest.raises(DigitError, match="split is 'test', but .*photos is a source already open"):
        as_source(open_source("~/photos"), split="test")
    for wrong in (None, 3, "", b"photos", ["photos"]):
        with pytest.raises(DigitError, match="a path is "):
            open_source(wrong)


def test_classes_are_sorted_as_numbers_where_they_are_numbers():
    assert index_classes([10, 9, None, -1])[0] == ["9", "10"]
    assert index_classes(["10", "9"])[0] == ["9", "10"]
    assert index_classes(["10", "9", "09"])[0] == ["9", "10"]
    assert index_classes(["10", "9", "09"], merge=False)[0] == ["09", "9", "10"]
    assert index_classes(["10", "9", "x"], merge=False)[0] == ["10", "9", "x"]
    classes, labels = index_classes(["b", 3, "", "b"])
    assert classes == ["3", "b"] and labels.tolist() == [1, 0, -1, 1]


# ---------------------------------------------------------------- Parquet


def write_parquet(path, labels, *, names=None, rows_per_group=2, column="image", bytes_=None):
    images = bytes_ or [encode(flat((i, 0, 0))) for i in range(len(labels))]
    column_of = [{"bytes": data, "path": None} for data in images]
    table = pa.table({"note": ["x"] * len(labels), column: column_of, "label": labels})
    if names:
        features = {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group)


def test_parquet_rows_labels_and_names(tmp_path):
    write_parquet(tmp_path / "x.parquet", [1, 0, None, 1, 0], names=["cat", "dog"], column="img")
    source = open_source(tmp_path / "x.parquet")
    assert source.classes == ["cat", "dog"] and source.labels().tolist() == [1, 0, -1, 1, 0]
    for i in (4, 0, 3, 1, 2):
        image, label = source.read(i)
        assert image.getpixel((0, 0)) == (i, 0, 0) and label == source.labels()[i]
    assert source.key(3) == "x.parquet row 3"


def test_parquet_without_names_takes_sorted_values(tmp_path):
    write_parquet(tmp_path / "numbers.parquet", [10, 9, 10])
    write_parquet(tmp_path / "words.parquet", ["dog", "cat", "dog"])
    numbers, words = (open_source(tmp_path / f"{name}.parquet") for name in ("numbers", "words"))
    assert numbers.classes == ["9", "10"] and numbers.labels().tolist() == [1, 0, 1]
    assert words.classes == ["cat", "dog"] and words.labels().tolist() == [1, 0, 1]


def test_parquet_folder_splits(tmp_path):
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", [0, 1, 0])
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", [1, 1])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", [0])
    assert len(open_source(tmp_path)) == 5 and len(open_source(tmp_path, split="test")) == 1
    source = open_source(tmp_path)
    assert source.key(4) == "data/train-00001-of-00002.parquet row 1"
    assert source.key(2) == "data/train-00000-of-00002.parquet row 2"
    assert source.read(4)[0].getpixel((0, 0)) == (1, 0, 0)
    with pytest.raises(DigitError, match="it has test, train"):
        open_source(tmp_path, split="validation")


def test_splits_in_other_layouts(tmp_path):
    write_parquet(tmp_path / "hub/default/train/0000.parquet", [0, 1, 0])
    write_parquet(tmp_path / "hub/default/test/0000.parquet", [0])
    assert len(open_source(tmp_path / "hub")) == 3 and len(open_source(tmp_path / "hub", split="test")) == 1
    (tmp_path / "shards").mkdir()
    for name, num in (("imagenet1k-train-0000", 2), ("imagenet1k-validation-0000", 1)):
        write_tar(tmp_path / f"shards/{name}.tar", {f"{i}.png": encode(flat()) for i in range(num)})
    assert len(open_source(tmp_path / "shards")) == 2 and len(open_source(tmp_path / "shards", split="val")) == 1


def test_parquet_mistakes(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "none.parquet")
    with pytest.raises(DigitError, match=r"no image column.*a: int64"):
        open_source(tmp_path / "none.parquet")
    write_parquet(tmp_path / "labels.parquet", [0, 5], names=["cat", "dog"])
    with pytest.raises(DigitError, match=r"labels 0..5, but 2 class names"):
        open_source(tmp_path / "labels.parquet")
    write_parquet(tmp_path / "broken.parquet", [0, 0], bytes_=[b"no image", None])
    source = open_source(tmp_path / "broken.parquet")
    for i, text in enumerate(["not an image", "no image bytes"]):
        with pytest.raises(BadImageError, match=f"row {i}: {text}"):
            source.read(i)


def test_parquet_with_a_damaged_page_is_a_bad_image(tmp_path):
    rng = np.random.default_rng(0)
    write_parquet(tmp_path / "x.parquet", [0] * 4, bytes_=[rng.bytes(4000) for _ in range(4)])
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[60:3000] = bytes(2940)
    (tmp_path / "x.parquet").write_bytes(data)
    source = open_source(tmp_path / "x.parquet")
    for i in range(4):
        with pytest.raises(BadImageError):
            source.read(i)


def test_parquet_of_the_hub(shared):
    source = open_source(shared / "data/cifar10", split="test")
    assert len(source) == 10000 and source.classes[:2] == ["airplane", "automobile"]
    image, label = source.read(9999)
    assert image.size == (32, 32) and label == source.labels()[9999]
    assert len(open_source(shared / "data/cifar10")) == 50000


# ---------------------------------------------------------------- WebDataset


def test_tar_samples_and_labels(tmp_path):
    picture = [encode(flat((i, 0, 0))) for i in range(6)]
    write_tar(tmp_path / "s-0.tar", {
        "a/0.seg.png": picture[0], "a/0.cls": b"10\n", "b/0.png": picture[1], "b/0.cls": b"9",
        "1.json": b'{"label": 10, "x": 2}', "1.png": picture[2], "2.png": picture[3], "3.cls": b"9",
        "4.json": b"{broken", "4.png": picture[4], ".hidden.png": picture[0],
    })  # fmt: skip
    write_tar(tmp_path / "s-1.tar", {"0.png": picture[5], "0.cls": b"9"})
    source = open_source(tmp_path)
    assert source.classes == ["9", "10"] and source.labels().tolist() == [1, 0, 1, -1, -1, 0]
    assert [source.read(i)[0].getpixel((0, 0))[0] for i in range(6)] == list(range(6))
    assert source.key(5) == "s-1.tar:0.png"
    assert len(open_source(tmp_path / "s-0.tar")) == 5


def test_tar_mistakes(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.txt": b"hello"})
    write_tar(tmp_path / "cut.tar", {f"{i}.png": encode(flat(), "BMP") for i in range(9)})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:3000])
    (tmp_path / "junk.tar").write_bytes(b"junk" * 500)
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz"):
        pass
    cases = {"a.tar": "holds no images", "cut.tar": "cut short after", "junk.tar": "damaged", "b.tar.gz": "with gzip"}
    for name, text in cases.items():
        with pytest.raises(DigitError, match=text):
            open_source(tmp_path / name)


# ---------------------------------------------------------------- all of them


def test_every_source_can_be_pickled(tmp_path):
    write_tree(tmp_path / "folder", ["a/1.png", "b/2.png"])
    write_parquet(tmp_path / "x.parquet", [0, 1])
    write_tar(tmp_path / "x.tar", {"0.png": encode(flat()), "0.cls": b"1"})
    for spec in ("folder", "x.parquet", "x.tar"):
        source = open_source(tmp_path / spec)
        source.read(0)
        copy = pickle.loads(pickle.dumps(source))
        assert copy.fingerprint == source.fingerprint and copy.read(0)[0].tobytes() == source.read(0)[0].tobytes()


def test_shapes_open_by_name():
    source = open_source("shapes:num=12,size=32,seed=1", limit=5)
    assert len(source) == 5 and source.read(4)[0].size == (32, 32) and len(source.classes) == 10
    with pytest.raises(DigitError, match="no splits"):
        open_source("shapes", split="test")
