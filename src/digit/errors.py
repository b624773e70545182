"""Errors that the user can fix: one line with what is wrong, got, wanted and the next step. The CLI exits with 2."""

MAX_CHARACTERS = 1500


class DigitError(Exception):
    """A mistake in the request or a fault outside the program; its text is one line for a person to read.

    The text may quote names and values from an untrusted file: control characters are escaped, and of a text longer
    than MAX_CHARACTERS the middle is left out.
    """

    def __str__(self) -> str:
        return _without_middle(printable(_without_middle(super().__str__())))


def printable(text: str, keep: str = "") -> str:
    """The text with its control characters escaped, except those in `keep`: none of them reaches a terminal."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def _without_middle(text: str) -> str:
    half = MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


class BadImageError(DigitError):
    """An image cannot be used; the text names the file and the reason."""


class NoSplitError(DigitError):
    """A data set has no split of the name that was asked for; a split that cannot be read is no such error."""


class MismatchError(DigitError):
    """Two files, models or requests do not belong together; the text names both values."""


class Stopped(BaseException):
    """A signal asked the work to stop and everything is saved: this is no error. The CLI exits with 128 + its number.

    Like KeyboardInterrupt it is no Exception: code that catches whatever a damaged file may raise lets it through.

    Attributes:
        together: whether every process of the job stops at this point.
    """

    def __init__(self, text: str, together: bool = True):
        super().__init__(text)
        self.together = together
