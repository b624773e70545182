"""What each model of a run is: one table, which recipes, training, planning and reproduction read.

A sequence model predicts one kind of tokens, its target, after another, its prefix. The paper's two stages and its
baselines differ in nothing else than a row of this table (paper, section 4.3; appendix A.3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from digit.errors import DigitError

Tokens = Literal["discriminative", "vq"]
RendererKind = Literal["ar", "masked", "pixels"]
Settings = Literal["prior", "renderer", "pixels"]


@dataclass(frozen=True, kw_only=True)
class Role:
    """One kind of model."""

    name: str
    """Its folder in a run, and its name on the command line."""
    target: Tokens | Literal["pixels"]
    """What it predicts: tokens, or the crop itself."""
    prefix: Tokens | None = None
    """Tokens that it sees whole, before the target."""
    kind: str = "next_token"
    """Name in `sampling.kinds.KINDS`: next_token, masked (MaskGIT), or pixels."""
    norm: Literal["post", "pre"] = "pre"
    """Where the LayerNorms stand (A.3: the prior post-norm, all others pre-norm)."""
    settings: Settings = "renderer"
    """Settings of the recipe that it takes: NAME, its size, and NAME_training."""
    labels: bool = True
    """Whether every class-conditional run gives it the label; a renderer gets it where `renderer.labels` is set."""
    replaces: tuple[str, ...] = ()
    """Models that it stands in for. It trains for as many FLOPs as they take together."""

    @property
    def tokens(self) -> tuple[Tokens, ...]:
        """Kinds of tokens that training reads."""
        return tuple(kind for kind in (self.prefix, self.target) if kind not in (None, "pixels"))


# vq_ar has the compute of both stages together; vq_ar_epochs has the paper's own 200 epochs (Table 3: 24.38)
ROLES = {
    role.name: role
    for role in (
        Role(name="prior", target="discriminative", norm="post", settings="prior"),
        Role(name="renderer", target="vq", prefix="discriminative", labels=False),
        Role(name="renderer_masked", target="vq", prefix="discriminative", kind="masked", labels=False),
        Role(
            name="renderer_pixels",
            target="pixels",
            prefix="discriminative",
            kind="pixels",
            settings="pixels",
            labels=False,
        ),
        Role(name="vq_ar", target="vq", replaces=("prior", "renderer")),
        Role(name="vq_ar_epochs", target="vq"),
        Role(name="vq_masked", target="vq", kind="masked", replaces=("prior", "renderer_masked")),
    )
}
# recipe.renderer_kind to the role
RENDERERS: dict[RendererKind, str] = {"ar": "renderer", "masked": "renderer_masked", "pixels": "renderer_pixels"}


def get_role(name: str) -> Role:
    """The role of this name. Raises DigitError that lists the names."""
    if name not in ROLES:
        raise DigitError(f"no model named {name}: choose one of {', '.join(ROLES)}")
    return ROLES[name]


def loss_arguments(role: Role, rows: Mapping[str, Tensor], *, labelled: bool) -> dict[str, Any]:
    """Rows of the token store, {"discriminative": (B, N), "vq": (B, M), "labels": (B,)}, as keywords of the loss.

    A role whose target is pixels also needs "pixels", (B, 3, H, W) uint8.
    """
    return {
        "target": rows[role.target],
        "prefix": None if role.prefix is None else rows[role.prefix],
        "labels": rows["labels"] if labelled else None,
    }
