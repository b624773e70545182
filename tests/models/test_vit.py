"""ViT and its release formats: parts against naive formulas, every tensor of a checkpoint accounted for."""

import argparse
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from digit.convert.reading import read_torch
from digit.convert.vit_checkpoints import FORMATS, read_vit
from digit.errors import DigitError
from digit.models.products import linear, prepacked
from digit.models.vit import SIZES, Attention, SwiGLU, ViT, ViTConfig
from digit.runtime.files import save_tensors

TINY = ViTConfig(embed_dim=24, depth=3, num_heads=3, patch_size=4, num_registers=2, table_side=5)
PLAIN = replace(TINY, num_registers=0, layer_scale=False)
WRAPPERS = {
    "dinov2": lambda s: s | {"mask_token": torch.zeros(1, 24)},
    "dino": lambda s: {
        "student": {f"module.backbone.{k}": v * 0 for k, v in s.items()},
        "teacher": {f"backbone.{k}": v for k, v in s.items()} | {"head.last_layer.weight_g": torch.zeros(2)},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small"),
    },
    "ibot": lambda s: {"state_dict": s | {"masked_embed": torch.zeros(1, 24), "head.mlp.0.bias": torch.zeros(1)}},
    "mae": lambda s: {"model": s | {"decoder_pos_embed": torch.zeros(1, 2, 3), "mask_token": torch.zeros(1, 1, 3)}},
    "mocov3": lambda s: {
        "epoch": 300,
        "state_dict": {f"module.base_encoder.{k}": v for k, v in s.items()}
        | {f"module.momentum_encoder.{k}": v * 0 for k, v in s.items()}
        | {"module.base_encoder.head.0.weight": torch.zeros(2), "module.predictor.1.running_mean": torch.zeros(2)},
    },
}


def random_net(cfg: ViTConfig) -> ViT:
    net = ViT(cfg).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def test_attention_is_softmax_of_scaled_products():
    attention, x = Attention(TINY), torch.randn(2, 7, 24)
    q, k, v = attention.qkv(x).reshape(2, 7, 3, 3, 8).unbind(2)  # (B, L, H, d) each
    weights = torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(8)
    wanted = attention.proj(torch.einsum("bhlm,bmhd->blhd", weights.softmax(-1), v).reshape(2, 7, 24))
    torch.testing.assert_close(attention(x), wanted)


@pytest.mark.parametrize("shape", [(3, 7, 40), (40,), (0, 40)])
@pytest.mark.parametrize("gelu", [False, True])
def test_products_are_those_of_torch(shape, gelu: bool):
    x, weight, bias = torch.randn(shape), torch.randn(24, 40), torch.randn(24)
    wanted = F.gelu(F.linear(x, weight, bias)) if gelu else F.linear(x, weight, bias)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias, gelu=gelu), wanted, rtol=1e-5, atol=1e-5)
        for fixed in (weight.bfloat16(), prepacked(weight.bfloat16()))[: 2 if x.numel() else 1]:
            half = linear(x.bfloat16(), fixed, bias.bfloat16(), gelu=gelu)
            torch.testing.assert_close(half.float(), wanted, rtol=0.03, atol=0.2)


