"""`digit evaluate`: metrics of a stand-in network, the cache, saved statistics, hostile files, validation rows."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from toy_measure import SIZE, FakeNetwork, pictures, run, save_folder, warned

from digit.errors import DigitError, MismatchError
from digit.evaluation.image_set import open_images
from digit.evaluation.npz import Statistics, read_npz_images, read_statistics
from digit.evaluation.samples import EvaluateConfig, statistics_npz
from digit.evaluation.table import to_table
from digit.metrics.distances import Pairs
from digit.metrics.frechet import FeatureStats, frechet_distance
from digit.metrics.influence import frechet_error, frechet_interval


@pytest.fixture
def cfg(tmp_path):
    return EvaluateConfig(cache=str(tmp_path / "cache"), kernel_subset_size=20, kernel_subsets=5)


# -------------------------------------------------------------------- metrics


def test_equal_sets_have_distance_zero_and_cover_each_other(cfg):
    metrics = run(pictures(60), pictures(60), cfg)["metrics"]
    assert metrics["fd_fake"]["value"] == pytest.approx(0, abs=1e-9)
    assert metrics["fd_fake"]["low"] is metrics["fd_fake"]["high"] is None
    assert "do not vary, or have the reference's own" in metrics["fd_fake"]["missing"]
    assert metrics["sfd_fake"]["value"] == pytest.approx(0, abs=1e-9)
    assert metrics["precision_fake"]["value"] == metrics["recall_fake"]["value"] == 1
    assert metrics["is_fake"]["value"] >= 1 and metrics["is_fake"]["std"] >= 0


def test_metrics_equal_their_formulas(cfg):
    a, b = pictures(60), pictures(80, seed=1, shift=40)
    metrics = run(a, b, cfg)["metrics"]
    x, y = (FeatureStats.of(FakeNetwork().judge(images).pooled) for images in (a, b))
    entry = metrics["fd_fake"]
    assert entry["value"] == pytest.approx(frechet_distance(x.mean, x.cov, y.mean, y.cov), rel=1e-6)
    assert 0 < entry["low"] < entry["value"] < entry["high"]
    assert not any(name in ("fid", "kid", "inception_score", "sfid") for name in metrics)


def test_folder_npz_tensor_and_source_give_the_same(cfg, tmp_path):
    images, reference = pictures(40), pictures(40, seed=1)
    arrays = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "plain.npz", arrays)
    np.savez_compressed(tmp_path / "packed.npz", arrays)
    folder = save_folder(tmp_path / "png", images)
    forms = [images, tmp_path / "plain.npz", str(tmp_path / "packed.npz"), folder, open_images(folder).source]
    metrics = [run(form, reference, cfg)["metrics"] for form in forms]
    assert all(other == metrics[0] for other in metrics)
    assert isinstance(read_npz_images(tmp_path / "plain.npz"), np.memmap), "not read into memory"


def test_error_agrees_with_resampling():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6))
    truth = FeatureStats.of(rng.normal(size=(20000, 6)) @ (mixing + 0.3))

    def sample():
        return rng.normal(size=(400, 6)) @ mixing + 0.2

    stats = [FeatureStats.of(sample()) for _ in range(300)]
    spread = np.std([frechet_distance(s.mean, s.cov, truth.mean, truth.cov) for s in stats], ddof=1)
    errors = [frechet_error(sample(), truth.mean, truth.cov) for _ in range(20)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)


def test_error_holds_with_fewer_images_than_features_where_the_bootstrap_does_not():
    rng = np.random.default_rng(0)
    dim, num = 60, 50
    scale = np.exp(-np.arange(dim) / 15)
    mixing = rng.normal(size=(dim, dim)) * scale
    other = mixing + 0.3 * rng.normal(size=(dim, dim)) * scale
    truth = FeatureStats.of(rng.normal(size=(5000, dim)) @ other.T)

    def sample():
        return rng.normal(size=(num, dim)) @ mixing.T + 0.2

    def distance(x):
        stats = FeatureStats.of(x)
        return frechet_distance(stats.mean, stats.cov, truth.mean, truth.cov)

    spread = np.std([distance(sample()) for _ in range(100)], ddof=1)
    errors = [frechet_error(sample(), truth.mean, truth.cov) for _ in range(10)]
    x = sample()
    rounds = [distance(x[rng.integers(num, size=num)]) for _ in range(30)]
    assert spread < np.mean(errors) < 1.5 * spread < np.std(rounds, ddof=1)
    assert min(rounds) > distance(x), "the interval of the rounds would not hold the distance itself"


def test_error_is_the_derivative_by_the_weights_also_where_the_covariance_is_singular():
    rng = np.random.default_rng(1)
    x, truth = rng.normal(size=(8, 12)), FeatureStats.of(rng.normal(size=(50, 12)))

    def distance(weights):
        mean = weights @ x / weights.sum()
        scatter = (x - mean).T @ ((x - mean) * weights[:, None]) / weights.sum() * 8 / 7
        return frechet_distance(mean, scatter, truth.mean, truth.cov)

    step = 1e-3  # smaller ones drown in the rounding of eigenvalues that are 0
    influence = [(distance(1 + step * row) - distance(1 - step * row)) / (2 * step) for row in np.eye(8)]
    assert frechet_error(x, truth.mean, truth.cov) == pytest.approx(np.linalg.norm(influence), rel=1e-4)
    assert frechet_error(np.ones((5, 12)), truth.mean, truth.cov) == 0
    interval = frechet_interval(torch.from_numpy(x), truth.mean, truth.cov)
    assert interval.low <= interval.value <= interval.high


def test_json_names_the_protocol_and_the_table_shows_every_metric(cfg, tmp_path):
    result = run(pictures(40), pictures(50, seed=1), cfg, out=tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["protocol"]["name"] == "released" and "not the Inception network" in result["protocol"]["about"]
    assert result["protocol"]["network"]["weights_sha256"] == "1"
    assert (result["samples"]["num"], result["reference"]["num"]) == (40, 50)
    table = to_table(result)
    assert all(f"| {name} |" in table for name in result["metrics"])
    assert all(f"warning: {line}" in table for line in result["warnings"])


def test_arrays_pictures_and_floats_are_the_same_images():
    images = pictures(6)
    array = images.permute(0, 2, 3, 1).numpy()
    forms = [array, images.numpy(), list(images), [Image.fromarray(picture) for picture in array], images.float() / 255]
    for brought in forms:
        assert torch.equal(open_images(brought).pixels(range(6), None), images)


@pytest.mark.parametrize("wrong", [pictures(4).long(), pictures(4).float(), pictures(4) > 9, pictures(4)[0], 3, None])
def test_what_is_no_image_set_is_refused(wrong, unchecked):
    with pytest.raises(DigitError, match="images are .*wanted RGB images"):
        open_images(wrong)


def test_num_takes_the_first_or_spreads_over_sorted_classes(tmp_path):
    assert open_images(pictures(10), 4).survey.digests == open_images(pictures(10)).survey.digests[:4]
    for name in "abc":
        save_folder(tmp_path / name, pictures(4, seed=ord(name)))
    chosen = open_images(tmp_path, 6)
    assert chosen.class_names == ["a", "a", "b", "b", "c", "c"]


# -------------------------------------------------------------------- cache


def test_network_sees_each_image_once(cfg, tmp_path):
    folder, reference, network = save_folder(tmp_path / "s", pictures(30)), pictures(20, seed=1), FakeNetwork()
    first = run(folder, reference, cfg, network=network)
    assert network.seen == 50
    second = run(folder, reference, cfg, network=network)
    assert network.seen == 50 and second == first
    run(folder, reference, cfg, network=(other := FakeNetwork("2")))
    assert other.seen == 50, "features of other weights are others"


def test_a_changed_image_is_seen_anew_and_others_are_not(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr("digit.evaluation.features.SHARD", 10)
    folder, reference, network = save_folder(tmp_path / "s", pictures(30)), pictures(20, seed=1), FakeNetwork()
    before = run(folder, reference, cfg, network=network)["metrics"]
    save_folder(tmp_path / "t", pictures(1, seed=9))
    (tmp_path / "t" / "00000.png").replace(folder / "00003.png")
    after = run(folder, reference, cfg, network=network)["metrics"]
    assert network.seen == 60 and after != before


def test_a_killed_run_goes_on_and_a_damaged_cache_is_made_again(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr("digit.evaluation.features.SHARD", 10)
    images, reference, network = pictures(30), pictures(20, seed=1), FakeNetwork()

    class Killed(FakeNetwork):
        def judge(self, batch):
            if self.seen >= 20:
                raise KeyboardInterrupt
            return super().judge(batch)

    with pytest.raises(KeyboardInterrupt):
        run(images, reference, cfg, network=Killed())
    whole = run(images, reference, cfg, network=network)
    assert network.seen == 30, "20 of 50 were done"
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert run(images, reference, cfg, network=network)["metrics"] == whole["metrics"]
    assert network.seen == 80


def test_cache_none_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "home"))
    run(pictures(20), pictures(20, seed=1), EvaluateConfig(cache="none"))
    assert not (tmp_path / "home").exists()
    run(pictures(20), pictures(20, seed=1), EvaluateConfig())
    assert list((tmp_path / "home" / "features").iterdir())


def test_what_depends_on_the_reference_alone_is_computed_once(cfg, tmp_path, monkeypatch):
    """Radii, statistics, roots of covariances and kernel sums of a reference come from the cache."""
    from digit.evaluation import features, measures

    calls = Counter()

    def count(module, name):
        make = getattr(module, name)

        def counted(x, *args, **options):
            calls[name, len(x.x) if isinstance(x, Pairs) else len(x)] += 1
            return make(x, *args, **options)

        monkeypatch.setattr(module, name, counted)

    for module, name in ((features, "Nearest"), (features, "square_root"), (measures, "kernel_within"),
                         (features, "GaussianMeans")):  # fmt: skip
        count(module, name)
    reference, network = pictures(90, seed=1), FakeNetwork()
    first = run(pictures(40), reference, cfg, network=network)
    assert calls == {("Nearest", 90): 1, ("Nearest", 40): 1, ("square_root", 12): 1, ("square_root", 6): 1,
                     ("kernel_within", 90): 1, ("GaussianMeans", 90): 1, ("GaussianMeans", 40): 1}  # fmt: skip
    assert run(pictures(40), reference, cfg, network=network) == first and sum(calls.values()) == 7
    run(pictures(40, seed=2), reference, cfg, network=network)
    assert sum(calls.values()) == 9 and calls["Nearest", 40] == 2 == calls["GaussianMeans", 40]
    uncached = run(pictures(40), reference, replace(cfg, cache="none"))["metrics"]
    assert uncached == first["metrics"]
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert run(pictures(40), reference, cfg, network=network) == first
    assert calls["Nearest", 90] == 3
    run(pictures(40), reference[:80], cfg, network=network)
    assert calls["Nearest", 80] == 1


# -------------------------------------------------------------------- statistics


def test_kept_statistics_give_the_same_distances_and_say_what_they_cannot(cfg, tmp_path):
    samples, reference = pictures(60), pictures(80, seed=1)
    kept = statistics_npz(reference, tmp_path / "stats.npz", cfg, network=FakeNetwork())
    assert kept.num == 80
    full, short = (run(samples, spec, cfg) for spec in (reference, tmp_path / "stats.npz"))
    for name in ("fd_fake", "sfd_fake", "is_fake"):
        assert short["metrics"][name]["value"] == pytest.approx(full["metrics"][name]["value"], rel=1e-9)
    for name in ("fd_infinity_fake", "vendi_fake"):
        assert short["metrics"][name]["value"] == pytest.approx(full["metrics"][name]["value"], rel=1e-6)
    of_images = ["fd_ratio", "kd", "cmmd", "mind", "precision", "recall", "density", "coverage", "authenticity"]
    assert set(short["left_out"]) == {f"{name}_fake" for name in of_images}
    assert "give its images" in to_table(short)
    assert short["reference"]["statistics"]["num"] == 80


def test_reference_batch_with_statistics_and_images(cfg, tmp_path):
    """As ADM's: distances from the statistics, neighbours from the images."""
    samples, reference = pictures(60), pictures(80, seed=1)
    stats = FeatureStats.of(FakeNetwork().judge(pictures(500, seed=2)).pooled)
    arrays = reference.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "batch.npz", arr_0=arrays, mu=stats.mean, sigma=stats.cov)
    result = run(samples, tmp_path / "batch.npz", cfg)
    fake = FeatureStats.of(FakeNetwork().judge(samples).pooled)
    wanted = frechet_distance(fake.mean, fake.cov, stats.mean, stats.cov)
    assert result["metrics"]["fd_fake"]["value"] == pytest.approx(wanted, rel=1e-6)
    assert result["metrics"]["precision_fake"] == run(samples, reference, cfg)["metrics"]["precision_fake"]
    assert set(result["left_out"]) == {"sfd_fake"} and not warned(result, "against 80")


