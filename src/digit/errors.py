"""Errors that are the user's to mend: one line that says what, got, wanted and the next step. The CLI exits with 2."""

MAX_CHARACTERS = 1500


class DigitError(Exception):
    """A mistake or a fault outside the program; its text is one line meant for a person.

    Names and values that it quotes may come from a stranger's file: characters that would end the line or steer a
    terminal are spelled out, and the middle of an endless one is left out.
    """

    def __str__(self) -> str:
        text = _without_middle(super().__str__())
        if text.isprintable():
            return text
        return _without_middle("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _without_middle(text: str) -> str:
    half = MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


class BadImageError(DigitError):
    """One image cannot be used; the text names the file and the reason."""


class MismatchError(DigitError):
    """Two artefacts do not belong together; the text names both values."""


class Stopped(Exception):
    """The work was asked to stop (SIGINT, SIGTERM) and everything is saved: no mistake. The CLI exits with 0.

    Attributes:
        together: whether all of several processes stop at this point.
    """

    def __init__(self, text: str, together: bool = True):
        super().__init__(text)
        self.together = together
