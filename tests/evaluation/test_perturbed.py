"""Distances of images decoded from tokens of noisy pictures: by hand, and of decoders that are known."""

import numpy as np
import pytest
import torch
from toy_judge import ToyJudge
from toy_measure import pictures
from toy_pipeline import toy_pipeline

from digit.errors import DigitError
from digit.evaluation.perturbed import perturbed_distances, to_lines, token_decoders
from digit.metrics.frechet import FeatureStats, frechet_distance
from digit.metrics.kernels import cubic_distance
from digit.metrics.stability import StabilityConfig, add_noise

CFG = StabilityConfig(snrs=(20, 5))


def test_distances_equal_what_is_done_by_hand():
    images, judge = pictures(40), ToyJudge()
    decoders = {"half": lambda x: x // 2}
    found = perturbed_distances(decoders, images, judge, CFG, batch_size=16)
    assert [row["snr"] for row in found["distances"]["half"]] == [None, 20, 5] and found["num_images"] == 40
    clean = judge.judge(images).pooled
    for row in found["distances"]["half"]:
        noisy = images if row["snr"] is None else add_noise(images, row["snr"], cfg=CFG)
        x = judge.judge(noisy // 2).pooled
        a, b = FeatureStats.of(x), FeatureStats.of(clean)
        assert row["fd_toy"]["value"] == pytest.approx(frechet_distance(a.mean, a.cov, b.mean, b.cov), rel=1e-6)
        assert row["kd_toy"] == pytest.approx(cubic_distance(x, clean).to_dict(), rel=1e-6)


def test_stable_tokens_cost_nothing_and_unstable_ones_do():
    images = pictures(60)
    centres = images.flatten(1).float()

    def nearest(x):  # as a codebook of whole pictures: no noise changes the token
        return images[torch.cdist(x.flatten(1).float(), centres).argmin(1)]

    found = perturbed_distances({"stable": nearest, "unstable": lambda x: x}, images, ToyJudge(), CFG)["distances"]
    assert [row["fd_toy"]["value"] for row in found["stable"]] == pytest.approx([0] * 3, abs=1e-9)
    values = [row["fd_toy"]["value"] for row in found["unstable"]]
    assert values[0] == pytest.approx(0, abs=1e-9) and values[0] < values[1] < values[2]


def test_a_pipelines_tokens_are_decoded():
    pipe, images = toy_pipeline(), pictures(12)
    decoders = token_decoders(pipe)
    assert list(decoders) == ["vq"]  # the toy has no encoder
    assert torch.equal(decoders["vq"](images), pipe.vq.decode(pipe.vq.encode(images)))
    found = perturbed_distances(decoders, images, ToyJudge(), CFG)
    lines = to_lines(found, "fd_toy").splitlines()
    assert lines[0] == "| fd_toy of decoded images, SNR | none | 20 | 5 |" and lines[2].startswith("| vq ↓ |")
    assert np.isfinite([row["fd_toy"]["value"] for row in found["distances"]["vq"]]).all()


def test_what_cannot_be_measured_is_said():
    pipe = toy_pipeline()
    pipe.vq = None
    with pytest.raises(DigitError, match="no VQGAN"):
        token_decoders(pipe)
    with pytest.raises(DigitError, match="at least 3"):
        perturbed_distances({}, pictures(2), ToyJudge(), CFG)
