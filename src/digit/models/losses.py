"""Projection to logits fused with label-smoothed cross-entropy, without float32 copies of all logits.

Shapes: N positions, D width, V codes; R positions of one chunk. Keeps one
(N, V) array, in the type of the matrix products: the logits, overwritten by their gradient. torch's separate functions
keep five, most of them float32; with the 8192 codes of a large VQGAN on CPU they took a third of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_CHUNK, GPU_CHUNK = 2**19, 2**26  # logits per chunk; on CPU a chunk fits into the cache


def linear_cross_entropy(
    features: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    target: Int64[Tensor, " N"],
    label_smoothing: float = 0.0,
    counted: Bool[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Mean smoothed cross-entropy of the logits `features @ weight.T`, in float32, and its metrics.

    loss = (1 - eps) nll + eps mean_v(-log p_v), torch's definition. fairseq spreads eps over the V - 1 other codes (and
    over its special symbols), so that its eps is this one times (V - 1) / V, too small a difference for a setting.

    counted: the positions whose mean is taken, all by default. Their number need not be known to the host: to pick them
    out before would make it wait for a GPU.

    Under autocast the products are in autocast's type. The gradient itself cannot be differentiated. Metrics are
    detached scalars: nll (nats per token, without smoothing), perplexity, accuracy.
    """
    with torch.no_grad():
        dtype = (features[:1] @ weight[:1].t()).dtype  # type of products, under autocast too
    features, weight = features.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad):
        loss, nll, accuracy = _LinearCrossEntropy.apply(features, weight, target, label_smoothing, counted)
    else:
        rows = _chunk_rows(weight)
        chunks = zip(features.split(rows), target.split(rows), strict=True)
        loss, nll, accuracy = _means([_score(x @ weight.t(), wanted) for x, wanted in chunks], label_smoothing, counted)
    return loss, {"nll": nll, "perplexity": nll.exp(), "accuracy": accuracy}


class _LinearCrossEntropy(torch.autograd.Function):
    """(loss, nll, accuracy) of features (N, D) and weight (V, D) of one type; only the loss has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, target: Tensor, label_smoothing: float, counted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, rows = features @ weight.t(), _chunk_rows(weight)  # (N, V)
        chunks = zip(logits.split(rows), target.split(rows), strict=True)
        scores = [_score(z, wanted, label_smoothing) for z, wanted in chunks]
        loss, nll, accuracy = _means(scores, label_smoothing, counted)
        ctx.save_for_backward(features, weight, logits, counted)  # the logits are now overwritten by their gradient
        ctx.mark_non_differentiable(nll, accuracy)
        return loss, nll, accuracy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch annotates once_differentiable without the name ctx
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor, Tensor, None, None, None]:
        features, weight, slopes, counted = ctx.saved_tensors
        scale = grad_outputs[0] / (len(features) if counted is None else counted.sum())
        if slopes.dtype == torch.float16:  # summed over all positions before it is scaled, a common code would overflow
            slopes, scale = slopes * scale, scale.new_ones(())
        to_features = (slopes @ weight).mul_(scale)  # the products are scaled: they are smaller than the (N, V) slopes
        if counted is not None:
            to_features, features = to_features.mul_(counted[:, None]), features * counted[:, None]
        return to_features, (slopes.t() @ features).mul_(scale), None, None, None


def _chunk_rows(weight: Tensor) -> int:
    return max(1, (CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // len(weight))


def _score(
    logits: Float[Tensor, "R V"], target: Int64[Tensor, " R"], slopes: float | None = None
) -> Float[Tensor, "3 R"]:
    """(3, R) float32: nll, mean_v(-log p_v), whether the target is the most likely code.

    slopes: if given, the label smoothing eps; each row of `logits` is then overwritten by the gradient of its loss.
    """
    z, wanted = logits.float(), target[:, None]
    picked, top = z.gather(1, wanted)[:, 0], z.amax(1)
    p = z.softmax(1)
    normaliser = top - p.amax(1).log()  # log sum_v exp(z_v)
    metrics = torch.stack([normaliser - picked, normaliser - z.mean(1), (picked >= top).float()])
    if slopes is not None:
        # d loss / d z_v = p_v - eps / V - (1 - eps) [v = target]
        p.sub_(slopes / logits.shape[1]).scatter_add_(1, wanted, p.new_full((), slopes - 1.0).expand_as(wanted))
        logits.copy_(p)
    return metrics


def _means(chunks: list[Tensor], label_smoothing: float, counted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, nll and accuracy, each ()."""
    scores = torch.cat(chunks, 1)  # (3, N)
    nll, spread, accuracy = scores.mean(1) if counted is None else (scores * counted).sum(1) / counted.sum()
    return (1 - label_smoothing) * nll + label_smoothing * spread, nll, accuracy
