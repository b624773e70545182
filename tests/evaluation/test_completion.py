"""Completion: distances by kept prefix, fractions of whole token rows, the cache after an interruption."""

import math

import pytest
import torch
from PIL import Image
from toy_judge import ToyJudge

from digit.errors import DigitError
from digit.evaluation.completion import exact_fractions, kept, run_completion
from digit.metrics.completion import KEEPS, complete_and_judge, curve_difference, distance_curve
from digit.metrics.frechet import FeatureStats, frechet_distance
from digit.metrics.influence import frechet_difference
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime.files import read_json


@pytest.fixture(scope="module")
def pipes(run) -> dict[str, DigitPipeline]:
    return {"discriminative": run.make_pipeline("prior", "renderer"), "VQ-only": run.make_pipeline(None, "vq_ar")}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    real = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return ToyJudge().judge(real).pooled


# -------------------------------------------------------------------- the metric, on any callable


def black_below(images, keep, first):
    completed = images.clone()
    completed[:, :, round(keep * images.shape[2]) :] = 0
    return completed


def test_batches_are_numbered_and_put_together(images):
    seen = []

    def complete(batch, keep, first):
        seen.append((len(batch), keep, first))
        return black_below(batch, keep, first)

    result = complete_and_judge(complete, images, 0.5, lambda x: x.float().mean((2, 3)), batch_size=4, num_shown=5)
    assert seen == [(4, 0.5, 0), (4, 0.5, 4), (1, 0.5, 8)]
    torch.testing.assert_close(result["features"], black_below(images, 0.5, 0).float().mean((2, 3)))
    assert torch.equal(result["shown"], black_below(images[:5], 0.5, 0))


def test_a_completion_of_another_shape_is_refused(images):
    with pytest.raises(DigitError, match=r"gave torch.uint8 \(9, 3, 16, 32\), wanted uint8 \(9, 3, 32, 32\)"):
        complete_and_judge(lambda x, keep, first: x[:, :, :16], images, 0.5, lambda x: x.float().mean((2, 3)))
    with pytest.raises(DigitError, match="no images"):
        complete_and_judge(black_below, images[:0], 0.5, lambda x: x.float().mean((2, 3)))


def test_the_distance_falls_as_more_is_kept():
    generator = torch.Generator().manual_seed(0)
    real, images = (torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator) for _ in range(2))
    features = ToyJudge().judge
    found = {
        k: complete_and_judge(black_below, images, k, lambda x: features(x).pooled)["features"] for k in (*KEEPS, 1.0)
    }
    reference = FeatureStats.of(features(real).pooled)
    curve = distance_curve(found, reference)
    values = [curve[keep].value for keep in (*KEEPS, 1.0)]
    assert values == sorted(values, reverse=True)
    own = FeatureStats.of(found[0.5])
    assert curve[0.5].value == pytest.approx(frechet_distance(own.mean, own.cov, reference.mean, reference.cov))
    assert all(i.low <= i.value <= i.high for i in curve.values())


def test_differences_are_paired_by_image():
    random = torch.Generator().manual_seed(0)
    base, other = (torch.randn(400, 4, generator=random, dtype=torch.float64) for _ in range(2))
    reference = FeatureStats.of(torch.randn(1000, 4, generator=random))
    near = base + 0.02 + 0.01 * other  # the same images, moved a little
    found = curve_difference({0.25: near, 0.5: near}, {0.25: base, 0.75: base}, reference)
    assert list(found) == [0.25]
    apart = frechet_difference(near, base, reference.mean, reference.cov, paired=False)
    assert found[0.25].value == pytest.approx(apart.value)
    assert found[0.25].high - found[0.25].low < 0.3 * (apart.high - apart.low)
    with pytest.raises(DigitError, match="no pairs"):
        frechet_difference(near[:300], base, reference.mean, reference.cov)


# -------------------------------------------------------------------- whole rows


def test_only_exact_fractions_are_evaluated(pipes):
    discriminative, vq = pipes["discriminative"], pipes["VQ-only"]  # 2 x 2 and 4 x 4 tokens; 4 x 4 tokens
    assert exact_fractions(discriminative, KEEPS) == [0.5] and exact_fractions(vq, KEEPS) == [0.25, 0.5, 0.75]
    assert kept(discriminative, 0.25) == {"discriminative": 0.5, "vq": 0.25} and kept(vq, 0.25) == {"vq": 0.25}
    for pipe in (discriminative, vq):
        for keep in exact_fractions(pipe, KEEPS):
            assert all(math.isclose(got, keep) for got in kept(pipe, keep).values())


