"""Training and test images of one data set: its own splits where it has them, else every fifth image."""

from collections.abc import Callable
from pathlib import Path

from digit.data.images import hold_out, open_source
from digit.data.layout import split_of
from digit.data.pixel_range import require_same_white
from digit.data.source import ImageSource
from digit.errors import DigitError

HELD_OUT = ("test", "validation")  # splits to test on, in the order of preference


def probe_splits(
    data: str,
    split: str | None = None,
    test: str | None = None,
    test_split: str | None = None,
    opened: Callable[..., ImageSource] = open_source,
) -> tuple[ImageSource, ImageSource, str]:
    """Open (train, test, where the test images come from) for a linear probe.

    Args:
        data: what `open_source` takes, labelled.
        split: split of `data` to train on; by default train where there is one.
        test, test_split: images to test on, or a split of `data`. By default the test or else the validation split of
            `data` (or beside it, where `data` is a folder named train), and without any every fifth image of `data`.
        opened: opens images as `open_source(path, split=...)` does.
    """
    if test is not None or test_split is not None:
        train, chosen = opened(data, split=split), opened(test or data, split=test_split)
        require_same_white(train.pixel_range, chosen.pixel_range)
        where = f"{test or data}" + (f", split {test_split}" if test_split else "")
        return train, chosen, where
    unusable = []
    for root, name in ((root, name) for root in split_roots(data) for name in HELD_OUT if name != split):
        try:
            chosen = opened(root, split=name)
            train = opened(data, split=split or ("train" if root == data else None))
        except DigitError as error:
            if any(path.is_dir() and split_of(path.name) == name for path in Path(root).glob("*")):
                unusable.append(f"its {name} split cannot be used: {error}")
            continue
        if labelled(chosen):
            require_same_white(train.pixel_range, chosen.pixel_range)
            return train, chosen, f"the {name} split of {root}{in_brackets(unusable)}"
        unusable.append(f"its {name} split has no labels")
    train, chosen = hold_out(opened(data, split=split))
    where = f"every fifth image of {data}{in_brackets(unusable)}"
    return train, chosen, f"{where}, which a pipeline fitted on {data} was trained on"


def in_brackets(reasons: list[str]) -> str:
    """' (a; b)', or nothing."""
    return f" ({'; '.join(reasons)})" if reasons else ""


def split_roots(data: str) -> list[str]:
    """Where the splits of a data set may lie: in it, and beside it if it is a folder named train."""
    path = Path(data)
    return [data, str(path.parent)] if split_of(path.name) == "train" and path.is_dir() else [data]


def labelled(source: ImageSource) -> bool:
    """Whether any image of a source has a class."""
    labels = source.labels()
    return bool(source.classes) and (labels is None or bool((labels >= 0).any()))
