"""Training on two processes (gloo): replicated or cut up, it is training on one; checkpoints go on with any number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_task import run_task

from digit.training.checkpoint import list_checkpoints
from digit.training.log import read_log

TOY = Path(__file__).parents[1] / "helpers/toy_task.py"
SOURCE = str(Path(__file__).parents[2] / "src")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
CLOCK = ("images_per_second", "mfu", "data_wait", "seconds")
PRIOR = {"task": "sequence", "num_steps": 8, "ema_decay": 0.9}
LOSSES = {"current_code_weight": 1.0, "next_code_weight": 1.0}
WHOLE = {
    "ddp": PRIOR,
    "fsdp": PRIOR | {"parallel": "fsdp"},
    "ddp masked": PRIOR | {"masked": True},
    "fsdp masked": PRIOR | {"masked": True, "parallel": "fsdp", "accumulate": 2},
    "fsdp checkpointed": PRIOR | {"parallel": "fsdp", "checkpoint_activations": True},
    "ddp code losses": PRIOR | LOSSES,
    "fsdp code losses": PRIOR | LOSSES | {"parallel": "fsdp"},
    "gan": {"task": "gan"},
}
# 4 steps on two processes, 4 on one, 4 on two
RESHARDED = {"ddp": PRIOR, "fsdp": PRIOR | {"parallel": "fsdp"}, "fsdp to ddp": PRIOR | {"parallel": "fsdp"}}


def start(jobs: dict[Path, dict], processes: int = 2) -> subprocess.Popen:
    words = [word for out, changes in jobs.items() for word in (str(out), json.dumps(changes))]
    environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    line = [*TORCHRUN, f"--nproc-per-node={processes}", str(TOY), *words]
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)


def run_on_several(jobs: dict[Path, dict], processes: int = 2) -> None:
    process = start(jobs, processes)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors


def metrics(out: Path, name: str = "loss") -> dict[int, float]:
    return {line["step"]: line[name] for line in read_log(out / "log.jsonl") if name in line}


def assert_alike(first: Path, second: Path) -> None:
    for name in ("loss", "val_nll", "l1"):
        wanted, got = metrics(first, name), metrics(second, name)
        assert got.keys() == wanted.keys()
        assert all(abs(got[step] - wanted[step]) < 1e-5 for step in wanted), (name, wanted, got)
    weights = [torch.load(out / "weights.pt", weights_only=True) for out in (first, second)]
    for name, value in weights[0].items():
        if name.endswith("qkv.bias"):  # the keys' has no gradient but rounding, which Adam blows up
            continue
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)


def run_alone(out: Path, changes: dict) -> None:
    torch.save(run_task(out, changes).state_dict(), out / "weights.pt")


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> Path:
    """Everything that two processes are asked for, in as few starts as possible."""
    folder = tmp_path_factory.mktemp("two")
    halves = {folder / "resharded" / name: changes | {"num_steps": 4} for name, changes in RESHARDED.items()}
    run_on_several({folder / "whole" / name: changes for name, changes in WHOLE.items()} | halves)
    for name, changes in RESHARDED.items():
        run_alone(folder / "resharded" / name, changes)
    last = {name: changes | {"num_steps": 12} for name, changes in RESHARDED.items()}
    last["fsdp to ddp"] = PRIOR | {"num_steps": 12}
    run_on_several({folder / "resharded" / name: changes for name, changes in last.items()})
    return folder


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_are_one(on_two, tmp_path, name):
    run_alone(tmp_path, WHOLE[name] | {"parallel": "ddp"} if "parallel" in WHOLE[name] else WHOLE[name])
    assert_alike(tmp_path, on_two / "whole" / name)


@pytest.mark.parametrize("name", RESHARDED)
def test_checkpoints_go_on_with_any_number_of_processes(on_two, tmp_path, name):
    run_alone(tmp_path, PRIOR | {"num_steps": 12})
    assert_alike(tmp_path, on_two / "resharded" / name)


def test_three_processes_resume_bit_for_bit(tmp_path):
    """With three or more the order of a sum shows: DDP's buckets, and the means over ranks and steps in the log."""
    changes = PRIOR | {"batch_size": 12, "log_every": 5, "num_steps": 11}
    jobs = {"ddp": changes, "fsdp": changes | {"parallel": "fsdp", "accumulate": 2}}
    run_on_several({tmp_path / "cut" / name: job | {"stop_at": 7} for name, job in jobs.items()}, processes=3)
    assert not list(tmp_path.rglob("weights.pt"))
    run_on_several({tmp_path / kind / n: job for kind in ("whole", "cut") for n, job in jobs.items()}, processes=3)
    for name in jobs:
        whole, cut = (torch.load(tmp_path / k / name / "weights.pt", weights_only=True) for k in ("whole", "cut"))
        assert all(torch.equal(cut[key], value) for key, value in whole.items())
        lines = [read_log(tmp_path / kind / name / "log.jsonl") for kind in ("whole", "cut")]
        told = [[{k: v for k, v in line.items() if k not in CLOCK} for line in told] for told in lines]
        assert told[0] == told[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lost_process_ends_the_job_and_costs_nothing_that_was_saved(tmp_path, number):
    """SIGKILL of one process ends the other; SIGTERM to one of them stops both at the same step, all saved."""
    changes = PRIOR | {"num_steps": 60, "save_every": 3, "parallel": "fsdp", "log_every": 5}
    job = start({tmp_path / "cut": changes | {"step_seconds": 0.05}})
    deadline = time.monotonic() + 60
    while not (saved := list_checkpoints(tmp_path / "cut" / "checkpoints")):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[1]
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), number)
    errors = job.communicate(timeout=60)[1]
    assert (job.returncode == 0) == (number == signal.SIGTERM), errors
    assert errors.count("stopped at step") == (2 if number == signal.SIGTERM else 0)
    assert saved[0][0] < 60 and not (tmp_path / "cut" / "weights.pt").exists()
    run_alone(tmp_path / "cut", changes)
    run_alone(tmp_path / "whole", changes)
    assert_alike(tmp_path / "whole", tmp_path / "cut")
