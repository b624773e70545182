"""`digit.evaluate` with all measures: their values, directions, classes, and networks of other people."""

import subprocess
import sys
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_measure import FakeNetwork, pictures, run, sample_folder, save_folder

import digit
from digit.data.preprocess import centre_crop
from digit.errors import DigitError
from digit.evaluation import samples
from digit.evaluation.measures import MEASURES
from digit.evaluation.samples import EvaluateConfig, evaluate, statistics_npz
from digit.evaluation.table import to_table
from digit.metrics.diversity import vendi_score
from digit.metrics.extrapolation import frechet_infinity, frechet_ratio
from digit.metrics.frechet import FeatureStats, frechet_distance
from digit.metrics.kernels import cubic_distance, gaussian_distance
from digit.metrics.neighbours import compare_neighbours, copying_score
from digit.metrics.sliced import mind
from digit.runtime.plots import to_pil


@pytest.fixture
def cfg(tmp_path):
    return EvaluateConfig(cache=str(tmp_path / "cache"), kernel_subset_size=20, kernel_subsets=5, num_directions=20)


def test_every_measure_equals_its_function(cfg):
    a, b = pictures(60), pictures(80, seed=1, shift=40)
    found = run(a, b, cfg)["metrics"]
    x, y = (FakeNetwork().judge(images).pooled for images in (a, b))
    stats, three, five = FeatureStats.of(y), compare_neighbours(y, x, 3), compare_neighbours(y, x, 5)
    wanted = {
        "fd_infinity": frechet_infinity(x, stats.mean, stats.cov),
        "fd_ratio": frechet_ratio(y, x),
        "cmmd": gaussian_distance(x, y),
        "mind": mind(x, y, num_directions=20),
        "precision": three.precision(),
        "recall": three.recall(),
        "density": five.density(),
        "coverage": five.coverage(),
        "authenticity": five.authenticity(),
        "vendi": vendi_score(x),
    }
    for name, interval in wanted.items():
        assert found[f"{name}_fake"] == pytest.approx(interval.to_dict(), rel=1e-9), name
    assert list(found) == [f"{name}_fake" for name in MEASURES]


def test_the_table_shows_directions_and_what_is_left_out(cfg):
    result = run(pictures(20), pictures(30, seed=1), cfg)
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in to_table(result).splitlines() if line[:2] == "| "}
    for name in MEASURES:
        about = result["measures"][f"{name}_fake"]
        assert about["needs"] and about["source"] and about["better"] == MEASURES[name].better
        assert rows[f"{name}_fake"][2] == (about["better"] if f"{name}_fake" in result["metrics"] else "–")
    assert rows["fd_infinity_fake"][3].startswith("left out: 20 samples of 12 features")


def test_published_measures_alone(cfg):
    options = EvaluateConfig(cache="none", measures="published", kernel_subset_size=20, kernel_subsets=5)
    result, whole = run(pictures(40), pictures(40, seed=1), options), run(pictures(40), pictures(40, seed=1), cfg)
    names = [f"{name}_fake" for name, measure in MEASURES.items() if measure.published]
    assert list(result["metrics"]) == names == list(result["measures"]) and not result["left_out"]
    assert result["metrics"] == {name: whole["metrics"][name] for name in names}


def test_classes_with_the_largest_distance_come_first(cfg, tmp_path):
    labels = [0, 1] * 20
    images = pictures(40)
    reference = sample_folder(tmp_path / "real", images, labels)
    moved = images.clone()
    moved[1::2] += 50  # all dogs
    result = run(sample_folder(tmp_path / "s", moved, labels), reference, cfg)
    assert list(result["classes"]) == ["dog", "cat"]
    x, y = FakeNetwork().judge(moved).pooled, FakeNetwork().judge(images).pooled
    dogs = result["classes"]["dog"]
    assert dogs["kd"] == pytest.approx(cubic_distance(x[1::2], y[1::2]).to_dict()) and dogs["num"] == 20
    assert result["classes"]["cat"]["precision"] == 1 == result["classes"]["cat"]["coverage"]
    assert "| dog |" in to_table(result)
    assert run(moved, images, cfg)["classes"] == {}


