"""K-means in torch, CPU or GPU, over features that need not fit in memory (section 3: "we use K-Means to discretize").

Legend: N points, D features, K clusters, n rows of one chunk.

Each Lloyd iteration is one matrix product per chunk, argmin_k ||x - c_k||^2, then sums per cluster. The points of a
streamed source are kept only where they fit the memory budget; otherwise every iteration streams them again. The
iterations may round distances to bfloat16 (hardware with bfloat16 products runs them several times faster); sums, the
inertia and the last assignment never do. Nothing on the way waits for the device but the end of a pass.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from digit.errors import DigitError, Stopped
from digit.models.products import linear
from digit.runtime import distributed
from digit.runtime.hardware import full_precision, multiplies_bf16
from digit.runtime.progress import Progress
from digit.runtime.signals import StopSignals, saving
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.kmeans.empty import split_as_faiss, split_largest_errors
from digit.tokenizers.kmeans.nearest import ExactNearest, FastNearest, argmax_rows, nearest
from digit.tokenizers.kmeans.points import UNUSABLE, Points, open_points
from digit.tokenizers.kmeans.unfinished import State, UnfinishedFit
from digit.tokenizers.shares import Shares

if TYPE_CHECKING:
    from jaxtyping import Int64

    from digit.tokenizers.kmeans.nearest import FeatureArray
    from digit.tokenizers.kmeans.points import Features

START_CHUNK_ROWS = 4096
BFLOAT16_FROM_FLOP = 1e10  # "auto": below this an iteration takes no time in float32 either
FLUSH_POINTS_PER_CENTROID = 16  # float32 adds so few points a centroid before float64 takes over
Finder = Callable[[Tensor, Tensor], Tensor]  # (n, D) points and (n,) their squared norms -> (n,) int64


class KMeans:
    """Estimator in scikit-learn's manner: `KMeans(KMeansConfig(num_clusters=64)).fit(x).predict(x)`.

    Set by fit: `centroids_` (K, D) float32; `inertia_`, the sum of squared distances of the `num_points_` points used;
    `counts_` (K,) int64 points a code, `usage_` fraction of codes in use, `entropy_` of the code frequencies in bits,
    `dead_codes_` without a point; `history_`, one dict an iteration, the last one of the centroids as returned;
    `streamed_`, whether every iteration streamed the points again.
    """

    def __init__(self, cfg: KMeansConfig):
        self.cfg = cfg

    @torch.no_grad()
    def fit(
        self,
        features: "Features",
        *,
        across_ranks: bool = False,
        unfinished: UnfinishedFit | None = None,
    ) -> Self:
        """Cluster `features`: an array (N, D), or a callable whose every call iterates the same Tensors (n, D).

        across_ranks: every rank of the job calls this, each with its own share of the points. All get the fit of all
        points, from the start that one process with all shares would choose. Ranks that stream say
        which points they have: each item is a Tensor and its points' numbers (n,) int64 among those of all ranks.
        unfinished: keeps the state on the disk, and holds that of a fit which was cut short: this one goes on there.
        Raises DigitError for fewer points than clusters, NaN or Inf, or a budget too small to hold the centroids;
        Stopped where a signal asked for it and the state is saved.
        """
        signals = StopSignals() if unfinished else nullcontext()
        with distributed.alone(not across_ranks), signals as signals:
            self._shares = Shares(signals)
            self._fit(open_points(features, self.cfg, self._shares), unfinished)
        return self

    def _fit(self, points: Points, unfinished: UnfinishedFit | None) -> None:
        cfg = self.cfg
        if cfg.num_clusters > points.num_rows:
            raise DigitError(
                f"k-means wants {cfg.num_clusters} clusters but got {points.num_rows} points: give more images or a "
                "smaller kmeans.num_clusters"
            )
        state = self._start(points, unfinished)
        self.history_ = state.history
        self.streamed_ = points.streamed
        total = (cfg.num_iterations + 1 - len(state.history)) * points.num_here
        with full_precision(state.shift.device), Progress(f"k-means K={cfg.num_clusters}", total) as bar:
            try:
                while not state.settled and len(state.history) < cfg.num_iterations:
                    self._iterate(points, state, bar)
                    if unfinished and distributed.is_main():
                        unfinished.keep(state)
                self._close(points, state, bar)
            except Stopped:  # in the middle of a pass, which leaves the state as it was before
                if unfinished and distributed.is_main():
                    with saving():
                        unfinished.save(state)
                raise Stopped(
                    f"k-means: {len(state.history)} of at most {cfg.num_iterations} iterations are done"
                ) from None

    def predict(self, features: "FeatureArray") -> 'Int64[Tensor, "..."]':
        """Nearest centroid of each feature of a tensor or array (..., D).

        Raises DigitError before fit, MismatchError for another D.
        """
        if not hasattr(self, "centroids_"):
            raise DigitError("this KMeans is not fitted: call fit(features) before predict")
        return nearest(features, self.centroids_)

    def _start(self, points: Points, unfinished: UnfinishedFit | None) -> State:
        """Where the fit was cut short, or its beginning."""
        sample = points.take_start()  # (s, D)
        if unfinished:
            request = asdict(self.cfg) | {"device": None, "points": points.num_rows, "dim": sample.shape[1]}
            if found := unfinished.load({"kmeans": request}):
                return replace(found, centroids=found.centroids.to(sample), shift=found.shift.to(sample))
        shift = sample.mean(0, dtype=torch.float64).float()  # (D,); centred features round less in bfloat16
        centroids = _start_centroids(sample.sub_(shift), self.cfg)  # (K, D)
        return State(centroids, shift, np.random.default_rng([self.cfg.seed, 2]))

    def _iterate(self, points: Points, state: State, bar: Progress) -> None:
        """One of Lloyd's iterations."""
        cfg, began, centroids, history = self.cfg, time.perf_counter(), state.centroids, state.history
        previous, distance = math.inf, 0.0
        if history:
            previous, distance = history[-1]["inertia"], history[-1]["inertia"] / history[-1]["points"]
        find = _finder(centroids, cfg, points, distance)
        sums = _accumulate(points, find, centroids, state.shift, self._shares, bar)
        state.centroids = sums.means(centroids)
        if cfg.empty_clusters == "faiss":
            reseeded = split_as_faiss(state.centroids, state.shift, sums.counts, state.rng)
        else:
            reseeded = split_largest_errors(state.centroids, sums.table, sums.counts, state.rng)
        settled = cfg.tolerance > 0 and bool(history) and previous - sums.inertia <= cfg.tolerance * previous
        state.settled = bool((sums.counts > 0).all()) and (sums.inertia == 0 or settled)
        self._log(len(history), sums, reseeded, time.perf_counter() - began)

    def _close(self, points: Points, state: State, bar: Progress) -> None:
        """One pass in float32 over the centroids as they are returned."""
        began = time.perf_counter()
        self.centroids_ = (state.centroids.double() + state.shift.double()).float()
        sums = _count(points, self.centroids_ - state.shift, state.shift, self._shares, bar)
        self._log(len(self.history_), sums, 0, time.perf_counter() - began)
        self.inertia_, self.num_points_, self.counts_ = sums.inertia, sums.num_points, sums.counts.cpu()
        self.usage_, self.entropy_ = sums.usage, sums.entropy
        self.dead_codes_ = int((self.counts_ == 0).sum())

    def _log(self, iteration: int, sums: "_Counts", reseeded: int, seconds: float) -> None:
        entry = {"iteration": iteration, "inertia": sums.inertia, "points": sums.num_points, "usage": sums.usage}
        self.history_.append(entry | {"entropy": sums.entropy, "reseeded": reseeded, "seconds": round(seconds, 4)})


