"""Positions by sines and cosines: tables for grids of patches or tokens, and rotary positions.

Rotary positions (Su et al. 2021, "RoFormer", section 3.2; in two dimensions as LlamaGen, Sun et al. 2024) turn pairs of
channels of queries and keys by angles that grow with the place of their token, so that their products depend on how far
apart two tokens are:

    (x_i, x_{i + d/2}) -> (x_i cos a_i - x_{i + d/2} sin a_i, x_{i + d/2} cos a_i + x_i sin a_i),   i = 0 .. d/2 - 1
    a = place f on a line, (row f, column f) on a grid;   f_j = 10000^(-j / n),   j = 0 .. n - 1,   n = d/2 or d/4

Shapes: T positions, A axes (1 on a line, 2 on a grid), B sequences, H heads, d width of a head.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Real
from torch import Tensor

ROTARY_BASE = 10_000.0
Places = Callable[[int, torch.device], Tensor]
"""(number of positions, device) to the places of the first so many positions, (T, A) float."""


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


def line_places(length: int, device: torch.device) -> Float[Tensor, "T 1"]:
    """Places 0, 1, 2, ... on a line."""
    return torch.arange(length, dtype=torch.float32, device=device)[:, None]


def grid_places(
    grid: tuple[int, int], unit: tuple[int, int], length: int, device: torch.device
) -> Float[Tensor, "T 2"]:
    """Row and column of the middles of a grid's first cells, in raster order, in cells of the grid `unit`.

    Both grids cover the same picture: the middle of a cell of `unit` lies at whole numbers.
    """
    axes = [
        (torch.arange(cells, dtype=torch.float32, device=device) + 0.5) * (units / cells) - 0.5
        for cells, units in zip(grid, unit, strict=True)
    ]
    return torch.cartesian_prod(*axes)[:length]


def rotary_table(places: Float[Tensor, "T A"], head_dim: int) -> Float[Tensor, "T 2 C"]:
    """Cosines and sines of the angles a at each place, (T, 2, d/2); d/2 is divisible by A."""
    num = head_dim // 2 // places.shape[1]  # frequencies of each axis
    steps = torch.arange(num, dtype=torch.float32, device=places.device)
    angles = (places[:, :, None] * ROTARY_BASE ** (-steps / num)).flatten(1)  # (T, d/2)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rotate(x: Float[Tensor, "B H T C"], table: Float[Tensor, "*B T 2 D"]) -> Float[Tensor, "B H T C"]:
    """Queries or keys (B, H, T, d), turned by a table (T, 2, d/2), or by one of each sequence, (B, T, 2, d/2).

    Computes in the table's float32, and returns x's type.
    """
    cos, sin = (part if table.ndim == 3 else part[:, None] for part in table.unbind(-2))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
