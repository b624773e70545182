"""A source of noise pictures and an encoder without weights, for the tests of tokenizers and token stores."""

import hashlib

import numpy as np
import torch
from PIL import Image

from digit.data.source import ImageSource
from digit.errors import BadImageError


class NoiseSource(ImageSource):
    """Random 20 x 18 pictures; those in `broken` cannot be read."""

    def __init__(self, num: int = 12, broken: tuple[int, ...] = ()):
        self.name, self.classes, self.num, self.broken = "noise", ["a", "b"], num, broken
        self.fingerprint = hashlib.sha256(str((num, broken)).encode()).hexdigest()

    def __len__(self) -> int:
        return self.num

    def key(self, index: int) -> str:
        return f"noise/{index}.png"

    def read(self, index: int):
        if index in self.broken:
            raise BadImageError(f"{self.key(index)}: broken on purpose")
        pixels = np.random.default_rng(index).integers(0, 256, (20, 18, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 2


class PatchEncoder(torch.nn.Module):
    """Mean colour of each patch of a 4 x 4 grid, repeated to D features."""

    def __init__(self, dim: int = 3, name: str = "patches"):
        super().__init__()
        self.dim, self.name, self.grid, self.calls = dim, name, (4, 4), 0

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name}{self.dim}".encode()).hexdigest()

    def save(self, folder) -> None:
        raise NotImplementedError("a toy has no weights")

    def describe(self):
        return {"name": self.name, "layer": -3, "dim": self.dim}

    def features(self, images):
        self.calls += 1
        cells = (
            torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(2).transpose(1, 2)
        )  # (B, 16, 3)
        return cells.repeat(1, 1, -(-self.dim // 3))[..., : self.dim]