def _finder(centroids: Tensor, cfg: KMeansConfig, points: Points, offset: float) -> Finder:
    """The assignment of an iteration; `offset` is the mean squared distance of the one before."""
    heavy = 2.0 * points.num_rows * centroids.numel() > BFLOAT16_FROM_FLOP
    if cfg.precision == "bf16" or (cfg.precision == "auto" and heavy and multiplies_bf16(centroids.device)):
        return FastNearest(centroids, offset)
    half = centroids.square().sum(1) / -2
    return lambda x, _: argmax_rows(linear(x, centroids, half))


class _Counts:
    """How many points each cluster has, and the sum of their squared distances."""

    def __init__(self, counts: Tensor, inertia: float):
        self.counts, self.inertia = counts, inertia  # (K,) int64

    @property
    def num_points(self) -> int:
        return int(self.counts.sum())

    @property
    def usage(self) -> float:
        return float((self.counts > 0).double().mean())

    @property
    def entropy(self) -> float:
        """-sum p log2 p of the code frequencies, in bits; log2 K at most."""
        return abs(float(torch.special.entr(self.counts / self.counts.sum()).sum() / math.log(2)))


class _Sums(_Counts):
    """What one pass over the (centred) points leaves: enough for the means, the inertia and each cluster's error.

    One row a cluster, (K, D + 2) float64: the sum of its points, of their ||x||^2, and their number. float32 adds up a
    few points a cluster and float64 those sums, so that the number of points costs no precision.
    """

    def __init__(self, num: int, dim: int, device: torch.device):
        self.table = torch.zeros(num, dim + 2, dtype=torch.float64, device=device)
        self.total, self.squares = self.table[:, :dim], self.table[:, dim]  # (K, D), (K,)
        self._recent = torch.zeros_like(self.table, dtype=torch.float32)
        self._num_recent = 0

    def add(self, rows: Tensor, index: Tensor) -> None:
        """(n, D + 2) points, squared norms, ones; (n,) their clusters."""
        if self._num_recent + len(rows) > FLUSH_POINTS_PER_CENTROID * len(self.table):
            self._flush()
        if rows.is_cuda:  # sorts first, so it is deterministic; index_add_ there adds in any order
            self._recent.index_put_((index,), rows, accumulate=True)
        else:
            self._recent.index_add_(0, index, rows)
        self._num_recent += len(rows)

    def _flush(self) -> None:
        self.table += self._recent
        self._recent.zero_()
        self._num_recent = 0

    def close(self, centroids: Tensor, shares: Shares) -> None:
        """Add up over the ranks, once all points are in. Raises DigitError for NaN or Inf."""
        self._flush()
        del self._recent
        shares.add_up(self.table)
        self.counts = self.table[:, -1].long()
        # sum_i ||x_i - c_i||^2 = sum ||x||^2 - 2 sum_k s_k.c_k + sum_k n_k ||c_k||^2
        c64 = centroids.double()
        terms = self.squares - 2 * (self.total * c64).sum(1) + self.counts * c64.square().sum(1)
        self.inertia = float(terms.sum().clamp(min=0))
        if not math.isfinite(self.inertia):
            raise DigitError(UNUSABLE)

    def means(self, fallback: Tensor) -> Tensor:
        """(K, D) float32 means; an empty cluster keeps its old centroid."""
        means = (self.total / self.counts.clamp(min=1)[:, None]).float()
        return torch.where(self.counts[:, None] > 0, means, fallback)


