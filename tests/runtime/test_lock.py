"""A folder has one writer, and a lock dies with its process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from digit.cli import main
from digit.errors import DigitError
from digit.runtime import lock

HOLD = """
import sys, time
from digit.runtime import lock
lock.set_command("digit train prior photos/")
lock.lock_folder(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_told_who_the_first_is(tmp_path, other):
    with pytest.raises(DigitError, match=rf"is in use by process {other.pid} on .* since .*: wait for it or stop it"):
        lock.lock_folder(tmp_path)
    assert lock.holder(tmp_path)["command"] == "digit train prior photos/"


def test_a_killed_process_leaves_no_lock(tmp_path, other):
    other.kill()
    other.wait()
    assert lock.holder(tmp_path) is None
    assert lock.last_writer(tmp_path)["command"] == "digit train prior photos/"
    lock.lock_folder(tmp_path)
    lock.lock_folder(tmp_path)  # the same process may ask again
    assert lock.holder(tmp_path) is None and lock.last_writer(tmp_path)["pid"] != other.pid


def test_the_command_line_refuses_a_run_that_is_under_way(tmp_path, other, capsys):
    assert main(["codebook", "shapes:num=80,size=64", "--recipe", "demo", "--out", str(tmp_path)]) == 2
    assert f"is in use by process {other.pid}" in capsys.readouterr().err


def test_a_released_folder_has_no_trace(tmp_path):
    lock.lock_folder(tmp_path)
    lock.release_folder(tmp_path)
    assert list(tmp_path.iterdir()) == [] and lock.holder(tmp_path) is None
    lock.release_folder(tmp_path)


def test_an_empty_or_foreign_lock_file_is_no_trouble(tmp_path):
    assert lock.last_writer(tmp_path) == {} and lock.holder(tmp_path) is None
    (tmp_path / ".lock").write_text("not JSON")
    assert lock.last_writer(tmp_path) == {} and lock.holder(tmp_path) is None
    assert lock.describe({}) == "another process"


def test_a_lock_that_is_a_trap_is_not_opened(tmp_path):
    """A folder from a stranger: a link to another file, to itself, a pipe, a folder, text that paints the terminal."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for number, make in enumerate(
        [
            lambda path: path.symlink_to(victim),
            lambda path: path.symlink_to(path),
            os.mkfifo,
            Path.mkdir,
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / ".lock")
        assert lock.holder(folder) is None and lock.last_writer(folder) == {}
        with pytest.raises(DigitError, match=r"cannot write .*\.lock"):
            lock.lock_folder(folder)
    assert victim.read_text() == "precious"
    (tmp_path / ".lock").write_text('{"pid": 3, "command": "\\u001b[31mrm -rf"}')
    assert lock.last_writer(tmp_path) == {"pid": 3}
