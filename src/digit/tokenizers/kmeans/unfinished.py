"""A k-means fit that was cut short: its state after the last finished iteration, on the disk.

Legend: K clusters, D features.
"""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from digit.errors import DigitError, MismatchError
from digit.runtime import distributed
from digit.runtime.files import as_path, load_tensors, plain, remove_leftovers, save_tensors, sha256_tensors
from digit.runtime.request import require_same_request

log = logging.getLogger(__name__)
SAVE_EVERY_SECONDS = 2.0  # an iteration is made again sooner than that
SAVING_SHARE = 0.1  # saving may take this much of the time at most


@dataclass
class State:
    """Lloyd's iterations after some of them; all that the next one depends on, apart from the points."""

    centroids: Tensor  # (K, D) float32, less shift
    shift: Tensor  # (D,) float32
    rng: np.random.Generator  # re-seeds empty clusters
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry a finished iteration
    settled: bool = False  # no further iteration is wanted


class UnfinishedFit:
    """Keeps the state of a fit in a file. Only rank 0 reads and writes it.

    Args:
        path: a .safetensors file, removed when the result is saved.
        request: what decides the result; the file of another request is left alone until it is overwritten.
    """

    def __init__(self, path: str | Path, request: dict[str, Any]):
        self.path, self.request = as_path(path), request
        self.due = time.monotonic() + SAVE_EVERY_SECONDS

    def load(self, details: dict[str, Any]) -> State | None:
        """The state to go on with, on the CPU; None, and a warning, where the file is damaged or of another fit.

        details: what only the fit knows of the request.
        """
        self.request = plain(self.request | details)
        return distributed.on_main(self._load)

    def _load(self) -> State | None:
        remove_leftovers(self.path.parent)
        if not self.path.exists():
            return None
        try:
            state, request = self._read()
        except (DigitError, KeyError, TypeError, ValueError, OSError) as error:
            log.warning("%s is damaged (%s): k-means starts again", self.path, error)
            return None
        try:
            require_same_request(self.path, request, self.request, "k-means starts again")
        except MismatchError as error:
            log.warning("%s", error)
            return None
        return state

    def _read(self) -> tuple[State, dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        tensors = {name: tensor.clone() for name, tensor in load_tensors(self.path).items()}
        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads((file.metadata() or {})["k-means"])
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        if about["sha256"] != self._hash(tensors, about):
            raise ValueError("its checksum differs")
        rng = np.random.default_rng()
        rng.bit_generator.state = about["rng"]
        state = State(tensors["centroids"], tensors["shift"], rng, about["history"], about["settled"])
        return state, about["request"]

    @staticmethod
    def _hash(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
        rest = json.dumps({key: value for key, value in about.items() if key != "sha256"}, sort_keys=True)
        return sha256_tensors(tensors | {rest: tensors["shift"][:0]})

    def keep(self, state: State) -> None:
        """Save where it is time."""
        if (began := time.monotonic()) >= self.due:
            self.save(state)
            took = time.monotonic() - began
            self.due = began + took + max(SAVE_EVERY_SECONDS, took / SAVING_SHARE)

    def save(self, state: State) -> None:
        """Write the state now."""
        tensors = {"centroids": state.centroids.cpu(), "shift": state.shift.cpu()}
        about = {
            "request": self.request,
            "rng": state.rng.bit_generator.state,
            "history": state.history,
            "settled": state.settled,
        }
        about["sha256"] = self._hash(tensors, about)
        save_tensors(self.path, tensors, {"k-means": json.dumps(about)})
