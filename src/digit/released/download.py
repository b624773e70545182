"""Fetches single files: from the Hugging Face Hub into its own cache, or from another server into ours.

Proxies are those of the environment (HTTPS_PROXY, NO_PROXY). DIGIT_OFFLINE and HF_HUB_OFFLINE forbid any network call.
"""

import urllib.request
from pathlib import Path

from digit.convert.file_kinds import SAFETENSORS, TORCH_OLD, TORCH_ZIP, file_kind
from digit.errors import DigitError
from digit.runtime.files import atomic_path
from digit.runtime.network import TIMEOUT, Refusal, network, refused
from digit.runtime.progress import Progress

PIECE = 2**20  # bytes that are read at a time


def fetch_from_hub(repository: str, path: str, refusal: Refusal) -> Path:
    """A file's path in huggingface_hub's cache, after downloading it unless it is there or the machine is offline.

    Raises DigitError with the message that `refusal` makes of the reason.
    """
    import huggingface_hub

    with refused(refusal, ValueError):  # an impossible name of a repository
        cached = huggingface_hub.try_to_load_from_cache(repository, path)  # without the network
    if not isinstance(cached, str):
        with network(refusal):
            url = huggingface_hub.hf_hub_url(repository, path)
            huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT)  # fails fast; a download would retry for long
            cached = huggingface_hub.hf_hub_download(repository, path, etag_timeout=TIMEOUT)
    return Path(cached)


def list_hub(repository: str, refusal: Refusal) -> list[str]:
    """Paths of the files of a repository. Raises DigitError with the message of `refusal`."""
    import huggingface_hub

    with network(refusal):
        files = huggingface_hub.HfApi().model_info(repository, timeout=TIMEOUT).siblings or []
    return sorted(file.rfilename for file in files)


def fetch_from_url(url: str, target: Path, refusal: Refusal) -> Path:
    """Downloads a weights file to `target` unless it is there. Raises DigitError with the message of `refusal`."""
    if target.is_file():
        return target
    opener = urllib.request.build_opener()  # urlopen keeps the proxies of its first call
    with network(refusal), opener.open(url, timeout=TIMEOUT) as answer, atomic_path(target) as aside:
        size = int(answer.headers.get("Content-Length") or 0)
        with open(aside, "wb") as file, Progress(f"download {target.name} (MB)", size // PIECE or None) as bar:
            while piece := answer.read(PIECE):
                file.write(piece)
                bar.update()
        what = file_kind(aside)[0]
        if what not in (TORCH_ZIP, TORCH_OLD, SAFETENSORS) or (size and aside.stat().st_size != size):
            raise DigitError(refusal(f"the server sent {aside.stat().st_size} bytes that are {what}"))
    return target
