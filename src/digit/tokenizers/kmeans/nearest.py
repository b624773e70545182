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
SCORE_BYTES = 4 * 2**20  # at K = 4096: 256 rows in float32, 512 in bfloat16
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


def scored_together(table: Tensor) -> int:
    """Rows that are scored before their best is taken: on a CPU as many as its cache holds, on a GPU a whole chunk."""
    if table.is_cuda:
        return GPU_CHUNK_ROWS
    return max(1, min(CPU_CHUNK_ROWS, SCORE_BYTES // (len(table) * table.element_size())))


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


def argmax_rows(scores: Tensor) -> Tensor:
    """(n, K) -> (n,) int64, a column of each row's maximum; of equal ones any, but always the same.

    The maximum of each column over its like in every 64 first, which vectorises, then the row of 64, then the column:
    on CPU a third of the time of `max(1)` in float32 (measured at K = 1024 and 4096).
    """
    if scores.shape[1] % LANES:
        return scores.max(1).indices
    if scores.dtype == torch.bfloat16 and scores.device.type == "cpu":
        return _argmax_of_bits(scores.view(torch.int16))
    lane = in_blocks(scores).amax(1).max(1).indices  # (n,)
    return pick_lane(scores, lane).max(1).indices * LANES + lane


def _argmax_of_bits(bits: Tensor) -> Tensor:
    """`argmax_rows` of bfloat16 numbers from their bits, (n, K) int16.

    The bits of numbers from 0 on are ordered as integers are; those of numbers below 0 are all smaller, in reverse
    order. torch takes the maximum of int16 eight times as fast as that of bfloat16, which it converts to float32.
    """
    blocks = in_blocks(bits)
    lanes = blocks.amax(1)  # (n, 64)
    below = lanes.amax(1, keepdim=True) < 0  # (n, 1), whether the whole row is
    lane = torch.where(below, ~blocks.amin(1), lanes).argmax(1)
    column = pick_lane(bits, lane)  # (n, K / 64)
    return torch.where(below, ~column, column).argmax(1) * LANES + lane


def in_blocks(scores: Tensor) -> Tensor:
    """(n, K) -> (n, K / 64, 64), a view."""
    return scores.view(len(scores), -1, LANES)


def pick_lane(scores: Tensor, lane: Tensor) -> Tensor:
    """(n, K) and (n,) -> (n, K / 64): of every 64 columns the one of that number."""
    columns = torch.arange(0, scores.shape[1], LANES, device=scores.device)
    return scores.gather(1, lane[:, None] + columns)


def two_least(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, K) -> (n,) int64, a column of each row's minimum; the minimum; the value after it (inf for K = 1)."""
    if scores.shape[1] % LANES:
        low, index = scores.min(1)
        return index, low, scores.scatter(1, index[:, None], torch.inf).amin(1)
    lanes = in_blocks(scores).amin(1)  # (n, 64)
    low, lane = lanes.min(1)
    column = pick_lane(scores, lane)  # (n, K / 64)
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
        self.block = scored_together(centroids)

    def __call__(self, x: Tensor) -> Tensor:
        """(n, D) float32 -> (n,) int64. Raises DigitError for NaN or Inf."""
        parts = [two_least(linear(rows, self.table, self.half)) for rows in x.split(self.block)]
        index, low, second = map(torch.cat, zip(*parts, strict=True))
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

    The result of a bfloat16 product is rounded to 8 bits, so the product yields (offset - ||x - c||^2) / 2 as a whole:
    both norms enter as extra columns, split in bfloat16 parts. With `offset` near the usual squared distance the
    largest scores lie near zero, where the rounding is finest; rounding x.c - ||c||^2 / 2 would lose the difference
    between near centroids. Not thread-safe: it reuses its buffers.
    """

    def __init__(self, centroids: Tensor, offset: float = 0.0):
        rounded = centroids.bfloat16()  # (K, D)
        num, self.dim = centroids.shape
        self.offset = offset / 2
        multiple = 8 if centroids.is_cuda else 2  # of the columns, for the processors' product instructions
        width = math.ceil((self.dim + 5) / multiple) * multiple
        self.table = rounded.new_zeros(math.ceil(num / LANES) * LANES, width)
        self.table[:num, : self.dim] = rounded
        self.table[:num, self.dim : self.dim + 3] = -_split(rounded.float().square().sum(1) / 2, 3)
        self.table[num:, self.dim] = torch.finfo(torch.bfloat16).min  # nobody's nearest
        self.table[:, self.dim + 3 : self.dim + 5] = 1
        self.block = scored_together(self.table)
        self.packed = prepacked(self.table)
        self.rows = self.scores = self.table[:0]

    @torch.no_grad()
    def __call__(self, x: Tensor, norms: Tensor | None = None) -> Tensor:
        """(n, D) float32, and their squared norms (n,) where known -> (n,) int64."""
        if len(self.rows) < len(x):  # allocated once: fresh pages for every chunk cost as much as the argmax
            self.rows = self.table.new_zeros(len(x), self.table.shape[1])
            self.rows[:, self.dim : self.dim + 3] = 1
            if not self.packed.is_mkldnn:
                self.scores = self.table.new_empty(min(len(x), self.block), len(self.table))
        rows = self.rows[: len(x)]
        rows[:, : self.dim] = x
        norms = torch.linalg.vector_norm(x, dim=1).square() if norms is None else norms
        # the same for every centroid, so that two parts are enough: only what is near zero depends on it
        rows[:, self.dim + 3 : self.dim + 5] = _split(self.offset - norms / 2, 2)
        return torch.cat([argmax_rows(self._scores(part)) for part in rows.split(self.block)])

    def _scores(self, rows: Tensor) -> Tensor:
        """(n, K) bfloat16, overwritten by the next call."""
        if self.packed.is_mkldnn:
            return linear(rows, self.packed)
        return torch.mm(rows, self.table.T, out=self.scores[: len(rows)])


def _split(values: Tensor, num_parts: int) -> Tensor:
    """(n,) float32 -> (n, parts) bfloat16 whose sum is the value to 8 bits a part."""
    parts = []
    for _ in range(num_parts):
        parts.append(values.bfloat16())
        values = values - parts[-1].float()
    return torch.stack(parts, 1)
