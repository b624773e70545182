"""Iterative decoding of masked models (MaskGIT, Chang et al. 2022, section 3.2), as in the released renderer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.errors import DigitError
from digit.models.sequence import SequenceModel
from digit.sampling.autoregressive import twice
from digit.sampling.filters import check_filters, draw, guide, image_uniforms
from digit.sampling.requests import Request, check_guidance, conditions, make_request, passes, ready

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


@torch.no_grad()
def generate_masked(
    model: SequenceModel,
    *,
    seeds: Sequence[int],
    prefix: Int64[Tensor, "B P"] | None = None,
    labels: Int64[Tensor, " B"] | None = None,
    given: Int64[Tensor, "B m"] | None = None,
    num_steps: int = 8,
    choice_temperature: float = 4.5,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_scale: float = 1.0,
    dtype: torch.dtype | None = None,
    pass_size: int | None = None,
    stage: str | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Int64[Tensor, "B M"]:
    """Draw the target tokens of B images in `num_steps` forward passes.

    Every step draws all hidden tokens and hides the least confident again: floor(M cos(pi/2 (step + 1) / num_steps)) of
    them, where M counts the tokens to draw.

    Args:
        given: tokens to keep, `model.cfg.mask_token` where one is to be drawn; may hold the first m of M tokens only.
        num_steps: forward passes (released: 8).
        choice_temperature: Gumbel noise on the confidence, times 1 - ratio of steps done (released: 4.5).
        on_token: called after every step with the number of tokens just fixed, over all images what there is to draw.
        seeds, prefix, labels, temperature, top_k, top_p, cfg_scale, dtype, pass_size, stage: as in
            `digit.sampling.autoregressive.generate`; the released decoding uses no filter.

    Raises:
        DigitError: conditions that do not fit the model, or settings without meaning.
    """
    cfg = model.cfg
    assert cfg.masked, "next-token models are drawn by generate"
    check_filters(temperature, top_k, top_p)
    check_guidance(model, cfg_scale)
    if num_steps < 1:
        raise DigitError(f"num_steps is {num_steps}: at least 1")
    request = make_request(model, seeds, prefix, labels, given)
    stage = stage or ("renderer" if cfg.prefix_len else "prior")
    pick = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = [request.given.new_empty(0, cfg.target_len)]
    with ready(model, dtype) as network:
        for rows, count in passes(request, pass_size):
            u = image_uniforms(rows.seeds, stage, (num_steps, 2, cfg.target_len)).to(request.given.device)
            report = partial(tell, on_token, count)
            drawn.append(refine(network, rows, u, pick, cfg_scale, choice_temperature, report)[:count])
    return torch.cat(drawn)


def refine(
    model: SequenceModel,
    rows: Request,
    u: Tensor,
    pick: Callable[[Tensor, Tensor], Tensor],
    cfg_scale: float,
    choice_temperature: float,
    report: Callable[[Tensor], None],
) -> Tensor:
    """One pass over C images; u is (C, num_steps, 2, M): one uniform for the code, one for the confidence."""
    guided, num_steps, cfg = cfg_scale != 1, u.shape[1], model.cfg
    how = conditions(model, rows, guided)
    tokens = F.pad(rows.given, (0, cfg.target_len - rows.given.shape[1]), value=cfg.mask_token)  # (C, M)
    hidden = tokens == cfg.mask_token  # (C, M)
    unknown = hidden.sum(1)  # (C,)
    for step in range(num_steps):
        features = model.features(twice(tokens, guided), **how)  # (C, M, D)
        logits = model.head(features).float()  # (C, M, V)
        logits = guide(logits, cfg_scale) if guided else logits
        drawn = pick(logits.flatten(0, 1), u[:, step, 0].flatten()).view_as(tokens)
        tokens = torch.where(hidden, drawn, tokens)
        before, ratio = hidden, (step + 1) / num_steps
        if step + 1 < num_steps:
            chosen = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]  # (C, M) log-probability, unfiltered
            noise = gumbel(u[:, step, 1]) * (choice_temperature * (1 - ratio))
            hidden = least_confident(chosen + noise, hidden, num_to_hide(unknown, hidden, ratio))
            tokens = tokens.masked_fill(hidden, cfg.mask_token)
        else:
            hidden = torch.zeros_like(hidden)
        report(before.sum(1) - hidden.sum(1))
    return tokens


def num_to_hide(unknown: Int64[Tensor, " C"], hidden: Bool[Tensor, "C M"], ratio: float) -> Int64[Tensor, " C"]:
    """floor(unknown cos(pi/2 ratio)), at least 1, at most one fewer than are hidden now; 0 where nothing is hidden."""
    now = hidden.sum(1)
    count = (unknown.double() * math.cos(math.pi / 2 * ratio)).floor().long()
    return torch.minimum(count, now - 1).clamp_min(1).minimum(now)


def least_confident(
    confidence: Float[Tensor, "C M"], hidden: Bool[Tensor, "C M"], count: Int64[Tensor, " C"]
) -> Bool[Tensor, "C M"]:
    """Which tokens to hide again: the `count` least confident of those drawn in this step."""
    order = confidence.masked_fill(~hidden, float("inf")).argsort(dim=1, stable=True)
    return order.argsort(1) < count[:, None]


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel noise, -log(-log u)."""
    return -torch.log(-torch.log(u.clamp_min(torch.finfo(u.dtype).tiny)))


def tell(on_token: Callable[[int], None] | None, count: int, fixed: Tensor) -> None:
    """Report the tokens fixed in the first `count` rows; the others only fill the pass."""
    if on_token:
        on_token(int(fixed[:count].sum()))
