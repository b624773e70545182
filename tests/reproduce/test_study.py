"""Which settings of a folder of reproductions may differ when the command runs again."""

import json

import pytest

from digit.cli import main
from digit.reproduce.study import changes_no_result


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
