"""Features of several layers: those of each layer alone, normalised and combined; saved, planned, refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import Tensor
from toy_mae import save_tiny, tiny

from digit.cli.arguments import bracketed, list_options
from digit.errors import DigitError
from digit.models.efficientnet import EfficientNet, EfficientNetConfig
from digit.models.several_layers import LayersConfig, SeveralLayers, resampled
from digit.runs.checks import unused_settings
from digit.runs.recipes import get_recipe
from digit.runtime.settings import refuse_unused
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, blank_net, load_encoder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_tiny(tmp_path)


def normal(features: Tensor) -> Tensor:
    return F.layer_norm(features, features.shape[-1:])


@pytest.mark.parametrize("layers", [(-3, -4), (0, 2, 1), (3,)])
def test_a_vits_layers_are_those_of_each_alone(weights, layers):
    images = torch.rand(3, 3, 16, 16)
    alone = [normal(tiny(weights, layer=layer).features(images)) for layer in layers]
    concat, added = (tiny(weights, layers=layers, combine=combine) for combine in ("concat", "sum"))
    torch.testing.assert_close(concat.features(images), torch.cat(alone, -1))
    torch.testing.assert_close(added.features(images), torch.stack(alone).sum(0))
    assert concat.dim == 24 * len(layers) and added.dim == 24 and concat.grid == (4, 4)


def lite(**changes: object) -> EfficientNet:
    net = EfficientNet(replace(EfficientNetConfig(), head=False, **changes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.normal_(std=0.2 if parameter.ndim == 1 else 1.4 * parameter[0].numel() ** -0.5, generator=generator)
    return net


def several(net: EfficientNet, *layers: int, combine: str = "concat") -> SeveralLayers:
    return SeveralLayers(LayersConfig(net="efficientnet", config={}, layers=layers, combine=combine), net)


def test_an_efficientnets_layers_come_to_the_grid_of_the_first():
    net, x = lite(num_blocks=13), torch.randn(2, 3, 64, 64)
    fine, coarse = (EfficientNet(replace(net.cfg, num_blocks=1 + layer)) for layer in (10, 12))
    for cut in (fine, coarse):
        cut.load_state_dict({name: net.state_dict()[name] for name in cut.state_dict()})
    a, b = fine(x), coarse(x)
    assert a.shape == (2, 16, 112) and b.shape == (2, 4, 192)
    found, other = several(net, 10, 12), several(net, 12, 10)
    assert found.grid(64) == (4, 4) and other.grid(64) == (2, 2) and found.dim == other.dim == 304
    torch.testing.assert_close(found(x)[..., :112], normal(a))
    torch.testing.assert_close(found(x)[..., 112:], normal(resampled(b, (2, 2), (4, 4))))
    torch.testing.assert_close(other(x)[..., :192], normal(b))
    assert other(x).shape == (2, 4, 304)
    with pytest.raises(DigitError, match="layers of 112 and 192 channels cannot be added up"):
        several(net, 10, 12, combine="sum")
    assert several(net, 9, 10, combine="sum")(x).shape == (2, 16, 112)


def test_resampling_keeps_places():
    ramp = torch.arange(4.0).repeat_interleave(4)[None, :, None]  # (1, 16, 1), by row
    halved = torch.tensor([5, 5, 16, 16]) / 7  # triangles of width 2: (3 * 0 + 3 * 1 + 1 * 2) / 7
    torch.testing.assert_close(resampled(ramp, (4, 4), (2, 2))[0, :, 0], halved)
    assert resampled(ramp, (4, 4), (4, 4)) is ramp


def test_save_and_load_is_the_identity(weights, tmp_path):
    encoder, images = tiny(weights, layers=(-3, -4)), torch.rand(2, 3, 16, 16)
    encoder.save(tmp_path / "saved")
    again = FrozenEncoder.load(tmp_path / "saved")
    assert torch.equal(again.features(images), encoder.features(images))
    assert again.fingerprint == encoder.fingerprint and again.describe() == encoder.describe()
    assert again.describe()["layer"] == [1, 0] and again.describe()["combine"] == "concat"
    several = [{"layers": layers} for layers in ((1,), (1, 0), (0, 1))]
    prints = {tiny(weights, **fields).fingerprint for fields in ({}, *several, several[1] | {"combine": "sum"})}
    assert len(prints) == 5 and encoder.fingerprint in prints


def test_layers_of_a_saved_encoder(weights, tmp_path):
    tiny(weights, layer="pooled").save(tmp_path / "saved")
    found = load_encoder(EncoderConfig(name=f"folder:{tmp_path / 'saved'}", input_size=16, layers=(2, 0)))
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(found.features(images), tiny(weights, layers=(2, 0)).features(images))
    found.save(tmp_path / "both")
    with pytest.raises(DigitError, match="saved up to layer"):
        load_encoder(EncoderConfig(name=f"folder:{tmp_path / 'both'}", input_size=16, layers=(0,)))
    with pytest.raises(DigitError, match="choose an earlier one"):
        tiny(weights, layer=1).save(tmp_path / "cut")
        load_encoder(EncoderConfig(name=f"folder:{tmp_path / 'cut'}", input_size=16, layers=(0, 3)))


def test_bfloat16_is_near(weights):
    encoder, images = tiny(weights, layers=(-3, -4)), torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(encoder.features(images, torch.bfloat16), encoder.features(images), atol=0.1, rtol=0.1)


def test_a_plan_knows_their_size():
    cfg = EncoderConfig(name="efficientnet_lite0", layers=(-6, -3), input_size=128)
    net = blank_net(cfg)
    assert net.grid(128) == (8, 8) and net.dim == 304
    assert net(torch.empty(1, 3, 128, 128, device="meta")).shape == (1, 64, 304)
    assert blank_net(EncoderConfig(name="dinov2_vits14", layers=(-1, 3), combine="sum")).dim == 384


def test_the_command_line_takes_negative_numbers():
    parser = ArgumentParser()
    parser.add_class_arguments(EncoderConfig, "encoder")
    argv = bracketed(["--encoder.layers", "-3,-6"], list_options(parser))
    assert argv == ["--encoder.layers", "[-3,-6]"] and parser.parse_args(argv).encoder.layers == (-3, -6)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"layers": (7,)}, "has no layer 7"),
        ({"layers": (1, -3)}, "each once"),
        ({"layers": ()}, "each once"),
    ],
)
def test_mistakes_say_what_to_do(weights, fields, complaint):
    with pytest.raises(DigitError, match=complaint):
        tiny(weights, **fields)
    with pytest.raises(DigitError, match="and no layers"):
        tiny(weights, layers=(0, 1)).pooled(torch.rand(1, 3, 16, 16))


def test_settings_that_a_run_would_not_use_are_refused():
    recipe = get_recipe("paper_small")
    both = replace(recipe, encoder=replace(recipe.encoder, layers=(-3, -6)))
    with pytest.raises(DigitError, match=r"encoder\.layer is -3.*leave one of both out"):
        refuse_unused(both, ["encoder.layer"], unused_settings(both))
    with pytest.raises(DigitError, match=r"encoder\.combine is concat.*set encoder\.layers"):
        refuse_unused(recipe, ["encoder.combine"], unused_settings(recipe))
    with pytest.raises(DigitError, match=r"kmeans\.whiten is False.*kmeans\.pca is 0"):
        refuse_unused(recipe, ["kmeans.whiten"], unused_settings(recipe))
    refuse_unused(both, ["encoder.layers", "encoder.combine"], unused_settings(both))
