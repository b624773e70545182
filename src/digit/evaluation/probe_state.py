"""The state of a probe's sgd on the disk: a probe that was killed goes on from there, to the bit.

FOLDER/KEY.sweep.state, FOLDER/KEY.final.state   safetensors of `metrics.probe.fit_sgd`; KEY hashes all that decides it
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from digit.errors import DigitError
from digit.evaluation.cache import request_key
from digit.evaluation.feature_files import STATE, identity
from digit.metrics.feature_rows import Features
from digit.metrics.probe import ProbeConfig
from digit.runtime.files import load_tensors, remove_leftovers, save_tensors, sha256_tensors

SAVE_EVERY = 300.0  # seconds; a killed probe repeats at most so many. The paper's large prior: 1.5 GB in a few seconds


@dataclass
class StateFile:
    """A `metrics.probe.FitState` in a file."""

    path: Path
    saved: float = field(default_factory=time.monotonic)

    def load(self) -> Mapping[str, Tensor]:
        """What was saved last; empty where nothing was, or the file is damaged."""
        with suppress(DigitError):
            return load_tensors(self.path)
        return {}

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.saved >= SAVE_EVERY

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace what was saved. Raises DigitError where the disk is full."""
        save_tensors(self.path, tensors)
        self.saved = time.monotonic()


def states_in(
    folder: Path, cfg: ProbeConfig, train: Features, labels: Tensor, groups: Tensor | None
) -> Callable[[str], StateFile] | None:
    """The files of one probe by stage, for `metrics.probe.probe_layers`; None for a solver that keeps no state."""
    if cfg.solver != "sgd":
        return None
    remove_leftovers(folder)
    rows = {"labels": labels} | ({} if groups is None else {"groups": groups})
    key = request_key(features=identity(train), rows=sha256_tensors(rows), cfg=asdict(cfg))
    return lambda stage: StateFile(folder / f"{key}.{stage}{STATE}")
