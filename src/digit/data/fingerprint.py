"""Fingerprints of image sources: they change whenever a pixel, a label or the name of a class may have changed."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from digit.errors import DigitError
from digit.runtime.progress import track

READ_BYTES, READ_FILES = 2**29, 10_000  # data of no more than that is read, which takes a second or two
READERS = 4


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 over byte strings, each preceded by its length, as 64 hex digits."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def data_fingerprint(
    names: Sequence[str], sizes: Sequence[int], stamps: Sequence[bytes], classes: Sequence[str], labels: np.ndarray
) -> str:
    """SHA-256 over files (name, size in bytes, and what changes with the contents), class names and labels.

    It does not depend on where the data lie. Costs about a second per million files.
    """
    files = "\0".join(names).encode("utf-8", "surrogateescape")
    lengths = np.asarray(sizes, dtype="<i8").tobytes()
    about_classes = "\0".join(classes).encode("utf-8", "surrogateescape")
    return digest([files, lengths, b"".join(stamps), about_classes, labels.astype("<i8").tobytes()])


def reads_contents(sizes: Sequence[int], read_contents: bool | None) -> bool:
    """Whether a fingerprint reads the files: as told, else (None) if they are few and small."""
    if read_contents is not None:
        return read_contents
    return len(sizes) <= READ_FILES and sum(sizes) <= READ_BYTES


def content_stamps(files: Sequence[Path]) -> list[bytes]:
    """SHA-256 of every file's contents. Files that cannot be read count as empty: reading them as images names them."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(track(pool.map(_content, files), "read files for the data's fingerprint", len(files)))


def _content(file: Path) -> bytes:
    try:
        if not file.is_file():
            return b""
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError:
        return b""


def time_stamps(times: Sequence[int]) -> list[bytes]:
    """Times of the last change (ns) as stamps."""
    return [time.to_bytes(8, "little", signed=True) for time in times]


def stamps_of(
    files: Iterable[Path], sizes: Sequence[int], times: Sequence[int], read_contents: bool | None
) -> list[bytes]:
    """What stands for the contents of files: their SHA-256 if they are read, else the times of their last change."""
    return content_stamps(list(files)) if reads_contents(sizes, read_contents) else time_stamps(times)


def file_times(files: Sequence[Path]) -> tuple[list[int], list[int]]:
    """(sizes in bytes, times of the last change in ns) of files. Raises DigitError for one that is gone."""
    try:
        found = [os.stat(file) for file in files]
    except OSError as error:
        raise DigitError(f"cannot open ({error.strerror}): {error.filename}") from error
    return [status.st_size for status in found], [status.st_mtime_ns for status in found]
