"""A judge of a few numbers, for tests of what is measured rather than of how."""

import torch
from torch import Tensor

from digit.metrics.judge import Judged


class ToyJudge:
    """Colour means and contrasts of both halves (12 features), brightness as logits of 5 classes (or none)."""

    name = "toy"

    def __init__(self, num_classes: int = 5):
        self.num_classes, self.seen = num_classes, 0

    def judge(self, images: Tensor) -> Judged:
        self.seen += len(images)
        halves = images.float().unflatten(2, (2, -1)) / 255  # (B, 3, 2, H / 2, W)
        pooled = torch.cat([halves.mean((3, 4)).flatten(1), halves.std((3, 4)).flatten(1)], 1)
        levels = torch.linspace(0, 1, max(self.num_classes, 1))[: self.num_classes]
        logits = -100 * (pooled[:, :1] - levels).square()
        return Judged(pooled=pooled, spatial=pooled, logits=logits)

    def metric(self, name: str) -> str:
        return f"{name}_toy"

    def describe(self) -> dict[str, object]:
        return {"network": self.name, "classes": self.num_classes}
