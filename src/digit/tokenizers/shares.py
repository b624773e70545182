"""The points that a quantizer is fitted to, shared out over the ranks of a job, or all of them here."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from digit.errors import Stopped
from digit.runtime import distributed
from digit.runtime.signals import StopSignals


class Shares:
    """What the ranks of a fit tell each other; with one rank every method is the identity.

    Sums are all-reduced, which leaves the same bits on every rank, so that all of them go on alike. Signals may ask one
    of them to stop: it ends its pass over the points early, and all agree on it when the pass is over.
    """

    def __init__(self, signals: StopSignals | None = None):
        self.signals = signals

    @property
    def asked_to_stop(self) -> bool:
        """Whether a signal came to this rank."""
        return self.signals is not None and self.signals.asked

    def agree_to_go_on(self) -> None:
        """Raise Stopped on every rank where a signal came to any of them."""
        if self.signals is None:
            return
        if distributed.any_rank(self.asked_to_stop):
            raise Stopped("k-means: no iteration is done")

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place; returns it."""
        if distributed.world_size() == 1:
            return values
        distributed.barrier()  # one may be far behind with its images; the sum itself is not waited for that long
        moved = values.cuda() if dist.get_backend() == "nccl" else values  # NCCL knows no memory but the GPU's
        dist.all_reduce(moved)
        return values if moved is values else values.copy_(moved)

    def place(self, rows: Tensor, positions: np.ndarray, total: int) -> Tensor:
        """(n, D) rows that lie here and where they stand in the whole -> (total, D), the rows of every rank."""
        if distributed.world_size() == 1 and len(rows) == total:
            return rows[torch.from_numpy(np.argsort(positions)).to(rows.device)]
        whole = rows.new_zeros(total, rows.shape[1])
        whole[torch.from_numpy(positions).to(rows.device)] = rows
        return self.add_up(whole)
