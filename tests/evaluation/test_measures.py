"""`digit.evaluate` with all measures: their values, directions, classes, and networks of other people."""

import subprocess
import sys

import pytest
import torch
from toy_measure import FakeNetwork, pictures, run, sample_folder

import digit
from digit.errors import DigitError
from digit.evaluation.measures import MEASURES
from digit.evaluation.samples import EvaluateConfig, statistics_npz, to_table
from digit.metrics.diversity import vendi_score
from digit.metrics.extrapolation import frechet_infinity, frechet_ratio
from digit.metrics.frechet import FeatureStats, frechet_distance
from digit.metrics.kernels import cubic_distance, gaussian_distance
from digit.metrics.neighbours import compare_neighbours
from digit.metrics.sliced import sliced_wasserstein


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
        "sw": sliced_wasserstein(x, y, num_directions=20),
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


# -------------------------------------------------------------------- Python


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
