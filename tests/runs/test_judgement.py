"""What the report measures: sets that do not overlap, a scale, both ways to sample, copies that are found."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from studio_toys import ToyJudge, studio_pipeline

from digit.data.shapes import ShapesSource
from digit.metrics.judge import METRIC, fd
from digit.runs import judgement
from digit.runs.judgement import (
    choose_real,
    count_repeated,
    count_twice,
    find_ways,
    judge_run,
    most_equal,
    say_stability,
    scale,
    verdict_on_copies,
)

SOURCE = ShapesSource(num=80, size=32)


@pytest.fixture(scope="module")
def pipe():
    return studio_pipeline()


@pytest.fixture(scope="module")
def judged(pipe):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judgement, "load_judge", ToyJudge)
        patch.setattr(judgement, "NOISY", 4)
        yield judge_run(pipe, SOURCE, num=24, seed=5)


# -------------------------------------------------------------------- sets


@pytest.mark.parametrize(("total", "num"), [(24, 64), (2640, 500), (50_000, 500)])
def test_training_and_other_pictures_do_not_overlap(total, num):
    training, others = choose_real(total, num)
    assert not set(training) & set(others) and len(others) == min(num, total // 4)
    assert len(training) == min(judgement.REFERENCE, total - len(others)) and max([*training, *others]) < total


def test_pictures_that_are_held_out_come_first():
    held_out = list(range(0, 1000, 20))
    training, others = choose_real(1000, 200, held_out=held_out)
    assert set(held_out) <= set(others) and len(others) == 200 and not set(training) & set(others)
    few = choose_real(1000, 30, held_out=held_out)[1]
    assert set(few) <= set(held_out) and len(few) == 30


def test_a_source_of_very_few_pictures():
    assert choose_real(3, 64) == ([0, 1, 2], [])


# -------------------------------------------------------------------- the judgement


def test_every_set_has_equally_many_pictures(judged):
    found = judged.metrics["scale"]
    assert found["images"] == 20 and found["reference"] == 60
    assert found["sets"].keys() == {"samples", "other_way", "real", "reconstructions"}
    for entry in found["sets"].values():
        assert entry.keys() == {METRIC, "precision", "recall", "coverage"} and entry[METRIC] > 0


def test_the_metric_is_that_of_all_samples(judged):
    assert judged.metrics[f"{METRIC}_images"] == [24, 60]
    assert {"recognised", "recognised_real", "recognised_reconstructions"} <= judged.metrics.keys()
    assert judged.metrics["recognised_by_class"].keys() >= judged.metrics["recognised_real_by_class"].keys()


def test_pairs_name_pictures_of_the_source(pipe, judged):
    training, _ = choose_real(80, 24)
    for pairs in judged.pairs.values():
        assert len(pairs) == 6 and {pair.image for pair in pairs} <= set(training)
    ratios = [pair.ratio for pair in judged.pairs["closest"]]
    assert ratios == sorted(ratios)


def test_real_pictures_are_nearer_than_noise():
    generator = torch.Generator().manual_seed(0)
    reference, real, noise = (torch.randn(60, 8, generator=generator) * s for s in (1, 1, 4))
    found = scale({"samples": noise, "real": real, "reconstructions": real}, reference)["sets"]
    assert found["samples"][METRIC] > found["real"][METRIC] == fd(real, reference)
    assert found["samples"]["recall"]["value"] != found["real"]["recall"]["value"]
    assert scale({"samples": noise}, reference) == {}


# -------------------------------------------------------------------- guidance


def test_ways_of_a_run_that_samples_without_guidance(pipe):
    ways = find_ways(pipe)
    assert ways.guided == {"prior": {"cfg_scale": 1.5}} and ways.plain == {"prior": {"cfg_scale": 1.0}}
    assert not ways.by_default and ways.other == ways.guided and ways.names == ("without guidance", "with guidance")


def test_ways_of_a_run_that_samples_with_guidance(pipe):
    guided = studio_pipeline()
    guided.sampling = replace(guided.sampling, prior=replace(guided.sampling.prior, cfg_scale=3.0))
    ways = find_ways(guided)
    assert ways.by_default and ways.guided == {"prior": {"cfg_scale": 3.0}} and ways.other == ways.plain
    assert ways.names == ("with guidance", "without guidance")


def test_no_ways_without_dropped_labels():
    pipe = studio_pipeline()
    pipe.prior.cfg = replace(pipe.prior.cfg, label_dropout=0.0)
    assert find_ways(pipe) is None


def test_slow_samples_are_not_drawn_twice(pipe, monkeypatch):
    monkeypatch.setattr(judgement, "load_judge", ToyJudge)
    monkeypatch.setattr(judgement, "NOISY", 2)
    monkeypatch.setattr(judgement, "OTHER_WAY_SECONDS", 0.0)
    assert "other_way" not in judge_run(pipe, SOURCE, num=24, seed=5).metrics["scale"]["sets"]


# -------------------------------------------------------------------- memorising


def test_copies_are_found():
    """Samples that are training pictures through the tokenizer: the score and the tokens say so."""
    pipe = studio_pipeline()
    training, _ = choose_real(80, 24)
    images, _ = judgement.real_images(SOURCE, pipe.preprocess, training[:24])
    tokens = {"vq": pipe.vq.encode(images), "discriminative": pipe.tokenizer.encode(images)}
    rows = {name: t.numpy().astype(np.uint16) for name, t in tokens.items()}
    store = SimpleNamespace(**rows, crops_per_image=1)
    reference = judgement.judge_real(ToyJudge(), SOURCE, pipe.preprocess, training)
    features = ToyJudge().pooled(pipe.decode(tokens["vq"]))
    sampled = judgement.Samples(images, features, torch.zeros(24, dtype=torch.int64), tokens, 0.0)
    found = judgement.memorising(sampled, {}, reference, judgement.compare(reference.features, features), store)
    assert found["verdict"] == "copies" and found["repeated"]["vq"] == 24 and found["most_equal_vq_tokens"] == 1


def test_repeats_are_counted():
    rows = np.array([[1, 2], [3, 4], [1, 2], [5, 6]], dtype=np.uint16)
    assert count_twice(rows) == 2
    assert count_repeated(torch.tensor([[3, 4], [7, 8], [3, 4]]), rows) == 2
    assert most_equal(torch.tensor([[3, 9], [7, 8]]), rows).tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("found", "verdict", "told"),
    [
        ({"score": -4.0, "near": 0.03, "near_real": 0.01}, "copies", "learnt by heart"),
        (
            {"score": -4.0, "near": 0.0, "near_real": 0.0},
            "none",
            "nearer to training pictures than .*but none is nearly",
        ),
        ({"score": 0.0, "near": 0.03, "near_real": 0.01}, "none", "about as far"),
        ({"score": 0.0, "near": 0.3, "near_real": 0.01}, "copies", "30% of the samples lie very near .* 1%"),
        ({"score": 0.5, "near": 0.01, "near_real": 0.01}, "none", "as far from training pictures as"),
        ({"score": 9.0}, "none", "farther from training pictures than"),
        ({}, "unknown", "too few pictures"),
        ({"score": 1.0, "repeated": {"vq": 30}}, "copies", "exactly the VQ tokens"),
        ({"score": 1.0, "nearly_repeated": 30}, "copies", "share 90% of their VQ tokens"),
        ({"score": 1.0, "repeated": {"discriminative": 50}, "repeated_real": 0.3}, "none", "10% of the samples have"),
    ],
)
def test_verdicts(found, verdict, told):
    assert verdict_on_copies({"samples": 500, **found})[0] == verdict
    assert re.search(told, verdict_on_copies({"samples": 500, **found})[1])


# -------------------------------------------------------------------- stability


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"discriminative": [0.1], "vq": [0.5]}, "5.0 times as stable"),
        ({"discriminative": [0.0], "vq": [0.5]}, "far more stable"),
        ({"discriminative": [0.6], "vq": [0.5]}, "not more stable"),
        ({"discriminative": [0.2]}, "changes 20% of the discriminative tokens"),
    ],
)
def test_the_sentence_on_stability(changed, told):
    assert told in say_stability({"snrs": [30.0], "images": 48, "changed": changed})
    assert say_stability({}) == ""
