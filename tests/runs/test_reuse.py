"""A model of another run is taken as it is where it is the same, and refused where it is not."""

from dataclasses import replace

import pytest
from tiny import SHAPES, tiny_recipe

from digit.errors import DigitError, MismatchError
from digit.runs.fit import Run


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
