"""Completion (paper, section 4.5 and Figure 4b): how far completed images lie from real ones, by the part kept of them.

A model completes as a callable, features come as a callable, so that anybody's can be measured. The first rows of each
picture are kept; the distance is the Fréchet distance of the completed images' features to a reference.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.frechet import FeatureStats
from digit.metrics.influence import frechet_difference, frechet_interval
from digit.metrics.intervals import Interval
from digit.metrics.judge import Features

KEEPS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)  # Figure 4b: 12.5 % to 75 %


class Complete(Protocol):
    """A model that completes."""

    def __call__(self, images: Tensor, keep: float, first: int) -> Tensor:
        """Keep the first `keep` of the rows of uint8 (B, 3, S, S) and draw the rest; `first` numbers images[0]."""


@torch.no_grad()
def complete_and_judge(
    complete: Complete, images: Tensor, keep: float, features: Features, *, batch_size: int = 256, num_shown: int = 8
) -> dict[str, Tensor]:
    """{"features": (N, D) float32 of every completed image, "shown": the first of them, uint8 (n, 3, S, S)}.

    Images are completed batch_size at a time, so that no more are in memory. Raises DigitError for other shapes.
    """
    judged, shown = [], []
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        done = complete(batch, keep, first)
        if done.shape != batch.shape or done.dtype != torch.uint8:
            got, wanted = (f"{tuple(x.shape)}" for x in (done, batch))
            raise DigitError(f"completion of {wanted} gave {done.dtype} {got}, wanted uint8 {wanted}")
        judged.append(features(done).float().cpu())
        shown.append(done[: max(0, num_shown - first)].cpu())
    if not judged:
        raise DigitError("no images to complete: give at least 2")
    return {"features": torch.cat(judged), "shown": torch.cat(shown)}


def distance_curve(
    features: Mapping[float, Tensor], reference: FeatureStats, *, confidence: float = 0.95
) -> dict[float, Interval]:
    """Kept fraction -> Fréchet distance of features (N, D) to the reference, with its interval over images."""
    return {
        keep: frechet_interval(rows, reference.mean, reference.cov, confidence=confidence)
        for keep, rows in sorted(features.items())
    }


def curve_difference(
    first: Mapping[float, Tensor], second: Mapping[float, Tensor], reference: FeatureStats, *, confidence: float = 0.95
) -> dict[float, Interval]:
    """Distance of `first` less that of `second` at every fraction both have, paired: both complete the same images."""
    shared = sorted(first.keys() & second.keys())
    target = (reference.mean, reference.cov)
    return {keep: frechet_difference(first[keep], second[keep], *target, confidence=confidence) for keep in shared}
