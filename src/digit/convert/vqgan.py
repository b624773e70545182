"""Converts published VQ tokenizers: MAGE's VQGAN (alone or inside the authors' renderer), and those of `vq_formats`.

Sizes and layout are read off names and shapes; every tensor is accounted for.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.convert.reading import check_state, check_tensors, listed, read_weights, split_place, unfit
from digit.convert.vq_formats import FORMATS, FormatName, VQFormat, guess_format, our_names
from digit.convert.weight_sets import choose_set
from digit.errors import DigitError
from digit.models.vq_layout import VQLayout
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.runtime.files import as_path, read_json

STEM = "encoder.conv_in.weight"
OTHER_PARTS = r"(decoder|pretrained_encoder)\..*|centroids|centroid_norm"  # beside vqgan.* in the authors' renderer
AVERAGE = "model_ema."  # in front of the moving averages in Lightning's files, whose names have lost their dots
COUNTERS = {"decay", "num_updates"}  # beside the averages
CONFIG, WEIGHTS = "config.json", (
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin", "model.safetensors", "pytorch_model.bin"
)  # fmt: skip
GROUPS = 32  # of every published tokenizer; diffusers' config.json says it


@dataclass(frozen=True)
class VQWeights:
    """The weights of a tokenizer as they are in a file, under our names."""

    format: FormatName
    state: dict[str, Tensor]
    source: str
    """The file, for errors."""
    num_groups: int = GROUPS
    notes: tuple[str, ...] = ()
    """What was assumed."""

    @property
    def form(self) -> VQFormat:
        """Facts of the format."""
        return FORMATS[self.format]

    def build(self, resolution: int = 256) -> VQGAN:
        """The networks for images of `resolution` pixels a side, in eval mode, float32."""
        with torch.device("meta"):
            model = VQGAN(infer_config(self, resolution), infer_layout(self))
        advice = "choose the name and size that these weights are of"
        check_state(self.state, model, self.source, advice if self.format == "mage" else f"{advice} (DiGIT's names)")
        check_tensors(self.state, self.source)
        model.load_state_dict({name: tensor.float() for name, tensor in self.state.items()}, assign=True)
        return model.eval()


def convert_vqgan(path: str | Path, resolution: int = 256, format: FormatName | None = None) -> VQGAN:
    """Reads a published VQ tokenizer: a file, FILE#PLACE (`weight_sets`), or a folder of diffusers' VQModel.

    Args:
        path: the file or folder. A released renderer checkpoint with `vqgan.*` is one, too.
        resolution: side in pixels of the images.
        format: the file's format, one of `FORMATS`; None recognises it by its names.

    Returns the model in eval mode, float32. Raises DigitError if the file is unreadable, holds more than tensors,
    or is in none of the formats (listing missing and unexpected names).
    """
    weights = read_vq(path, format)
    with unfit(str(path)):
        return weights.build(resolution)


def convert_state(state: Mapping[str, Tensor], resolution: int = 256, source: str = "VQGAN") -> VQGAN:
    """Builds a VQGAN from a released state dict (names without `vqgan.`); `source` names it in errors."""
    return recognise(state, source).build(resolution)


def read_vq(path: str | Path, format: FormatName | None = None) -> VQWeights:
    """Reads the weights of a published tokenizer under our names; arguments and errors as for `convert_vqgan`."""
    file, config = find_file(path)
    loaded, averaged = with_averages(read_weights(file), str(file))
    state = choose_set(loaded, STEM, str(file), known=OTHER_PARTS)
    with unfit(str(path)):
        weights = recognise(state, str(file), format, averaged)
        return weights if weights.format != "diffusers" else with_config(weights, config)


def recognise(
    state: Mapping[str, Tensor], source: str, format: FormatName | None = None, averaged: bool = False
) -> VQWeights:
    """The weights under our names; `averaged` says whether the file holds averages of the weights."""
    if format is not None and format not in FORMATS:
        raise DigitError(f"no VQGAN format {format}: choose one of {', '.join(FORMATS)}")
    found = format or guess_format(state, averaged)
    if found is None:
        lacking = next((mark for mark in FORMATS["mage"].marks if mark not in state), STEM)
        raise DigitError(
            f"{source} holds no VQGAN in MAGE's layout, it lacks {lacking}; nor is it in a format of "
            f"{', '.join(form.title for name, form in FORMATS.items() if name != 'mage')}"
        )
    if missing := [mark for mark in FORMATS[found].marks if mark not in state]:
        raise DigitError(f"{source} is not in {FORMATS[found].title}'s format, it lacks {listed(missing)}")
    notes = ()
    if found == "taming" and format is None and not any(name.startswith("loss.") for name in state):
        notes = (f"{source} has taming-transformers' names, which IBQ has, too: assumed taming (the nearest code); "
                 "else give --vqgan_format ibq",)  # fmt: skip
    ours = our_names(state, found, source)
    if found in ("diffusers", "taming_gumbel"):  # linear layers and 1x1 convolutions are the same products
        ours = {name: reshaped(name, tensor) for name, tensor in ours.items()}
    return VQWeights(found, ours, source, notes=notes)


def reshaped(name: str, tensor: Tensor) -> Tensor:
    """An attention's linear weight as that of a 1x1 convolution, and the Gumbel quantiser's convolution as linear."""
    if re.fullmatch(r".*\.(attn_1|attn\.\d+)\.(q|k|v|proj_out)\.weight", name) and tensor.ndim == 2:
        return tensor[:, :, None, None]
    if name == "quantize.proj.weight" and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor


def infer_config(weights: "VQWeights | Mapping[str, Tensor]", resolution: int = 256) -> VQGANConfig:
    """Infers the sizes of a tokenizer from its tensors' shapes, except `resolution` (256 in most releases)."""
    if not isinstance(weights, VQWeights):
        weights = recognise(weights, "VQGAN")
    state = weights.state
    names = [f"encoder.down.{level}.block.0.conv2.weight" for level in range(count_children(state, "encoder.down."))]
    if missing := [name for name in names if name not in state]:
        raise DigitError(f"{weights.source} does not fit: missing {listed(missing)}")
    widths = [state[name].shape[0] for name in names]
    channels = math.gcd(*widths)
    z_channels, vocab_size = code_shape(state)
    return VQGANConfig(
        resolution=resolution,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=count_children(state, "encoder.down.0.block."),
        z_channels=z_channels,
        vocab_size=vocab_size,
        num_groups=weights.num_groups,
    )


