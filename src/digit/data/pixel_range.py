"""Which value is white in the images of a source that hold more than 8 bits per channel."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from digit.errors import BadImageError, DigitError

USUAL_WHITES = (1, 255, 1023, 4095, 16383, 65535)  # masks, 8, 10, 12, 14 and 16 bits
FULL = USUAL_WHITES[-1]
NEARLY_BLACK = 16  # of 255: an image no brighter than this shows nothing
MAX_HEADERS, RUN = 64, 4  # images whose header is read, in runs of neighbours, which a Parquet file keeps together
MAX_PIXELS = 2**25  # pixels that are decoded for their largest value, about half a second


@dataclass(frozen=True)
class PixelRange:
    """White, the value that becomes 255, in the images of a source that have more than 8 bits per channel."""

    white: int | None
    """None where no image probed has more than 8 bits and a range that its file does not state."""
    reason: str
    """How it is known."""
    given: bool = False
    """Whether the user said so, which counts before what a file states."""

    def __str__(self) -> str:
        advice = "" if self.given else "; --pixel_max says otherwise"
        return f"pixels of more than 8 bits: white is {self.white} ({self.reason}){advice}"

    def misses(self, largest: float) -> bool:
        """Whether an image of this largest value would come out nearly black: perhaps its own white is another."""
        return self.white is not None and 0 < largest * 255 <= NEARLY_BLACK * self.white


def usual_white(largest: int) -> int | None:
    """The smallest of USUAL_WHITES that is no less than `largest`; None beyond 65535."""
    return next((white for white in USUAL_WHITES if white >= largest), None)


def find_pixel_range(
    size: Callable[[int], int], largest: Callable[[int], int], num: int, pixel_max: int | None
) -> PixelRange:
    """Finds white: `pixel_max` if it is given, else the usual white at or above the largest value of the images probed.

    Args:
        size: image number -> its pixels if it is deep and does not state its range, else 0; reads the header alone.
        largest: image number -> its largest value; decodes it.
        num: number of images.
        pixel_max: what the user says.

    Raises DigitError for a pixel_max below 1.
    """
    if pixel_max is not None and pixel_max < 1:
        raise DigitError(
            f"pixel_max is {pixel_max}, wanted the value of white in images of more than 8 bits: 1 or more"
        )
    starts = np.arange(0, MAX_HEADERS, RUN) * num // MAX_HEADERS
    rows = range(num) if num <= MAX_HEADERS else (starts[:, None] + np.arange(RUN)).reshape(-1).tolist()
    sizes = {row: pixels for row in rows if (pixels := _or_zero(size, row))}
    if pixel_max is not None:
        seen = "" if sizes else f"; none of {len(rows)} images probed has more than 8 bits, and it changes no other"
        return PixelRange(pixel_max, f"as --pixel_max says{seen}", given=True)
    values, pixels = [], 0
    for row, number in sizes.items():
        if values and pixels + number > MAX_PIXELS:
            break
        pixels += number
        values.append(_or_zero(largest, row))
    return _judge(values, len(rows))


def require_same_white(train: PixelRange | None, test: PixelRange | None) -> None:
    """Raises DigitError where training and test images would be scaled by different values of white."""
    if train and test and train.white and test.white and train.white != test.white:
        raise DigitError(
            f"white is {train.white} in the training images ({train.reason}) and {test.white} in the test images "
            f"({test.reason}): give --pixel_max, which counts for both"
        )


def _judge(values: list[int], num_probed: int) -> PixelRange:
    """The range that the largest values of some images show."""
    if not any(values):
        return PixelRange(None, f"none of {num_probed} images probed shows it")
    images = f"{len(values)} image{'s' * (len(values) > 1)}"
    found = PixelRange(usual_white(max(values)), f"largest value of {images} probed: {max(values)}")
    refused = sum(map(found.misses, values))
    return replace(found, reason=f"{found.reason}; {refused} nearly black by it, refused") if refused else found


def _or_zero(read: Callable[[int], int], row: int) -> int:
    try:
        return read(row)
    except BadImageError:  # found, and named, when it is read
        return 0
