"""bench/chaos.py in short: commands that are killed, or asked to stop, end with what an untouched one leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")
def test_runs_that_are_killed_and_stopped_end_as_untouched_ones(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "chaos.py"), "--short", "--out", str(tmp_path / "chaos")]
    counts = ["--runs", "1", "--stops", "1", "--kills", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*command, *counts], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split()[:5] for line in done.stdout.splitlines()]
    for name in ("train", "tokenize", "codebook", "sample"):
        for how in ("SIGKILL", "SIGTERM"):
            assert [name, how, "1", "of", "1"] in table, done.stdout
