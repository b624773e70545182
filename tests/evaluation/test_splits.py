"""Which images a linear probe trains and tests on."""

import pytest
from toy_measure import pictures, save_folder

from digit.errors import DigitError
from digit.evaluation.splits import probe_splits


def folder_of(root, *splits, num=10):
    """Images of two classes in each split; "" is the root itself."""
    for seed, split in enumerate(splits):
        for name in ("cat", "dog"):
            save_folder(root / split / name, pictures(num + seed, seed=seed))
    return str(root)


@pytest.mark.parametrize(
    ("splits", "name", "num"),
    [
        (("train", "test"), "test", 22),
        (("train", "val"), "validation", 22),
        (("train", "val", "test"), "test", 24),
        (("training", "dev", "test"), "test", 24),
        (("train", "valid", "extra"), "validation", 22),
    ],
)
def test_a_split_of_the_data_is_used_where_there_is_one(tmp_path, splits, name, num):
    data = folder_of(tmp_path, *splits)
    if splits[0] == "train":
        train, test, where = probe_splits(data)
        assert (len(train), len(test)) == (20, num) and where == f"the {name} split of {data}"
    train, test, where = probe_splits(f"{data}/{splits[0]}")
    assert (len(train), len(test)) == (20, num) and where == f"the {name} split of {data}"
    train, test, _ = probe_splits(data, split="train")
    assert (len(train), len(test)) == (20, num)


def test_without_a_split_every_fifth_image_is_used_and_told_to_be_trained_on(tmp_path):
    data = folder_of(tmp_path, "", num=10)
    train, test, where = probe_splits(data)
    assert (len(train), len(test)) == (16, 4)
    assert where == f"every fifth image of {data}, which a pipeline fitted on {data} was trained on"
    assert "every fifth" in probe_splits("shapes:num=20,size=16")[2]


def test_a_class_named_test_is_no_split(tmp_path):
    for name in ("test", "other"):
        save_folder(tmp_path / name, pictures(10, seed=len(name)))
    train, test, where = probe_splits(str(tmp_path))
    assert (len(train), len(test)) == (16, 4) and "every fifth image" in where and train.classes == ["other", "test"]


def test_what_was_asked_for_is_used(tmp_path):
    data = folder_of(tmp_path, "train", "val", "test")
    assert len(probe_splits(data, test_split="val")[1]) == 22
    other = folder_of(tmp_path / "more", "", num=7)
    assert len(probe_splits(data, test=other)[1]) == 14 and probe_splits(data, test=other)[2] == other
    with pytest.raises(DigitError, match="no split 'nowhere'"):
        probe_splits(data, test_split="nowhere")
    assert len(probe_splits(data, split="test")[1]) == 22, "the training images are not tested on"


def test_a_split_that_cannot_be_used_is_told(tmp_path):
    data = folder_of(tmp_path, "train", "val")
    (tmp_path / "test").mkdir()
    _, test, where = probe_splits(data)
    assert len(test) == 22 and where.startswith(f"the validation split of {data} (its test split cannot be used: ")
    unlabelled = tmp_path / "flat"
    folder_of(unlabelled, "train")
    save_folder(unlabelled / "test", pictures(8))
    _, test, where = probe_splits(str(unlabelled))
    assert len(test) == 4 and "(its test split has no labels), which a pipeline" in where
