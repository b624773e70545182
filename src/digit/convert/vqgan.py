"""Released VQGAN checkpoints (MAGE's layout, plain or inside the authors' renderer checkpoint) -> ours.

Both use the same names; this file reads the sizes off the shapes and accounts for every key.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.errors import DigitError, MismatchError
from digit.models.vqgan import VQGAN, VQGANConfig

PREFIX = "vqgan."  # inside the authors' fairseq checkpoints of the renderer


def infer_config(state: Mapping[str, Tensor], resolution: int = 256) -> VQGANConfig:
    """The sizes of a released VQGAN from its tensors' shapes; `resolution` is not in them (256 in the release)."""
    try:
        channels = state["encoder.conv_in.weight"].shape[0]
        num_levels = count_children(state, "encoder.down.")
        widths = [state[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(num_levels)]
        vocab_size, z_channels = state["quantize.embedding.weight"].shape
    except KeyError as error:
        raise DigitError(f"not a VQGAN in MAGE's layout: tensor {error} is missing; got {summary(state)}") from error
    return VQGANConfig(
        resolution=resolution,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=count_children(state, "encoder.down.0.block."),
        z_channels=z_channels,
        vocab_size=vocab_size,
    )


def count_children(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def summary(names: Any, limit: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def convert_state(state: Mapping[str, Tensor], resolution: int = 256) -> VQGAN:
    """A VQGAN from a released state dict. Raises MismatchError listing every missing and unexpected tensor."""
    config = infer_config(state, resolution)
    model = VQGAN(config)
    own = model.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or unexpected:
        raise MismatchError(
            f"VQGAN checkpoint does not fit MAGE's layout: missing [{summary(missing)}], "
            f"unexpected [{summary(unexpected)}]"
        )
    wrong = [f"{n} {tuple(state[n].shape)} (wanted {tuple(own[n].shape)})" for n in own if state[n].shape != own[n].shape]
    if wrong:
        raise MismatchError(f"VQGAN checkpoint has tensors of other shapes: {summary(wrong)}")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval()


def convert_vqgan(path: str | Path, resolution: int = 256) -> VQGAN:
    """Read `vqgan_jax_strongaug.ckpt` ({'state_dict': ...}) or a released renderer checkpoint that carries `vqgan.*`.

    Only tensors and an argparse namespace are unpickled. Returns the model in eval mode, float32.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DigitError(f"no such file: {path}") from error
    except Exception as error:  # torch.load raises many kinds on a damaged or unsafe pickle
        raise DigitError(f"{path} is no checkpoint that can be read safely: {str(error).splitlines()[0]}") from error
    return convert_state(find_state(loaded), resolution)


def find_state(loaded: Any) -> dict[str, Tensor]:
    """The VQGAN's tensors wherever a released file keeps them."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise DigitError(f"not a VQGAN checkpoint: wanted a dictionary of tensors, got {type(loaded).__name__}")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    carried = {name[len(PREFIX) :]: value for name, value in tensors.items() if name.startswith(PREFIX)}
    return carried or tensors
