"""A rehearsal cuts steps, images and widths, says so, and leaves the structure of everything."""

import pytest

from digit.reproduce.rehearsal import Cut, differing, listed, rehearsed
from digit.reproduce.scales import SCALES, get_scale
from digit.runs.recipes import Recipe


def recipes(scale) -> dict[str, Recipe]:
    return {name: value for name, value in vars(scale).items() if isinstance(value, Recipe)}


@pytest.mark.parametrize("name", SCALES)
def test_structure_stays_and_work_is_cut(name):
    scale, (short, cuts) = get_scale(name), rehearsed(get_scale(name))
    for own, recipe in recipes(scale).items():
        cut = recipes(short)[own]
        assert cut.quantizer_cfg.vocab_size == recipe.quantizer_cfg.vocab_size and cut.vqgan == recipe.vqgan
        assert (cut.preprocess, cut.encoder) == (recipe.preprocess, recipe.encoder)
        for part in ("prior", "renderer"):
            assert getattr(cut, part).depth == getattr(recipe, part).depth
            assert getattr(cut, part).num_heads == getattr(recipe, part).num_heads
            assert (
                getattr(cut, part).embed_dim <= 64 and getattr(cut, part).embed_dim % getattr(cut, part).num_heads == 0
            )
            training = getattr(cut, f"{part}_training")
            assert training.num_steps <= 4 and training.accumulate == getattr(recipe, f"{part}_training").accumulate
    assert short.seeds == scale.seeds and short.clusters == scale.clusters and short.num_samples == 16
    assert cuts and all(cut.paper != cut.rehearsal for cut in cuts)


def test_every_cut_is_said():
    scale, (short, cuts) = get_scale("paper"), rehearsed(get_scale("paper"))
    assert cuts == list(differing(scale, short))
    assert Cut("num_samples", 50_000, 16) in cuts and "recipe.prior.embed_dim: 1024 -> 64" in listed(cuts)
    assert not any(word in cut.setting for cut in cuts for word in ("depth", "num_clusters", "image_size", "seeds"))
    assert rehearsed(short)[1] == [], "a rehearsal has nothing left to cut"


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_every_batch_can_be_shared_by_the_ranks(monkeypatch, ranks):
    monkeypatch.setattr("digit.runtime.distributed.launched_size", lambda: ranks)
    short, _ = rehearsed(get_scale("paper"))
    for recipe in (short.recipe, short.large, short.compared):
        for cfg in (recipe.prior_training, recipe.renderer_training):
            assert cfg.batch_size % (ranks * cfg.accumulate) == 0
    assert short.num_train == 4000
