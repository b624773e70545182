"""Conversion of metrics' inputs."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64, Real
from torch import Tensor

from digit.errors import DigitError, MismatchError

Values = np.ndarray | Tensor | Sequence[float]
Features = Real[np.ndarray, "N D"] | Real[Tensor, "N D"]
Mean = Real[np.ndarray, " D"] | Real[Tensor, " D"]
Covariance = Real[np.ndarray, "D D"] | Real[Tensor, "D D"]


def as_float64(values: Values) -> Float64[np.ndarray, "..."]:
    """Convert an array, a tensor on any device or a sequence of numbers to a float64 array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def checked_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of features (N, D) and (M, D) on the CPU. Raises as `checked_rows`, and for different D."""
    first, second = checked_rows(first, "features"), checked_rows(second, "features")
    if first.shape[1] != second.shape[1]:
        raise MismatchError(f"features have {first.shape[1]} and {second.shape[1]} dimensions: use one network")
    return first, second


def checked_rows(values: Tensor, what: str) -> Tensor:
    """Values (N, D) of at least one image on the CPU. Raises DigitError for other shapes, NaN and infinity."""
    values = torch.as_tensor(values).detach().cpu()
    if values.ndim != 2 or not values.numel():
        raise DigitError(f"{what} have shape {tuple(values.shape)}, wanted (images, values) of at least one image")
    if not torch.isfinite(values).all():
        raise DigitError(f"{what} hold NaN or infinity: check the images and the network's weights")
    return values
