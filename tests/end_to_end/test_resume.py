"""A resumed run is an uninterrupted one, bit for bit on the CPU; two processes equal one with two micro-batches."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_task import run_toy, toy_batches, toy_config

from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.training.log import read_log
from digit.training.sequence import train_sequence_model

TOY = Path(__file__).parents[1] / "helpers/toy_task.py"


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_log(out / "log.jsonl")]


def start(command: list[str], out: Path, **changes) -> subprocess.Popen:
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    line = [*command, str(TOY), str(out), json.dumps(changes)]
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)


VARIANTS = [{}, {"ema_decay": 0.9}, {"accumulate": 2, "schedule": "constant"}, {"precision": "bf16"}]


@pytest.mark.parametrize("changes", VARIANTS)
def test_resumed_equals_uninterrupted(tmp_path, changes):
    whole = run_toy(tmp_path / "whole", num_steps=12, **changes)
    for num_steps in (4, 8, 12):
        halves = run_toy(tmp_path / "halves", num_steps=num_steps, **changes)
    assert_same(whole.state_dict(), halves.state_dict())
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")


@pytest.mark.parametrize("masked", [False, True])
def test_the_real_model_resumes_exactly(tmp_path, masked):
    shape = {"depth": 2, "embed_dim": 16, "num_heads": 2, "masked": masked, "norm": "pre"}
    cfg = SequenceConfig(vocab_size=11, target_len=6, num_classes=3, label_dropout=0.1, **shape)

    def run(out: Path, num_steps: int) -> dict:
        torch.manual_seed(7)
        train = toy_config(num_steps=num_steps, ema_decay=0.9, accumulate=2)
        return train_sequence_model(SequenceModel(cfg), toy_batches(), train, out)[0].state_dict()

    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "halves", 4)
    torch.randn(3)
    assert_same(whole, run(tmp_path / "halves", 8))


def test_a_torn_checkpoint_costs_steps_but_changes_nothing(tmp_path, caplog):
    whole = run_toy(tmp_path / "whole", num_steps=12, ema_decay=0.9)
    run_toy(tmp_path / "torn", num_steps=8, ema_decay=0.9)
    (newest,) = (tmp_path / "torn" / "checkpoints" / "step_00000008").glob("*.safetensors")
    newest.write_bytes(newest.read_bytes()[:1000])
    torn = run_toy(tmp_path / "torn", num_steps=12, ema_decay=0.9)
    assert "step_00000008 is damaged" in caplog.text
    assert_same(whole.state_dict(), torn.state_dict())
    assert losses(tmp_path / "whole") == losses(tmp_path / "torn")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_goes_on_where_it_was(tmp_path, number):
    whole = run_toy(tmp_path / "whole", num_steps=100, save_every=5)
    process = start([sys.executable], tmp_path / "killed", num_steps=100, save_every=5, step_seconds=0.02)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("checkpoints/step_*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    assert ("stopped at step" in errors) == (number == signal.SIGTERM)
    assert not (tmp_path / "killed" / "weights.pt").exists()
    killed = run_toy(tmp_path / "killed", num_steps=100, save_every=5)
    assert_same(whole.state_dict(), killed.state_dict())


def test_two_processes_are_one_with_two_micro_batches(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start(torchrun, tmp_path / "two", num_steps=6, ema_decay=0.9)
    alone = run_toy(tmp_path / "one", num_steps=6, ema_decay=0.9, accumulate=2)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    two = torch.load(tmp_path / "two" / "weights.pt", weights_only=True)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)  # the sum of two ranks is rounded elsewhere
    pairs = zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True)
    assert all(a[0] == b[0] and abs(a[1] - b[1]) < 1e-5 for a, b in pairs)


def test_lengthening_a_run_that_another_seed_began_is_refused(tmp_path):
    run_toy(tmp_path, num_steps=4)
    with pytest.raises(DigitError, match=r"seed = 0, now asked for 1"):
        run_toy(tmp_path, num_steps=8, seed=1)