def test_statistics_of_another_network_are_refused(cfg, tmp_path):
    statistics_npz(pictures(30), tmp_path / "other.npz", cfg, network=FakeNetwork("2"))
    with pytest.raises(MismatchError, match="of network"):
        run(pictures(30), tmp_path / "other.npz", cfg)
    Statistics(np.zeros(2048), np.eye(2048)).save(tmp_path / "inception.npz")
    with pytest.raises(MismatchError, match="--inception"):
        run(pictures(30), tmp_path / "inception.npz", cfg)


def test_a_number_of_reference_images_beside_statistics_is_refused(cfg, tmp_path):
    statistics_npz(pictures(30), tmp_path / "s.npz", cfg, network=FakeNetwork())
    with pytest.raises(DigitError, match="leave out --num_reference"):
        run(pictures(30), tmp_path / "s.npz", replace(cfg, num_reference=20))


# -------------------------------------------------------------------- hostile files


class Trigger:
    fired = False

    def __reduce__(self):
        return (setattr, (Trigger, "fired", True))


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"arr_0": np.array([Trigger()], dtype=object)}, "wanted uint8"),
        ({"mu": np.array([Trigger()], dtype=object), "sigma": np.eye(1)}, "pickled"),
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, "wanted uint8"),
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, "wanted uint8"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, "wanted uint8"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "wanted uint8"),
        ({"arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "at least 2"),
        ({"images": np.zeros((4, 8, 8, 3), np.uint8)}, "wanted arr_0"),
        ({"mu": np.zeros(12)}, "wanted both mu and sigma"),
        ({"mu": np.zeros(12), "sigma": np.eye(11)}, r"wanted \(D,\) and \(D, D\)"),
        ({"mu": np.zeros(12), "sigma": np.eye(12) * np.nan}, "NaN"),
        ({"mu": np.zeros(12), "sigma": np.eye(12), "mu_s": np.zeros(6)}, "wanted both mu_s and sigma_s"),
        ({"mu": np.zeros(12), "sigma": np.eye(12), "num": np.zeros(3)}, "cannot be read"),
    ],
)
def test_hostile_npz_is_refused(cfg, tmp_path, arrays, reason):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DigitError, match=reason):
        run(pictures(30), tmp_path / "x.npz", cfg)
    assert not Trigger.fired