def _accumulate(points: Points, find: Finder, centroids: Tensor, shift: Tensor, shares: Shares, bar: Progress) -> _Sums:
    """Assign every point and sum up."""
    num, dim = centroids.shape
    sums = _Sums(num, dim, centroids.device)
    buffer = shift.new_empty(0, dim + 2)
    for chunk in points.chunks():
        if len(chunk) > len(buffer):  # allocated once; the last column stays 1
            buffer = shift.new_ones(len(chunk), dim + 2)
        rows = buffer[: len(chunk)]  # (n, D + 2)
        x = torch.sub(chunk, shift, out=rows[:, :dim])
        rows[:, dim] = torch.linalg.vector_norm(x, dim=1).square()
        sums.add(rows, find(x, rows[:, dim]))
        bar.update(len(chunk))
        if shares.asked_to_stop:
            break
    shares.agree_to_go_on()
    sums.close(centroids, shares)
    bar.update(0, mean_distance=sums.inertia / max(1, sums.num_points), usage=sums.usage)
    return sums


def _count(points: Points, centroids: Tensor, shift: Tensor, shares: Shares, bar: Progress) -> _Counts:
    """Assign every point exactly and add up each squared distance, which no cancellation can spoil."""
    find, last = ExactNearest(centroids), len(centroids)
    table = torch.zeros(last + 1, dtype=torch.float64, device=shift.device)  # points a cluster, then the inertia
    for chunk in points.chunks():
        x = chunk - shift  # (n, D)
        index = find(x)
        table.index_add_(0, index, table.new_ones(len(index)))  # bincount would make the host wait for a GPU
        table[last] += x.sub_(centroids[index]).square_().sum(dtype=torch.float64)
        bar.update(len(chunk))
        if shares.asked_to_stop:
            break
    shares.agree_to_go_on()
    *_, inertia = shares.add_up(table).tolist()
    return _Counts(table[:last].long(), inertia)


def _start_centroids(sample: Tensor, cfg: KMeansConfig) -> Tensor:
    """(s, D) points in random order -> (K, D) first centroids."""
    if cfg.init == "random":
        return sample[: cfg.num_clusters].clone()
    return _start_far_apart(sample, cfg.num_clusters, np.random.default_rng([cfg.seed, 1]))


def _start_far_apart(sample: Tensor, num: int, rng: np.random.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007), choosing max(1, chosen / 16) points at a time.

    One at a time takes K passes over the sample, which K = 16000 cannot afford; growing batches take about
    16 ln(K / 16) + 16 passes and as many distances in all. Up to K = 31 this is k-means++ itself.
    """
    squares = sample.square().sum(1)  # (s,)
    distance = torch.full_like(squares, torch.inf)
    chosen = torch.zeros(1, dtype=torch.int64, device=sample.device)  # the sample's order is random: its first point
    taken = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
    new = chosen
    while True:
        taken[new] = True
        for begin in range(0, len(sample), START_CHUNK_ROWS):
            part = slice(begin, begin + START_CHUNK_ROWS)
            scores = torch.addmm(squares[new], sample[part], sample[new].T, alpha=-2).amin(1) + squares[part]
            distance[part] = torch.minimum(distance[part], scores.clamp(min=0))
        if len(chosen) == num:
            return sample[chosen].clone()
        batch = min(max(1, len(chosen) // 16), num - len(chosen))
        # the smallest of Exp(1) / weight: a weighted draw without replacement; rows at distance 0 come last, at random
        keys = torch.from_numpy(rng.exponential(size=len(sample))).to(distance.device)
        weights = distance.double().clamp(min=1e-30)
        new = (keys / weights).masked_fill(taken, torch.inf).topk(batch, largest=False).indices
        chosen = torch.cat([chosen, new])
