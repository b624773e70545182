"""The program that is asked to stop: within seconds, whatever it waits for, with the exit code that others have."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from tiny import SHAPES, tiny_recipe

SOURCE = str(Path(__file__).parents[2] / "src")
PATIENCE = 120.0  # seconds for a process to start on a busy machine
SECONDS = 30.0  # from the signal to the end; it is less than 10 where the machine is idle
REQUESTS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 138}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Path:
    """The tiny recipe as a YAML file."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(tiny_recipe())))))
    return path


def start(*words: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "digit", *words],
        env={**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ranks(*words: str, present: tuple[int, ...] = (0, 1)) -> list[subprocess.Popen]:
    """Processes of a job of two, started as another launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [start(*words, "--device", "cpu", RANK=str(rank), LOCAL_RANK=str(rank), **job) for rank in present]


def until(reached: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while not reached():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def importing(process: subprocess.Popen, name: str) -> Callable[[], bool]:
    """Whether a process has opened a library."""
    return lambda: name in Path(f"/proc/{process.pid}/maps").read_text()


def told(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and stdout of a process that got its signal."""
    try:
        out, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert "Traceback" not in errors, errors
    return process.returncode, out + errors


@pytest.mark.parametrize(
    "rank, number", [(0, signal.SIGTERM), (0, signal.SIGINT), (1, signal.SIGTERM), (1, signal.SIGHUP)]
)
def test_waiting_for_a_process_that_never_comes(tmp_path, rank, number):
    (process,) = ranks("tokenize", SHAPES, "--out", str(tmp_path), present=(rank,))
    until(importing(process, "libtorch_cpu"), process)
    time.sleep(3.0)
    process.send_signal(number)
    assert told(process)[0] == REQUESTS[number]


def test_reading_a_stream_that_never_comes(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    process = start("evaluate", str(tmp_path / "a.npz"), str(tmp_path / "a.npz"))
    until(importing(process, "libtorch_cpu"), process)
    time.sleep(3.0)
    process.send_signal(signal.SIGTERM)
    code, text = told(process)
    assert code == 143 and "to continue:\n  digit evaluate" in text


def test_a_request_while_everything_is_imported(tmp_path):
    process = start("tokenize", SHAPES, "--out", str(tmp_path))
    until(importing(process, "libtorch_cpu"), process)
    process.send_signal(signal.SIGTERM)
    assert told(process)[0] == 143


@pytest.mark.parametrize("number", REQUESTS)
def test_what_is_sampled_is_kept_and_the_printed_command_continues(run, tmp_path, number):
    words = ["sample", "--from", str(run.out), "--num", "40", "--batch_size", "1", "--out", str(tmp_path / "out")]
    process = start(*words)
    until(lambda: (tmp_path / "out" / "00003.png").exists(), process)
    process.send_signal(number)
    code, text = told(process)
    assert code == REQUESTS[number]
    match = re.fullmatch(r"\d+ of 40 images are sampled; to continue:\n  (digit sample .*)\n", text)
    assert match is not None
    again = start(*shlex.split(match[1])[1:])
    assert told(again)[0] == 0 and (tmp_path / "out" / "samples.json").exists()


@pytest.mark.parametrize("hangs", [False, True])
def test_one_of_two_is_asked(cfg, tmp_path, hangs):
    """Both end, after a save; or the one that was asked, where the other hangs."""
    words = ["--config", str(cfg), "--out", str(tmp_path), "--prior_training.num_steps", "20000"]
    both = ranks("train", "prior", SHAPES, *words)
    log = tmp_path / "prior" / "log.jsonl"
    until(lambda: log.exists() and '"loss"' in log.read_text(), both[0])  # both have made an update
    if hangs:
        both[0].send_signal(signal.SIGSTOP)
        time.sleep(1.0)
    both[1].send_signal(signal.SIGTERM)
    assert told(both[1])[0] == 143
    if hangs:
        return both[0].kill()
    code, text = told(both[0])
    assert code == 143, text
    assert "prior stopped at step" in text and list(tmp_path.glob("prior/checkpoints/step_*"))


def test_torchrun_reports_the_code(cfg, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = ["train", "prior", SHAPES, "--config", str(cfg), "--out", str(tmp_path), "--device", "cpu"]
    job = start(*words, "--prior_training.num_steps", "20000", launcher=launcher)
    until((tmp_path / "prior" / "log.jsonl").exists, job)
    os.kill(int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[0]), signal.SIGTERM)
    out, errors = job.communicate(timeout=SECONDS)
    assert job.returncode == 1 and out.count("to continue:") == 1
    assert re.search(r"exitcode *: 143", errors) and "prior stopped at step" in errors
