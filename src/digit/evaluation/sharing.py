"""Evaluation on several ranks: each computes a part, rank 0 receives all in order, and errors reach every rank."""

from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor

from digit.errors import DigitError
from digit.runtime import distributed

T = TypeVar("T")
PIECE = 1000  # rows that each rank sends at a time


def together(work: Callable[[], T]) -> list[T]:
    """Results of `work` on every rank, in rank order. A DigitError is raised on all ranks, the lowest rank's first."""
    if distributed.world_size() == 1:
        return [work()]
    outcome: tuple[T | None, DigitError | None]
    try:
        outcome = work(), None
    except DigitError as error:
        outcome = None, error
    outcomes = distributed.gather(outcome)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [cast(T, result) for result, _ in outcomes]


def rows_to_main(work: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate tensors (n, ...) that `work` makes on each rank, any n, in rank order; {} on ranks other than 0."""
    own: dict[str, Tensor] = {}

    def make() -> int:
        own.update(work())
        return max(map(len, own.values()), default=0)

    longest = max(together(make))
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
