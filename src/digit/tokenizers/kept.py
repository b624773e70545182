"""What a finished step of a fit left behind, on the disk until the whole fit is saved."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from digit.errors import DigitError, MismatchError
from digit.runtime import distributed
from digit.runtime.files import as_path, load_tensors, plain, remove_leftovers, save_tensors, sha256_tensors
from digit.runtime.request import require_same_request

log = logging.getLogger(__name__)
ABOUT = "digit"  # key of the file's metadata


class KeptTensors:
    """Tensors in a file, with the request that they answer. Only rank 0 reads and writes it.

    Args:
        path: a .safetensors file, removed when the result of the fit is saved.
        request: what decides the tensors; those of another request are left alone until they are overwritten.
    """

    def __init__(self, path: str | Path, request: Mapping[str, Any]):
        self.path, self.request = as_path(path), plain(dict(request))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors, on the CPU, and what `save` was told of them; None where there is no file of this request.

        Warns of one that is damaged or of another request.
        """
        return distributed.on_main(self._load)

    def _load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        remove_leftovers(self.path.parent)
        if not self.path.exists():
            return None
        try:
            tensors, about = self._read()
            require_same_request(self.path, about["request"], self.request, "this step of the fit starts again")
        except MismatchError as error:
            log.warning("%s", error)
            return None
        except (DigitError, KeyError, TypeError, ValueError, OSError) as error:
            log.warning("%s is damaged (%s): this step of the fit starts again", self.path, error)
            return None
        return tensors, about["about"]

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        tensors = {name: tensor.clone() for name, tensor in load_tensors(self.path).items()}
        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads((file.metadata() or {})[ABOUT])
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        if about["sha256"] != self._hash(tensors, about):
            raise ValueError("its checksum differs")
        return tensors, about

    @staticmethod
    def _hash(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
        rest = json.dumps({key: value for key, value in about.items() if key != "sha256"}, sort_keys=True)
        return hashlib.sha256(f"{sha256_tensors(tensors)}|{rest}".encode()).hexdigest()

    def save(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
        """Write the tensors, and what JSON can hold about them, on rank 0."""
        if distributed.is_main():
            entries: dict[str, Any] = {"request": self.request, "about": plain(dict(about or {}))}
            entries["sha256"] = self._hash(tensors, entries)
            save_tensors(self.path, tensors, {ABOUT: json.dumps(entries)})
