"""A tiny ViT whose checkpoints the tests of foreign weights write, and what `read_vit` gives back of them."""

from pathlib import Path

import torch
from torch import Tensor

from digit.convert.vit_checkpoints import read_vit
from digit.models.vit import ViT, ViTConfig

CFG = ViTConfig(embed_dim=24, depth=2, num_heads=3, patch_size=4, num_registers=0, layer_scale=False, table_side=5)


def vit_state(scale: float = 1.0) -> dict[str, Tensor]:
    """State dict of the tiny ViT: the same numbers at every call, times `scale`."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in ViT(CFG).state_dict().items()}
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a prefix in front of each name."""
    return {prefix + name: tensor for name, tensor in state.items()}


def scale_read(path: str | Path, family: str = "dino") -> float:
    """Reads a checkpoint of the tiny ViT; the `scale` of the weights that were taken, which must be one of them all."""
    read, whole = read_vit(path, family, CFG), vit_state()
    assert read.keys() == whole.keys()
    scale = float(read["norm.bias"][0] / whole["norm.bias"][0])
    for name, tensor in whole.items():
        torch.testing.assert_close(read[name], scale * tensor, rtol=1e-2, atol=1e-2)
    return round(scale, 2)
