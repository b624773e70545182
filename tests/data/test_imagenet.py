"""ImageNet's own layouts: labels of a flat validation split, tars of synsets, and names of synsets in words."""

import io
import json
import re
import sys
from types import ModuleType

import numpy as np
import pytest
from written_images import picture, write_folder, write_rows, write_tar, write_zip

from digit.data.images import open_source
from digit.errors import DigitError

TENCH, GOLDFISH, KIT_FOX = "n01440764", "n01443537", "n02119789"
CLASSES = (TENCH, GOLDFISH, KIT_FOX)
MAP = b"n02119789 1 kit_fox\nn01443537 2 goldfish\nn01440764 3 tench\n"  # ILSVRC's ids are not the sorted order
WORDS = b"n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn02119789 kit fox, Vulpes macrotis\n"
WANTED = [KIT_FOX, KIT_FOX, TENCH, GOLDFISH]  # of the four validation images
TRUTH = b"1\n1\n3\n2\n"


def val(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}"


def flat(folder: str = "val/") -> dict[str, bytes]:
    return {f"{folder}{val(number)}.JPEG": picture(number) for number in range(1, 5)}


def train(folder: str = "train/") -> dict[str, bytes]:
    return {f"{folder}{name}/{name}_{number}.JPEG": picture(number) for name in CLASSES for number in (1, 2)}


def labels_of(source) -> list[str]:
    return [source.classes[label] if label >= 0 else "" for label in source.labels()]


DEVKIT = "ILSVRC2012_devkit_t12/data/"
TRUTH_FILE = "ILSVRC2012_validation_ground_truth.txt"
KAGGLE = "ImageId,PredictionString\n" + "".join(
    f"{val(number)},{name} 1 2 30 40 {name} 5 6 7 8 \n" for number, name in reversed(list(enumerate(WANTED, 1)))
)
SORTED = "".join(f"{val(number)}.JPEG {CLASSES.index(name)}\n" for number, name in enumerate(WANTED, 1))
FORMS = {
    "devkit": {DEVKIT + TRUTH_FILE: TRUTH, DEVKIT + "map_clsloc.txt": MAP},
    "beside": {TRUTH_FILE: TRUTH, "map_clsloc.txt": MAP},
    "kaggle": {"LOC_val_solution.csv": KAGGLE.encode(), "LOC_synset_mapping.txt": WORDS},
    "caffe": {"val.txt": SORTED.encode()},
    "openmmlab": {"meta/val.txt": SORTED.encode(), "meta/train.txt": b"x"},
    "tensorflow": {"imagenet_2012_validation_synset_labels.txt": "\n".join(WANTED).encode()},
    "csv": {"val_labels.txt": SORTED.replace(" ", ",").replace("ILSVRC", "val/ILSVRC").encode()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("opened", ["root", "folder", "zip"])
def test_a_flat_validation_split_has_the_labels_of_its_file(tmp_path, form, opened):
    files = train() | flat() | FORMS[form]
    if opened == "zip":
        source = open_source(write_zip(tmp_path / "data", files), split="val")
    else:
        root = write_folder(tmp_path / "data", files)
        source = open_source(root, split="val") if opened == "root" else open_source(root / "val")
    assert [name[:9] for name in labels_of(source)] == WANTED
    assert [name[:9] for name in source.classes] == sorted(CLASSES)
    used = next(iter(FORMS[form]))
    assert any("labels of the validation images are" in note and used in note for note in source.notes), source.notes
    assert not any("not used" in note and used in note for note in source.notes), "a file that is used is not called so"


def test_kaggles_layout(tmp_path):
    inner = "ILSVRC/Data/CLS-LOC/"
    files = train(f"{inner}train/") | flat(f"{inner}val/") | FORMS["kaggle"]
    files |= {f"{inner}test/ILSVRC2012_test_00000001.JPEG": picture(1), "LOC_train_solution.csv": b"ImageId,x\n"}
    files["ILSVRC/ImageSets/CLS-LOC/val.txt"] = "".join(f"{val(k)} {k}\n" for k in range(1, 5)).encode()
    root = write_folder(tmp_path / "data", files)
    names = ["n01440764 tench", "n01443537 goldfish", "n02119789 kit fox"]
    for path in (root, root / inner):
        source, training = open_source(path, split="val"), open_source(path)
        assert [name[:9] for name in labels_of(source)] == WANTED and training.classes == names
        assert open_source(path, split="test").classes == []
    assert [name[:9] for name in labels_of(open_source(root / inner / "val"))] == WANTED


def test_a_list_that_counts_the_images_gives_no_labels(tmp_path):
    files = flat() | {"val.txt": "".join(f"{val(k)} {k}\n" for k in range(1, 5)).encode(), "synset_words.txt": WORDS}
    source = open_source(write_folder(tmp_path / "data", files), split="val")
    assert source.classes == [] and any("count the images" in note for note in source.notes)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "put LOC_val_solution.csv"),
        ({TRUTH_FILE: TRUTH}, "map_clsloc.txt or meta.mat tell"),
        ({TRUTH_FILE: TRUTH, "synset_words.txt": WORDS}, "map_clsloc.txt or meta.mat tell"),
        ({TRUTH_FILE: TRUTH.replace(b"2", b"9"), "map_clsloc.txt": MAP}, "it holds class 9"),
        ({"LOC_val_solution.csv": b"ImageId,PredictionString\ncat,dog\n"}, "names no image such as"),
        ({"LOC_val_solution.csv": b""}, "it is empty"),
        ({"val.txt": b"ILSVRC2012_val_00000001.JPEG cat"}, "neither synsets"),
        ({"val.txt": b"ILSVRC2012_val_00000001.JPEG 65"}, "LOC_synset_mapping.txt or folders of synsets would tell"),
    ],
)
def test_what_gives_no_labels_says_what_would_help(tmp_path, files, said):
    source = open_source(write_folder(tmp_path / "data", flat() | files), split="val")
    assert (source.labels() == -1).all() and any(said in note for note in source.notes), source.notes


