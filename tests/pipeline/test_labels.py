"""Labels as people bring them: names, or numbers that mean the same class everywhere."""

import numpy as np
import pytest
import torch

from digit.errors import DigitError
from digit.pipeline.labels import ClassPositions, class_positions

SOLIDS = ["sphere", "cube", "cone", "torus"]
SORTED_AS_TEXT = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]
YEARS = ["1999", "2004", "2020"]


def places(labels, classes=SOLIDS):
    return class_positions(labels, classes, len(classes))


@pytest.mark.parametrize(
    "labels, expected",
    [
        ("cube", [1]),
        (["cube", "torus", "cube"], [1, 3, 1]),
        (("cone",), [2]),
        (np.array(["cube", "cone"]), [1, 2]),
        (3, [3]),
        (np.int64(3), [3]),
        (np.array(3), [3]),
        (torch.tensor(3), [3]),
        ([0, np.uint8(2)], [0, 2]),
        (np.array([0, 2], dtype=np.int32), [0, 2]),
        (torch.tensor([0, 2], dtype=torch.uint8), [0, 2]),
        ([torch.tensor(2), "cube"], [2, 1]),
        (range(3), [0, 1, 2]),
        (["2", "cube"], [2, 1]),
        pytest.param((k for k in (2, 1)), [2, 1], id="generator"),
    ],
    ids=str,
)
def test_names_and_numbers_of_any_type(labels, expected):
    assert places(labels) == expected


@pytest.mark.parametrize("classes", [SORTED_AS_TEXT, sorted(SORTED_AS_TEXT, key=int), YEARS, ["-1", "0", "1"], ["007"]])
def test_a_number_is_the_class_of_that_name_where_names_are_numbers(classes):
    numbers = [int(name) for name in classes]
    everywhere = list(range(len(classes)))
    assert places(classes, classes) == everywhere  # the command line: text
    assert places(numbers, classes) == places(np.array(numbers), classes) == places(torch.tensor(numbers), classes)
    assert places(numbers, classes) == everywhere == places([str(number) for number in numbers], classes)
    assert places(ClassPositions(everywhere), classes) == everywhere


def test_a_single_name_that_is_no_number_makes_all_numbers_positions():
    classes = ["10", "2", "other"]
    assert places([0, 1], classes) == [0, 1] and places(["10", "2"], classes) == [0, 1]
    assert places(["0"], classes) == [0]  # no class has that name


def test_positions_whatever_the_names():
    assert places(ClassPositions([2, 10]), SORTED_AS_TEXT) == [2, 10] == class_positions([2, 10], [], 12)
    with pytest.raises(DigitError, match="label 12 is out of range: this model knows classes 0 to 11"):
        places(ClassPositions([12]), SORTED_AS_TEXT)


@pytest.mark.parametrize(
    "labels, classes, said",
    [
        ("cub", SOLIDS, r"no class named 'cub': did you mean cube\? classes are sphere, cube, cone, torus"),
        ("dog", SOLIDS, "no class named 'dog': classes are sphere"),
        (["cube", ""], SOLIDS, "no class named ''"),
        ([1.7], SOLIDS, "label is 1.7: it must be the name of a class or a whole number"),
        (torch.tensor([1.0]), SOLIDS, "label is 1.0"),
        ([True], SOLIDS, "label is True"),
        (np.array([False]), SOLIDS, "label is False"),
        ([None], SOLIDS, "a label stands for no class"),
        ([[0, 1]], SOLIDS, r"label is \[0, 1\]"),
        (4, SOLIDS, "label 4 is out of range: this model knows classes 0 to 3: sphere, cube"),
        (-1, SOLIDS, "a label stands for no class, but this model was trained with a class for every image"),
        ("4", SOLIDS, "label 4 is out of range"),
        ([], SOLIDS, "labels is empty"),
        ({"cube"}, SOLIDS, r"labels are \{'cube'\}: give class names or numbers in a list"),
        ({"cube": 3}, SOLIDS, "in a list"),
        (b"cube", SOLIDS, "in a list"),
        (12, SORTED_AS_TEXT, r"no class named 12: the class names are numbers, .*0, 1, 10, .*\.\.\. \(12 in all\)"),
        (0, YEARS, "no class named 0"),
        ("0", YEARS, "no class named 0"),
        ("first", YEARS, "no class named 'first': classes are 1999"),
        ("cube", [], "no class named 'cube': the classes have no names, give numbers"),
        ("crane", ["crane", "dog", "crane"], "'crane' fits several classes.*position 0 and 'crane' at position 2"),
        (1, ["1", "01"], "label 1 fits several classes, '1' at position 0 and '01' at position 1"),
        ("9" * 5000, SOLIDS, "no class named"),
    ],
)
def test_wrong_labels_are_one_line(labels, classes, said):
    with pytest.raises(DigitError, match=said) as caught:
        class_positions(labels, classes, len(classes) or 3)
    assert "\n" not in str(caught.value)


def test_an_exact_name_comes_before_its_number():
    assert places(["1", "01"], ["1", "01"]) == [0, 1]


@pytest.mark.parametrize("label", [None, -1, "none", "-1", np.int64(-1)])
def test_no_class_is_a_label_where_the_model_knows_images_without(label):
    assert class_positions([label, 1], SOLIDS, len(SOLIDS), unlabelled=True) == [-1, 1]
    assert class_positions([label], ["0", "1", "2"], 3, unlabelled=True) == [-1]
    with pytest.raises(DigitError, match="stands for no class"):
        class_positions([label], SOLIDS, len(SOLIDS))


def test_classes_that_are_called_none_or_minus_one_stay_classes():
    assert class_positions(["none"], ["none", "some"], 2, unlabelled=True) == [0]
    assert class_positions([-1, "-1"], ["-1", "0"], 2, unlabelled=True) == [0, 0]


IMAGENET = ["n01440764 tench", "n01443537 goldfish", "n02012849 crane", "n03126707 crane"]


@pytest.mark.parametrize(
    ("classes", "label", "place"),
    [
        (IMAGENET, "tench", 0), (IMAGENET, "n01443537", 1), (IMAGENET, "n01443537 goldfish", 1), (IMAGENET, "Tench", 0),
        (["tench, Tinca tinca", "goldfish, Carassius auratus"], "Tinca tinca", 0),
        (["tench, Tinca tinca", "tench"], "tench", 1),
    ],
)  # fmt: skip
def test_a_synset_or_one_of_its_words_is_enough(classes, label, place):
    assert places(label, classes) == [place]


def test_words_of_several_classes_or_of_none_are_refused():
    with pytest.raises(DigitError, match="'crane' fits several classes, 'n02012849 crane' at position 2 and"):
        places("crane", IMAGENET)
    with pytest.raises(DigitError, match="no class named 'tensh': did you mean tench"):
        places("tensh", IMAGENET)
