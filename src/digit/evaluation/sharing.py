"""Measurements on several ranks: each makes its part, rank 0 gets the whole in order, and an error is everybody's."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from digit.errors import DigitError
from digit.runtime import distributed

T = TypeVar("T")
PIECE = 1000  # rows that all ranks send at a time


def together(work: Callable[[], T]) -> list[T]:
    """What `work` gives on each rank, in their order. The first rank's DigitError is raised on all of them."""
    if distributed.world_size() == 1:
        return [work()]
    outcome: tuple[T | None, DigitError | None]
    try:
        outcome = work(), None
    except DigitError as error:
        outcome = None, error
    found = distributed.gather(outcome)
    for _, problem in found:
        if problem is not None:
            raise problem
    return [made for made, _ in found]


def rows_to_main(work: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors (n, ...) that `work` makes on each rank, any n, stacked in the order of the ranks; {} beside rank 0."""
    own: dict[str, Tensor] = {}

    def make() -> int:
        own.update(work())
        return max(map(len, own.values()), default=0)

    longest = max(together(make))
    if distributed.world_size() == 1:
        return own
    pieces: list[list[dict[str, Tensor]]] = []  # rounds of a piece from each rank
    for start in range(0, longest, PIECE):
        # copies: a slice would be sent with all the memory that it is a part of
        piece = {name: rows[start : start + PIECE].clone() for name, rows in own.items()}
        received = distributed.gather(piece)
        if distributed.is_main():
            pieces.append(received)
    by_rank = [piece for rank in zip(*pieces, strict=True) for piece in rank]
    names = dict.fromkeys(name for piece in by_rank for name in piece)
    return {name: torch.cat([piece[name] for piece in by_rank if name in piece]) for name in names}
