"""Sampling settings of both stages (paper, A.3)."""

from dataclasses import dataclass, field

from digit.runtime.hardware import Precision
from digit.runtime.settings import check_settings, within


@dataclass(frozen=True, kw_only=True)
class StageSampling:
    """Sampling settings of one stage."""

    temperature: float = within("[0, inf)", 1.0)
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = within("[0, inf)", 0)
    """Keep the k most likely tokens; 0 keeps all (paper, A.3: 200 base, 400 large for the prior)."""
    top_p: float = within("(0, 1]", 1.0)
    """Keep the most likely tokens up to this probability (paper, A.3: 0.8 for the renderer)."""
    cfg_scale: float = within("[0, inf)", 1.0)
    """Classifier-free guidance; 1 is off, as in the paper. Needs a model trained with label or prefix dropout."""
    num_steps: int = within("[1, inf)", 8)
    """Iterations of a masked model (MaskGIT)."""
    choice_temperature: float = within("[0, inf)", 4.5)
    """Gumbel noise on the confidence of a masked model, annealed to 0."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling settings of both stages, batch size and precision."""

    prior: StageSampling = field(default_factory=lambda: StageSampling(top_k=200))
    """Stage 1."""
    renderer: StageSampling = field(default_factory=lambda: StageSampling(top_p=0.8))
    """Stage 2."""
    batch_size: int | None = within("[1, inf)", None)
    """Images sampled together; None takes up to 64 on a CPU and up to 128 on a GPU, as free memory allows. An image
    depends on its seed and label, not on the other images; another batch_size may round differently and so, rarely,
    change a token."""
    precision: Precision = "fp32"
    """fp32, or bf16 (faster; an image may then differ between machines)."""

    def __post_init__(self) -> None:
        check_settings(self)
