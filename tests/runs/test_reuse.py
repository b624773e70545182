"""A model of another run is taken as it is where it is the same, and refused where it is not."""

import os
from dataclasses import replace

import pytest
from tiny import SHAPES, tiny_recipe

from digit.errors import DigitError, MismatchError
from digit.runs.claim import OtherSettingsError
from digit.runs.fit import Run, other_seed


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Run:
    run = Run(replace(tiny_recipe(), class_conditional=False), SHAPES, tmp_path_factory.mktemp("first"))
    run.train_model("renderer")
    return run


def second(first: Run, out, **changes) -> Run:
    parts = {part: first.out / part for part in ("codebook", "vqgan", "tokens", "renderer")}
    return Run(replace(tiny_recipe(), **changes), SHAPES, out, reuse=parts)


def test_a_renderer_is_taken_from_another_run(first, tmp_path):
    run = second(first, tmp_path / "second", class_conditional=True)
    taken, own = run.train_model("renderer").state_dict(), first.train_model("renderer").state_dict()
    assert all(tensor.equal(own[name]) for name, tensor in taken.items())
    assert not (run.out / "renderer").exists() and run.num_classes


def test_tokens_of_another_seed_are_taken_and_said(first, tmp_path):
    """The crops are those of the store's seed, whatever the run's."""
    assert second(first, tmp_path / "same").notes == []
    run = second(first, tmp_path / "other", seed=7)
    assert len(run.notes) == 1 and "of the crops of seed 0, the run has seed 7" in run.notes[0]
    plain = replace(tiny_recipe().preprocess, random_crop=False, flip=False)  # every seed has the same crops
    assert other_seed(first.out / "tokens", replace(tiny_recipe(), seed=7, preprocess=plain)) == []


def test_a_model_of_another_shape_is_refused(first, tmp_path):
    run = second(first, tmp_path / "other", renderer=replace(tiny_recipe().renderer, embed_dim=16))
    with pytest.raises(MismatchError, match="embed_dim = 32, now asked for 16"):
        run.train_model("renderer")


def test_a_model_that_is_not_there_is_refused(first, tmp_path):
    with pytest.raises(DigitError, match="holds no model.json|does not exist"):
        Run(first.recipe, SHAPES, tmp_path / "third", reuse={"prior": first.out / "prior"})


def test_the_two_sampling_rules_reach_the_pipeline(first):
    assert first.make_pipeline(None, "vq_ar_epochs").sampling.renderer.top_p == 0.8
    assert first.make_pipeline(None, "vq_masked").sampling.renderer.top_p == 1
    assert first.training_config("vq_ar_epochs").num_steps == first.recipe.renderer_training.num_steps


def test_another_codebook_takes_the_vq_tokens(first, tmp_path):
    parts = {"vqgan": first.out / "vqgan", "vq_tokens": first.out / "tokens"}
    recipe = replace(tiny_recipe(), kmeans=replace(tiny_recipe().kmeans, num_clusters=9))
    run = Run(recipe, SHAPES, tmp_path / "second", reuse=parts)
    store, own = run.write_tokens(), first.write_tokens()
    assert os.path.samefile(store.folder / "vq.npy", own.folder / "vq.npy")
    assert store.discriminative.max() < 9 and (store.labels == own.labels).all()


def test_vq_tokens_beside_reused_tokens_are_refused(first, tmp_path):
    parts = {part: first.out / part for part in ("codebook", "vqgan", "tokens")}
    with pytest.raises(DigitError, match="leave out --reuse_vq_tokens"):
        Run(first.recipe, SHAPES, tmp_path / "second", reuse=parts | {"vq_tokens": first.out / "tokens"})


def test_a_changed_codebook_offers_the_vq_tokens(first):
    recipe = replace(first.recipe, kmeans=replace(first.recipe.kmeans, num_clusters=9))
    with pytest.raises(OtherSettingsError) as caught:
        Run(recipe, SHAPES, first.out)
    assert caught.value.kept == {"vqgan": first.out / "vqgan", "vq_tokens": first.out / "tokens"}
