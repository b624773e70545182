"""Tensors that the ranks of an evaluation make, brought together on rank 0."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from digit.runtime import distributed

PIECE = 1000  # rows that each rank sends at a time


def rows_to_main(work: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate tensors (n, ...) that `work` makes on each rank, any n, in rank order; {} on ranks other than 0."""
    own: dict[str, Tensor] = {}

    def make() -> int:
        own.update(work())
        return max(map(len, own.values()), default=0)

    longest = max(distributed.on_every_rank(make))
    if distributed.world_size() == 1:
        return own
    pieces: list[list[dict[str, Tensor]]] = []  # one list per round: a piece from each rank
    for start in range(0, longest, PIECE):
        # cloned, because sending a slice sends all the memory of its tensor
        piece = {name: rows[start : start + PIECE].clone() for name, rows in own.items()}
        received = distributed.gather(piece)
        if distributed.is_main():
            pieces.append(received)
    by_rank = [piece for rank in zip(*pieces, strict=True) for piece in rank]
    names = dict.fromkeys(name for piece in by_rank for name in piece)
    return {name: torch.cat([piece[name] for piece in by_rank if name in piece]) for name in names}
