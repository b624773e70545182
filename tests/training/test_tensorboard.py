"""TensorBoard's event files, read by TensorBoard itself."""

import errno
import os
from pathlib import Path

import pytest

from digit.training.tensorboard import TensorBoardWriter

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_a_run_that_went_on_shows_every_step_once(tmp_path, monkeypatch):
    for process, (start, end) in enumerate([(0, 5), (3, 8)]):  # killed after step 5, saved at 3
        monkeypatch.setattr(os, "getpid", lambda process=process: 100 + process)  # names the file
        board = TensorBoardWriter(tmp_path, purge_step=start + 1).__enter__()
        for step in range(start + 1, end + 1):
            board.add({"loss": step / 8, "lr": 0.5}, step)
        board.sync()  # not closed: the process is gone
    assert curves(tmp_path) == {"loss": [(s, s / 8) for s in range(1, 9)], "lr": [(s, 0.5) for s in range(1, 9)]}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_an_error_of_the_caller(tmp_path):
    with pytest.raises(OSError) as caught, TensorBoardWriter(tmp_path, purge_step=1) as board:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, board._file.fileno())
        os.close(full)
        board.add({"loss": 1.0}, 1)
    assert caught.value.errno == errno.ENOSPC
