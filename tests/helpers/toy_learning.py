"""A few updates of a small model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def learn(model: nn.Module, loss: Callable[[], Tensor], steps: int) -> list[float]:
    """The losses of so many updates by AdamW; the gradients of the last stay."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        found = loss()
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(found.item())
    return losses


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is missing or zero."""
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
