"""A VQGAN's codebooks as moving averages of features, started by k-means; unused codes are restarted.

Shapes: n features in a batch, C = z_channels, K = vocab_size, L levels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from digit.models.vq_quantizers import nearest_code
from digit.runtime import distributed
from digit.training.parallel import gather_rows, sum_over_ranks

KEPT_BATCHES = 8  # the latest batches of features, on which k-means runs
KMEANS_ITERATIONS = 10


class EMACodebook:
    """Updates code vectors (K, C) in place; no optimizer may hold them.

    The k-means of `start` is not that of `digit.tokenizers.kmeans`: its few features are in memory, so it needs neither
    chunks, float64 sums nor a convergence test, and empty clusters move to random features.
    """

    def __init__(self, weight: Float[Tensor, "K C"], decay: float, restart_below: float) -> None:
        self.weight = weight.detach()
        self.decay, self.restart_below = decay, restart_below
        self.counts = torch.ones(len(self.weight), device=self.weight.device)  # (K,)
        self.sums = self.weight.detach().clone()  # (K, C)
        self.reservoir: list[Tensor] = []  # features (n, C) that `start` will cluster

    def collect(self, features: Float[Tensor, "n C"]) -> None:
        """Keep the latest features (n, C) for `start`."""
        self.reservoir = [*self.reservoir[1 - KEPT_BATCHES :], features]

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Set the codes by k-means on the collected features; without any (fine-tuning, or started) keep the codes."""
        if not self.reservoir:
            return
        features = torch.cat([gather_rows(collected) for collected in self.reservoir])
        num_batches, self.reservoir = len(self.reservoir), []
        self.fit(features, num_batches, generator)

    @torch.no_grad()
    def fit(self, features: Float[Tensor, "n C"], num_batches: int, generator: torch.Generator) -> None:
        """Set the codes by k-means on the features of so many batches of all ranks."""
        codes = random_rows(features, len(self.weight), generator)
        for _ in range(KMEANS_ITERATIONS):  # on every rank: there are few features
            counts, sums = self.assign(features, nearest_code(features, codes))
            empty = counts == 0
            codes = sums / counts.clamp(min=1)[:, None]
            codes[empty] = random_rows(features, int(empty.sum()), generator)
        if distributed.world_size() > 1:
            dist.broadcast(codes, 0)  # a GPU adds in any order, so the ranks' codes may differ in rounding
        self.weight.copy_(codes)
        self.counts.fill_(len(features) / len(self.weight) / num_batches)  # expected in one batch
        self.sums.copy_(codes * self.counts[:, None])

    def assign(
        self, features: Float[Tensor, "n C"], indices: Int64[Tensor, " n"]
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, "K C"]]:
        """The number of features (n, C) with each code index, (K,), and their sums, (K, C)."""
        ones = features.new_ones(len(indices))  # bincount would wait for a GPU; sums of ones are exact up to 2^24
        counts = features.new_zeros(len(self.weight)).index_add_(0, indices, ones)
        sums = torch.zeros_like(self.weight).index_add_(0, indices, features)
        return counts, sums

    @torch.no_grad()
    def update(self, features: Float[Tensor, "n C"], indices: Int64[Tensor, " n"]) -> None:
        """N_k <- d N_k + (1 - d) n_k;  m_k <- d m_k + (1 - d) sum x;  c_k = m_k / N_k.

        Features x (n, C) with their codes' indices (n,); van den Oord et al. 2017, Eqs. 6 to 8.
        """
        counts, sums = self.assign(features, indices)
        sum_over_ranks([counts, sums])
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.weight.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])

    @torch.no_grad()
    def restart_dead(self, features: Float[Tensor, "n C"], generator: torch.Generator) -> int:
        """Move rarely used codes to random features (n, C); returns how many."""
        average = self.counts.mean()
        dead = self.counts < self.restart_below * average
        num_dead = int(dead.sum())
        self.weight[dead] = random_rows(gather_rows(features), num_dead, generator)
        self.counts[dead] = 0.5 * average  # enough to survive until the next check
        self.sums[dead] = self.weight[dead] * self.counts[dead, None]
        return num_dead

    def state_dict(self) -> dict[str, Any]:
        reservoir = [gather_rows(features) for features in self.reservoir]  # whole, so any number of ranks can load it
        return {"counts": self.counts, "sums": self.sums, "reservoir": reservoir}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])
        own = [features.chunk(distributed.world_size())[distributed.rank()] for features in state["reservoir"]]
        self.reservoir = [features.to(self.sums.device) for features in own]


