"""What a model of a run trains on: stored tokens, or crops that are new in every epoch and encoded in the loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from digit.data.fresh import FreshCrops
from digit.data.tokens import TokenBatches
from digit.models.tokenizer import ImageTokenizer
from digit.training.loop import step_seed

ENCODED_TOGETHER = 64  # images
NOISE_ENDS = 0.75  # of the training: reAR's noise is 0 after 187,500 of 250,000 updates
ORDERS = 2**31  # of `step_seed`, in place of a micro-batch: random numbers that nothing else in the training has
OF_INPUT_NOISE = 1_000_033  # in place of a micro-batch: random numbers of noisy inputs alone
Arguments = Callable[[dict[str, Tensor]], dict[str, Any]]


class Batches(Protocol):
    """`batches(step)` -> keywords of a model's loss, for a whole batch."""

    def __call__(self, step: int) -> dict[str, Any]: ...

    def part(self, step: int, start: int, stop: int) -> dict[str, Any]:
        """Rows start .. stop - 1 of the batch: what one of several processes trains on."""
        ...

    def rows(self, step: int) -> np.ndarray:
        """(B,) int64: what the batch was made of, for the report on a step that fails."""
        ...

    def close(self) -> None:
        """End the threads or processes that read ahead."""
        ...


@dataclass(frozen=True)
class ModelBatches:
    """Batches of stored tokens; `rows` are those of the token store. `pixels` gives the crops behind some rows."""

    read: TokenBatches
    arguments: Arguments
    pixels: Callable[[np.ndarray], Tensor] | None = None

    def __call__(self, step: int) -> dict[str, Any]:
        return self.part(step, 0, self.read.batch_size)

    def part(self, step: int, start: int, stop: int) -> dict[str, Any]:
        found = self.read.part(step, start, stop)
        if self.pixels is not None:
            found["pixels"] = self.pixels(self.read.rows(step)[start:stop])
        return self.arguments(found)

    def rows(self, step: int) -> np.ndarray:
        return self.read.rows(step)

    def close(self) -> None:
        self.read.close()


class ChangedBatches(ABC):
    """Other batches with something changed or added, a function of seed and step, by `part`."""

    batches: Batches
    batch_size: int

    def __call__(self, step: int) -> dict[str, Any]:
        return self.part(step, 0, self.batch_size)

    @abstractmethod
    def part(self, step: int, start: int, stop: int) -> dict[str, Any]:
        """As `Batches.part`."""

    def rows(self, step: int) -> np.ndarray:
        return self.batches.rows(step)

    def close(self) -> None:
        self.batches.close()


@dataclass(frozen=True)
class NoisyPrefix(ChangedBatches):
    """Batches whose prefix codes are swapped for near ones at random, as a prior's mistakes would.

    Each code is swapped with probability `rate` (1 - step / num_steps): much at first, nothing at the end. Equal for
    any number of processes. `near` (K, n) int64 lists the codes nearest to each, of several levels (L, K, n).
    """

    batches: Batches
    near: Tensor
    rate: float
    num_steps: int
    batch_size: int
    seed: int

    def part(self, step: int, start: int, stop: int) -> dict[str, Any]:
        batch = self.batches.part(step, start, stop)
        prefix = batch["prefix"]
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        shape = (self.batch_size, prefix.shape[1])
        swap = torch.rand(shape, generator=generator) < self.rate * max(0.0, 1 - step / self.num_steps)
        which = torch.randint(self.near.shape[-1], shape, generator=generator)
        near = pick_near(self.near, prefix.cpu(), which[start:stop])  # (B, P)
        return batch | {"prefix": torch.where(swap[start:stop].to(prefix.device), near.to(prefix), prefix)}


