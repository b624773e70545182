"""The perceptual distance: its behaviour on real weights where they are installed, and its absence."""

import logging

import pytest
import torch
import torch.nn.functional as F

from digit.errors import DigitError
from digit.models import perceptual
from digit.models.perceptual import blur_downsample, load_perceptual, perceptual_weights_path


def scene():
    """A smooth picture with edges, (1, 3, 64, 64) in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    discriminative = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()
    return torch.stack([0.2 + 0.6 * discriminative, y, 0.5 * x + 0.5 * discriminative])[None]


def require(name):
    if perceptual_weights_path(name) is None:
        pytest.skip("stlpips-pytorch is not installed (pip install --no-deps stlpips-pytorch)")
    return load_perceptual(name)


@pytest.mark.parametrize("name", ["vgg", "alex"])
def test_distance_behaves(name):
    distance, image = require(name), scene()
    blurred = F.interpolate(F.avg_pool2d(image, 8), scale_factor=8, mode="bilinear")
    slightly = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode="bilinear")
    assert distance(image, image).abs().max() < 1e-6
    shifted, little, much = (float(distance(image, other)) for other in (image.roll(1, 3), slightly, blurred))
    assert 0 < little < much and shifted < much


def test_gradient_reaches_the_image_and_not_the_trunk():
    distance, image = require("alex"), scene().requires_grad_()
    distance(image, scene().flip(3)).sum().backward()
    assert image.grad.isfinite().all() and image.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_fewer_stages_are_the_first_ones():
    require("vgg")
    whole, part = load_perceptual("vgg"), load_perceptual("vgg", num_stages=2)
    for a, b in zip(part.features(scene()), whole.features(scene()), strict=False):
        torch.testing.assert_close(a, b)
    assert len(part.features(scene())) == 2 and len(whole.features(scene())) == 5


def test_blur_is_the_binomial_filter():
    x = torch.randn(2, 4, 17, 17)
    kernel = torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1]))[None, None].repeat(4, 1, 1, 1) / 16
    wanted = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=4)
    torch.testing.assert_close(blur_downsample(x), wanted)


def test_without_the_weights(monkeypatch, caplog):
    monkeypatch.setattr(perceptual, "perceptual_weights_path", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert load_perceptual("vgg") is None
    assert "without that term" in caplog.text


def test_unknown_trunk():
    with pytest.raises(DigitError, match="vgg, alex"):
        load_perceptual("resnet")
