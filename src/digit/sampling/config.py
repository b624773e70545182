"""Sampling settings of both stages (paper, A.3)."""

from dataclasses import dataclass, field

from digit.errors import DigitError
from digit.runtime.hardware import Precision


@dataclass(frozen=True, kw_only=True)
class StageSampling:
    """Sampling settings of one stage."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all (paper, A.3: 200 base, 400 large for the prior)."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this probability (paper, A.3: 0.8 for the renderer)."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 is off, as in the paper. Needs a model trained with label or prefix dropout."""
    num_steps: int = 8
    """Iterations of a masked model (MaskGIT)."""
    choice_temperature: float = 4.5
    """Gumbel noise on the confidence of a masked model, annealed to 0."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling settings of both stages, batch size and precision."""

    prior: StageSampling = field(default_factory=lambda: StageSampling(top_k=200))
    """Stage 1."""
    renderer: StageSampling = field(default_factory=lambda: StageSampling(top_p=0.8))
    """Stage 2."""
    batch_size: int | None = None
    """Images sampled together; None takes up to 64 on a CPU and up to 128 on a GPU, as free memory allows. An image
    depends on its seed and label, not on the other images; another batch_size may round differently and so, rarely,
    change a token."""
    precision: Precision = "fp32"
    """fp32, or bf16 (faster; an image may then differ between machines)."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise DigitError(f"batch_size is {self.batch_size}: at least 1, or leave it out")
        if self.precision not in ("fp32", "bf16"):
            raise DigitError(f"precision is {self.precision!r}: choose fp32 or bf16")