def test_a_file_that_is_named(tmp_path):
    elsewhere = write_folder(tmp_path / "far/away/from/the/data/devkit", {TRUTH_FILE: TRUTH, "map_clsloc.txt": MAP})
    root = write_folder(tmp_path / "data", flat())
    source = open_source(root / "val", labels_from=str(elsewhere / TRUTH_FILE))
    assert labels_of(source) == WANTED
    (elsewhere / "map_clsloc.txt").unlink()
    with pytest.raises(DigitError, match="ILSVRC's ids"):
        open_source(root / "val", labels_from=str(elsewhere / TRUTH_FILE))
    (elsewhere / "mine.txt").write_text(SORTED)
    with pytest.raises(DigitError, match="LOC_synset_mapping"):
        open_source(root / "val", labels_from=str(elsewhere / "mine.txt"))
    write_folder(root, train())
    assert labels_of(open_source(root, split="val", labels_from=str(elsewhere / "mine.txt"))) == WANTED
    truth = str(write_folder(elsewhere, {"map_clsloc.txt": MAP}) / TRUTH_FILE)
    training, validation = (open_source(root, split=split, labels_from=truth) for split in ("train", "val"))
    assert training.classes == sorted(CLASSES) and labels_of(validation) == WANTED, "for one command that opens both"


def test_folders_of_a_sorted_split_need_no_file(tmp_path):
    sorted_ = {f"val/{name}/{val(number)}.JPEG": picture(number) for number, name in enumerate(WANTED, 1)}
    root = write_folder(tmp_path / "data", train() | sorted_ | {"val.txt": b"ILSVRC2012_val_00000001.JPEG 2"})
    assert labels_of(open_source(root, split="val")) == [TENCH, GOLDFISH, KIT_FOX, KIT_FOX]


