"""Protocol of image tokenizers."""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor


@runtime_checkable
class ImageTokenizer(Protocol):
    """Encodes images as a grid of tokens, and embeds tokens as vectors. B images, N = rows * columns tokens.

    One whose codebook has several levels has an attribute `num_levels`, L: an image then has N L tokens, the L of each
    cell of the grid one after another, and `embed` gives a vector for each cell.
    """

    @property
    def vocab_size(self) -> int:
        """Number K of codes; tokens lie in 0..K-1."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns); tokens are in raster order."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes when any image would get other tokens."""
        ...

    def encode(self, images: UInt8[Tensor, "B 3 H W"]) -> Int64[Tensor, "B N"]:
        """RGB images in 0..255 to tokens."""
        ...

    def embed(self, tokens: Int64[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """The vector (centroid or code) of each token, float32."""
        ...


@runtime_checkable
class HasGrid(Protocol):
    """What has tokens on a grid."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...


def levels_of(tokenizer: object) -> int:
    """Tokens of each cell of a tokenizer's grid."""
    return int(getattr(tokenizer, "num_levels", 1))


def tokens_of(tokenizer: HasGrid) -> int:
    """Tokens of an image."""
    return math.prod(tokenizer.grid) * levels_of(tokenizer)


def first_level_vectors(tokenizer: ImageTokenizer) -> Float[Tensor, "K D"]:
    """The vector of each code, of several levels of each code of the first one (with code 0 in the others)."""
    codes = torch.zeros(tokenizer.vocab_size, levels_of(tokenizer), dtype=torch.int64)
    codes[:, 0] = torch.arange(tokenizer.vocab_size)
    return tokenizer.embed(codes.view(1, -1))[0]
