"""Linear probes: both solvers against scikit-learn and torch, how settings are chosen, and features of models."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from toy_images import NoiseSource, PatchEncoder

from digit.data.crops import gather_crops
from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError
from digit.evaluation import probe, probe_state
from digit.evaluation.probe import run_probe, to_table
from digit.evaluation.probed_features import collect, encoder_features, notes_on, prior_features
from digit.metrics.probe import ProbeConfig, ProbeData, best_layer, fit_lbfgs, fit_sgd, probe_layers, top1_difference
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime.files import read_json
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.kmeans.codebook import Codebook
from digit.tokenizers.vq import VQTokenizer

SMALL = PreprocessConfig(image_size=16, encoder_size=16)
SGD = ProbeConfig(solver="sgd", learning_rates=(0.4,), num_epochs=30, batch_size=64)


def blobs(num=240, dim=6, classes=4, seed=0, spread=1.0):
    """(features (N, 3, D), labels (N,)): layer 0 is noise, 1 and 2 hold the class, 2 more clearly."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num) % classes
    noise = spread * torch.randn(num, 3, dim, generator=generator)
    return noise + torch.tensor([0.0, 1.0, 2.0])[:, None] * centres[labels][:, None], labels


def objective(x, labels, weight, bias, l2):
    return float(F.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum())


def scikit(x, labels, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    # scikit-learn minimises sum CE + ||W||^2 / (2 C): C = 1 / (N l2)
    how = dict(C=1 / (len(x) * l2), tol=1e-12, max_iter=10_000, solver="newton-cg")
    fitted = linear_model.LogisticRegression(**how).fit(x.numpy(), labels.numpy())
    return torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)


# ---------------------------------------------------------------- solvers


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_both_solvers_reach_scikit_learns_optimum(solver):
    features, labels = blobs()
    l2 = 0.02
    cfg = ProbeConfig(solver=solver, num_epochs=1500, batch_size=1024, tolerance=1e-14)
    sweep = [[{"l2": l2, "learning_rate": 0.4, "weight_decay": l2}]] * 3
    fit = {"lbfgs": fit_lbfgs, "sgd": fit_sgd}[solver]
    heads = fit(ProbeData(features, labels, 4), torch.arange(len(features)), sweep, cfg)
    for layer in range(3):
        x = features[:, layer].double()
        x = (x - x.mean(0)) / x.std(0, unbiased=False)
        weight, bias = scikit(x, labels, l2)
        ours = heads.weight[layer, :, 0].T.double(), heads.bias[layer, 0].double()
        best = objective(x, labels, weight, bias, l2)
        assert objective(x, labels, *ours, l2) == pytest.approx(best, rel=1e-5)
        tolerance = 1e-5 if solver == "lbfgs" else 1e-3  # the loss is flat at its optimum, and SGD stops early
        assert (ours[0] - weight).norm() / weight.norm() < tolerance


