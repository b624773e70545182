"""Pipelines on the Hugging Face Hub: fetched into its cache, and uploaded with their model card.

A name is OWNER/NAME, or hf:OWNER/NAME where a folder of that name could be meant.
"""

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.pipeline.manifest import MANIFEST
from digit.runtime.network import OFFLINE, TIMEOUT, network, offline
from digit.runtime.paths import is_path, nearest

PREFIX = "hf:"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ("*.json", "*.safetensors", "README.md")  # nothing else of a repository is fetched
log = logging.getLogger(__name__)


def hub_name(given: str | Path) -> str | None:
    """OWNER/NAME where a text names a repository rather than a folder, else None."""
    text = str(given)
    if text.startswith(PREFIX):
        return text.removeprefix(PREFIX)
    return text if isinstance(given, str) and HUB_NAME.fullmatch(text) and not is_path(text) else None


def fetch_pipeline(name: str) -> Path:
    """The folder of a repository's pipeline in huggingface_hub's cache; downloaded unless the newest is there.

    Offline, or where the Hub cannot be reached, a copy in the cache is taken. Raises DigitError in one line: for an
    impossible name, where there is neither copy nor network, and for a repository that holds no pipeline.
    """
    if not HUB_NAME.fullmatch(name):
        raise DigitError(f"{PREFIX}{name} names no repository: give {PREFIX}OWNER/NAME")
    hub: Any = library(f"fetch {name}")

    def refusal(why: str) -> str:
        return (
            f"{name} does not exist here{nearest(name)}, and huggingface.co/{name} cannot be fetched ({why}): give a "
            f"folder, or fetch it where there is a network (huggingface-cli download {name}) and give that folder"
        )

    found: str | None = None
    if not offline():
        try:
            with network(refusal):
                hub.get_hf_file_metadata(hub.hf_hub_url(name, MANIFEST), timeout=TIMEOUT)  # fails fast
                found = hub.snapshot_download(name, allow_patterns=list(WANTED), etag_timeout=TIMEOUT)
        except DigitError:
            if (found := cached(hub, name)) is None:
                raise
            log.warning("huggingface.co cannot be reached: %s is the copy in the cache", name)
    elif (found := cached(hub, name)) is None:
        raise DigitError(refusal(OFFLINE))
    folder = Path(str(found))
    if not (folder / MANIFEST).is_file():
        raise DigitError(f"huggingface.co/{name} holds no {MANIFEST}: it is no pipeline of digit")
    return folder


def cached(hub: Any, name: str) -> str | None:
    """The folder of a copy in the cache, without the network; None where there is none."""
    with suppress(Exception):  # the library's own error for a missing copy, of which there are several
        return hub.snapshot_download(name, allow_patterns=list(WANTED), local_files_only=True)
    return None


def require_uploads(name: str) -> None:
    """Raise DigitError, before any work, for an impossible name and where nothing can be uploaded."""
    if not HUB_NAME.fullmatch(name):
        raise DigitError(f"{name!r} names no repository: give OWNER/NAME")
    library(f"upload {name}")
    if offline():
        raise DigitError(cannot_upload(name, OFFLINE))


def cannot_upload(name: str, why: str) -> str:
    """The error message of an upload that failed."""
    advice = "unset it" if why == OFFLINE else "log in (huggingface-cli login) or give token=, for an OWNER of yours"
    return (
        f"{name} cannot be uploaded ({why}): {advice}; or write the folder by save_pretrained() and write_card(), and "
        f"upload it by hand: huggingface-cli upload {name} FOLDER"
    )


def upload_folder(folder: Path, name: str, *, private: bool, token: str | None, message: str) -> str:
    """Upload a pipeline folder, making the repository where it is missing; returns the address of its page.

    Raises DigitError in one line, offline and without a login too.
    """
    require_uploads(name)
    hub: Any = library(f"upload {name}")
    with network(lambda why: cannot_upload(name, why)):
        api = hub.HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message)
    return f"https://huggingface.co/{name}"


def library(what: str) -> Any:
    """The package huggingface_hub. Raises DigitError where it is missing."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise DigitError(f"to {what}, install the package huggingface-hub (pip install huggingface-hub)") from error
    return huggingface_hub
