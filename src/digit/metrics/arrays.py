"""Conversion of metrics' inputs."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Real
from torch import Tensor

Values = np.ndarray | Tensor | Sequence[float]
Features = Real[np.ndarray, "N D"] | Real[Tensor, "N D"]
Mean = Real[np.ndarray, " D"] | Real[Tensor, " D"]
Covariance = Real[np.ndarray, "D D"] | Real[Tensor, "D D"]


def as_float64(values: Values) -> Float64[np.ndarray, "..."]:
    """Convert an array, a tensor on any device or a sequence of numbers to a float64 array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
