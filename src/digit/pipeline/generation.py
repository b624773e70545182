"""From a request to batches: prior, renderer, and pixels (paper, Figure 2).

Shapes: B images, N discriminative tokens, M VQ tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Int64
from torch import Tensor

from digit.models.sequence import SequenceModel
from digit.pipeline.around import is_whole, sample_around
from digit.pipeline.batch import IMAGES, SampleBatch
from digit.pipeline.batch_size import micro_batch_size
from digit.pipeline.steps import OnStep, watched
from digit.runtime.hardware import Precision
from digit.runtime.progress import Progress
from digit.runtime.scalars import as_int
from digit.sampling.config import SamplingConfig, StageSampling
from digit.sampling.kept import KeptSamplers
from digit.sampling.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Images to sample: the seed of the first, their classes, and tokens to keep (completion)."""

    seed: int
    labels: Int64[Tensor, " B"]
    """Class of each image, -1 for none."""
    discriminative: Int64[Tensor, "B N"] | None = None
    """Discriminative tokens of each image, or the first of them."""
    vq: Int64[Tensor, "B M"] | None = None
    """VQ tokens of each image, or the first of them."""
    keep_discriminative: Bool[Tensor, "B N"] | None = None
    """Which of the discriminative tokens are kept; None keeps all that are given."""
    keep_vq: Bool[Tensor, "B M"] | None = None
    """Which of the VQ tokens are kept; None keeps all that are given."""
    one_seed: bool = False
    """Whether all images have the seed of the first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", as_int("seed", self.seed))  # NumPy's integers overflow at seed + i

    @property
    def seeds(self) -> list[int]:
        """Seed of each image."""
        return [self.seed + i * (not self.one_seed) for i in range(len(self.labels))]

    def labels_of(self, model: SequenceModel) -> Int64[Tensor, " B"] | None:
        """The labels if the model is class-conditional, else None."""
        return self.labels if model.cfg.num_classes else None

    def rows(self, first: int, count: int) -> "GenerationRequest":
        """At most `count` images from `first` on."""
        part = slice(first, first + count)
        names = ("discriminative", "vq", "keep_discriminative", "keep_vq")
        tokens = {name: None if (x := getattr(self, name)) is None else x[part] for name in names}
        return replace(self, seed=self.seeds[first], labels=self.labels[part], **tokens)


@dataclass(frozen=True)
class Generator:
    """Samples the batches of a request with the models of a pipeline."""

    prior: SequenceModel | None
    renderer: SequenceModel
    samplers: KeptSamplers
    """Those of the pipeline, which are used again."""
    decode: Callable[[Tensor, Precision], Tensor] | None
    """VQ tokens (B, M) to pixels; None leaves the pixels out."""

    def batches(
        self, request: GenerationRequest, cfg: SamplingConfig, start: int, end: int, on_step: OnStep | None = None
    ) -> Iterator[SampleBatch]:
        """Batches of images `start` .. `end - 1`; tensors stay on the device until a batch is complete.

        `cfg` is one of `DigitPipeline.sized`.
        """
        model, batch_size = self.renderer, cfg.batch_size
        assert batch_size is not None, "sized"
        first_stage = self.prior if model.cfg.prefix_len else None
        with (
            nullcontext() if first_stage is None else self._sampler("prior", first_stage, cfg.prior, cfg) as prior,
            self._sampler("renderer", model, cfg.renderer, cfg) as renderer,
            Progress("sample", end, done=start) as bar,
        ):
            for first in range(start, end, batch_size):
                rows = request.rows(first, batch_size)
                prefix = self._prefix(prior, rows, on_step) if model.cfg.prefix_len else None
                tensors = {} if prefix is None else {"discriminative": prefix}
                conditions: dict[str, Any] = {"prefix": prefix, "labels": rows.labels_of(model)}
                if rows.vq is None or renderer.output == "images":
                    with watched(renderer, "renderer", len(rows.labels), None, on_step):
                        rendered = renderer(rows.seeds, **conditions)
                else:
                    given = rows.vq.to(model.device)
                    rendered = sample_around(renderer, rows.seeds, given, rows.keep_vq, on_step=on_step, **conditions)
                if renderer.output == "images":
                    tensors[IMAGES] = rendered
                else:
                    tensors["vq"] = rendered
                    if self.decode is not None:
                        tensors[IMAGES] = self.decode(rendered, cfg.precision)
                batch = SampleBatch(first, rows.labels, tensors)
                bar.update(len(batch))
                yield batch

    def _prefix(self, prior: Sampler | None, rows: GenerationRequest, on_step: OnStep | None) -> Tensor:
        """Discriminative tokens (B, N) of these images: the given ones, and the rest sampled after them."""
        tokens, keep = rows.discriminative, rows.keep_discriminative
        if tokens is not None and (prior is None or is_whole(tokens, keep, prior)):
            return tokens.to(self.renderer.device)
        assert prior is not None and self.prior is not None, "the pipeline has checked its parts"
        labels = rows.labels_of(self.prior)
        if tokens is not None:
            given = tokens.to(self.renderer.device)
            return sample_around(prior, rows.seeds, given, keep, labels=labels, on_step=on_step)
        with watched(prior, "prior", len(rows.labels), None, on_step):
            return prior(rows.seeds, labels=labels)

    def _sampler(
        self, name: str, model: SequenceModel, stage: StageSampling, cfg: SamplingConfig
    ) -> AbstractContextManager[Sampler]:
        assert cfg.batch_size is not None, "sized"
        size = micro_batch_size(model, cfg.batch_size)
        return self.samplers.lend(name, model, stage, precision=cfg.precision, micro_batch_size=size)
