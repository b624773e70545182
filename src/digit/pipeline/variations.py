"""Pictures that are like given ones: some tokens are kept and the others sampled again; and pictures between two.

Discriminative tokens say what is where, VQ tokens what it looks like. Pixels come from the VQ tokens alone: where all
of them are kept, nothing varies. A renderer straight to pixels draws equal discriminative tokens equally, unless it
takes noise: there a part of them is sampled again.

Shapes: B pictures, N discriminative tokens, D features, S pixels a side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from torch import Tensor

from digit.data.pictures import Images
from digit.data.preprocess import fit_batch
from digit.errors import DigitError
from digit.models.pixels import PixelRenderer
from digit.models.tokenizer import levels_of
from digit.pipeline.around import Grid, spread
from digit.pipeline.batch import SampleBatch
from digit.pipeline.generation import GenerationRequest
from digit.pipeline.labels import Labels
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.steps import OnStep
from digit.runtime.scalars import as_int, as_number
from digit.sampling.filters import image_uniforms

KEPT_BY_PIXELS = 0.5  # of the discriminative tokens, where equal ones give equal pictures


def draws_equally(pipe: DigitPipeline) -> bool:
    """Whether equal discriminative tokens give equal pictures: with a renderer straight to pixels without noise."""
    return isinstance(pipe.renderer, PixelRenderer) and not pipe.renderer.cfg.noise_channels


def usual_share(pipe: DigitPipeline) -> float:
    """Share of the discriminative tokens that a variation keeps if nobody says: 1, or KEPT_BY_PIXELS where the renderer
    draws equal tokens equally."""
    return KEPT_BY_PIXELS if draws_equally(pipe) else 1.0


def vary(pipe: DigitPipeline, images: Images, **how: Any) -> UInt8[Tensor, "B 3 S S"]:
    """`num` variations of each picture, one picture's after the other's: (B num, 3, S, S) uint8. Takes what `varied`
    takes, and raises what it raises."""
    none = torch.empty(0, 3, *[pipe.image_size] * 2, dtype=torch.uint8)
    return torch.cat([none, *(batch.images for batch in varied(pipe, images, **how))])


@torch.no_grad()
def varied(
    pipe: DigitPipeline,
    images: Images,
    *,
    num: int = 4,
    seed: int = 0,
    labels: Labels | None = None,
    keep_discriminative: float | None = None,
    keep_vq: float = 0.0,
    on_step: OnStep | None = None,
    **sampling: Any,
) -> Iterator[SampleBatch]:
    """Variations as `vary` returns them, in batches with their tokens.

    The defaults keep what is where (all discriminative tokens) and sample what it looks like. The reverse is
    `keep_discriminative=0, keep_vq=0.5`: half of the looks stay, and the prior says anew what is there.

    Args:
        images: pictures of any sizes, as `DigitPipeline.complete` takes them.
        num, seed: variation j of picture i depends on seed + i num + j alone.
        labels: one for all pictures or one for each; None takes the class under which a picture's tokens are most
            likely. Not used where all discriminative tokens are kept and the renderer sees no labels.
        keep_discriminative, keep_vq: share of the tokens of each kind that is kept, 0 to 1, in cells that are chosen
            at random for each variation. One order of cells serves both kinds, so that equal shares keep equal places.
            keep_discriminative None is `usual_share`.
        on_step: called with the stage and its unfinished tokens, as in `DigitPipeline.sample_request`.
        sampling: as in `DigitPipeline.stream`.

    Raises DigitError where nothing would vary: all VQ tokens kept, or a renderer straight to pixels without noise and
    all discriminative tokens kept; and where a kind of tokens is missing.
    """
    keep_discriminative = usual_share(pipe) if keep_discriminative is None else keep_discriminative
    shares = {"discriminative": keep_discriminative, "vq": keep_vq}
    for kind, share in shares.items():
        if not 0 <= as_number(f"keep_{kind}", share) <= 1:
            raise DigitError(f"keep_{kind} is {share}: it is a share of the tokens, from 0 to 1")
    _require_variation(pipe, shares)
    images, num = fit_batch(images, pipe.image_size, pipe.preprocess.fit), as_int("num", num, least=1)
    whole = keep_discriminative == 1 and pipe.renderer is not None and pipe.renderer.cfg.prefix_len > 0
    if whole and labels is None and not (pipe.renderer_sees_labels and pipe.prior is not None):
        classes = torch.full((len(images),), -1)
    else:
        classes = pipe.guess_labels(images) if labels is None else pipe.labels_of_each(images, labels)
    request = GenerationRequest(seed=seed, labels=classes.repeat_interleave(num))
    rank = cell_ranks(request.seeds, _coarsest(pipe))
    tokens: dict[str, Tensor] = {}
    for kind, tokenizer in pipe.tokenizers.items():
        if kind == "vq" and pipe.renders_pixels:
            continue
        tokens[kind] = tokenizer.encode(images).repeat_interleave(num, 0)
        kept = kept_by_rank(rank, shares[kind], tokenizer.grid)
        tokens[f"keep_{kind}"] = kept.repeat_interleave(levels_of(tokenizer), 1)  # all tokens of a cell
    request = replace(request, **tokens)
    return pipe.sample_request(request, pipe.sized(pipe.settings(**sampling)), on_step=on_step)


def _require_variation(pipe: DigitPipeline, shares: dict[str, float]) -> None:
    """Raise DigitError where a part is missing, or no picture would differ from another."""
    pipe.require("renderer")
    assert pipe.renderer is not None
    if not pipe.renderer.cfg.prefix_len:
        if not shares["vq"]:
            raise DigitError(
                "this pipeline is VQ-only, so no discriminative tokens say what stays: give keep_vq, the share of the "
                "VQ tokens that stays"
            )
    else:
        pipe.require("tokenizer")
    if pipe.renders_pixels:
        if shares["vq"]:
            raise DigitError(
                "keep_vq is given, but this renderer goes straight to pixels, without VQ tokens: leave it out"
            )
        if shares["discriminative"] == 1 and draws_equally(pipe):
            raise DigitError(
                "this renderer gives one picture for the same tokens: give keep_discriminative below 1 (or train with "
                "pixels.noise_channels)"
            )
    if shares["vq"] == 1:
        raise DigitError("keep_vq is 1: pixels come from the VQ tokens alone, so nothing would vary; give less")
    if pipe.renderer.cfg.prefix_len and shares["discriminative"] < 1:
        pipe.require("prior")


def _coarsest(pipe: DigitPipeline) -> Grid:
    return min((tokenizer.grid for tokenizer in pipe.tokenizers.values()), key=lambda grid: grid[0] * grid[1])


def cell_ranks(seeds: Sequence[int], grid: Grid) -> Float64[Tensor, "B R C"]:
    """The place of each cell, from 0 to below 1, in the random order of each seed."""
    u = image_uniforms(seeds, "kept cells", (grid[0] * grid[1],))
    return (u.argsort(1).argsort(1).double() / u.shape[1]).reshape(-1, *grid)


def kept_by_rank(rank: Float64[Tensor, "B R C"], share: float, grid: Grid) -> Bool[Tensor, "B M"]:
    """Which cells of a grid are kept: the first `share` of the order, spread to the grid."""
    kept = rank < share - 1e-9
    return torch.stack([spread(row, grid).flatten() for row in kept]) if len(kept) else kept.flatten(1)


# -------------------------------------------------------------------- between two pictures


@dataclass(frozen=True, kw_only=True)
class Between:
    """Pictures from one to another."""

    images: UInt8[Tensor, "B 3 S S"]
    """Step i is rendered from `tokens[i]`, all with one seed."""
    tokens: Int64[Tensor, "B N"]
    """Discriminative tokens; those of the first picture come first, those of the second last."""
    weights: Float64[Tensor, " B"]
    """Weight of the second picture, from 0 to 1."""


@torch.no_grad()
def interpolate(
    pipe: DigitPipeline,
    first: Images,
    second: Images,
    *,
    steps: int = 7,
    seed: int = 0,
    labels: Labels | None = None,
    **sampling: Any,
) -> Between:
    """Pictures between two, by way of the discriminative features: token_n = code nearest to (1 - w) a_n + w b_n.

    a and b (N, D) are the encoder's features of the two pictures, before quantisation. Their mixtures have codes, since
    the codebook is fitted to features; a mixture of VQ codes decodes to a double exposure, and that of two token
    numbers means nothing, so neither is offered. Cells are mixed where they are: what stands at other places in the two
    pictures fades, and does not move.

    Args:
        first, second: one picture each.
        steps: pictures, both ends included; the ends are renderings of the two pictures' own tokens.
        seed: of every step, so that looks change with the tokens alone.
        labels: one for all steps, for a renderer that sees labels; None gives no class, since that of one end would be
            wrong at the other.

    Raises DigitError without discriminative tokens, for several pictures, for labels that the renderer does not see,
    and as `DigitPipeline.stream` does.
    """
    pipe.require("tokenizer", "renderer")
    assert pipe.tokenizer is not None and pipe.renderer is not None
    if labels is not None and not pipe.renderer_sees_labels:
        raise DigitError("labels are given, but this renderer sees none, and the prior is not asked: leave them out")
    if not pipe.renderer.cfg.prefix_len:
        raise DigitError("this pipeline is VQ-only, and mixtures of VQ tokens are double exposures: nothing is between")
    ends = [fit_batch(picture, pipe.image_size, pipe.preprocess.fit) for picture in (first, second)]
    if any(len(end) != 1 for end in ends):
        raise DigitError(f"{len(ends[0])} and {len(ends[1])} pictures: give one each")
    weights = torch.linspace(0, 1, as_int("steps", steps, least=2), dtype=torch.float64)
    a, b = (pipe.tokenizer.features(end) for end in ends)  # (1, N, D)
    w = weights.to(a)[:, None, None]
    tokens = pipe.tokenizer.quantize((1 - w) * a + w * b)
    classes = torch.full((len(w),), -1) if labels is None else pipe.labels_of_each(tokens, labels)
    request = GenerationRequest(seed=seed, labels=classes, discriminative=tokens, one_seed=True)
    batches = list(pipe.sample_request(request, pipe.sized(pipe.settings(**sampling))))
    return Between(images=torch.cat([batch.images for batch in batches]), tokens=tokens.cpu(), weights=weights)
