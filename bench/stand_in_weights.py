"""Writes stand-ins for the weights that the paper's experiments need: random numbers under the published names.

    python bench/stand_in_weights.py OUT --width 192 --depth 12 --vqgan_channels 32

OUT/dinov2_vitb14_reg4_pretrain.pth     DINOv2, with its 37 x 37 table of positions
OUT/mae_pretrain_vit_base.pth, OUT/vit-b-300ep.pth.tar, OUT/checkpoint_teacher.pth    MAE, MoCo v3 and iBOT (Figure 4a)
OUT/vqgan_jax_strongaug.ckpt            MAGE's VQGAN
OUT/pt_inception-2015-12-05.pth         FID's Inception network

--width and --depth cut the encoders, whose heads keep 64 channels; digit then needs `--encoder.sizes file`. Without
them every file has its published size (2 GB in all). The Inception network always has: FID's features cannot be cut.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.convert.inception import released_names
from digit.models.inception import InceptionV3
from digit.models.vit import SIZES, ViT
from digit.models.vqgan import VQGAN, VQGANConfig

CHANNELS_PER_HEAD = 64
State = dict[str, Tensor]


def under(prefix: str, state: State) -> State:
    """The tensors with a prefix in front of each name."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def dinov2(state: State, width: int) -> dict[str, Any]:
    return state | {"mask_token": torch.zeros(1, width)}


def mae(state: State, width: int) -> dict[str, Any]:
    return {"model": state | {"pos_embed": sines(width, math.isqrt(state["pos_embed"].shape[1]))}}


def mocov3(state: State, width: int) -> dict[str, Any]:
    """Encoder and momentum encoder with their heads, as a process of the authors' training saves them."""
    heads = {"head.0.weight": torch.zeros(8, width), "head.1.running_mean": torch.zeros(8)}
    both = under("module.base_encoder.", state | heads) | under("module.momentum_encoder.", state | heads)
    return {"epoch": 300, "arch": "vit_base", "state_dict": both | {"module.predictor.0.weight": torch.zeros(8, 8)}}


def ibot(state: State, width: int) -> dict[str, Any]:
    return {"state_dict": state | {"masked_embed": torch.zeros(1, width), "head.mlp.0.weight": torch.zeros(8, width)}}


@dataclass(frozen=True)
class EncoderFile:
    """One published checkpoint of an encoder."""

    file: str
    name: str  # as `--encoder.name` has it
    layout: Callable[[State, int], dict[str, Any]]


ENCODERS = (
    EncoderFile("dinov2_vitb14_reg4_pretrain.pth", "dinov2_vitb14_reg4", dinov2),
    EncoderFile("mae_pretrain_vit_base.pth", "mae_vitb16", mae),
    EncoderFile("vit-b-300ep.pth.tar", "mocov3_vitb16", mocov3),
    EncoderFile("checkpoint_teacher.pth", "ibot_vitb16", ibot),
)


def random_state(net: nn.Module) -> State:
    """Random weights of a net, for use: matrices that keep the scale of their input, norms near 1, LayerScales of 0.5.

    With a DINOv2's own initial LayerScales (1e-5) all patches would have nearly the features of their pixels.
    """
    state = {}
    for name, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            state[name] = tensor
        elif name.endswith(".gamma"):
            state[name] = torch.full_like(tensor, 0.5)
        elif tensor.ndim >= 2 and name.endswith("weight"):
            state[name] = torch.randn(tensor.shape) * tensor[0].numel() ** -0.5
        elif name.endswith("weight"):
            state[name] = 1 + 0.05 * torch.randn(tensor.shape)
        else:
            state[name] = 0.05 * torch.randn(tensor.shape)
    return state


def sines(width: int, side: int) -> Tensor:
    """A fixed table of positions of sines and cosines in two dimensions, (1, 1 + side^2, width), as MAE's."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = (grid.reshape(-1, 1) for grid in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    angles = [place * frequencies for place in (columns, rows)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)
    return torch.cat((torch.zeros(1, width), table))[None]


def write_encoders(out: Path, width: int | None, depth: int | None) -> None:
    """Writes the four encoders. A width is a multiple of 64; exits otherwise."""
    if width is not None and (width < CHANNELS_PER_HEAD or width % CHANNELS_PER_HEAD):
        sys.exit(f"--width is {width}: wanted a multiple of {CHANNELS_PER_HEAD}")
    for number, encoder in enumerate(ENCODERS):
        torch.manual_seed(number)
        cfg = SIZES[encoder.name]
        if width is not None:
            cfg = replace(cfg, embed_dim=width, num_heads=width // CHANNELS_PER_HEAD)
        cfg = replace(cfg, depth=depth or cfg.depth)
        torch.save(encoder.layout(random_state(ViT(cfg)), cfg.embed_dim), out / encoder.file)


def write_vqgan(out: Path, channels: int) -> None:
    """Writes the VQGAN. `channels` at full resolution (published: 128) are a multiple of 32; exits otherwise."""
    if channels < 32 or channels % 32:
        sys.exit(f"--vqgan_channels is {channels}: wanted a multiple of 32")
    torch.manual_seed(0)
    state = VQGAN(VQGANConfig(channels=channels)).state_dict()
    torch.save({"state_dict": state, "global_step": 0}, out / "vqgan_jax_strongaug.ckpt")


def write_inception(out: Path) -> None:
    """Writes the Inception network, scaled so that activations keep their size through all layers."""
    torch.manual_seed(0)
    state: State = {"fc.weight": torch.randn(1008, 2048) * 2048**-0.5, "fc.bias": torch.zeros(1008)}
    with torch.device("meta"):
        net = InceptionV3()
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            outputs, *inputs = module.weight.shape
            conv, weight, bias, mean, variance = released_names(name)
            state[conv] = torch.randn(outputs, *inputs) * (2 / math.prod(inputs)) ** 0.5
            state[weight], state[bias] = torch.ones(outputs), 0.1 * torch.randn(outputs)
            state[mean], state[variance] = 0.1 * torch.randn(outputs), 0.5 + torch.rand(outputs)
    torch.save(state, out / "pt_inception-2015-12-05.pth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="a folder; files of these names are replaced")
    parser.add_argument("--width", type=int, default=None, help="channels of the encoders (default: 768, as published)")
    parser.add_argument("--depth", type=int, default=None, help="blocks of the encoders (default: 12, as published)")
    parser.add_argument("--vqgan_channels", type=int, default=128, help="channels of the VQGAN at full resolution")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_encoders(out, args.width, args.depth)
    write_vqgan(out, args.vqgan_channels)
    write_inception(out)
    for path in sorted(out.iterdir()):
        sys.stdout.write(f"{path.stat().st_size / 1e6:8.1f} MB  {path}\n")


if __name__ == "__main__":
    main()
