"""The points of one k-means fit, shared out over the ranks of torch.distributed, or all of them here."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Shares:
    """What the ranks of a fit tell each other; with one rank every method is the identity.

    Sums are all-reduced, which leaves the same bits on every rank, so that all of them go on alike.
    """

    def __init__(self, across_ranks: bool = False):
        several = across_ranks and dist.is_available() and dist.is_initialized()
        self.num_ranks, self.rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place; returns it."""
        if self.num_ranks == 1:
            return values
        moved = values.cuda() if dist.get_backend() == "nccl" else values  # NCCL knows no memory but the GPU's
        dist.all_reduce(moved)
        return values if moved is values else values.copy_(moved)

    def gather(self, item: Any) -> list[Any]:
        """The item of every rank, in the order of the ranks."""
        items = [item] * self.num_ranks
        if self.num_ranks > 1:
            dist.all_gather_object(items, item)
        return items

    def join(self, items: list[Any]) -> list[Any]:
        """The lists of every rank as one."""
        return [item for part in self.gather(items) for item in part]

    def place(self, rows: Tensor, positions: np.ndarray, total: int) -> Tensor:
        """(n, D) rows that lie here and where they stand in the whole -> (total, D), the rows of every rank."""
        if self.num_ranks == 1 and len(rows) == total:
            return rows[torch.from_numpy(np.argsort(positions)).to(rows.device)]
        whole = rows.new_zeros(total, rows.shape[1])
        whole[torch.from_numpy(positions).to(rows.device)] = rows
        return self.add_up(whole)
