"""The file formats of published VQ tokenizers: how each is recognised, and how its names become ours.

Our names are those of taming-transformers (`encoder.down.0.block.1.conv1.weight`) with `quant_conv` inside the encoder
and `post_quant_conv` inside the decoder. What shapes and names do not tell (pixel range, rounding, padding, how a code
is chosen) is a fact of the format. Sources: the projects' own code, read as documentation; the golden vectors that
`tests/parity` compares with.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from digit.errors import DigitError

Renames = tuple[tuple[str, str], ...]  # patterns of whole names, and what they become
FormatName = Literal["mage", "maskgit", "taming", "taming_gumbel", "ibq", "llamagen", "open_magvit2", "diffusers"]
TRAINING = r"loss\..*"  # discriminator and perceptual network, beside the weights in Lightning's files


@dataclass(frozen=True, kw_only=True)
class VQFormat:
    """One file format."""

    title: str
    """What it is called in messages."""
    marks: tuple[str, ...]
    """Names that every file of the format holds, and none of a format further up in `FORMATS`."""
    renames: Renames = ()
    """Patterns of names, and our names for them, tried in turn on each name."""
    deepest_first: bool = False
    """Whether the decoder counts its levels from the deepest one."""
    dropped: str = TRAINING
    """Pattern of the names that are no weights of encoder, decoder or quantiser."""
    rounding: Literal["nearest", "truncate"] = "truncate"
    """How its own code makes 8-bit pixels."""
    quant_conv: bool = True
    """Whether 1x1 convolutions stand around the quantiser."""
    layout: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `VQLayout` that the tensors do not tell."""


MAGE_LAYOUT = {"shortcut": "branch", "downsample": "average"}
TAMING_LAYOUT = {"signed_pixels": True, "shortcut": "input", "downsample": "corner"}

FORMATS: dict[FormatName, VQFormat] = {
    "llamagen": VQFormat(
        title="LlamaGen",
        marks=("encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"),
        renames=(
            (r"encoder\.conv_blocks\.(\d+)\.res\.(.*)", r"encoder.down.\1.block.\2"),
            (r"encoder\.conv_blocks\.(.*)", r"encoder.down.\1"),
            (r"decoder\.conv_blocks\.(\d+)\.res\.(.*)", r"decoder.up.\1.block.\2"),
            (r"decoder\.conv_blocks\.(.*)", r"decoder.up.\1"),
            (r"(encoder|decoder)\.mid\.0\.(.*)", r"\1.mid.block_1.\2"),
            (r"(encoder|decoder)\.mid\.1\.(.*)", r"\1.mid.attn_1.\2"),
            (r"(encoder|decoder)\.mid\.2\.(.*)", r"\1.mid.block_2.\2"),
        ),
        deepest_first=True,
        dropped=rf"{TRAINING}|quantize\.codebook_used",
        rounding="nearest",  # trunc(127.5 x + 128) of x in [-1, 1]
        layout=TAMING_LAYOUT | {"quantizer": "cosine"},
    ),
    "diffusers": VQFormat(
        title="diffusers' VQModel",
        marks=("encoder.down_blocks.0.resnets.0.conv1.weight", "quantize.embedding.weight"),
        renames=(
            (r"(encoder|decoder)\.mid_block\.resnets\.0\.(.*)", r"\1.mid.block_1.\2"),
            (r"(encoder|decoder)\.mid_block\.resnets\.1\.(.*)", r"\1.mid.block_2.\2"),
            (r"(encoder|decoder)\.mid_block\.attentions\.0\.(.*)", r"\1.mid.attn_1.\2"),
            (r"encoder\.down_blocks\.(\d+)\.resnets\.(.*)", r"encoder.down.\1.block.\2"),
            (r"encoder\.down_blocks\.(\d+)\.attentions\.(.*)", r"encoder.down.\1.attn.\2"),
            (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.*)", r"encoder.down.\1.downsample.\2"),
            (r"decoder\.up_blocks\.(\d+)\.resnets\.(.*)", r"decoder.up.\1.block.\2"),
            (r"decoder\.up_blocks\.(\d+)\.attentions\.(.*)", r"decoder.up.\1.attn.\2"),
            (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.*)", r"decoder.up.\1.upsample.\2"),
            (r"(.*)\.conv_shortcut\.(.*)", r"\1.nin_shortcut.\2"),
            (r"(encoder|decoder)\.conv_norm_out\.(.*)", r"\1.norm_out.\2"),
            (r"(.*)\.group_norm\.(.*)", r"\1.norm.\2"),
            (r"(.*)\.(?:to_([qkv])|(q)uery|(k)ey|(v)alue)\.(weight|bias)", r"\1.\2\3\4\5.\6"),
            (r"(.*)\.(?:to_out\.0|proj_attn)\.(.*)", r"\1.proj_out.\2"),
        ),
        deepest_first=True,
        rounding="nearest",
        layout={"shortcut": "input", "downsample": "corner"},
    ),
    "open_magvit2": VQFormat(
        title="Open-MAGVIT2 (lookup-free quantisation)",
        marks=("decoder.adaptive.0.gamma.weight", "encoder.down.0.block.0.conv1.weight"),
        renames=(
            (r"decoder\.adaptive\.(\d+)\.(.*)", r"decoder.up.\1.adaptive.\2"),
            (r"encoder\.down\.(\d+)\.downsample\.(weight|bias)", r"encoder.down.\1.downsample.conv.\2"),
            (r"decoder\.up\.(\d+)\.upsample\.conv1\.(.*)", r"decoder.up.\1.upsample.conv.\2"),
            (r"(encoder|decoder)\.mid_block\.(.*)", r"\1.mid.\2"),
        ),
        quant_conv=False,
        layout={
            "signed_pixels": True,
            "shortcut": "input",
            "downsample": "strided",
            "upsample": "depth_to_space",
            "adaptive_norm": True,
            "quantizer": "signs",
        },
    ),
    "taming_gumbel": VQFormat(
        title="taming-transformers' GumbelVQ",
        marks=("quantize.proj.weight", "quantize.embed.weight", "encoder.down.0.block.0.conv1.weight"),
        renames=((r"quantize\.embed\.weight", "quantize.embedding.weight"),),
        layout=TAMING_LAYOUT | {"quantizer": "logits"},
    ),
    "maskgit": VQFormat(
        title="MaskGIT's VQGAN",
        marks=("encoder.mid.0.norm1.weight", "encoder.down.0.block.0.conv1.weight", "quantize.embedding.weight"),
        renames=((r"decoder\.up\.(\d+)\.upsample_conv\.(.*)", r"decoder.up.\1.upsample.conv.\2"),),
        quant_conv=False,
        layout=MAGE_LAYOUT,
    ),
    "ibq": VQFormat(
        title="IBQ",
        marks=("encoder.conv_in.bias", "encoder.down.0.block.0.conv1.bias", "quantize.embedding.weight"),
        layout=TAMING_LAYOUT | {"quantizer": "dot"},
    ),
    "taming": VQFormat(
        title="taming-transformers' VQGAN",
        marks=("encoder.conv_in.bias", "encoder.down.0.block.0.conv1.bias", "quantize.embedding.weight"),
        layout=TAMING_LAYOUT,
    ),
    "mage": VQFormat(
        title="MAGE's VQGAN",
        marks=("encoder.conv_in.weight", "encoder.down.0.block.0.conv2.weight", "quantize.embedding.weight"),
        dropped=r"(?!)",
        quant_conv=False,
        layout=MAGE_LAYOUT,
    ),
}
EVERY_RENAME: Renames = (
    (r"quant_conv\.(.*)", r"encoder.quant_conv.\1"),
    (r"post_quant_conv\.(.*)", r"decoder.post_quant_conv.\1"),
)
COUNTED_FROM_ZERO = re.compile(r"(encoder|decoder)\.mid\.(\d+)\.(.*)")  # the middle's blocks; ours count from one
DECODER_LEVEL = re.compile(r"decoder\.up\.(\d+)\.(.*)")


