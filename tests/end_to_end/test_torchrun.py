"""The command line under torchrun: two processes (gloo) do what one does, and speak with one voice."""

import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import tiny_recipe

from digit.cli import main
from digit.data.images import open_source
from digit.data.tokens import TokenStore
from digit.runtime.files import load_tensors
from digit.training.log import read_log

DATA = "shapes:num=24,size=32"
SOURCE = str(Path(__file__).parents[2] / "src")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "digit"]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Path:
    """The tiny recipe in fp32, without dropout, whose random numbers depend on how a batch is cut."""
    recipe = tiny_recipe()
    changes = {name: replace(getattr(recipe, name), dropout=0.0) for name in ("prior", "renderer")}
    changes |= {f"{name}_training": replace(getattr(recipe, f"{name}_training"), precision="fp32") for name in changes}
    changes["vqgan_training"] = replace(recipe.vqgan_training, precision="fp32")
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(plain(asdict(replace(recipe, **changes)))))
    return path


def plain(value):
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def start(*words: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*TORCHRUN, *words], env=environment, text=True, **pipes)


def ours(text: str) -> list[str]:
    """The lines that are ours, not the launcher's; its summary repeats ours once more, behind 'message'."""
    return [line for line in text.splitlines() if line.startswith("digit: ")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """24 scenes as files: a report on shapes would also train a judge, which takes longer than all stages."""
    folder, scenes = tmp_path_factory.mktemp("pictures"), open_source(DATA)
    for index in range(len(scenes)):
        scenes.read(index)[0].save(folder / f"{index:02d}.png")
    return str(folder)


@pytest.fixture(scope="module")
def folders(cfg, pictures, tmp_path_factory) -> tuple[Path, Path]:
    """A run by one process and the same by two, the models cut up."""
    one, two = tmp_path_factory.mktemp("runs") / "one", tmp_path_factory.mktemp("runs") / "two"
    sharded = ["--prior_training.parallel", "fsdp", "--renderer_training.parallel", "fsdp"]
    job = start("fit", pictures, "--config", str(cfg), "--out", str(two), *sharded, "--device", "cpu")
    assert main(["fit", pictures, "--config", str(cfg), "--out", str(one), "--device", "cpu"]) == 0
    out, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    assert out.count("done: open") == 1
    return one, two


def test_the_codebook_is_the_same(folders):
    one, two = (load_tensors(folder / "codebook" / "codebook.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name].float(), value.float(), rtol=1e-4, atol=1e-5)


def test_the_tokens_are_the_same(folders):
    one, two = (TokenStore.open(folder / "tokens") for folder in folders)
    assert np.array_equal(one.discriminative, two.discriminative) and np.array_equal(one.vq, two.vq)


@pytest.mark.parametrize("stage", ["vqgan", "prior", "renderer"])
def test_the_losses_are_the_same(folders, stage):
    one, two = (read_log(folder / stage / "log.jsonl") for folder in folders)
    name = "l1" if stage == "vqgan" else "loss"
    pairs = [(a[name], b[name]) for a, b in zip(one, two, strict=True) if name in a]
    assert pairs and all(abs(a - b) < 1e-5 for a, b in pairs), pairs


def test_fresh_crops_are_shared_among_the_processes(folders, cfg, pictures, tmp_path):
    """Each process decodes and encodes half of every batch; the losses are those of one process."""
    reuse = [word for part in ("codebook", "vqgan", "tokens") for word in (f"--reuse_{part}", str(folders[0] / part))]
    words = [
        "train",
        "renderer",
        pictures,
        "--config",
        str(cfg),
        "--training_crops",
        "fresh",
        *reuse,
        "--device",
        "cpu",
    ]
    job = start(*words, "--out", str(tmp_path / "two"))
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    errors = job.communicate(timeout=120)[1]
    assert job.returncode == 0, errors
    one, two, stored = (
        read_log(f / "renderer" / "log.jsonl") for f in (tmp_path / "one", tmp_path / "two", folders[0])
    )
    assert [a["loss"] for a in one] == pytest.approx([b["loss"] for b in two], abs=1e-5)
    assert one[-1]["loss"] != stored[-1]["loss"]  # step 4 begins the second epoch


def test_the_samples_are_the_same(folders, tmp_path):
    words = ["sample", "--from", str(folders[0]), "--num", "10", "--batch_size", "2", "--device", "cpu", "--out"]
    job = start("--", *words, str(tmp_path / "two"))
    assert main([*words, str(tmp_path / "one")]) == 0
    out, errors = job.communicate(timeout=120)
    assert job.returncode == 0 and out.count("10 images in") == 1, errors
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nonsense", DATA, "--out", "x"], "no model named nonsense"),
        (["train", "prior", DATA, "--out", "x", "--nonsense", "1"], "nonsense"),
    ],
)
def test_a_mistake_is_one_line(words, message, tmp_path):
    words = [str(tmp_path / word) if word == "x" else word for word in words]
    job = start(*words, "--device", "cpu")
    errors = job.communicate(timeout=120)[1]
    assert job.returncode != 0
    assert len(ours(errors)) == 1 and message in ours(errors)[0], errors


def test_slurm_starts_the_same(folders, cfg, pictures):
    """A job step of two tasks, as srun would start them; the run is done, so that they only meet and agree."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", **step}
    words = ["tokenize", pictures, "--config", str(cfg), "--out", str(folders[1]), "--device", "cpu"]
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "digit", *words], env=environment | {"SLURM_PROCID": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], told
    assert "24 rows" in told[0][0] and told[1] == ("", "")


def test_a_killed_process_ends_the_job_with_one_line(cfg, tmp_path):
    words = ["--config", str(cfg), "--out", str(tmp_path), "--prior_training.num_steps", "20000"]
    job = start("train", "prior", DATA, *words, "--device", "cpu")
    deadline = time.monotonic() + 120
    while not (tmp_path / "prior" / "log.jsonl").exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[1]
        time.sleep(0.1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[1]), 9)
    errors = job.communicate(timeout=60)[1]
    assert job.returncode != 0
    lines = ours(errors)  # none if torchrun, which names the killed process itself, stops the other one first
    assert len(lines) <= 1
    for line in lines:
        lost = "lost contact with another of the 2 processes" in line and "run the same command again" in line
        assert lost or "to continue" in line
