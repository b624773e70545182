"""Network calls that end in one line: offline they are not made, and every error becomes the caller's message.

Proxies are those of the environment (HTTPS_PROXY, NO_PROXY). DIGIT_OFFLINE and HF_HUB_OFFLINE forbid any network call.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from digit.errors import DigitError

TRUE_WORDS = ("1", "true", "yes", "on")
TIMEOUT = 10  # seconds until a server counts as unreachable
OFFLINE = "offline, as set by DIGIT_OFFLINE or HF_HUB_OFFLINE"

Refusal = Callable[[str], str]  # a reason -> the whole error message


def offline() -> bool:
    """Whether the environment forbids every network call (DIGIT_OFFLINE, HF_HUB_OFFLINE)."""
    return any(os.environ.get(name, "").strip().lower() in TRUE_WORDS for name in ("DIGIT_OFFLINE", "HF_HUB_OFFLINE"))


@contextmanager
def network(refusal: Refusal) -> Iterator[None]:
    """A context for network calls: any error in it becomes one line; offline it is not entered."""
    from huggingface_hub.utils import logging

    if offline():
        raise DigitError(refusal(OFFLINE))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # so that only our message appears
    try:
        with refused(refusal, Exception):  # the library's own errors, and whatever HTTP raises behind a proxy
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def refused(refusal: Refusal, kind: type[Exception]) -> Iterator[None]:
    """Turns errors of a kind into the message that `refusal` makes of their class."""
    try:
        yield
    except DigitError:
        raise
    except kind as error:
        raise DigitError(refusal(type(error).__name__)) from error
