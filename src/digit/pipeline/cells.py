"""Completes a picture around any kept cells of its token grid, not only below its first rows (paper, section 4.5).

A next-token model samples in raster order. Where a token is kept it is forced, and sampling goes on after it: the same
tokens as if each step had asked whether its token is kept. It therefore sees what is kept before a hole, and not what
is kept after it. A masked model sees all of it.

Shapes: B proposals, N discriminative tokens, M VQ tokens, S pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from digit.data.pictures import Images
from digit.data.preprocess import fit_batch
from digit.errors import DigitError
from digit.models.tokenizer import ImageTokenizer, first_level_vectors, levels_of
from digit.pipeline.batch_size import micro_batch_size
from digit.pipeline.labels import Labels
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.steps import OnStep, watched
from digit.sampling.kinds import make_sampler
from digit.sampling.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Filled:
    """Proposals for one picture."""

    images: UInt8[Tensor, "B 3 S S"]
    """As decoded from the tokens."""
    pasted: UInt8[Tensor, "B 3 S S"]
    """The same with the picture's own pixels in the kept cells."""
    vq: Int64[Tensor, "B M"] | None
    """VQ tokens; those of kept cells are the picture's. None where the renderer gives pixels."""
    discriminative: Int64[Tensor, "B N"] | None
    """Discriminative tokens; None in a VQ-only pipeline."""
    label: int
    """The class that was used, -1 for none."""


def cell_grid(pipe: DigitPipeline) -> tuple[int, int]:
    """(rows, columns) of the cells that can be kept: the discriminative tokens', else the VQ tokens'."""
    if pipe.tokenizer is not None and pipe.prior is not None:
        return pipe.tokenizer.grid
    pipe.require("vq")
    assert pipe.vq is not None
    return pipe.vq.grid


def token_grid(tokenizer: ImageTokenizer) -> tuple[int, int]:
    """(rows, columns) of a picture's tokens as they are shown: of several levels, the codes of a cell side by side."""
    rows, columns = tokenizer.grid
    return rows, columns * levels_of(tokenizer)


def code_vectors(tokenizer: ImageTokenizer) -> Float[Tensor, "K D"]:
    """The vector of each code, of several levels of each code of the first."""
    return first_level_vectors(tokenizer)


@torch.no_grad()
def fill_cells(
    pipe: DigitPipeline,
    image: Images,
    keep: Bool[Tensor, "R C"],
    *,
    num: int = 4,
    seed: int = 0,
    label: Labels | None = None,
    on_step: OnStep | None = None,
    **sampling: Any,
) -> Filled:
    """Keep some cells of one picture and sample the others, `num` times; proposal i depends on seed + i alone.

    Args:
        image: one picture, resized to the short side and centre-cropped where its size differs.
        keep: which cells of `cell_grid` are kept. A cell of the finer VQ grid is kept where its centre is.
        label: its class; None takes the class under which its tokens are most likely.
        on_step, sampling: as in `DigitPipeline.stream`.

    Raises DigitError for several pictures, a grid of another shape, and as `DigitPipeline.stream` does.

    Note: as in `DigitPipeline.complete`, the kept tokens are computed from the whole picture.
    """
    images = fit_batch(image, pipe.image_size, pipe.preprocess.fit)
    grid = cell_grid(pipe)
    if len(images) != 1 or tuple(keep.shape) != grid:
        raise DigitError(f"{len(images)} pictures and cells {tuple(keep.shape)}: give one picture and cells {grid}")
    labels = pipe.guess_labels(images) if label is None else torch.tensor(pipe.class_positions(label))
    if len(labels) != 1:
        raise DigitError(f"{len(labels)} labels for one picture: give one")
    seeds, cfg = [seed + i for i in range(num)], pipe.sized(pipe.settings(**sampling))
    assert cfg.batch_size is not None and pipe.renderer is not None
    stages = [("prior", pipe.prior, "discriminative")] if pipe.renderer.cfg.prefix_len else []
    prefix, decoded, known = None, None, {}
    for name, model, kind in [*stages, ("renderer", pipe.renderer, "vq")]:
        assert model is not None, "checked by guess_labels and class_positions"
        size = micro_batch_size(model, cfg.batch_size)
        sampler = make_sampler(model, getattr(cfg, name), precision=cfg.precision, micro_batch_size=size, stage=name)
        rows = labels.expand(num) if model.cfg.num_classes else None
        if sampler.output == "images":
            decoded = sampler(seeds, prefix=prefix, labels=rows).cpu()
            continue
        tokenizer = pipe.tokenizers[kind]
        own = tokenizer.encode(images).to(pipe.device).expand(num, -1)
        kept = spread(keep, tokenizer.grid).flatten().repeat_interleave(levels_of(tokenizer))
        prefix = known[kind] = sample_around(sampler, seeds, own, kept, prefix=prefix, labels=rows, on_step=on_step)
    if decoded is None:
        decoded = pipe.decode(known["vq"], cfg.precision).cpu()
    pixels = spread(keep, (pipe.image_size, pipe.image_size))
    return Filled(
        images=decoded,
        pasted=torch.where(pixels, images.cpu(), decoded),
        vq=known["vq"].cpu() if "vq" in known else None,
        discriminative=known["discriminative"].cpu() if "discriminative" in known else None,
        label=int(labels[0]),
    )


def spread(keep: Bool[Tensor, "R C"], grid: tuple[int, int]) -> Bool[Tensor, "P Q"]:
    """Cells as those of another grid over the same picture: each takes the cell that holds its centre."""
    rows, columns = (
        ((torch.arange(fine) + 0.5) / fine * coarse).long() for fine, coarse in zip(grid, keep.shape, strict=True)
    )
    return keep[rows][:, columns]


def sample_around(
    sampler: Sampler,
    seeds: Sequence[int],
    tokens: Int64[Tensor, "B M"],
    keep: Bool[Tensor, " M"],
    *,
    prefix: Int64[Tensor, "B P"] | None = None,
    labels: Int64[Tensor, " B"] | None = None,
    on_step: OnStep | None = None,
) -> Int64[Tensor, "B M"]:
    """Tokens (B, M) that are the given ones where `keep` is true and sampled elsewhere."""
    cfg, result, position = sampler.model.cfg, tokens.clone(), 0
    keep = keep.to(tokens.device)

    def call(given: Tensor) -> Tensor:
        with watched(sampler, sampler.stage, len(seeds), given, on_step):
            return sampler(seeds, prefix=prefix, labels=labels, given=given)

    if cfg.masked:
        return call(torch.where(keep, tokens, cfg.mask_token))
    while len(holes := (~keep[position:]).nonzero()):
        first = position + int(holes[0])
        kept_again = keep[first:].nonzero()
        position = first + int(kept_again[0]) if len(kept_again) else len(keep)
        result[:, first:position] = call(result[:, :first])[:, first:position]
    return result
