"""What a completion keeps: cells and pixels of every kind of mask, forced tokens, and a seam that does not show."""

import numpy as np
import pytest
import torch
from studio_toys import studio_pipeline
from toy_pipeline import toy_pipeline

from digit.errors import DigitError
from digit.pipeline.around import (
    AREAS,
    area,
    as_keep,
    compose,
    holes,
    kept_cells,
    kept_pixels,
    sample_around,
    seam_shift,
)
from digit.sampling.config import StageSampling
from digit.sampling.kinds import make_sampler
from digit.sampling.next_token import NextTokenSampler


@pytest.fixture(scope="module")
def pipe():
    return studio_pipeline()


@pytest.fixture(scope="module")
def images(pipe):
    return pipe.generate(2, seed=3)


# -------------------------------------------------------------------- what is kept


def test_a_mask_of_pixels_keeps_whole_cells_alone():
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[5, 9] = False
    assert kept_cells(mask, (4, 4), 16).tolist() == [[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert (~kept_pixels(mask, (4, 4), 16)).sum() == 1, "all other pixels stay"


def test_a_fraction_keeps_whole_rows():
    assert kept_cells(0.4, (8, 8), 32).sum(1).tolist() == [8, 8, 8, 0, 0, 0, 0, 0]
    assert kept_pixels(0.4, (8, 8), 32)[:, 0].sum() == 12
    assert kept_cells(0.01, (4, 4), 32)[0].all()


@pytest.mark.parametrize("name", AREAS)
def test_areas_are_halves_or_quarters(name):
    kept = area(name, 32)
    assert kept.float().mean() == {"centre": 0.25, "border": 0.75}.get(name, 0.5)
    corner = {"upper": (0, 16), "lower": (31, 16), "left": (16, 0), "right": (16, 31), "centre": (16, 16)}
    assert kept[corner.get(name, (0, 0))]


def test_masks_may_be_lists_arrays_or_numbers():
    mask = [[True, False], [False, True]]
    for given in (mask, np.array(mask), np.array(mask).astype(int), torch.tensor(mask)):
        assert torch.equal(as_keep(given, [(2, 2)], 8), torch.tensor(mask))
    assert as_keep(np.float32(0.5), [(2, 2)], 8) == 0.5


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (torch.ones(3, 3), "keep has shape .3, 3.: give cells of 4 x 4, 8 x 8, pixels of 32 x 32, or a fraction"),
        (torch.full((4, 4), 0.5), "other than 0 and 1"),
        ([[1, 0], [1]], "keep is no mask"),
        ("uper", "did you mean upper"),
        (0, "keep is 0"),
        (1.5, "at most 1, or a mask"),
    ],
)
def test_other_masks_are_refused(pipe, images, keep, told):
    with pytest.raises(DigitError, match=told):
        pipe.complete(images, keep)


# -------------------------------------------------------------------- completions


@pytest.mark.parametrize("keep", [0.5, *AREAS])
def test_pixels_that_are_kept_stay_exactly(pipe, images, keep):
    done, decoded = pipe.complete(images, keep, seed=1), pipe.complete(images, keep, seed=1, pixels="decoded")
    kept = pipe.kept_pixels(keep)
    assert torch.equal(done[:, :, kept], images[:, :, kept])
    assert not torch.equal(decoded[:, :, kept], images[:, :, kept])
    pasted = pipe.complete(images, keep, seed=1, pixels="pasted")
    assert torch.equal(pasted[:, :, ~kept], decoded[:, :, ~kept])


def test_an_image_does_not_depend_on_the_others(pipe, images):
    mask = area("centre", 32)
    both = pipe.complete(images, mask, seed=7, batch_size=4)
    alone = pipe.complete(images[1:], mask, seed=8, batch_size=4)
    assert torch.equal(both[1:], alone)


