"""Converts released VQGAN checkpoints in MAGE's layout, alone or inside the authors' renderer checkpoint.

Both use our names; this module infers the sizes from the shapes and accounts for every tensor.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.convert.reading import check_state, check_tensors, read_weights
from digit.convert.weight_sets import choose_set
from digit.errors import DigitError
from digit.models.vqgan import VQGAN, VQGANConfig

STEM = "encoder.conv_in.weight"
OTHER_PARTS = r"(decoder|pretrained_encoder)\..*|centroids|centroid_norm"  # beside vqgan.* in the authors' renderer


def convert_vqgan(path: str | Path, resolution: int = 256) -> VQGAN:
    """Reads `vqgan_jax_strongaug.ckpt` ({'state_dict': ...}) or a released renderer checkpoint with `vqgan.*`.

    Returns the model in eval mode, float32. Raises DigitError if the file is unreadable, holds more than tensors,
    or is not in MAGE's layout (listing missing and unexpected names).
    """
    return convert_state(find_state(read_weights(path), str(path)), resolution, str(path))


def convert_state(state: Mapping[str, Tensor], resolution: int = 256, source: str = "VQGAN") -> VQGAN:
    """Builds a VQGAN from a released state dict (names without `vqgan.`); `source` names it in errors."""
    with torch.device("meta"):
        model = VQGAN(infer_config(state, resolution, source))
    check_state(state, model, source)
    check_tensors(state, source)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.eval()


def infer_config(state: Mapping[str, Tensor], resolution: int = 256, source: str = "VQGAN") -> VQGANConfig:
    """Infers the sizes of a released VQGAN from its tensors' shapes, except `resolution` (256 in the release)."""
    try:
        channels = state["encoder.conv_in.weight"].shape[0]
        num_levels = count_children(state, "encoder.down.")
        widths = [state[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(num_levels)]
        vocab_size, z_channels = state["quantize.embedding.weight"].shape
    except KeyError as error:
        raise DigitError(
            f"{source} holds no VQGAN in MAGE's layout, it lacks {error}: give vqgan_jax_strongaug.ckpt, or a released "
            "renderer"
        ) from error
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


def find_state(loaded: Any, source: str) -> dict[str, Tensor]:
    """Finds the VQGAN's tensors in a released file; names without prefixes such as `vqgan.`."""
    return choose_set(loaded, STEM, source, known=OTHER_PARTS)
