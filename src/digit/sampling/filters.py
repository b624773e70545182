"""Temperature, top-k and top-p on logits, guidance, and draws that depend on an image's own uniforms alone.

Shapes: B rows, V codes. All in float32; sums of probabilities in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from digit.errors import DigitError

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

NEVER = float("-inf")


def check_filters(temperature: float, top_k: int, top_p: float) -> None:
    """Raise DigitError where a setting has no meaning."""
    if not 0 <= temperature < float("inf"):
        raise DigitError(f"temperature is {temperature}: choose 0 (most likely token) or above")
    if top_k < 0:
        raise DigitError(f"top_k is {top_k}: choose 0 (off) or above")
    if not 0 < top_p <= 1:
        raise DigitError(f"top_p is {top_p}: choose above 0, up to 1 (off)")


def keep_top_k(logits: Float[Tensor, "B V"], top_k: int) -> Float[Tensor, "B V"]:
    """Codes below the k-th largest logit become impossible; ties with it stay. 0, or k >= V, keeps all."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(top_k, dim=-1).values[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, NEVER)


def keep_top_p(logits: Float[Tensor, "B V"], top_p: float) -> Float[Tensor, "B V"]:
    """Keep the fewest likeliest codes whose probabilities reach `top_p`, at least one; the others get -inf."""
    if top_p >= 1:
        return logits
    ordered, codes = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1, dtype=torch.float64)
    before = probability.cumsum(-1) - probability  # of all likelier codes
    drop = before >= top_p
    drop[..., 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, codes, drop), NEVER)


def filter_logits(
    logits: Float[Tensor, "B V"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "B V"]:
    """Divide by the temperature (above 0), then top-k, then top-p, as the released decoding does."""
    return keep_top_p(keep_top_k(logits.float() / temperature, top_k), top_p)


def guide(logits: Float[Tensor, "2B V"], scale: float) -> Float[Tensor, "B V"]:
    """u + s (c - u) of the stacked [conditional c | unconditional u] (classifier-free guidance, Ho & Salimans 2022)."""
    conditional, unconditional = logits.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)


def sample_from_uniform(logits: Float[Tensor, "*B V"], u: Float64[Tensor, " *B"]) -> Int64[Tensor, " *B"]:
    """The code at which the cumulative probability passes u in [0, 1): inverse-CDF sampling.

    A row's code depends on its own logits and its own u; codes of probability 0 are never drawn.
    """
    total = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (*B, V), no code of probability 0 raises it
    last = total[..., -1:]
    aim = torch.minimum(u[..., None] * last, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(total, aim, right=True)[..., 0]


def draw(logits: Float[Tensor, "B V"], u: Tensor, temperature: float, top_k: int, top_p: float) -> Int64[Tensor, " B"]:
    """One code a row: the most likely at temperature 0, else by inverse CDF on the filtered logits."""
    if temperature == 0:
        return logits.argmax(-1)
    return sample_from_uniform(filter_logits(logits, temperature, top_k, top_p), u)


def image_uniforms(seeds: Sequence[int], stage: str, shape: tuple[int, ...]) -> Float64[Tensor, "B ..."]:
    """U[0, 1) for each image from a generator of its own, seeded by a hash of (image seed, stage).

    Philox, not torch's generator: on CPU that one keeps 32 bits of its seed, so that among 50,000 images two share all
    their numbers with probability 0.25. Stages differ, so that prior and renderer do not walk in step.
    """
    rows = []
    for seed in seeds:
        digest = hashlib.blake2b(f"{stage}/{int(seed)}".encode(), digest_size=8).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        rows.append(generator.random(shape))
    return torch.from_numpy(np.stack(rows))
