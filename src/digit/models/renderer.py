"""Stage 2 and the VQ-only baseline, autoregressive (paper, section 4.3; appendix A.3). Pre-norm, next-token."""

from typing import Any

from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.transformer import size_config


def renderer_config(
    size: str = "base",
    *,
    vocab_size: int = 1024,
    target_len: int = 256,
    prefix_vocab_size: int = 8192,
    prefix_len: int = 256,
    **changes: Any,
) -> SequenceConfig:
    """VQ tokens after discriminative tokens. `prefix_vocab_size=0, prefix_len=0` is the VQ-only baseline.

    `changes` go to SequenceConfig. Raises DigitError on an unknown size.
    """
    sizes = dict(vocab_size=vocab_size, target_len=target_len, norm="pre")
    prefix = dict(prefix_vocab_size=prefix_vocab_size, prefix_len=prefix_len)
    return SequenceConfig(**(size_config(size) | sizes | prefix | changes))


def vq_baseline_config(
    size: str = "base", *, vocab_size: int = 1024, target_len: int = 256, **changes: Any
) -> SequenceConfig:
    """VQ tokens alone, next-token (the paper's VQGAN baseline)."""
    return renderer_config(
        size, vocab_size=vocab_size, target_len=target_len, prefix_vocab_size=0, prefix_len=0, **changes
    )


def build_renderer(size: str = "base", **settings: Any) -> SequenceModel:
    """A freshly initialised renderer; settings as in `renderer_config`."""
    return SequenceModel(renderer_config(size, **settings))
