"""Nearest centroid by one matrix product: exactly (tokens), or fast in bfloat16 (k-means iterations).

Legend: n rows of one chunk, D features, K centroids.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from digit.errors import DigitError, MismatchError
from digit.models.products import linear, prepacked
from digit.runtime.hardware import full_precision
from digit.runtime.scalars import shown

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

CPU_CHUNK_ROWS = 1024  # at K = 8192, 256 rows cost a third of the product's speed and 4096 win none
GPU_CHUNK_ROWS = 8192
SLACK = 2.0**-20  # 16 units of float32's rounding
FeatureArray = Tensor | np.ndarray | Sequence[Any]  # (..., D) real numbers; a sequence is nested lists
LANES = 64  # neighbouring columns whose minima are taken together


def as_features(features: FeatureArray) -> Tensor:
    """Features as callers give them, a tensor, an array or nested lists of real numbers, as a tensor of their type.

    Raises DigitError for anything else.
    """
    if not isinstance(features, Tensor):
        try:
            features = torch.from_numpy(np.array(features))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DigitError(f"features are {shown(features)}: give numbers of shape (N, D)") from error
    if features.dtype == torch.bool or features.is_complex():
        kind = str(features.dtype).removeprefix("torch.")
        raise DigitError(f"features are {kind}: give real numbers of shape (N, D)")
    return features


def chunk_rows(device: torch.device) -> int:
    """Rows of one product: enough to run it at full speed, few enough that its (rows, K) scores stay small."""
    return GPU_CHUNK_ROWS if device.type == "cuda" else CPU_CHUNK_ROWS


@torch.no_grad()
def nearest(features: "FeatureArray", centroids: 'Float[Tensor, "codes dim"]') -> 'Int64[Tensor, "..."]':
    """argmin_k ||x - c_k||^2, int64, shape of the features without their last axis, on the features' device.

    Near ties are decided in float64, so that the answer depends neither on the batch's size nor on the device.
    Raises MismatchError where D differs, DigitError for NaN or Inf.
    """
    features = as_features(features)
    dim = features.shape[-1] if features.ndim else 0
    if dim != centroids.shape[1]:
        raise MismatchError(
            f"the centroids have {centroids.shape[1]} features, the input has {dim}: "
            "use the encoder and the layer that the codebook was fitted on, or refit (digit codebook ...)"
        )
    flat = features.reshape(-1, features.shape[-1]).float()
    centroids = centroids.to(features.device, torch.float32)
    index = torch.zeros(len(flat), dtype=torch.int64, device=features.device)
    rows = chunk_rows(flat.device)
    with full_precision(flat.device):
        find = ExactNearest(centroids)
        for start in range(0, len(flat), rows):
            index[start : start + rows] = find(flat[start : start + rows])
    return index.reshape(features.shape[:-1])


def argmin_rows(scores: Tensor) -> Tensor:
    """(n, K) -> (n,) int64, a column of each row's minimum; of equal ones any, but always the same.

    The minimum of each column over its like in every 64 first, which vectorises, then the row of 64, then the column:
    on CPU half the time of `min(1)` in bfloat16 and a third in float32 (measured at K = 1024 and 4096).
    """
    if scores.shape[1] % LANES:
        return scores.min(1).indices
    blocks = in_blocks(scores)
    lane = blocks.amin(1).min(1).indices  # (n,)
    return pick_lane(blocks, lane).min(1).indices * LANES + lane


def in_blocks(scores: Tensor) -> Tensor:
    """(n, K) -> (n, K / 64, 64), a view."""
    return scores.view(len(scores), -1, LANES)


def pick_lane(blocks: Tensor, lane: Tensor) -> Tensor:
    """(n, K / 64, 64) and (n,) -> (n, K / 64)."""
    return blocks.gather(2, lane[:, None, None].expand(-1, blocks.shape[1], 1))[:, :, 0]


def two_least(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, K) -> (n,) int64 as `argmin_rows`, the least value of each row, and the one after it (inf for K = 1)."""
    if scores.shape[1] % LANES:
        low, index = scores.min(1)
        return index, low, scores.scatter(1, index[:, None], torch.inf).amin(1)
    blocks = in_blocks(scores)
    lanes = blocks.amin(1)  # (n, 64)
    low, lane = lanes.min(1)
    column = pick_lane(blocks, lane)  # (n, K / 64)
    block = column.min(1).indices
    others = lanes.scatter_(1, lane[:, None], torch.inf).amin(1)
    second = torch.minimum(others, column.scatter_(1, block[:, None], torch.inf).amin(1))
    return block * LANES + lane, low, second


