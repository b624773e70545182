"""DigitPipeline: label or image -> discriminative tokens -> VQ tokens -> pixels (paper, Figure 2 and section 4.3).

    stage 1   [label or start] -> prior -> discriminative tokens (B, N)
    stage 2   [discriminative tokens | start] -> renderer -> VQ tokens (B, M) -> VQGAN decoder -> pixels
    or        discriminative tokens -> renderer straight to pixels -> pixels

A pipeline without prior is a baseline of the paper: its renderer models VQ tokens alone ("VQ only").
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from digit.data.pictures import Images, Output, as_images, as_output, check_output
from digit.data.preprocess import PreprocessConfig, fit_batch
from digit.errors import DigitError
from digit.models.sequence import SequenceModel
from digit.models.tokenizer import ImageTokenizer, levels_of, tokens_of
from digit.models.tokens import Integers, as_tokens
from digit.pipeline.batch import IMAGES, SampleBatch
from digit.pipeline.batch_size import choose_batch_size, micro_batch_size
from digit.pipeline.labels import Labels, class_positions, listed
from digit.pipeline.manifest import (
    MANIFEST,
    find_pipeline,
    load_sequence_model,
    read_manifest,
    read_sampling,
    released_sampling,
    save_sequence_model,
    write_manifest,
)
from digit.pipeline.steps import OnStep, watched
from digit.runtime.files import MAKE_AGAIN, as_path
from digit.runtime.hardware import Precision, choose_device, free_memory
from digit.runtime.progress import Progress
from digit.runtime.scalars import as_int, as_number
from digit.sampling.config import SamplingConfig, StageSampling, with_changes
from digit.sampling.kept import KeptSamplers
from digit.sampling.kinds import get_kind
from digit.sampling.sampler import Sampler
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.encoders import FrozenEncoder
from digit.tokenizers.quantizers import load_quantizer
from digit.tokenizers.vq import VQTokenizer

PARTS = ("tokenizer", "vq", "prior", "renderer")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Images to sample: the seed of the first, their classes, and tokens to keep (completion)."""

    seed: int
    labels: Int64[Tensor, " B"]
    """Class of each image, -1 for none."""
    discriminative: Int64[Tensor, "B N"] | None = None
    """The first N discriminative tokens of each image."""
    vq: Int64[Tensor, "B M"] | None = None
    """The first M VQ tokens of each image."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", as_int("seed", self.seed))  # NumPy's integers overflow at seed + i

    @property
    def seeds(self) -> list[int]:
        """Seed of each image."""
        return [self.seed + i for i in range(len(self.labels))]

    def labels_of(self, model: SequenceModel) -> Int64[Tensor, " B"] | None:
        """The labels if the model is class-conditional, else None."""
        return self.labels if model.cfg.num_classes else None

    def rows(self, first: int, count: int) -> "GenerationRequest":
        """At most `count` images from `first` on."""
        part = slice(first, first + count)
        tokens = [None if x is None else x[part] for x in (self.discriminative, self.vq)]
        return GenerationRequest(
            seed=self.seed + first, labels=self.labels[part], discriminative=tokens[0], vq=tokens[1]
        )


class DigitPipeline:
    """Tokenizer, prior, renderer and VQGAN trained together. A method whose part is missing raises DigitError.

    Attributes:
        tokenizer: discriminative tokenizer, `encode((B, 3, H, W) uint8) -> (B, N) int64`; None if VQ-only.
        vq: VQ tokenizer, `encode(images) -> (B, M) int64`, `decode((B, M)) -> (B, 3, H, W) uint8`; None where the
            renderer goes straight to pixels.
        prior: stage 1, `prior(tokens (B, N), labels=None) -> (B, N, K)` next-token logits; None in a VQ-only baseline.
        renderer: stage 2, `renderer(vq_tokens (B, M), prefix=tokens) -> (B, M, V)`.
        classes: class names; empty where the pipeline is unconditional or the classes have no names.
    """

    def __init__(
        self,
        *,
        tokenizer: DiscriminativeTokenizer | None = None,
        vq: VQTokenizer | None = None,
        prior: SequenceModel | None = None,
        renderer: SequenceModel | None = None,
        preprocess: PreprocessConfig,
        classes: Sequence[str] = (),
        sampling: SamplingConfig | None = None,
        info: dict[str, Any] | None = None,
    ):
        self.tokenizer, self.vq, self.prior, self.renderer = tokenizer, vq, prior, renderer
        self.preprocess, self.classes, self.info = preprocess, list(classes), dict(info or {})
        self.sampling = sampling or released_sampling(SamplingConfig(), renderer=renderer and renderer.cfg)
        self._samplers = KeptSamplers()
        for model in (prior, renderer):
            if model is not None:
                model.eval().requires_grad_(False)
        self._check()

    def __repr__(self) -> str:
        size, names = self.image_size, listed(self.classes, ": ")
        lines = [f"DigitPipeline on {self.device}: {size} x {size} images, {self.num_classes or 'no'} classes{names}"]
        lines += [f"  {name:<11}{part!r}" for name, part in (("tokenizer", self.tokenizer), ("vq", self.vq)) if part]
        for name, model in (("prior", self.prior), ("renderer", self.renderer)):
            if model is not None:
                count = sum(p.numel() for p in model.parameters()) / 1e6
                lines.append(f"  {name:<11}{type(model).__name__}({model.cfg.kind}, {count:.1f} M parameters)")
        return "\n".join(lines)

    def _check(self) -> None:
        prior, renderer = self.prior and self.prior.cfg, self.renderer and self.renderer.cfg
        prefix = renderer.prefix_vocab_size if renderer else 0
        codes = self.tokenizer and self.tokenizer.vocab_size
        vq = None if self.renders_pixels else self.vq
        pairs = [
            ("renderer vocabulary", renderer and renderer.vocab_size, "VQGAN codes", vq and vq.vocab_size),
            ("prior vocabulary", prior and prior.vocab_size, "codebook entries", codes),
            ("renderer prefix vocabulary", prefix, "codebook entries", codes),
            ("renderer prefix vocabulary", prefix, "prior vocabulary", prior and prior.vocab_size),
        ]
        tokens = self.tokenizer and tokens_of(self.tokenizer)
        levels = self.tokenizer and self.tokenizer.num_levels
        prefix_len = renderer.prefix_len if renderer else 0
        pairs += [
            ("prior length", prior and prior.target_len, "discriminative tokens an image", tokens),
            ("renderer prefix length", prefix_len, "discriminative tokens an image", tokens),
            ("renderer prefix length", prefix_len, "prior length", prior and prior.target_len),
            ("prior levels", prior and prior.levels, "codebook levels", levels),
            ("renderer prefix levels", prefix_len and renderer and renderer.prefix_levels, "codebook levels", levels),
            ("renderer length", renderer and renderer.target_len, "VQ tokens", vq and math.prod(vq.grid)),
            ("pixels of the VQGAN", vq and vq.resolution, "of the crops", self.preprocess.crop_size),
            ("pixels of the renderer", getattr(renderer, "image_size", 0), "of the crops", self.preprocess.crop_size),
        ]
        for left, first, right, second in pairs:
            if first and second and first != second:
                raise DigitError(f"{left} is {first}, {right} {second}: these parts were not trained together")

    def require(self, *names: str) -> None:
        """Raise DigitError unless the pipeline has the named parts (tokenizer, vq, prior, renderer)."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            there = [name for name in PARTS if getattr(self, name) is not None]
            raise DigitError(
                f"this needs {' and '.join(missing)}, and the pipeline holds {', '.join(there) or 'nothing'} alone: "
                "add what is missing (digit convert, digit fit)"
            )

    def _require_vq(self) -> VQTokenizer:
        """The VQ tokenizer. Raises DigitError without it."""
        self.require("vq")
        assert self.vq is not None
        return self.vq

    def _require_renderer(self) -> SequenceModel:
        """The renderer. Raises DigitError without it, or without the VQ tokenizer that its tokens need."""
        self.require(*(["renderer"] if self.renders_pixels else ["vq", "renderer"]))
        assert self.renderer is not None
        return self.renderer

    def _require_prior(self) -> SequenceModel:
        """The prior. Raises DigitError without it."""
        self.require("prior")
        assert self.prior is not None
        return self.prior

    def _require_sampling(self) -> SequenceModel:
        """The model that samples first. Raises DigitError where a part is missing."""
        renderer = self._require_renderer()
        return self._require_prior() if renderer.cfg.prefix_len else renderer

    @property
    def renders_pixels(self) -> bool:
        """Whether the renderer gives images, not VQ tokens."""
        return self.renderer is not None and get_kind(self.renderer.cfg.kind).sampler.output == "images"

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        for model in (self.renderer, self.prior):
            if model is not None:
                return next(model.parameters()).device
        if self.vq is not None:
            return self.vq.device
        assert self.tokenizer is not None, "a pipeline has at least one part"
        return self.tokenizer.codebook.device

    @property
    def num_classes(self) -> int:
        """Classes that labels choose among; 0 where the pipeline is unconditional or has no model to sample first."""
        model = self.prior or self.renderer
        return model.cfg.num_classes if model is not None else 0

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.preprocess.crop_size

    @property
    def tokenizers(self) -> dict[str, ImageTokenizer]:
        """Every image tokenizer of the pipeline by name."""
        named = {"discriminative": self.tokenizer, "vq": self.vq}
        return {name: tokenizer for name, tokenizer in named.items() if tokenizer is not None}

    def to(self, device: str | torch.device) -> Self:
        """Move every part to a device. Raises DigitError where it does not exist."""
        device = choose_device(device)
        for part in (
            self.tokenizer and self.tokenizer.encoder,
            self.tokenizer and self.tokenizer.codebook,
            self.vq and self.vq.vqgan,
            self.prior,
            self.renderer,
        ):
            if part is not None:
                part.to(device)
        return self

    # ---------------------------------------------------------------- sampling

    def stream(
        self,
        num: int | None = None,
        labels: Labels | None = None,
        seed: int = 0,
        start: int = 0,
        end: int | None = None,
        *,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> Iterator[SampleBatch]:
        """Sample batch by batch; memory does not grow with `num`. Image i depends on `seed + i` and its label alone.

        Args:
            num: number of images, at least one per label; by default one per label.
            labels: names of classes, or numbers as `digit.pipeline.labels` says, repeated in turn up to `num`; None
                takes all classes evenly.
            seed: of image 0.
            start, end: sample images `start` .. `end - 1` of these, by default all. Both are multiples of the batch
                size, or end is `num`. The batches equal those of the whole stream bit for bit: machines can share it.
            on_step: called after every step of either stage with the tokens of the batch so far
                (`digit.pipeline.steps`); what it raises ends the sampling.
            sampling: changes to `SamplingConfig`, e.g. `prior={"top_k": 100}, batch_size=16`.

        Raises DigitError for an unknown label, labels given to an unconditional model, and unknown or wrong settings.
        """
        request = GenerationRequest(seed=seed, labels=self.labels(num, labels))
        cfg = self.sized(self.settings(**sampling))
        assert cfg.batch_size is not None, "sized"
        total = len(request.labels)
        start, last = as_int("start", start), total if end is None else min(as_int("end", end), total)
        for name, place in (("start", start), ("end", 0 if end is None else end)):
            if place < 0 or (place % cfg.batch_size and place < total):
                raise DigitError(f"{name} is {place}: give a multiple of the batch size {cfg.batch_size}")
        return self._sample(request, cfg, start, last, on_step=on_step)

    @overload
    def generate(self, *args: Any, output: Literal["pil"], **kwargs: Any) -> list[Image.Image]: ...
    @overload
    def generate(self, *args: Any, output: Literal["numpy"], **kwargs: Any) -> UInt8[np.ndarray, "B S S 3"]: ...
    @overload
    def generate(
        self,
        num: int | None = ...,
        labels: Labels | None = ...,
        seed: int = ...,
        *,
        output: Literal["torch"] = ...,
        **sampling: Any,
    ) -> UInt8[Tensor, "B 3 S S"]: ...
    def generate(
        self,
        num: int | None = None,
        labels: Labels | None = None,
        seed: int = 0,
        *,
        output: Output = "torch",
        **sampling: Any,
    ) -> UInt8[Tensor, "B 3 S S"] | UInt8[np.ndarray, "B S S 3"] | list[Image.Image]:
        """As `stream`, all at once: (num, 3, H, W) uint8.

        `output` is torch for that tensor, numpy for an array (num, H, W, 3), or pil for a list of Pillow pictures.
        """
        check_output(output)
        return as_output(self._pixels(self.stream(num, labels, seed, **sampling)), output)

    def generate_tokens(
        self, num: int | None = None, labels: Labels | None = None, seed: int = 0, **sampling: Any
    ) -> dict[str, Tensor]:
        """As `generate`, before pixels: {"discriminative": (num, N), "vq": (num, M), "labels": (num,)} int64.

        The labels are positions in `classes`. A VQ-only pipeline has no "discriminative", one whose renderer goes
        straight to pixels no "vq".
        """
        request = GenerationRequest(seed=seed, labels=self.labels(num, labels))
        batches = [batch.tokens for batch in self._sample(request, self.sized(self.settings(**sampling)), pixels=False)]
        return {name: torch.cat([b[name] for b in batches]) for name in batches[0]} | {"labels": request.labels}

    @overload
    def complete(self, *args: Any, output: Literal["pil"], **kwargs: Any) -> list[Image.Image]: ...
    @overload
    def complete(self, *args: Any, output: Literal["numpy"], **kwargs: Any) -> UInt8[np.ndarray, "B S S 3"]: ...
    @overload
    def complete(
        self,
        images: Images,
        keep: float = ...,
        seed: int = ...,
        labels: Labels | None = ...,
        *,
        output: Literal["torch"] = ...,
        **sampling: Any,
    ) -> UInt8[Tensor, "B 3 S S"]: ...
    def complete(
        self,
        images: Images,
        keep: float = 0.5,
        seed: int = 0,
        labels: Labels | None = None,
        *,
        output: Output = "torch",
        **sampling: Any,
    ) -> UInt8[Tensor, "B 3 S S"] | UInt8[np.ndarray, "B S S 3"] | list[Image.Image]:
        """Keep the first rows of each image and sample the rest (paper, section 4.5) -> (B, 3, H, W) uint8.

        Args:
            images: (B, 3, H, W) uint8, or what else `digit.data.pictures.as_images` takes, of any sizes; made
                square as the training pictures were (`preprocess.fit`) where the size differs.
            keep: fraction of the rows kept, in (0, 1]; rounded to whole rows of each token grid.
            seed: of the first image.
            labels: one for all images or one for each, as in `stream`; None takes for each image the class under
                which its tokens are most likely.
            output, sampling: as in `generate`.

        Raises DigitError for anything but images, and as `stream` does.

        Note: as in the paper, the kept tokens are computed from the whole image, so that an encoder with a wide
        receptive field reveals some of the hidden part.
        """
        check_output(output)
        if self._require_sampling() is self.prior:
            self.require("tokenizer")
        if not 0 < as_number("keep", keep) <= 1:
            raise DigitError(f"keep is {keep}: it is a fraction of the rows, above 0 and at most 1")
        images = fit_batch(images, self.image_size, self.preprocess.fit)
        classes = self.guess_labels(images) if labels is None else self._labels_of_each(images, labels)
        given = {
            name: tokenizer.encode(images)[:, : kept_tokens(tokenizer.grid, keep) * levels_of(tokenizer)]
            for name, tokenizer in self.tokenizers.items()
            if not (name == "vq" and self.renders_pixels)
        }
        request = GenerationRequest(
            seed=seed, labels=classes, discriminative=given.get("discriminative"), vq=given.get("vq")
        )
        return as_output(self._pixels(self._sample(request, self.sized(self.settings(**sampling)))), output)

    @torch.inference_mode()
    def guess_labels(self, images: Images) -> Int64[Tensor, " B"]:
        """Classes (B,) int64 by the model's own likelihood of the tokens (Bayes, equal priors); -1 without classes.

        They are positions in `classes`. The images (B, 3, S, S) have the size of the pipeline's.

        A class-conditional model trained without label dropout never saw the plain start symbol, whose embedding is
        therefore untrained.
        """
        first, images = self._require_sampling(), as_images(images)
        if not first.cfg.num_classes:
            return torch.full((len(images),), -1)
        if first.cfg.masked:
            raise DigitError("a masked model has no likelihood from which to predict the classes: give labels")
        if first is self.prior:
            self.require("tokenizer")
        tokenizer = self.tokenizer if first is self.prior else self.vq
        assert tokenizer is not None
        tokens = tokenizer.encode(images).to(self.device)  # (B, N)
        scores, size = torch.empty(len(tokens), first.cfg.num_classes), self.sized(self.sampling).batch_size
        for label in range(first.cfg.num_classes):
            for rows in torch.arange(len(tokens)).split(size):
                logits = first(tokens[rows], labels=torch.full((len(rows),), label, device=self.device))
                nll = F.cross_entropy(logits.transpose(1, 2).float(), tokens[rows], reduction="none")
                scores[rows, label] = -nll.sum(1).cpu()
        return scores.argmax(1)

    def decode(self, vq_tokens: Integers, precision: Precision | None = None) -> UInt8[Tensor, "B 3 S S"]:
        """VQ tokens (B, M), of any integer type -> pixels (B, 3, H, W) uint8. Raises as `VQTokenizer.decode`.

        Precision bf16 is that of pipelines that sample in bf16; otherwise the VQ tokenizer's own holds.
        """
        return self._require_vq().decode(vq_tokens, "bf16" if precision == "bf16" else None)

    def render(self, tokens: Integers, seed: int = 0, **sampling: Any) -> UInt8[Tensor, "B 3 S S"]:
        """Stage 2 alone: discriminative tokens (B, N), of any integer type -> (B, 3, H, W) uint8.

        Raises DigitError for anything but integers, MismatchError for tokens that the renderer does not know.
        """
        if self.renders_pixels:
            request = self._token_request(tokens, seed)
            return self._pixels(self._sample(request, self.sized(self.settings(**sampling))))
        return self.decode(self.render_tokens(tokens, seed, **sampling), self.settings(**sampling).precision)

    def render_tokens(
        self, tokens: Integers, seed: int = 0, *, on_step: OnStep | None = None, **sampling: Any
    ) -> Int64[Tensor, "B M"]:
        """As `render`, before pixels: (B, N) -> VQ tokens (B, M) int64; `on_step` as in `stream`."""
        if self.renders_pixels:
            raise DigitError("this renderer goes straight to pixels, without VQ tokens: call render()")
        self.require("vq", "renderer")
        request = self._token_request(tokens, seed)
        batches = self._sample(request, self.sized(self.settings(**sampling)), pixels=False, on_step=on_step)
        nothing = torch.empty(0, self._require_renderer().cfg.target_len, dtype=torch.int64)
        return torch.cat([nothing, *(batch.tokens["vq"] for batch in batches)])

    def _token_request(self, tokens: Integers, seed: int) -> GenerationRequest:
        """Images of these discriminative tokens. Raises as `render`."""
        renderer = self._require_renderer().cfg
        if not renderer.prefix_len:
            raise DigitError("this pipeline is VQ-only: its renderer takes no discriminative tokens")
        tokens = as_tokens(
            tokens, vocab_size=renderer.prefix_vocab_size, num_tokens=renderer.prefix_len, owner="the renderer"
        )
        return GenerationRequest(seed=seed, labels=torch.full((len(tokens),), -1), discriminative=tokens)

    def _pixels(self, batches: Iterable[SampleBatch]) -> Tensor:
        nothing = torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return torch.cat([nothing, *(batch.images for batch in batches)])

    def _sample(
        self,
        request: GenerationRequest,
        cfg: SamplingConfig,
        start: int = 0,
        end: int | None = None,
        *,
        pixels: bool = True,
        on_step: OnStep | None = None,
    ) -> Iterator[SampleBatch]:
        """The batches of images `start` .. `end - 1`; tensors stay on the device until a batch is complete."""
        num, model = len(request.labels) if end is None else end, self._require_renderer()
        prefix_len, batch_size = model.cfg.prefix_len, cfg.batch_size
        assert batch_size is not None, "sized"
        first_stage = self.prior if prefix_len else None
        with (
            nullcontext() if first_stage is None else self._sampler("prior", first_stage, cfg.prior, cfg) as prior,
            self._sampler("renderer", model, cfg.renderer, cfg) as renderer,
            Progress("sample", num, done=start) as bar,
        ):
            for first in range(start, num, batch_size):
                rows = request.rows(first, batch_size)
                prefix = self._prefix(prior, rows, on_step) if prefix_len else None
                tensors = {} if prefix is None else {"discriminative": prefix}
                with watched(renderer, "renderer", len(rows.labels), rows.vq, on_step):
                    rendered = renderer(rows.seeds, prefix=prefix, labels=rows.labels_of(model), given=rows.vq)
                if renderer.output == "images":
                    tensors[IMAGES] = rendered
                else:
                    tensors["vq"] = rendered
                    if pixels:
                        tensors[IMAGES] = self.decode(rendered, cfg.precision)
                batch = SampleBatch(first, rows.labels, tensors)
                bar.update(len(batch))
                yield batch

    def _prefix(self, prior: Sampler | None, rows: GenerationRequest, on_step: OnStep | None = None) -> Tensor:
        """Discriminative tokens (B, N) of these images: the given ones, and the rest sampled after them."""
        given = rows.discriminative
        if given is not None and given.shape[1] == self._require_renderer().cfg.prefix_len:
            return given.to(self.device)
        assert prior is not None, "checked by _require_sampling"
        with watched(prior, "prior", len(rows.labels), given, on_step):
            return prior(rows.seeds, labels=rows.labels_of(self._require_prior()), given=given)

    def _sampler(
        self, name: str, model: SequenceModel, stage: StageSampling, cfg: SamplingConfig
    ) -> AbstractContextManager[Sampler]:
        assert cfg.batch_size is not None, "sized"
        size = micro_batch_size(model, cfg.batch_size)
        return self._samplers.lend(name, model, stage, precision=cfg.precision, micro_batch_size=size)

    def labels(self, num: int | None = None, labels: Labels | None = None) -> Int64[Tensor, " B"]:
        """The class of each requested image, (num,), as a position in `classes`; -1 for none. Raises as `stream`."""
        known = self._require_sampling().cfg.num_classes
        chosen = self.class_positions(labels) if labels is not None else list(range(known)) or [-1]
        given = 1 if labels is None else len(chosen)
        num = given if num is None else as_int("num", num, least=1)
        if num < given:
            raise DigitError(f"num is {num}, but {given} labels were given: give num {given} or more, or leave it out")
        return torch.tensor([chosen[i % len(chosen)] for i in range(num)])

    def class_positions(self, labels: Labels) -> list[int]:
        """The position in `classes` of each label, -1 for no class. Raises DigitError as `stream` does."""
        known = self._require_sampling().cfg.num_classes
        if not known:
            raise DigitError("labels were given, but this model is unconditional: leave them out")
        return class_positions(labels, self.classes, known, self.knows_unlabelled)

    @property
    def knows_unlabelled(self) -> bool:
        """Whether the model was trained on images without a class: unlabelled ones, or classes dropped at random."""
        return self._require_sampling().cfg.label_dropout > 0 or bool(self.info.get("num_unlabelled"))

    def _labels_of_each(self, images: Tensor, labels: Labels) -> Int64[Tensor, " B"]:
        positions = self.class_positions(labels)
        if len(positions) not in (1, len(images)):
            raise DigitError(f"{len(positions)} labels for {len(images)} images: give one for all, or one for each")
        return torch.tensor(positions).expand(len(images))

    def settings(self, **changes: Any) -> SamplingConfig:
        """The pipeline's sampling with changes; stages may be dictionaries.

        Raises DigitError for unknown names, bad values, and settings that this pipeline would ignore.
        """
        cfg = with_changes(self.sampling, changes)
        for stage in ("prior", "renderer"):
            if isinstance(given := changes.get(stage), Mapping):
                self._refuse_ignored(stage, list(given))
        return cfg

    def _refuse_ignored(self, stage: str, names: Sequence[str]) -> None:
        """Raise DigitError for settings of a stage that is missing, or whose kind of model has no such setting."""
        model: SequenceModel | None = getattr(self, stage)
        if names and model is None:
            raise DigitError(f"{stage}.{names[0]} is given, but this pipeline has no {stage}: leave it out")
        taken = get_kind(model.cfg.kind).settings if model is not None else ()
        for name in names:
            if model is not None and name not in taken:
                has = f"this {stage} is {model.cfg.kind} and takes {', '.join(taken) or 'no settings'}"
                raise DigitError(f"{stage}.{name} is given, but {has}: leave it out")

    def sized(self, cfg: SamplingConfig) -> SamplingConfig:
        """`cfg` with a batch size: its own, or one that fits into the memory that is now free."""
        if cfg.batch_size is not None:
            return cfg
        renderer = self._require_renderer()
        vq = None if self.renders_pixels else self._require_vq()
        prior = self.prior if renderer.cfg.prefix_len else None
        free = free_memory(self.device) + self._samplers.held_bytes  # these give way, or are used again
        return replace(cfg, batch_size=choose_batch_size(prior, renderer, vq, cfg, free))

    # ---------------------------------------------------------------- folder

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write JSON and safetensors: pipeline.json, encoder/, codebook/, vqgan/, prior.*, renderer.*."""
        folder, parts = as_path(folder), []
        if self.tokenizer is not None:
            self.tokenizer.encoder.save(folder / "encoder")
            self.tokenizer.codebook.save(folder / "codebook")
            parts += ["encoder", "codebook"]
        if self.vq is not None:
            self.vq.save(folder / "vqgan")
            parts.append("vqgan")
        for name, model in (("prior", self.prior), ("renderer", self.renderer)):
            if model is not None:
                save_sequence_model(model, folder, name)
                parts.append(name)
        write_manifest(folder, parts, self.preprocess, self.classes, self.sampling, self.info)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read a pipeline folder, or a run folder of `digit fit`, onto a device: cpu or cuda.

        Raises DigitError where the folder is missing or damaged, or the device does not exist.
        """
        folder, device = find_pipeline(folder), choose_device(device)
        manifest = read_manifest(folder)
        try:
            return cls._read(folder, manifest).to(device)
        except (KeyError, TypeError, AttributeError) as error:
            raise DigitError(f"{folder / MANIFEST} is damaged ({error!r}): {MAKE_AGAIN}") from error

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any]) -> Self:
        parts, tokenizer = manifest["parts"], None
        if {"encoder", "codebook"} <= set(parts):
            encoder, codebook = FrozenEncoder.load(folder / "encoder"), load_quantizer(folder / "codebook")
            tokenizer = DiscriminativeTokenizer(encoder, codebook)
        return cls(
            tokenizer=tokenizer,
            vq=VQTokenizer.load(folder / "vqgan") if "vqgan" in parts else None,
            prior=load_sequence_model(folder, "prior") if "prior" in parts else None,
            renderer=load_sequence_model(folder, "renderer") if "renderer" in parts else None,
            preprocess=PreprocessConfig(**manifest["preprocess"]),
            classes=manifest["classes"],
            sampling=read_sampling(manifest["sampling"]),
            info=manifest["info"],
        )


def vq_only_baseline(folder: str | Path, pipe: DigitPipeline) -> DigitPipeline | None:
    """The paper's VQ-only baseline of a run (`digit train vq_ar`), with the pipeline's VQGAN; None without one."""
    model = as_path(folder) / "vq_ar"
    if not (model / "model.json").is_file():
        return None
    renderer = load_sequence_model(model, "model").to(pipe.device)
    return DigitPipeline(vq=pipe.vq, renderer=renderer, preprocess=pipe.preprocess, classes=pipe.classes)


def kept_tokens(grid: tuple[int, int], keep: float) -> int:
    """Cells in the kept first rows of a (rows, columns) grid: at least one row."""
    return max(1, round(keep * grid[0])) * grid[1]