def test_a_masked_renderer_keeps_any_cells():
    masked = toy_pipeline(prior=False, masked=True)
    picture, keep = masked.generate(1, seed=1), torch.rand(4, 4) < 0.5
    request = masked.completion(picture, keep, 0, "dog")
    [batch] = masked.sample_request(request, masked.sized(masked.sampling))
    assert (batch.tokens["vq"][:, keep.flatten()] == masked.vq.encode(picture)[:, keep.flatten()]).all()


@pytest.mark.parametrize("recorded", [False, True])
def test_each_picture_may_keep_other_tokens(pipe, recorded):
    """Against the plain definition: token i is the kept one, else sampled given all before it."""
    sampler = NextTokenSampler(pipe.prior, fixed_shapes=recorded, micro_batch_size=2, stage="prior")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 7, (5, 16), generator=generator)
    keep = torch.rand(5, 16, generator=generator) < 0.4
    keep[2], keep[3] = True, False
    seeds, labels = [1, 2, 3, 4, 5], torch.tensor([0, 1, 2, 3, -1])
    expected = tokens.clone()
    for i in range(16):
        sampled = make_sampler(pipe.prior, StageSampling(), micro_batch_size=2, stage="prior")(
            seeds, labels=labels, given=expected[:, :i]
        )
        expected[:, i] = torch.where(keep[:, i], tokens[:, i], sampled[:, i])
    assert sampler.records == recorded
    assert torch.equal(sample_around(sampler, seeds, tokens, keep, labels=labels), expected)


def test_holes():
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0]).bool()
    assert list(holes(mask)) == [(0, 1), (3, 5), (6, 7)]
    assert not list(holes(torch.ones(3).bool())) and list(holes(torch.zeros(3).bool())) == [(0, 3)]


# -------------------------------------------------------------------- pixels


def test_a_constant_difference_fades_from_the_seam():
    """In one dimension c = d cosh-like: next to the seam nearly d, after some reaches nothing."""
    keep = torch.zeros(24, 64, dtype=torch.bool)
    keep[:, :8] = True
    shift = seam_shift(torch.full((1, 3, 24, 64), 40.0), keep, reach=6.0)[0, 0]
    assert (shift[:, :8] == 40).all() and torch.allclose(shift[0], shift[11])
    beyond = shift[0, 8:]
    assert (beyond.diff() < 0).all() and beyond[0] > 33 and beyond[30] < 1
    decay = 1 + 1 / 72 - (1 / 36 + 1 / 72**2) ** 0.5  # root below 1 of c(x - 1) + c(x + 1) = (2 + 1 / 36) c(x)
    assert beyond[10] / beyond[9] == pytest.approx(decay, rel=1e-4)


def test_the_shift_solves_its_equation():
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(12, 15, generator=generator) < 0.3
    difference = torch.randn(2, 3, 12, 15, generator=generator)
    c = seam_shift(difference, keep, reach=4.0).double()
    padded = torch.nn.functional.pad(c, (1, 1, 1, 1), mode="replicate")
    around = padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1] + padded[..., 1:-1, 2:] + padded[..., 1:-1, :-2]
    assert torch.allclose((around - 4 * c)[..., ~keep], (c / 16)[..., ~keep], atol=1e-5)
    assert torch.equal(c[..., keep].float(), difference[..., keep])


def test_a_seam_shows_less_than_a_paste():
    own = torch.full((1, 3, 32, 32), 180, dtype=torch.uint8)
    decoded = torch.full((1, 3, 32, 32), 120, dtype=torch.uint8)
    keep = area("upper", 32)
    steps = {
        pixels: (found[0, 0, 15].float() - found[0, 0, 16].float()).abs().max()
        for pixels in ("kept", "pasted")
        if (found := compose(own, decoded, keep, pixels, 8)) is not None
    }
    assert steps["pasted"] == 60 and steps["kept"] < 10
    assert torch.equal(compose(own, decoded, keep, "decoded", 8), decoded)
