"""Sampling straight to pixels: an image depends on its tokens and its seed alone."""

import pytest
import torch
from toy_pixels import model

from digit.errors import DigitError
from digit.sampling.config import StageSampling
from digit.sampling.kinds import make_sampler

TOKENS = torch.tensor([[0, 1, 2, 3], [3, 3, 1, 0], [2, 2, 2, 2]])


def test_an_image_depends_on_its_own_seed_alone():
    sampler = make_sampler(model(noise_channels=2), StageSampling(), micro_batch_size=2)
    images = sampler([5, 6, 7], prefix=TOKENS)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(sampler([7, 6], prefix=TOKENS[[2, 1]]), images[[2, 1]])
    assert not torch.equal(sampler([8], prefix=TOKENS[:1]), images[:1])


def test_without_noise_the_seed_changes_nothing():
    sampler, seen = make_sampler(model(), StageSampling()), []
    assert torch.equal(sampler([1], prefix=TOKENS[:1]), sampler([2], prefix=TOKENS[:1], on_token=seen.append))
    assert seen == [1]
    assert sampler([], prefix=TOKENS[:0]).shape == (0, 3, 16, 16)


def test_half_precision_is_close():
    whole = make_sampler(model(), StageSampling())([0, 0, 0], prefix=TOKENS).float()
    half = make_sampler(model(), StageSampling(), precision="bf16")([0, 0, 0], prefix=TOKENS).float()
    assert (whole - half).abs().mean() < 8  # of 255: bfloat16 keeps 8 bits of each product's inputs


def test_what_it_refuses():
    sampler = make_sampler(model(), StageSampling())
    with pytest.raises(DigitError, match="needs a prefix of 4 tokens"):
        sampler([0])
    with pytest.raises(DigitError, match="prefix token 4 is out of range"):
        sampler([0], prefix=torch.tensor([[0, 1, 2, 4]]))
