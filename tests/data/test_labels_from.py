"""--labels_from, containers whose parts disagree, and what is refused."""

import io
import json
import re
import tarfile
import zipfile

import pytest
from written_images import picture, write_folder, write_rows, write_tar, write_zip

from digit.data.images import open_source
from digit.data.labels import as_label, as_labels
from digit.errors import BadImageError, DigitError


def labels(source):
    return [source.classes[label] if label >= 0 else None for label in source.labels()]


def named(names):
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


@pytest.fixture
def tree(tmp_path):
    files = {name: picture(number) for number, name in enumerate(("x/a/1.png", "x/b/2.png", "y/a/3.png", "4.png"))}
    return write_folder(tmp_path / "tree", files)


def test_folders_top_and_none(tree):
    assert labels(open_source(tree)) == [None, "x/a", "x/b", "y/a"]
    assert labels(open_source(tree, labels_from="top")) == [None, "x", "x", "y"]
    assert open_source(tree, labels_from="none").classes == []
    for number in (5, 6, 7):
        (tree / f"{number}.png").write_bytes(picture(number))
    assert open_source(tree).classes == []
    assert labels(open_source(tree, labels_from="folders")) == [None] * 4 + ["x/a", "x/b", "y/a"]


def test_another_column(tree):
    (tree / "metadata.csv").write_text("file_name,label,colour\n4.png,cat,red\nx/a/1.png,dog,blue\n")
    assert labels(open_source(tree)) == ["cat", "dog", None, None]
    assert labels(open_source(tree, labels_from="colour")) == ["red", "blue", None, None]
    with pytest.raises(DigitError, match=r"no column 'size'; its columns are label, colour"):
        open_source(tree, labels_from="size")


@pytest.mark.parametrize("paths", [("x/a/1.png", "x/b/2.png"), ("1.png", "2.png"), ("1", "2")])
def test_a_file_of_labels_elsewhere(tree, tmp_path, paths):
    table = tmp_path / "labels.csv"
    table.write_text(f"id,breed\n{paths[0]},pug\n{paths[1]},beagle\n")
    assert labels(open_source(tree, labels_from=f"{table}:breed")) == [None, "pug", "beagle", None]
    with pytest.raises(DigitError, match="no column of labels; its columns are breed"):
        open_source(tree, labels_from=str(table))


def test_label_files_that_cannot_be_right(tree):
    for text, message in {
        "file_name,label\n4.png,a\n4.png,b\n": "two labels, 'a' and 'b'",
        "label\ncat\n": "no column file_name",
    }.items():
        (tree / "metadata.csv").write_text(text)
        with pytest.raises(DigitError, match=message):
            open_source(tree)
    (tree / "metadata.csv").unlink()
    (tree / "dataset.json").write_text("[1, 2")
    with pytest.raises(DigitError, match="dataset.json cannot be read"):
        open_source(tree)
    assert open_source(tree, labels_from="folders").classes


def test_a_column_where_there_is_none(tree, tmp_path):
    with pytest.raises(DigitError, match="no metadata.csv or other label file"):
        open_source(tree, labels_from="label")
    with pytest.raises(DigitError, match="its columns are label"):
        open_source(write_rows(tmp_path / "x", {"label": [1]}), labels_from="colour")
    with pytest.raises(DigitError, match="no sample has such a member"):
        open_source(write_tar(tmp_path / "x", {"0.png": picture(0)}), labels_from="colour")


def test_parquet_columns_by_name(tmp_path):
    path = write_rows(tmp_path / "x", {"fine_label": [3, 4], "coarse_label": [0, 0], "Author": ["x", "y"]})
    assert labels(open_source(path)) == ["3", "4"]
    assert labels(open_source(path, labels_from="coarse label")) == ["0", "0"]
    assert labels(open_source(path, labels_from="author")) == ["x", "y"]


def test_parquet_files_are_joined_by_name(tmp_path):
    write_rows(tmp_path / "d/0", {"label": [0, 1]}, named(["cat", "dog"]))
    write_rows(tmp_path / "d/1", {"label": [0, 1, 2]}, named(["dog", "cat", "cow"]))
    write_rows(tmp_path / "d/2", {"label": ["cow", "ant"]})
    source = open_source(tmp_path / "d")
    assert labels(source) == ["cat", "dog", "dog", "cat", "cow", "cow", "ant"]
    assert any("number the classes differently" in note for note in source.notes)


