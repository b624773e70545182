"""Samplers that a pipeline keeps from call to call, so that a GPU records the graphs of its decoding steps once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from digit.models.sequence import SequenceModel
from digit.runtime.hardware import Precision
from digit.sampling.config import StageSampling
from digit.sampling.kinds import make_sampler
from digit.sampling.sampler import Sampler


class KeptSamplers:
    """At most one sampler for a stage, lent to one caller at a time, so that threads and open streams never share one.

    Keeps only samplers that record CUDA graphs: others take little time to make, and hold a copy of the weights. One
    that is asked for with other settings is let go before the new one is made; so is one whose model has changed.
    Copies and pickles hold none.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Sampler]] = {}  # by stage: what it was made for, and the sampler

    @contextmanager
    def lend(
        self, stage: str, model: SequenceModel, cfg: StageSampling, *, precision: Precision, micro_batch_size: int
    ) -> Iterator[Sampler]:
        """The kept sampler of a stage, or a new one, and keep it afterwards. Arguments as of `make_sampler`.

        Not kept after an error, which may have left a graph half recorded. Raises DigitError as `make_sampler` does.
        """
        wanted = (cfg, precision, micro_batch_size, weakref.ref(model), weights_state(model))
        made_for, sampler = self._kept.pop(stage, (None, None))
        if sampler is None or made_for != wanted:
            sampler = None  # its memory is free before another one takes its own
            sampler = make_sampler(model, cfg, precision=precision, micro_batch_size=micro_batch_size)
        yield sampler
        if sampler.records:
            self._kept[stage] = (wanted, sampler)

    @property
    def held_bytes(self) -> int:
        """Bytes on the device that the next calls use again."""
        return sum(sampler.held_bytes for _, sampler in self._kept.values())

    def __reduce__(self) -> tuple[type[KeptSamplers], tuple[()]]:
        return KeptSamplers, ()


def weights_state(model: SequenceModel) -> list[tuple[int, int]]:
    """Address and version of each parameter: another list where weights were replaced, moved or written to.

    torch does not count what is written through `parameter.data`.
    """
    return [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]