def code_shape(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(channels, number) of the codes; without a table each channel of the encoder's output is one bit."""
    if (table := state.get("quantize.embedding.weight")) is not None:
        return table.shape[1], table.shape[0]
    bits = state["encoder.conv_out.weight"].shape[0]
    if bits > 62:
        raise DigitError(f"codes of {bits} bits: at most 62 can be numbered")
    return bits, 2**bits


def infer_layout(weights: VQWeights) -> VQLayout:
    """The layout by the facts of the format and the names that are there."""
    state, form = weights.state, weights.form
    num_levels, out = count_children(state, "encoder.down."), state["encoder.conv_out.weight"]
    levels = [level for level in range(num_levels) if f"encoder.down.{level}.attn.0.q.weight" in state]
    extra = count_children(state, "decoder.up.0.block.") - count_children(state, "encoder.down.0.block.")
    middle = [name for name in children(state, "encoder.mid.") if name.startswith("block_")]
    return VQLayout(
        bias="encoder.down.0.block.0.conv1.bias" in state,
        encoder_kernel=3 if out.shape[-1] == 3 else 1,
        mid_blocks=len(middle),
        mid_attention="encoder.mid.attn_1.q.weight" in state,
        attention_levels=tuple(levels),
        extra_decoder_blocks=extra,
        quant_channels=out.shape[0] if form.quant_conv else 0,
        **form.layout,
    )


def children(state: Mapping[str, Tensor], prefix: str) -> set[str]:
    """The components of names that follow a prefix."""
    return {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}


def count_children(state: Mapping[str, Tensor], prefix: str) -> int:
    return len(children(state, prefix))


def find_state(loaded: Any, source: str) -> dict[str, Tensor]:
    """Finds the VQGAN's tensors in a released file; names without prefixes such as `vqgan.`."""
    return choose_set(loaded, STEM, source, known=OTHER_PARTS)


# -------------------------------------------------------------------- averages beside the weights


def with_averages(loaded: Any, source: str) -> tuple[Any, bool]:
    """The content of a file in which averages stand beside the weights as a set of their own; whether there were any.

    Lightning's files hold them as `model_ema.NAME` in the same dict, NAME being the weight's without its dots. The
    averages are what such a project evaluates, so that `choose_set` takes them, and says so.
    """
    if not isinstance(loaded, Mapping):
        return loaded, False
    raw, averages = split_averages(loaded, source)
    if averages:
        return {"weights": raw, "model_ema": averages}, True
    result, found = dict(loaded), False
    for key, value in loaded.items():
        raw, averages = split_averages(value, source)
        if averages:
            result |= {key: raw, "model_ema": averages}
            found = True
    return result, found


def split_averages(state: Any, source: str) -> tuple[Any, dict[str, Any]]:
    """(the other entries, the averages under the weights' names). Raises DigitError for an average of no weight."""
    if not isinstance(state, Mapping) or not any(isinstance(n, str) and n.startswith(AVERAGE) for n in state):
        return state, {}
    raw = {name: value for name, value in state.items() if not (isinstance(name, str) and name.startswith(AVERAGE))}
    full = {name.replace(".", ""): name for name in raw if isinstance(name, str)}
    averages, unknown = {}, []
    for name in state.keys() - raw.keys():
        short = name.removeprefix(AVERAGE)
        if short in full:
            averages[full[short]] = state[name]
        elif short not in COUNTERS:
            unknown.append(name)
    if unknown:
        raise DigitError(f"{source} does not fit: {listed(sorted(unknown))} are averages of no weight in it")
    order = {name: place for place, name in enumerate(raw)}
    return raw, dict(sorted(averages.items(), key=lambda item: order[item[0]]))


# -------------------------------------------------------------------- folders


def find_file(path: str | Path) -> tuple[str, Path | None]:
    """(the weights file, with its #PLACE; the config.json beside it) of a file or a folder.

    Raises DigitError for a folder without weights, or of one of our own VQGANs.
    """
    file, place = split_place(path)
    file = as_path(file)
    suffix = "" if place is None else f"#{place}"
    if not file.is_dir():
        config = file.parent / CONFIG
        return f"{file}{suffix}", config if config.is_file() else None
    if (file / "vqgan.json").is_file():
        raise DigitError(f"{file} is a VQGAN in DiGIT's own format already: digit fit takes it as it is")
    for folder in (file, file / "vqvae", file / "movq"):
        for name in WEIGHTS:
            if (folder / name).is_file():
                config = folder / CONFIG
                return f"{folder / name}{suffix}", config if config.is_file() else None
    if (file / ".metadata").is_file():
        return f"{file}{suffix}", None  # reading it says what to do with a sharded checkpoint
    raise DigitError(f"{file} holds none of {', '.join(WEIGHTS[:2])}, model.safetensors: give the weights file in it")


def with_config(weights: VQWeights, config: Path | None) -> VQWeights:
    """The weights with what diffusers' config.json says beside the tensors: the groups of the norms.

    Raises DigitError for a network that is built otherwise.
    """
    if config is None:
        note = f"{weights.source} has no {CONFIG} beside it: assumed {GROUPS} groups in each norm, and SiLU"
        return replace(weights, notes=(*weights.notes, note))
    about = read_json(config)
    if not isinstance(about, dict):
        raise DigitError(f"{config} is damaged: expected a JSON object")
    known: dict[str, tuple[Any, ...]] = {
        "_class_name": ("VQModel",),
        "act_fn": ("silu", "swish"),
        "norm_type": ("group",),
        "in_channels": (3,),
        "out_channels": (3,),
    }
    for name, choices in known.items():
        if name in about and about[name] not in choices:
            shown = json.dumps(about[name])[:80]
            raise DigitError(f"{config}: {name} is {shown}, and DiGIT reads {' or '.join(map(str, choices))} only")
    groups = about.get("norm_num_groups", GROUPS)
    if type(groups) is not int or not 1 <= groups <= 2**16:
        raise DigitError(f"{config}: norm_num_groups is {json.dumps(groups)[:80]}, wanted a whole number from 1")
    return replace(weights, num_groups=groups)
