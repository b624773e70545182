"""Features of many images that are read some rows at a time, from memory or from wherever they are kept.

Shapes: N images, B rows of a batch, L layers, D features.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int64, Real
from torch import Tensor

from digit.runtime.hardware import free_memory

CHUNK = 1024  # images whose features are read at a time
AHEAD = 2  # batches that are read while one is used
SHARE_OF_GPU = 0.6  # of its free memory; the classifiers and a batch's logits need the rest


@runtime_checkable
class FeatureRows(Protocol):
    """Features (N, L, D) that are read by rows; `digit.evaluation.feature_files` keeps them in files."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, L, D)."""
        ...

    def take(self, rows: Int64[Tensor, " B"]) -> Real[Tensor, "B L D"]:
        """The rows (B,) of 0..N-1, in the order in which they are asked for."""
        ...


@dataclass
class HeldRows:
    """Features (N, L, D) of any real type in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, L, D)."""
        num, layers, dim = self.tensor.shape
        return num, layers, dim

    def take(self, rows: Tensor) -> Tensor:
        """The rows (B,)."""
        return self.tensor[rows.to(self.tensor.device)]


Features = Tensor | FeatureRows


def as_rows(features: Features) -> FeatureRows:
    """A tensor (N, L, D) as rows; rows as they are."""
    return HeldRows(features) if isinstance(features, Tensor) else features


def is_finite(features: FeatureRows) -> bool:
    """Whether there is neither NaN nor infinity in features in memory; files are checked when they are written."""
    if not isinstance(features, HeldRows):
        return True
    return all(bool(torch.isfinite(part).all()) for part in features.tensor.split(CHUNK))


def batches(
    features: FeatureRows, parts: Iterable[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, Real[Tensor, "B L D"]]]:
    """Yield each part (B,) of row numbers with its features on `device`; files are read ahead on a thread."""
    if isinstance(features, HeldRows):
        for rows in parts:
            yield rows, features.take(rows).to(device)
        return
    waiting: deque[tuple[Tensor, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        try:
            for rows in parts:
                waiting.append((rows, reader.submit(features.take, rows)))
                if len(waiting) > AHEAD:
                    rows, read = waiting.popleft()
                    yield rows, read.result().to(device)
            while waiting:
                rows, read = waiting.popleft()
                yield rows, read.result().to(device)
        finally:
            for _, read in waiting:
                read.cancel()


def near(features: FeatureRows, device: torch.device, free: int | None = None) -> FeatureRows:
    """The features in a GPU's own memory where they take a fair part of what is free there; else as they are.

    ImageNet's, 17 layers x 1024 in half precision, are 42 GiB: a GPU of 80 GB holds them, and no update waits for a
    disk. free: bytes, by default those of `free_memory`.
    """
    if isinstance(features, HeldRows) or (free is None and device.type != "cuda"):
        return features
    free = free_memory(device) if free is None else free
    num, layers, dim = features.shape
    first = features.take(torch.arange(min(1, num)))
    if num * layers * dim * first.element_size() > SHARE_OF_GPU * free:
        return features
    held = torch.empty(num, layers, dim, dtype=first.dtype, device=device)
    for rows, part in batches(features, torch.arange(num).split(CHUNK), device):
        held[int(rows[0]) : int(rows[-1]) + 1] = part
    return HeldRows(held)
