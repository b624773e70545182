"""Sampling of a renderer straight to pixels: one pass, whose only random numbers are the image's own noise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from digit.models.pixels import PixelRenderer
from digit.runtime.hardware import full_precision
from digit.sampling.requests import TokenRequest
from digit.sampling.sampler import Sampler

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

    def no_images(self) -> Tensor:
        side = self.model.cfg.image_size
        return torch.empty(0, 3, side, side, dtype=torch.uint8, device=self.model.device)

    def sample_micro_batch(self, rows: TokenRequest, u: Tensor, report: Callable[[Tensor | int], None]) -> Tensor:
        """A micro-batch of images; the uniforms become Gaussian noise by the inverse of the error function."""
        assert rows.prefix is not None, "checked by make_request"
        assert not rows.given.shape[1], "the prior completes the tokens"
        noise = None
        if self.model.cfg.noise_channels:
            normal = (2 * u - 1).clamp(-1 + 1e-12, 1 - 1e-12).erfinv() * 2**0.5  # float64
            noise = normal.to(self.model.dtype)
        whole = self.model.dtype == torch.float32
        with full_precision(self.model.device) if whole else nullcontext():
            images = self.model.render(rows.prefix, noise, rows.labels)
        report(1)
        return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