def test_held_out_images_show_copying(cfg, tmp_path):
    training, new = pictures(80, seed=1), pictures(60, seed=2, size=32)  # judged at the reference's size
    copies = training[:50].clone()
    copies[:, :, 0, 0] ^= 1
    fair, copied = (run(images, training, cfg, held_out=new) for images in (pictures(50), copies))
    z, p = (result["metrics"]["copying_fake"]["value"] for result in (fair, copied))
    assert abs(z) < 3 and p < -6 and copied["held_out"]["num"] == 60 and "16 px" in copied["held_out"]["resized"]
    shown = torch.from_numpy(np.stack([centre_crop(to_pil(image), 16) for image in new])).permute(0, 3, 1, 2)
    wanted = copying_score(*(FakeNetwork().judge(images).pooled for images in (training, shown, copies)))
    assert p == pytest.approx(wanted[0], rel=1e-9)
    assert "near 0" in next(line for line in to_table(copied).splitlines() if "copying_fake" in line)
    assert "copying_fake" not in run(copies, training, cfg)["measures"]
    statistics_npz(training, tmp_path / "s.npz", cfg, network=FakeNetwork())
    assert "give its images" in run(copies, tmp_path / "s.npz", cfg, held_out=new)["left_out"]["copying_fake"]


# -------------------------------------------------------------------- Python


