"""Which settings of a folder of reproductions may differ when the command runs again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from reproduced import DATA, micro_scale

from digit.cli import main
from digit.errors import MismatchError
from digit.reproduce.study import Study, changes_no_result


@pytest.mark.parametrize(
    "setting",
    [
        "scale.recipe.prior_training.accumulate",
        "scale.large.renderer_training.accumulate",
        "scale.compared.prior_training.save_every",
        "scale.seeds",
        "scale.encoders",
    ],
)
def test_what_changes_no_result_may_differ(setting):
    assert changes_no_result(setting)


@pytest.mark.parametrize(
    "setting",
    [
        "scale.recipe.sampling.prior.top_k",
        "scale.large.class_top_k",
        "scale.recipe.class_top_k",
        "scale.short.masked_top_p",
        "scale.recipe.prior_training.num_steps",
        "scale.num_samples",
    ],
)
def test_what_changes_a_result_may_not(setting):
    assert not changes_no_result(setting)


def test_tokens_of_another_seed_are_said(tmp_path, capsys):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text(json.dumps({"seed": 3}))
    words = ["reproduce", "table1", "--data", "shapes:num=60,size=64", "--out", str(tmp_path / "out"), "--plan"]
    main([*words, "--reuse_tokens", str(tmp_path / "tokens")])
    assert "of the crops of seed 3, the run has seed 0" in capsys.readouterr().err


def test_a_folder_of_an_older_version_is_that_of_the_same_settings(tmp_path):
    """older_study.json was recorded before recipes had quantizers, levels, fits, aligned prefixes and previews."""
    scale = micro_scale()
    older = json.loads(Path(__file__).with_name("older_study.json").read_text())
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "parts.json").write_text("{}")
    request = Study(DATA, scale, tmp_path / "new", device="cpu").request
    (tmp_path / "study.json").write_text(json.dumps(request | older))
    Study(DATA, scale, tmp_path, device="cpu")  # it checks
    recipe = scale.recipe
    for changed, text in (
        (
            replace(recipe, quantizer="residual_kmeans"),
            "scale.recipe.quantizer = kmeans, now asked for residual_kmeans",
        ),
        (
            replace(recipe, preprocess=replace(recipe.preprocess, fit="pad")),
            "scale.recipe.preprocess.fit = crop, now asked for pad",
        ),
        (
            replace(recipe, prior=replace(recipe.prior, embed_dim=16)),
            "scale.recipe.prior.embed_dim = 32, now asked for 16",
        ),
    ):
        with pytest.raises(MismatchError, match=text):
            Study(DATA, replace(scale, recipe=changed), tmp_path, device="cpu")