def test_tars_of_synsets(tmp_path):
    (tmp_path / "data/train").mkdir(parents=True)
    for name in CLASSES:
        write_tar(tmp_path / "data/train" / name, {f"{name}_{k}.JPEG": picture(k) for k in (1, 2)})
    write_tar(tmp_path / "data/ILSVRC2012_img_val", flat(""))
    write_folder(tmp_path / "data", FORMS["devkit"])
    training, validation = open_source(tmp_path / "data"), open_source(tmp_path / "data", split="val")
    assert labels_of(training) == [name for name in training.classes for _ in (1, 2)] and len(training.classes) == 3
    assert [name[:9] for name in labels_of(validation)] == WANTED
    assert any("each .tar is a class" in note for note in training.notes)
    assert len(open_source(tmp_path / "data/train").classes) == 3
    assert np.array_equal(validation.with_classes(training.classes).labels(), [2, 2, 0, 1])


def test_a_tar_of_tars_says_what_to_do(tmp_path):
    with pytest.raises(DigitError, match=re.escape("it holds n01440764.tar: unpack it")):
        open_source(write_tar(tmp_path / "ILSVRC2012_img_train", {"n01440764.tar": b"x"}))


def test_classes_with_and_without_words_are_matched_by_synset(tmp_path):
    root = write_folder(tmp_path / "a/data", train() | {"LOC_synset_mapping.txt": WORDS})
    other = write_folder(tmp_path / "b/c/d/e/f/g/data", flat() | {"LOC_val_solution.csv": KAGGLE.encode()})
    validation = open_source(other, split="val")
    assert validation.classes == sorted(CLASSES)
    assert validation.with_classes(open_source(root).classes).labels().tolist() == [2, 2, 0, 1]


def test_hub_parquet_names_classes_in_words(tmp_path):
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    features = json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})
    for split, labels in (("train", [0, 1, 1]), ("validation", [1, 0])):
        write_rows(tmp_path / f"{split}-00000-of-00001", {"label": labels}, {"huggingface": features})
    training, validation = open_source(tmp_path), open_source(tmp_path, split="validation")
    assert training.classes == validation.classes == names and validation.labels().tolist() == [1, 0]


def fake_scipy(monkeypatch, rows) -> None:
    """scipy.io whose loadmat returns `rows`; None is a machine without scipy."""
    module = None if rows is None else ModuleType("scipy.io")
    if module is not None:
        module.loadmat = lambda file, squeeze_me: {"synsets": rows}
    monkeypatch.setitem(sys.modules, "scipy", module and ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", module)


def test_meta_mat(tmp_path, monkeypatch):
    rows = [(1, KIT_FOX, "kit fox, Vulpes macrotis", 0), (2, GOLDFISH, "goldfish", 0), (3, TENCH, "tench", 0),
            (1001, "n00001740", "entity", 82)]  # fmt: skip
    kinds = [("ILSVRC2012_ID", int), ("WNID", object), ("words", object), ("num_children", int)]
    root = write_folder(tmp_path / "data", flat() | {DEVKIT + TRUTH_FILE: TRUTH, DEVKIT + "meta.mat": b"x"})
    fake_scipy(monkeypatch, np.array(rows, dtype=kinds))
    source = open_source(root, split="val")
    assert labels_of(source) == ["n02119789 kit fox"] * 2 + ["n01440764 tench", "n01443537 goldfish"]
    fake_scipy(monkeypatch, None)
    source = open_source(root, split="val")
    assert source.classes == [] and any("pip install scipy" in note for note in source.notes)
    fake_scipy(monkeypatch, [{}])
    assert any("no meta.mat of ILSVRC" in note for note in open_source(root, split="val").notes)


def test_a_real_meta_mat(tmp_path):
    scipy = pytest.importorskip("scipy.io")
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = np.array([(1, KIT_FOX, "kit fox", 0), (2, GOLDFISH, "goldfish", 0), (3, TENCH, "tench", 0)], dtype=kinds)
    out = io.BytesIO()
    scipy.savemat(out, {"synsets": rows.reshape(-1, 1)})
    files = flat() | {DEVKIT + TRUTH_FILE: TRUTH, DEVKIT + "meta.mat": out.getvalue()}
    source = open_source(write_folder(tmp_path / "data", files), split="val")
    assert labels_of(source) == ["n02119789 kit fox"] * 2 + ["n01440764 tench", "n01443537 goldfish"]