@dataclass(frozen=True)
class NoisyInputs(ChangedBatches):
    """Batches with `seen` beside the target: its tokens, some of them replaced, which the model reads in their place.

    Of each image a share of the tokens, uniform between 0 and rate (1 - step / (NOISE_ENDS num_steps)), becomes others
    (reAR, He et al. 2025): near ones, as `NoisyPrefix` has them, or any of `vocab_size` where `near` is None. Equal for
    any number of processes.
    """

    batches: Batches
    near: Tensor | None
    vocab_size: int
    rate: float
    num_steps: int
    batch_size: int
    seed: int

    def part(self, step: int, start: int, stop: int) -> dict[str, Any]:
        batch = self.batches.part(step, start, stop)
        target = batch["target"]
        generator = torch.Generator().manual_seed(step_seed(self.seed, step, OF_INPUT_NOISE))
        shape = (self.batch_size, target.shape[1])
        share = torch.rand((self.batch_size, 1), generator=generator) * self.share(step)
        swap = torch.rand(shape, generator=generator) < share
        num = self.vocab_size if self.near is None else self.near.shape[-1]
        which = torch.randint(num, shape, generator=generator)[start:stop]
        others = which if self.near is None else pick_near(self.near, target.cpu(), which)  # (B, M)
        return batch | {"seen": torch.where(swap[start:stop].to(target.device), others.to(target), target)}

    def share(self, step: int) -> float:
        """The largest share of an image's tokens that a step replaces."""
        return self.rate * max(0.0, 1 - step / (NOISE_ENDS * self.num_steps))


@dataclass(frozen=True)
class Annealed:
    """A rate that falls in a straight line to 0 from step `start` to step `end`."""

    rate: float
    start: int
    end: int

    def __call__(self, step: int) -> float:
        if step < self.start:
            return self.rate
        return self.rate * max(0.0, (self.end - step) / max(1, self.end - self.start))


@dataclass(frozen=True)
class RandomOrder(ChangedBatches):
    """Batches with "order" (B, N) int64: the place in the picture of each position of a sequence.

    A sequence has a random order with probability `rate(step)`, else raster order (RAR, Yu et al. 2024, "Randomized
    Autoregressive Visual Generation", section 3.2). Equal for any number of processes.
    """

    batches: Batches
    rate: Annealed
    num_places: int
    batch_size: int
    seed: int

    def part(self, step: int, start: int, stop: int) -> dict[str, Any]:
        batch = self.batches.part(step, start, stop)
        if not (rate := self.rate(step)):
            return batch
        generator = torch.Generator().manual_seed(step_seed(self.seed, step, ORDERS))
        is_random = torch.rand(self.batch_size, 1, generator=generator) < rate
        order = torch.rand(self.batch_size, self.num_places, generator=generator).argsort(1)
        order = torch.where(is_random, order, torch.arange(self.num_places))
        return batch | {"order": order[start:stop]}


def pick_near(near: Tensor, tokens: Tensor, which: Tensor) -> Tensor:
    """(B, M) int64: number `which` (B, M) of the codes near to each of `tokens` (B, M), on the CPU.

    `near` (K, n) lists them, of several levels (L, K, n); a token's level follows from its place.
    """
    levels = () if near.ndim == 2 else (torch.arange(tokens.shape[1]) % len(near),)
    return near[(*levels, tokens, which)]


@dataclass(frozen=True)
class FreshBatches:
    """Batches of new crops; `rows` are images of the source. `tokenizers` (name -> tokenizer) encode them in float32.

    Tokens come out on the tokenizers' device. They are those that a token store would hold of the same crops, but for
    rounding on a GPU, where the number of images that are encoded together may differ.
    """

    crops: FreshCrops
    arguments: Arguments
    tokenizers: Mapping[str, ImageTokenizer]
    batch_size: int
    device: torch.device

    def __call__(self, step: int) -> dict[str, Any]:
        return self.part(step, 0, self.batch_size)

    def part(self, step: int, start: int, stop: int) -> dict[str, Any]:
        crops = self.crops.part(step, start, stop)
        images = crops.images
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)  # once for all tokenizers
        found = {"labels": crops.labels, "pixels": images}
        for name, tokenizer in self.tokenizers.items():
            found[name] = torch.cat([tokenizer.encode(part) for part in images.split(ENCODED_TOGETHER)])
        return self.arguments(found)

    def rows(self, step: int) -> np.ndarray:
        return self.crops.images(step)

    def close(self) -> None:
        self.crops.close()
