"""The one preprocessing, which codebook, tokens, training and evaluation share.

The released code has two paths, and both exist under their names (RELEASED_CODE.md, Encoder):

    released         PIL bicubic, short side -> image_size; crop image_size; flip.      The encoder interpolates the
                     tensor later (bicubic, no antialias) by encoder_size / image_size. Training and stage 2.
    released_kmeans  PIL bicubic, short side -> encoder_size; crop encoder_size; flip.  Nothing later. K-means features.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from digit.data.decode import MAX_PIXELS
from digit.errors import BadImageError
from digit.runtime.settings import check_settings, within

if TYPE_CHECKING:
    import torch

    from digit.data.pictures import Images

PathName = Literal["released", "released_kmeans"]
Fit = Literal["crop", "pad", "squeeze"]
MASK_64 = 2**64 - 1
CROP_STREAM, ORDER_STREAM = 0, 1  # independent random streams of one seed


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How an image of any size becomes a square uint8 crop."""

    path: PathName = "released"
    """the released code's path: released (training, tokens) or released_kmeans (codebook features)"""
    image_size: int = within("[1, 4096]", 256)
    """side of the crop in pixels on the path `released`; what the VQGAN sees"""
    encoder_size: int = within("[1, 4096]", 224)
    """side in pixels that the frozen encoder sees"""
    fit: Fit = "crop"
    """how a picture becomes square: crop, as the released code, cuts the longer side; pad keeps all of it between bars
    of the mean colour of its edges; squeeze keeps all of it, out of shape"""
    random_crop: bool = True
    """crop at a random position (else at the centre)"""
    flip: bool = True
    """mirror left-right with probability 0.5"""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def crop_size(self) -> int:
        """Side in pixels of the crop; the short side is resized to it first."""
        return self.image_size if self.path == "released" else self.encoder_size

    @property
    def deterministic(self) -> bool:
        """Whether every crop of an image is the same."""
        return self.distinct_crops == 1

    @property
    def distinct_crops(self) -> int | None:
        """How many different crops an image has at most; None where they are at random positions."""
        if self.fit == "crop" and self.random_crop:
            return None
        return 2 if self.flip else 1

    def described(self) -> dict[str, Any]:
        """The settings, for manifests; without `fit` where it is the released code's, as older versions wrote them."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("fit", "crop")}


def philox(seed: int, stream: int, index: int, sample: int) -> np.random.Generator:
    """Random generator of four integers mod 2^64: Philox with key (seed, stream), counter (0, 0, index, sample)."""
    key = np.array([seed & MASK_64, stream & MASK_64], dtype=np.uint64)
    counter = np.array([0, 0, index & MASK_64, sample & MASK_64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def resized_size(width: int, height: int, short: int) -> tuple[int, int]:
    """(width, height) after resizing the short side to `short`; the long side is truncated, not rounded."""
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def resize_short_side(image: Image.Image, short: int) -> Image.Image:
    """Resizes the short side to `short` pixels with PIL's bicubic (antialiased); unchanged if it already fits.

    Raises BadImageError if the other side would become too long (an image that is a line of pixels).
    """
    size = resized_size(*image.size, short)
    if size[0] * size[1] > MAX_PIXELS:
        width, height = image.size
        raise BadImageError(f"{width}x{height} pixels are too long and thin: {size[0]}x{size[1]} once resized")
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def squared(image: Image.Image, cfg: PreprocessConfig) -> Image.Image:
    """The picture of which crops are cut: its short side `cfg.crop_size`, or already a square of that side (`cfg.fit`).

    Raises BadImageError as `resize_short_side`.
    """
    size = cfg.crop_size
    if cfg.fit == "crop":
        return resize_short_side(image, size)
    if cfg.fit == "pad":
        return padded(image, size)
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def padded(image: Image.Image, size: int) -> Image.Image:
    """The whole picture, its long side resized to `size`, between two bars, each of its edge's mean colour."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    inner = np.asarray(
        image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
    )
    square = np.empty((size, size, 3), dtype=np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[:top], square[top:] = mean_colour(inner[0]), mean_colour(inner[-1])
    if left or width < size:
        square[:, :left], square[:, left:] = mean_colour(inner[:, 0]), mean_colour(inner[:, -1])
    square[top : top + height, left : left + width] = inner
    return Image.fromarray(square)


def mean_colour(pixels: np.ndarray) -> np.ndarray:
    """(n, 3) uint8 -> (3,) uint8, rounded."""
    return pixels.mean(0).round().astype(np.uint8)


def kept_share(width: int, height: int, fit: Fit) -> float:
    """The share of a picture's area that each of its crops shows: 1 where nothing is cut."""
    return min(width, height) / max(width, height) if fit == "crop" else 1.0


def place_crop(
    width: int, height: int, cfg: PreprocessConfig, *, seed: int, index: int, crop: int
) -> tuple[int, int, bool]:
    """(left, top, flipped) of one crop in a resized image: a pure function of (seed, index, crop)."""
    size = cfg.crop_size
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    if crop < 0 or cfg.deterministic:
        return left, top, False
    u, v, w = philox(seed, CROP_STREAM, index, crop).random(3)
    if cfg.random_crop:
        left, top = int(u * (width - size + 1)), int(v * (height - size + 1))
    return left, top, bool(cfg.flip and w < 0.5)


def crop_image(image: Image.Image, cfg: PreprocessConfig, *, seed: int, index: int, crop: int) -> np.ndarray:
    """Returns one crop of an image: uint8 (S, S, 3), RGB, 0..255, S = cfg.crop_size.

    Args:
        image: PIL image of mode RGB, any size.
        seed, index, crop: decide position and flip; crop -1 is the centre, unflipped.

    Raises:
        BadImageError: the image is too long and thin to resize.
    """
    resized = np.asarray(squared(image, cfg))  # (H, W, 3)
    return cut(resized, cfg, seed=seed, index=index, crop=crop)


def cut(resized: np.ndarray, cfg: PreprocessConfig, *, seed: int, index: int, crop: int) -> np.ndarray:
    """As `crop_image`, from the resized image (H, W, 3) uint8; returns a view."""
    height, width, _ = resized.shape
    left, top, flipped = place_crop(width, height, cfg, seed=seed, index=index, crop=crop)
    square = resized[top : top + cfg.crop_size, left : left + cfg.crop_size]  # (S, S, 3)
    return square[:, ::-1] if flipped else square


def centre_crop(image: Image.Image, size: int, fit: Fit = "crop") -> np.ndarray:
    """The centre crop after resizing the short side to `size`, or what else `fit` says: uint8 (size, size, 3).

    Raises as crop_image.
    """
    return crop_image(image, PreprocessConfig(image_size=size, fit=fit), seed=0, index=0, crop=-1)


def fit_batch(images: "Images", size: int, fit: Fit = "crop") -> "torch.Tensor":
    """Centre crops of a batch, or what else `fit` says: uint8 (B, 3, H, W) -> uint8 (B, 3, size, size).

    A batch of that size is unchanged.

    Takes what else `digit.data.pictures.as_images` takes; the images of a list may differ in size. Raises DigitError
    for anything else.
    """
    import torch

    from digit.data.pictures import as_images

    if isinstance(images, list | tuple) and len(images) > 1:
        return torch.cat([fit_batch([image], size, fit) for image in images])
    images = as_images(images)
    if images.shape[2:] == (size, size):
        return images
    pictures = [Image.fromarray(picture) for picture in images.permute(0, 2, 3, 1).cpu().numpy()]
    crops = np.zeros((len(pictures), size, size, 3), dtype=np.uint8)
    for crop, picture in zip(crops, pictures, strict=True):
        crop[:] = centre_crop(picture, size, fit)
    return torch.from_numpy(crops.transpose(0, 3, 1, 2).copy()).to(images.device)
