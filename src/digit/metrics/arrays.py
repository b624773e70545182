"""Conversion of metrics' inputs."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

Values = np.ndarray | Tensor | Sequence[float]


def as_float64(values: Values) -> np.ndarray:
    """Convert an array, a tensor on any device or a sequence of numbers to a float64 array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
