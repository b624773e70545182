"""Shows the tokens of a sampler while it samples them: for a page that draws pictures as they grow.

Shapes: B images, C images of a micro-batch, M target tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from digit.sampling.sampler import Sampler

UNDECIDED = -1
OnStep = Callable[[str, Int64[Tensor, "B M"]], None]
"""Called with the stage ("prior" or "renderer") and its tokens so far, (B, M) int64 on the CPU, -1 where a token is not
sampled yet. A masked model gives at every step what it samples for all places, of which it keeps some. What the
function raises ends the sampling."""


@contextmanager
def watched(
    sampler: Sampler, stage: str, num: int, given: Int64[Tensor, "B L"] | None, on_step: OnStep | None
) -> Iterator[None]:
    """A context in which one call of `sampler` for `num` images reports each of its steps.

    A sampler that replays recorded CUDA graphs reports nothing, since its steps run without Python; one that gives
    images has no tokens to report.
    """
    if on_step is None or sampler.records or sampler.output == "images":
        yield
        return
    pick = sampler.pick
    sampler.pick = _Seen(sampler, stage, num, given, on_step)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sampler.pick = pick


class _Seen:
    """Stands in for `sampler.pick` during one call, and notes the tokens that it gives.

    Micro-batches run one after the other; the rows past `num` only pad the last.
    """

    def __init__(
        self, sampler: Sampler, stage: str, num: int, given: Int64[Tensor, "B L"] | None, on_step: OnStep
    ) -> None:
        self.pick = sampler.pick
        self.masked, self.stage, self.on_step = sampler.model.cfg.masked, stage, on_step
        self.size, self.first, self.step = sampler.micro_batch_size, 0, 0
        self.num_steps = getattr(sampler, "num_steps", 0)
        self.tokens = torch.full((num, sampler.model.cfg.target_len), UNDECIDED)
        self.known = 0 if given is None or self.masked else given.shape[1]
        self.given = None if given is None else given.cpu()
        if given is not None and not self.masked:
            self.tokens[:, : self.known] = given.cpu()
        self.mask_token = sampler.model.cfg.mask_token if self.masked else UNDECIDED

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        sampled = self.pick(*args, **kwargs)
        self.note(sampled.detach().cpu())
        return sampled

    def note(self, sampled: Tensor) -> None:
        """Note one step of the micro-batch at work: (C,) tokens, of a masked model (C M,)."""
        rows = slice(self.first, self.first + self.size)
        part, length = self.tokens[rows], self.tokens.shape[1]
        if self.masked:
            guess = sampled.view(-1, length)[: len(part)]
            part.copy_(guess)
            if self.given is not None:
                kept = self.given[rows]
                part[:, : kept.shape[1]] = torch.where(kept == self.mask_token, part[:, : kept.shape[1]], kept)
            ended = self.step + 1 == self.num_steps
        else:
            part[:, self.known + self.step] = sampled[: len(part)]
            ended = self.known + self.step + 1 == length
        self.step, self.first = (0, self.first + self.size) if ended else (self.step + 1, self.first)
        self.on_step(self.stage, self.tokens)
