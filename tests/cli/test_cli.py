"""The command line: one clear line and exit code 2 for every mistake, files where they were promised."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_recipe
from toy_pipeline import toy_pipeline

from digit.cli import COMMANDS, main, parse_labels
from digit.errors import DigitError
from digit.pipeline.labels import ClassPositions

DATA = "shapes:num=24,size=32"


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Path:
    """The tiny recipe as a YAML file."""
    recipe = {k: v for k, v in asdict(tiny_recipe()).items()}
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe))))
    return path


@pytest.fixture(scope="module")
def run_folder(cfg, tmp_path_factory, few_scenes) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["fit", DATA, "--config", str(cfg), "--out", str(out)]) == 0
    return out


def fails(capsys, *argv: str) -> str:
    """Run, expect exit code 2 and exactly one line on stderr but for notes on the data; returns it."""
    assert main(list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("digit: "), lines
    return lines[0]


def test_fit_leaves_everything_a_person_looks_at(run_folder):
    for name in (
        "samples.png",
        "reconstructions.png",
        "token_map.png",
        "completions/grid.png",
        "report.html",
        "metrics.json",
        "samples/grid.png",
        "samples/tokens.npz",
        "pipeline/pipeline.json",
        "prior/log.jsonl",
        "loss.png",
    ):
        assert (run_folder / name).is_file(), name
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert {"psnr_db", "fd_efficientnet_lite2", "recognised", "training"} <= metrics.keys()
    page = (run_folder / "report.html").read_text()
    assert "samples.png" in page and str(run_folder.parent) not in page.replace(str(run_folder), "")


def test_sample_twice_gives_the_same_files(run_folder, tmp_path):
    for out in ("a", "b"):
        assert (
            main(
                [
                    "sample",
                    "--from",
                    str(run_folder),
                    "--num",
                    "4",
                    "--labels",
                    "0,3",
                    "--seed",
                    "5",
                    "--out",
                    str(tmp_path / out),
                ]
            )
            == 0
        )
    for name in ("00000.png", "00003.png", "grid.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokens = np.load(tmp_path / "a" / "tokens.npz")
    assert (
        tokens["discriminative"].shape == (4, 4)
        and tokens["vq"].shape == (4, 16)
        and tokens["labels"].tolist() == [0, 3, 0, 3]
    )


def test_labels_may_be_names(run_folder, tmp_path):
    assert main(["sample", "--from", str(run_folder), "--num", "2", "--labels", "cube", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "samples.json").read_text())["classes"] == ["cube", "cube"]


def test_complete_takes_one_picture_or_a_folder(run_folder, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(2):
        Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)).save(tmp_path / "in" / f"{i}.png")
    for source, num in ((tmp_path / "in", 2), (tmp_path / "in" / "0.png", 1)):
        out = tmp_path / f"out{num}"
        assert main(["complete", str(source), "--from", str(run_folder), "--keep", "0.5", "--out", str(out)]) == 0
        assert len(list(out.glob("0*.png"))) == num


def test_complete_takes_the_pictures_that_no_model_saw(run_folder, tmp_path, capsys):
    for split, shade in (("train", 0), ("test", 255)):
        (tmp_path / "data" / split / "cat").mkdir(parents=True)
        Image.new("L", (40, 40), shade).save(tmp_path / "data" / split / "cat" / "0.png")
    line = ["complete", str(tmp_path / "data"), "--from", str(run_folder), "--pixels", "pasted"]
    for out, more, shade in (("a", [], 255), ("b", ["--split", "train"], 0)):
        assert main([*line, *more, "--out", str(tmp_path / out)]) == 0
        assert f"pictures of the {'train' if more else 'test'} split of {tmp_path / 'data'}" in capsys.readouterr().out
        (picture,) = (tmp_path / out).glob("0*.png")
        assert (np.asarray(Image.open(picture))[0] == shade).all()
    assert "has no splits" in fails(capsys, "complete", str(picture), *line[2:], "--split", "train", "--out", "c")


@pytest.mark.parametrize("keep", ["left", "mask.png"])
def test_complete_keeps_areas_and_masks(run_folder, tmp_path, monkeypatch, keep):
    monkeypatch.chdir(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).save("in.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save("mask.png")
    command = ["complete", "in.png", "--from", str(run_folder), "--keep", keep, "--each", "2", "--out", "out"]
    assert main(command) == 0
    done = [np.asarray(Image.open(f"out/0000{i}.png")) for i in range(2)]
    assert all((image[:, :16] == picture[:, :16]).all() for image in done) and (done[0] != done[1]).any()
    assert json.loads(Path("out/completions.json").read_text())["keep"] == keep


def test_vary_keeps_and_mixes(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f"{i}.png")
    vary = ["vary", "0.png", "--from", str(run_folder), "--out"]
    assert main([*vary, "a", "--each", "3"]) == 0 and len(list(Path("a").glob("0*.png"))) == 3
    assert main([*vary, "b", "--keep_discriminative", "0", "--keep_vq", "0.5", "--labels", "cube"]) == 0
    assert main([*vary, "c", "--toward", "1.png", "--steps", "5"]) == 0
    assert "tokens change on the way" in capsys.readouterr().out and len(list(Path("c").glob("0*.png"))) == 5
    assert "keep_vq is 1" in fails(capsys, *vary, "d", "--keep_vq", "1")
    assert "holds 00000.png but no variations.json" in fails(
        capsys, "vary", "0.png", *vary[2:], str(run_folder / "completions")
    )


def test_export_writes_networks_that_agree(run_folder, tmp_path, capsys, unchecked):
    assert main(["export", str(run_folder), "--out", str(tmp_path / "x")]) == 0
    assert "5 networks" in capsys.readouterr().out and (tmp_path / "x" / "decoder.pt2").is_file()


@pytest.mark.parametrize("command", ["codebook", "tokenize"])
def test_single_stages(command, cfg, tmp_path, capsys):
    assert main([command, DATA, "--config", str(cfg), "--out", str(tmp_path / "run")]) == 0
    assert str(tmp_path / "run") in capsys.readouterr().out


def test_the_range_of_deep_pixels_is_said_recorded_and_kept(cfg, run_folder, tmp_path, capsys):
    data, out = tmp_path / "scans", tmp_path / "run"
    data.mkdir()
    for seed in range(4):
        values = np.random.default_rng(seed).integers(0, 4001, (40, 40), dtype=np.uint16)
        Image.fromarray(values).save(data / f"{seed}.png")
    fit = ["codebook", str(data), "--config", str(cfg), "--out", str(out)]
    assert main(fit) == 0
    said = f"note: {data}: pixels of more than 8 bits: white is 4095 (largest value of 4 images probed: 4000)"
    assert said in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["data"]["pixel_max"] == 4095
    assert "data.pixel_max = 4095, now asked for 8000" in fails(capsys, *fit, "--pixel_max", "8000")
    assert main([*fit, "--pixel_max", "4095"]) == 0
    assert "white is 4095 (as --pixel_max says)" in capsys.readouterr().err
    assert "pixel_max is 0" in fails(capsys, "inspect", str(data), "--pixel_max", "0")
    assert main(["inspect", str(data), "--sheet", "", "--pixel_max", "3999"]) == 0
    assert "broken       " in (text := capsys.readouterr().out) and "wanted 0..3999 (as --pixel_max says)" in text
    complete = ["complete", str(data / "0.png"), "--from", str(run_folder), "--out", str(tmp_path / "done")]
    assert main(complete) == 0 and "white is 4095 (largest value of 1 image" in capsys.readouterr().err
    assert "--pixel_max" in fails(capsys, *complete, "--pixel_max", "1000")


def test_train_one_baseline(cfg, run_folder, tmp_path):
    reuse = [f"--reuse_{part}={run_folder / part}" for part in ("codebook", "vqgan", "tokens")]
    assert main(["train", "vq_ar", DATA, "--config", str(cfg), "--out", str(tmp_path / "run"), *reuse]) == 0
    assert (tmp_path / "run" / "vq_ar" / "model.safetensors").is_file()


def test_info_and_inspect(run_folder, capsys, tmp_path):
    assert main(["info"]) == 0 and "digit_base" in capsys.readouterr().out
    assert main(["info", str(run_folder)]) == 0 and "prior" in capsys.readouterr().out
    assert main(["inspect", DATA, "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "24" in capsys.readouterr().out and (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_teaches(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "example:" in out and f"digit {command}" in out


def test_help_is_quick_and_needs_no_torch():
    code = "import sys; from digit.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# -------------------------------------------------------------------- mistakes


def test_unknown_words(capsys):
    assert "no command named fitt" in fails(capsys, "fitt")
    assert "no recipe named huge" in fails(capsys, "fit", DATA, "--recipe", "huge", "--out", "x")
    assert "--prior.dept" in fails(capsys, "fit", DATA, "--recipe", "demo", "--out", "x", "--prior.dept", "3")
    assert "depth" in fails(capsys, "fit", DATA, "--recipe", "demo", "--out", "x", "--prior.depth", "deep")
    assert "no model named decoder" in fails(capsys, "train", "decoder", DATA, "--recipe", "demo", "--out", "x")


def test_missing_and_empty_data(capsys, tmp_path):
    out = str(tmp_path / "out")
    assert str(tmp_path / "nowhere") in fails(capsys, "fit", str(tmp_path / "nowhere"), "--out", out)
    (tmp_path / "empty").mkdir()
    assert "no images" in fails(capsys, "fit", str(tmp_path / "empty"), "--out", out)
    assert str(tmp_path / "nowhere") in fails(capsys, "inspect", str(tmp_path / "nowhere"))
    assert "does not exist" in fails(capsys, "sample", "--from", str(tmp_path / "nowhere"), "--out", out)
    assert not Path(out).exists()


def test_one_image_and_broken_images(capsys, tmp_path, cfg):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "one.png")
    assert "1 image" in fails(capsys, "fit", str(folder), "--config", str(cfg), "--out", str(tmp_path / "a"))
    for i in range(3):
        (folder / f"broken{i}.jpg").write_bytes(b"no picture")
    (folder / "one.png").unlink()
    assert "3 images unreadable" in fails(
        capsys, "fit", str(folder), "--config", str(cfg), "--out", str(tmp_path / "b")
    )


def test_label_out_of_range(capsys, run_folder, tmp_path):
    line = fails(capsys, "sample", "--from", str(run_folder), "--labels", "12", "--out", str(tmp_path / "out"))
    assert "label 12 is out of range" in line and not (tmp_path / "out").exists()
    assert "no class named 'dog'" in fails(
        capsys, "sample", "--from", str(run_folder), "--labels", "dog", "--out", str(tmp_path)
    )


def test_tokens_of_another_codebook(capsys, cfg, run_folder, tmp_path):
    data = [DATA, "--config", str(cfg)]
    assert main(["codebook", *data, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    line = fails(
        capsys,
        "train",
        "prior",
        *data,
        "--out",
        str(tmp_path / "run"),
        f"--reuse_codebook={tmp_path / 'other' / 'codebook'}",
        f"--reuse_vqgan={run_folder / 'vqgan'}",
        f"--reuse_tokens={run_folder / 'tokens'}",
    )
    assert "were made with codebook" in line


def test_a_store_cut_short(capsys, cfg, run_folder, tmp_path):
    import shutil

    shutil.copytree(run_folder / "tokens", tmp_path / "tokens")
    data = (tmp_path / "tokens" / "vq.npy").read_bytes()
    (tmp_path / "tokens" / "vq.npy").write_bytes(data[:-7])
    line = fails(
        capsys,
        "train",
        "prior",
        DATA,
        "--config",
        str(cfg),
        "--out",
        str(tmp_path / "run"),
        *[f"--reuse_{p}={run_folder / p}" for p in ("codebook", "vqgan")],
        f"--reuse_tokens={tmp_path / 'tokens'}",
    )
    assert "vq.npy" in line


def test_a_full_disk_is_one_line_and_sampling_continues(capsys, run_folder, tmp_path, monkeypatch):
    import errno

    from digit.runtime import plots

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    command = ["sample", "--from", str(run_folder), "--num", "3", "--out", str(tmp_path / "out")]
    picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
    (tmp_path / "old.png").write_bytes(b"the old one")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert "disk full" in fails(capsys, *command)
        with pytest.raises(DigitError, match="disk full"):
            plots.save_png(tmp_path / "old.png", picture)
    assert (tmp_path / "old.png").read_bytes() == b"the old one" and os.listdir(tmp_path / "out") == [".lock"]
    assert main(command) == 0 and (tmp_path / "out" / "samples.json").is_file()


def test_another_request_in_the_same_folder_is_refused(capsys, run_folder, tmp_path):
    command = ["sample", "--from", str(run_folder), "--out", str(tmp_path), "--num"]
    assert main([*command, "2"]) == 0 and main([*command, "2"]) == 0
    assert "num = 2, now asked for 1, which is fewer: give --num 2 or more, or" in fails(capsys, *command, "1")
    assert "was made with seed = 0, now asked for 7: choose another --out" in fails(
        capsys, *command, "3", "--seed", "7"
    )
    assert main([*command, "3"]) == 0 and (tmp_path / "00002.png").is_file()


def test_labels_are_numbers_or_names():
    pipe = toy_pipeline()
    assert parse_labels("0, 2,dog", pipe) == ClassPositions([0, 2, 1]) and parse_labels(None, pipe) is None
    for text, said in (
        ("dgo", r"--labels: no class named 'dgo': did you mean dog\? classes are cat, dog, owl"),
        ("0,,1", "--labels: no class named ''"),
        ("", "--labels: no class named ''"),
        ("3", "--labels: label 3 is out of range: this model knows classes 0 to 2: cat, dog, owl"),
        ("-1", "--labels: a label stands for no class"),
        ("1.5", "--labels: no class named '1.5'"),
    ):
        with pytest.raises(DigitError, match=said):
            parse_labels(text, pipe)
    with pytest.raises(DigitError, match="--labels: labels were given, but this model is unconditional"):
        parse_labels("0", toy_pipeline(num_classes=0))


def test_numbers_mean_the_class_of_that_name_as_in_python():
    pipe = toy_pipeline()
    pipe.classes = ["0", "10", "2"]
    assert parse_labels("2,10", pipe) == ClassPositions(pipe.class_positions([2, 10])) == ClassPositions([2, 1])
    with pytest.raises(DigitError, match="--labels: no class named 1: the class names are numbers, .* 0, 10, 2"):
        parse_labels("1", pipe)


def test_names_with_commas_stay_together():
    pipe = toy_pipeline()
    pipe.classes = ["great white shark, white shark", "great white shark", "owl"]
    assert parse_labels("great white shark, white shark,owl, great white shark", pipe) == ClassPositions([0, 2, 1])


def test_labels_of_samples_and_completions(capsys, run_folder, tmp_path):
    sampled = ["sample", "--from", str(run_folder), "--num", "2", "--out", str(tmp_path / "s"), "--labels"]
    completed = ["complete", DATA, "--num", "2", "--from", str(run_folder), "--out", str(tmp_path / "c"), "--labels"]
    for command in (sampled, completed):
        assert "did you mean cube?" in fails(capsys, *command, "cub")
        assert main([*command, "cube,1"]) == 0
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["classes"] == ["cube", "cube"]


def test_a_home_folder_is_one_after_an_equals_sign_too(capsys, run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_folder / "pipeline", tmp_path / "pipeline")
    assert main(["sample", "--from=~/pipeline", "--num", "1", "--out=~/s"]) == 0
    assert main(["complete", "--from=~/pipeline", "~/s", "--out=~/c"]) == 0 and main(["info", "~/s"]) == 0
    assert main(["inspect", "~/s", "--sheet=~/sheet.png"]) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c", "pipeline", "s", "sheet.png"]


def test_completions_replace_nothing_but_completions(run_folder, tmp_path, capsys):
    (tmp_path / "own").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "own" / "00000.png")
    command = ["complete", DATA, "--from", str(run_folder), "--out"]
    assert "holds 00000.png but no completions.json" in fails(capsys, *command, str(tmp_path / "own"))
    assert main([*command, str(tmp_path / "done"), "--num", "3"]) == 0
    assert main([*command, str(tmp_path / "done"), "--num", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "done").glob("0*.png")) == ["00000.png", "00001.png"]


def test_samples_do_not_go_into_a_part_of_a_run(run_folder, capsys):
    told = fails(capsys, "sample", "--from", str(run_folder), "--num", "2", "--out", str(run_folder / "prior"))
    assert "a part of a run" in told and not (run_folder / "prior" / "samples.json").exists()


def test_statistics_are_an_npz(tmp_path, capsys):
    assert ".npz" in fails(capsys, "statistics", "shapes:num=4,size=32", "--out", str(tmp_path / "a.txt"))


def test_shapes_take_no_other_labels(capsys):
    assert "labels_from is 'colour'" in fails(capsys, "inspect", "shapes:num=4", "--labels_from", "colour")
    assert main(["inspect", "shapes:num=4", "--labels_from", "none", "--sheet", ""]) == 0
    assert "none (unlabelled)" in capsys.readouterr().out
