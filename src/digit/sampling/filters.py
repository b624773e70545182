"""Temperature, top-k and top-p on logits, guidance, and sampling that depends on an image's own uniforms alone.

Nothing here waits for the device, and no shape depends on values, so that a CUDA graph can record it.

Shapes: B rows, V codes. All in float32; sums of probabilities in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from digit.sampling.config import CfgSchedule

NEVER = float("-inf")


def filter_logits(
    logits: Float[Tensor, "B V"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "B V"]:
    """Divide by the temperature (above 0), then top-k, then top-p, as the released decoding does.

    top_k keeps the k largest logits (0, or k >= V, keeps all); top_p the smallest set of most likely codes whose
    probabilities sum to it, at least one. Codes whose logit equals the last one kept stay too; the others get -inf.
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    num = scaled.shape[-1]
    top_k = top_k if top_k < num else 0
    if top_k and top_p >= 1 and scaled.device.type != "cpu":  # on a GPU, a fraction of the time of a whole sort
        return scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], NEVER)
    if top_k or top_p < 1:
        scaled = scaled.masked_fill(scaled < keep_threshold(ascending(scaled), top_k, top_p), NEVER)
    return scaled


def keep_threshold(ordered: Float[Tensor, "B V"], top_k: int, top_p: float) -> Float[Tensor, "B 1"]:
    """The smallest logit that top-k and top-p keep, of logits in ascending order."""
    num = ordered.shape[-1]
    least = ordered[:, num - top_k, None] if top_k else ordered[:, :1]
    if top_p >= 1:
        return least
    kept = ordered.masked_fill(ordered < least, NEVER) if top_k else ordered
    mass = kept.softmax(-1, dtype=torch.float64).cumsum(-1)
    likelier = mass[:, -1:] - mass  # total probability of the codes after this one
    dropped = (likelier >= top_p).sum(-1, keepdim=True)  # codes at the start of the order; never the last code
    return ordered.gather(-1, dropped.clamp_max(num - 1))


def ascending(logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Each row's values in order. On CPU by NumPy, whose vectorised sort of values alone takes 5% of torch's time."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.detach().numpy(), axis=-1))
    return logits.sort(dim=-1).values


def guidance_scales(scale: float, schedule: CfgSchedule, num: int) -> Float[Tensor, " {num}"]:
    """The scale of guidance at each of `num` tokens or steps: 1 + (s - 1) w, with w from 0 to 1.

    w is 1 (constant), t (linear), or (1 - cos(pi t)) / 2 (cosine), t = (i + 1) / num. Weak guidance at the start keeps
    variety (Chang et al. 2023, section 2.7).
    """
    t = torch.arange(1, num + 1, dtype=torch.float64) / num
    weight = {"constant": torch.ones_like(t), "linear": t, "cosine": (1 - torch.cos(math.pi * t)) / 2}[schedule]
    return (1 + (scale - 1) * weight).float()


def guide(logits: Float[Tensor, "R ..."], scale: Tensor) -> Float[Tensor, "R//2 ..."]:
    """u + s (c - u) of the stacked [conditional c | unconditional u] (classifier-free guidance, Ho & Salimans 2022)."""
    conditional, unconditional = logits.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)


def sample_from_uniform(logits: Float[Tensor, "*B V"], u: Float64[Tensor, " *B"]) -> Int64[Tensor, " *B"]:
    """The code at which the cumulative probability passes u in [0, 1): inverse-CDF sampling.

    A row's code depends on its own logits and its own u; codes of probability 0 are never taken.
    """
    total = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (*B, V), no code of probability 0 raises it
    last = total[..., -1:]
    aim = torch.minimum(u[..., None] * last, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(total, aim, right=True)[..., 0]


def sample_filtered(
    logits: Float[Tensor, "B V"], u: Float64[Tensor, " B"], temperature: float, top_k: int, top_p: float
) -> Int64[Tensor, " B"]:
    """One code a row: the most likely at temperature 0, else by inverse CDF on the filtered logits."""
    if temperature == 0:
        return logits.argmax(-1)
    return sample_from_uniform(filter_logits(logits, temperature, top_k, top_p), u)


def image_uniforms(seeds: Sequence[int], stage: str, shape: tuple[int, ...]) -> Float64[Tensor, "B ..."]:
    """U[0, 1) for each image from a generator of its own, seeded by a hash of (image seed, stage).

    Philox rather than torch's generator, which on CPU keeps 32 bits of its seed: two of 50,000 images would share all
    their numbers with probability 0.25. The stage enters the hash so that prior and renderer get independent numbers.
    """
    rows = []
    for seed in seeds:
        digest = hashlib.blake2b(f"{stage}/{int(seed)}".encode(), digest_size=8).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        rows.append(generator.random(shape))
    return torch.from_numpy(np.stack(rows))
