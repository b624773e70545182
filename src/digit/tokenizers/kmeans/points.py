"""The points of a k-means fit: a tensor, a random sample in memory, or streamed again in every iteration.

Legend: N points, D features, K clusters, n rows of one chunk, s rows of a sample.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from digit.errors import DigitError
from digit.runtime import distributed
from digit.runtime.progress import Progress
from digit.tokenizers.kmeans.nearest import as_features, chunk_rows
from digit.tokenizers.kmeans.reservoir import Reservoir
from digit.tokenizers.shares import Shares

if TYPE_CHECKING:
    from jaxtyping import Float

    from digit.tokenizers.kmeans.config import KMeansConfig
    from digit.tokenizers.kmeans.nearest import FeatureArray

    Part = Float[Tensor, "n dim"] | tuple[Float[Tensor, "n dim"], np.ndarray]
    Features = FeatureArray | Callable[[], Iterable[Part]]

Stream = Callable[[], Iterator[tuple[Tensor, np.ndarray]]]  # (n, D) points with (n,) keys
START_POINTS_PER_CENTROID = 32  # k-means++ looks at a sample of this many points a centroid
MIN_CHUNK_ROWS = 16
BYTES_PER_CENTROID_VALUE = 48  # centroids, sums in both precisions, products, start points: all of size (K, D)
UNUSABLE = "k-means features hold NaN, Inf or values too large for float32: check the encoder's weights and precision"


@dataclass
class Points:
    """The points that take part, as chunks (n, D) float32 on the device that computes, the same in every pass.

    Chunks are not searched for NaN, which would wait for the device each time; the sums of a pass tell as well.
    """

    num_rows: int  # of all ranks
    num_here: int
    streamed: bool
    chunks: Callable[[], Iterator[Tensor]]
    take_start: Callable[[], Tensor]  # a copy of some points of all ranks in random order; called once


def open_points(
    features: "Features",
    cfg: "KMeansConfig",
    shares: Shares | None = None,
) -> Points:
    """Points of a tensor or array (N, D), or of a callable whose every call iterates the same tensors (n, D), or such
    tensors each with the numbers (n,) of its points.

    Raises DigitError for NaN or Inf, another shape, or a budget too small for the centroids alone.
    """
    shares = shares or Shares()
    if not callable(features):
        return _tensor_points(as_features(features), cfg, shares)
    return _stream_points(lambda: _keyed(features(), cfg, distributed.rank()), cfg, shares)


def _keyed(parts: "Iterable[Part]", cfg: "KMeansConfig", rank: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    """(n, D) points, and for each of them a random number in 0 .. 1 that is the same in every pass.

    It depends on the point's number alone, so a sample is the same however the stream is cut, into tensors or among
    ranks. Without numbers the points of a rank are counted from 0, and the rank decides too.
    """
    seen = 0
    for part in parts:
        points, numbers = (part, np.arange(seen, seen + len(part))) if isinstance(part, Tensor) else part
        bits = np.random.PCG64([cfg.seed, 0] + [rank] * (rank > 0 and isinstance(part, Tensor)))
        seen += len(points)
        if not len(points):
            continue
        first = int(numbers.min())
        uniform = np.random.Generator(bits.advance(first)).random(int(numbers.max()) - first + 1)
        yield _moved(points, cfg), uniform[numbers - first]


def _moved(part: Tensor, cfg: "KMeansConfig") -> Tensor:
    """float32 on the device that computes."""
    if part.ndim != 2 or part.shape[1] == 0:
        raise DigitError(f"k-means wants features of shape (N, D), got {tuple(part.shape)}")
    return part.detach().to(cfg.device or part.device, torch.float32)


def _checked(part: Tensor) -> Tensor:
    """`part`, if squared distances between its rows stay finite."""
    if not torch.isfinite(part.square().sum(1)).all():
        raise DigitError(UNUSABLE)
    return part


def _start_rows(cfg: "KMeansConfig", fit: int) -> int:
    """Points to choose the first centroids from; at most a quarter of the `fit` rows that fit in memory, at least K."""
    if cfg.init == "random":
        return cfg.num_clusters
    return max(cfg.num_clusters, min(cfg.num_clusters * START_POINTS_PER_CENTROID, fit // 4))


def _row_bytes(cfg: "KMeansConfig", dim: int) -> int:
    """What one row of a chunk costs: its scores, and its features as they come, centred, rounded and squared."""
    return 4 * cfg.num_clusters + 16 * dim


def _chunk_size(cfg: "KMeansConfig", dim: int, device: torch.device) -> int:
    """An eighth of the budget at most."""
    return max(MIN_CHUNK_ROWS, min(chunk_rows(device), cfg.memory_budget_bytes // 8 // _row_bytes(cfg, dim)))


def _tensor_points(features: Tensor, cfg: "KMeansConfig", shares: Shares) -> Points:
    """Chunks of a tensor that the caller holds in memory anyway; the subsample is never copied as a whole."""
    if features.ndim != 2:
        raise DigitError(f"k-means wants features of shape (N, D), got {tuple(features.shape)}")
    ends = np.cumsum(distributed.gather(len(features)))
    num, first_row = int(ends[-1]), int(ends[distributed.rank()]) - len(features)
    most = cfg.max_points(num)
    order = np.random.default_rng([cfg.seed, 0]).permutation(num)[:most] - first_row  # the same on every rank
    here = np.flatnonzero((order >= 0) & (order < len(features)))
    rows = torch.from_numpy(np.sort(order[here])).to(features.device) if most < num else None
    size = _chunk_size(cfg, features.shape[1], torch.device(cfg.device or features.device))

    def chunks() -> Iterator[Tensor]:
        for part in features.split(size) if rows is None else (features[some] for some in rows.split(size)):
            yield _moved(part, cfg)

    def start() -> Tensor:
        total = min(most, _start_rows(cfg, 4 * most))
        places = here[here < total]
        found = _moved(features[torch.from_numpy(order[places]).to(features.device)], cfg)
        return _checked(shares.place(found, places, total))

    return Points(most, len(here), False, chunks, start)


def _stream_points(stream: Stream, cfg: "KMeansConfig", shares: Shares) -> Points:
    """Reads the stream once: counts its points, keeps a random sample, and no more if all that take part are in it."""
    sample, keys, seen = _sample_stream(stream, cfg, shares)
    shares.agree_to_go_on()
    sample = _sample_of_some(sample, cfg, shares)
    size = _chunk_size(cfg, sample.shape[1], sample.device)
    everyones = distributed.gather(keys)
    num_rows = sum(distributed.gather(seen))
    wanted = cfg.max_points(num_rows)
    all_keys = np.concatenate(everyones)  # of the points in the samples of all ranks
    order = np.argsort(all_keys, kind="stable")

    room = _capacity(cfg, sample.shape[1], sample.device)
    total = min(len(all_keys), _start_rows(cfg, min(len(all_keys), wanted, room)))
    first = order[:total] - sum(map(len, everyones[: distributed.rank()]))
    places = np.flatnonzero((first >= 0) & (first < len(keys)))
    first_here = torch.from_numpy(first[places]).to(sample.device)
    last = all_keys[order[wanted - 1]] if len(all_keys) >= wanted else np.inf  # the largest key that takes part
    whole = len(keys) == seen or keys.max() >= last  # nothing that takes part was left out of the sample here
    if all(distributed.gather(bool(whole))):
        mine = torch.from_numpy(np.flatnonzero(keys <= last)).to(sample.device)
        parts = [part for part in sample.split(size) if len(part)] if len(mine) == len(sample) else None
        return Points(
            wanted, len(mine), False,
            lambda: iter(parts) if parts is not None else (sample[some] for some in mine.split(size) if len(some)),
            lambda: shares.place(sample[first_here], places, total),
        )  # fmt: skip
    start = [shares.place(sample[first_here], places, total)]  # popped once used: the iterations hold no sample
    fraction = wanted / num_rows

    def chunks() -> Iterator[Tensor]:
        for part, keys in stream():
            kept = part[torch.from_numpy(keys < fraction).to(part.device)] if fraction < 1 else part
            yield from (chunk for chunk in kept.split(size) if len(chunk))

    return Points(wanted, round(fraction * seen), True, chunks, start.pop)


def _sample_stream(stream: Stream, cfg: "KMeansConfig", shares: Shares) -> tuple[Tensor | None, np.ndarray, int]:
    """The (s, D) rows with the smallest keys, those keys, and the number of all; None for no rows at all."""
    kept, seen = None, 0
    with Progress("features for k-means") as bar:
        for part, keys in stream():
            if kept is None:
                kept = Reservoir(_capacity(cfg, part.shape[1], part.device), part.shape[1], like=part)
            dim = kept.sample.shape[1]
            if part.shape[1] != dim:
                raise DigitError(f"k-means features change from {dim} to {part.shape[1]} columns midway")
            kept.offer(_checked(part), keys)
            seen += len(part)
            bar.update(len(part))
            if shares.asked_to_stop:
                break
    return (None, np.zeros(0), seen) if kept is None else (kept.rows, kept.keys, seen)


def _sample_of_some(sample: Tensor | None, cfg: "KMeansConfig", shares: Shares) -> Tensor:
    """This rank's sample, or an empty tensor of matching width and device type."""
    kinds = distributed.gather(None if sample is None else (sample.shape[1], sample.device.type))
    known = [kind for kind in kinds if kind is not None]
    if not known:
        raise DigitError("k-means got no features at all: the source gave no readable image")
    return torch.empty(0, known[0][0], device=known[0][1]) if sample is None else sample


def _capacity(cfg: "KMeansConfig", dim: int, device: torch.device) -> int:
    """Rows of a sample that fit the budget beside the work on one chunk; at most the rows wanted."""
    num, row = cfg.num_clusters, _row_bytes(cfg, dim)
    fixed = num * dim * BYTES_PER_CENTROID_VALUE
    fit = (cfg.memory_budget_bytes - fixed - _chunk_size(cfg, dim, device) * row) // (4 * dim)
    rows = fit - _start_rows(cfg, fit)
    if rows < num:
        least = fixed + 8 * dim * num  # K points to start from and K in the sample
        least = max(least + MIN_CHUNK_ROWS * row, least * 8 // 7 + 1)
        raise DigitError(
            f"k-means: a memory budget of {cfg.memory_budget_bytes} bytes is too small for {num} centroids of {dim} "
            f"features: give at least {least} (kmeans.memory_budget_bytes)"
        )
    return max(num, cfg.max_points(rows))
