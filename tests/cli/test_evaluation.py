"""The measuring commands: what they print and write, and one line for every mistake."""

import json

import pytest
from tiny import tiny_recipe

from cli.test_cli import fails
from digit.cli import main
from digit.cli.arguments import bracketed
from digit.runs.fit import Run, fit

DATA = "shapes:num=40,size=32"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    run = Run(tiny_recipe(), DATA, tmp_path_factory.mktemp("measured") / "run")
    fit(run)
    run.train_model("vq_ar")
    return run.out


def say(capsys, *argv) -> str:
    assert main([str(word) for word in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_evaluate_and_statistics(run_folder, tmp_path, capsys):
    say(capsys, "sample", "--from", run_folder, "--num", 12, "--out", tmp_path / "samples")
    how = ["--cache", "none", "--num_splits", 2]
    more = ["--report", tmp_path / "page", "--held_out", "shapes:num=20,size=32,seed=5"]
    out = say(
        capsys, "evaluate", tmp_path / "samples", "shapes:num=30,size=32", "--out", tmp_path / "r.json", *how, *more
    )
    assert (
        "copying_efficientnet_lite2" in out and "page/report.html" in out and (tmp_path / "page/report.html").is_file()
    )
    assert "fd_efficientnet_lite2" in out and "covariance is singular" in out and "| fid |" not in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["samples"]["num"] == 12 and result["samples"]["rounding"] == "nearest"
    say(capsys, "statistics", "shapes:num=30,size=32", "--out", tmp_path / "s.npz", "--cache", "none")
    again = say(capsys, "evaluate", tmp_path / "samples", tmp_path / "s.npz", *how)
    assert again.split("fd_efficientnet_lite2 |")[1][:9] == out.split("fd_efficientnet_lite2 |")[1][:9]
    assert "cannot write" in fails(capsys, "evaluate", str(tmp_path / "samples"), DATA, "--out", str(tmp_path))
    assert "protocol" in fails(capsys, "evaluate", str(tmp_path / "samples"), DATA, "--protocol", "admm")


def test_stability(run_folder, tmp_path, capsys):
    out = say(capsys, "stability", DATA, "--from", run_folder, "--out", tmp_path, "--num", 8, "--snrs", "20,5")
    assert "discriminative token change" in out and "codes used" in out and "0.187" not in out  # not of these SNRs
    result = json.loads((tmp_path / "stability.json").read_text())
    assert result["protocol"]["snrs"] == [20.0, 5.0] and (tmp_path / "stability.png").is_file()
    out = say(
        capsys,
        "stability",
        DATA,
        "--from",
        run_folder,
        "--out",
        tmp_path,
        "--num",
        8,
        "--snrs",
        "5",
        "--distances",
        "true",
    )
    assert "fd_efficientnet_lite2 of decoded images, SNR | none | 5 |" in out and "| discriminative ↓ |" in out
    perturbed = json.loads((tmp_path / "stability.json").read_text())["perturbed"]
    assert list(perturbed["distances"]) == ["vq", "discriminative"]
    wrong = ["stability", DATA, "--from", str(run_folder), "--out", str(tmp_path)]
    assert "decibels" in fails(capsys, *wrong, "--snrs", "5000")


def test_probe_takes_the_baseline_along(run_folder, tmp_path, capsys):
    out = say(capsys, "probe", DATA, "--from", run_folder, "--out", tmp_path, "--l2", "0.01")
    assert "DiGIT prior" in out and "VQ-only vq_only" in out and "DiGIT encoder" in out and "every fifth image" in out
    assert set(json.loads((tmp_path / "probe.json").read_text())["probes"]) == {
        "DiGIT prior", "DiGIT encoder", "VQ-only vq_only"
    }  # fmt: skip


def test_sweep_refuses_settings_before_sampling(run_folder, tmp_path, capsys):
    how = ["sweep", DATA, "--from", str(run_folder), "--out", str(tmp_path), "--num", "8"]
    assert "top_p" in fails(capsys, *how, "--top_p", "0.5,2") and not (tmp_path / "cache").exists()
    assert "at least one" in fails(capsys, *how, "--top_k", "[]")
    out = say(capsys, *how, "--top_k", "3", "--top_p", "0.5", "--joint", "true")
    assert (
        "compared with shapes" in out and "lowest fd_efficientnet_lite2" in out and (tmp_path / "joint.png").is_file()
    )


def test_pretrain_names_impossible_sizes(tmp_path, capsys):
    how = ["pretrain", DATA, "--out", str(tmp_path / "e")]
    for wrong, said in (("--patch_size=0", "patch_size"), ("--depth=0", "depth"), ("--dino.num_prototypes=0", "DINO")):
        assert said in fails(capsys, *how, wrong)
    assert "several of patch_size" in fails(capsys, *how, "--image_size=32", "--source_size=32", "--patch_size=32")
    assert not (tmp_path / "e").exists()


def test_reproduce_plans_and_refuses_before_the_work(tmp_path, capsys):
    out = ["--out", str(tmp_path / "r")]
    assert "to go" in say(capsys, "reproduce", "claims", "--plan", *out) and not (tmp_path / "r").exists()
    assert "unknown encoder" in fails(capsys, "reproduce", "table1", "--encoder", "nonsense", *out)
    assert "holds no vqgan.json" in fails(capsys, "reproduce", "table1", "--reuse_vqgan", str(tmp_path), *out)
    assert not (tmp_path / "r").exists()
    assert "needs its weights" in fails(capsys, "reproduce", "table3", "--scale", "paper", *out)
    assert "nothing named" in fails(capsys, "reproduce", "table7", *out)


def test_lists_may_come_with_commas_alone():
    lists = {"--snrs"}
    assert bracketed(["a", "--snrs", "10,20", "--x", "1,2"], lists) == ["a", "--snrs", "[10,20]", "--x", "1,2"]
    assert bracketed(["--snrs=5", "--snrs", "[1]"], lists) == ["--snrs=[5]", "--snrs", "[1]"]


@pytest.mark.parametrize(
    "words",
    [
        ["stability", DATA],
        ["probe", DATA],
        ["sweep", DATA],
        ["sample"],
        ["complete", DATA],
        ["evaluate", DATA, "nowhere.npz"],
        ["statistics", "nowhere"],
        ["convert", "--prior", "nowhere.pt"],
        ["pretrain", "nowhere"],
        ["fit", "nowhere"],
        ["reproduce", "claims", "--data", "nowhere"],
    ],
    ids=lambda words: words[0],
)
def test_a_wrong_input_leaves_nothing_behind(tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    source = ["--from", "nowhere"] if words[0] in ("stability", "probe", "sweep", "sample", "complete") else []
    out = "new/out.npz" if words[0] in ("evaluate", "statistics") else "new/out"
    assert "nowhere" in fails(capsys, *words, *source, "--out", out)
    assert list(tmp_path.iterdir()) == []
