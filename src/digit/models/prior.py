"""Stage 1: the prior over discriminative tokens (paper, section 3.2; appendix A.3). Post-norm, next-token."""

from typing import Any

from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.transformer import size_config


def prior_config(
    size: str = "base", *, vocab_size: int = 8192, target_len: int = 256, num_classes: int = 0, **changes: Any
) -> SequenceConfig:
    """Configuration of a named size: base is 219M parameters at K = 8192, large 732M at K = 16000 (paper, Table 1).

    `changes` go to SequenceConfig. Raises DigitError on an unknown size.
    """
    sizes = dict(vocab_size=vocab_size, target_len=target_len, num_classes=num_classes, norm="post")
    return SequenceConfig(**(size_config(size) | sizes | changes))


def build_prior(size: str = "base", **settings: Any) -> SequenceModel:
    """A freshly initialised prior; settings as in `prior_config`."""
    return SequenceModel(prior_config(size, **settings))
