"""Errors that are the user's to mend: one line that says what, got, wanted and the next step. The CLI exits with 2."""


class DigitError(Exception):
    """A mistake or a fault outside the program; its text is one line meant for a person."""


class BadImageError(DigitError):
    """One image cannot be used; the text names the file and the reason."""


class MismatchError(DigitError):
    """Two artefacts do not belong together; the text names both values."""
