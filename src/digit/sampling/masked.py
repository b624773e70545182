"""Iterative decoding of masked models (MaskGIT, Chang et al. 2022, section 3.2), as in the released renderer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from digit.errors import DigitError
from digit.models.sequence import SequenceModel
from digit.sampling.requests import TokenRequest, conditions
from digit.sampling.sampler import Sampler, twice


class MaskedSampler(Sampler):
    """Samples from a masked model in `num_steps` forward passes.

    Every step samples all hidden tokens and hides the least confident again, floor(M cos(pi/2 (step + 1) / num_steps))
    of them, where M counts the tokens to sample.

    Settings:
        num_steps: forward passes (released: 8).
        choice_temperature: Gumbel noise on the confidence, times 1 - ratio of steps done (released: 4.5).
        temperature, top_k, top_p, cfg_scale, dtype, micro_batch_size, stage: as in
            `digit.sampling.next_token.NextTokenSampler`; the released decoding uses no filter.
    """

    def __init__(
        self, model: SequenceModel, *, num_steps: int = 8, choice_temperature: float = 4.5, **settings: Any
    ) -> None:
        assert model.cfg.masked, "next-token models are sampled by NextTokenSampler"
        if num_steps < 1:
            raise DigitError(f"num_steps is {num_steps}: at least 1")
        super().__init__(model, **settings)
        self.num_steps, self.choice_temperature = num_steps, choice_temperature

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
        for step in range(self.num_steps):
            logits = self.combine(model.head(model.features(twice(tokens, guided), **condition)))  # (C, M, V)
            sampled = self.pick(logits.flatten(0, 1), u[:, step, 0].flatten()).view_as(tokens)
            tokens = torch.where(hidden, sampled, tokens)
            before, ratio = hidden, (step + 1) / self.num_steps
            if step + 1 < self.num_steps:
                chosen = log_probability(logits, sampled)  # (C, M), unfiltered
                noise = gumbel(u[:, step, 1]) * (self.choice_temperature * (1 - ratio))
                hidden = least_confident(chosen + noise, hidden, num_to_hide(unknown, hidden, ratio))
                tokens = tokens.masked_fill(hidden, cfg.mask_token)
            else:
                hidden = torch.zeros_like(hidden)
            report(before.sum(1) - hidden.sum(1))
        return tokens


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
