"""Writes TensorBoard event files in the caller's thread, with tensorboard's own record writer and messages.

`torch.utils.tensorboard.SummaryWriter` writes the same format from a second thread: a kill loses the queued points, and
on a full disk the thread prints a traceback and the caller learns of it several points later (docs/libraries.md).
"""

import os
import socket
import time
from pathlib import Path
from typing import Any, Self


class TensorBoardWriter:
    """A context that writes the curves of one run to a folder. Raises OSError where the disk fails.

    Args:
        purge_step: TensorBoard drops the earlier points of this step and later ones: an interrupted run repeats them.

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
        """Write one point of each curve."""
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step=step, summary=self._summaries.Summary(value=values))

    def add_picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG file."""
        data = path.read_bytes()
        width, height = (int.from_bytes(data[start : start + 4]) for start in (16, 20))  # of its IHDR chunk
        image = self._summaries.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._write(
            step=step, summary=self._summaries.Summary(value=[self._summaries.Summary.Value(tag=name, image=image)])
        )

    def sync(self) -> None:
        """Flush the points to the disk."""
        os.fsync(self._file.fileno())

    def _write(self, **fields: Any) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()  # so that a kill loses no point
