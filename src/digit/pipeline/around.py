"""Which tokens and pixels of a picture are kept, sampling around them, and pasting without a visible seam.

A next-token model samples in raster order. Where a token is kept it is forced, and sampling goes on after it. It
therefore sees what is kept before a hole, and not what is kept after it. A masked model sees all of it.

Shapes: B pictures, M tokens of a grid, S pixels a side.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from digit.errors import DigitError
from digit.pipeline.steps import OnStep, watched
from digit.runtime.names import did_you_mean
from digit.runtime.scalars import as_number
from digit.sampling.sampler import Sampler

Grid = tuple[int, int]
Keep = float | np.number | str | Tensor | np.ndarray | Sequence[Any]
"""A fraction of the rows, from the top; the name of an area (AREAS); or a mask of cells (a token grid's shape) or of
pixels (S, S), true: kept."""
AREAS = {  # (top, bottom, left, right) of what is kept, in quarters of the picture
    "upper": (0, 2, 0, 4),
    "lower": (2, 4, 0, 4),
    "left": (0, 4, 0, 2),
    "right": (0, 4, 2, 4),
    "centre": (1, 3, 1, 3),
    "border": (1, 3, 1, 3),  # all but this
}
Pixels = Literal["kept", "pasted", "decoded"]
"""kept: the picture's own pixels where it is kept, the rest shifted so that no seam shows; pasted: the same without a
shift; decoded: all pixels as the tokens give them, as in the paper."""


def check_pixels(pixels: str) -> None:
    """Raise DigitError for an unknown choice of pixels."""
    if pixels not in get_args(Pixels):
        names = get_args(Pixels)
        raise DigitError(f"pixels is {pixels!r}{did_you_mean(str(pixels), names)}: choose {', '.join(names)}")


# -------------------------------------------------------------------- what is kept


def as_keep(keep: Keep, grids: Sequence[Grid], size: int) -> float | Tensor:
    """A fraction in (0, 1], or a bool mask whose shape is that of a grid or (size, size). Raises DigitError."""
    if isinstance(keep, str):
        return area(keep, size)
    if isinstance(keep, Tensor | np.ndarray | list | tuple):
        try:
            mask = torch.as_tensor(np.asarray(keep.cpu() if isinstance(keep, Tensor) else keep))
        except (TypeError, ValueError) as error:
            raise DigitError(f"keep is no mask ({error}): give rows of true and false, all of one length") from error
        if mask.ndim:
            return _checked_mask(mask, grids, size)
        keep = mask.item()
    if not 0 < (fraction := as_number("keep", keep)) <= 1:
        raise DigitError(f"keep is {keep}: it is a fraction of the rows, above 0 and at most 1, or a mask")
    return fraction


def area(name: str, size: int) -> Bool[Tensor, "S S"]:
    """The pixels of a named area. Raises DigitError for another name."""
    if name not in AREAS:
        raise DigitError(f"keep is {name!r}{did_you_mean(name, list(AREAS))}: choose {', '.join(AREAS)}, or a fraction")
    top, bottom, left, right = (round(quarters * size / 4) for quarters in AREAS[name])
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return ~mask if name == "border" else mask


def _checked_mask(mask: Tensor, grids: Sequence[Grid], size: int) -> Tensor:
    known = [*dict.fromkeys(grids), (size, size)]
    if tuple(mask.shape) not in known:
        shapes = ", ".join(f"{rows} x {columns}" for rows, columns in known[:-1])
        raise DigitError(
            f"keep has shape {tuple(mask.shape)}: give cells of {shapes}, pixels of {size} x {size}, or a fraction"
        )
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise DigitError(f"keep holds {mask.dtype} values other than 0 and 1: give true and false")
    return mask.bool()


def kept_rows(grid: Grid, keep: float) -> int:
    """Rows that a fraction keeps of a grid: at least one."""
    return max(1, round(keep * grid[0]))


def kept_tokens(grid: Grid, keep: float) -> int:
    """Cells in the kept first rows of a (rows, columns) grid: at least one row."""
    return kept_rows(grid, keep) * grid[1]


def kept_cells(keep: float | Tensor, grid: Grid, size: int) -> Bool[Tensor, "R C"]:
    """Which cells of a grid are kept.

    Of a fraction the first rows; of a mask of cells those whose centre lies in a kept one; of a mask of pixels
    (size, size) those that are kept whole.
    """
    if not isinstance(keep, Tensor):
        return torch.arange(grid[0])[:, None].expand(grid) < kept_rows(grid, keep)
    if tuple(keep.shape) == (size, size) != tuple(grid):
        return F.adaptive_max_pool2d((~keep)[None].float(), grid)[0] == 0
    return spread(keep, grid)


def kept_pixels(keep: float | Tensor, grid: Grid, size: int) -> Bool[Tensor, "S S"]:
    """Which pixels are kept; of a fraction those of the kept rows of `grid`."""
    return spread(keep if isinstance(keep, Tensor) else kept_cells(keep, grid, size), (size, size))


def spread(keep: Bool[Tensor, "R C"], grid: Grid) -> Bool[Tensor, "P Q"]:
    """Cells as those of another grid over the same picture: each takes the cell that holds its centre."""
    rows, columns = (
        ((torch.arange(fine) + 0.5) / fine * coarse).long() for fine, coarse in zip(grid, keep.shape, strict=True)
    )
    return keep[rows][:, columns]


# -------------------------------------------------------------------- sampling around it


def is_whole(tokens: Int64[Tensor, "B M"], keep: Bool[Tensor, "*rows M"] | None, sampler: Sampler) -> bool:
    """Whether every token of a model is given and kept; `keep` as of `sample_around`."""
    return tokens.shape[1] == sampler.model.cfg.target_len if keep is None else bool(keep.all())


def sample_around(
    sampler: Sampler,
    seeds: Sequence[int],
    tokens: Int64[Tensor, "B L"],
    keep: Bool[Tensor, "*rows L"] | None = None,
    *,
    prefix: Int64[Tensor, "B P"] | None = None,
    labels: Int64[Tensor, " B"] | None = None,
    on_step: OnStep | None = None,
) -> Int64[Tensor, "B M"]:
    """Tokens (B, M) that are the given ones where `keep` is true and sampled elsewhere.

    `keep` (L,) is one for all, of L = M tokens; None keeps all of the first L tokens, which are given.
    """
    keep = None if keep is None else keep.cpu()  # which calls are made is decided here: a mask on a GPU would wait
    if is_whole(tokens, keep, sampler):
        return tokens.clone()

    def call(given: Tensor, rows: Sequence[int] = range(len(seeds))) -> Tensor:
        own = [seeds[row] for row in rows]
        conditions: dict[str, Any] = {
            name: x if x is None else x[list(rows)] for name, x in (("prefix", prefix), ("labels", labels))
        }
        with watched(sampler, sampler.stage, len(own), given, on_step):
            return sampler(own, given=given, **conditions)

    if keep is None:
        return call(tokens)
    keep = keep.expand_as(tokens)
    if sampler.model.cfg.masked:
        return call(torch.where(keep.to(tokens.device), tokens, sampler.model.cfg.mask_token))
    first = int(keep.all(0).int().cumprod(0).sum())  # tokens that every picture keeps, from the first on
    if not keep[:, first:].any():
        return call(tokens[:, :first])
    if not sampler.records:
        with forced(sampler, tokens, keep, first):
            return call(tokens[:, :first])
    result = tokens.clone()  # recorded steps run without Python: one call a hole, and only for pictures of one mask
    for mask in keep.unique(dim=0):
        rows = (keep == mask).all(1).nonzero()[:, 0].tolist()
        for start, end in holes(mask):
            result[rows, start:end] = call(result[rows, :start], rows)[:, start:end]
    return result


def holes(keep: Bool[Tensor, " M"]) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of tokens that are not kept."""
    edges = torch.diff(F.pad((~keep).int(), (1, 1))).nonzero()[:, 0].tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)