def test_parquet_files_that_disagree(tmp_path):
    write_rows(tmp_path / "d/0", {"label": [0, 1]}, named(["cat", "dog"]))
    write_rows(tmp_path / "d/1", {"label": [5, 6]})
    with pytest.raises(DigitError, match=r"1\.parquet numbers its classes, other files name them"):
        open_source(tmp_path / "d")
    write_rows(tmp_path / "d/1", {"other": [5, 6]})
    source = open_source(tmp_path / "d")
    assert labels(source) == ["cat", "dog", None, None]
    assert any("1.parquet has no column of labels" in note for note in source.notes)


def test_tar_keys_by_name(tmp_path):
    members = {"0.png": picture(0), "0.cls": b"1", "0.txt": b"red", "0.json": b'{"label": 2, "colour": "blue"}'}
    path = write_tar(tmp_path / "x", members)
    for key, value in {"auto": "1", "txt": "red", "label": "2", "colour": "blue", "cls": "1"}.items():
        assert labels(open_source(path, labels_from=key)) == [value]
    assert open_source(path, labels_from="none").classes == []


def test_tar_members_of_one_name_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("0.png")
            info.size = len(picture(0))
            tar.addfile(info, io.BytesIO(picture(0)))
    with pytest.raises(DigitError, match=r"two members 0\.png"):
        open_source(tmp_path / "x.tar")


def test_shards_disagree_about_nothing_silently(tmp_path):
    write_tar(tmp_path / "0", {"0.png": picture(0), "0.cls": b"cat"})
    write_tar(tmp_path / "1", {"0.png": picture(0), "0.json": b'{"class_id": 3.5}'})
    source = open_source(tmp_path)
    assert labels(source) == ["cat", None]
    said = "1 labels are none (such as 0, whose .json class_id is 3.5, which is no whole number)"
    assert said in source.notes
    with pytest.raises(
        DigitError, match=r"class_id is 3\.5, which is no whole number: --labels_from names another key"
    ):
        open_source(tmp_path, labels_from="class_id")


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, "true"), (2.0, 2), ([4], 4), ("2.0", 2), ("NaN", None), ("  cat ", "cat"), (b"dog", "dog"),
     (float("nan"), None), (-1, None), ("-1", None), ("", None), ([], None), (None, None)],
)  # fmt: skip
def test_values_of_labels(value, label):
    assert as_label(value) == label


@pytest.mark.parametrize("value", [0.5, "0.5", [1, 2], [[1]], {"a": 1}, [0.5, 0.5], float("inf")])
def test_values_that_are_no_label(value):
    with pytest.raises(ValueError, match="^a |which is no whole number"):
        as_label(value)


def test_zips_that_cannot_be_read(tmp_path):
    (tmp_path / "junk.zip").write_bytes(b"junk" * 100)
    write_zip(tmp_path / "text", {"a.txt": b"hello"})
    path = write_zip(tmp_path / "cut", {"a.png": picture(0)})
    path.write_bytes(path.read_bytes()[:-20])
    for name, message in {"junk": "cannot be read as .zip", "text": "no images", "cut": "cannot be read"}.items():
        with pytest.raises(DigitError, match=message):
            open_source(tmp_path / f"{name}.zip")


def test_a_damaged_member_of_a_zip_is_a_bad_image(tmp_path):
    path = write_zip(tmp_path / "x", {"a.png": picture(0), "b.png": picture(1)})
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 255
    path.write_bytes(bytes(data))
    source = open_source(path)
    with pytest.raises(BadImageError, match=re.escape("x.zip:a.png")):
        source.read(0)
    assert source.read(1)[0].getpixel((0, 0)) == (1, 0, 0)


def test_a_bomb_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**24))
    with pytest.raises(BadImageError, match="bomb"):
        open_source(tmp_path / "x.zip").read(0)


def test_lists_are_one_hot_as_a_column_or_not_at_all(tmp_path):
    assert as_labels([[0, 1, 0], [0, 0, 1], None]) == [1, 2, None]
    for values in ([[2], [0, 1], [5]], [[0, 1], [1, 1]], [[0, 1, 0], [0, 1]]):
        with pytest.raises(ValueError, match="several labels"):
            as_labels(values)


