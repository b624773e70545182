"""Sampling settings of both stages (paper, A.3)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from digit.errors import DigitError
from digit.runtime.hardware import Precision
from digit.runtime.names import closest
from digit.runtime.scalars import as_int, as_number, shown
from digit.runtime.settings import check_settings, within

# The paper's filters (A.3), and where it is silent those of the released scripts: recipes and converted files read them
# here. The released MaskGIT decoding draws from all codes; a top-p of 0.8 belongs to the autoregressive renderer alone.
TOP_K, LARGE_TOP_K, CLASS_TOP_K = 200, 400, 300  # of a prior: base, large, class-conditional
TOP_P, MASKED_TOP_P = 0.8, 1.0  # of a renderer: autoregressive, masked
ARGUMENTS = ("num", "labels", "seed", "keep", "output")  # of the methods that take settings as further keywords
Order = Literal["confidence", "halton"]
CfgSchedule = Literal["constant", "linear", "cosine"]
T = TypeVar("T", bound="StageSampling | SamplingConfig")


@dataclass(frozen=True, kw_only=True)
class StageSampling:
    """Sampling settings of one stage."""

    temperature: float = within("[0, inf)", 1.0)
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = within("[0, inf)", 0)
    """Keep the k most likely tokens; 0 keeps all (paper, A.3: 200 base, 400 large for the prior; the released
    class-conditional script: 300)."""
    top_p: float = within("(0, 1]", 1.0)
    """Keep the most likely tokens up to this probability (paper, A.3: 0.8 for the autoregressive
    renderer; released MaskGIT decoding: 1)."""
    cfg_scale: float = within("[0, inf)", 1.0)
    """Classifier-free guidance; 1 is off, as in the paper. Needs a model trained with label or prefix dropout."""
    cfg_schedule: CfgSchedule = "constant"
    """How guidance grows over an image's tokens (over the steps of a masked model): constant; linear, from 1 at the
    first to cfg_scale at the last; cosine, the same along half a cosine, slower at first."""
    num_steps: int = within("[1, inf)", 8)
    """Iterations of a masked model (MaskGIT)."""
    order: Order = "confidence"
    """Which tokens a masked model decides first: confidence, the most likely ones, as in the paper; halton, in a fixed
    order that spreads over the picture (Besnier et al. 2025), without choice_temperature."""
    choice_temperature: float = within("[0, inf)", 4.5)
    """Gumbel noise on the confidence of a masked model, annealed to 0."""

    def __post_init__(self) -> None:
        for name in ("top_k", "num_steps"):
            object.__setattr__(self, name, as_int(name, getattr(self, name)))
        for name in ("temperature", "top_p", "cfg_scale", "choice_temperature"):
            object.__setattr__(self, name, as_number(name, getattr(self, name)))
        check_settings(self)


def released_prior(*, large: bool = False, labels: bool = False) -> StageSampling:
    """Stage 1 as the authors sample it: top-k 200 (base), 400 (large; both A.3), 300 (class-conditional script)."""
    return StageSampling(top_k=CLASS_TOP_K if labels else LARGE_TOP_K if large else TOP_K)


def released_renderer(*, masked: bool = False) -> StageSampling:
    """Stage 2 as the authors sample it: top-p 0.8 token by token (A.3); MaskGIT from all codes (released code)."""
    return StageSampling(top_p=MASKED_TOP_P if masked else TOP_P)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling settings of both stages, batch size and precision."""

    prior: StageSampling = field(default_factory=lambda: released_prior())
    """Stage 1."""
    renderer: StageSampling = field(default_factory=lambda: released_renderer())
    """Stage 2."""
    batch_size: int | None = within("[1, inf)", None)
    """Images sampled together; None takes up to 64 on a CPU and up to 128 on a GPU, as free memory allows. An image
    depends on its seed and label, not on the other images; another batch_size may round differently and so, rarely,
    change a token."""
    precision: Precision = "fp32"
    """fp32, or bf16: faster, but an image may then differ between machines. Without bf16 arithmetic it is fp32."""

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", as_int("batch_size", self.batch_size))
        for stage in ("prior", "renderer"):
            if not isinstance(value := getattr(self, stage), StageSampling):
                raise DigitError(f"{stage} is {shown(value)}: give a dictionary such as {{'top_k': 100}}")
        check_settings(self)


def with_changes(cfg: T, changes: Mapping[str, Any], group: str = "") -> T:
    """`cfg` with other values; a dictionary changes single settings of a stage.

    Raises DigitError for unknown names, with the closest one, and for values that a setting cannot have.
    """
    values: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in (field.name for field in fields(cfg)):
            raise DigitError(unknown_setting(cfg, f"{group}{name}"))
        inner = getattr(cfg, name)
        nested = isinstance(inner, StageSampling) and isinstance(value, Mapping)
        values[name] = with_changes(inner, value, f"{name}.") if nested else value
    try:
        return replace(cfg, **values)
    except DigitError as error:
        raise DigitError(f"{group}{error}") from error


def unknown_setting(cfg: "StageSampling | SamplingConfig", name: str) -> str:
    """The error for an unknown setting, with the settings that there are."""
    group, _, last = name.rpartition(".")
    known = [field.name for field in fields(cfg)]
    near = closest(last, known if group else [*known, *ARGUMENTS])
    if isinstance(cfg, SamplingConfig) and not near and closest(last, names := [f.name for f in fields(StageSampling)]):
        inner = closest(last, names)[0]
        return f"no setting named {name}: {inner} belongs to a stage, prior={{{inner!r}: ...}} or renderer={{...}}"
    hint = f"did you mean {group + '.' * bool(group)}{near[0]}? " if near else ""
    return f"no setting named {name}: {hint}the settings{f' of {group}' * bool(group)} are {', '.join(known)}"
