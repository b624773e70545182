"""Muon: makes the momentum of each matrix orthogonal before its step (Jordan et al. 2024); AdamW for the rest.

For short training: on tokens of rendered shapes, a renderer of four blocks reaches after 1,000 steps what AdamW reaches
after 2,000 or more (docs/results.md). The paper and the released code use Adam. torch.optim.Muon (torch 2.9 and later)
always computes in bfloat16 and takes fused q, k and v as one matrix; docs/libraries.md has the measurements.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from digit.runtime.hardware import multiplies_bf16

MOMENTUM = 0.95
# p(x) = a x + b x^3 + c x^5, steep at 0: a few iterations bring each singular value near 1 (Jordan et al. 2024)
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
ITERATIONS = 4


class Muon(torch.optim.AdamW):
    """Fused AdamW in which some matrices take Muon's step instead.

        m <- 0.95 m + 0.05 g,   w <- (1 - lr wd) w - lr sqrt(max(1, r / c)) orthogonal(0.05 g + 0.95 m)

    Args:
        matrices: (parameter, number of matrices (r, c) stacked in its rows): fused q, k and v are three.
        others: parameters that AdamW updates.
        learning_rate: of the matrices; a step has a spectral norm of about learning_rate sqrt(max(1, r / c)).
        settings: AdamW's lr, betas and weight_decay; the decay applies to the matrices too.
    """

    def __init__(
        self, matrices: Iterable[tuple[nn.Parameter, int]], others: Iterable[nn.Parameter], learning_rate: float,
        **settings: Any,
    ) -> None:  # fmt: skip
        matrices = list(matrices)
        groups = [{"params": list(others)}, {"params": [p for p, _ in matrices]}]
        super().__init__(groups, fused=True, **settings)
        self._step_supports_amp_scaling = False  # leaves unscaling and skipped steps to GradScaler
        self.param_groups[1]["pieces"] = [pieces for _, pieces in matrices]
        self.param_groups[1]["lr_scale"] = learning_rate / settings["lr"]  # read by set_lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the matrices, then the others. Sets the gradients of the matrices to None."""
        group = self.param_groups[1]
        for p, pieces in zip(group["params"], group["pieces"], strict=True):
            if p.grad is None:
                continue
            if not self.state[p]:  # AdamW's names: it expects them when a state is loaded
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
            momentum = self.state[p]["exp_avg"].lerp_(p.grad, 1 - MOMENTUM)
            ahead = p.grad.lerp(momentum, MOMENTUM)  # Nesterov's
            update = orthogonal(ahead.view(pieces, -1, p.shape[1])).reshape(p.shape)
            size = max(1.0, p.shape[0] / pieces / p.shape[1]) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)
            p.grad = None  # AdamW skips it
        super().step()


def orthogonal(matrices: Float[Tensor, "n r c"], iterations: int = ITERATIONS) -> Float[Tensor, "n r c"]:
    """About U V^T for each matrix U S V^T of (n, r, c): all but the smallest singular values become 0.3 to 1.2.

    Computes in bfloat16 where the hardware multiplies it, else in float32.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16() if multiplies_bf16(matrices.device) else matrices.float()
    x = x.transpose(1, 2) if tall else x
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp_min(1e-7).to(x.dtype)
    a, b, c = POLYNOMIAL
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)  # (n, r, r)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if tall else x).to(matrices.dtype)
