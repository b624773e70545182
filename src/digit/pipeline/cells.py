"""Proposals for one picture around any kept cells of its token grid (paper, section 4.5: below its first rows).

Shapes: B proposals, N discriminative tokens, M VQ tokens, S pixels.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from digit.data.pictures import Images
from digit.data.preprocess import fit_batch
from digit.errors import DigitError
from digit.models.tokenizer import ImageTokenizer, first_level_vectors, levels_of
from digit.pipeline.labels import Labels
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.steps import OnStep


@dataclass(frozen=True, kw_only=True)
class Filled:
    """Proposals for one picture."""

    images: UInt8[Tensor, "B 3 S S"]
    """As decoded from the tokens."""
    pasted: UInt8[Tensor, "B 3 S S"]
    """The same with the picture's own pixels in the kept cells."""
    blended: UInt8[Tensor, "B 3 S S"]
    """The same with the other cells shifted beside the kept ones, so that no seam shows."""
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
    if label is not None and len(labels := pipe.class_positions(label)) != 1:
        raise DigitError(f"{len(labels)} labels for one picture: give one")
    one = pipe.completion(images, keep, seed, label)
    names = ("discriminative", "vq", "keep_discriminative", "keep_vq")
    tokens = {name: None if (x := getattr(one, name)) is None else x.expand(num, -1) for name in names}
    request = replace(one, labels=one.labels.expand(num), **tokens)
    batches = list(pipe.sample_request(request, pipe.sized(pipe.settings(**sampling)), on_step=on_step))
    decoded = torch.cat([batch.images for batch in batches])
    found = {name: torch.cat([batch.tokens[name] for batch in batches]) for name in batches[0].tokens}
    return Filled(
        images=decoded,
        pasted=pipe.compose(images.expand_as(decoded), decoded, keep, "pasted"),
        blended=pipe.compose(images.expand_as(decoded), decoded, keep),
        vq=found.get("vq"),
        discriminative=found.get("discriminative"),
        label=int(one.labels[0]),
    )
