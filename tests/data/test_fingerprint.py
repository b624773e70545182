"""A fingerprint changes whenever a pixel, a label or a class may have, and not otherwise."""

import json
import os
import shutil

import pytest
from written_images import picture, write_folder, write_rows, write_tar, write_zip

from digit.data.images import open_source


def fingerprint(path, **options):
    return open_source(path, **options).fingerprint


def tree(path, numbers=(1, 2, 3), names="ab"):
    return write_folder(path, {f"{names[k % 2]}/{k}.bmp": picture(number) for k, number in enumerate(numbers)})


def names_of(first, second):
    features = {"label": {"names": [first, second], "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def test_the_place_does_not_matter(tmp_path):
    first, second = tree(tmp_path / "x"), tmp_path / "copy"
    shutil.copytree(first, second, copy_function=shutil.copyfile)  # with other times
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first, read_contents=False) != fingerprint(second, read_contents=False)
    shutil.copytree(first, tmp_path / "exact")  # with the same times
    assert fingerprint(first, read_contents=False) == fingerprint(tmp_path / "exact", read_contents=False)


def test_pixels_of_the_same_size_are_seen(tmp_path):
    before = fingerprint(tree(tmp_path / "x"))
    assert len(picture(9)) == len(picture(3))
    assert fingerprint(tree(tmp_path / "x", (1, 2, 9))) != before
    assert fingerprint(tree(tmp_path / "x")) == before


def test_pixels_with_the_old_times_are_seen(tmp_path):
    file = tree(tmp_path / "x") / "a/0.bmp"
    before, times = fingerprint(tmp_path / "x"), os.stat(file)
    file.write_bytes(picture(9))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(tmp_path / "x") != before


def test_without_reading_times_are_seen(tmp_path):
    file = tree(tmp_path / "x") / "a/0.bmp"
    before = fingerprint(tmp_path / "x", read_contents=False)
    os.utime(file, ns=(1, 1))
    assert fingerprint(tmp_path / "x", read_contents=False) != before


def test_names_of_classes_and_files_are_seen(tmp_path):
    before = fingerprint(tree(tmp_path / "x"))
    assert fingerprint(tree(tmp_path / "y", names="ac")) != before
    os.rename(tmp_path / "x/a/0.bmp", tmp_path / "x/a/7.bmp")
    assert fingerprint(tmp_path / "x") != before


def test_labels_of_a_label_file_are_seen(tmp_path):
    root = write_folder(tmp_path / "x", {"1.png": picture(1), "2.png": picture(2)})
    prints = set()
    for text in ("1.png,cat\n2.png,dog", "1.png,dog\n2.png,cat", "1.png,cat\n2.png,cow"):
        (root / "metadata.csv").write_text("file_name,label\n" + text)
        prints.add(fingerprint(root))
    assert len({*prints, fingerprint(root, labels_from="none")}) == 4


@pytest.mark.parametrize("read_contents", [None, True])
def test_labels_and_pixels_of_parquet_are_seen(tmp_path, read_contents):
    changes = [({"label": [0, 1]}, None), ({"label": [1, 0]}, None), ({"label": ["b", "a"]}, None)]
    changes += [({"label": [0, 1]}, names_of("cat", "dog")), ({"label": [0, 1]}, names_of("dog", "cat"))]
    prints = {fingerprint(write_rows(tmp_path / "x", *change), read_contents=read_contents) for change in changes}
    assert len(prints) == 5


def test_labels_of_a_tar_are_seen_whatever_the_times(tmp_path):
    prints = set()
    for label in (b"red", b"blu"):
        path = write_tar(tmp_path / "x", {"0.png": picture(1), "0.cls": label, "1.png": picture(2), "1.cls": b"red"})
        os.utime(path, ns=(1, 1))
        prints.add(fingerprint(path, read_contents=False))
    assert len(prints) == 2


def test_pixels_of_a_zip_are_seen_without_reading(tmp_path):
    prints = set()
    for number in (1, 2):
        path = write_zip(tmp_path / "x", {"a/0.png": picture(number)})
        os.utime(path, ns=(1, 1))
        prints.add(fingerprint(path, read_contents=False))
    assert len(prints) == 2


def test_a_split_is_the_same_data_as_its_folder(tmp_path):
    tree(tmp_path / "x/train")
    tree(tmp_path / "x/val")
    assert fingerprint(tmp_path / "x") == fingerprint(tmp_path / "x/train")


def test_parts_differ(tmp_path):
    source = open_source(tree(tmp_path / "x"))
    assert len({source.fingerprint, source.limit(2).fingerprint, source.with_classes(["b"]).fingerprint}) == 3
