"""Nearest centroid by one matrix product: exactly (tokens), or fast in bfloat16 (k-means iterations).

Legend: n rows of one chunk, D features, K centroids.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from digit.errors import DigitError, MismatchError

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

CPU_CHUNK_ROWS = 1024  # at K = 8192, 256 rows cost a third of the product's speed and 4096 win none
GPU_CHUNK_ROWS = 8192
SLACK = 2.0**-20  # 16 units of float32's rounding


def chunk_rows(device: torch.device) -> int:
    """Rows of one product: enough to run it at full speed, few enough that its (rows, K) scores stay small."""
    return GPU_CHUNK_ROWS if device.type == "cuda" else CPU_CHUNK_ROWS


@torch.no_grad()
def nearest(features: 'Float[Tensor, "... dim"]', centroids: 'Float[Tensor, "codes dim"]') -> 'Int64[Tensor, "..."]':
    """argmin_k ||x - c_k||^2, int64, shape of the features without their last axis, on the features' device.

    Near ties are decided in float64, so that the answer depends neither on the batch's size nor on the device.
    Raises MismatchError where D differs, DigitError for NaN or Inf.
    """
    if features.shape[-1] != centroids.shape[1]:
        raise MismatchError(
            f"the centroids have {centroids.shape[1]} features, the input has {features.shape[-1]}: "
            "use the encoder and the layer that the codebook was fitted on, or refit (digit codebook ...)"
        )
    flat = features.reshape(-1, features.shape[-1]).float()
    centroids = centroids.to(features.device, torch.float32)
    index = torch.zeros(len(flat), dtype=torch.int64, device=features.device)
    rows = chunk_rows(flat.device)
    with full_precision(flat.device):
        for start in range(0, len(flat), rows):
            index[start : start + rows] = nearest_chunk(flat[start : start + rows], centroids)
    return index.reshape(features.shape[:-1])


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 products at full precision, whatever autocast or the process's matmul precision says."""
    before = None
    try:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # set by backend through the newer interface; torch refuses to mix the two
        before = None
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)


def nearest_chunk(x: Tensor, centroids: Tensor) -> Tensor:
    """(n, D), (K, D) float32 -> (n,) int64."""
    half = centroids.square().sum(1) / 2  # (K,)
    scores = torch.addmm(half, x, centroids.T, alpha=-1)  # (n, K), ||c||^2 / 2 - x.c
    low, index = scores.min(1)
    if not torch.isfinite(low).all():
        raise DigitError("features hold NaN or Inf: check the encoder's weights and its precision")
    if len(centroids) > 1:
        scores.scatter_(1, index[:, None], torch.inf)
        longest = (2 * half.max()).sqrt()
        slack = SLACK * longest * (x.norm(dim=1) + longest)  # relative to the largest terms of a score
        close = (scores.amin(1) - low <= slack).nonzero()[:, 0]
        if len(close):
            index[close] = _nearest_float64(x[close], centroids)
    return index


def _nearest_float64(x: Tensor, centroids: Tensor) -> Tensor:
    """The same in float64; of centroids that are equal to its rounding, the first."""
    table = centroids.double()
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
    both norms enter as extra columns, each split in three bfloat16 parts. With `offset` near the usual squared distance
    the smallest scores lie near zero, where the rounding is finest; rounding ||c||^2 / 2 - x.c would lose the
    difference between near centroids. Not thread-safe: it reuses its buffers.
    """

    def __init__(self, centroids: Tensor, offset: float = 0.0):
        rounded = centroids.bfloat16()  # (K, D)
        self.offset, self.dim = offset / 2, centroids.shape[1]
        width = math.ceil((self.dim + 6) / 32) * 32  # full tiles of the matrix units
        self.table = rounded.new_zeros(len(rounded), width)
        self.table[:, : self.dim] = -rounded
        self.table[:, self.dim : self.dim + 3] = _split3(rounded.float().square().sum(1) / 2)
        self.table[:, self.dim + 3 : self.dim + 6] = 1
        self.rows = self.scores = self.table[:0]

    def __call__(self, x: Tensor) -> Tensor:
        """(n, D) float32 -> (n,) int64."""
        if len(self.rows) < len(x):  # allocated once: fresh pages for every chunk cost as much as the argmin
            self.rows = self.table.new_zeros(len(x), self.table.shape[1])
            self.rows[:, self.dim : self.dim + 3] = 1
            self.scores = self.table.new_empty(len(x), len(self.table))
        rows, scores = self.rows[: len(x)], self.scores[: len(x)]
        rows[:, : self.dim] = x
        norms = rows[:, : self.dim].float().square().sum(1) / 2
        rows[:, self.dim + 3 : self.dim + 6] = _split3(norms - self.offset)
        torch.mm(rows, self.table.T, out=scores)  # (n, K)
        return scores.min(1).indices


def _split3(values: Tensor) -> Tensor:
    """(n,) float32 -> (n, 3) bfloat16 whose sum is the value to 24 bits."""
    parts = []
    for _ in range(3):
        parts.append(values.bfloat16())
        values = values - parts[-1].float()
    return torch.stack(parts, 1)