def guess_format(state: Mapping[str, Tensor], averaged: bool) -> FormatName | None:
    """The format of a file's names; None if they are of none. `averaged`: whether averages of the weights are beside.

    IBQ's names are taming's. Its files hold averages of the weights, taming's none.
    """
    for name, form in FORMATS.items():
        if all(mark in state for mark in form.marks) and (name != "ibq" or averaged):
            return name
    return None


def our_names(state: Mapping[str, Tensor], name: FormatName, source: str) -> dict[str, Tensor]:
    """The tensors of a file of a format under our names, without those that are no weights.

    Raises DigitError where two tensors come to one name.
    """
    form = FORMATS[name]
    kept = {theirs: tensor for theirs, tensor in state.items() if not re.fullmatch(form.dropped, theirs)}
    renamed = {theirs: rename(theirs, form) for theirs in kept}
    if form.deepest_first:
        levels = [int(match[1]) for ours in renamed.values() if (match := DECODER_LEVEL.fullmatch(ours))]
        deepest = max(levels, default=0)
        renamed = {theirs: DECODER_LEVEL.sub(lambda m: f"decoder.up.{deepest - int(m[1])}.{m[2]}", ours)
                   for theirs, ours in renamed.items()}  # fmt: skip
    result: dict[str, Tensor] = {}
    for theirs, ours in renamed.items():
        if ours in result:
            raise DigitError(f"{source} holds {ours} twice, the second time as {theirs}: save one of the two")
        result[ours] = kept[theirs]
    return result


def rename(name: str, form: VQFormat) -> str:
    """Our name of a tensor."""
    for pattern, ours in (*form.renames, *EVERY_RENAME):
        name = re.sub(rf"\A(?:{pattern})\Z", ours, name)
    return COUNTED_FROM_ZERO.sub(lambda m: f"{m[1]}.mid.block_{int(m[2]) + 1}.{m[3]}", name)
