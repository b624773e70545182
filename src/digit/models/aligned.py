"""A prefix that is added to the target's positions instead of standing before them (ControlAR, Li et al. 2024).

A bidirectional encoder reads all prefix tokens, so that every target token is predicted with a view of the whole
prefix, as the paper's renderer has it. Its output is resampled to the target's grid and added, through a matrix for
each block, where the token of that place is predicted. The sequence of the model is shorter by the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.positions import grid_places
from digit.models.transformer import Transformer, TransformerConfig


def check_grid(name: str, length: int, rows: int) -> None:
    """Raise DigitError where `length` tokens do not fill a grid of `rows` rows."""
    if rows < 1 or length % rows:
        raise DigitError(f"{name}_rows is {rows} for {length} {name} tokens: give the number of rows of their grid")


class AlignedPrefix(nn.Module):
    """Encoder of a prefix, and a matrix for each block that its output is added to.

    Args:
        cfg: size of the encoder; its width is that of the model.
        grid: rows and columns of the prefix's tokens.
        target_grid: rows and columns of the target's tokens.
        blocks: numbers of the model's blocks whose inputs it is added to.
    """

    def __init__(
        self, cfg: TransformerConfig, *, grid: tuple[int, int], target_grid: tuple[int, int], blocks: Sequence[int]
    ) -> None:
        super().__init__()
        self.grid, self.target_grid, self.blocks = grid, target_grid, tuple(blocks)
        self.transformer = Transformer(cfg, partial(grid_places, grid, target_grid) if cfg.rotary == "2d" else None)
        self.projections = nn.ModuleList(nn.Linear(cfg.embed_dim, cfg.embed_dim, bias=False) for _ in blocks)

    def forward(self, prefix: Float[Tensor, "B P D"]) -> dict[int, Float[Tensor, "B M D"]]:
        """Embedded prefix tokens with positions to what is added at the place of each target token, by block."""
        encoded = self.transformer(prefix, causal=False)  # (B, P, D)
        if self.grid != self.target_grid:
            maps = encoded.transpose(1, 2).unflatten(2, self.grid)  # (B, D, rows, columns)
            maps = F.interpolate(maps, self.target_grid, mode="bilinear", align_corners=False)
            encoded = maps.flatten(2).transpose(1, 2)  # (B, M, D)
        return {block: project(encoded) for block, project in zip(self.blocks, self.projections, strict=True)}
