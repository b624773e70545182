"""Completion around any kept cells, and the tokens that are shown while they are sampled."""

import pytest
import torch
from studio_toys import studio_pipeline
from toy_pipeline import toy_pipeline

from digit.errors import DigitError
from digit.pipeline.around import sample_around, spread
from digit.pipeline.cells import cell_grid, fill_cells
from digit.pipeline.labels import ClassPositions
from digit.pipeline.steps import UNDECIDED
from digit.sampling.config import StageSampling
from digit.sampling.kinds import make_sampler

KEEP = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]]).bool()


@pytest.fixture(scope="module")
def pipe():
    return studio_pipeline()


@pytest.fixture(scope="module")
def image(pipe):
    return pipe.generate(1, ClassPositions([4]), seed=3)


def test_whole_rows_equal_complete(pipe, image):
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:2] = True
    found = fill_cells(pipe, image, keep, num=3, seed=5, label=ClassPositions([2]))
    alone = [pipe.complete(image, 0.5, 5 + i, ClassPositions([2]), pixels="decoded") for i in range(3)]
    assert torch.equal(found.images, torch.cat(alone)) and found.label == 2


def test_kept_tokens_and_pixels_are_the_pictures_own(pipe, image):
    found = fill_cells(pipe, image, KEEP, num=4)
    fine = KEEP.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert (found.discriminative[:, KEEP.flatten()] == pipe.tokenizer.encode(image)[:, KEEP.flatten()]).all()
    assert (found.vq[:, fine.flatten()] == pipe.vq.encode(image)[:, fine.flatten()]).all()
    pixels = KEEP.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert (found.pasted[:, :, pixels] == image[:, :, pixels]).all()
    assert (found.pasted[:, :, ~pixels] == found.images[:, :, ~pixels]).all()
    assert (found.blended[:, :, pixels] == image[:, :, pixels]).all()
    assert len(found.vq.unique(dim=0)) > 1  # the proposals differ


def test_a_proposal_depends_on_its_seed_alone(pipe, image):
    many = fill_cells(pipe, image, KEEP, num=3, seed=7, batch_size=16)
    one = fill_cells(pipe, image, KEEP, num=1, seed=9, batch_size=16)
    assert torch.equal(many.vq[2:], one.vq)


def test_forced_tokens_equal_a_decoding_that_asks_at_each_step(pipe):
    """sample_around against the plain definition: token i is the kept one, else sampled given all before it."""
    sampler = make_sampler(pipe.prior, StageSampling(), micro_batch_size=4, stage="prior")
    tokens, keep, seeds = torch.arange(16)[None].expand(4, -1) % 7, KEEP.flatten(), [1, 2, 3, 4]
    labels = torch.tensor([0, 1, 2, 3])
    expected = tokens.clone()
    for i in range(16):
        if not keep[i]:
            expected[:, i] = sampler(seeds, labels=labels, given=expected[:, :i])[:, i]
    assert torch.equal(sample_around(sampler, seeds, tokens, keep, labels=labels), expected)


def test_nothing_and_everything_kept(pipe, image):
    label, all_cells = ClassPositions([1]), torch.ones(4, 4).bool()
    assert torch.equal(
        fill_cells(pipe, image, ~all_cells, num=1, seed=6, label=label).images, pipe.generate(1, label, 6)
    )
    kept = fill_cells(pipe, image, all_cells, num=1)
    assert torch.equal(kept.pasted, image) and torch.equal(kept.vq, pipe.vq.encode(image))


def test_masked_and_vq_only_pipelines(image):
    masked = toy_pipeline(prior=False, masked=True)
    picture = masked.generate(1, seed=1)
    found = fill_cells(masked, picture, KEEP, num=2, label="dog")
    assert cell_grid(masked) == (4, 4) and found.discriminative is None
    assert (found.vq[:, KEEP.flatten()] == masked.vq.encode(picture)[:, KEEP.flatten()]).all()


@pytest.mark.parametrize("keep", [torch.ones(4, 3).bool(), torch.ones(2, 2).bool(), torch.ones(8, 8).bool()])
def test_other_grids_are_refused(pipe, image, keep):
    with pytest.raises(DigitError, match="give one picture and cells"):
        fill_cells(pipe, image, keep)


def test_several_pictures_or_labels_are_refused(pipe, image):
    with pytest.raises(DigitError, match="one picture"):
        fill_cells(pipe, torch.cat([image, image]), KEEP)
    with pytest.raises(DigitError, match="2 labels for one picture"):
        fill_cells(pipe, image, KEEP, label=ClassPositions([1, 2]))


def test_spread_takes_the_cell_at_the_centre():
    keep = torch.tensor([[True, False], [False, True]])
    assert spread(keep, (4, 4)).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert spread(keep, (3, 2)).int().tolist() == [[1, 0], [0, 1], [0, 1]]
    assert torch.equal(spread(KEEP, (4, 4)), KEEP)


# ---------------------------------------------------------------- steps


def watching(call):
    """What `call(on_step)` reports."""
    seen = []
    result = call(lambda stage, tokens: seen.append((stage, tokens.clone())))
    return result, seen


def test_each_step_shows_one_token_more_and_the_last_all(pipe):
    def call(on_step):
        return list(pipe.stream(3, seed=4, on_step=on_step))

    [batch], seen = watching(call)
    decided = [(stage, (tokens != UNDECIDED).sum(1).tolist()) for stage, tokens in seen]
    assert decided == [("prior", [n] * 3) for n in range(1, 17)] + [("renderer", [n] * 3) for n in range(1, 65)]
    assert torch.equal(seen[15][1], batch.tokens["discriminative"]) and torch.equal(seen[-1][1], batch.tokens["vq"])


def test_watching_changes_nothing(pipe):
    plain = list(pipe.stream(3, seed=4, batch_size=2))
    watched, seen = watching(lambda on_step: list(pipe.stream(3, seed=4, batch_size=2, on_step=on_step)))
    assert all(torch.equal(a.images, b.images) for a, b in zip(plain, watched, strict=True))
    assert [tokens.shape[0] for _, tokens in seen] == [2] * 80 + [1] * 80  # a padded micro-batch shows its own rows


def test_micro_batches_are_shown_one_after_the_other(pipe, monkeypatch):
    monkeypatch.setattr("digit.pipeline.generation.micro_batch_size", lambda model, size: 2)
    _, seen = watching(lambda on_step: list(pipe.stream(3, seed=4, on_step=on_step)))
    prior = [(tokens != UNDECIDED).sum(1).tolist() for stage, tokens in seen if stage == "prior"]
    assert prior == [[n, n, 0] for n in range(1, 17)] + [[16, 16, n] for n in range(1, 17)]


def test_a_masked_model_shows_its_guess(pipe):
    masked = toy_pipeline(masked=True)
    tokens, seen = watching(lambda on_step: masked.render_tokens([[0, 1, 2, 3]] * 2, 1, on_step=on_step))
    assert len(seen) == 8 and all(shown.shape == tokens.shape and (shown >= 0).all() for _, shown in seen)


def test_given_tokens_are_shown_from_the_start(pipe, image):
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:3] = True
    _, seen = watching(lambda on_step: fill_cells(pipe, image, keep, num=2, on_step=on_step))
    own = pipe.tokenizer.encode(image)[:, :12]
    assert [(t != UNDECIDED).sum(1).tolist() for s, t in seen if s == "prior"] == [[n, n] for n in range(13, 17)]
    assert all((tokens[:, :12] == own).all() for stage, tokens in seen if stage == "prior")
