"""The paths for a GPU without one: on fake CUDA tensors (checks.py), through the compiler (graphs.py) and through
Triton's interpreter and compiler (kernels.py)."""

import importlib.util
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


def results(script: str, *words: str, **variables: str) -> dict[str, str | None]:
    path = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, str(HERE / script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {entry["name"]: entry["fault"] for entry in found}


def test_training_and_sampling_neither_mix_devices_nor_wait(faults):
    assert len(faults) >= 47
    assert not {name: fault for name, fault in faults.items() if fault}


def test_what_is_compiled_is_one_graph():
    found = results("graphs.py")
    assert len(found) == 6
    assert not {name: fault for name, fault in found.items() if fault}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton")
@pytest.mark.parametrize("way", ["interpreted", "compiled"])
def test_kernels_compute_what_torch_computes_and_compile(way, tmp_path):
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    found = results("kernels.py", way, **cache | ({"TRITON_INTERPRET": "1"} if way == "interpreted" else {}))
    assert len(found) >= 9
    assert not {name: fault for name, fault in found.items() if fault}


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: bench/gpu.sh runs these on one")
@pytest.mark.parametrize("script", ["checks.py", "values.py"])
def test_on_a_real_gpu(script):
    found = results(script, "cuda")
    assert not {name: fault for name, fault in found.items() if fault}