def test_crops_of_an_image_are_held_out_together():
    images = torch.randn(40, 1, 30, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2  # noise: nothing to learn but the images themselves
    crops, groups = images.repeat_interleave(6, 0), torch.arange(40).repeat_interleave(6)
    cfg = ProbeConfig(l2=(1e-5,), validation_fraction=0.25)
    apart = probe_layers(crops, labels[groups], images, labels, cfg)[0].validation_top1
    together = probe_layers(crops, labels[groups], images, labels, cfg, groups=groups)[0].validation_top1
    assert apart == 1.0 and together < 0.8


def test_sgd_takes_the_steps_of_torchs():
    features, labels = blobs(num=100)
    cfg = replace(SGD, num_epochs=4, batch_size=32, standardise=False)
    sweep = [[{"learning_rate": rate, "weight_decay": 0.1} for rate in (0.05, 0.4)]] * 3
    heads = fit_sgd(ProbeData(features, labels, 4), torch.arange(100), sweep, cfg)
    weight, bias = torch.zeros(4, 6, requires_grad=True), torch.zeros(4, requires_grad=True)
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.4, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4 * 4)
    order = torch.Generator().manual_seed(0)
    for _ in range(4):
        for rows in torch.randperm(100, generator=order).split(32):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(features[rows, 1], weight, bias), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(heads.weight[1, :, 1], weight.detach().T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(heads.bias[1, 1], bias.detach(), rtol=1e-4, atol=1e-6)


def test_layers_and_settings_do_not_touch_each_other():
    (train, labels), (test, test_labels) = blobs(), blobs(seed=1)
    cfg = replace(SGD, learning_rates=(0.05, 0.4))
    together = probe_layers(train, labels, test, test_labels, cfg)
    for n in range(3):
        alone = probe_layers(train[:, n : n + 1], labels, test[:, n : n + 1], test_labels, cfg)[0]
        assert alone.setting == together[n].setting and torch.equal(alone.correct, together[n].correct)


# ---------------------------------------------------------------- protocol


@pytest.mark.parametrize("cfg", [ProbeConfig(), SGD], ids=["lbfgs", "sgd"])
def test_layers_that_hold_the_class_are_found(cfg):
    (train, labels), (test, test_labels) = blobs(), blobs(num=400, seed=1)
    results = probe_layers(train, labels, test, test_labels, cfg, ["noise", "some", "more"])
    noise, some, more = (r.top1 for r in results)
    assert noise.low < 0.25 < noise.high, "chance"
    assert noise.high < some.low and some.value < more.value and more.low <= more.value <= more.high
    assert best_layer(results).name == "more" and results[2].validation_top1 > 0.8
    assert float(results[1].correct.double().mean()) == pytest.approx(some.value)
    difference = top1_difference(results[2], results[1], cfg)
    assert difference.low > 0 and difference.value == pytest.approx(more.value - some.value)
    assert results[0].to_dict()["setting"] == results[0].setting and "correct" not in results[0].to_dict()


def test_test_images_choose_nothing():
    (train, labels), (test, test_labels) = blobs(), blobs(seed=1)
    cfg = ProbeConfig(l2=(1e-4, 1e-1, 10.0))
    first = probe_layers(train, labels, test, test_labels, cfg)
    other = probe_layers(train, labels, -test, test_labels.flip(0), cfg)
    assert [r.setting for r in first] == [r.setting for r in other]
    assert [r.validation_top1 for r in first] == [r.validation_top1 for r in other]
    assert first[2].top1 != other[2].top1


def test_the_sweep_finds_a_setting_that_works():
    (train, labels), (test, test_labels) = blobs(), blobs(seed=1)
    results = probe_layers(train, labels, test, test_labels, replace(SGD, learning_rates=(1e-9, 0.4)))
    assert results[2].setting == {"learning_rate": 0.4, "weight_decay": 0.0}


@pytest.mark.parametrize("cfg", [ProbeConfig(), SGD], ids=["lbfgs", "sgd"])
def test_same_seed_same_result(cfg):
    (train, labels), (test, test_labels) = blobs(), blobs(seed=1)
    first, second = (probe_layers(train, labels, test, test_labels, cfg) for _ in range(2))
    assert [r.to_dict() for r in first] == [r.to_dict() for r in second]


def test_scale_of_the_features_does_not_matter_and_half_precision_is_taken():
    (train, labels), (test, test_labels) = blobs(), blobs(seed=1)
    plain = probe_layers(train, labels, test, test_labels, SGD)
    large = probe_layers(train * 1000 + 50, labels, test * 1000 + 50, test_labels, SGD)
    half = probe_layers(train.half(), labels, test.half(), test_labels, SGD)
    for a, b, c in zip(plain, large, half, strict=True):
        assert abs(a.top1.value - b.top1.value) < 0.02 and abs(a.top1.value - c.top1.value) < 0.02


def test_misuse_says_what_to_do(unchecked):
    (train, labels), (test, test_labels) = blobs(num=40), blobs(num=40, seed=1)
    for wrong, message in (
        ((train[:, 0], labels, test, test_labels), "wanted N labels"),
        ((train, labels - 1, test, test_labels), "have no label"),
        ((train, labels, test, test_labels + 1), "one list of classes"),
        ((train, labels, test[..., :3], test_labels), "from one model"),
        ((train * float("nan"), labels, test, test_labels), "NaN"),
        ((train[:1], labels[:1], test[:1], test_labels[:1]), "give more"),
    ):
        with pytest.raises(DigitError, match=message):
            probe_layers(*wrong, ProbeConfig())
    for wrong in (dict(solver="adam"), dict(validation_fraction=0), dict(l2=()), dict(num_epochs=0)):
        with pytest.raises(DigitError):
            ProbeConfig(**wrong)


# ---------------------------------------------------------------- features of models


def model(**changes) -> SequenceModel:
    shape = dict(depth=2, embed_dim=16, num_heads=2, vocab_size=8, target_len=16)
    return SequenceModel(SequenceConfig(**(shape | changes)))


@pytest.mark.parametrize("changes", [{}, {"norm": "pre"}, {"num_classes": 3}, {"masked": True}])
def test_features_are_means_over_positions_of_every_layer(changes):
    prior, tokens = model(**changes), torch.randint(0, 8, (5, 16))
    prior.train()
    found = prior_features(prior, tokens, batch_size=2)
    assert prior.training, "left as it was"
    prior.eval()
    with torch.no_grad():
        hidden = prior(tokens, return_hidden=True)[1]
    assert found.shape == (5, 3, 16) and found.dtype == torch.float32 and hidden[0].shape[1] == 17
    # the last token is an input of no training step
    trained = slice(None) if changes.get("masked") else slice(None, -1)
    torch.testing.assert_close(found, torch.stack([h[:, trained].mean(1) for h in hidden], 1))
    whole = prior_features(prior, tokens, last_position=True)
    torch.testing.assert_close(whole, torch.stack([h.mean(1) for h in hidden], 1))
    half = prior_features(prior, tokens, precision="bf16")
    torch.testing.assert_close(half, found, rtol=0.05, atol=0.05)


def test_untrained_start_symbols_are_named():
    assert "untrained" in notes_on(model(num_classes=3))[0]
    assert not notes_on(model()) and not notes_on(model(num_classes=3, label_dropout=0.1))
    with pytest.raises(DigitError, match="probe the prior"):
        prior_features(model(prefix_len=4, prefix_vocab_size=8), torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(DigitError, match="reads"):
        prior_features(model(), torch.zeros(1, 15, dtype=torch.int64))


class TwoShades(NoiseSource):
    """Dark pictures of class a, bright ones of class b, in noise."""

    def read(self, index):
        image, label = super().read(index)
        return Image.fromarray((np.asarray(image) // 2 + 90 * label).astype(np.uint8)), label


def pipeline(seed=0, vq_only=False) -> DigitPipeline:
    torch.manual_seed(seed)
    if vq_only:
        shape = dict(resolution=16, channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, num_groups=4, z_channels=6)
        vq = VQTokenizer(VQGAN(VQGANConfig(**shape, vocab_size=8)))
        return DigitPipeline(vq=vq, renderer=model(), preprocess=SMALL)
    book = Codebook(torch.rand(8, 3))
    return DigitPipeline(tokenizer=DiscriminativeTokenizer(PatchEncoder(), book), prior=model(), preprocess=SMALL)


def test_collect_runs_the_encoder_once_and_leaves_broken_images_out():
    pipe, source = pipeline(), TwoShades(10, broken=(4,))
    features, labels = collect(pipe, source, batch_size=4)
    assert pipe.tokenizer.encoder.calls == 3 and labels.tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 1]
    assert {name: tuple(f.shape) for name, f in features.items()} == {"encoder": (9, 1, 3), "prior": (9, 3, 16)}
    again, _ = collect(pipe, source, batch_size=64)
    torch.testing.assert_close(features["prior"], again["prior"])
    images = gather_crops(source, SMALL)[0]
    torch.testing.assert_close(encoder_features(pipe.tokenizer.encoder, images), features["encoder"])
    assert set(collect(pipeline(vq_only=True), source)[0]) == {"vq_only"}


def test_run_writes_json_picture_and_table(tmp_path):
    pipes = {"DiGIT": pipeline(), "K = 8": pipeline(seed=1), "baseline": pipeline(vq_only=True)}
    train, test = TwoShades(60), TwoShades(40).subset(range(10, 40))
    result = run_probe(pipes, train, test, ProbeConfig(l2=(0.01,)), out=tmp_path, num_test=20)
    assert read_json(tmp_path / "probe.json") == result and (tmp_path / "probe.png").stat().st_size > 5000
    assert list(result["probes"]) == ["DiGIT encoder", "DiGIT prior", "K = 8 prior", "baseline vq_only"]
    names = [layer["name"] for layer in result["probes"]["DiGIT prior"]["layers"]]
    assert names == ["embedding", "block 1", "block 2"]
    encoder = result["probes"]["DiGIT encoder"]["best"]
    assert encoder["name"] == "patches" and encoder["top1"]["value"] == 1, "brightness alone tells"
    protocol = result["protocol"]
    assert (protocol["num_train"], protocol["num_test"], protocol["num_classes"]) == (60, 20, 2)
    assert protocol["chance"] == 0.5
    pairs = [(entry["first"], entry["second"]) for entry in result["differences"]]
    assert len(pairs) == 6 and pairs[0] == ("DiGIT encoder", "DiGIT prior")
    best = {name: entry["best"]["top1"]["value"] for name, entry in result["probes"].items()}
    for entry in result["differences"]:
        assert entry["top1"]["value"] == pytest.approx(best[entry["first"]] - best[entry["second"]])
    table = to_table(result)
    assert "| DiGIT encoder | patches | 100.0 [" in table and "71.7" in table and "20 test images" in table


def test_a_test_set_of_other_classes_is_refused_and_some_of_them_are_told(tmp_path):
    train = TwoShades(60)
    for names in (["x", "y"], ["A", "B"]):
        other = TwoShades(40)
        other.classes = names
        with pytest.raises(DigitError, match="has no labels of the classes a, b: a linear probe"):
            run_probe(pipeline(), train, other, ProbeConfig(l2=(0.01,)), out=tmp_path)
    some = TwoShades(40)
    some.classes = [train.classes[0], "other"]
    result = run_probe(pipeline(), train, some, ProbeConfig(l2=(0.01,)), out=tmp_path, tested_on="a split")
    num_left = 40 - result["protocol"]["num_test"]
    assert 0 < num_left < 40
    assert result["protocol"]["left_out"] == (
        f"{num_left} of 40 test images have no class of the training images, or are broken"
    )
    assert "Tested on a split." in to_table(result)


def test_unlabelled_sources_and_empty_pipelines_are_refused(tmp_path):
    source = NoiseSource(6).with_classes(["other"])
    with pytest.raises(DigitError, match="no labels"):
        collect(pipeline(), source)
    with pytest.raises(DigitError, match="nothing to probe"):
        collect(DigitPipeline(preprocess=SMALL), NoiseSource(6))


# ---------------------------------------------------------------- many images


class SomeRows:
    """Rows that are read, as features in files are."""

    def __init__(self, features):
        self.features, self.shape, self.most = features, tuple(features.shape), 0

    def take(self, rows):
        self.most = max(self.most, len(rows))
        return self.features[rows]


@pytest.mark.parametrize("cfg", [ProbeConfig(), SGD], ids=["lbfgs", "sgd"])
def test_features_read_by_rows_give_the_bits_of_those_in_memory(cfg):
    (train, labels), (test, test_labels) = blobs(2000), blobs(seed=1)
    train, test, cfg = train.half(), test.half(), replace(cfg, num_epochs=2)
    whole = probe_layers(train, labels, test, test_labels, cfg)
    rows = SomeRows(train)
    read = probe_layers(rows, labels, SomeRows(test), test_labels, cfg, device=torch.device("cpu"))
    assert [r.to_dict() for r in read] == [r.to_dict() for r in whole] and rows.most <= 1024
    assert all(torch.equal(a.correct, b.correct) for a, b in zip(read, whole, strict=True))


def test_too_many_images_for_lbfgs_are_refused():
    class Many:
        shape = (1_281_167, 17, 1024)

        def take(self, rows):
            raise AssertionError("nothing is read")

    labels = torch.arange(1_281_167) % 1000
    with pytest.raises(DigitError, match="use the solver sgd"):
        probe_layers(Many(), labels, Many(), labels, ProbeConfig())


def test_a_probe_from_files_is_that_from_memory_and_leaves_no_files(tmp_path):
    train, test, found = TwoShades(60), TwoShades(30), {}
    for name, budget in (("memory", 2**31), ("files", 0)):
        cfg = replace(SGD, memory_budget_bytes=budget, num_epochs=5)
        pipes = {"DiGIT": pipeline(), "baseline": pipeline(vq_only=True)}
        found[name] = run_probe(pipes, train, test, cfg, out=tmp_path / name)
        kept = found[name]["protocol"]["features"]
        assert kept == ("float32, in memory" if name == "memory" else "float16, in files")
        assert {path.name for path in (tmp_path / name).iterdir()} == {"probe.json", "probe.png", ".digit"}
    for kind, entry in found["memory"]["probes"].items():
        for layer, other in zip(entry["layers"], found["files"]["probes"][kind]["layers"], strict=True):
            assert abs(layer["top1"]["value"] - other["top1"]["value"]) < 0.05


def test_a_probe_that_was_cut_short_runs_no_network_again(tmp_path, monkeypatch):
    pipe, cfg = pipeline(), replace(SGD, memory_budget_bytes=0, num_epochs=2)
    monkeypatch.setattr(probe, "probe_features", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_probe(pipe, TwoShades(60), TwoShades(30), cfg, out=tmp_path)
    monkeypatch.undo()
    calls = pipe.tokenizer.encoder.calls
    assert run_probe(pipe, TwoShades(60), TwoShades(30), cfg, out=tmp_path)["protocol"]["num_train"] == 60
    assert pipe.tokenizer.encoder.calls == calls > 0
    assert not (tmp_path / "features").exists()


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from digit.evaluation import probe_state
from digit.evaluation.probe import probe_features
from digit.metrics.probe import ProbeConfig
out, last = Path(sys.argv[1]), int(sys.argv[2])
save, saves = probe_state.StateFile.save, []
def saving(self, tensors):
    save(self, tensors)
    saves.append(self.path.name.split(".")[1])
    if len(saves) == last:
        os.kill(os.getpid(), signal.SIGKILL)
probe_state.StateFile.save, probe_state.SAVE_EVERY = saving, 0.0
labels = torch.arange(240) % 4
train = torch.randn(240, 3, 6, generator=torch.Generator().manual_seed(0)) + labels[:, None, None]
cfg = ProbeConfig(solver="sgd", learning_rates=(0.1, 0.4), num_epochs=5, batch_size=64)
states = out / "states" if last >= 0 else None
probe_features({"prior": (train, train)}, labels, labels, cfg, out=out, states=states)
print(*saves)
"""


def test_sgd_that_was_killed_goes_on_to_the_bit(tmp_path):
    """Killed in the middle of an epoch of the sweep, then in the final fit; 20 updates each."""

    def probed(out, last):
        words = [sys.executable, "-c", KILLED, str(out), str(last)]
        return subprocess.run(
            words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}
        )

    assert probed(tmp_path / "killed", 7).returncode == probed(tmp_path / "killed", 25).returncode == -signal.SIGKILL
    rest = probed(tmp_path / "killed", 0)
    assert rest.returncode == 0, rest.stderr
    assert rest.stdout.split() == ["final"] * 8, "13 updates of the sweep and 12 of the final fit were done"
    probed(tmp_path / "whole", -1)
    killed, whole = (tmp_path / name / "probe.json" for name in ("killed", "whole"))
    assert killed.read_bytes() == whole.read_bytes()


def test_the_state_of_sgd_belongs_to_its_features_and_settings(tmp_path):
    (train, labels), cfg = blobs(), SGD
    other = {
        "features": (train + 1, labels, cfg), "labels": (train, labels.flip(0), cfg),
        "settings": (train, labels, replace(SGD, num_epochs=2)), "the same": (train.clone(), labels.clone(), cfg),
    }  # fmt: skip
    paths = {name: probe_state.states_in(tmp_path, c, t, ls, None)("sweep").path for name, (t, ls, c) in other.items()}
    own = probe_state.states_in(tmp_path, cfg, train, labels, None)("sweep")
    assert own.path == paths.pop("the same") and own.path not in paths.values() and len(set(paths.values())) == 3
    assert own.load() == {}, "nothing was saved"
    own.path.write_bytes(b"torn")
    assert own.load() == {}
    assert probe_state.states_in(tmp_path, ProbeConfig(), train, labels, None) is None


def test_released_models_are_probed_over_all_positions(tmp_path):
    prior, tokens = model(), torch.randint(0, 8, (5, 16))
    means = {last: prior_features(prior, tokens, last_position=last) for last in (True, False)}
    for info, positions, last in (
        ({}, "auto", False), ({"recipe": "released"}, "auto", True), ({"recipe": "digit_base"}, "auto", False),
        ({}, "all", True), ({"recipe": "released"}, "trained", False),
    ):  # fmt: skip
        pipe = pipeline()
        pipe.prior, pipe.info = prior, info
        pipe.tokenizer.encode_features = lambda images: (tokens, torch.zeros(5, 16, 3))
        features, _ = collect(pipe, NoiseSource(5), cfg=ProbeConfig(positions=positions))
        torch.testing.assert_close(features["prior"], means[last], rtol=0, atol=0)
    assert "all 17 positions" in notes_on(prior, True)[0] and "16 of 17" in notes_on(prior, False)[0]
    assert not notes_on(model(masked=True), True)
    pipe = pipeline()
    pipe.info = {"recipe": "released"}
    result = run_probe(pipe, TwoShades(60), TwoShades(30), ProbeConfig(l2=(0.01,)), out=tmp_path)
    assert "mean over all 17 positions, as in the released code" in to_table(result)
