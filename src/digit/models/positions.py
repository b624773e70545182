"""Sine and cosine position tables for grids of patches or tokens."""

import torch
from jaxtyping import Float, Real
from torch import Tensor


def sincos_2d(
    rows: Real[Tensor, " R"], columns: Real[Tensor, " C"], frequencies: Float[Tensor, " F"]
) -> Float[Tensor, "R*C 4 F"]:
    """sin(r f), cos(r f), sin(c f), cos(c f) of each cell's row position r and column position c, in raster order.

    The caller chooses positions, frequencies f (radians per unit of position) and the layout of the four parts
    (Vaswani et al. 2017, section 3.5, in two dimensions).
    """
    row, column = torch.cartesian_prod(rows, columns).unbind(1)  # (R * C,) each
    row, column = row[:, None] * frequencies, column[:, None] * frequencies  # (R * C, F)
    return torch.stack([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
