"""Reading from files whose headers lie about their lengths."""

import io
import os
from pathlib import Path


class BoundedReader(io.BufferedReader):
    """A file that is asked for no more than it holds: readers of tar and pickle ask for whatever a header claims, and
    Python takes that much memory before it reads."""

    def __init__(self, path: str | Path):
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises ValueError for a negative number but -1, all that is left."""
        if size is not None and size < -1:
            raise ValueError("a header claims a negative size")
        left = max(0, self.size - self.tell())
        return super().read(left if size is None or size == -1 else min(size, left))
