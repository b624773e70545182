"""The sampling sweep: its settings and metrics, what is sampled and what is reused, and interrupted sweeps."""

from copy import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from toy_judge import ToyJudge

from digit.errors import DigitError
from digit.evaluation import sweep as module
from digit.evaluation.sweep import SweepConfig, run_sweep, varied
from digit.metrics.frechet import FeatureStats, frechet_distance
from digit.metrics.scores import inception_score
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime.files import read_json

CFG = SweepConfig(top_k=(3, 100), top_p=(0.5, 1.0), joint=True)
NUM = 6


@pytest.fixture(scope="module")
def pipe(run) -> DigitPipeline:
    return run.make_pipeline("prior", "renderer")


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    real = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return ToyJudge().judge(real).pooled


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Sampling calls of the pipeline, in order: "both" stages or the "renderer" alone."""
    made, both, renderer = [], DigitPipeline.generate_tokens, DigitPipeline.render_tokens
    monkeypatch.setattr(DigitPipeline, "generate_tokens", lambda *a, **k: made.append("both") or both(*a, **k))
    monkeypatch.setattr(DigitPipeline, "render_tokens", lambda *a, **k: made.append("renderer") or renderer(*a, **k))
    return made


def test_one_filter_of_one_stage_varies(pipe):
    own = pipe.sampling
    assert varied(pipe, "prior", "top_p", 0.5) == replace(own, prior=replace(own.prior, top_k=0, top_p=0.5))
    assert varied(pipe, "renderer", "top_k", 7) == replace(own, renderer=replace(own.renderer, top_k=7, top_p=1.0))


def test_num_settings_bounds_what_is_sampled(pipe, reference, tmp_path, calls):
    run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path, num=NUM)
    assert SweepConfig(top_k=(1, 2), top_p=(0.5,), cfg_scale=(2.0,)).num_settings == 9
    assert SweepConfig(top_k=(1,), top_p=(0.5,), joint_guidance=True).num_settings == 1 + 2 * 6 + 16
    assert len(calls) <= CFG.num_settings == 1 + 16 + 4


def test_a_prior_setting_is_sampled_once(pipe, reference, tmp_path, calls):
    result = run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path, num=NUM)
    # priors: the default (200 of 12 codes are all, as are 100 of them and probability 1), top-k 3, top-p 0.5
    assert calls.count("both") == 3
    renderers = {str(entry["sampling"]["renderer"]) for entry in module._settings(result)}
    pairs = {str(entry["sampling"]) for entry in module._settings(result)}
    assert len(renderers) == 4 and len(calls) == len(pairs)


def test_guidance_is_swept_where_a_model_was_trained_for_it(pipe, reference, tmp_path):
    guided = copy(pipe)
    guided.prior = copy(pipe.prior)
    guided.prior.cfg = replace(pipe.prior.cfg, label_dropout=0.1)
    cfg = SweepConfig(top_k=(0,), top_p=(1.0,), cfg_scale=(1.0, 2.0), joint_guidance=True)
    result = run_sweep(guided, reference, ToyJudge(), cfg, tmp_path, num=NUM)
    assert set(result["sweeps"]["prior"]) == {"top_k", "top_p", "cfg_scale"}
    assert set(result["sweeps"]["renderer"]) == {"top_k", "top_p"}
    none, two = result["sweeps"]["prior"]["cfg_scale"]
    distance = ToyJudge().metric("fd")
    assert none[distance] == result["default"][distance] != two[distance]
    assert two["sampling"]["prior"] == result["default"]["sampling"]["prior"] | {"cfg_scale": 2.0}  # filters stay
    assert result["joint_guidance"] is None  # the renderer has no null prefix
    with pytest.raises(DigitError, match="cfg_scale"):
        SweepConfig(cfg_scale=(1.0, -1.0))


def test_metrics_equal_those_of_the_pipeline_itself(pipe, reference, tmp_path):
    result = run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path, num=NUM, seed=5)
    assert result == read_json(tmp_path / "sweep.json")
    real = FeatureStats.of(reference)

    def expected(**sampling):
        judged = ToyJudge().judge(pipe.generate(NUM, seed=5, **sampling))
        own = FeatureStats.of(judged.pooled)
        distance = frechet_distance(own.mean, own.cov, real.mean, real.cov)
        return pytest.approx((distance, inception_score(judged.logits, 1)[0]), rel=1e-6)

    def got(entry):
        return entry["fd_toy"]["value"], entry["is_toy"]["value"]

    assert got(result["default"]) == expected()
    sweeps, off = result["sweeps"], {"top_k": 0, "top_p": 1.0}
    assert sweeps["prior"]["top_k"][0]["top_k"] == 3
    assert got(sweeps["prior"]["top_k"][0]) == expected(prior=off | {"top_k": 3})
    assert got(sweeps["renderer"]["top_p"][0]) == expected(renderer=off | {"top_p": 0.5})
    assert got(result["joint"]["metrics"][0][1]) == expected(prior=off | {"top_k": 3}, renderer=off)
    values = [got(entry) for entry in module._settings(result)]
    assert result["best"]["fd_toy"]["value"] == min(v[0] for v in values)
    assert result["best"]["is_toy"]["value"] == max(v[1] for v in values)
    for name in ("sweep.png", "joint.png"):
        assert min(Image.open(tmp_path / name).size) > 300


def test_cached_settings_are_not_sampled_or_judged_again(pipe, reference, tmp_path, calls):
    result = run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path, num=NUM)
    count, judge = len(calls), ToyJudge()
    assert run_sweep(pipe, reference, judge, CFG, tmp_path, num=NUM) == result
    assert len(calls) == count and judge.seen == 0
    run_sweep(pipe, reference, ToyJudge(num_classes=3), CFG, tmp_path, num=NUM)
    assert len(calls) == count, "another network judges the same tokens"


@pytest.mark.parametrize("changes", [{"num": NUM + 1}, {"seed": 1}])
def test_another_request_is_sampled_again(pipe, reference, tmp_path, calls, changes):
    cfg = SweepConfig(top_k=(3,), top_p=(0.5,))
    run_sweep(pipe, reference, ToyJudge(), cfg, tmp_path, num=NUM)
    count = len(calls)
    run_sweep(pipe, reference, ToyJudge(), cfg, tmp_path, **{"num": NUM} | changes)
    assert len(calls) == 2 * count


def test_another_pipeline_is_sampled_again(run, pipe, reference, tmp_path, calls):
    cfg = SweepConfig(top_k=(3,), top_p=(0.5,))
    run_sweep(pipe, reference, ToyJudge(), cfg, tmp_path, num=NUM)
    count, other = len(calls), run.make_pipeline("prior", "renderer")
    other.renderer.positions.data += 0.1
    run_sweep(other, reference, ToyJudge(), cfg, tmp_path, num=NUM)
    assert len(calls) == 2 * count


@pytest.mark.parametrize("after", [1, 4, 6])
def test_an_interrupted_sweep_resumes(pipe, reference, tmp_path, monkeypatch, after):
    whole = run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path / "whole", num=NUM)
    decoded, decode = [], DigitPipeline.decode

    def killed(self, tokens, precision=None):
        decoded.append(len(tokens))
        if len(decoded) == after:
            raise KeyboardInterrupt
        return decode(self, tokens, precision)

    monkeypatch.setattr(DigitPipeline, "decode", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path / "killed", num=NUM)
    assert run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path / "killed", num=NUM) == whole
    settings = len({str(entry["sampling"]) for entry in module._settings(whole)})
    assert len(decoded) == settings + 1, "only the interrupted setting was decoded twice"


def test_vq_only_pipelines_sweep_their_renderer(run, reference, tmp_path):
    pipe = run.make_pipeline(None, "vq_ar")
    result = run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path, num=NUM)
    assert list(result["sweeps"]) == ["renderer"] and result["joint"] is None and not (tmp_path / "joint.png").exists()


def test_a_network_without_logits_gives_distances_alone(pipe, reference, tmp_path):
    result = run_sweep(pipe, reference, ToyJudge(num_classes=0), CFG, tmp_path, num=NUM)
    assert "is_toy" not in result["default"] and list(result["best"]) == ["fd_toy"]
    assert (tmp_path / "sweep.png").exists() and (tmp_path / "joint.png").exists()


def test_few_images_are_warned_of_again_from_the_cache(pipe, reference, tmp_path, calls):
    results, counts = [], []
    for _ in range(2):
        results.append(run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path, num=NUM))
        counts.append(len(calls))
    assert counts[0] == counts[1], "the second is read from the cache"
    for result in results:
        assert result["warnings"] == [
            "6 samples for 12 features: the covariance is singular and the distance far too high",
            "40 reference images: below 10,000 images the distance is too high",
            "6 samples against 40 reference images: compare with metrics of the same two numbers only",
        ]
    assert read_json(tmp_path / "sweep.json") == results[1]


def test_a_score_of_one_split_has_no_deviation(pipe, reference, tmp_path):
    entry = run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path, num=NUM)["default"]["is_toy"]
    assert entry["std"] is None and entry["missing"] == "one split has no deviation"


def test_samples_that_do_not_vary_are_swept_without_intervals(pipe, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(DigitPipeline, "decode", lambda self, tokens, _: torch.zeros(len(tokens), 3, 32, 32).byte())
    result = run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path, num=NUM)
    best = result["best"]["fd_toy"]
    assert best["low"] is None and "do not vary" in best["missing"] and best["intervals_apart"] is None
    assert (tmp_path / "sweep.png").exists() and (tmp_path / "joint.png").exists()


def test_one_image_is_no_sample(pipe, reference, tmp_path):
    with pytest.raises(DigitError, match="num is 1"):
        run_sweep(pipe, reference, ToyJudge(), CFG, tmp_path, num=1)


def test_stage_2_alone_samples_the_same_tokens(pipe):
    tokens = pipe.generate_tokens(4, seed=9)
    assert torch.equal(pipe.render_tokens(tokens["discriminative"], seed=9), tokens["vq"])
    assert torch.equal(pipe.render(tokens["discriminative"], seed=9), pipe.decode(tokens["vq"]))
