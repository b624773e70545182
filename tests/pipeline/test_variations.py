"""Variations of pictures, and pictures between two."""

import pytest
import torch
from studio_toys import studio_pipeline
from toy_pipeline import toy_pipeline

from digit.errors import DigitError
from digit.pipeline.variations import cell_ranks, interpolate, kept_by_rank, usual_share, vary


@pytest.fixture(scope="module")
def pipe():
    return studio_pipeline()


@pytest.fixture(scope="module")
def images(pipe):
    return pipe.generate(2, seed=3)


def test_by_default_the_discriminative_tokens_stay(pipe, images):
    found = vary(pipe, images, num=3, seed=5)
    tokens = pipe.tokenizer.encode(images).repeat_interleave(3, 0)
    assert torch.equal(found, pipe.render(tokens, 5)) and len(found.flatten(1).unique(dim=0)) > 2


def test_the_reverse_keeps_a_share_of_the_vq_tokens(pipe, images):
    found = vary(pipe, images, num=2, seed=5, keep_discriminative=0, keep_vq=0.5)
    assert found.shape == (4, 3, 32, 32)
    own, other = pipe.vq.encode(images).repeat_interleave(2, 0), pipe.generate_tokens(4, 1, 5)["vq"]
    near = (pipe.vq.encode(found) == own).float().mean()
    assert near > (other == own).float().mean()


def test_a_variation_depends_on_its_seed_alone(pipe, images):
    settings = dict(keep_discriminative=0.5, keep_vq=0.25, batch_size=8)
    both = vary(pipe, images, num=2, seed=5, **settings)
    assert torch.equal(both[3:], vary(pipe, images[1:], num=1, seed=8, **settings))


def test_shares_keep_the_same_places_in_both_grids():
    rank = cell_ranks([1, 2], (4, 4))
    assert rank.flatten(1).sort(1).values[0].tolist() == [i / 16 for i in range(16)] and not torch.equal(
        rank[0], rank[1]
    )
    coarse, fine = kept_by_rank(rank, 0.25, (4, 4)), kept_by_rank(rank, 0.25, (8, 8))
    assert coarse.sum(1).tolist() == [4, 4] and fine.sum(1).tolist() == [16, 16]
    assert torch.equal(fine.view(2, 8, 8)[:, ::2, ::2].flatten(1), coarse)
    assert not kept_by_rank(rank, 0.0, (4, 4)).any() and kept_by_rank(rank, 1.0, (4, 4)).all()


def test_where_nothing_would_vary_is_refused(pipe, images):
    with pytest.raises(DigitError, match="keep_vq is 1: pixels come from the VQ tokens alone"):
        vary(pipe, images, keep_vq=1)
    with pytest.raises(DigitError, match="keep_discriminative is 1.5"):
        vary(pipe, images, keep_discriminative=1.5)
    vq_only = toy_pipeline(prior=False)
    picture = vq_only.generate(1, seed=1)
    with pytest.raises(DigitError, match="VQ-only, .*give keep_vq"):
        vary(vq_only, picture)
    assert vary(vq_only, picture, keep_vq=0.5, num=2).shape == (2, 3, 16, 16)


def test_a_renderer_that_draws_equal_tokens_equally_keeps_half_of_them():
    fixed, noisy = studio_pipeline("pixels", noise_channels=0), studio_pipeline("pixels")
    assert usual_share(fixed) == 0.5 and usual_share(noisy) == usual_share(toy_pipeline()) == 1
    pictures = fixed.generate(1, seed=3)
    found = vary(fixed, pictures, num=3, seed=5)
    assert torch.equal(found, vary(fixed, pictures, num=3, seed=5, keep_discriminative=0.5))
    assert len(found.flatten(1).unique(dim=0)) == 3
    with pytest.raises(DigitError, match="one picture for the same tokens: give keep_discriminative below 1"):
        vary(fixed, pictures, keep_discriminative=1.0)


def test_between_begins_and_ends_with_the_own_tokens(pipe, images):
    found = interpolate(pipe, images[:1], images[1:], steps=5, seed=2)
    own = pipe.tokenizer.encode(images)
    assert torch.equal(found.tokens[[0, -1]], own) and found.weights.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert torch.equal(found.images[:1], pipe.render(own[:1], 2)) and torch.equal(
        found.images[-1:], pipe.render(own[1:], 2)
    )


def test_between_nothing(pipe, images):
    with pytest.raises(DigitError, match="2 and 1 pictures"):
        interpolate(pipe, images, images[:1])
    with pytest.raises(DigitError, match="steps"):
        interpolate(pipe, images[:1], images[1:], steps=1)
    with pytest.raises(DigitError, match="tokenizer"):
        vq_only = toy_pipeline(prior=False)
        interpolate(vq_only, images[:1], images[1:])
