"""`digit evaluate`: figures on a stand-in network, the cache, hostile files, and every trap, sprung and not sprung."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from digit.drawn import Drawn
from digit.errors import DigitError, MismatchError
from digit.evaluation.frechet import FeatureStats, frechet_distance
from digit.evaluation.influence import frechet_error, frechet_interval
from digit.evaluation.judge import Judged
from digit.measures import traps
from digit.measures.image_set import open_images
from digit.measures.npz import Statistics, read_npz_images, read_statistics
from digit.measures.samples import EvaluateConfig, evaluate, statistics_npz, to_table
from digit.samples import SampleFolder, write_samples

SIZE = 16


class FakeNetwork:
    """Mean colours of image quarters as features; counts the images it sees."""

    def __init__(self, weights="1", name="fake"):
        self.weights, self.name, self.seen = weights, name, 0

    def judge(self, images):
        assert images.dtype == torch.uint8 and images.ndim == 4
        self.seen += len(images)
        x = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255  # (B, 12)
        return Judged(pooled=x, spatial=x[:, :6] * 2, logits=x[:, :5] * 10)

    def metric(self, name):
        return f"{name}_fake"

    def describe(self):
        return {"network": self.name, "weights": "fake.pth", "weights_sha256": self.weights}


def pictures(num, seed=0, size=SIZE, shift=0):
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(0, 200, (num, 3, 4, 4)) + shift).to(torch.uint8)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="nearest")


def save_folder(folder, images, suffix=".png", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}{suffix}", **options)
    return folder


@pytest.fixture
def cfg(tmp_path):
    return EvaluateConfig(cache=str(tmp_path / "cache"), kernel_subset_size=20, kernel_subsets=5)


def run(samples, reference, cfg, **options):
    options.setdefault("network", FakeNetwork())
    return evaluate(samples, reference, cfg, **options)


def warned(result, text):
    return [line for line in result["warnings"] if text in line]


# -------------------------------------------------------------------- figures


def test_equal_sets_have_distance_zero_and_cover_each_other(cfg):
    figures = run(pictures(60), pictures(60), cfg)["figures"]
    assert figures["fd_fake"]["value"] == pytest.approx(0, abs=1e-9)
    assert figures["fd_fake"]["high"] == pytest.approx(0, abs=1e-7)
    assert figures["sfd_fake"]["value"] == pytest.approx(0, abs=1e-9)
    assert figures["precision_fake"]["value"] == figures["recall_fake"]["value"] == 1
    assert figures["is_fake"]["value"] >= 1 and figures["is_fake"]["std"] >= 0


def test_figures_are_those_of_the_formulas(cfg):
    a, b = pictures(60), pictures(80, seed=1, shift=40)
    figures = run(a, b, cfg)["figures"]
    x, y = (FeatureStats.of(FakeNetwork().judge(images).pooled) for images in (a, b))
    entry = figures["fd_fake"]
    assert entry["value"] == pytest.approx(frechet_distance(x.mean, x.cov, y.mean, y.cov), rel=1e-6)
    assert 0 < entry["low"] < entry["value"] < entry["high"]
    assert not any(name in ("fid", "kid", "inception_score", "sfid") for name in figures)


def test_folder_npz_tensor_and_source_give_the_same(cfg, tmp_path):
    images, reference = pictures(40), pictures(40, seed=1)
    arrays = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "plain.npz", arrays)
    np.savez_compressed(tmp_path / "packed.npz", arrays)
    folder = save_folder(tmp_path / "png", images)
    forms = [images, tmp_path / "plain.npz", str(tmp_path / "packed.npz"), folder, open_images(folder).source]
    figures = [run(form, reference, cfg)["figures"] for form in forms]
    assert all(other == figures[0] for other in figures)
    assert isinstance(read_npz_images(tmp_path / "plain.npz"), np.memmap), "not read into memory"


def test_error_agrees_with_drawing_again():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6))
    truth = FeatureStats.of(rng.normal(size=(20000, 6)) @ (mixing + 0.3))

    def draw():
        return rng.normal(size=(400, 6)) @ mixing + 0.2

    stats = [FeatureStats.of(draw()) for _ in range(300)]
    spread = np.std([frechet_distance(s.mean, s.cov, truth.mean, truth.cov) for s in stats], ddof=1)
    errors = [frechet_error(draw(), truth.mean, truth.cov) for _ in range(20)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)


def test_error_holds_with_fewer_images_than_features_where_the_bootstrap_does_not():
    rng = np.random.default_rng(0)
    dim, num = 60, 50
    scale = np.exp(-np.arange(dim) / 15)
    mixing = rng.normal(size=(dim, dim)) * scale
    other = mixing + 0.3 * rng.normal(size=(dim, dim)) * scale
    truth = FeatureStats.of(rng.normal(size=(5000, dim)) @ other.T)

    def draw():
        return rng.normal(size=(num, dim)) @ mixing.T + 0.2

    def distance(x):
        stats = FeatureStats.of(x)
        return frechet_distance(stats.mean, stats.cov, truth.mean, truth.cov)

    spread = np.std([distance(draw()) for _ in range(100)], ddof=1)
    errors = [frechet_error(draw(), truth.mean, truth.cov) for _ in range(10)]
    x = draw()
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


def test_json_names_the_protocol_and_the_table_shows_every_figure(cfg, tmp_path):
    result = run(pictures(40), pictures(50, seed=1), cfg, out=tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["protocol"]["name"] == "released" and "Inception's place" in result["protocol"]["about"]
    assert result["protocol"]["network"]["weights_sha256"] == "1"
    assert (result["samples"]["num"], result["reference"]["num"]) == (40, 50)
    table = to_table(result)
    assert all(f"| {name} |" in table for name in result["figures"])
    assert all(f"warning: {line}" in table for line in result["warnings"])


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
    monkeypatch.setattr("digit.measures.features.SHARD", 10)
    folder, reference, network = save_folder(tmp_path / "s", pictures(30)), pictures(20, seed=1), FakeNetwork()
    before = run(folder, reference, cfg, network=network)["figures"]
    save_folder(tmp_path / "t", pictures(1, seed=9))
    (tmp_path / "t" / "00000.png").replace(folder / "00003.png")
    after = run(folder, reference, cfg, network=network)["figures"]
    assert network.seen == 60 and after != before


def test_a_killed_run_goes_on_and_a_damaged_cache_is_made_again(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr("digit.measures.features.SHARD", 10)
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
    assert run(images, reference, cfg, network=network)["figures"] == whole["figures"]
    assert network.seen == 80


def test_cache_none_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "home"))
    run(pictures(20), pictures(20, seed=1), EvaluateConfig(cache="none"))
    assert not (tmp_path / "home").exists()
    run(pictures(20), pictures(20, seed=1), EvaluateConfig())
    assert list((tmp_path / "home" / "features").iterdir())


# -------------------------------------------------------------------- statistics


def test_kept_statistics_give_the_same_distances_and_say_what_they_cannot(cfg, tmp_path):
    samples, reference = pictures(60), pictures(80, seed=1)
    kept = statistics_npz(reference, tmp_path / "stats.npz", cfg, network=FakeNetwork())
    assert kept.num == 80
    full, short = (run(samples, spec, cfg) for spec in (reference, tmp_path / "stats.npz"))
    for name in ("fd_fake", "sfd_fake", "is_fake"):
        assert short["figures"][name]["value"] == pytest.approx(full["figures"][name]["value"], rel=1e-9)
    assert set(short["left_out"]) == {"kd_fake", "precision_fake", "recall_fake"}
    assert "give its images" in to_table(short)
    assert short["reference"]["statistics"]["num"] == 80


def test_reference_batch_with_statistics_and_images(cfg, tmp_path):
    """As ADM's: distances from the statistics, neighbours from the images."""
    samples, reference = pictures(60), pictures(80, seed=1)
    stats = FeatureStats.of(FakeNetwork().judge(pictures(500, seed=2)).pooled)
    arrays = reference.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "batch.npz", arr_0=arrays, mu=stats.mean, sigma=stats.cov)
    result = run(samples, tmp_path / "batch.npz", cfg)
    drawn = FeatureStats.of(FakeNetwork().judge(samples).pooled)
    wanted = frechet_distance(drawn.mean, drawn.cov, stats.mean, stats.cov)
    assert result["figures"]["fd_fake"]["value"] == pytest.approx(wanted, rel=1e-6)
    assert result["figures"]["precision_fake"] == run(samples, reference, cfg)["figures"]["precision_fake"]
    assert set(result["left_out"]) == {"sfd_fake"} and not warned(result, "against 80")


