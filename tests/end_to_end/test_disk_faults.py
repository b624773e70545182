"""Disks that fill up, turn read-only or lose power under a command: bench/disk_faults.py in short; what kills leave."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from digit.errors import DigitError
from digit.runtime.files import atomic_path, disk_errors, remove_leftovers

ROOT = Path(__file__).parents[2]
CANNOT = 77  # where nothing may be mounted


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a tmpfs of its own")
def test_a_disk_that_fails_costs_one_line_and_nothing_else(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "disk_faults.py"), "--short", "--out", str(tmp_path / "faults")]
    chosen = ["--runs", "1", "--only", "train", "--faults", "full,readonly,power"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*command, *chosen], env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode == CANNOT:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    for fault in ("full", "readonly"):  # a power cut needs root
        assert ["train", fault, "1", "of", "1"] in table, done.stdout


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("model.json", ".lock", ".hidden.json", ".aside", ".a.aside.json")]
    for path in kept:
        path.write_text("")
    with atomic_path(tmp_path / "model.json") as temporary:
        os.link(temporary, left := temporary.with_name(temporary.name.replace(".model", ".weights")))
    remove_leftovers(tmp_path, tmp_path / "missing")
    assert sorted(tmp_path.iterdir()) == sorted(kept) and not left.exists()


FAULTS = [(errno.ENOSPC, "disk full"), (errno.EROFS, "make it writable"), (errno.EIO, "have the disk checked")]


@pytest.mark.parametrize(("number", "says"), FAULTS)
def test_a_fault_of_the_disk_says_that_the_work_goes_on(tmp_path, number, says):
    with pytest.raises(DigitError, match=f"{says}.*work continues"), disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
