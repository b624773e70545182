"""FD-DINOv2's and CMMD's networks: resize, normalisation and every layer, by independent wiring on random weights."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from toy_measure import pictures, run

from digit.convert.clip import load_clip
from digit.errors import DigitError
from digit.evaluation.published import (
    CLIP_MEAN,
    CLIP_STD,
    ClipJudge,
    DinoJudge,
    clip_input,
    load_published,
    pillow_resize,
)
from digit.evaluation.samples import EvaluateConfig, evaluate
from digit.metrics.kernels import gaussian_distance
from digit.models.clip import ClipConfig
from digit.tokenizers.encoders import EncoderConfig, load_encoder

DIM, DEPTH, PATCH, SIDE, OUT, HIDDEN = 128, 3, 14, 56, 48, 256


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def images(num=3, height=70, width=70):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, 3, height, width))).to(torch.uint8)


# -------------------------------------------------------------------- CLIP


def openai_state():
    shapes = {
        "visual.class_embedding": (DIM,),
        "visual.positional_embedding": (1 + (SIDE // PATCH) ** 2, DIM),
        "visual.proj": (DIM, OUT),
        "visual.conv1.weight": (DIM, 3, PATCH, PATCH),
    }
    norms = ["visual.ln_pre", "visual.ln_post"]
    for i in range(DEPTH):
        block = f"visual.transformer.resblocks.{i}"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        shapes |= {f"{block}.attn.in_proj_weight": (3 * DIM, DIM), f"{block}.attn.in_proj_bias": (3 * DIM,)}
        shapes |= {f"{block}.attn.out_proj.weight": (DIM, DIM), f"{block}.attn.out_proj.bias": (DIM,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (HIDDEN, DIM), f"{block}.mlp.c_fc.bias": (HIDDEN,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (DIM, HIDDEN), f"{block}.mlp.c_proj.bias": (DIM,)}
    shapes |= {f"{norm}.{part}": (DIM,) for norm in norms for part in ("weight", "bias")}
    text = {"token_embedding.weight": (9, 32), "logit_scale": (), "text_projection": (32, OUT)}
    return random_state(shapes | text)


def as_transformers(state):
    """The same weights by the names of CLIPModel."""
    renamed = {
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.token_embedding.weight": torch.zeros(9, 32),
        "logit_scale": torch.zeros(()),
    }
    for part in ("weight", "bias"):
        renamed[f"vision_model.pre_layrnorm.{part}"] = state[f"visual.ln_pre.{part}"]
        renamed[f"vision_model.post_layernorm.{part}"] = state[f"visual.ln_post.{part}"]
        for i in range(DEPTH):
            ours, theirs = f"visual.transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
            for letter, value in zip("qkv", state[f"{ours}.attn.in_proj_{part}"].chunk(3), strict=True):
                renamed[f"{theirs}.self_attn.{letter}_proj.{part}"] = value.clone()
            renamed[f"{theirs}.self_attn.out_proj.{part}"] = state[f"{ours}.attn.out_proj.{part}"]
            for number in "12":
                renamed[f"{theirs}.layer_norm{number}.{part}"] = state[f"{ours}.ln_{number}.{part}"]
            renamed[f"{theirs}.mlp.fc1.{part}"] = state[f"{ours}.mlp.c_fc.{part}"]
            renamed[f"{theirs}.mlp.fc2.{part}"] = state[f"{ours}.mlp.c_proj.{part}"]
    return renamed


def wired_clip(state, x):
    """OpenAI's forward, step by step, with torch's own multi-head attention."""

    def norm(x, name):
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    x = F.conv2d(x, state["visual.conv1.weight"], stride=PATCH).flatten(2).permute(2, 0, 1)  # (N, B, D)
    x = torch.cat([state["visual.class_embedding"].expand(1, x.shape[1], -1), x])
    x = norm(x + state["visual.positional_embedding"][:, None], "visual.ln_pre")
    for i in range(DEPTH):
        block = f"visual.transformer.resblocks.{i}"
        y = norm(x, f"{block}.ln_1")
        attended, _ = F.multi_head_attention_forward(
            y, y, y, DIM, DIM // 64, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"], None,
            None, False, 0.0, state[f"{block}.attn.out_proj.weight"], state[f"{block}.attn.out_proj.bias"],
        )  # fmt: skip
        x = x + attended
        y = F.linear(norm(x, f"{block}.ln_2"), state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"])
        y = y / (1 + torch.exp(-1.702 * y))
        x = x + F.linear(y, state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
    return norm(x[0], "visual.ln_post") @ state["visual.proj"]


def keys_cubic(x):
    """Keys' cubic convolution kernel with a = -0.5."""
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_matrix(own, side):
    """jax.image.resize's weights (side, own): the kernel is widened where the image shrinks, and sums to 1."""
    scale = own / side
    width = max(scale, 1.0)
    weights = np.array([[keys_cubic(((i + 0.5) * scale - 0.5 - j) / width) for j in range(own)] for i in range(side)])
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [30, 56, 91])
def test_clip_input_is_resized_as_by_jax(size):
    x = images(2, size, size)
    matrix = resize_matrix(size, SIDE)
    wanted = np.einsum("ih,bchw,jw->bcij", matrix, x.numpy() / 255.0, matrix)
    wanted = (wanted - np.array(CLIP_MEAN)[:, None, None]) / np.array(CLIP_STD)[:, None, None]
    np.testing.assert_allclose(clip_input(x, SIDE).numpy(), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rename", [dict, as_transformers], ids=["openai", "transformers"])
def test_clip_equals_independent_wiring(tmp_path, rename):
    state = openai_state()
    torch.save(rename(state), tmp_path / "clip.pt")
    judge = load_published("clip", tmp_path / "clip.pt", "cpu")
    x = images(19)
    found = judge.judge(x).pooled
    torch.testing.assert_close(found, wired_clip(state, clip_input(x, SIDE)), rtol=1e-4, atol=1e-5)
    assert found.shape == (19, OUT) and judge.describe()["input_size"] == SIDE
    assert judge.metric("cmmd") == f"cmmd_clip_{DIM}x{DEPTH}_{PATCH}_{SIDE}", "of another size than CMMD's"


def test_cmmd_has_its_name_on_the_published_network_alone(tmp_path):
    torch.save(openai_state(), tmp_path / "clip.pt")
    net = load_clip(tmp_path / "clip.pt")
    net.cfg = ClipConfig()
    judge = ClipJudge(net, tmp_path / "clip.pt", torch.device("cpu"))
    assert (judge.metric("cmmd"), judge.metric("fd")) == ("cmmd", "fd_clip")


def test_cmmd_of_the_command_is_that_of_the_embeddings(tmp_path):
    torch.save(openai_state(), tmp_path / "clip.pt")
    cfg = EvaluateConfig(
        cache="none", network="clip", weights=str(tmp_path / "clip.pt"), num_directions=3, kernel_subsets=2
    )
    a, b = pictures(20), pictures(30, seed=1)
    result = run(a, b, cfg, network=None)
    judge = load_published("clip", tmp_path / "clip.pt", "cpu")
    wanted = gaussian_distance(judge.judge(a).pooled, judge.judge(b).pooled)
    name = judge.metric("cmmd")
    assert result["metrics"][name]["value"] == pytest.approx(wanted.value, rel=1e-5)
    assert result["protocol"]["network"]["resize"] == "antialiased bicubic in floating point"
    by_name = evaluate(
        a, b, EvaluateConfig(cache="none", weights=None, num_directions=3, kernel_subsets=2), network=judge
    )
    assert by_name["metrics"][name]["value"] == pytest.approx(wanted.value, rel=1e-5)


def test_wrong_clip_files_are_one_line(tmp_path):
    state = openai_state()
    torch.save({name: value for name, value in state.items() if "ln_pre" not in name}, tmp_path / "a.pt")
    with pytest.raises(DigitError, match="missing norm_pre.*openai/clip-vit-large"):
        load_clip(tmp_path / "a.pt")
    torch.save(state | {"visual.layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "b.pt")  # a ResNet's
    with pytest.raises(DigitError, match="no|not the image half of a CLIP with a ViT"):
        load_clip(tmp_path / "b.pt")
    with pytest.raises(DigitError, match="openai/clip-vit-large"):
        load_clip(tmp_path / "nowhere.pt")
    with pytest.raises(DigitError, match="give --weights FILE"):
        EvaluateConfig(network="clip").load_network()
    with pytest.raises(DigitError, match="dinov2_vitl14_pretrain.pth"):
        EvaluateConfig(network="dinov2").load_network()


# -------------------------------------------------------------------- DINOv2


def dino_state():
    shapes = {
        "cls_token": (1, 1, DIM),
        "pos_embed": (1, 1 + 37 * 37, DIM),
        "mask_token": (1, DIM),
        "patch_embed.proj.weight": (DIM, 3, 14, 14),
        "patch_embed.proj.bias": (DIM,),
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
    }
    for i in range(DEPTH):
        for part, size in (("weight", (DIM,)), ("bias", (DIM,))):
            shapes |= {f"blocks.{i}.norm1.{part}": size, f"blocks.{i}.norm2.{part}": size}
        for layer, (rows, columns) in {
            "attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM), "mlp.fc1": (4 * DIM, DIM), "mlp.fc2": (DIM, 4 * DIM)
        }.items():  # fmt: skip
            shapes |= {f"blocks.{i}.{layer}.weight": (rows, columns), f"blocks.{i}.{layer}.bias": (rows,)}
        shapes |= {f"blocks.{i}.ls1.gamma": (DIM,), f"blocks.{i}.ls2.gamma": (DIM,)}
    return random_state(shapes, seed=1)


def wired_dino(state, x):
    """DINOv2's own forward: the table resized by (16 + 0.1) / 37 by bicubic interpolation, class token, final norm."""

    def norm(x, name):
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    side = x.shape[-1]
    table = state["pos_embed"][:, 1:].reshape(1, 37, 37, DIM).permute(0, 3, 1, 2)
    factor = (side + 0.1) / math.sqrt(37 * 37)
    table = F.interpolate(table, scale_factor=(factor, factor), mode="bicubic").permute(0, 2, 3, 1).reshape(1, -1, DIM)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + torch.cat([state["pos_embed"][:, :1], table], 1)
    for i in range(DEPTH):
        q, k, v = (
            linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").unflatten(-1, (3, DIM // 64, 64)).unbind(2)
        )
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        x = x + state[f"blocks.{i}.ls1.gamma"] * linear(attended, f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + state[f"blocks.{i}.ls2.gamma"] * linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_dinov2_equals_dgm_evals_transform_and_network(tmp_path):
    state = dino_state()
    torch.save(state, tmp_path / "dino.pth")
    cfg = EncoderConfig(
        name="dinov2_vitl14", layer="pooled", input_size=224, weights=str(tmp_path / "dino.pth"), sizes="file",
        position_interpolation="hub",
    )  # fmt: skip
    judge = DinoJudge(load_encoder(cfg), tmp_path / "dino.pth")
    for height, width in ((70, 70), (256, 256), (90, 64), (224, 224)):
        x = images(2, height, width)
        ready = []
        for image in x:  # Resize((224, 224), BICUBIC), ToTensor(), Normalize
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC)
            value = torch.from_numpy(np.array(picture)).permute(2, 0, 1).div(255)
            ready.append((value - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
                         / torch.tensor([0.229, 0.224, 0.225])[:, None, None])  # fmt: skip
        wanted = wired_dino(state, torch.stack(ready))
        torch.testing.assert_close(judge.judge(x).pooled, wanted, rtol=1e-4, atol=1e-5)
    assert judge.metric("fd") == f"fd_dinov2_{DIM}x{DEPTH}", "of another size than FD-DINOv2's"
    assert judge.describe()["resize"] == "Pillow bicubic, uint8"


def test_pillow_resize_leaves_the_right_size_alone():
    x = images(2, 32, 32)
    assert pillow_resize(x, 32) is x and pillow_resize(x, 16).shape == (2, 3, 16, 16)