def test_products_give_gradients_and_follow_autocast():
    x, weight = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    linear(x, weight, gelu=True).sum().backward()
    assert weight.grad.shape == weight.shape
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("swiglu", [False, True])
def test_bfloat16_products_are_near_and_leave_the_net_alone(swiglu: bool):
    net, x = random_net(replace(TINY, swiglu=swiglu)), torch.rand(2, 3, 20, 20)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        wanted, fast = net(x), net.with_bfloat16_products()(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            auto = net(x)
    assert fast.dtype == torch.float32
    error, auto_error = ((part.float() - wanted).norm() / wanted.norm() for part in (fast, auto))
    assert error < 0.03 and error < 2 * auto_error
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_swiglu_is_silu_gate_times_value():
    cfg = replace(TINY, swiglu=True)
    mlp, x = SwiGLU(cfg), torch.randn(2, 24)
    assert cfg.hidden_dim == 64 and SIZES["dinov2_vitg14"].hidden_dim == 4096
    w1, w2 = mlp.w12(x)[:, :64], mlp.w12(x)[:, 64:]
    torch.testing.assert_close(mlp(x), mlp.w3(w1 * torch.sigmoid(w1) * w2))


def test_class_and_registers_are_dropped_and_the_norm_is_last():
    net, x = random_net(TINY), torch.rand(2, 3, 20, 20)
    tokens = net.tokens(x)
    assert tokens.shape == (2, 1 + 2 + 25, 24) and net.grid(20) == (5, 5)
    assert torch.equal(net(x), tokens[:, 3:]) and torch.equal(net.pooled(x), tokens[:, 0])


def test_a_cut_net_is_the_beginning_of_the_whole_one():
    whole, x = random_net(TINY), torch.rand(1, 3, 20, 20)
    cut = ViT(replace(TINY, num_blocks=1)).eval()
    cut.load_state_dict({name: whole.state_dict()[name] for name in cut.state_dict()})
    inner = []
    whole.blocks[0].register_forward_hook(lambda module, inputs, output: inner.append(output))
    whole(x)
    assert len(cut.blocks) == 1
    torch.testing.assert_close(cut(x), whole.norm(inner[0])[:, 3:])


@pytest.mark.parametrize(("offset", "antialias"), [(0.1, False), (0.0, True), (0.0, False)])
def test_positions_of_another_grid(offset: float, antialias: bool):
    net = random_net(replace(TINY, position_offset=offset, position_antialias=antialias))
    assert net.positions(5, 5) is net.pos_embed  # its own grid: untouched
    positions = net.positions(3, 3)
    table = net.pos_embed[:, 1:].reshape(1, 5, 5, 24).permute(0, 3, 1, 2)
    target = {"scale_factor": (3.1 / 5, 3.1 / 5)} if offset else {"size": (3, 3)}
    wanted = F.interpolate(table, mode="bicubic", antialias=antialias, **target).permute(0, 2, 3, 1).reshape(1, 9, 24)
    assert torch.equal(positions[:, :1], net.pos_embed[:, :1]) and torch.equal(positions[:, 1:], wanted)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_fit_their_names(name: str):
    cfg = SIZES[name]
    letter, patch = name.split("vit")[1][0], int(name.split("vit")[1][1:].split("_")[0])
    dim, depth = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}[letter]
    assert (cfg.embed_dim, cfg.depth, cfg.patch_size) == (dim, depth, patch)
    assert cfg.num_registers == (4 if "reg4" in name else 0)
    assert cfg.table_side == (37 if patch == 14 else 224 // patch)
    assert cfg.num_heads == (12 if name == "mocov3_vits16" else dim // 64)


@pytest.mark.parametrize("family", FORMATS)
def test_release_formats_load(family: str, tmp_path: Path):
    cfg = TINY if family == "dinov2" else PLAIN
    net = random_net(cfg)
    torch.save(WRAPPERS[family](net.state_dict()), tmp_path / "w.pth")
    state = read_vit(tmp_path / "w.pth", family, cfg)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


def test_safetensors_load_too(tmp_path: Path):
    save_tensors(tmp_path / "w.safetensors", random_net(PLAIN).state_dict())
    assert len(read_vit(tmp_path / "w.safetensors", "mae", PLAIN)) == len(ViT(PLAIN).state_dict())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, r"missing norm\.bias"),
        (lambda s: s | {"surprise.weight": torch.zeros(1)}, r"unexpected surprise\.weight"),
        (lambda s: s | {"cls_token": torch.zeros(1, 1, 25)}, r"cls_token \(1, 1, 25\) instead of \(1, 1, 24\)"),
        (lambda s: s | {"backbone.norm.bias": torch.zeros(24)}, r"unexpected backbone\.norm\.bias"),
        (lambda s: s | {"module.norm.bias": torch.zeros(24)}, r"holds norm\.bias twice"),
        (lambda s: s | {"lr": 0.1}, r"lr should be tensors"),
        (lambda s: [1, 2], r"expected a dict of tensors, got list"),
        (lambda s: {}, r"expected a dict of tensors"),
    ],
)
def test_unfit_checkpoints_say_what_is_wrong(change, complaint: str, tmp_path: Path):
    torch.save(change(random_net(PLAIN).state_dict()), tmp_path / "w.pth")
    with pytest.raises(DigitError, match=complaint):
        read_vit(tmp_path / "w.pth", "dino", PLAIN)


def test_registers_belong_to_register_models(tmp_path: Path):
    torch.save(random_net(TINY).state_dict(), tmp_path / "w.pth")
    with pytest.raises(DigitError, match="unexpected register_tokens"):
        read_vit(tmp_path / "w.pth", "dinov2", replace(TINY, num_registers=0))


class Hostile:
    def __reduce__(self):
        return os.system, ("true",)


def test_no_code_runs_from_a_file(tmp_path: Path):
    torch.save({"model": Hostile()}, tmp_path / "w.pth")
    with pytest.raises(DigitError, match=r"holds more than tensors.*system"):
        read_torch(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_damaged_files_are_one_line(content: bytes, tmp_path: Path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(DigitError) as caught:
        read_torch(tmp_path / "w.pth")
    assert "\n" not in str(caught.value) and "w.pth" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DigitError, match="no such weights file"):
        read_torch(tmp_path / "none.pth")
