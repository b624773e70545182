"""Sampling settings as people bring them: unknown names, wrong types and values are one line."""

import numpy as np
import pytest

from digit.errors import DigitError
from digit.sampling.config import SamplingConfig, StageSampling, with_changes


def test_a_dictionary_changes_single_settings():
    cfg = with_changes(SamplingConfig(), {"prior": {"temperature": 0.5}, "batch_size": 4})
    assert cfg.prior == StageSampling(temperature=0.5, top_k=200) and cfg.batch_size == 4
    assert cfg.renderer == SamplingConfig().renderer and with_changes(cfg, {}) == cfg


@pytest.mark.usefixtures("unchecked")
def test_numpys_numbers_become_pythons():
    cfg = with_changes(SamplingConfig(), {"prior": {"top_k": np.int64(5), "top_p": np.float32(0.5)}})
    assert (cfg.prior.top_k, cfg.prior.top_p) == (5, 0.5)
    assert type(cfg.prior.top_k) is int and type(cfg.prior.top_p) is float
    assert type(SamplingConfig(batch_size=np.int64(3)).batch_size) is int


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"prior": {"topk": 3}}, r"no setting named prior.topk: did you mean prior.top_k\? the settings of prior are"),
        ({"prior": {"seed": 3}}, "no setting named prior.seed: the settings of prior are temperature, top_k"),
        ({"prior": {3: 3}}, "no setting named prior.3"),
        ({"top_k": 3}, r"no setting named top_k: top_k belongs to a stage, prior=\{'top_k': ...\} or renderer="),
        ({"temprature": 3}, "temperature belongs to a stage"),
        ({"batchsize": 3}, r"no setting named batchsize: did you mean batch_size\?"),
        ({"label": "cube"}, r"no setting named label: did you mean labels\?"),
        ({"xyz": 3}, "no setting named xyz: the settings are prior, renderer, batch_size, precision"),
        ({"prior": {"top_k": 2.5}}, "prior.top_k is 2.5: it must be a whole number"),
        ({"prior": {"top_k": True}}, "prior.top_k is True"),
        ({"prior": {"top_k": -1}}, "prior.top_k is -1: it must be at least 0"),
        ({"prior": {"top_k": None}}, "prior.top_k is None"),
        ({"renderer": {"top_p": "0.8"}}, "renderer.top_p is '0.8': it must be a finite number"),
        ({"renderer": {"top_p": 80}}, "renderer.top_p is 80.0: it must be above 0 and at most 1"),
        ({"renderer": {"temperature": float("nan")}}, "renderer.temperature is nan"),
        ({"renderer": {"cfg_scale": "high"}}, "renderer.cfg_scale is 'high'"),
        ({"renderer": {"num_steps": 0}}, "renderer.num_steps is 0: it must be at least 1"),
        ({"renderer": {"choice_temperature": -1}}, "renderer.choice_temperature is -1.0"),
        ({"prior": 100}, "prior is 100: give a dictionary"),
        ({"prior": None}, "prior is None: give a dictionary"),
        ({"batch_size": 2.0}, "batch_size is 2.0: it must be a whole number"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"precision": "bf61"}, "precision is 'bf61': it must be fp32 or bf16"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_are_one_line(changes, said):
    with pytest.raises(DigitError, match=said) as caught:
        with_changes(SamplingConfig(), changes)
    assert "\n" not in str(caught.value)
