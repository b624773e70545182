"""DINO: self-distillation without labels (Caron et al. 2021). Figure 4a's G+D: global, discriminative.

The student's output for one view learns to match the output of its teacher, a moving average of the student, for
another view of the same image. Centring the teacher's outputs keeps one prototype from winning everywhere; sharpening
keeps them from being uniform.

    L = mean over views x of the teacher and x' != x of the student of  H(P_t(x), P_s(x'))     (Eqs. 2 and 3)
    H(a, b) = -a . log b,  P_s = softmax(g_s / tau_s),  P_t = softmax((g_t - c) / tau_t)       (Eq. 1)
    c <- m c + (1 - m) mean(g_t)                                                               (Eq. 4)

Shapes: B images, D embed_dim, K num_prototypes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from digit.models.vit import ViT
from digit.runtime.settings import check_settings, within
from digit.training.log import Metrics
from digit.training.ssl.method import Method, embed, encode, follow, initialise, momentum_at, multilayer, require, twin
from digit.training.ssl.views import ViewConfig, random_views


@dataclass(frozen=True, kw_only=True)
class DINOConfig:
    """Head, temperatures, momentum and views (paper: 65536 prototypes, head 2048 wide, momentum 0.996)."""

    num_prototypes: int = within("[1, inf)", 1024)
    """K: the head's outputs, over which student and teacher give a probability distribution."""
    hidden_dim: int = within("[1, inf)", 512)
    """Width of the head's inner layers."""
    bottleneck_dim: int = within("[1, inf)", 256)
    """Width of the unit vectors that are compared with the prototypes."""
    student_temperature: float = within("(0, inf)", 0.1)
    """tau_s: temperature of the student's softmax."""
    teacher_temperature: float = within("(0, inf)", 0.04)
    """tau_t: temperature of the teacher's softmax; lower is sharper."""
    balance: Literal["centre", "sinkhorn"] = "centre"
    """How the teacher uses all prototypes: centre subtracts a moving average of its outputs (DINO); sinkhorn gives
    every prototype the same share of each batch (SwAV, Caron et al. 2020; DINOv2)."""
    centre_momentum: float = within("[0, 1)", 0.9)
    """m: momentum of the centre, a moving average of the teacher's outputs; unused by sinkhorn."""
    momentum: float = within("[0, 1)", 0.99)
    """Momentum of the teacher at the first step; it grows to 1 at the last."""
    num_local_views: int = within("[0, inf)", 0)
    """Small views for the student beside the two large ones (multi-crop; paper: 10); each costs a quarter as much."""
    local_scale: tuple[float, float] = within("(0, 1]", (0.05, 0.25))
    """Smallest and largest area of a small view, as fractions of the image. Its side is half a large view's."""
    views: ViewConfig = field(default_factory=lambda: ViewConfig(scale=(0.25, 1.0)))
    """Random large views; the small views share their colours and blur."""

    def __post_init__(self) -> None:
        check_settings(self, of=type(self).__name__.removesuffix("Config"))
        low, high = self.local_scale
        require(self, "local_scale", low <= high, "two fractions, the smaller first")


class PrototypeHead(nn.Module):
    """Three layers to a vector of length 1, then its cosine with each prototype: (..., D) -> (..., K)."""

    def __init__(self, dim: int, cfg: DINOConfig):
        super().__init__()
        self.layers = multilayer([dim, cfg.hidden_dim, cfg.hidden_dim, cfg.bottleneck_dim])
        self.prototypes = nn.Linear(cfg.bottleneck_dim, cfg.num_prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.layers(x), dim=-1), F.normalize(self.prototypes.weight, dim=1))


