"""Weights of CLIP's image half, as the transformers library and as OpenAI's code and OpenCLIP name them."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from digit.convert.reading import check_state, check_tensors, read_weights, unfit
from digit.convert.weight_sets import choose_set
from digit.errors import DigitError
from digit.models.clip import ClipConfig, ClipVision

HOW_TO_GET = (
    "get model.safetensors or pytorch_model.bin of openai/clip-vit-large-patch14-336 from the Hugging Face Hub, or "
    "OpenAI's weights as OpenCLIP has them"
)
STEMS = ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight")  # transformers, OpenAI
TRANSFORMERS = {
    "vision_model.embeddings.class_embedding": "cls_token",
    "vision_model.embeddings.patch_embedding.weight": "patch_embed.weight",
    "vision_model.embeddings.position_embedding.weight": "pos_embed",
    "visual_projection.weight": "head.weight",
    r"vision_model\.pre_layrnorm\.(\w+)": r"norm_pre.\1",  # spelt so
    r"vision_model\.post_layernorm\.(\w+)": r"norm.\1",
    r"vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)": r"blocks.\1.norm\2.\3",
    r"vision_model\.encoder\.layers\.(\d+)\.mlp\.(fc[12])\.(\w+)": r"blocks.\1.\2.\3",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)": r"blocks.\1.proj.\2",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)": r"blocks.\1.\2.\3",
}
OPENAI = {
    "visual.class_embedding": "cls_token",
    "visual.conv1.weight": "patch_embed.weight",
    "visual.positional_embedding": "pos_embed",
    "visual.proj": "head.weight",
    r"visual\.ln_pre\.(\w+)": r"norm_pre.\1",
    r"visual\.ln_post\.(\w+)": r"norm.\1",
    r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)": r"blocks.\1.norm\2.\3",
    r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)": r"blocks.\1.fc1.\2",
    r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)": r"blocks.\1.fc2.\2",
    r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)": r"blocks.\1.proj.\2",
    r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)": r"blocks.\1.qkv.\2",
}
OURS = ("vision_model.", "visual_projection.", "visual.")  # other names are of the text half and of the loss


def load_clip(path: str | Path) -> ClipVision:
    """Load the image half of a CLIP with a ViT, on CPU, in eval mode and without gradients; its size is the file's.

    Raises DigitError that says how to get the weights if the file is missing, unreadable or of another network.
    """
    try:
        loaded = read_weights(path)
        stem = next((stem for stem in STEMS if _holds(loaded, stem)), STEMS[0])
        state = convert_clip(choose_set(loaded, stem, str(path), known=".*"), str(path))
        with unfit(str(path)), torch.device("meta"):
            net = ClipVision(infer_config(state))
        check_state(state, net, str(path), HOW_TO_GET)
    except DigitError as error:
        raise DigitError(f"{error}; {HOW_TO_GET}") from error
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


def _holds(loaded: object, name: str) -> bool:
    """Whether some dict of a file has a tensor whose name ends so."""
    if not isinstance(loaded, Mapping):
        return False
    return any(str(key).endswith(name) or _holds(value, name) for key, value in loaded.items())


def convert_clip(foreign: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename a released state dict, to float32. Raises DigitError for tensors of the image half it does not use."""
    names = TRANSFORMERS if STEMS[0] in foreign else OPENAI
    own = {
        name: value for name, value in foreign.items() if name.startswith(OURS) and not name.endswith("position_ids")
    }
    check_tensors(own, source)
    state: dict[str, Tensor] = {}
    for name, value in own.items():
        fitting = [(pattern, ours) for pattern, ours in names.items() if re.fullmatch(pattern, name)]
        if not fitting:
            raise DigitError(f"{source} is not the image half of a CLIP with a ViT: unexpected {name}")
        state[re.sub(*fitting[0], name)] = value.float()
    with unfit(source):
        if names is OPENAI and "head.weight" in state:
            state["head.weight"] = state["head.weight"].T.contiguous()
        for name in [name for name in state if re.fullmatch(r"blocks\.\d+\.q\.\w+", name)]:
            parts = [name.replace(".q.", f".{letter}.") for letter in "qkv"]
            state[name.replace(".q.", ".qkv.")] = torch.cat([state.pop(part) for part in parts])
    return state


def infer_config(state: Mapping[str, Tensor]) -> ClipConfig:
    """The size of the network that a converted state is of."""
    dim, _, patch, _ = state["patch_embed.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    side = math.isqrt(len(state["pos_embed"]) - 1) * patch
    hidden, output = len(state["blocks.0.fc1.weight"]), len(state["head.weight"])
    return ClipConfig(
        embed_dim=dim, depth=depth, patch_size=patch, input_size=side, hidden_dim=hidden, output_dim=output
    )