@contextmanager
def forced(sampler: Sampler, tokens: Int64[Tensor, "B M"], keep: Bool[Tensor, "B M"], first: int) -> Iterator[None]:
    """A context in which one call of a next-token `sampler`, given the first `first` tokens, takes the kept ones."""
    pick = sampler.pick
    sampler.pick = _Forced(sampler, tokens, keep, first)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sampler.pick = pick


class _Forced:
    """Stands in for `sampler.pick` during one call: the sampled token of each step, or the kept one.

    Micro-batches run one after the other; the rows past the last picture only pad, and take its tokens.
    """

    def __init__(self, sampler: Sampler, tokens: Tensor, keep: Tensor, first: int) -> None:
        self.pick, self.size, device = sampler.pick, sampler.micro_batch_size, sampler.model.device
        self.tokens, self.keep = tokens.to(device), keep.to(device)
        self.first = self.position = first
        self.row = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        sampled = self.pick(*args, **kwargs)
        last = len(self.tokens) - 1
        rows = [min(i, last) for i in range(self.row, self.row + len(sampled))]
        kept = torch.where(self.keep[rows, self.position], self.tokens[rows, self.position], sampled)
        self.position += 1
        if self.position == self.tokens.shape[1]:
            self.position, self.row = self.first, self.row + self.size
        return kept


