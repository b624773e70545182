"""How the layers of a convolutional VQ tokenizer are put together: one description for every published family.

Sizes (resolution, channels, levels, codes) are in `VQGANConfig`; this says which layers there are and what they
compute. `MAGE`, the default of every field, is the layout of MAGE's VQGAN and of all that DiGIT trains. The others are
read from other projects' files (`convert/vq_formats.py`) and are not trained here.

Sources: VQGAN (Esser et al. 2021), MaskGIT (Chang et al. 2022), LlamaGen (Sun et al. 2024), aMUSEd (Patil et al. 2024),
IBQ (Shi et al. 2024), Open-MAGVIT2 (Luo et al. 2024).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from digit.errors import DigitError
from digit.runtime.settings import check_settings, within

QuantizerKind = Literal["nearest", "cosine", "dot", "logits", "signs"]


@dataclass(frozen=True, kw_only=True)
class VQLayout:
    """The layers of encoder, quantiser and decoder."""

    signed_pixels: bool = False
    """Whether the networks see pixels in [-1, 1]; else in [0, 1]."""
    bias: bool = False
    """Whether the blocks' convolutions and the encoder's first one have a bias."""
    shortcut: Literal["branch", "input"] = "branch"
    """What the 1x1 shortcut of a block that changes the channels reads: the residual branch's output, or its input."""
    downsample: Literal["average", "corner", "strided"] = "average"
    """2x2 average pooling; a strided 3x3 convolution padded by one row below and one column to the right; or one padded
    on all sides."""
    upsample: Literal["nearest", "depth_to_space"] = "nearest"
    """Nearest pixels, then a 3x3 convolution; or a 3x3 convolution to 4 C channels, which become 2 x 2 pixels."""
    encoder_kernel: Literal[1, 3] = 1
    """Side of the kernel of the encoder's last convolution."""
    mid_blocks: int = within("[1, 64]", 2)
    """Residual blocks between the deepest levels of encoder and decoder, in each of them."""
    mid_attention: bool = False
    """Whether attention follows the first of these blocks."""
    attention_levels: tuple[int, ...] = ()
    """Levels (0 is the full resolution) with attention after each of their blocks."""
    extra_decoder_blocks: int = within("[0, 8]", 0)
    """Blocks that a level of the decoder has more than one of the encoder."""
    quant_channels: int = within("[0, 65536]", 0)
    """Channels between the encoder and a 1x1 convolution to the code's, and back in the decoder; 0 for no such ones."""
    adaptive_norm: bool = False
    """Whether each level of the decoder begins with a norm whose scale and shift depend on the codes."""
    quantizer: QuantizerKind = "nearest"
    """How a code is chosen for features z: the nearest; the nearest by angle; the largest product z.c; the largest of a
    linear layer's outputs; or the signs of z, without a table."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))
        check_settings(self)

    def check(self, num_levels: int, z_channels: int, vocab_size: int) -> None:
        """Raise DigitError where the layout does not fit a network's sizes."""
        if beyond := [level for level in self.attention_levels if not 0 <= level < num_levels]:
            raise DigitError(f"attention_levels holds {beyond[0]}: the levels are 0 to {num_levels - 1}")
        if self.quantizer == "signs" and (z_channels > 62 or vocab_size != 2**z_channels):
            raise DigitError(f"{z_channels} signs are 2 ** {z_channels} codes, not {vocab_size}")

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from MAGE's layout."""
        values = {**asdict(self), "attention_levels": list(self.attention_levels)}
        return {field.name: values[field.name] for field in fields(self) if getattr(self, field.name) != field.default}


MAGE = VQLayout()