def test_fractions_that_cannot_be_kept_name_those_that_can(pipes):
    with pytest.raises(DigitError, match=r"keep none of \[0.125\] in whole rows: choose among 0.5$"):
        exact_fractions(pipes["discriminative"], [0.125])
    with pytest.raises(DigitError, match="between 0 and 1"):
        exact_fractions(pipes["VQ-only"], [0.5, 1.5])


# -------------------------------------------------------------------- the evaluation


def test_run_completion_writes_curve_differences_and_pictures(pipes, images, reference, tmp_path):
    result = run_completion(pipes, images, reference, ToyJudge(), KEEPS, tmp_path, seed=3)
    assert result == read_json(tmp_path / "completion.json")
    assert result["metric"] == "fd_toy" and result["num_images"] == 9 and result["reference_images"] == 40
    discriminative, vq = (result["pipes"][name] for name in pipes)
    assert [point["keep"] for point in discriminative["curve"]] == [0.5]
    assert [point["keep"] for point in vq["curve"]] == [0.25, 0.5, 0.75]
    assert discriminative["skipped"][1] == {"keep": 0.25, "kept": {"discriminative": 0.5, "vq": 0.25}}
    assert [point["keep"] for point in vq["skipped"]] == [0.125, 0.375, 0.625]
    (difference,) = result["differences"]
    expected = discriminative["curve"][0]["distance"]["value"] - vq["curve"][1]["distance"]["value"]
    assert difference["keep"] == 0.5 and difference["difference"]["value"] == pytest.approx(expected)
    for name in ("completion.png", "completed_discriminative.png", "completed_VQ-only.png"):
        assert min(Image.open(tmp_path / name).size) > 100


def test_metrics_equal_those_of_the_pipeline_itself(pipes, images, reference, tmp_path):
    labels = [k % 10 for k in range(9)]
    result = run_completion(pipes, images, reference, ToyJudge(), [0.5], tmp_path, seed=3, labels=labels)
    done = pipes["discriminative"].complete(images, 0.5, seed=3, labels=labels, pixels="decoded")
    own, real = (FeatureStats.of(x) for x in (ToyJudge().judge(done).pooled, reference))
    expected = frechet_distance(own.mean, own.cov, real.mean, real.cov)
    assert result["pipes"]["discriminative"]["curve"][0]["distance"]["value"] == pytest.approx(expected, rel=1e-6)
    floor = FeatureStats.of(ToyJudge().judge(pipes["VQ-only"].vq.decode(pipes["VQ-only"].vq.encode(images))).pooled)
    expected = frechet_distance(floor.mean, floor.cov, real.mean, real.cov)
    assert result["pipes"]["VQ-only"]["reconstruction"]["value"] == pytest.approx(expected, rel=1e-6)
    assert result["pipes"]["VQ-only"]["labels"] == "given"


def test_completions_are_cached_and_an_interrupted_run_resumes(pipes, images, reference, tmp_path, monkeypatch):
    calls, complete = [], DigitPipeline.complete

    def counted(self, pictures, keep, seed, labels, **options):
        calls.append(keep)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(self, pictures, keep, seed, labels, **options)

    monkeypatch.setattr(DigitPipeline, "complete", counted)
    with pytest.raises(KeyboardInterrupt):
        run_completion(pipes, images, reference, ToyJudge(), [0.25, 0.5], tmp_path)
    assert calls == [0.5, 1.0, 0.25]  # discriminative at 0.5, its reconstruction, VQ-only at 0.25
    result = run_completion(pipes, images, reference, ToyJudge(), [0.25, 0.5], tmp_path)
    assert calls[3:] == [0.25, 0.5, 1.0]
    again = run_completion(pipes, images, reference, ToyJudge(), [0.25, 0.5], tmp_path)
    assert len(calls) == 6 and again == result
    singular = "9 samples for 12 features: the covariance is singular and the distance far too high"
    assert again["warnings"][0] == singular, "from the cache too"
    fresh = run_completion(pipes, images, reference, ToyJudge(), [0.25, 0.5], tmp_path / "fresh")
    assert fresh == result, "interrupted equals uninterrupted"
    for changes in ({"seed": 1}, {"labels": [0] * 9}):
        before = len(calls)
        run_completion(pipes, images, reference, ToyJudge(), [0.5], tmp_path, **changes)
        assert len(calls) == before + 4, f"{changes} is another request"


def test_a_damaged_cache_is_made_again(pipes, images, reference, tmp_path):
    result = run_completion(pipes, images, reference, ToyJudge(), [0.5], tmp_path)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    assert run_completion(pipes, images, reference, ToyJudge(), [0.5], tmp_path) == result
