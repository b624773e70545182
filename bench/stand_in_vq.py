"""Stand-ins for published VQ tokenizers: their files, names and sizes with random weights; and what converting costs.

    python bench/stand_in_vq.py --out standin_vq --names llamagen_vq16,taming_f16_16384 --images 4

Writes each file, runs `digit convert --vqgan FILE` in a process of its own, then encodes and decodes images in another,
and prints time and peak memory (the resident set, mapped file pages included).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from digit.models.vq_layout import VQLayout
from digit.models.vqgan import VQGAN, VQGANConfig

F16, F8 = (1, 1, 2, 2, 4), (1, 2, 2, 4)
COMMON = VQLayout(bias=True, shortcut="input", downsample="corner", encoder_kernel=3, extra_decoder_blocks=1)
TAMING = replace(COMMON, signed_pixels=True, mid_attention=True, attention_levels=(4,), quant_channels=256)
LFQ = VQLayout(
    signed_pixels=True, shortcut="input", downsample="strided", upsample="depth_to_space", mid_blocks=4,
    adaptive_norm=True, quantizer="signs",
)  # fmt: skip


@dataclass(frozen=True)
class StandIn:
    """One published tokenizer: its format, sizes and layout."""

    format: str
    cfg: VQGANConfig
    layout: VQLayout


def sizes(vocab_size: int, z_channels: int, mult: tuple[int, ...] = F16, blocks: int = 2) -> VQGANConfig:
    return VQGANConfig(channel_mult=mult, num_res_blocks=blocks, z_channels=z_channels, vocab_size=vocab_size)


STAND_INS = {
    "llamagen_vq16": StandIn("llamagen", sizes(16384, 8), replace(TAMING, quantizer="cosine")),
    "llamagen_vq8": StandIn(
        "llamagen", sizes(16384, 8, F8), replace(TAMING, quantizer="cosine", attention_levels=(3,))
    ),
    "taming_f16_1024": StandIn("taming", sizes(1024, 256), TAMING),
    "taming_f16_16384": StandIn("taming", sizes(16384, 256), TAMING),
    "taming_gumbel_f8": StandIn(
        "taming_gumbel", sizes(8192, 256, (1, 1, 2, 4)), replace(TAMING, quantizer="logits", attention_levels=(3,))
    ),
    "maskgit_f16": StandIn("maskgit", sizes(1024, 256), VQLayout()),
    "amused_256": StandIn("diffusers", sizes(8192, 64, (1, 2, 2, 4, 6)), replace(COMMON, quant_channels=64)),
    "ibq_16384": StandIn("ibq", sizes(16384, 256, blocks=4), replace(TAMING, quantizer="dot")),
    "open_magvit2_256": StandIn("open_magvit2", sizes(2**18, 18, blocks=4), LFQ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for about 0.6 GB of files a tokenizer")
    parser.add_argument("--names", default="llamagen_vq16,taming_f16_16384", help=", ".join(STAND_INS))
    parser.add_argument("--images", type=int, default=4, help="images to encode and decode")
    parser.add_argument("--convert", default="", help=argparse.SUPPRESS)  # of the measured process
    args = parser.parse_args()
    if args.convert:
        return encode(Path(args.convert), args.images)
    for name in args.names.split(","):
        folder = Path(args.out) / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        path = write(STAND_INS[name], folder)
        convert = (sys.executable, "-m", "digit", "convert", "--vqgan", path, "--out", folder / "pipeline")
        result = {"name": name, "file_mb": round(size(path) / 1e6, 1), "convert": measured(*convert)}
        own = ("--out", args.out, "--convert", folder / "pipeline", "--images", args.images)
        result["encode and decode"] = measured(sys.executable, __file__, *own)
        sys.stdout.write(json.dumps(result) + "\n")


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def measured(*command: object) -> dict[str, float]:
    """Seconds, processor seconds and peak gigabytes of one command."""
    start = time.perf_counter()
    process = subprocess.Popen([*map(str, command)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = round(usage.ru_utime + usage.ru_stime, 1)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": cpu,
        "peak_gb": round(usage.ru_maxrss * unit / 1e9, 2),
    }


def encode(pipeline: Path, num: int) -> None:
    """Encodes and decodes random images with a converted tokenizer; prints processor seconds of each."""
    from digit.tokenizers.vq import VQTokenizer

    vq = VQTokenizer.load(pipeline / "vqgan")
    images = torch.randint(0, 256, (num, 3, vq.resolution, vq.resolution), dtype=torch.uint8)
    start = time.process_time()
    tokens = vq.encode(images)
    middle = time.process_time()
    vq.decode(tokens)
    figures = {"encode": round(middle - start, 1), "decode": round(time.process_time() - middle, 1), "images": num}
    sys.stdout.write(json.dumps({"processor seconds": figures, "codes_used": len(tokens.unique())}) + "\n")


# -------------------------------------------------------------------- their files


def write(stand_in: StandIn, folder: Path) -> Path:
    """Writes the file, or diffusers' folder, of a stand-in; returns its path."""
    vqgan = VQGAN(stand_in.cfg, stand_in.layout)
    state = foreign_state(stand_in.format, vqgan)
    if stand_in.format == "diffusers":
        (folder / "vqvae").mkdir(exist_ok=True)
        save_file(state, folder / "vqvae" / "diffusion_pytorch_model.safetensors")
        (folder / "vqvae" / "config.json").write_text(json.dumps(diffusers_config(vqgan)))
        return folder / "vqvae"
    path = folder / ("maskgit.bin" if stand_in.format == "maskgit" else "weights.ckpt")
    torch.save(file_content(stand_in.format, state), path)
    return path