class DINO(Method):
    """The result is the teacher, as in the authors' release."""

    cfg: Any
    centre: Tensor

    def __init__(self, vit: ViT, cfg: DINOConfig):
        super().__init__(vit)
        self.cfg = cfg
        self.head = PrototypeHead(vit.dim, cfg)
        initialise(self, vit)
        self.teacher, self.teacher_head = twin(vit), twin(self.head)
        self.register_buffer("centre", torch.zeros(cfg.num_prototypes))

    @property
    def result(self) -> ViT:
        return self.teacher

    def views(self, images: Tensor, generator: torch.Generator) -> list[Tensor]:
        large, small = self.cfg.views, replace(self.cfg.views, scale=self.cfg.local_scale)
        patch = self.vit.cfg.patch_size
        half = max(patch, self.size // 2 // patch * patch)
        sizes = [(self.size, large)] * 2 + [(half, small)] * self.cfg.num_local_views
        return [random_views(images, size, cfg, generator) for size, cfg in sizes]

    def loss(self, views: list[Tensor], generator: torch.Generator, progress: float) -> tuple[Tensor, Metrics]:
        large, small = torch.cat(views[:2]), views[2:]  # (2 B, 3, S, S)
        with torch.no_grad():
            outputs = self.teacher_head(encode(self.teacher, embed(self.teacher, large))[0])
        targets = self.sharpen(outputs, self.centre)  # (2 B, K)
        firsts = [*encode(self.vit, embed(self.vit, large))[0].chunk(2), *self.small_views(small)]
        return self.distil(targets.chunk(2), [self.head(x) for x in firsts]), {"prototypes": used(targets)}

    def small_views(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """The student's class tokens (B, D) for each small view."""
        return encode(self.vit, embed(self.vit, torch.cat(views)))[0].chunk(len(views)) if views else ()

    @torch.no_grad()
    def sharpen(self, outputs: Float[Tensor, "B K"], centre: Float[Tensor, " K"]) -> Float[Tensor, "B K"]:
        """P_t of the teacher's outputs, Eq. 1; then moves `centre` by Eq. 4. The first batch sets it to its mean."""
        outputs = outputs.float()
        if self.cfg.balance == "sinkhorn":
            return sinkhorn(outputs / self.cfg.teacher_temperature)
        # with a centre of zero, all images would share one prototype for tens of steps
        centre.copy_(torch.where(centre.any(), centre, outputs.mean(0)))
        targets = ((outputs - centre) / self.cfg.teacher_temperature).softmax(dim=-1)
        centre.lerp_(outputs.mean(0), 1 - self.cfg.centre_momentum)
        return targets

    def distil(self, targets: Sequence[Tensor], students: Sequence[Tensor]) -> Tensor:
        """Eq. 3: the mean cross-entropy over pairs of different views."""
        pairs = [(t, s) for i, t in enumerate(targets) for j, s in enumerate(students) if i != j]
        return torch.stack([self.cross_entropy(t, s).mean() for t, s in pairs]).mean()

    def cross_entropy(self, targets: Float[Tensor, "*B K"], outputs: Float[Tensor, "*B K"]) -> Float[Tensor, "*B"]:
        """H(P_t, P_s) = -P_t . log P_s of each row."""
        return -(targets * (outputs.float() / self.cfg.student_temperature).log_softmax(dim=-1)).sum(-1)

    def end_step(self, progress: float) -> None:
        momentum = momentum_at(progress, self.cfg.momentum)
        follow(self.teacher, self.vit, momentum)
        follow(self.teacher_head, self.head, momentum)


def sinkhorn(logits: Float[Tensor, "B K"], rounds: int = 3) -> Float[Tensor, "B K"]:
    """Probabilities of each row by which every prototype gets about B / K in all (Caron et al. 2020, Sec. 3.1).

    Columns and rows are normalised in turn; the last are the rows, which sum to 1.
    """
    for _ in range(rounds):
        logits = (logits - logits.logsumexp(0)).log_softmax(dim=1)
    return logits.exp()


def used(targets: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """exp(H(mean P_t)): the effective number of prototypes in use; 1 means that the teacher has collapsed."""
    mean = targets.mean(0)
    return torch.special.entr(mean).sum().exp()
