"""Base class of samplers: prepares the model once, checks each request, splits it into micro-batches, samples them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.products import pack_linears
from digit.models.sequence import SequenceModel
from digit.sampling.config import CfgSchedule, StageSampling
from digit.sampling.filters import guidance_scales, guide, image_uniforms, sample_filtered
from digit.sampling.requests import MICRO_BATCH_SIZE, TokenRequest, check_guidance, make_request, micro_batches


class Sampler(ABC):
    """A model prepared for sampling, once for many batches.

    Later changes of the model's weights may not take effect: make a new sampler. Not thread-safe.
    """

    output: Literal["tokens", "images"] = "tokens"
    """What a call returns: tokens, or images (B, 3, H, W) uint8."""
    records: bool = False
    """Whether it records CUDA graphs at its first call, which later calls replay."""

    def __init__(
        self,
        model: SequenceModel,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        cfg_scale: float = 1.0,
        cfg_schedule: CfgSchedule = "constant",
        dtype: torch.dtype | None = None,
        micro_batch_size: int | None = None,
        stage: str | None = None,
    ) -> None:
        StageSampling(temperature=temperature, top_k=top_k, top_p=top_p, cfg_schedule=cfg_schedule)  # checks them
        check_guidance(model, cfg_scale)
        self.micro_batch_size = MICRO_BATCH_SIZE if micro_batch_size is None else micro_batch_size
        if self.micro_batch_size < 1:
            raise DigitError(f"micro_batch_size is {micro_batch_size}: it must be at least 1")
        self.guided = cfg_scale != 1
        self.num_rows = self.micro_batch_size * (2 if self.guided else 1)
        self.model = prepare(model, dtype, self.num_rows)
        self.scales = guidance_scales(cfg_scale, cfg_schedule, self.num_decisions).to(model.device)
        self.has_own_weights = dtype not in (None, model.dtype)
        self.stage = stage or ("renderer" if model.cfg.prefix_len else "prior")
        self.pick = partial(sample_filtered, temperature=temperature, top_k=top_k, top_p=top_p)

    @torch.no_grad()
    def __call__(
        self,
        seeds: Sequence[int],
        *,
        prefix: Int64[Tensor, "B P"] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
        given: Int64[Tensor, "B L"] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Int64[Tensor, "B M"] | UInt8[Tensor, "B 3 S S"]:
        """Sample what `output` says of B images: their target tokens, or a pixel renderer's images.

        Args:
            seeds: one per image. Seed, conditions and settings determine an image's tokens, whatever the other images.
            prefix: prefix tokens (renderers).
            labels: class numbers; -1 or None is unconditional.
            given: tokens to keep (completion): the first L of a next-token model. A masked model keeps all but
                `model.cfg.mask_token`, at any position.
            on_token: called after every step with the number of tokens just sampled, summed over the micro-batch; by a
                pixel renderer with the number of images of each pass.

        Raises DigitError for conditions that do not fit the model.
        """
        request = make_request(self.model, seeds, prefix, labels, given)
        sampled = [self.no_images()]
        for rows, count in micro_batches(request, self.micro_batch_size):
            u = image_uniforms(rows.seeds, self.stage, self.uniform_shape).to(request.given.device)
            sampled.append(self.sample_micro_batch(rows, u, partial(report, on_token, count))[:count])
        return torch.cat(sampled)

    def no_images(self) -> Tensor:
        """What a call without seeds returns."""
        return torch.empty(0, self.model.cfg.target_len, dtype=torch.int64, device=self.model.device)

    @property
    @abstractmethod
    def num_decisions(self) -> int:
        """Number of the network's passes after which tokens are chosen; guidance has a scale for each."""

    @property
    @abstractmethod
    def uniform_shape(self) -> tuple[int, ...]:
        """Shape of the uniform random numbers of one image."""

    @abstractmethod
    def sample_micro_batch(self, rows: TokenRequest, u: Tensor, report: Callable[[Tensor | int], None]) -> Tensor:
        """Sample a micro-batch with the uniforms u; report the number of tokens sampled, per row or for all rows."""

    @property
    def held_bytes(self) -> int:
        """Bytes on a GPU that it holds between calls, beside the model's own weights."""
        return sum(p.nbytes for p in self.model.parameters()) if self.has_own_weights else 0

    def combine(self, logits: Float[Tensor, "R ..."], index: int | Int64[Tensor, " 1"]) -> Float[Tensor, "C ..."]:
        """Float32 logits of the C images from those of all R rows, R = 2C with guidance, at decision number `index`.

        The number may be one on the device.
        """
        return guide(logits, self.scales[index]) if self.guided else logits.float()


def prepare(model: SequenceModel, dtype: torch.dtype | None, num_rows: int) -> SequenceModel:
    """A copy cast to `dtype` once (autocast would cast for every token), with matrices packed on a CPU.

    Without a cast, it shares all parameters that are not packed with the model.
    """
    cast = {id(p): nn.Parameter(p.detach().to(dtype or p.dtype), requires_grad=False) for p in model.parameters()}
    return pack_linears(copy.deepcopy(model, cast).eval(), num_rows)


def report(on_token: Callable[[int], None] | None, count: int, decided: Tensor | int) -> None:
    """Report the tokens sampled in the first `count` rows; the other rows only pad the micro-batch."""
    if on_token:
        on_token(decided * count if isinstance(decided, int) else int(decided[:count].sum()))


def twice(x: Int64[Tensor, "C ..."], guided: bool) -> Int64[Tensor, "R ..."]:
    """The rows twice for guidance, else once."""
    return torch.cat([x, x]) if guided else x
