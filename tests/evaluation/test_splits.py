"""Which images a linear probe trains and tests on."""

import pytest
from toy_measure import pictures, save_folder
from written_images import write_rows

from digit.data import listing
from digit.errors import DigitError
from digit.evaluation.splits import chosen_on, probe_splits


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


def test_a_split_is_never_replaced_by_training_images_unasked(tmp_path):
    """Such a split was once passed over: the reference images were then training images, as a line of text told."""
    data = folder_of(tmp_path / "flat", "train")
    save_folder(tmp_path / "flat/test", pictures(8))
    with pytest.raises(DigitError, match="nothing to test on: its test split has no labels; --hold_out true"):
        probe_splits(data)
    with pytest.raises(DigitError, match="nothing to test on"):
        probe_splits(f"{data}/train")
    train, test, where = probe_splits(data, every_fifth=True)
    assert (len(train), len(test)) == (16, 4) and where.startswith("every fifth image of")
    assert len(probe_splits(data, test_split="test")[1]) == 8, "what was asked for is taken as it is"
    with pytest.raises(DigitError, match="leave it out"):
        probe_splits(data, test_split="test", every_fifth=True)
    (tmp_path / "empty/test").mkdir(parents=True)
    with pytest.raises(DigitError, match="its test split cannot be used"):
        probe_splits(folder_of(tmp_path / "empty", "train"))


def test_a_flat_validation_split_of_imagenet_names_the_file_that_would_help(tmp_path):
    """Its test split has no labels, ever; the validation split has those of a file, which may be missing."""
    for name in ("n01440764", "n01443537"):
        save_folder(tmp_path / "train" / name, pictures(4))
    for split, num in (("val", 3), ("test", 2)):
        save_folder(tmp_path / split, pictures(num))
        for number, path in enumerate(sorted((tmp_path / split).iterdir()), 1):
            path.rename(path.with_name(f"ILSVRC2012_{split}_{number:08}.png"))
    with pytest.raises(DigitError, match=r"validation split has no labels \(.*put LOC_val_solution.csv"):
        probe_splits(str(tmp_path))
    labels = tmp_path / "imagenet_2012_validation_synset_labels.txt"
    labels.write_text("n01443537\nn01440764\nn01443537\n")
    train, test, where = probe_splits(str(tmp_path))
    assert (len(train), len(test)) == (8, 3) and where.startswith(f"the validation split of {tmp_path} (its test split")
    assert test.with_classes(train.classes).labels().tolist() == [1, 0, 1]
    assert len(probe_splits(str(tmp_path / "train"))[1]) == 3, "beside a folder named train, too"
    labels.write_text("n99999999\n" * 3)
    with pytest.raises(DigitError, match="no image of .* is of a class of"):
        probe_splits(str(tmp_path))


def test_a_damaged_split_is_no_missing_split(tmp_path):
    write_rows(tmp_path / "train-0", {"label": [0, 1, 0, 1]})
    (tmp_path / "test-0.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(DigitError, match=r"its test split cannot be used: .*cannot be read as Parquet"):
        probe_splits(str(tmp_path))


def test_a_folder_is_listed_once_for_its_splits(tmp_path, monkeypatch):
    data, listed = folder_of(tmp_path, "train", "val"), []
    monkeypatch.setattr(listing, "_list_all", lambda root, real=listing._list_all: listed.append(root) or real(root))
    probe_splits(data)
    assert listed == [tmp_path]
    save_folder(tmp_path / "val" / "cat", pictures(12))
    assert len(probe_splits(data)[1]) == 23 and len(listed) == 2, "the next call sees what has changed since"


def test_settings_are_chosen_on_validation_images_then_on_test_images(tmp_path):
    data = folder_of(tmp_path / "all", "train", "val", "test")
    for given in (data, f"{data}/train"):
        images, where = chosen_on(given)
        assert len(images) == 22 and where == f"the validation split of {data}"
    assert len(chosen_on(data, "test")[0]) == 24 and len(chosen_on(data, "train")[0]) == 20
    images, where = chosen_on(folder_of(tmp_path / "two", "train", "test"))
    assert len(images) == 22 and "the test split" in where
    images, where = chosen_on(f"{data}/val")
    assert len(images) == 22 and where == f"{data}/val"
    images, where = chosen_on("shapes:num=20,size=16")
    assert len(images) == 20 and where.endswith("which has neither a validation nor a test split")
