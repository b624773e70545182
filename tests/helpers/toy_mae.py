"""A tiny ViT in the layout of MAE's released files, with random weights."""

from pathlib import Path

import torch

from digit.models.vit import ViT, ViTConfig
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_vit

TINY = ViTConfig(embed_dim=24, depth=4, num_heads=3, patch_size=4, layer_scale=False, table_side=4)


def save_tiny(folder: Path) -> Path:
    """Write the weights; returns the file."""
    net = ViT(TINY)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save({"model": net.state_dict()}, folder / "mae.pth")
    return folder / "mae.pth"


def tiny(weights: Path, **fields: object) -> FrozenEncoder:
    cfg = {"name": "mae_vitb16", "weights": str(weights), "input_size": 16} | fields
    return load_vit(EncoderConfig(**cfg), TINY)
