"""Training and test images of one data set: its own splits where it has them, else every fifth image."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from digit.data.images import hold_out, open_source
from digit.data.layout import split_of
from digit.data.listing import shared_listings
from digit.data.pixel_range import require_same_white
from digit.data.source import ImageSource
from digit.errors import DigitError, NoSplitError

HELD_OUT = ("test", "validation")  # splits to test on, in the order of preference
CHOICES = "--hold_out true takes every fifth training image instead"


@dataclass
class OwnSplits:
    """The splits of a data set that may be tested on, and why others may not."""

    data: str
    split: str | None
    opened: Callable[..., ImageSource]
    unusable: list[str] = field(default_factory=list)

    def find(self) -> tuple[ImageSource, ImageSource, str] | None:
        """(train, test, the test split in words), by preference; None without one.

        A test split without labels does for training images without labels alone.
        """
        for root, name in self._places():
            try:
                chosen = self._open(root, name)
                train = None if chosen is None else self.opened(self.data, split=self._train(root))
            except NoSplitError:  # a class of that name, beside others: no splits
                continue
            except DigitError as error:
                self.unusable.append(f"its {name} split cannot be used: {error}")
                continue
            if chosen is None or train is None:
                continue
            if labelled(chosen) or not labelled(train):
                require_same_white(train.pixel_range, chosen.pixel_range)
                require_common_classes(train, chosen)
                return train, chosen, f"the {name} split of {root}{in_brackets(self.unusable)}"
            about = "".join(f" ({note})" for note in chosen.notes if "no labels" in note)
            self.unusable.append(f"its {name} split has no labels{about}")
        return None

    def _open(self, root: str, name: str) -> ImageSource | None:
        """The split of a root; None where there is none. A folder of its name without images is unusable."""
        try:
            return self.opened(root, split=name)
        except NoSplitError as error:
            if any(path.is_dir() and split_of(path.name) == name for path in Path(root).glob("*")):
                self.unusable.append(f"its {name} split cannot be used: {error}")
            return None

    def _train(self, root: str) -> str | None:
        return self.split or ("train" if root == self.data else None)

    def _places(self) -> Iterator[tuple[str, str]]:
        return ((root, name) for root in split_roots(self.data) for name in HELD_OUT if name != self.split)


def probe_splits(
    data: str,
    split: str | None = None,
    test: str | None = None,
    test_split: str | None = None,
    opened: Callable[..., ImageSource] = open_source,
    *,
    every_fifth: bool = False,
) -> tuple[ImageSource, ImageSource, str]:
    """Open (train, test, where the test images come from) for a linear probe or a reproduction.

    Args:
        data: what `open_source` takes.
        split: split of `data` to train on; by default train where there is one.
        test, test_split: images to test on, or a split of `data`, labelled or not. By default the test or else the
            validation split of `data` (or beside it, where `data` is a folder named train), whichever has labels, and
            where there is none every fifth image of `data`.
        opened: opens images as `open_source(path, split=...)` does.
        every_fifth: takes every fifth image of `data` although there are such splits.

    Raises DigitError, unless `every_fifth`, where there are test or validation splits and none has labels or can be
    read: they are not replaced by training images unasked.
    """
    if every_fifth and (test is not None or test_split is not None):
        raise DigitError("--hold_out takes every fifth training image: leave it out, or leave out the test images")
    if test is not None or test_split is not None:
        train, chosen = opened(data, split=split), opened(test or data, split=test_split)
        require_same_white(train.pixel_range, chosen.pixel_range)
        where = f"{test or data}" + (f", split {test_split}" if test_split else "")
        return train, chosen, where
    own = OwnSplits(data, split, opened)
    if not every_fifth:
        with shared_listings():
            found = own.find()
        if found is not None:
            return found
        if own.unusable:
            raise DigitError(f"{data} has nothing to test on: {'; '.join(own.unusable)}; {CHOICES}")
    train, chosen = hold_out(opened(data, split=split))
    return train, chosen, f"every fifth image of {data}, which a pipeline fitted on {data} was trained on"


def chosen_on(
    data: str, split: str | None = None, opened: Callable[..., ImageSource] = open_source
) -> tuple[ImageSource, str]:
    """(images that settings are chosen on, where they come from): of the data's own splits validation, then test.

    Without such a split these are all images, on which a pipeline may have been trained. split: the one to take
    instead. `opened` opens images as `open_source(path, split=...)` does. Raises DigitError for data that cannot be
    read.
    """
    if split is not None:
        return opened(data, split=split), f"the {split} split of {data}"
    for name in reversed(HELD_OUT):
        for root in split_roots(data):
            with suppress(NoSplitError):
                return opened(root, split=name), f"the {name} split of {root}"
    told = "" if split_of(Path(data).name) in HELD_OUT else ", which has neither a validation nor a test split"
    return opened(data), f"{data}{told}"


def require_common_classes(train: ImageSource, test: ImageSource) -> None:
    """Raises DigitError where test images have labels, but none of a class of the training images."""
    if not labelled(train) or not labelled(test):
        return
    labels = test.with_classes(train.classes).labels()
    if labels is not None and (labels < 0).all():
        raise DigitError(
            f"no image of {test.name} is of a class of {train.name}: the classes are {', '.join(test.classes[:3])} ... "
            f"and {', '.join(train.classes[:3])} ...; name the file of labels, --labels_from FILE, or other test images"
        )


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