def test_statistics_of_another_network_are_refused(cfg, tmp_path):
    statistics_npz(pictures(30), tmp_path / "other.npz", cfg, network=FakeNetwork("2"))
    with pytest.raises(MismatchError, match="of network"):
        run(pictures(30), tmp_path / "other.npz", cfg)
    Statistics(np.zeros(2048), np.eye(2048)).save(tmp_path / "inception.npz")
    with pytest.raises(MismatchError, match="--inception"):
        run(pictures(30), tmp_path / "inception.npz", cfg)


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


def test_misuse_says_what_to_do(cfg):
    for options, reason in (
        ({"protocol": "fid"}, "choose one of released, adm, clean"),
        ({"image_size": 4}, "8 to 4096"),
        ({"num_splits": 0}, "at least 1"),
    ):
        with pytest.raises(DigitError, match=reason):
            EvaluateConfig(**options)
    with pytest.raises(DigitError, match="wanted uint8"):
        run(pictures(20).float(), pictures(20), cfg)
    with pytest.raises(DigitError, match="at least 2"):
        open_images(pictures(20), 1)
    few = run(pictures(3), pictures(3, seed=1), cfg)
    assert set(few["left_out"]) == {"is_fake", "precision_fake", "recall_fake"}


# -------------------------------------------------------------------- traps


