"""Centre crops of a source in batches, the images that every evaluation measures."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from digit.data.loader import CropLoader
from digit.data.preprocess import PreprocessConfig
from digit.data.source import ImageSource
from digit.errors import DigitError


def centre_crops(
    source: ImageSource, cfg: PreprocessConfig, *, num: int | None = None, batch_size: int = 64
) -> Iterator[tuple[UInt8[Tensor, "B 3 S S"], Int64[Tensor, " B"]]]:
    """Yields (images uint8 (B, 3, S, S) RGB 0..255, labels int64 (B,), -1 = none), unflipped, in order.

    Args:
        num: the most images to take, spread evenly over the source; None takes all.
        batch_size: images per batch; unreadable images are left out.

    Raises DigitError if no image can be read.
    """
    centre = replace(cfg, random_crop=False, flip=False)
    loader = CropLoader(source.limit(num), centre, batch_size=batch_size, max_bad_fraction=1.0)
    for batch in loader:
        if batch.ok.any():
            yield batch.images[batch.ok], batch.labels[batch.ok]


def gather_crops(
    source: ImageSource, cfg: PreprocessConfig, *, num: int | None = None
) -> tuple[UInt8[Tensor, "N 3 S S"], Int64[Tensor, " N"]]:
    """Collects all of `centre_crops`: (images (N, 3, S, S) uint8, labels (N,) int64)."""
    batches = list(centre_crops(source, cfg, num=num))
    if not batches:
        raise DigitError(f"{source.name} holds no image that can be read")
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
