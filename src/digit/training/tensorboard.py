"""TensorBoard's event files, written in the caller's thread.

`torch.utils.tensorboard.SummaryWriter` writes from a thread of its own: where the disk fills up that thread prints a
traceback and dies, and what it had not written yet is lost to a kill. The format is the same: a record an event.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any, Self


class TensorBoardWriter:
    """Curves of one run in a folder, within a context. Raises OSError where the disk fails.

    Args:
        purge_step: what TensorBoard knows of this step and later ones is from before an interruption; it forgets it.

    Raises ImportError where tensorboard is not installed.
    """

    def __init__(self, folder: Path, purge_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events, self._summaries, self._writer = event_pb2, summary_pb2, RecordWriter
        self.folder, self.purge_step = folder, purge_step

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = open(self.folder / name, "ab")
        self._records = self._writer(self._file)
        self._write(file_version="brain.Event:2")
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(step=self.purge_step, session_log=start)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, metrics: dict[str, float], step: int) -> None:
        """One point of each curve."""
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step=step, summary=self._summaries.Summary(value=values))

    def sync(self) -> None:
        """On the disk, not only on its way there."""
        os.fsync(self._file.fileno())

    def _write(self, **fields: Any) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()  # a kill loses nothing
