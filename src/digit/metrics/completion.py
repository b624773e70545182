"""Completion (paper, section 4.5 and Figure 4b): Fréchet distance of completed images to real ones, by kept fraction.

The first rows of each image are kept and a model samples the rest. The model and the feature network are callables, so
any implementation can be evaluated.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Real, UInt8
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.frechet import FeatureStats
from digit.metrics.influence import frechet_difference, frechet_interval
from digit.metrics.intervals import Interval
from digit.metrics.judge import Features

KEEPS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)  # Figure 4b: 12.5 % to 75 %


@runtime_checkable
class Complete(Protocol):
    """A model that completes images."""

    def __call__(self, images: UInt8[Tensor, "B 3 S S"], keep: float, first: int) -> UInt8[Tensor, "B 3 S S"]:
        """Keep the fraction `keep` of the rows of uint8 (B, 3, S, S), sample the rest; `first`: index of images[0]."""
        ...


@torch.no_grad()
def complete_and_judge(
    complete: Complete,
    images: UInt8[Tensor, "N 3 S S"],
    keep: float,
    features: Features,
    *,
    batch_size: int = 256,
    num_shown: int = 8,
) -> dict[str, Tensor]:
    """Complete images in batches: {"features": (N, D) float32 of all results, "shown": the first, uint8 (n, 3, S, S)}.

    At most batch_size images are in memory at a time. Raises DigitError where a completion has another shape.
    """
    parts, shown = [], []
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        completed = complete(batch, keep, first)
        if completed.shape != batch.shape or completed.dtype != torch.uint8:
            got, wanted = tuple(completed.shape), tuple(batch.shape)
            raise DigitError(f"completion of {wanted} gave {completed.dtype} {got}, wanted uint8 {wanted}")
        parts.append(features(completed).float().cpu())
        shown.append(completed[: max(0, num_shown - first)].cpu())
    if not parts:
        raise DigitError("no images to complete: give at least 2")
    return {"features": torch.cat(parts), "shown": torch.cat(shown)}


def distance_curve(
    features: Mapping[float, Real[Tensor, "_ D"]], reference: FeatureStats, *, confidence: float = 0.95
) -> dict[float, Interval]:
    """d(keep) = ||m - m_r||² + Tr(S + S_r - 2 (S S_r)^(1/2)), with an interval over images, for each kept fraction.

    m (D,) and S (D, D) are the mean and covariance of the features (N, D) at one fraction, m_r and S_r the reference's.
    """
    return {
        keep: frechet_interval(completed, reference.mean, reference.cov, confidence=confidence)
        for keep, completed in sorted(features.items())
    }


def curve_difference(
    first: Mapping[float, Real[Tensor, "_ D"]],
    second: Mapping[float, Real[Tensor, "_ D"]],
    reference: FeatureStats,
    *,
    confidence: float = 0.95,
) -> dict[float, Interval]:
    """d_first(keep) - d_second(keep) at every fraction that both have; paired, since both complete the same images."""
    shared = sorted(first.keys() & second.keys())
    gaussian = (reference.mean, reference.cov)
    return {keep: frechet_difference(first[keep], second[keep], *gaussian, confidence=confidence) for keep in shared}
