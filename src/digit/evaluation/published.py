"""The networks of two published measures, with the resize of each: FD-DINOv2 (Stein et al. 2023) and CMMD's CLIP.

| name | network | images | published metric |
|---|---|---|---|
| dinov2 | DINOv2 ViT-L/14, class token | Pillow bicubic to 224 px, uint8, ImageNet's mean and deviation | fd_dinov2 |
| clip | CLIP ViT-L/14 at 336 px, projected | antialiased bicubic of floats, CLIP's mean and deviation | cmmd |

They are named so with the published size alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from digit.convert.clip import HOW_TO_GET, load_clip
from digit.errors import DigitError
from digit.evaluation.networks import Judge, Outputs
from digit.metrics.judge import JudgeNetwork
from digit.models.clip import ClipConfig, ClipVision
from digit.models.vit import SIZES
from digit.runtime.files import as_path, sha256_file
from digit.runtime.hardware import choose_device
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_encoder

PUBLISHED = ("dinov2", "clip")
DINO, DINO_SIZE = "dinov2_vitl14", 224
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class DinoJudge(Judge):
    """DINOv2 as dgm-eval runs it by default: torchvision's Resize and ToTensor on Pillow images."""

    def __init__(self, encoder: FrozenEncoder, path: Path):
        self.encoder, self.device = encoder, encoder.device
        whole = SIZES[DINO]
        own = encoder.net.cfg.embed_dim, encoder.net.cfg.depth, encoder.net.cfg.num_registers
        published = own == (whole.embed_dim, whole.depth, whole.num_registers)
        self.name = "dinov2" if published else f"dinov2_{own[0]}x{own[1]}"
        self._file = {"weights": path.name, "weights_sha256": sha256_file(path)}

    def _outputs(self, images: UInt8[Tensor, "B 3 H W"]) -> Outputs:
        pooled = self.encoder.pooled(pillow_resize(images, DINO_SIZE))
        return pooled, pooled.new_zeros(len(pooled), 0), pooled.new_zeros(len(pooled), 0)

    def metric(self, name: str) -> str:
        """Full name of a metric: fd -> fd_dinov2 and so on."""
        return f"{name}_{self.name}"

    def describe(self) -> dict[str, Any]:
        """Description for a results file."""
        resize = {"resize": "Pillow bicubic, uint8", "input_size": DINO_SIZE}
        return {"network": self.name} | self._file | resize | {"encoder": self.encoder.fingerprint}


class ClipJudge(Judge):
    """CLIP's image embeddings as CMMD's authors take them, before they are scaled to length 1."""

    def __init__(self, net: ClipVision, path: Path, device: torch.device):
        self.net, self.device = net.to(device), device
        cfg = net.cfg
        sizes = f"clip_{cfg.embed_dim}x{cfg.depth}_{cfg.patch_size}_{cfg.input_size}"
        self.name = "clip" if cfg == ClipConfig() else sizes
        self._file = {"weights": path.name, "weights_sha256": sha256_file(path)}

    def _outputs(self, images: UInt8[Tensor, "B 3 H W"]) -> Outputs:
        pooled = self.net(clip_input(images.to(self.device), self.net.cfg.input_size))
        return pooled, pooled.new_zeros(len(pooled), 0), pooled.new_zeros(len(pooled), 0)

    def metric(self, name: str) -> str:
        """Full name of a metric: cmmd, which was published on this network; fd -> fd_clip and so on."""
        return "cmmd" if (name, self.name) == ("cmmd", "clip") else f"{name}_{self.name}"

    def describe(self) -> dict[str, Any]:
        """Description for a results file."""
        resize = {"resize": "antialiased bicubic in floating point", "input_size": self.net.cfg.input_size}
        return {"network": self.name} | self._file | resize


def pillow_resize(images: UInt8[Tensor, "B 3 H W"], side: int) -> UInt8[Tensor, "B 3 S S"]:
    """Resize to (side, side) by Pillow's bicubic filter, with antialias and rounding to uint8."""
    if images.shape[-2:] == (side, side):
        return images
    pictures = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
    resized = [np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def clip_input(images: UInt8[Tensor, "B 3 H W"], side: int) -> Float[Tensor, "B 3 S S"]:
    """Bicubic in 0..1 with a = -0.5 and antialias, as jax.image.resize does by default; not clipped; normalised."""
    x = F.interpolate(images.float() / 255, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def load_published(name: str, weights: str | Path | None, device: str | torch.device | None = None) -> JudgeNetwork:
    """Load one of PUBLISHED from its released weights. Raises DigitError for a missing or wrong file."""
    device = choose_device(device)
    if name == "clip":
        if weights is None:
            raise DigitError(f"network clip needs its weights: give --weights FILE; {HOW_TO_GET}")
        return ClipJudge(load_clip(weights), as_path(weights), device)
    cfg = EncoderConfig(
        name=DINO,
        layer="pooled",
        input_size=DINO_SIZE,
        weights=None if weights is None else str(weights),
        position_interpolation="hub",
    )
    if weights is None:
        raise DigitError(
            "network dinov2 needs its weights: give --weights FILE, released as dinov2_vitl14_pretrain.pth"
        )
    return DinoJudge(load_encoder(cfg).to(device), as_path(weights))
