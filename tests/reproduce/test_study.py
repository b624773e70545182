"""Which settings of a folder of reproductions may differ when the command runs again."""

import pytest

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
