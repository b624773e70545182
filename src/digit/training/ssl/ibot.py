"""iBOT: DINO on the class token and on masked patches (Zhou et al. 2022). Figure 4a's P+D: patch level, discriminative.

The student sees images with some patches masked. Its output for a masked patch learns to match that of the teacher,
which sees the whole image. The class token learns across views as in DINO, with the same head.

    L = L_cls + L_mim,  L_mim = mean over images of  (sum_i m_i H(P_t(u_i), P_s(u^_i))) / sum_i m_i      (Eqs. 2 and 3)

Shapes: B images, N patches, M masked patches of the batch, D embed_dim, K num_prototypes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from digit.models.vit import ViT
from digit.runtime.settings import within
from digit.training.log import Metrics
from digit.training.ssl.dino import DINO, DINOConfig, used
from digit.training.ssl.method import embed, encode, require


@dataclass(frozen=True, kw_only=True)
class IBOTConfig(DINOConfig):
    """DINO's settings and those of the masks (paper: 8192 prototypes, half of the images unmasked)."""

    mask_ratio: tuple[float, float] = within("(0, 1)", (0.1, 0.5))
    """Smallest and largest fraction of the patches that are masked; each masked view gets a random one."""
    masked_views: float = within("(0, 1]", 0.5)
    """Fraction of the large views that have masked patches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.mask_ratio
        require(self, "mask_ratio", 0 < low <= high < 1, "two fractions between 0 and 1, the smaller first")


class IBOT(DINO):
    """The result is the teacher, as in the authors' release."""

    patch_centre: Tensor

    def __init__(self, vit: ViT, cfg: IBOTConfig):
        super().__init__(vit, cfg)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.dim))
        self.register_buffer("patch_centre", torch.zeros(cfg.num_prototypes))

    def loss(self, views: list[Tensor], generator: torch.Generator, progress: float) -> tuple[Tensor, Metrics]:
        large, small = torch.cat(views[:2]), views[2:]  # (2 B, 3, S, S)
        masked = random_masked(len(large), self.vit.cfg.table_side, self.cfg, generator)  # (2 B, N)
        places = masked.flatten().nonzero()[:, 0].to(large.device)  # (M,), found before the copy: a GPU need not wait
        masked = masked.to(large.device)
        class_targets, patch_targets = self.targets(large, places)
        first, patches = encode(self.vit, embed(self.vit, large, masked, self.mask_token))
        firsts = [*first.chunk(2), *self.small_views(small)]
        class_loss = self.distil(class_targets.chunk(2), [self.head(x) for x in firsts])
        patch_loss = self.patch_loss(patch_targets, self.head(patches.flatten(0, 1)[places]), masked, places)
        metrics: Metrics = {"class_loss": class_loss, "patch_loss": patch_loss}
        metrics |= {"prototypes": used(class_targets), "patch_prototypes": used(patch_targets)}
        return class_loss + patch_loss, metrics

    @torch.no_grad()
    def targets(self, images: Tensor, places: Int64[Tensor, " M"]) -> tuple[Tensor, Tensor]:
        """P_t of the class tokens (B, K) and of the patches at `places` of all (M, K); moves both centres.

        The patch centre is that of the masked patches, an unbiased sample, so the head skips the others.
        """
        first, patches = encode(self.teacher, embed(self.teacher, images))
        class_targets = self.sharpen(self.teacher_head(first), self.centre)
        return class_targets, self.sharpen(self.teacher_head(patches.flatten(0, 1)[places]), self.patch_centre)

    def patch_loss(
        self, targets: Tensor, outputs: Tensor, masked: Bool[Tensor, "B N"], places: Int64[Tensor, " M"]
    ) -> Tensor:
        """L_mim, Eq. 2: every masked image has the same weight, however many patches are masked."""
        counts = masked.sum(1)  # (B,)
        weights = (1 / counts)[:, None].expand_as(masked).flatten()[places]  # (M,)
        return (weights * self.cross_entropy(targets, outputs)).sum() / (counts > 0).sum()


def random_masked(num: int, side: int, cfg: IBOTConfig, generator: torch.Generator) -> Bool[Tensor, "B N"]:
    """Blob-shaped masks of round(ratio * N) patches for a fraction `masked_views` of the views, none for the others.

    The paper adds blocks (BEiT's) until enough patches are masked. Here the lowest values of smoothed noise are masked,
    so that the number is exact.
    """
    low, high = cfg.mask_ratio
    has_mask = torch.rand(num, generator=generator).argsort() < max(1, round(num * cfg.masked_views))
    ratio = low + (high - low) * torch.rand(num, generator=generator)
    noise = torch.rand(num, 1, side, side, generator=generator)
    smooth = F.avg_pool2d(noise, 3, stride=1, padding=1, count_include_pad=False).flatten(1)  # (B, N)
    rank = smooth.argsort(dim=1).argsort(dim=1)
    count = (ratio * side * side).round().clamp(1, side * side - 1)
    return (rank < count[:, None]) & has_mask[:, None]