def test_the_loop_of_the_documentation_runs(tmp_path, monkeypatch):
    """The code under "In Python", with a generator and an encoder of our own."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = text.split("## In Python")[1].splitlines()[1:]
    code = "\n".join(line[4:] for line in takewhile(lambda line: not line or line[:4] == "    ", lines))
    assert "def validate(" in code
    images = pictures(64, seed=3)
    save_folder(tmp_path / "photos" / "val", pictures(40, seed=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    generator = type("Generator", (), {"sample": lambda self, num: images[:num]})()
    place = {"torch": torch, "images": images, "generator": generator, "encoder": Encoder()}
    monkeypatch.setattr(samples, "evaluate", partial(evaluate, cfg=EvaluateConfig(num_directions=3, kernel_subsets=2)))
    exec(compile(code, "docs/evaluation.md", "exec"), place)
    assert "fd_encoder" in place["validate"](generator, place["encoder"], 1)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = torch.nn.Linear(48, 6), 0
        self.norm = torch.nn.BatchNorm1d(6)
        torch.nn.init.constant_(self.net.weight, 0.01)

    def forward(self, images):
        assert not torch.is_grad_enabled() and images.dtype == torch.uint8
        self.calls += 1
        return self.norm(self.net(torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)))


def test_import_of_digit_stays_without_torch():
    code = "import sys, digit; assert 'evaluate' in dir(digit); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_in_a_training_loop_is_used_and_left_as_it_is(cfg):
    encoder, images, reference = Encoder().train(), pictures(30), pictures(40, seed=1)
    encoder.norm.eval()  # as a frozen layer
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    result = digit.evaluate(images, reference, cfg, network=encoder)
    assert {"fd_encoder", "kd_encoder", "vendi_encoder"} <= set(result["metrics"])
    assert "no logits" in result["left_out"]["is_encoder"] and "no spatial" in result["left_out"]["sfd_encoder"]
    assert (
        encoder.training
        and not encoder.norm.training
        and all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    )
    calls = encoder.calls
    assert digit.evaluate(images, reference, cfg, network=encoder)["metrics"] == result["metrics"]
    assert encoder.calls == calls, "from the cache"
    with torch.no_grad():
        encoder.net.weight[0] += 1
    other = digit.evaluate(images, reference, cfg, network=encoder)
    assert encoder.calls > calls and other["metrics"] != result["metrics"]


def test_a_function_and_every_kind_of_images(cfg):
    def colours(images):
        return images.float().mean((2, 3))

    images, reference = pictures(30), pictures(40, seed=1)
    results = [
        digit.evaluate(form, reference, cfg, network=colours)["metrics"]
        for form in (images, images.permute(0, 2, 3, 1).numpy(), images.float() / 255)
    ]
    assert results[0] == results[1] == results[2] and "fd_colours" in results[0]
    x, y = (FeatureStats.of(values.float().mean((2, 3))) for values in (images, reference))
    wanted = frechet_distance(x.mean, x.cov, y.mean, y.cov)
    assert results[0]["fd_colours"]["value"] == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(DigitError, match="wanted a tensor"):
        digit.evaluate(images, reference, cfg, network=lambda batch: batch.float())
    with pytest.raises(DigitError, match="NaN"):
        digit.evaluate(images, reference, cfg, network=lambda batch: batch.float().mean((2, 3)) * float("nan"))


def test_statistics_of_a_module(cfg, tmp_path):
    encoder, images = Encoder(), pictures(30)
    statistics_npz(pictures(40, seed=1), tmp_path / "s.npz", cfg, network=encoder)
    full = digit.evaluate(images, pictures(40, seed=1), cfg, network=encoder)["metrics"]
    short = digit.evaluate(images, tmp_path / "s.npz", cfg, network=encoder)["metrics"]
    assert short["fd_encoder"] == pytest.approx(full["fd_encoder"])


def test_an_encoder_by_its_name(cfg):
    images, reference = pictures(12), pictures(12, seed=1)
    result = digit.evaluate(images, reference, cfg, device="cpu", network="efficientnet_lite0")
    assert "fd_efficientnet_lite0" in result["metrics"] and result["protocol"]["network"]["dim"] == 1280
    with pytest.raises(DigitError, match="no_such_net"):
        digit.evaluate(images, reference, cfg, network="no_such_net")


# -------------------------------------------------------------------- files of other programs


def test_features_of_dgm_eval_give_what_the_images_give(cfg, tmp_path):
    images, reference = pictures(50), pictures(60, seed=1)
    reps = FakeNetwork().judge(reference).pooled.double().numpy()
    np.savez(tmp_path / "reps.npz", model="fake", reps=reps, hparams=np.array({"a": 1}))  # hparams is a pickled object
    full, short = (run(images, spec, cfg) for spec in (reference, tmp_path / "reps.npz"))
    assert set(short["left_out"]) == {"sfd_fake"}
    for name, entry in short["metrics"].items():
        assert entry == pytest.approx(full["metrics"][name], rel=1e-6), name
    assert short["reference"]["statistics"]["num"] == 60


def test_files_of_torch_fidelity(cfg, tmp_path):
    images, pooled = pictures(40), FakeNetwork().judge(pictures(60, seed=1)).pooled
    stats = FeatureStats.of(pooled)
    torch.save({"mu": stats.mean, "sigma": stats.cov}, tmp_path / "x-stat-fid-2048.pt")
    torch.save(pooled, tmp_path / "x-features-2048.pt")
    full = run(images, pictures(60, seed=1), cfg)["metrics"]
    of_stats, of_features = (run(images, tmp_path / f"x-{name}-2048.pt", cfg) for name in ("stat-fid", "features"))
    assert of_stats["metrics"]["fd_fake"] == pytest.approx(full["fd_fake"], rel=1e-6)
    assert "kd_fake" in of_stats["left_out"] and of_features["metrics"]["kd_fake"] == pytest.approx(full["kd_fake"])


class Trigger:
    fired = False

    def __reduce__(self):
        return (setattr, (Trigger, "fired", True))


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (Trigger(), "other objects than arrays"),
        ({"mu": np.array([Trigger()], dtype=object), "sigma": np.eye(1)}, "other objects than arrays"),
        ({"mu": np.zeros(12)}, "no statistics"),
        ({"mu": np.zeros(12), "sigma": np.eye(11)}, "wanted"),
        (torch.zeros(3, 4, 5), "wanted finite floats"),
        (torch.full((3, 12), float("nan")), "wanted finite floats"),
    ],
)
def test_hostile_torch_files_are_refused(cfg, tmp_path, held, reason):
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(DigitError, match=reason):
        run(pictures(30), tmp_path / "x.pt", cfg)
    assert not Trigger.fired


def test_damaged_and_missing_torch_files_are_refused(cfg, tmp_path):
    torch.save(torch.zeros(40, 12), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:300])
    (tmp_path / "text.pt").write_text("no statistics")
    for name in ("cut.pt", "text.pt", "missing.pt"):
        with pytest.raises(DigitError, match=name):
            run(pictures(30), tmp_path / name, cfg)