def test_files_that_are_no_npz_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("not a zip")
    np.savez(tmp_path / "whole.npz", np.zeros((9, 8, 8, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:900])
    for name in ("text.npz", "cut.npz", "missing.npz"):
        for read in (read_npz_images, read_statistics):
            with pytest.raises(DigitError, match=name):
                read(tmp_path / name)


def test_a_broken_image_is_named(cfg, tmp_path):
    folder = save_folder(tmp_path / "s", pictures(20))
    (folder / "00007.png").write_bytes(b"no picture")
    with pytest.raises(DigitError, match="00007.png"):
        run(folder, pictures(20), cfg)


def test_misuse_says_what_to_do(cfg, unchecked):
    for options, reason in (
        ({"protocol": "fid"}, "choose one of released, adm, clean"),
        ({"image_size": 4}, "8 to 4096"),
        ({"num_splits": 0}, "at least 1"),
    ):
        with pytest.raises(DigitError, match=reason):
            EvaluateConfig(**options)
    with pytest.raises(DigitError, match="images are float32 from 0 to 199 .*wanted RGB images"):
        run(pictures(20).float(), pictures(20), cfg)
    with pytest.raises(DigitError, match="at least 2"):
        open_images(pictures(20), 1)
    few = run(pictures(3), pictures(3, seed=1), cfg)
    needy = ["fd_infinity", "fd_ratio", "is", "precision", "recall", "density", "coverage"]
    assert set(few["left_out"]) == {f"{name}_fake" for name in needy}
    assert "it needs 48" in few["left_out"]["fd_infinity_fake"]
    for options, reason in (
        ({"measures": "most"}, "choose all or published"),
        ({"network": "dinov2_vitl14", "inception": "x.pth"}, "choose one network"),
        ({"weights": "x.pth"}, "without --network"),
    ):
        with pytest.raises(DigitError, match=reason):
            EvaluateConfig(**options)


# -------------------------------------------------------------------- validation rows


class FakeTokenizers:
    """A pipeline of which only the routes of validation_rows exist: VQ halves the colours, rendering shifts them."""

    image_size, renders_pixels, renderer_sees_labels, device = SIZE, False, False, torch.device("cpu")

    class vq:
        fingerprint, rounding = "vq", "nearest"
        encode = staticmethod(lambda images: images)
        decode = staticmethod(lambda tokens: tokens // 16 * 16)

    class tokenizer:
        fingerprint = "tokenizer"
        encode = staticmethod(lambda images: images)

    def __init__(self, prefix_len=4):
        self.renderer = torch.nn.Linear(1, 1)
        self.renderer.cfg = type("Cfg", (), {"prefix_len": prefix_len})
        self.sampling = type("Sampling", (), {"renderer": "how", "precision": "fp32"})
        self.seeds = []

    def require(self, *names):
        pass

    def rerender(self, images, seed):
        self.seeds.append(seed)
        return images // 64 * 64


def test_validation_rows(cfg, tmp_path, monkeypatch, unchecked):
    from digit.evaluation.validation import DIGIT_ROW, VQ_ROW, validation_rows

    monkeypatch.setattr("digit.evaluation.features.SHARD", 16)
    pipe, network, images = FakeTokenizers(), FakeNetwork(), pictures(40, size=24)
    result = validation_rows(pipe, images, 40, network, cfg, out=tmp_path / "rows.json")
    assert set(result["rows"]) == {VQ_ROW, DIGIT_ROW}
    assert 0 < result["rows"][VQ_ROW]["fd_fake"]["value"] < result["rows"][DIGIT_ROW]["fd_fake"]["value"]
    assert pipe.seeds == [0, 16, 32], "image i has seed + i"
    assert result["images"]["image_size"] == SIZE and result["rounding"] == "nearest"
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == result["rows"]
    assert network.seen == 120
    assert validation_rows(pipe, images, 40, network, cfg) == result
    assert network.seen == 120 and len(pipe.seeds) == 3, "neither rendered nor judged again"
    alone = validation_rows(FakeTokenizers(prefix_len=0), images, 40, network, cfg)
    assert set(alone["rows"]) == {VQ_ROW} and DIGIT_ROW in alone["left_out"]


# -------------------------------------------------------------------- intervals that cannot be had


def cells(result):
    """Metric -> the last cell of its row in the table."""
    rows = [line.split(" | ") for line in to_table(result).splitlines() if line.startswith("| ")]
    return {row[0].removeprefix("| "): row[-1].removesuffix(" |") for row in rows}


def test_the_whole_set_as_every_subset_has_no_deviation(tmp_path):
    cfg = EvaluateConfig(cache="none")
    result = run(pictures(40), pictures(40, seed=1), cfg)
    assert result["metrics"]["kd_fake"]["std"] is None and "whole set" in cells(result)["kd_fake"]
    assert cells(result)["kd_fake"].startswith("– (")
    unequal = run(pictures(40), pictures(50, seed=1), cfg)
    assert unequal["metrics"]["kd_fake"]["std"] > 0, "subsets of the larger set differ"


@pytest.mark.parametrize(
    ("changes", "metric", "reason"),
    [
        ({"num_splits": 1}, "is_fake", "one split"),
        ({"kernel_subsets": 1, "kernel_subset_size": 20}, "kd_fake", "one subset"),
        ({"kernel_subset_size": 60}, "kd_fake", "every subset is the whole set"),
        ({}, "sfd_fake", "only mean and covariance"),
    ],
)
def test_a_missing_deviation_is_null_with_its_reason(changes, metric, reason):
    result = run(pictures(60), pictures(60, seed=1), EvaluateConfig(cache="none", **changes))
    entry = result["metrics"][metric]
    assert all(value is None for name, value in entry.items() if name not in ("value", "missing"))
    assert reason in entry["missing"] and cells(result)[metric] == f"– ({entry['missing']})"


@pytest.mark.parametrize("as_statistics", [False, True])
def test_samples_that_are_all_equal_have_no_interval(cfg, tmp_path, as_statistics):
    reference = pictures(60, seed=1)
    if as_statistics:
        statistics_npz(reference, tmp_path / "s.npz", cfg, network=FakeNetwork())
        reference = tmp_path / "s.npz"
    result = run(pictures(1).expand(30, -1, -1, -1), reference, cfg)
    entry = result["metrics"]["fd_fake"]
    assert entry["value"] > 0 and entry["low"] is None and "do not vary" in cells(result)["fd_fake"]


def test_an_interval_that_can_be_had_is_the_same_against_statistics(cfg, tmp_path):
    reference = pictures(60, seed=1)
    statistics_npz(reference, tmp_path / "s.npz", cfg, network=FakeNetwork())
    entries = [run(pictures(30), spec, cfg)["metrics"]["fd_fake"] for spec in (reference, tmp_path / "s.npz")]
    assert entries[0]["low"] < entries[0]["high"] and entries[0] == pytest.approx(entries[1])


def test_validation_rows_warn_of_few_images_again_from_the_cache(cfg, unchecked):
    from digit.evaluation.validation import DIGIT_ROW, VQ_ROW, validation_rows

    pipe, network = FakeTokenizers(), FakeNetwork()
    results = [validation_rows(pipe, pictures(10, size=24), 40, network, cfg) for _ in range(2)]
    assert network.seen == 30 and results[0]["warnings"] == results[1]["warnings"]
    for row in (VQ_ROW, DIGIT_ROW):
        assert (
            f"{row}: 10 samples for 12 features: the covariance is singular and the distance far too high"
            in (results[1]["warnings"])
        )
    assert any("40 images of tensor were asked for, and it holds 10" in line for line in results[0]["warnings"])


def test_deep_images_are_scaled_by_pixel_max_and_their_features_not_confused(tmp_path):
    for name, seed in (("samples", 0), ("reference", 1)):
        values = np.random.default_rng(seed).integers(0, 4000, (12, SIZE, SIZE), dtype=np.uint16)
        values[:, 0, 0] = 4000
        (tmp_path / name).mkdir()
        for number, image in enumerate(values):
            Image.fromarray(image).save(tmp_path / name / f"{number}.png")
    results = {}
    for white in (None, 4095, 8190):
        cfg = EvaluateConfig(cache=str(tmp_path / "cache"), kernel_subset_size=5, num_splits=2, pixel_max=white)
        results[white] = run(tmp_path / "samples", tmp_path / "reference", cfg)
    said = results[None]["reference"]["pixel_range"]
    assert "white is 4095 (largest value of 12 images probed: 4000)" in said and said in to_table(results[None])
    assert results[None]["metrics"] == results[4095]["metrics"] != results[8190]["metrics"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16, np.int64, bool])
def test_arrays_of_another_range_are_refused(dtype, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.ones((4, 8, 8, 3), dtype=dtype))
    with pytest.raises(DigitError, match=r"wanted uint8 \(N, H, W, 3\), RGB in 0..255 .*rint\(255"):
        open_images(tmp_path / "x.npz")


def test_floats_of_0_to_1_cast_to_uint8_are_refused(tmp_path):
    images = np.random.default_rng(0).integers(0, 2, (200, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    for spec in (tmp_path / "x.npz", torch.from_numpy(images).permute(0, 3, 1, 2)):
        with pytest.raises(DigitError, match="no value above 1"):
            open_images(spec)
    np.savez(tmp_path / "y.npz", arr_0=images * 255)
    assert len(open_images(tmp_path / "y.npz")) == 200