def test_label_files_of_several_tars_are_their_own(tmp_path):
    for name in "ab":
        table = f"file_name,label\n0.png,{name}\n".encode()
        write_tar(tmp_path / name, {"0.png": picture(0), "metadata.csv": table})
    assert labels(open_source(tmp_path)) == ["a", "b"]


def test_label_files_that_contradict_each_other(tree):
    (tree / "metadata.csv").write_text("file_name,label\n4.png,a\n")
    (tree / "metadata.jsonl").write_text('{"file_name": "4.png", "label": "z"}')
    with pytest.raises(DigitError, match=r"metadata.csv and metadata.jsonl give 4.png different labels, 'a' and 'z'"):
        open_source(tree)


def test_a_broken_label_beside_a_good_one(tmp_path):
    members = {"0.png": picture(0), "0.cls": b"3", "0.json": b'{"category": ["a", "b"]}'}
    assert labels(open_source(write_tar(tmp_path / "x", members))) == ["3"]


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_packed_splits_and_folders(tmp_path, write):
    names = ["train/a/1.png", "train/b/2.png", "test/a/3.png"]
    path = write(tmp_path / "x", {name: picture(number) for number, name in enumerate(names)})
    assert labels(open_source(path)) == ["a", "b"] and labels(open_source(path, split="test")) == ["a"]
    path = write(tmp_path / "y", {"cats\\1.png": picture(1), "dogs\\2.png": picture(2)})
    source = open_source(path)
    assert labels(source) == ["cats", "dogs"] and source.read(1)[0].getpixel((0, 0)) == (2, 0, 0)
    path = write(tmp_path / "z", {"1.png": picture(1), "run/.digit": b"", "run/2.png": picture(2)})
    source = open_source(path)
    assert len(source) == 1 and any("because DiGIT wrote it: run/" in note for note in source.notes)


def test_links_in_a_tar(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("cat/1.png")
        info.size = len(picture(5))
        tar.addfile(info, io.BytesIO(picture(5)))
        for name, kind, target in (("dog/1.png", tarfile.LNKTYPE, "cat/1.png"), ("cow/1.png", tarfile.SYMTYPE, "x")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    source = open_source(tmp_path / "x.tar")
    assert labels(source) == ["cat", "dog"] and source.read(1)[0].getpixel((0, 0)) == (5, 0, 0)
    assert "x.tar: not used: 1 links (cow/1.png)" in source.notes


def test_members_that_differ_in_the_case_of_their_suffix(tmp_path):
    with pytest.raises(DigitError, match=r"two members a\.png"):
        open_source(write_tar(tmp_path / "x", {"a.png": picture(0), "a.PNG": picture(1)}))


def test_links_to_folders_are_said(tree):
    (tree / "z").symlink_to(tree / "x", target_is_directory=True)
    source = open_source(tree)
    assert len(source) == 4 and any(note.startswith("not read twice: ") for note in source.notes)


def test_a_label_file_that_is_not_there(tree):
    (tree / "metadata.csv").symlink_to(tree / "gone.csv")
    with pytest.raises(DigitError, match=r"metadata.csv cannot be read"):
        open_source(tree)


def test_columns_of_times_are_no_labels(tmp_path):
    import pyarrow as pa

    path = write_rows(tmp_path / "x", {"label": pa.array([1, 2], pa.timestamp("ns")), "target": [4, 5]})
    source = open_source(path)
    assert labels(source) == ["4", "5"] and any("label" in note for note in source.notes)


def test_what_lies_beside_containers_is_said(tmp_path):
    write_rows(tmp_path / "d/full/train-0", {"label": [0, 1]})
    write_rows(tmp_path / "d/mini/train-0", {"label": [0, 1]})
    (tmp_path / "d/metadata.csv").write_text("file_name,label\n")
    notes = open_source(tmp_path / "d").notes
    assert any("files of 2 folders are read as one (full, mini)" in note for note in notes)
    assert any("not used: metadata.csv" in note for note in notes)
    path = write_zip(tmp_path / "x", {"0.png": picture(0), "x.tar": b""})
    assert any("not used: 1 tar files" in note for note in open_source(path).notes)
