"""Features of an image set in one pass, cached on disk by content, so that no image goes through a network twice.

Ranks share the parts in turn; rank 0 receives all of them, in order.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, UInt8
from torch import Tensor

from digit.data.fingerprint import digest
from digit.errors import DigitError
from digit.evaluation.image_set import ImageSet
from digit.evaluation.looks import measure_looks
from digit.metrics.distances import Nearest, Pairs
from digit.metrics.frechet import FeatureStats, square_root
from digit.metrics.judge import Judged, JudgeNetwork
from digit.metrics.kernels import GaussianMeans, UnitMoments
from digit.runtime import distributed
from digit.runtime.files import load_tensors, save_tensors
from digit.runtime.progress import Progress

SHARD = 1000  # images per cache file; an interrupted run repeats at most so many
FORMAT = b"judged 3"  # change it with the content of a shard


@dataclass(frozen=True)
class Features:
    """Outputs of a network for N images, in order, on the CPU."""

    pooled: Float32[Tensor, "N D"]
    logits: Float32[Tensor, "N C"]
    spatial: FeatureStats  # of (N, E); only its mean and covariance are needed
    digests: UInt8[Tensor, "N 32"]  # SHA-256 of the pixels that the network received
    grey: Bool[Tensor, " N"]  # all three channels equal
    looks: Float32[Tensor, "N 10"]  # of `measure_looks`
    key: str  # hash of the network and of all images in order
    cache: Path | None  # folder for what depends on these features alone

    def __len__(self) -> int:
        return len(self.pooled)

    @classmethod
    def of_file(cls, pooled: Float32[Tensor, "N D"], cache: Path | None) -> Self:
        """Pooled features that another program saved: no logits, no spatial features, nothing of the images."""
        none, key = pooled.new_zeros(len(pooled), 0), digest([b"file", pooled.numpy().tobytes()])
        digests, grey = torch.zeros(len(pooled), 32, dtype=torch.uint8), torch.zeros(len(pooled), dtype=torch.bool)
        return cls(pooled, none, FeatureStats.of(none), digests, grey, pooled.new_zeros(len(pooled), 10), key, cache)

    def pixel_keys(self) -> list[bytes]:
        """Content hash of each image's pixels."""
        return [row.tobytes() for row in self.digests.numpy()]

    @cached_property
    def stats(self) -> FeatureStats:
        """Statistics of the pooled features, cached."""
        return FeatureStats.restore(self.remember_matrix("statistics", lambda: FeatureStats.of(self.pooled).state()))

    def root(self, of: Literal["pooled", "spatial"]) -> Float64[np.ndarray, "D D"]:
        """The square root (D, D) of a covariance, cached."""
        stats = self.stats if of == "pooled" else self.spatial
        if len(self) < 2 * stats.dim:
            return square_root(stats.cov)
        return self.remember(f"root of {of}", lambda: {"root": torch.from_numpy(square_root(stats.cov))})[
            "root"
        ].numpy()

    @cached_property
    def unit_moments(self) -> UnitMoments:
        """Moments of the pooled features, scaled to length 1; cached. Raises DigitError for features of length 0."""
        return UnitMoments(**self.remember_matrix("unit moments", lambda: vars(UnitMoments.of(self.pooled))))

    def within(self, k: int, *, gaussian: bool) -> tuple[Float64[np.ndarray, "N K"], Float64[np.ndarray, " N"] | None]:
        """Squared distances (N, k) of the pooled features to their k nearest others, and `gaussian_means` (N,) of them.

        Both come from one pass over the pairs and are cached. gaussian: whether the means are wanted.
        """
        names = (f"squares of {k} nearest", "gaussian means")
        squares, means = (self._recall(name) for name in names)
        missing = squares is None, gaussian and means is None
        if any(missing):
            pairs = Pairs(self.pooled)
            nearest = Nearest(pairs, k) if missing[0] else None
            sums = GaussianMeans(pairs, moments=self.unit_moments) if missing[1] else None
            pairs.sweep(*(consumer.add for consumer in (nearest, sums) if consumer is not None))
            if nearest is not None:
                squares = self._keep(names[0], torch.from_numpy(nearest.result()[0]))
            if sums is not None:
                means = self._keep(names[1], torch.from_numpy(sums.result()))
        assert squares is not None
        return squares.numpy(), None if means is None else means.numpy()

    def _recall(self, what: str) -> Tensor | None:
        """A tensor that `_keep` has cached."""
        if self.cache is None:
            return None
        with suppress(DigitError):
            return load_tensors(self._path(what)).get("kept")
        return None

    def _keep(self, what: str, made: Tensor) -> Tensor:
        if self.cache is not None:
            save_tensors(self._path(what), {"kept": made})
        return made

    def _path(self, what: str) -> Path:
        assert self.cache is not None
        return self.cache / f"{digest([FORMAT, self.key.encode(), what.encode()])}.safetensors"

    def remember_matrix(self, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """As `remember`, for matrices (D, D); only where they take less space than the features."""
        return make() if len(self) < 2 * self.pooled.shape[1] else self.remember(what, make)

    def remember(self, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that depend on `what` and these features alone, from the cache, or made and cached."""
        if self.cache is None:
            return make()
        return remember(self._path(what), make)


@dataclass(frozen=True)
class Shard:
    """A part of an image set: a hash of all that its images depend on, and how to make them."""

    key: str
    num: int
    make: Callable[[], Tensor]  # -> uint8 (num, 3, H, W)


def remember(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read tensors from a file; where it is missing or damaged, make and save them."""
    try:
        return load_tensors(path)
    except DigitError:
        made = make()
        save_tensors(path, made)
        return made


def shards(images: ImageSet, side: int | None) -> Iterator[Shard]:
    """Split an image set into parts of SHARD images; `side` as for `ImageSet.pixels`. Keys hash content alone."""
    digests, pixel_range = images.survey.digests, images.source.pixel_range
    white = [str(pixel_range.white).encode()] if pixel_range and pixel_range.white else []
    for start in range(0, len(images), SHARD):
        rows = range(start, min(start + SHARD, len(images)))
        key = digest([str(side).encode(), *white, *(digests[row] for row in rows)])
        yield Shard(key, len(rows), lambda rows=rows: images.pixels(rows, side))


def collect(
    parts: list[Shard], network: JudgeNetwork, *, batch_size: int, cache: Path | None, description: str
) -> Features | None:
    """Features of every part, read from the cache or else computed and cached at once.

    Returns None on ranks other than 0.
    """
    kept: dict[str, list[Tensor]] = {"pooled": [], "logits": [], "digests": [], "grey": [], "looks": []}
    network_key, world_size = fingerprint(network).encode(), distributed.world_size()
    key = digest([network_key, *(part.key.encode() for part in parts)])
    moments = SpatialStats(cache and cache / f"{digest([FORMAT, key.encode(), b'spatial'])}.safetensors")

    def judged_part(part: Shard) -> dict[str, Tensor]:
        path = cache and cache / f"{digest([FORMAT, network_key, part.key.encode()])}.safetensors"
        judged = _read(path, part.num) if path else None
        if judged is None:
            judged = judge(part.make(), network, batch_size)
            if path:
                save_tensors(path, judged)
        # cloned, because sending a memory-mapped tensor sends its whole file
        return {name: values.clone() for name, values in judged.items()} if world_size > 1 else judged

    with Progress(description, sum(part.num for part in parts)) as bar:
        for first in range(0, len(parts), world_size):
            own = parts[first + distributed.rank() :][:1]
            for judged in chain.from_iterable(
                distributed.on_every_rank(lambda own=own: [judged_part(part) for part in own])
            ):
                bar.update(len(judged["grey"]))
                if distributed.is_main():
                    moments.update(judged["spatial"])
                    for name, values in kept.items():
                        values.append(judged[name])
    if not distributed.is_main():
        return None
    outputs = {name: torch.cat(values) for name, values in kept.items()}
    return Features(**outputs, spatial=moments.finish(), key=key, cache=cache)


class SpatialStats:
    """Statistics of the spatial features, which are too large to keep; cached where that takes less space."""

    def __init__(self, path: Path | None):
        self._path, self._stats, self._done = path, FeatureStats(), False
        if path is not None and distributed.is_main():
            with suppress(DigitError):
                self._stats, self._done = FeatureStats.restore(load_tensors(path)), True

    def update(self, spatial: Float32[Tensor, "B E"]) -> None:
        """Add the features of some images."""
        if not self._done:
            self._stats.update(spatial)

    def finish(self) -> FeatureStats:
        """The statistics of all images."""
        if self._path is not None and not self._done and self._stats.count >= 2 * self._stats.dim > 0:
            save_tensors(self._path, self._stats.state())
        return self._stats


def fingerprint(network: JudgeNetwork) -> str:
    """SHA-256 over the network's description (weights, resize, input size), without the name of the weights file."""
    about = {name: value for name, value in network.describe().items() if name != "weights"}
    return digest([json.dumps(about, sort_keys=True).encode()])


def _read(path: Path, num: int) -> dict[str, Tensor] | None:
    """Read a shard from the cache; None where it is missing or damaged."""
    try:
        cached = load_tensors(path)
    except DigitError:
        return None
    whole = {"pooled", "spatial", "logits", "digests", "grey", "looks"} == set(cached)
    return cached if whole and all(len(values) == num for values in cached.values()) else None


@torch.no_grad()
def judge(images: UInt8[Tensor, "N 3 H W"], network: JudgeNetwork, batch_size: int) -> dict[str, Tensor]:
    """uint8 (N, 3, H, W) -> pooled (N, D), spatial (N, E), logits (N, C), digests (N, 32), grey (N,), looks."""
    batches = [network.judge(batch) for batch in images.split(batch_size)]
    return {
        **{name: values.float().cpu() for name, values in vars(Judged.cat(batches)).items()},
        "digests": torch.stack([_pixel_digest(image) for image in images]),
        "grey": (images == images[:, :1]).flatten(1).all(1).cpu(),
        "looks": measure_looks(images),
    }


def _pixel_digest(image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, " 32"]:
    """SHA-256 of an image's shape and pixels."""
    pixels = image.cpu().contiguous()
    key = digest([str(tuple(pixels.shape)).encode(), pixels.numpy().tobytes()])
    return torch.frombuffer(bytearray.fromhex(key), dtype=torch.uint8)