def test_a_clean_comparison_warns_of_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(traps, "FEW", 30)
    cfg = EvaluateConfig(protocol="clean", cache=str(tmp_path / "cache"))
    assert run(pictures(40), pictures(40, seed=1), cfg)["warnings"] == []


def test_few_singular_and_unequal_numbers(cfg):
    result = run(pictures(12), pictures(40, seed=1), cfg)
    assert warned(result, "12 samples for 12 features: the covariance is singular")
    assert warned(result, "40 reference images: below 10,000")
    assert warned(result, "12 samples against 40 reference images")


def test_jpeg_is_told_by_content_not_by_name(cfg, tmp_path):
    images, reference = pictures(20), pictures(20, seed=1)
    disguised = tmp_path / "s"
    save_folder(disguised, images, ".jpg")
    for path in disguised.iterdir():
        path.rename(path.with_suffix(".png"))
    assert warned(run(disguised, reference, cfg), "20 of 20 samples are JPEG")
    assert warned(run(images, disguised, cfg), "20 of 20 reference images are JPEG")
    named = tmp_path / "t"
    save_folder(named, images)
    for path in named.iterdir():
        path.rename(path.with_suffix(".jpg"))
    assert not warned(run(named, reference, cfg), "JPEG")
    large = save_folder(tmp_path / "large", pictures(20, size=64)[:, :, :40], ".jpg")
    assert not warned(run(images, large, cfg), "JPEG"), "a reference that is shrunk loses nothing"


def test_sizes(cfg, tmp_path):
    same = run(pictures(20), pictures(20, seed=1), cfg)
    assert not warned(same, "the reference") and not warned(same, "cut out")
    other = run(pictures(20), pictures(20, seed=1, size=32), cfg)
    assert warned(other, "samples are 16 px, the reference 32 px")
    fitted = run(pictures(20), pictures(20, seed=1, size=32), EvaluateConfig(cache=cfg.cache, image_size=16))
    assert not warned(fitted, "the reference 32") and "16 px" in fitted["reference"]["resized"]
    wide = run(pictures(20), pictures(20, seed=1, size=32)[:, :, :24], cfg)
    assert warned(wide, "reference images are 32x24") and wide["reference"]["image_size"] == SIZE
    mixed = save_folder(tmp_path / "m", pictures(10))
    Image.new("RGB", (30, 20)).save(mixed / "odd.png")
    assert warned(run(pictures(20), mixed, cfg), "reference images come in 2 sizes, most often 16x16")