# -------------------------------------------------------------------- pixels


def compose(
    own: UInt8[Tensor, "B 3 S S"],
    decoded: UInt8[Tensor, "B 3 S S"],
    keep: Bool[Tensor, "S S"],
    pixels: Pixels,
    reach: float,
) -> UInt8[Tensor, "B 3 S S"]:
    """The pictures that a person gets: see `Pixels`. `reach` is in pixels, as of `seam_shift`."""
    check_pixels(pixels)
    if pixels == "decoded":
        return decoded
    own, keep = own.to(decoded.device), keep.to(decoded.device)
    if pixels == "pasted" or keep.all() or not keep.any():
        return torch.where(keep, own, decoded)
    shift = seam_shift(own.float() - decoded.float(), keep, reach)
    blended = (decoded.float() + shift).round().clamp(0, 255).to(torch.uint8)
    return torch.where(keep, own, blended)


def seam_shift(
    difference: Float32[Tensor, "B 3 H W"], keep: Bool[Tensor, "H W"], reach: float
) -> Float32[Tensor, "B 3 H W"]:
    """c with Laplace(c) = c / reach² where not kept, c = difference where kept: what hides the seam when it is added.

    Seamless cloning (Pérez et al. 2003, Eq. 4) solves the equation with 0 on its right side. The further term (the
    screened Poisson equation, Bhat et al. 2008) makes the shift fall by e every `reach` pixels, so that the colours of
    what was sampled stay. Neighbours are the four nearest pixels; the picture's own edges reflect.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.linalg import splu

    num, channels, height, width = difference.shape
    hidden = (~keep).cpu().numpy()
    place = np.full(height * width, -1)
    place[hidden.ravel()] = np.arange(hidden.sum())
    index = np.arange(height * width).reshape(height, width)
    across = [(index[:, :-1], index[:, 1:]), (index[:-1], index[1:])]
    pairs = np.concatenate([np.stack([a.ravel(), b.ravel()], 1) for a, b in across])
    pairs = np.concatenate([pairs, pairs[:, ::-1]])  # (E, 2): a pixel and its neighbour, both ways
    pairs = pairs[place[pairs[:, 0]] >= 0]
    rows, inside = place[pairs[:, 0]], place[pairs[:, 1]] >= 0
    count = int(hidden.sum())
    diagonal = np.bincount(rows, minlength=count) + 1 / reach**2
    every = np.arange(count)
    entries = np.concatenate([diagonal, np.full(inside.sum(), -1.0)])
    matrix = coo_array(
        (entries, (np.concatenate([every, rows[inside]]), np.concatenate([every, place[pairs[inside, 1]]]))),
        shape=(count, count),
    )
    flat = difference.detach().cpu().double().reshape(num * channels, -1).numpy().T  # (S S, B 3)
    right = np.zeros((count, num * channels))
    np.add.at(right, rows[~inside], flat[pairs[~inside, 1]])
    solved = flat.copy()
    solved[hidden.ravel()] = splu(matrix.tocsc()).solve(right)
    return torch.from_numpy(solved.T.reshape(num, channels, height, width)).float().to(difference.device)
