"""DINO: self-distillation without labels (Caron et al. 2021). Figure 4a's G+D: global, discriminative.

A student's class token of one view is to say what its teacher, a running average of it, says of another view of the
same image. The teacher's outputs are centred (no prototype wins everywhere) and sharpened (they are not uniform).

    L = mean over views x of the teacher and x' != x of the student of  H(P_t(x), P_s(x'))     (Eqs. 2 and 3)
    H(a, b) = -a . log b,  P_s = softmax(g_s / tau_s),  P_t = softmax((g_t - c) / tau_t)       (Eq. 1)
    c <- m c + (1 - m) mean(g_t)                                                               (Eq. 4)

Shapes: B images, D embed_dim, K num_prototypes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from digit.models.vit import ViT
from digit.training.log import Metrics
from digit.training.ssl.method import Method, embed, encode, follow, initialise, momentum_at, multilayer, require, twin
from digit.training.ssl.views import ViewConfig, random_views


@dataclass(frozen=True, kw_only=True)
class DINOConfig:
    """Head, temperatures, momentum and views (paper: 65536 prototypes, head 2048 wide, momentum 0.996)."""

    num_prototypes: int = 1024
    """K: outputs of the head, over which student and teacher spread their probability."""
    hidden_dim: int = 512
    """Width of the head's inner layers."""
    bottleneck_dim: int = 256
    """Channels, of length 1, that meet the prototypes."""
    student_temperature: float = 0.1
    """tau_s."""
    teacher_temperature: float = 0.04
    """tau_t: lower is sharper."""
    centre_momentum: float = 0.9
    """m of the centre."""
    momentum: float = 0.99
    """Momentum of the teacher at the first step; 1 at the last."""
    num_local_views: int = 0
    """Small views that the student sees beside the two large ones (multi-crop; paper: 10); each costs a quarter."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Area of a small view as a fraction of the image; its side is half a large view's."""
    views: ViewConfig = field(default_factory=lambda: ViewConfig(scale=(0.25, 1.0)))
    """The two large views; colours and blur of the small ones too."""

    def __post_init__(self) -> None:
        for name in ("num_prototypes", "hidden_dim", "bottleneck_dim"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "student_temperature", self.student_temperature > 0, "above 0")
        require(self, "teacher_temperature", self.teacher_temperature > 0, "above 0")
        require(self, "momentum", 0 <= self.momentum < 1, "0 or below 1, such as 0.99")
        require(self, "centre_momentum", 0 <= self.centre_momentum < 1, "0 or below 1, such as 0.9")
        require(self, "num_local_views", self.num_local_views >= 0, "0 or more")


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
        wanted = [(self.size, large)] * 2 + [(half, small)] * self.cfg.num_local_views
        return [random_views(images, size, cfg, generator) for size, cfg in wanted]

    def loss(self, views: list[Tensor], generator: torch.Generator, progress: float) -> tuple[Tensor, Metrics]:
        large, small = torch.cat(views[:2]), views[2:]  # (2 B, 3, S, S)
        with torch.no_grad():
            outputs = self.teacher_head(encode(self.teacher, embed(self.teacher, large))[0])
        targets = self.sharpen(outputs, self.centre)  # (2 B, K)
        firsts = [*encode(self.vit, embed(self.vit, large))[0].chunk(2), *self.small_views(small)]
        return self.distil(targets.chunk(2), [self.head(x) for x in firsts]), {"prototypes": used(targets)}

    def small_views(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """The student's class tokens (B, D) of the small views."""
        return encode(self.vit, embed(self.vit, torch.cat(views)))[0].chunk(len(views)) if views else ()

    @torch.no_grad()
    def sharpen(self, outputs: Float[Tensor, "B K"], centre: Float[Tensor, " K"]) -> Float[Tensor, "B K"]:
        """P_t of the teacher's outputs; then moves `centre` towards their mean; the first batch sets it."""
        outputs = outputs.float()
        # a centre at zero would have all images share one answer for the first tens of steps
        centre.copy_(torch.where(centre.any(), centre, outputs.mean(0)))
        targets = ((outputs - centre) / self.cfg.teacher_temperature).softmax(dim=-1)
        centre.lerp_(outputs.mean(0), 1 - self.cfg.centre_momentum)
        return targets

    def distil(self, targets: Sequence[Tensor], students: Sequence[Tensor]) -> Tensor:
        """Eq. 3: the mean cross-entropy over pairs of different views."""
        pairs = [(t, s) for i, t in enumerate(targets) for j, s in enumerate(students) if i != j]
        return torch.stack([self.cross_entropy(t, s).mean() for t, s in pairs]).mean()

    def cross_entropy(self, targets: Float[Tensor, "*B K"], outputs: Float[Tensor, "*B K"]) -> Float[Tensor, "*B"]:
        """H(P_t, P_s) of each row."""
        return -(targets * (outputs.float() / self.cfg.student_temperature).log_softmax(dim=-1)).sum(-1)

    def end_step(self, progress: float) -> None:
        momentum = momentum_at(progress, self.cfg.momentum)
        follow(self.teacher, self.vit, momentum)
        follow(self.teacher_head, self.head, momentum)


def used(targets: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """Prototypes in use, exp(H(mean P_t)): 1 says that the teacher has collapsed to one answer."""
    mean = targets.mean(0)
    return torch.special.entr(mean).sum().exp()
