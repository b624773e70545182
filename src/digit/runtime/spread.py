"""A few of many, evenly apart: the pictures and classes that reports show."""

import numpy as np


def spread(total: int, num: int) -> list[int]:
    """At most `num` of 0 .. total - 1, evenly apart, the ends among them."""
    return np.unique(np.linspace(0, total - 1, min(num, total)).astype(int)).tolist() if total else []
