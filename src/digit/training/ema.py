"""An exponential moving average of a model's weights, swapped in for evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from digit.training.parallel import local


class EMA:
    """The moving average of `model`'s parameters; create it once the model is on its device.

        w_ema <- d w_ema + (1 - d) w,   d = min(decay, (1 + s) / (10 + s)) at step s

    The smaller decay of the first steps lets short runs forget the initial weights. Buffers are not averaged: the
    model's own are used.
    """

    def __init__(self, model: nn.Module, decay: float):
        assert 0 < decay < 1, decay
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        parameters = [p.detach() for p in model.parameters()]  # views, so they follow the optimizer's in-place steps
        self.whole_averages = [p.clone() for p in parameters]  # sharded over the ranks as the parameters are
        self.parameters, self.averages = [local(p) for p in parameters], [local(a) for a in self.whole_averages]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights; `step` is the number of earlier updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]  # torch's stubs do not export it

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model holds the average; afterwards it has its own weights again, bit for bit."""
        own = [p.clone() for p in self.parameters]
        self.copy_to_model()
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, own)  # pyright: ignore[reportPrivateImportUsage]  # torch's stubs do not export it

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Overwrite the model's weights with the average, permanently."""
        torch._foreach_copy_(self.parameters, self.averages)  # pyright: ignore[reportPrivateImportUsage]  # torch's stubs do not export it

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name; the model loads them with `load_state_dict(..., strict=False)`."""
        return dict(zip(self.names, self.whole_averages, strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load averages saved by `state_dict`; raises RuntimeError if names or shapes differ."""
        if set(state) != set(self.names):
            raise RuntimeError(f"saved averages and parameters differ in {sorted(set(state) ^ set(self.names))[:5]}")
        torch._foreach_copy_(self.averages, [local(state[name]).to(self.averages[0].device) for name in self.names])  # pyright: ignore[reportPrivateImportUsage]  # torch's stubs do not export it
