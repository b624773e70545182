"""Squared Euclidean distances between all pairs of features, in float32 blocks with an error bound.

A block of products in float32 is several times as fast as in float64. Its errors have a certain bound, and what the
bound leaves open is computed again in float64. So every decision (which neighbour is nearest, which point lies within a
radius) is that of float64.

Bound: rows x are centred, scaled by a power of 2 so that no entry exceeds 1, and rounded to float32. With u = 2^-24,
a = ||x|| and g = D u / (1 - D u), a product of two rows, in any order of summation, has an error of at most g a_i a_j
(Higham 2002, section 3.1), and ||x_i||² + ||x_j||² - 2 x_i.x_j one of at most (g / 2 + 8 u) (a_i + a_j)² + D 2^-120,
rounding of the rows included. As (a_i + a_j)² is at most 2 a_i² + 2 a_j², the bound is a sum e_i + e_j, and blocks of
lower bounds come out of the product by adding ||x_i||² - e_i to the rows and ||x_j||² - e_j to the columns. NumPy
multiplies: torch rounds float32 products to bfloat16 or TF32 where a process allows it.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, Real
from torch import Tensor

SIZE = 2048  # rows and columns of a block of pairs
SPARE = 5  # candidates kept beside the k nearest
AT_ONCE = 2**22  # float64 values in memory at a time
UNIT = 2.0**-24
Squares = Float64[np.ndarray, "N K"]
Rows = Int64[np.ndarray, "N K"]


class _Points:
    """Features (N, D), centred, scaled and rounded to float32, with the squares of their norms and error bounds."""

    def __init__(self, features: Tensor, centre: np.ndarray, scale: float):
        dim = features.shape[1]
        self.rows = np.empty(tuple(features.shape), np.float32)
        squares = np.empty(len(features))  # (N,)
        for start in range(0, len(features), SIZE):
            part = slice(start, start + SIZE)
            self.rows[part] = (features[part].double().numpy() - centre) * scale
            squares[part] = np.square(self.rows[part], dtype=np.float64).sum(1)
        self.errors = (2 * _slope(dim, UNIT) * squares + dim * 2.0**-120) * (1 + 8 * UNIT)
        self.lower = (squares - self.errors).astype(np.float32)


@dataclass(frozen=True)
class Block:
    """Lower bounds of scaled squared distances between points of x and of y.

    The error of a pair is the sum of those of its row and its column: a distance lies in lower .. lower + 2 error.
    """

    rows: slice
    columns: slice
    lower: Float32[np.ndarray, "R C"]
    row_errors: Float64[np.ndarray, " R"]
    column_errors: Float64[np.ndarray, " C"]

    @property
    def errors(self) -> Float64[np.ndarray, "R C"]:
        """The largest error of `values`."""
        return self.row_errors[:, None] + self.column_errors

    @property
    def values(self) -> Float64[np.ndarray, "R C"]:
        """Scaled squared distances, as the products in float32 give them."""
        return self.lower + self.errors


class Pairs:
    """All pairs of x (N, D) with y (M, D), or of x with itself; scaled squares are scale² times the distances'."""

    def __init__(self, x: Real[Tensor, "N D"], y: Real[Tensor, "M D"] | None = None):
        self.x, self.y, self.within = x, x if y is None else y, y is None
        centre = torch.stack([part.double().sum(0) for part in self.y.split(SIZE)]).sum(0) / len(self.y)
        largest = max(float(values.abs().max()) for values in (self.x, self.y))
        self.scale = 2.0 ** -(np.ceil(np.log2(largest)) + 1) if largest else 1.0
        self._x = _Points(self.x, centre.numpy(), self.scale)
        self._y = self._x if self.within else _Points(self.y, centre.numpy(), self.scale)
        self._centre = centre

    def sweep(self, *consumers: Callable[[Block], None]) -> None:
        """Give each block to every consumer, so that one product serves all of them; its arrays are used again.

        Of x with itself these are the blocks on and above the diagonal; their transposes are the rest.
        """
        for block in self._blocks():
            for consumer in consumers:
                consumer(block)

    def _blocks(self) -> Iterator[Block]:
        space = np.empty(min(SIZE, len(self.x)) * min(SIZE, len(self.y)), np.float32)
        for start in range(0, len(self.x), SIZE):
            rows = slice(start, min(start + SIZE, len(self.x)))
            x = -2 * self._x.rows[rows]
            for first in range(start if self.within else 0, len(self.y), SIZE):
                columns = slice(first, min(first + SIZE, len(self.y)))
                y = self._y.rows[columns]
                lower = np.matmul(x, y.T, out=space[: len(x) * len(y)].reshape(len(x), len(y)))
                lower += self._x.lower[rows, None]
                lower += self._y.lower[columns]
                yield Block(rows, columns, lower, self._x.errors[rows], self._y.errors[columns])

    def errors(self, i: Int64[np.ndarray, "*P"], j: Int64[np.ndarray, "*P"]) -> Float64[np.ndarray, "*P"]:
        """Largest error of the scaled squares of the pairs x_i, y_j."""
        return self._x.errors[i] + self._y.errors[j]

    def exact(self, i: Int64[np.ndarray, " P"], j: Int64[np.ndarray, " P"]) -> Float64[np.ndarray, " P"]:
        """sum_d (x_id - y_jd)² (P,) in float64, not scaled; 0 for equal points."""
        squares = np.zeros(len(i))
        differ = np.flatnonzero(self._numbers[0][i] != self._numbers[1][j])
        at_once = max(1, AT_ONCE // self.x.shape[1])
        for start in range(0, len(differ), at_once):
            part = differ[start : start + at_once]
            x, y = self.x[torch.from_numpy(i[part])], self.y[torch.from_numpy(j[part])]
            squares[part] = (x.double() - y.double()).square_().sum(1).numpy()
        return squares

    @cached_property
    def _numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """A number for each row of x (N,) and of y (M,); rows with one number are equal.

        Sets with many repeated images leave all those pairs open, and each would take D operations.
        """
        numbers: dict[bytes, int] = {}
        sides = []
        for values in (self.x,) if self.within else (self.x, self.y):
            keys = (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in values.contiguous().numpy())
            sides.append(np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64))
        return sides[0], sides[-1]

    def candidates(self, rows: Int64[np.ndarray, " R"], k: int) -> Iterator[tuple[int, Int64[np.ndarray, " C"]]]:
        """For each of some rows of x, all y that may be among its k nearest, by products in float64."""
        slope = _slope(self.x.shape[1], 2.0**-53)
        for chosen in np.array_split(rows, 1 + len(rows) * len(self.y) // AT_ONCE):
            x = self.x[torch.from_numpy(chosen)].double() - self._centre
            squares, errors = [], []
            for part in self.y.split(SIZE):
                y = part.double() - self._centre
                of_x, of_y = x.square().sum(1, keepdim=True), y.square().sum(1)
                squares.append(of_x + of_y - 2 * x @ y.T)
                errors.append((of_x.sqrt() + of_y.sqrt()).square() * slope)
            values, bound = torch.cat(squares, 1), torch.cat(errors, 1)  # (R, M)
            if self.within:
                values[torch.arange(len(chosen)), torch.from_numpy(chosen)] = torch.inf
            upper = (values + bound).kthvalue(k, dim=1, keepdim=True).values
            for row, candidate in zip(chosen, (values - bound <= upper).numpy(), strict=True):
                yield int(row), np.flatnonzero(candidate)


def _slope(dim: int, unit: float) -> float:
    growth = dim * unit / (1 - dim * unit)
    return growth / 2 + 8 * unit


class Nearest:
    """The k nearest y of each x, from blocks of `Pairs`; of x with itself the k nearest others. Needs k of them.

    Candidates are those with the smallest lower bounds (value - error). All are found where the last candidate's lower
    bound exceeds the k-th smallest upper bound; other rows are searched in float64.
    """

    def __init__(self, pairs: Pairs, k: int):
        self._pairs, self._k = pairs, k
        self._num = len(pairs.y) - pairs.within
        count = min(k + SPARE, self._num)
        self._lower = torch.full((len(pairs.x), count), torch.inf)
        self._columns = torch.zeros(len(pairs.x), count, dtype=torch.int64)

    def add(self, block: Block) -> None:
        """Take one block."""
        lower = torch.from_numpy(block.lower)
        if self._pairs.within and block.rows == block.columns:
            lower = lower.clone().fill_diagonal_(torch.inf)
        elif self._pairs.within:
            self._update(block.columns, lower.T.contiguous(), block.rows.start)
        self._update(block.rows, lower, block.columns.start)

    def _update(self, rows: slice, lower: Tensor, first: int) -> None:
        better = (lower.amin(1) < self._lower[rows, -1]).nonzero()[:, 0]
        if not len(better):
            return
        count, rows_of_all = self._lower.shape[1], better + rows.start
        best, columns = lower[better].topk(min(count, lower.shape[1]), dim=1, largest=False)
        best = torch.cat([self._lower[rows_of_all], best], 1)
        columns = torch.cat([self._columns[rows_of_all], columns + first], 1)
        self._lower[rows_of_all], kept = best.topk(count, dim=1, largest=False)
        self._columns[rows_of_all] = columns.gather(1, kept)

    def result(self) -> tuple[Squares, Rows]:
        """Squared distances (N, k) float64 in increasing order, and the rows (N, k) of y."""
        pairs, k = self._pairs, self._k
        lower, columns = self._lower.numpy(), self._columns.numpy()
        i = np.broadcast_to(np.arange(len(columns))[:, None], columns.shape)
        upper = np.partition(lower + 2 * pairs.errors(i, columns), k - 1, axis=1)[:, k - 1 : k]
        possible = lower <= upper
        squares = np.full(columns.shape, np.inf)
        squares[possible] = pairs.exact(i[possible], columns[possible])
        order = np.argsort(squares, axis=1, kind="stable")[:, :k]
        found, which = np.take_along_axis(squares, order, 1), np.take_along_axis(columns, order, 1)
        if lower.shape[1] < self._num:
            open_rows = np.flatnonzero(possible[:, -1])
            for row, candidates in pairs.candidates(open_rows, k):
                squares = pairs.exact(np.full(len(candidates), row), candidates)
                order = np.argsort(squares, kind="stable")[:k]
                found[row], which[row] = squares[order], candidates[order]
        return found, which


def within(
    pairs: Pairs, block: Block, squares: Float64[np.ndarray, " S"], *, of_rows: bool = False
) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]]:
    """Rows and columns of the block (P,) whose squared distance is at most `squares` (M,) of their y.

    of_rows: `squares` (N,) is of x instead.
    """
    limits = squares[block.rows if of_rows else block.columns] * pairs.scale**2
    bound = (limits * (1 + 4 * UNIT)).astype(np.float32)  # at most 5 u above the limit, never below
    flat = np.flatnonzero(block.lower <= (bound[:, None] if of_rows else bound))
    i, j = np.divmod(flat, block.lower.shape[1])
    upper = block.lower.reshape(-1)[flat] + 2 * (block.row_errors[i] + block.column_errors[j])
    inside = upper <= limits[i if of_rows else j] * (1 - 4 * UNIT)
    unsure = np.flatnonzero(~inside)
    rows, columns = i[unsure] + block.rows.start, j[unsure] + block.columns.start
    inside[unsure] = pairs.exact(rows, columns) <= squares[rows if of_rows else columns]
    return i[inside], j[inside]


def nearest_others(x: Real[Tensor, "N D"], k: int) -> tuple[Squares, Rows]:
    """Squared distances (N, k) of each point to its k nearest others in increasing order, and which these are."""
    pairs = Pairs(x)
    nearest = Nearest(pairs, k)
    pairs.sweep(nearest.add)
    return nearest.result()
