"""A VQGAN's codes as moving averages of features, kept alive: k-means start, restart of dead codes.

Shapes: n features in a batch, C = z_channels, K = vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from digit.models.vqgan import nearest_code
from digit.runtime import distributed

KEPT_BATCHES = 8  # batches of features that k-means starts from
KMEANS_ITERATIONS = 10


class EMACodebook:
    """Writes into `embedding.weight` (K, C), which no optimizer touches."""

    def __init__(self, embedding: nn.Embedding, decay: float, restart_below: float) -> None:
        self.weight = embedding.weight.requires_grad_(False)
        self.decay, self.restart_below = decay, restart_below
        self.counts = torch.ones(len(self.weight), device=self.weight.device)  # (K,)
        self.sums = self.weight.detach().clone()  # (K, C)
        self.reservoir: list[Tensor] = []  # features (n, C) before the start

    def collect(self, features: Tensor) -> None:
        """Keep the latest features (n, C) for the start."""
        self.reservoir = [*self.reservoir[1 - KEPT_BATCHES :], features]

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Set the codes by k-means on what was collected; nothing collected (fine-tuning, already begun): keep them."""
        if not self.reservoir:
            return
        features = torch.cat([over_ranks(collected) for collected in self.reservoir])
        num_batches, self.reservoir = len(self.reservoir), []
        codes = random_rows(features, len(self.weight), generator)
        for _ in range(KMEANS_ITERATIONS):  # every rank for itself: there are few features
            counts, sums = self.assign(features, nearest_code(features, codes))
            empty = counts == 0
            codes = sums / counts.clamp(min=1)[:, None]
            codes[empty] = random_rows(features, int(empty.sum()), generator)
        if distributed.world_size() > 1:
            dist.broadcast(codes, 0)  # a GPU adds in any order, so that the ranks' codes may differ in rounding
        self.weight.copy_(codes)
        self.counts.fill_(len(features) / len(self.weight) / num_batches)  # of one batch
        self.sums.copy_(codes * self.counts[:, None])

    def assign(self, features: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How many features (n, C) chose each code (K,), and their sums (K, C)."""
        counts = torch.bincount(indices, minlength=len(self.weight)).to(features)
        sums = torch.zeros_like(self.weight).index_add_(0, indices, features)
        return counts, sums

    @torch.no_grad()
    def update(self, features: Tensor, indices: Tensor) -> None:
        """Move the codes towards the features (n, C) that chose them by indices (n,)."""
        counts, sums = self.assign(features, indices)
        sum_over_ranks([counts, sums])
        # N_k <- d N_k + (1 - d) n_k;  m_k <- d m_k + (1 - d) sum x;  c_k = m_k / N_k  (van den Oord 2017, Eq. 6 to 8)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.weight.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])

    @torch.no_grad()
    def restart_dead(self, features: Tensor, generator: torch.Generator) -> int:
        """Put codes that hardly anything chooses on random features (n, C); returns how many."""
        average = self.counts.mean()
        dead = self.counts < self.restart_below * average
        number = int(dead.sum())
        self.weight[dead] = random_rows(over_ranks(features), number, generator)
        self.counts[dead] = 0.5 * average  # time to prove themselves before the next look
        self.sums[dead] = self.weight[dead] * self.counts[dead, None]
        return number

    def state_dict(self) -> dict[str, Any]:
        reservoir = [over_ranks(features) for features in self.reservoir]  # for any number of ranks
        return {"counts": self.counts, "sums": self.sums, "reservoir": reservoir}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])
        mine = [features.chunk(distributed.world_size())[distributed.rank()] for features in state["reservoir"]]
        self.reservoir = [features.to(self.sums.device) for features in mine]


def flat_features(z: Tensor) -> Tensor:
    """Features (B, C, h, w) as rows (B * h * w, C) in fp32, without their graph."""
    return z.detach().float().movedim(1, -1).flatten(0, 2)


def random_rows(features: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Random rows (number, C) of features (n, C); repeated only where n < number."""
    if number > len(features):
        rows = torch.randint(len(features), (number,), generator=generator)
    else:
        rows = torch.randperm(len(features), generator=generator)[:number]
    return features[rows.to(features.device)]


def over_ranks(features: Tensor) -> Tensor:
    """The features (n, C) of every rank as one (n * world_size, C), in the order of the ranks."""
    if distributed.world_size() == 1:
        return features
    parts = [torch.empty_like(features) for _ in range(distributed.world_size())]
    dist.all_gather(parts, features.contiguous())
    return torch.cat(parts)


def sum_over_ranks(tensors: list[Tensor], divide: bool = False) -> None:
    """Add (or average) tensors over all ranks, in place, in one exchange."""
    if distributed.world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat = flat / distributed.world_size() if divide else flat
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
