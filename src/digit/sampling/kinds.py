"""Every kind of model by name: its configuration, its network, and its sampler. Register a new kind here."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from digit.errors import DigitError
from digit.models.pixels import PixelConfig, PixelRenderer
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.runtime.hardware import Precision
from digit.sampling.config import StageSampling
from digit.sampling.masked import MaskedSampler
from digit.sampling.next_token import NextTokenSampler
from digit.sampling.pixels import PixelSampler
from digit.sampling.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """Configuration, network and sampler of one kind of model."""

    config: type[SequenceConfig]
    """Class of its configuration."""
    model: type[SequenceModel]
    """Its network: `model(cfg)`."""
    sampler: type[Sampler]
    """What samples it: `sampler(model, **settings of StageSampling that it names)`."""
    settings: tuple[str, ...]
    """Settings of StageSampling that the sampler takes."""


FILTERS = ("temperature", "top_k", "top_p", "cfg_scale", "cfg_schedule")
KINDS = {
    "next_token": ModelKind(config=SequenceConfig, model=SequenceModel, sampler=NextTokenSampler, settings=FILTERS),
    "masked": ModelKind(
        config=SequenceConfig,
        model=SequenceModel,
        sampler=MaskedSampler,
        settings=(*FILTERS, "num_steps", "choice_temperature", "order"),
    ),
    "pixels": ModelKind(config=PixelConfig, model=PixelRenderer, sampler=PixelSampler, settings=()),
}


def can_guide(cfg: SequenceConfig) -> bool:
    """Whether a model was trained with dropped labels or prefixes, and its kind samples with guidance."""
    dropped = bool(cfg.prefix_dropout or (cfg.label_dropout and cfg.num_classes))
    return dropped and "cfg_scale" in get_kind(cfg.kind).settings


def get_kind(name: Any) -> ModelKind:
    """The kind of this name. Raises DigitError that lists the names."""
    if not isinstance(name, str) or name not in KINDS:
        raise DigitError(f"no kind of model named {name!r}: this version knows {', '.join(KINDS)}")
    return KINDS[name]


def make_sampler(
    model: SequenceModel,
    cfg: StageSampling,
    *,
    precision: Precision = "fp32",
    micro_batch_size: int | None = None,
    stage: str | None = None,
) -> Sampler:
    """Prepare `model` for sampling with the settings `cfg`, once for many batches.

    Args:
        model: of any kind in KINDS.
        cfg: temperature, filters and guidance; for a masked model also its steps.
        precision: of the products; fp32 takes the model's own type.
        micro_batch_size: images computed together; None takes `sampling.requests.MICRO_BATCH_SIZE`.
        stage: name of the random stream; None takes "renderer" for a model with prefix, else "prior".

    Raises DigitError for settings out of range, and for guidance of a model that was trained without label or prefix
    dropout.
    """
    kind = get_kind(model.cfg.kind)
    settings = {name: value for name, value in asdict(cfg).items() if name in kind.settings}
    dtype = torch.bfloat16 if precision == "bf16" else None
    return kind.sampler(model, dtype=dtype, micro_batch_size=micro_batch_size, stage=stage, **settings)
