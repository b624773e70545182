"""Tokens, and other integers in arrays, as callers give them (torch, NumPy, lists), as int64 tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.errors import DigitError, MismatchError
from digit.runtime.scalars import shown

Integers = Tensor | np.ndarray | Sequence[Any]
"""Of any integer type: a tensor, an array, or nested lists."""


def as_tokens(tokens: Integers, *, vocab_size: int | None, owner: str, num_tokens: int | None = None) -> Tensor:
    """Tokens (B, N) as int64; an int64 tensor is returned as it is.

    Args:
        tokens: a row for each image, of any integer type.
        vocab_size: they lie in 0..vocab_size-1; None allows any.
        owner: whose tokens they must be, for errors: "the VQGAN".
        num_tokens: N; None allows any.

    Raises DigitError for anything but integers, MismatchError for another shape or range.
    """
    wanted = "N" if num_tokens is None else num_tokens
    tokens = as_integers("tokens", tokens)
    if tokens.ndim != 2 or num_tokens not in (None, tokens.shape[1]):
        shape = tuple(tokens.shape)
        raise MismatchError(f"tokens have shape {shape}, {owner} takes (B, {wanted}): give a row for each image")
    if vocab_size is not None:
        require_range("tokens", tokens, 0, vocab_size - 1, owner)
    return tokens


def require_range(name: str, values: Tensor, low: int, high: int, owner: str) -> None:
    """Raise MismatchError where a value lies outside low..high."""
    if not values.numel():
        return
    least, most = (int(edge) for edge in torch.aminmax(values))
    if least < low or most > high:
        raise MismatchError(
            f"{name} run from {least} to {most}, {owner} knows {low} to {high}: they are of another model"
        )


def by_cell(tokens: Tensor, levels: int) -> Tensor:
    """Tokens (..., N L) of a codebook of L levels, with those of each cell as the last dimension: (..., N, L).

    Raises MismatchError for another number of them.
    """
    if not tokens.ndim or tokens.shape[-1] % levels:
        shape = tuple(tokens.shape)
        raise MismatchError(f"tokens have shape {shape}, each cell has {levels}: give a multiple of that")
    return tokens.unflatten(-1, (-1, levels))


def as_integers(name: str, values: Integers) -> Tensor:
    """Integers of any type and shape as int64. Raises DigitError for floats, booleans, text and ragged lists."""
    if isinstance(values, list | tuple) and values and all(isinstance(value, Tensor) for value in values):
        values = _stacked(name, values)
    if not isinstance(values, Tensor):
        values = _from_array(name, values)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        kind = str(values.dtype).removeprefix("torch.")
        raise DigitError(f"{name} are {kind}: give integers, such as int64")
    return values.long()


def _stacked(name: str, rows: Sequence[Tensor]) -> Tensor:
    try:
        return torch.stack(list(rows))
    except (RuntimeError, TypeError) as error:
        raise DigitError(f"{name} are tensors of different shapes, types or devices: give one tensor") from error


def _from_array(name: str, values: Any) -> Tensor:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "iufb" or (array.dtype == np.uint64 and array.size and array.max() >= 2**63):
            raise TypeError
    except (ValueError, TypeError, RuntimeError) as error:
        raise DigitError(f"{name} are {shown(values)}: give integers, in rows of one length") from error
    if not array.size and array.dtype.kind == "f":  # NumPy's type of an empty list
        array = array.astype(np.int64)
    kind = np.dtype({"f": np.float64, "b": np.bool_}.get(array.dtype.kind, np.int64))
    return torch.from_numpy(np.array(array, dtype=kind, order="C"))
