"""Standard output and error, whatever their encoding and state: a print that fails never ends the work."""

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# what stands for a character that an encoding lacks; any other becomes a backslash escape
ASCII = {
    "±": "+-", "×": "x", "÷": "/", "·": "*", "…": "...", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≈": "~",
    "≠": "!=", "µ": "u", "μ": "u", "²": "^2", "³": "^3", "°": "deg", "•": "*", "“": '"', "”": '"', "‘": "'", "’": "'",
    "‐": "-", "‑": "-", "‒": "-", "–": "-", "—": "-", "−": "-", "─": "-", "━": "#", "│": "|", "\N{NO-BREAK SPACE}": " ",
}  # fmt: skip
ERRORS = "digit-ascii"  # name of `in_ascii` among the codecs' error handlers


def in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Error handler of a codec: ASCII for the characters that it cannot encode."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    failed = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in failed), error.end


codecs.register_error(ERRORS, in_ascii)


class Output:
    """A text stream that writes ASCII for what its encoding lacks, and that never raises.

    Args:
        stream: what to write to; None, as Python has it for a closed standard stream, drops everything.

    Attributes:
        error: why the stream cannot be written any more; None while it can, and where there is none.
    """

    def __init__(self, stream: Any):
        self.stream, self.error = stream, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @property
    def encoding(self) -> str:
        """The stream's encoding."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def can_show(self, text: str) -> bool:
        """Whether the encoding has every character of `text`."""
        try:
            return bool(text.encode(self.encoding))
        except UnicodeEncodeError:
            return False

    def isatty(self) -> bool:
        """Whether a person watches."""
        try:
            return self.stream is not None and self.error is None and self.stream.isatty()
        except ValueError:  # closed
            return False

    def write(self, text: str) -> int:
        """Write text, or drop it where the stream is lost."""
        if self.stream is not None and self.error is None:
            try:
                self.stream.write(text.encode(self.encoding, ERRORS).decode(self.encoding))
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it where the stream is lost."""
        if self.stream is not None and self.error is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        """Remember the error; what is still in the buffer goes nowhere when Python ends."""
        self.error = error
        with suppress(OSError, ValueError, AttributeError):
            descriptor = self.stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def stderr() -> Output:
    """Standard error as an Output."""
    return sys.stderr if isinstance(sys.stderr, Output) else Output(sys.stderr)


@contextmanager
def kept_open() -> Iterator[Output]:
    """A context in which sys.stdout and sys.stderr are Outputs, for whoever prints; yields that of sys.stdout."""
    occupy_descriptors()
    before = sys.stdout, sys.stderr
    out, errors = Output(sys.stdout), stderr()
    streams: Any = sys
    streams.stdout, streams.stderr = out, errors
    try:
        yield out
    finally:
        out.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


def occupy_descriptors() -> None:
    """Point closed standard descriptors at nothing: else the next file that is opened would get what C code prints."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
