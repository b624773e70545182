"""Sampling of a renderer straight to pixels: one pass, whose only random numbers are the image's own noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from digit.models.pixels import PixelRenderer
from digit.runtime.hardware import full_precision
from digit.sampling.filters import image_uniforms
from digit.sampling.requests import TokenRequest, make_request, micro_batches
from digit.sampling.sampler import Sampler, report

RENDERED_TOGETHER, RENDERED_TOGETHER_ON_GPU = 8, 32  # images; of more, a CPU's cache does not hold the decoder's maps


class PixelSampler(Sampler):
    """Renders discriminative tokens in one pass. It takes no filters: nothing is chosen among tokens."""

    output = "images"
    model: PixelRenderer

    def __init__(self, model: PixelRenderer, *, micro_batch_size: int | None = None, **settings: Any) -> None:
        most = RENDERED_TOGETHER if model.device.type == "cpu" else RENDERED_TOGETHER_ON_GPU
        size = most if micro_batch_size is None else min(micro_batch_size, most)
        super().__init__(model, micro_batch_size=size, **settings)

    @property
    def num_decisions(self) -> int:
        return 1

    @property
    def uniform_shape(self) -> tuple[int, ...]:
        return self.model.cfg.noise_shape

    @torch.no_grad()
    def __call__(
        self,
        seeds: Sequence[int],
        *,
        prefix: Int64[Tensor, "B P"] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
        given: Int64[Tensor, "B L"] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> UInt8[Tensor, "B 3 S S"]:
        """Images (B, 3, S, S) uint8 of discriminative tokens `prefix` (B, P).

        `on_token` is called with the number of images of each pass. There is nothing to complete, and no class to obey:
        `given` and `labels` are None. Raises DigitError for tokens that do not fit the model.
        """
        assert given is None and labels is None, "the prior completes the tokens, and knows the classes"
        request = make_request(self.model, seeds, prefix, None, None)
        side = self.model.cfg.image_size
        images = [torch.empty(0, 3, side, side, dtype=torch.uint8, device=self.model.device)]
        for rows, count in micro_batches(request, self.micro_batch_size):
            u = image_uniforms(rows.seeds, self.stage, self.uniform_shape).to(request.given.device)
            images.append(self.sample_micro_batch(rows, u, lambda _: None)[:count])
            report(on_token, count, 1)
        return torch.cat(images)

    def sample_micro_batch(self, rows: TokenRequest, u: Tensor, report: Callable[[Tensor | int], None]) -> Tensor:
        """A micro-batch of images; the uniforms become Gaussian noise by the inverse of the error function."""
        assert rows.prefix is not None, "checked by make_request"
        noise = None
        if self.model.cfg.noise_channels:
            normal = (2 * u - 1).clamp(-1 + 1e-12, 1 - 1e-12).erfinv() * 2**0.5  # float64
            noise = normal.to(self.model.dtype)
        whole = self.model.dtype == torch.float32
        with full_precision(self.model.device) if whole else nullcontext():
            images = self.model.render(rows.prefix, noise)
        return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
