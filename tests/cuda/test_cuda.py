"""The paths for a GPU without a GPU: on fake CUDA tensors (checks.py), and through the compiler (graphs.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SOURCE = str(HERE.parents[1] / "src")


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> dict[str, str | None]:
    """Fault of each check by its name; None where there is none."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the fake device with")
    if torch.version.cuda is not None:
        pytest.skip("this build of torch has CUDA: its own device cannot be replaced")
    return results("checks.py", str(tmp_path_factory.mktemp("device")))


def results(script: str, *words: str) -> dict[str, str | None]:
    environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {entry["name"]: entry["fault"] for entry in found}


def test_training_and_sampling_neither_mix_devices_nor_wait(faults):
    assert len(faults) >= 35
    assert not {name: fault for name, fault in faults.items() if fault}


def test_what_is_compiled_is_one_graph():
    found = results("graphs.py")
    assert len(found) == 5
    assert not {name: fault for name, fault in found.items() if fault}
