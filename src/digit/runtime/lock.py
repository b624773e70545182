"""Locks a folder for one writing process; the system releases the lock when the process ends, even if it is killed."""

import errno
import json
import logging
import os
import socket
import stat
import time
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.runtime.files import as_path, disk_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
NAME = ".lock"
ATTEMPTS, ATTEMPT_SECONDS = 3, 0.1
_held: dict[Path, int] = {}  # folder -> descriptor of its lock; closing it would release the lock
_about: dict[str, Any] = {}


def set_command(command: str) -> None:
    """Record the command line that repeats this work; later locks of this process contain it."""
    _about["command"] = command


def lock_folder(folder: str | Path) -> None:
    """Let only this process write to `folder` until it ends. A second call changes nothing.

    The lock is POSIX's (fcntl) on FOLDER/.lock, so a killed process leaves nothing to clean up. On a file system
    without locks it only warns; on Windows it does nothing. Raises DigitError that names the process holding the lock.
    """
    folder = as_path(folder).resolve()
    if folder in _held or fcntl is None:
        return
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        with disk_errors(folder / NAME):
            descriptor = _open(folder / NAME, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked workers would keep that lock
        except OSError as error:
            who = describe(_read(descriptor))
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning(
                    "%s cannot be locked (%s): make sure that no other process writes there", folder, error.strerror
                )
                return
            if attempt + 1 == ATTEMPTS:  # `holder` of another process locks the file for a moment too
                raise DigitError(
                    f"{folder} is in use by {who}: wait for it or stop it, or choose another --out"
                ) from None
        else:
            if _is_still(folder / NAME, descriptor):
                break
            os.close(descriptor)  # its owner released the folder meanwhile and removed the file
        time.sleep(ATTEMPT_SECONDS)
    else:
        raise DigitError(f"{folder} is locked and released again and again: choose another --out")
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")} | _about
    with disk_errors(folder / NAME):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)
    _held[folder] = descriptor


def _open(path: Path, flags: int) -> int:
    """Open the lock file. Raises OSError for a link, and for a pipe, which would block."""
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EEXIST, "not a regular file")
    return descriptor


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the opened file still has this name."""
    try:
        return os.stat(path, follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def release_folder(folder: str | Path) -> None:
    """Release the lock and remove its file: for folders that are finished."""
    folder = as_path(folder).resolve()
    if (descriptor := _held.pop(folder, None)) is not None:
        (folder / NAME).unlink(missing_ok=True)
        os.close(descriptor)


def holder(folder: str | Path) -> dict[str, Any] | None:
    """What the lock tells of another process that is writing to `folder` now; None where there is none."""
    path = as_path(folder).resolve() / NAME
    if fcntl is None or path.parent in _held:
        return None
    try:
        descriptor = _open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        return _read(descriptor)
    finally:
        os.close(descriptor)  # releases the shared lock too


def last_writer(folder: str | Path) -> dict[str, Any]:
    """{"pid", "host", "since", "command"} of the process that last locked `folder`, as far as they are known."""
    path = as_path(folder).resolve() / NAME
    if path.parent in _held:  # closing a second descriptor of the file would release our lock
        return _read(_held[path.parent])
    try:
        descriptor = _open(path, os.O_RDONLY)
    except OSError:
        return {}
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def describe(about: dict[str, Any]) -> str:
    """'process 12 on host since 2026-01-31 10:00:00'."""
    known = all(name in about for name in ("pid", "host", "since"))
    return f"process {about['pid']} on {about['host']} since {about['since']}" if known else "another process"


def _read(descriptor: int) -> dict[str, Any]:
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    known = about.items() if isinstance(about, dict) else ()
    return {name: value for name, value in known if isinstance(value, str | int) and str(value).isprintable()}
