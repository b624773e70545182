"""What a tokenizer, an encoder and a quantizer are, as protocols.

Shapes: B images, N = rows * columns tokens an image in raster order, D features, K codes, L levels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


@runtime_checkable
class Encoder(Protocol):
    """A frozen network that turns images into patch features; see encoders.FrozenEncoder."""

    @property
    def dim(self) -> int:
        """Features D of a patch."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes when any image would get other features."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 to (B, N, D) float32."""
        ...

    def to(self, device: str | torch.device) -> Any:
        """Move it to a device."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write encoder.safetensors and encoder.json."""
        ...

    def describe(self) -> dict[str, Any]:
        """What manifests record: name, layer, sizes, fingerprint."""
        ...


@runtime_checkable
class Quantizer(Protocol):
    """Features to integers and back. K-means is the first of several (quantizers.QUANTIZERS names them)."""

    meta: dict[str, Any]
    """How it came about: encoder, preprocessing, settings, and the metrics of the fit."""

    @property
    def vocab_size(self) -> int:
        """Number K of codes; tokens lie in 0..K-1."""
        ...

    @property
    def num_levels(self) -> int:
        """Codes L of one feature: 1, or more in a residual or product codebook, where K are the codes of each level."""
        ...

    @property
    def level_vectors(self) -> 'Float[Tensor, "L K D"]':
        """What each code of each level adds to a feature, up to a constant of the level; float32."""
        ...

    @property
    def dim(self) -> int:
        """Features D that it takes."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes when any feature would get another token."""
        ...

    def predict(self, features: 'Float[Tensor, "... D"]') -> 'Int64[Tensor, "..."]':
        """The token of each feature, of several levels its codes (..., L).

        Raises MismatchError for another D, DigitError for NaN or Inf.
        """
        ...

    def embed(self, tokens: 'Int64[Tensor, "..."]') -> 'Float[Tensor, "... D"]':
        """The vector that each token, of several levels each (..., L) codes, stands for, float32."""
        ...

    def to(self, device: str | torch.device) -> Self:
        """Move its tensors; returns self."""
        ...

    def summary(self) -> dict[str, Any]:
        """The metrics of the fit that a report shows."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write codebook.safetensors and, last, codebook.json with `quantizer`, its name in QUANTIZERS."""
        ...

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote. Raises DigitError on unreadable files, MismatchError where they are of two fits."""
        ...


@dataclass(frozen=True, kw_only=True)
class FitCost:
    """What a fit of a quantizer takes, for `digit plan`."""

    num_points: int
    """Features that take part."""
    num_passes: int
    """How often the features of the images are computed."""
    flops: float
    """Of matrix products."""
    memory_bytes: float
    """Beside the encoder's."""
    description: str
    """A few words for the table."""
    host_seconds: float = 0.0
    """Of one core, beside the products: drawing the sample."""
    streamed: bool = False
    """Whether the features exceed the memory budget, so that every iteration computes them again."""


@runtime_checkable
class QuantizerConfig(Protocol):
    """Settings of a quantizer: a frozen dataclass of its own, a field of the recipe."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def seed(self) -> int:
        """Seed of every random choice of the fit."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number K of codes that the fit gives."""
        ...

    @property
    def num_levels(self) -> int:
        """Codes of one feature."""
        ...

    @property
    def pca(self) -> int:
        """Principal components that it takes in place of the features; 0 takes the features as they are."""
        ...

    @property
    def min_points(self) -> int:
        """Features below which codes stand for too few of them; the subset of images grows to reach it."""
        ...

    def cost(self, num_features: int, dim: int) -> FitCost:
        """What a fit to this many features of D numbers takes."""
        ...
