"""Reads files whose headers may claim more bytes than the file has."""

import io
import os
from pathlib import Path


class BoundedReader(io.BufferedReader):
    """A file opened for reading in which no read asks for more bytes than are left.

    tarfile and pickle ask for as many bytes as a header claims, and Python allocates that much memory before it reads.
    """

    def __init__(self, path: str | Path):
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes; -1 or None reads all that are left. Raises ValueError for other negative sizes."""
        if size is not None and size < -1:
            raise ValueError("a header claims a negative size")
        left = max(0, self.size - self.tell())
        return super().read(left if size is None or size == -1 else min(size, left))
