"""Measures the cost of converting and sampling full-size stand-ins for the authors' base checkpoints.

    python bench/standin_release.py --out standin --num 4

Writes a prior (219 M parameters, with encoder and codebook) and a renderer (219 M, with encoder, codebook and VQGAN) in
the released formats with random weights, then runs `digit convert` and `digit sample` on them, each in a process of its
own, and prints time and peak memory (the resident set, mapped file pages included).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from digit.convert.fairseq import BLOCK, NUM_SPECIAL
from digit.models.sequence import SequenceConfig
from digit.models.vit import SIZES, ViT
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.runs.recipes import TokenSpace, digit_base

POSITIONS, CODES = 1026, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for about 4 GB of files")
    parser.add_argument("--num", type=int, default=4, help="images to sample")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "stage2.pt").exists():
        write(out)
    files = {name: (out / f"{name}.pt").stat().st_size / 1e9 for name in ("stage1", "stage2")}
    result = {"checkpoint_gb": {name: round(size, 3) for name, size in files.items()}}
    result["convert"] = measured(
        "convert", "--prior", out / "stage1.pt", "--renderer", out / "stage2.pt", "--renderer_kind", "ar",
        "--out", out / "pipeline",
    )  # fmt: skip
    sample = ("sample", "--from", out / "pipeline", "--num", args.num, "--precision", "bf16", "--out", out / "samples")
    result["sample"] = measured(*sample) | {"images": args.num}
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def measured(*command: object) -> dict[str, float]:
    """Seconds and peak gigabytes of one `digit` command."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "digit", *map(str, command)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"digit {command[0]} failed")
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": round(seconds, 1), "peak_gb": round(usage.ru_maxrss * unit / 1e9, 2)}


def write(out: Path) -> None:
    """Writes stage1.pt and stage2.pt."""
    torch.manual_seed(0)
    encoder = {f"pretrained_encoder.{n}": t for n, t in ViT(SIZES["dinov2_vitb14_reg4"]).state_dict().items()}
    encoder["pretrained_encoder.mask_token"] = torch.zeros(1, 768)
    shared = encoder | {"centroids": torch.randn(768, CODES)}
    shared["centroid_norm"] = shared["centroids"].square().sum(0, keepdim=True)
    tokens = {"discriminative": TokenSpace(CODES, 256), "vq": TokenSpace(1024, 256)}
    prior, renderer = (digit_base().sequence_config(name, tokens, num_classes=0) for name in ("prior", "renderer"))
    save(out / "stage1.pt", decoder(prior) | shared, prior)
    vqgan = {f"vqgan.{n}": t for n, t in VQGAN(VQGANConfig()).state_dict().items()}
    save(out / "stage2.pt", decoder(renderer) | shared | vqgan, renderer)


def save(path: Path, state: dict[str, Tensor], cfg: SequenceConfig) -> None:
    settings = {"model": {"_name": None, "decoder_attention_heads": cfg.num_heads}}
    torch.save({"args": None, "cfg": settings, "model": state, "last_optimizer_state": None}, path)


def decoder(cfg: SequenceConfig) -> dict[str, Tensor]:
    """Random tensors under the released names and in the released shapes."""
    width, hidden, symbols = cfg.embed_dim, cfg.mlp_dim, cfg.vocab_size + NUM_SPECIAL
    rows = symbols + (cfg.prefix_vocab_size + NUM_SPECIAL if cfg.prefix_len else cfg.num_classes)
    state = {
        "version": torch.tensor([3.0]),
        "embed_tokens.weight": random(rows, width),
        "embed_positions.weight": random(POSITIONS, width),
        "output_projection.weight": random(symbols, width),
    }
    if cfg.prefix_len:
        state["embed_positions_1.weight"] = random(POSITIONS, width)
    if cfg.norm == "pre":
        state |= {"layer_norm.weight": torch.ones(width), "layer_norm.bias": torch.zeros(width)}
    shapes = {"self_attn.out_proj": (width, width), "fc1": (hidden, width), "fc2": (width, hidden)}
    shapes |= {f"self_attn.{part}_proj": (width, width) for part in "qkv"}
    for layer in range(cfg.depth):
        for name in {*BLOCK, *shapes}:
            shape = shapes.get(name)
            weight = torch.ones(width) if shape is None else random(*shape)
            state[f"layers.{layer}.{name}.weight"] = weight
            state[f"layers.{layer}.{name}.bias"] = torch.zeros(len(weight))
    return {f"decoder.{name}": tensor for name, tensor in state.items()}


def random(*shape: int) -> Tensor:
    return torch.randn(shape) * shape[-1] ** -0.5


if __name__ == "__main__":
    main()
