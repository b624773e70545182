"""Which images a reproduction trains and tests on."""

from functools import partial

from digit.data.images import ImageSource, open_source
from digit.data.shapes import ShapesSource
from digit.evaluation.splits import labelled, probe_splits


def open_splits(
    data: str,
    num_train: int | None,
    num_test: int,
    pixel_max: int | None = None,
    *,
    labels_from: str = "auto",
    test_split: str | None = None,
    every_fifth: bool = False,
) -> tuple[ImageSource, ImageSource, str]:
    """Open (train, test, where the test images come from), at most `num_train` and `num_test` images of each.

    Test images are new scenes of shapes; else the data's test or validation split, whichever has labels if the training
    images have; else every fifth image of data without such splits. ImageNet's test split, which has no labels, is
    passed over for its validation split.

    Args:
        labels_from: where labels come from, as of `open_source`.
        test_split: takes this split, with or without labels.
        every_fifth: takes every fifth image although there are such splits.

    Raises DigitError where the data have a test or validation split, but none that can be used.
    """
    if data.split(":")[0] == "shapes":
        train = open_source(data).limit(num_train)
        test = ShapesSource(num=num_test, size=train.read(0)[0].width, start=1_000_000)
        return train, test, "scenes that no model was trained on"
    opened = partial(open_source, pixel_max=pixel_max, labels_from=labels_from)
    train, test, where = probe_splits(data, None, None, test_split, opened, every_fifth=every_fifth)
    if where.startswith("every fifth"):  # of the images that nothing is trained on here
        where = f"every fifth image of {data}"
    if labelled(train):
        test = test.with_classes(train.classes)
    return train.limit(num_train), test.limit(num_test), where
