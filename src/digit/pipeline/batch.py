"""A batch of sampled images that is copied to host memory."""

from collections.abc import Mapping

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

IMAGES = "images"


class SampleBatch:
    """Images `first` .. `first + B - 1` of a stream.

    On a GPU the copies to host memory run while the next batch is sampled. Reading `images` or `tokens`, in any thread,
    waits until the copies are complete.

    Attributes:
        first: number of the first image; image i has seed `seed + i`.
        labels: (B,) int64, -1 for none.
        images: (B, 3, H, W) uint8.
        tokens: {"discriminative": (B, N), "vq": (B, M)} int64; only those that the pipeline has.
    """

    def __init__(self, first: int, labels: Int64[Tensor, " B"], tensors: Mapping[str, Tensor]):
        self.first, self.labels = first, labels
        self._host, self._arrived = to_host(tensors)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> UInt8[Tensor, "B 3 H W"]:
        return self._whole()[IMAGES]

    @property
    def tokens(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._whole().items() if name != IMAGES}

    def _whole(self) -> dict[str, Tensor]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


def to_host(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """CPU tensors, and for a GPU the event that ends their asynchronous copies into pinned memory."""
    device = next(iter(tensors.values())).device
    if device.type != "cuda":
        return {name: tensor.cpu() for name, tensor in tensors.items()}, None
    host = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        host[name].copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))
    return host, arrived
