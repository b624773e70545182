"""The Inception of FID against torch-fidelity's network (which torchmetrics wraps) with the same random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference_metrics import reference

from digit.convert.inception import convert_inception, load_inception, released_names
from digit.errors import DigitError
from digit.models.inception import RESIZES, InceptionV3, first_channels, resize_clean, resize_tensorflow


def released_state() -> dict[str, torch.Tensor]:
    """Random tensors under the released names, scaled so that activations keep their size through all layers."""
    generator, state = torch.Generator().manual_seed(0), {}
    with torch.device("meta"):
        net = InceptionV3()
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            out, *fan_in = module.weight.shape
            conv, weight, bias, mean, var = released_names(name)
            scale = (2 / np.prod(fan_in)) ** 0.5
            state[conv] = torch.randn(out, *fan_in, generator=generator) * scale
            state[weight] = torch.rand(out, generator=generator) * 0.4 + 0.8
            state[bias], state[mean] = torch.randn(2, out, generator=generator) * 0.1
            state[var] = torch.rand(out, generator=generator) + 0.5
    state["fc.weight"] = torch.randn(1008, 2048, generator=generator) * 2048**-0.5
    state["fc.bias"] = torch.randn(1008, generator=generator)
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-random.pth"
    torch.save(released_state(), path)
    return path


def pictures(num: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, height, width), dtype=torch.uint8)


def test_all_outputs_equal_torch_fidelity(weights: Path):
    module = reference("torch_fidelity.feature_extractor_inceptionv3")
    theirs = module.FeatureExtractorInceptionV3("test", ["2048", "logits", "logits_unbiased"], str(weights))
    inner = {}
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda net, inputs, output: inner.update(map=output))
    images = pictures(2, 70, 90)
    pooled, logits, unbiased = theirs(images)
    ours = load_inception(weights)(images)
    assert pooled.std() > 0.01 and logits.std() > 0.01, "activations must not vanish, or the test shows nothing"
    # 94 folded layers in another order of rounding: 1e-6 of the largest value was seen
    wanted = {"pooled": pooled, "logits": logits, "logits_unbiased": unbiased, "spatial": first_channels(inner["map"])}
    for name, value in wanted.items():
        found = getattr(ours, name)
        assert found.shape == value.shape and found.dtype == torch.float32
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)


def test_spatial_features_are_in_the_order_of_the_released_statistics():
    # ADM's evaluator flattens TensorFlow's (row, column, channel); its .npz statistics are in this order
    cells = torch.arange(8.0 * 2 * 3).view(1, 8, 2, 3)
    flat = first_channels(cells)
    assert flat.shape == (1, 2 * 3 * 7)
    assert flat[0, (1 * 3 + 2) * 7 + 5] == cells[0, 5, 1, 2]


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (301, 256), (600, 450), (1, 1)])
def test_tensorflow_resize_equals_torch_fidelity_to_the_bit(size: tuple[int, int]):
    resize = reference("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    images = pictures(2, *size).float()
    assert torch.equal(resize_tensorflow(images), resize(images, size=(299, 299), align_corners=False))


@pytest.mark.parametrize("size", [(32, 32), (256, 256), (299, 299), (700, 400)])
def test_clean_resize_equals_pillow_in_float(size: tuple[int, int]):
    images = pictures(1, *size).float()
    channels = [Image.fromarray(channel.numpy()) for channel in images[0]]  # mode F
    wanted = np.stack([np.asarray(image.resize((299, 299), Image.Resampling.BICUBIC)) for image in channels])
    found = resize_clean(images)
    np.testing.assert_allclose(found[0].numpy(), wanted, rtol=1e-6, atol=1e-4)
    if max(size) < 299:
        assert found.max() > 255, "overshoots of enlarging stay, nothing is clipped"


def test_resizes_keep_constants_and_differ_on_detail():
    flat = torch.full((1, 3, 50, 70), 77.0)
    assert all(torch.allclose(resize(flat), torch.tensor(77.0)) for resize in RESIZES.values())
    stripes = torch.zeros(1, 3, 598, 598)
    stripes[..., ::2] = 255
    assert resize_tensorflow(stripes).min() == 255  # every other column is never looked at
    assert (resize_clean(stripes)[..., 8:-8] - 127.5).abs().max() < 1


def test_features_do_not_depend_on_the_batch(weights: Path):
    net, images = load_inception(weights, "clean"), pictures(2, 40, 40)
    for whole, single in zip(net(images), net(images[1:]), strict=True):
        torch.testing.assert_close(whole[1:], single, rtol=1e-4, atol=1e-5 * float(single.abs().max()))


def test_every_tensor_is_accounted_for(weights: Path):
    state = released_state()
    counters = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(7)}
    assert len(convert_inception(state | counters, "file")) == 2 * 94 + 2
    with pytest.raises(DigitError, match="unexpected AuxLogits"):
        convert_inception(state | {"AuxLogits.fc.bias": torch.zeros(1000)}, "file")
    with pytest.raises(DigitError, match=r"missing Mixed_7c\.branch_pool\.bn\.bias"):
        convert_inception({k: v for k, v in state.items() if k != "Mixed_7c.branch_pool.bn.bias"}, "file")
    with pytest.raises(DigitError, match=r"fc\.weight \(1000, 2048\) instead of \(1008, 2048\)"):
        convert_inception(state | {"fc.weight": torch.zeros(1000, 2048)}, "file")
    with pytest.raises(DigitError, match=r"NaN or Inf in fc\.bias"):
        convert_inception(state | {"fc.bias": torch.full((1008,), torch.nan)}, "file")


def test_a_missing_or_foreign_file_says_how_to_get_the_weights(tmp_path: Path):
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    (tmp_path / "page.pth").write_text("<html>")
    for name in ("missing.pth", "other.pth", "page.pth"):
        with pytest.raises(DigitError, match=r"pt_inception-2015-12-05-6726825d\.pth .*mseitzer/.*Lite2") as error:
            load_inception(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_misuse_says_what_to_do(unchecked):
    with pytest.raises(DigitError, match="tensorflow or clean"):
        InceptionV3("bilinear")
    with torch.device("meta"):
        net = InceptionV3()
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(DigitError, match="uint8"):
            net(images)
