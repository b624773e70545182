"""Our ViT against what the authors' released code answered for tiny random weights (shared/golden)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from digit.models.vit import ViT, ViTConfig
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_vit

TOLERANCE = {"rtol": 0, "atol": 1e-4}  # the order of additions in attention and resize differs


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "expected.safetensors")


@pytest.fixture(scope="module")
def sizes(golden: Path) -> dict[str, int]:
    variant = json.loads((golden / "meta.json").read_text())["variant"]
    return {"embed_dim": variant["dim"], "depth": variant["depth"], "num_heads": variant["heads"]}


def dinov2(golden: Path, sizes: dict[str, int], **fields: object) -> FrozenEncoder:
    shape = ViTConfig(**sizes, patch_size=14, num_registers=4)
    cfg = EncoderConfig(name="dinov2_vits14_reg4", weights=str(golden / "dinov2_reg4.pth"), **fields)
    return load_vit(cfg, shape)


def test_preparation_is_the_released_one(golden, expected, sizes):
    prepared = dinov2(golden, sizes).prepare(expected["images_uint8"])
    torch.testing.assert_close(prepared, expected["encoder_input"], rtol=1e-5, atol=1e-5)


def test_positions_37_to_16(golden, expected, sizes):
    net = dinov2(golden, sizes).net
    assert isinstance(net, ViT)
    torch.testing.assert_close(net.positions(16, 16), expected["pos_embed_16x16"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layer", "name"), [(None, "third_to_last"), (-1, "last"), ("pooled", "last")])
def test_dinov2_features(golden, expected, sizes, layer, name):
    encoder = dinov2(golden, sizes, layer=layer)
    features = encoder.features(expected["images_uint8"])
    assert encoder.grid == (16, 16)
    torch.testing.assert_close(features, expected[f"features_{name}"], **TOLERANCE)


def test_hub_positions_differ_from_the_released_ones(golden, expected, sizes):
    features = dinov2(golden, sizes, position_interpolation="hub").features(expected["images_uint8"])
    assert (features - expected["features_third_to_last"]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["ibot", "mae"])
def test_ibot_and_mae_features(golden, expected, sizes, family):
    shape = ViTConfig(**sizes, patch_size=16, layer_scale=False, table_side=14)
    cfg = EncoderConfig(name=f"{family}_vitb16", weights=str(golden / f"{family}_vit16.pth"))
    features = load_vit(cfg, shape).features(expected["images_uint8"])
    torch.testing.assert_close(features, expected[f"{family}_features_third_to_last"], **TOLERANCE)