def test_published_figures_need_the_size_the_reference_and_the_numbers_of_their_protocol(cfg, tmp_path):
    def against(reference, images, **changes):
        return run(images, reference, replace(cfg, **changes), network=FakeNetwork(name="inception"))

    small, large = pictures(6), pictures(6, size=256)
    assert "validation" in against(large, large)["protocol"]["about"]
    assert warned(against(small, small), "samples are 16 px, protocol released is of 256 px")
    assert not warned(against(large, large), " px")
    assert warned(against(large, large), "6 samples, 50,000 in protocol released")
    assert warned(against(large, large), "6 reference images, 50,000 in protocol released")
    statistics_npz(large, tmp_path / "s.npz", cfg, network=FakeNetwork(name="inception"))
    assert warned(against(tmp_path / "s.npz", large), "the reference is statistics, that of protocol released is valid")
    assert not warned(against(tmp_path / "s.npz", large, protocol="adm"), "the reference is")
    assert warned(against(large, large, protocol="adm"), "the reference is images, that of protocol adm is statistics")
    assert not warned(against(small, small, protocol="clean"), "published")
    assert not warned(run(small, small, cfg), "published"), "no protocol's figures are of this network"


def test_repeats_and_copies(cfg):
    images, reference = pictures(20), pictures(20, seed=1)
    assert not warned(run(images, reference, cfg), "pixel by pixel")
    assert warned(run(torch.cat([images, images[:3]]), reference, cfg), "3 of 23 samples repeat")
    assert warned(run(images, torch.cat([reference, images[:2]]), cfg), "2 of 20 samples are reference images")
    assert warned(run(images, torch.cat([reference, reference[:1]]), cfg), "1 of 21 reference images repeat")


def test_repeats_are_told_across_formats(cfg, tmp_path):
    images = pictures(20)
    folder = save_folder(tmp_path / "s", images, ".bmp")
    assert warned(run(folder, images, cfg), "20 of 20 samples are reference images")


def test_grey_and_16_bit(cfg, tmp_path):
    grey = pictures(20)[:, :1].expand(-1, 3, -1, -1)
    assert warned(run(grey, pictures(20, seed=1), cfg), "100% of the samples are greyscale")
    few = torch.cat([grey[:5], pictures(15, seed=2)])
    assert not warned(run(few, pictures(20, seed=1), cfg), "greyscale")
    folder = tmp_path / "deep"
    folder.mkdir()
    for i, image in enumerate(pictures(4)):
        Image.fromarray(image[0].numpy().astype(np.uint16) * 257).save(folder / f"{i}.png")
    assert warned(run(folder, pictures(20, seed=1), cfg), "4 of 4 samples have 16 bits")


def sample_folder(folder, images, labels, classes=("cat", "dog")):
    request = {"num": len(images), "seed": 0, "batch_size": len(images), "rounding": "nearest"}
    tokens, known = {"vq": torch.zeros(len(images), 4, dtype=torch.long)}, torch.tensor(labels)
    names = [classes[k] if k >= 0 else None for k in labels]
    write_samples(
        SampleFolder(folder, request, {"vq": 4}, known, names),
        lambda start: (batch for batch in [Drawn(start, known, {"images": images} | tokens)]),
    )
    return folder


def test_our_sample_folders_lose_their_grid_and_bring_their_labels(cfg, tmp_path):
    images = pictures(20)
    even = sample_folder(tmp_path / "even", images, [0, 1] * 10)
    assert (even / "grid.png").exists() and len(open_images(even)) == 20
    assert open_images(even).class_names == ["cat", "dog"] * 10
    result = run(even, pictures(20, seed=1), cfg)
    assert not warned(result, "labels") and not warned(result, "sizes")
    odd = sample_folder(tmp_path / "odd", images, [0] * 19 + [1])
    assert warned(run(odd, pictures(20, seed=1), cfg), "unbalanced against equal shares: 1 of class dog, 19 of")
    unlabelled = sample_folder(tmp_path / "none", images, [-1] * 20)
    assert open_images(unlabelled).class_names is None


