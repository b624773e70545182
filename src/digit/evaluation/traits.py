"""What the warnings of an evaluation need to know of an image set; saved statistics hold it in place of the images."""

import json
from dataclasses import asdict, dataclass
from typing import Self

from digit.errors import DigitError
from digit.evaluation.looks import Look
from digit.runtime.config_json import from_json

Counts = tuple[tuple[str, int], ...]  # name and number of images, the most frequent first


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Numbers, sizes, formats, colours and classes of the images of a set."""

    num: int
    """Number of images."""
    sizes: tuple[tuple[int, int, int], ...]
    """(width, height, number of images) as stored, the most frequent size first."""
    kinds: Counts
    """File formats, by Pillow's names, or `pixels`."""
    modes: Counts
    """Pixel types as stored, by Pillow's names."""
    num_grey: int
    """Images whose three channels are equal."""
    num_repeated: int
    """Images that repeat another one of the set pixel by pixel."""
    fitted: int | None = None
    """Side in pixels to which images were resized and cropped; None where they were unchanged."""
    classes: Counts | None = None
    """Images of each class; None where some image has no known class."""
    rounding: str | None = None
    """How the images were rounded to uint8; None where it is not known."""
    remarks: tuple[str, ...] | None = None
    """What was odd when the set was opened, as sentences."""
    look: Look | None = None
    """What its pixels are like on average; None in files of older versions."""

    @property
    def side(self) -> int | None:
        """Side in pixels if all images are stored as squares of one size, else None."""
        (width, height, _), *others = self.sizes
        return width if not others and width == height else None

    @property
    def pixels(self) -> int | None:
        """Side in pixels of the images that the network received."""
        return self.fitted or self.side

    def to_json(self) -> str:
        """The text that `read` takes."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def read(cls, text: str, source: str) -> Self:
        """Read the text of `to_json`. Raises DigitError, naming `source`, for any other text."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DigitError(f"{source} is damaged: compute the statistics again") from error
        return from_json(cls, value, source)
