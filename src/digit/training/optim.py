"""The optimizer, gradient clipping and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from digit.errors import DigitError
from digit.training.config import ENDING_SCHEDULES, Schedule, TrainConfig
from digit.training.muon import Muon
from digit.training.parallel import whole


def warmup(step: int, peak: float, warmup_steps: int, warmup_from: float) -> float:
    """lr(s) = lr_0 + (lr_peak - lr_0) s / W, from `warmup_from` at step 0 to `peak` at step `warmup_steps`."""
    return warmup_from + (peak - warmup_from) * step / warmup_steps


def inverse_sqrt(step: int, peak: float, warmup_steps: int = 0, warmup_from: float = 1e-7) -> float:
    """lr(s) = lr_peak sqrt(W / s) after the warm-up (paper A.3; fairseq's `inverse_sqrt`)."""
    if step < warmup_steps:
        return warmup(step, peak, warmup_steps, warmup_from)
    start = max(warmup_steps, 1)  # W, at least 1: warmup_steps may be 0
    return peak * math.sqrt(start / max(step, start))


def cosine(step: int, peak: float, num_steps: int, warmup_steps: int = 0, warmup_from: float = 1e-7) -> float:
    """lr(s) = lr_peak (1 + cos(pi (s - W) / (S - W))) / 2 after the warm-up, 0 at step S = `num_steps`.

    Loshchilov and Hutter 2017, Eq. 5, without restarts.
    """
    if step < warmup_steps:
        return warmup(step, peak, warmup_steps, warmup_from)
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(step: int, peak: float, warmup_steps: int = 0, warmup_from: float = 1e-7) -> float:
    """lr(s) = lr_peak after the warm-up."""
    return warmup(step, peak, warmup_steps, warmup_from) if step < warmup_steps else peak


SCHEDULES: dict[Schedule, Callable[..., float]] = {
    "inverse_sqrt": inverse_sqrt,
    "cosine": cosine,
    "constant": constant,
}


def learning_rate_at(step: int, cfg: TrainConfig) -> float:
    """The learning rate of the update after `step` finished ones, by the config's schedule."""
    settings: dict[str, Any] = {"warmup_steps": cfg.warmup_steps, "warmup_from": cfg.warmup_from}
    if cfg.schedule in ENDING_SCHEDULES:
        settings["num_steps"] = cfg.num_steps
    return SCHEDULES[cfg.schedule](step, cfg.learning_rate, **settings)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the learning rate of every parameter group to `lr`, times its `lr_scale` if it has one; returns `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def build_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """The config's optimizer over the model's trainable parameters.

    adamw: fused, one group, eps 1e-8. Weight decay applies to every parameter, including biases, norms and embeddings,
    as in fairseq, whose `adam` has decoupled decay like AdamW.
    muon: Muon for the model's `hidden_matrices()`, AdamW for the others. Raises DigitError if the model has none.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    settings: dict[str, Any] = dict(lr=cfg.learning_rate, betas=cfg.betas, weight_decay=cfg.weight_decay)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(trainable, fused=True, **settings)
    if not hasattr(model, "hidden_matrices"):
        raise DigitError(f"optimizer muon is for transformers, {type(model).__name__} is not one: choose adamw")
    hidden_matrices: Any = model.hidden_matrices
    matrices = [(p, parts) for p, parts in hidden_matrices() if p.requires_grad]
    in_muon = {id(p) for p, _ in matrices}
    return Muon(matrices, [p for p in trainable if id(p) not in in_muon], cfg.muon_learning_rate, **settings)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their joint L2 norm is at most `max_norm` (0 = no clipping); returns the norm before.

    The norm, (), stays on its device, so nothing waits for the GPU.
    """
    return whole(nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf, foreach=True))
