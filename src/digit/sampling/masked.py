"""Iterative decoding of masked models (MaskGIT, Chang et al. 2022, section 3.2), as in the released renderer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.sampling.config import Order
from digit.sampling.requests import TokenRequest, conditions
from digit.sampling.sampler import Sampler, twice


class MaskedSampler(Sampler):
    """Samples from a masked model in `num_steps` forward passes.

    Every step samples all hidden tokens and hides the least confident again, floor(M cos(pi/2 (step + 1) / num_steps))
    of them, where M counts the tokens to sample.

    Settings:
        num_steps: forward passes (released: 8).
        order: confidence, or halton: a fixed order that spreads over the picture.
        choice_temperature: Gumbel noise on the confidence, times 1 - ratio of steps done (released: 4.5).
        temperature, top_k, top_p, cfg_scale, cfg_schedule, dtype, micro_batch_size, stage: as in
            `digit.sampling.next_token.NextTokenSampler`; the released decoding uses no filter.
    """

    def __init__(
        self,
        model: SequenceModel,
        *,
        num_steps: int = 8,
        choice_temperature: float = 4.5,
        order: Order = "confidence",
        **settings: Any,
    ) -> None:
        assert model.cfg.masked, "next-token models are sampled by NextTokenSampler"
        if num_steps < 1:
            raise DigitError(f"num_steps is {num_steps}: at least 1")
        self.num_steps, self.choice_temperature = num_steps, choice_temperature
        super().__init__(model, **settings)
        self.rank = halton_rank(target_grid(model.cfg)).to(model.device) if order == "halton" else None

    @property
    def num_decisions(self) -> int:
        """One a step."""
        return self.num_steps

    @property
    def uniform_shape(self) -> tuple[int, ...]:
        """Every step takes two numbers per token: one for its code, one for its confidence."""
        return (self.num_steps, 2, self.model.cfg.target_len)

    def sample_micro_batch(
        self, rows: TokenRequest, u: Tensor, report: Callable[[Tensor | int], None]
    ) -> Int64[Tensor, "C M"]:
        model, cfg, guided = self.model, self.model.cfg, self.guided
        condition = conditions(model, rows, guided)
        tokens = F.pad(rows.given, (0, cfg.target_len - rows.given.shape[1]), value=cfg.mask_token)  # (C, M)
        hidden = tokens == cfg.mask_token  # (C, M)
        unknown = hidden.sum(1)  # (C,)
        rows_in_all = len(twice(tokens, guided))
        added = model.added(rows_in_all, condition["prefix"], condition["drop_prefix"])  # the same at every step
        for step in range(self.num_steps):
            features = model.features(twice(tokens, guided), added=added, **condition)
            logits = self.combine(model.head(features), step)  # (C, M, V)
            sampled = self.pick(logits.flatten(0, 1), u[:, step, 0].flatten()).view_as(tokens)
            tokens = torch.where(hidden, sampled, tokens)
            before, ratio = hidden, (step + 1) / self.num_steps
            if step + 1 < self.num_steps:
                confidence = self.confidence(logits, sampled, u[:, step, 1], 1 - ratio)
                hidden = least_confident(confidence, hidden, num_to_hide(unknown, hidden, ratio))
                tokens = tokens.masked_fill(hidden, cfg.mask_token)
            else:
                hidden = torch.zeros_like(hidden)
            report(before.sum(1) - hidden.sum(1))
        return tokens

    def confidence(
        self, logits: Float[Tensor, "C M V"], sampled: Int64[Tensor, "C M"], u: Float64[Tensor, "C M"], left: float
    ) -> Float[Tensor, "C M"]:
        """What decides which tokens stay: log-probability (unfiltered) with noise, or the place in Halton's order.

        `left` is the share of the steps still to do.
        """
        if self.rank is not None:
            return -self.rank.float().expand_as(sampled)
        return log_probability(logits, sampled) + gumbel(u) * (self.choice_temperature * left)


def target_grid(cfg: SequenceConfig) -> tuple[int, int]:
    """Rows and columns of a model's target. Raises DigitError where it is no square and its rows are not known."""
    rows = cfg.target_rows or math.isqrt(cfg.target_len)
    if not cfg.target_rows and rows**2 != cfg.target_len:
        raise DigitError(f"order halton needs a grid, but this model has {cfg.target_len} tokens: choose confidence")
    return rows, cfg.target_len // rows


def halton_rank(grid: tuple[int, int]) -> Int64[Tensor, " M"]:
    """Each cell's place in the order in which the Halton sequence with bases 2 and 3 first visits them, raster order.

    The points x_n = (phi_2(n), phi_3(n)), n = 1, 2, ..., with phi_b the radical inverse, cover the picture evenly from
    the first ones on (Besnier et al. 2025, "Halton Scheduler for Masked Generative Image Transformer").
    """
    rows, columns = grid
    rank = torch.full((rows * columns,), -1)
    n = visited = 0
    while visited < len(rank):
        n += 1
        cell = int(radical_inverse(n, 2) * rows) * columns + int(radical_inverse(n, 3) * columns)
        if rank[cell] < 0:
            rank[cell] = visited
            visited += 1
    return rank


def radical_inverse(n: int, base: int) -> float:
    """The digits of n in this base, mirrored at the point: in [0, 1)."""
    value, unit = 0.0, 1.0
    while n:
        unit /= base
        n, digit = divmod(n, base)
        value += digit * unit
    return value


def log_probability(logits: Float[Tensor, "C M V"], codes: Int64[Tensor, "C M"]) -> Float[Tensor, "C M"]:
    """log softmax of the logits at the codes."""
    return logits.gather(-1, codes[..., None])[..., 0] - logits.logsumexp(-1)


def num_to_hide(unknown: Int64[Tensor, " C"], hidden: Bool[Tensor, "C M"], ratio: float) -> Int64[Tensor, " C"]:
    """floor(unknown cos(pi/2 ratio)), at least 1, at most one fewer than are hidden now; 0 where nothing is hidden."""
    now = hidden.sum(1)
    count = (unknown.double() * math.cos(math.pi / 2 * ratio)).floor().long()
    return torch.minimum(count, now - 1).clamp_min(1).minimum(now)


def least_confident(
    confidence: Float[Tensor, "C M"], hidden: Bool[Tensor, "C M"], count: Int64[Tensor, " C"]
) -> Bool[Tensor, "C M"]:
    """Which tokens to hide again: the `count` least confident of those sampled in this step."""
    order = confidence.masked_fill(~hidden, float("inf")).argsort(dim=1, stable=True)
    return order.argsort(1) < count[:, None]


def gumbel(u: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Standard Gumbel noise, -log(-log u)."""
    return -torch.log(-torch.log(u.clamp_min(torch.finfo(u.dtype).tiny)))