class ExactNearest:
    """The argmin in float32, near ties decided in float64; call it within `full_precision`."""

    def __init__(self, centroids: Tensor):
        self.centroids, self.table = centroids, prepacked(-centroids)  # (K, D)
        self.half = centroids.square().sum(1) / 2  # (K,)
        self.longest = (2 * self.half.max()).sqrt()

    def __call__(self, x: Tensor) -> Tensor:
        """(n, D) float32 -> (n,) int64. Raises DigitError for NaN or Inf."""
        scores = linear(x, self.table, self.half)  # (n, K), ||c||^2 / 2 - x.c
        index, low, second = two_least(scores)
        if not torch.isfinite(low).all():
            raise DigitError("features hold NaN or Inf: check the encoder's weights and its precision")
        slack = SLACK * self.longest * (x.norm(dim=1) + self.longest)  # relative to the largest terms of a score
        close = (second - low <= slack).nonzero()[:, 0]
        if len(close):
            index[close] = self._in_float64(x[close])
        return index

    def _in_float64(self, x: Tensor) -> Tensor:
        """The same in float64; of centroids that are equal to its rounding, the first."""
        table = self.centroids.double()
        half = table.square().sum(1) / 2
        longest, parts = (2 * half.max()).sqrt(), []
        for rows in x.double().split(256):
            scores = torch.addmm(half, rows, table.T, alpha=-1)  # (n, K)
            slack = 2.0**-49 * longest * (rows.norm(dim=1) + longest)
            parts.append((scores <= (scores.amin(1) + slack)[:, None]).byte().argmax(1))
        return torch.cat(parts)


class FastNearest:
    """The same argmin from one bfloat16 product with float32 accumulation, for k-means iterations.

    The result of a bfloat16 product is rounded to 8 bits, so the product yields (||x - c||^2 - offset) / 2 as a whole:
    both norms enter as extra columns, split in bfloat16 parts. With `offset` near the usual squared distance the
    smallest scores lie near zero, where the rounding is finest; rounding ||c||^2 / 2 - x.c would lose the difference
    between near centroids. Not thread-safe: it reuses its buffers.
    """

    def __init__(self, centroids: Tensor, offset: float = 0.0):
        rounded = centroids.bfloat16()  # (K, D)
        num, self.dim = centroids.shape
        self.offset = offset / 2
        width = math.ceil((self.dim + 5) / 8) * 8
        self.table = rounded.new_zeros(math.ceil(num / LANES) * LANES, width)
        self.table[:num, : self.dim] = -rounded
        self.table[:num, self.dim : self.dim + 3] = _split(rounded.float().square().sum(1) / 2, 3)
        self.table[num:, self.dim] = torch.finfo(torch.bfloat16).max  # nobody's nearest
        self.table[:, self.dim + 3 : self.dim + 5] = 1
        self.packed = prepacked(self.table)
        self.rows = self.scores = self.table[:0]

    @torch.no_grad()
    def __call__(self, x: Tensor, norms: Tensor | None = None) -> Tensor:
        """(n, D) float32, and their squared norms (n,) where known -> (n,) int64."""
        if len(self.rows) < len(x):  # allocated once: fresh pages for every chunk cost as much as the argmin
            self.rows = self.table.new_zeros(len(x), self.table.shape[1])
            self.rows[:, self.dim : self.dim + 3] = 1
            if not self.packed.is_mkldnn:
                self.scores = self.table.new_empty(len(x), len(self.table))
        rows = self.rows[: len(x)]
        rows[:, : self.dim] = x
        norms = torch.linalg.vector_norm(x, dim=1).square() if norms is None else norms
        # the same for every centroid, so that two parts are enough: only what is near zero depends on it
        rows[:, self.dim + 3 : self.dim + 5] = _split(norms / 2 - self.offset, 2)
        if self.packed.is_mkldnn:
            return argmin_rows(linear(rows, self.packed))
        return argmin_rows(torch.mm(rows, self.table.T, out=self.scores[: len(x)]))  # of (n, K)


def _split(values: Tensor, num_parts: int) -> Tensor:
    """(n,) float32 -> (n, parts) bfloat16 whose sum is the value to 8 bits a part."""
    parts = []
    for _ in range(num_parts):
        parts.append(values.bfloat16())
        values = values - parts[-1].float()
    return torch.stack(parts, 1)
