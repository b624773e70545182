"""MoCo v3: contrastive learning with a momentum encoder (Chen et al. 2021). Figure 4a's G+D: global, discriminative.

Two views of an image are each other's positives; the other images of the batch are the negatives.

    L = ctr(q_1, k_2) + ctr(q_2, k_1),  ctr(q, k) = -2 tau log( exp(q.k+ / tau) / sum_j exp(q.k_j / tau) )   (Eq. 1)

q comes from the encoder, the projection and the prediction head; k from momentum twins of the first two. Both have
length 1.

Shapes: B images, D embed_dim, d output_dim.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from digit.models.vit import ViT
from digit.runtime.settings import check_settings, within
from digit.training.log import Metrics
from digit.training.ssl.method import Method, embed, encode, follow, initialise, momentum_at, multilayer, twin
from digit.training.ssl.views import ViewConfig, random_views


@dataclass(frozen=True, kw_only=True)
class MoCoConfig:
    """Heads, temperature and momentum (paper: heads 4096 wide, 256 out, momentum 0.99, tau 0.2, batch 4096)."""

    temperature: float = within("(0, inf)", 0.2)
    """tau: a lower value puts more weight on the nearest negatives."""
    momentum: float = within("[0, 1)", 0.99)
    """Momentum of the twin at the first step; it grows to 1 at the last."""
    hidden_dim: int = within("[1, inf)", 512)
    """Width of the heads' inner layers."""
    output_dim: int = within("[1, inf)", 128)
    """Width of the vectors that are compared."""
    freeze_patch_embed: bool = True
    """Keep the patch projection at its random initialisation, which makes training stable (paper, section 4.2)."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """Random views of the images."""

    def __post_init__(self) -> None:
        check_settings(self, of="MoCo")


class MoCo(Method):
    """The result is the trained encoder, not its twin, as in the authors' release."""

    def __init__(self, vit: ViT, cfg: MoCoConfig):
        super().__init__(vit)
        self.cfg = cfg
        self.projector = multilayer([vit.dim, cfg.hidden_dim, cfg.hidden_dim, cfg.output_dim], norm=True)
        self.predictor = multilayer([cfg.output_dim, cfg.hidden_dim, cfg.output_dim], norm=True)
        initialise(self, vit)
        vit.patch_embed.requires_grad_(not cfg.freeze_patch_embed)
        self.twin_vit, self.twin_projector = twin(vit), twin(self.projector)

    def views(self, images: Tensor, generator: torch.Generator) -> list[Tensor]:
        return [random_views(images, self.size, self.cfg.views, generator) for _ in range(2)]

    def loss(self, views: list[Tensor], generator: torch.Generator, progress: float) -> tuple[Tensor, Metrics]:
        q = [self.predictor(self.projector(first)) for first in self.class_tokens(self.vit, views)]  # 2 x (B, d)
        with torch.no_grad():
            k = [self.twin_projector(first) for first in self.class_tokens(self.twin_vit, views)]
        losses, accuracies = zip(
            contrast(q[0].float(), k[1].float(), self.cfg.temperature),
            contrast(q[1].float(), k[0].float(), self.cfg.temperature),
            strict=True,
        )
        return losses[0] + losses[1], {"accuracy": (accuracies[0] + accuracies[1]) / 2}

    @staticmethod
    def class_tokens(vit: ViT, views: list[Tensor]) -> tuple[Tensor, ...]:
        return encode(vit, embed(vit, torch.cat(views)))[0].chunk(len(views))

    def end_step(self, progress: float) -> None:
        momentum = momentum_at(progress, self.cfg.momentum)
        follow(self.twin_vit, self.vit, momentum)
        follow(self.twin_projector, self.projector, momentum)


def contrast(
    q: Float[Tensor, "B d"], k: Float[Tensor, "B d"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """-2 tau mean_i log( exp(q_i.k_i / tau) / sum_j exp(q_i.k_j / tau) ), and the share of q_i nearest to their k_i."""
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature  # (B, B)
    positives = torch.arange(len(q), device=q.device)
    loss = 2 * temperature * F.cross_entropy(logits, positives)
    return loss, (logits.argmax(1) == positives).float().mean()
