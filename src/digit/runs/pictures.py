"""Pictures that commands read, complete and vary, and the folders of PNGs that they write."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from digit.data.crops import gather_crops
from digit.data.images import FolderSource, ImageSource, open_source
from digit.data.listing import File, Listing, kind_of
from digit.data.preprocess import Fit, PreprocessConfig, fit_batch
from digit.errors import DigitError, NoSplitError
from digit.pipeline.around import AREAS, Keep
from digit.runtime import plots
from digit.runtime.files import as_path, write_result
from digit.runtime.scalars import as_int
from digit.runtime.spread import spread

NUMBERED = re.compile(r"\d{5,}\.png")
COMPLETIONS, VARIATIONS = "completions.json", "variations.json"
GRID = "grid.png"
SHOWN_SIDE = 128  # px of a picture in a grid, at least
GREY, MAX_GREY = (32, 223), 0.25  # levels of a mask that are neither black nor white, and the share that edges may have
WIDE = 9  # pictures in a row of a grid of single completions


def write_completions(
    folder: Path,
    images: UInt8[Tensor, "B 3 S S"],
    done: UInt8[Tensor, "C 3 S S"],
    kept: Bool[Tensor, "S S"],
    about: dict[str, Any],
) -> None:
    """Write one PNG a completion, grid.png with original, kept part and completions, and completions.json.

    Args:
        images, done: the originals, and the same number of completions of each, one original's after the other's.
        kept: the pixels that were kept.
        about: what completions.json says beside the numbers: what was kept, of which pictures, and how.

    The images of earlier completions there are removed. `require_free` tells if the folder may be written to.
    """
    each = len(done) // max(1, len(images))
    write_pictures(folder, done)
    sheet = plots.interleave(images, dim_hidden(images, kept), *done.unflatten(0, (len(images), each)).unbind(1))
    columns = 2 + each if each > 1 or len(images) <= 2 else WIDE
    save_grid(folder, sheet, columns)
    write_result(folder / COMPLETIONS, {"num": len(done), "each": each} | about)


def write_variations(
    folder: Path, images: UInt8[Tensor, "B 3 S S"], done: UInt8[Tensor, "C 3 S S"], about: dict[str, Any]
) -> None:
    """Write one PNG a variation, grid.png with a row for each picture and its variations, and variations.json."""
    each = len(done) // max(1, len(images))
    write_pictures(folder, done)
    save_grid(folder, plots.interleave(images, *done.unflatten(0, (len(images), each)).unbind(1)), 1 + each)
    write_result(folder / VARIATIONS, {"num": len(done), "each": each} | about)


def write_between(
    folder: Path,
    first: UInt8[Tensor, "1 3 S S"],
    last: UInt8[Tensor, "1 3 S S"],
    done: UInt8[Tensor, "B 3 S S"],
    about: dict[str, Any],
) -> None:
    """Write one PNG a step, grid.png with the two pictures and the steps between them, and variations.json."""
    write_pictures(folder, done)
    save_grid(folder, torch.cat([first, done, last]), len(done) + 2)
    write_result(folder / VARIATIONS, {"num": len(done)} | about)


def write_pictures(folder: Path, images: UInt8[Tensor, "B 3 S S"]) -> None:
    """Write 00000.png and so on, without those that were there."""
    for earlier in folder.glob("*.png"):
        if NUMBERED.fullmatch(earlier.name):
            earlier.unlink()
    for i, image in enumerate(images):
        plots.save_png(folder / f"{i:05d}.png", image)


def save_grid(folder: Path, images: UInt8[Tensor, "B 3 S S"], columns: int) -> None:
    """Write grid.png, small pictures enlarged."""
    scale = max(1, SHOWN_SIDE // images.shape[-1])
    plots.save_png(folder / GRID, plots.grid(images, columns, scale=scale))


def dim_hidden(images: UInt8[Tensor, "B 3 S S"], kept: Bool[Tensor, "S S"]) -> UInt8[Tensor, "B 3 S S"]:
    """Grey out what is not kept: the rest is what a completion was given."""
    return torch.where(kept, images, (images.float() * 0.12 + 200).to(torch.uint8))


def require_free(folder: Path, record: str = COMPLETIONS) -> None:
    """Raise DigitError where pictures would replace others than those that `record` tells of."""
    images = sorted(path.name for path in folder.glob("*.png")) if folder.is_dir() else []
    if images and not (folder / record).is_file():
        raise DigitError(f"{folder} holds {images[0]} but no {record}: choose another --out")


# -------------------------------------------------------------------- read


def open_images(spec: str, pixel_max: int | None = None, *, split: str | None = None) -> ImageSource:
    """Opens what `open_source` takes, or one image file, which is then the only image of its source and has no split.

    Raises NoSplitError for a split that there is not, and as `open_source` does.
    """
    path = as_path(spec)
    if not path.is_file() or kind_of(path.name) != "images":
        return open_source(spec, split=split, pixel_max=pixel_max)
    if split is not None:
        raise NoSplitError(f"{spec} is one image and has no splits: leave --split out")
    status = path.stat()
    source = FolderSource(path.parent, Listing([File(path.name, status.st_size, status.st_mtime_ns)]))
    source.find_pixel_range(pixel_max)
    return source


def load_images(
    source: ImageSource, preprocess: PreprocessConfig, num: int
) -> tuple[UInt8[Tensor, "B 3 S S"], list[str]]:
    """At most `num` images of a source, evenly apart, centre-cropped, and their names. A single one must be whole.

    Raises DigitError for a `num` below 1.
    """
    num = as_int("num", num, least=1)
    if len(source) == 1:
        source.read(0)  # names what is wrong with it
    places = spread(len(source), num)
    images = real_images(source, preprocess, places)[0]
    if len(images) < len(places):
        places = [place for place in places if is_whole(source, place)]
    return images, [source.key(place) for place in places]


def is_whole(source: ImageSource, place: int) -> bool:
    """Whether an image can be read."""
    try:
        source.read(place)
    except DigitError:
        return False
    return True


def real_images(
    source: ImageSource, preprocess: PreprocessConfig, indices: Sequence[int]
) -> tuple[UInt8[Tensor, "B 3 S S"], Int64[Tensor, " B"]]:
    """Centre crops of some images and their labels; broken files are left out."""
    return gather_crops(source.subset([i for i in indices if i < len(source)]), preprocess)


def read_keep(text: str, size: int, fit: Fit = "crop") -> Keep:
    """What --keep says: a fraction, the name of an area, or a picture as of `read_mask`. Raises DigitError."""
    try:
        return float(text)
    except ValueError:
        pass
    if text in AREAS:
        return text
    if as_path(text).is_file():
        return read_mask(as_path(text), size, fit)
    raise DigitError(
        f"--keep {text}: give a fraction, one of {', '.join(AREAS)}, or the file of a black and white mask"
    )


def read_mask(path: Path, size: int, fit: Fit = "crop") -> Bool[Tensor, "S S"]:
    """The pixels that a mask keeps: white ones, or of a picture with transparency opaque ones.

    Made square as pictures are, so that a mask of a picture's size fits it. Raises DigitError for unreadable files, and
    where nothing or everything is kept.
    """
    try:
        with Image.open(path) as picture:
            clear = picture.has_transparency_data
            values = picture.convert("RGBA").getchannel("A") if clear else picture.convert("L")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DigitError(f"{path} cannot be read as a mask ({error}): give a black and white picture") from error
    levels = np.array(values)
    grey = float(((levels > GREY[0]) & (levels < GREY[1])).mean())  # of the file itself: enlarging makes grey edges
    if grey > MAX_GREY:
        raise DigitError(
            f"{path} is no mask: {grey:.0%} of its pixels are neither black nor white. Paint what is kept white, the "
            "rest black"
        )
    pixels = torch.from_numpy(levels).expand(1, 3, -1, -1)
    mask = fit_batch(pixels, size, fit)[0, 0] >= 128
    if mask.all() or not mask.any():
        what = "everything" if mask.all() else "nothing"
        raise DigitError(f"{path} keeps {what}: paint what is kept white (or opaque), the rest black (or transparent)")
    return mask
