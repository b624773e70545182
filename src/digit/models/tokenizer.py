"""Protocol of image tokenizers."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int64, UInt8
from torch import Tensor


@runtime_checkable
class ImageTokenizer(Protocol):
    """Encodes images as a grid of tokens, and embeds tokens as vectors. B images, N = rows * columns tokens."""

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
