"""What the methods share: their interface, the ViT's parts, heads, and momentum networks.

Shapes: B images, S side of a view, g = S / patch_size, N = g * g patches, D embed_dim.
"""

import copy
import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.positions import sincos_2d
from digit.models.vit import ViT
from digit.training.log import Metrics

Module = TypeVar("Module", bound=nn.Module)


class Method(nn.Module, ABC):
    """A self-supervised method around a ViT. A resumed run needs its state dict and the optimizer's, nothing else."""

    def __init__(self, vit: ViT):
        super().__init__()
        self.vit = vit

    @property
    def size(self) -> int:
        """Side of the views in pixels, given by the ViT's position table."""
        return self.vit.cfg.table_side * self.vit.cfg.patch_size

    @property
    def result(self) -> ViT:
        """The encoder that training returns."""
        return self.vit

    @abstractmethod
    def views(self, images: UInt8[Tensor, "B 3 H H"], generator: torch.Generator) -> list[Tensor]:
        """One or more views of each image for `loss`, float32 in 0..1; the caller normalises them."""

    @abstractmethod
    def loss(self, views: list[Tensor], generator: torch.Generator, progress: float) -> tuple[Tensor, Metrics]:
        """The loss, (), and metrics for the log; `progress` goes from 0 to 1 over the run."""

    def end_step(self, progress: float) -> None:
        """Called after the optimizer step, to update momentum networks."""


def embed(
    vit: ViT, images: Tensor, masked: Bool[Tensor, "B N"] | None = None, mask_token: Tensor | None = None
) -> Float[Tensor, "B N D"]:
    """Patch embeddings with positions; `mask_token` (1, 1, D) replaces the content of `masked` patches."""
    side = images.shape[-1] // vit.cfg.patch_size
    patches = vit.patch_embed(images)  # (B, N, D)
    if masked is not None:
        assert mask_token is not None
        patches = torch.where(masked[..., None], mask_token.to(patches.dtype), patches)
    return patches + vit.positions(side, side)[:, 1:]


def encode(vit: ViT, patches: Float[Tensor, "B M D"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B M D"]]:
    """Run all or some embedded patches through the ViT: its class token and patches after the final norm."""
    start = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(patches), -1, -1)
    x = torch.cat((start, patches), dim=1)  # (B, 1 + M, D)
    for block in vit.blocks:
        x = block(x)
    x = vit.norm(x)
    return x[:, 0], x[:, 1:]


def initialise(module: nn.Module, vit: ViT | None = None) -> None:
    """Initialise: linear layers Xavier-uniform (as MAE and MoCo v3), tokens normal 0.02, positions sine and cosine."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    if vit is not None:
        nn.init.normal_(vit.cls_token, std=0.02)
        with torch.no_grad():
            vit.pos_embed.copy_(sine_positions(vit.cfg.table_side, vit.dim))


def sine_positions(side: int, dim: int) -> Float[Tensor, "1 T D"]:
    """sin(p / 10000^(4k/D)), cos(p / 10000^(4k/D)) of the row, then of the column, p; zeros for the class token, first
    (T = N + 1).

    Each of the four takes a quarter of the channels, k from 0 to D/4 - 1 (as MAE and MoCo v3).
    """
    frequencies = 10_000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    patches = sincos_2d(torch.arange(side), torch.arange(side), frequencies).flatten(1)  # (N, D)
    return torch.cat((torch.zeros(1, dim), patches))[None]


def multilayer(dims: list[int], norm: bool = False) -> nn.Sequential:
    """An MLP of widths `dims`: GELU between layers (DINO); with `norm`, batch norm and ReLU between layers and a batch
    norm without affine parameters at the end (MoCo v3)."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(dims)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(inputs, outputs, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(outputs, affine=not last))
        if not last:
            layers.append(nn.ReLU() if norm else nn.GELU())
    return nn.Sequential(*layers)


def twin(module: Module) -> Module:
    """A copy of a network without gradients."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """theta_t <- m theta_t + (1 - m) theta_s: move a twin towards its source (He et al. 2020, Eq. 2)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]  # torch's stubs do not export it


def momentum_at(progress: float, start: float) -> float:
    """m = 1 - (1 - m_0) (1 + cos(pi s / S)) / 2: a twin's momentum, from m_0 to 1 (Grill et al. 2020, C.1)."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


def require(cfg: Any, name: str, valid: bool, wanted: str) -> None:
    """Raise DigitError, naming the field of a method's config and the values `wanted`, unless its value is valid."""
    if not valid:
        method = type(cfg).__name__.removesuffix("Config")
        raise DigitError(f"{name} of {method} is {getattr(cfg, name)!r}: it must be {wanted}")