class LevelCodebooks:
    """The codebooks of all levels of a residual quantiser: each takes what the levels before it leave of a feature.

    `codebooks` share the table (L K, C). A level whose codes are all zero, as of a codebook that got more levels than
    it was trained with, starts by k-means on the first features that come.
    """

    def __init__(self, table: Float[Tensor, "LK C"], num_levels: int, decay: float, restart_below: float) -> None:
        self.codebooks = [EMACodebook(part, decay, restart_below) for part in table.chunk(num_levels)]
        # looked at once, since every look at a value waits for a GPU
        self.new = [num_levels > 1 and not bool(codebook.weight.any()) for codebook in self.codebooks]

    def collect(self, features: Float[Tensor, "n C"]) -> None:
        """Keep the latest features (n, C) for `start`."""
        self.codebooks[0].collect(features)

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Set the codes of all levels by k-means on the collected features; without any, keep them."""
        first = self.codebooks[0]
        if not first.reservoir:
            return
        features, num_batches = torch.cat([gather_rows(part) for part in first.reservoir]), len(first.reservoir)
        first.reservoir, self.new = [], [False] * len(self.new)
        for codebook in self.codebooks:
            codebook.fit(features, num_batches, generator)
            features = features - codebook.weight[nearest_code(features, codebook.weight)]

    @torch.no_grad()
    def start_new(self, features: Float[Tensor, "n C"], generator: torch.Generator) -> None:
        """Start the levels whose codes are all zero on this rank's features (n, C)."""
        if not any(self.new):
            return
        new, self.new = self.new, [False] * len(self.new)
        rest = gather_rows(features)
        for codebook, starts in zip(self.codebooks, new, strict=True):
            if starts:
                codebook.fit(rest, 1, generator)
            rest = rest - codebook.weight[nearest_code(rest, codebook.weight)]

    def update(self, features: Float[Tensor, "n C"], tokens: Int64[Tensor, "n L"]) -> None:
        """`EMACodebook.update` of each level, with its column of the tokens."""
        for codebook, rest, chosen in self._by_level(features, tokens):
            codebook.update(rest, chosen)

    def restart_dead(
        self, features: Float[Tensor, "n C"], tokens: Int64[Tensor, "n L"], generator: torch.Generator
    ) -> int:
        """Move rarely used codes of each level to what random features leave to it; returns how many."""
        return sum(c.restart_dead(rest, generator) for c, rest, _ in self._by_level(features, tokens))

    def _by_level(
        self, features: Tensor, tokens: Tensor
    ) -> list[tuple[EMACodebook, Float[Tensor, "n C"], Int64[Tensor, " n"]]]:
        """Each codebook with the features that reach it, by the codes before any of them changes, and their codes."""
        parts = []
        for codebook, chosen in zip(self.codebooks, tokens.unbind(1), strict=True):
            parts.append((codebook, features, chosen))
            features = features - codebook.weight[chosen]
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Of one level that of its codebook, as older checkpoints have it."""
        states = [codebook.state_dict() for codebook in self.codebooks]
        return states[0] if len(states) == 1 else {"levels": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.new = [False] * len(self.new)
        for codebook, of_level in zip(self.codebooks, state.get("levels", [state]), strict=True):
            codebook.load_state_dict(of_level)


def flat_features(z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B*h*w C"]:
    """Features (B, C, h, w) as rows (B * h * w, C) in fp32, detached."""
    return z.detach().float().movedim(1, -1).flatten(0, 2)


def random_rows(features: Float[Tensor, "n C"], num: int, generator: torch.Generator) -> Float[Tensor, "{num} C"]:
    """Random rows (num, C) of features (n, C), without repetition unless n < num."""
    if num > len(features):
        rows = torch.randint(len(features), (num,), generator=generator)
    else:
        rows = torch.randperm(len(features), generator=generator)[:num]
    return features[rows.to(features.device)]