def foreign_state(form: str, vqgan: VQGAN) -> dict[str, Tensor]:
    """The weights of a network under the names, and in the shapes, of another project's files."""
    deepest = len(vqgan.cfg.channel_mult) - 1
    state = {foreign_name(form, name, deepest): tensor.detach() for name, tensor in vqgan.state_dict().items()}
    if form == "llamagen":
        state["quantize.codebook_used"] = torch.zeros(65536)
    if form == "taming_gumbel":
        state["quantize.proj.weight"] = state["quantize.proj.weight"][:, :, None, None]
    if form == "diffusers":
        linear = re.compile(r".*\.attentions\.\d+\.(to_[qkv]|to_out\.0)\.weight")
        state = {name: t.flatten(1) if linear.fullmatch(name) else t for name, t in state.items()}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def foreign_name(form: str, name: str, deepest: int) -> str:
    """The name that a project's files have for one of our tensors."""
    name = name.replace("encoder.quant_conv", "quant_conv").replace("decoder.post_quant_conv", "post_quant_conv")
    level = int(match[1]) if (match := re.match(r"decoder\.up\.(\d+)\.", name)) else 0
    if form == "llamagen":
        name = re.sub(r"decoder\.up\.\d+\.", f"decoder.conv_blocks.{deepest - level}.", name)
        name = name.replace("encoder.down.", "encoder.conv_blocks.").replace(".block.", ".res.")
        places = {"mid.block_1": "mid.0", "mid.attn_1": "mid.1", "mid.block_2": "mid.2"}
        return next((name.replace(ours, theirs) for ours, theirs in places.items() if ours in name), name)
    if form == "taming_gumbel":
        return name.replace("quantize.embedding.", "quantize.embed.")
    middle = {"maskgit": "mid.", "open_magvit2": "mid_block.", "diffusers": "mid_block.resnets."}.get(form)
    if middle:
        name = re.sub(r"mid\.block_(\d+)", lambda m: f"{middle}{int(m[1]) - 1}", name)
    if form == "maskgit":
        return name.replace("upsample.conv", "upsample_conv")
    if form == "open_magvit2":
        name = re.sub(r"decoder\.up\.(\d+)\.adaptive", r"decoder.adaptive.\1", name)
        return name.replace("downsample.conv", "downsample").replace("upsample.conv", "upsample.conv1")
    if form == "diffusers":
        name = re.sub(r"decoder\.up\.\d+\.", f"decoder.up_blocks.{deepest - level}.", name)
        for ours, theirs in DIFFUSERS:
            name = re.sub(ours, theirs, name)
    return name


DIFFUSERS = (
    (r"encoder\.down\.", "encoder.down_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def file_content(form: str, state: dict[str, Tensor]) -> Any:
    """What a project saves around its weights."""
    if form == "maskgit":
        return state
    if form == "llamagen":
        return {"model": state}
    loss = {"loss.discriminator.main.0.weight": torch.zeros(1, 3, 4, 4), "loss.num_batches_tracked": torch.tensor(3)}
    if form in ("ibq", "open_magvit2"):
        averages = {f"model_ema.{name.replace('.', '')}": tensor.clone() for name, tensor in state.items()}
        averages |= {"model_ema.lossdiscriminatormain0weight": loss["loss.discriminator.main.0.weight"]}
        averages |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int)}
        noise = {name: tensor + 1 for name, tensor in state.items()}  # weights that are not the averages
        return {"epoch": 1, "pytorch-lightning_version": "2.2.0", "state_dict": noise | loss | averages}
    return {"epoch": 1, "callbacks": {lightning_class(): {"monitor": "val/rec_loss"}}, "state_dict": state | loss}


def lightning_class() -> type:
    """A class with the name that old Lightning files hold as a key, which cannot be imported where they are read."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    made = type("ModelCheckpoint", (), {"__module__": name})
    if name not in sys.modules:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            sys.modules.setdefault(part, types.ModuleType(part))
        sys.modules[name].ModelCheckpoint = made  # pyright: ignore[reportAttributeAccessIssue]
    return sys.modules[name].ModelCheckpoint


def diffusers_config(vqgan: VQGAN) -> dict[str, Any]:
    """The config.json that diffusers' VQModel would have for a network."""
    cfg, layout = vqgan.cfg, vqgan.layout
    attention = [level in layout.attention_levels for level in range(len(cfg.channel_mult))]
    return {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": list(cfg.level_channels),
        "down_block_types": ["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attention)],
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": layout.quant_channels,
        "vq_embed_dim": cfg.z_channels,
        "layers_per_block": cfg.num_res_blocks,
        "mid_block_add_attention": layout.mid_attention,
        "norm_num_groups": cfg.num_groups,
        "norm_type": "group",
        "num_vq_embeddings": cfg.vocab_size,
        "lookup_from_codebook": True,
    }


if __name__ == "__main__":
    main()
