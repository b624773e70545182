"""Stage 2 and the VQ-only baseline as masked-token models (MaskGIT, Chang et al. 2022; paper, section 4.3).

The renderer's backbone and layout without the causal mask; training hides a cosine-distributed share of the target.
"""

from typing import Any

from digit.models.renderer import renderer_config
from digit.models.sequence import SequenceConfig, SequenceModel


def masked_renderer_config(size: str = "base", **settings: Any) -> SequenceConfig:
    """As `renderer_config`, masked. `prefix_vocab_size=0, prefix_len=0` is the VQ-only MaskGIT."""
    return renderer_config(size, masked=True, **settings)


def build_masked_renderer(size: str = "base", **settings: Any) -> SequenceModel:
    """A freshly initialised masked renderer; settings as in `renderer_config`."""
    return SequenceModel(masked_renderer_config(size, **settings))