def test_rounding_is_known_from_samples_json(cfg, tmp_path):
    folder, network = sample_folder(tmp_path / "s", pictures(6), [0, 1] * 3), FakeNetwork(name="inception")
    about = json.loads((folder / "samples.json").read_text())
    assert about.pop("rounding") == "nearest"
    (folder / "samples.json").write_text(json.dumps(about))  # as an older version wrote it
    assert not warned(run(folder, pictures(6), cfg, network=network), "uint8")
    for rounding in ("nearest", "truncate"):
        (folder / "samples.json").write_text(json.dumps(about | {"rounding": rounding}))
        result = run(folder, pictures(6), cfg, network=network)
        assert result["samples"]["rounding"] == rounding
        assert bool(warned(result, "made uint8 by nearest")) == (rounding == "nearest")


def test_labels_against_those_of_the_reference(cfg, tmp_path):
    reference = tmp_path / "real"
    save_folder(reference / "cat", pictures(30, seed=1))
    save_folder(reference / "dog", pictures(10, seed=2))
    like = sample_folder(tmp_path / "like", pictures(40), [0] * 30 + [1] * 10)
    assert not warned(run(like, reference, cfg), "labels of the samples")
    even = sample_folder(tmp_path / "even", pictures(40), [0, 1] * 20)
    assert warned(run(even, reference, cfg), "labels of the samples are unbalanced against the shares of the reference")
    only = sample_folder(tmp_path / "only", pictures(40), [0] * 40)
    assert warned(run(only, reference, cfg), "0 of class dog")
    drawn = np.random.default_rng(0).permutation([0] * 26 + [1] * 14).tolist()
    assert not warned(run(sample_folder(tmp_path / "d", pictures(40), drawn), reference, cfg), "labels of the samples")


# -------------------------------------------------------------------- validation rows


class FakeTokenizers:
    """A pipeline of which only the routes of validation_rows exist: VQ halves the colours, rendering shifts them."""

    image_size = SIZE

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

    def render(self, tokens, seed):
        self.seeds.append(seed)
        return tokens // 64 * 64


def test_validation_rows(cfg, tmp_path, monkeypatch):
    from digit.measures.validation import DIGIT_ROW, VQ_ROW, validation_rows

    monkeypatch.setattr("digit.measures.features.SHARD", 16)
    pipe, network, images = FakeTokenizers(), FakeNetwork(), pictures(40, size=24)
    result = validation_rows(pipe, images, 40, network, cfg, out=tmp_path / "rows.json")
    assert set(result["rows"]) == {VQ_ROW, DIGIT_ROW}
    assert 0 < result["rows"][VQ_ROW]["fd_fake"]["value"] < result["rows"][DIGIT_ROW]["fd_fake"]["value"]
    assert pipe.seeds == [0, 16, 32], "image i has seed + i"
    assert result["images"]["image_size"] == SIZE and result["rounding"] == "nearest"
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == result["rows"]
    assert network.seen == 120
    assert validation_rows(pipe, images, 40, network, cfg) == result
    assert network.seen == 120 and len(pipe.seeds) == 3, "neither drawn nor judged again"
    alone = validation_rows(FakeTokenizers(prefix_len=0), images, 40, network, cfg)
    assert set(alone["rows"]) == {VQ_ROW} and DIGIT_ROW in alone["left_out"]


def test_an_unfinished_sample_folder_is_refused(tmp_path):
    folder = sample_folder(tmp_path / "s", pictures(6), [0, 1] * 3)
    (folder / "journal.json").write_text("{}")
    with pytest.raises(DigitError, match="is not finished: run the same `digit sample` again"):
        open_images(folder)
