"""DigitPipeline: label or image -> discriminative tokens -> VQ tokens -> pixels (paper, Figure 2 and section 4.3).

    stage 1   [label or start] -> prior -> discriminative tokens (B, N)
    stage 2   [discriminative tokens | start] -> renderer -> VQ tokens (B, M) -> VQGAN decoder -> pixels
    or        discriminative tokens -> renderer straight to pixels -> pixels

A pipeline without prior is a baseline of the paper: its renderer models VQ tokens alone ("VQ only").
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self, overload

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor

from digit.data.pictures import Images, Output, as_images, as_output, check_output
from digit.data.preprocess import PreprocessConfig, fit_batch
from digit.errors import DigitError
from digit.models.sequence import SequenceModel
from digit.models.tokenizer import ImageTokenizer, levels_of, tokens_of
from digit.models.tokens import Integers, as_tokens
from digit.pipeline.around import (
    Keep,
    Pixels,
    as_keep,
    check_pixels,
    compose,
    kept_cells,
    kept_pixels,
    kept_rows,
    sample_around,
)
from digit.pipeline.batch import IMAGES, SampleBatch
from digit.pipeline.batch_size import choose_batch_size, micro_batch_size
from digit.pipeline.card import Card, part_origins, write_card
from digit.pipeline.hub import fetch_pipeline, hub_name, require_uploads, upload_folder
from digit.pipeline.labels import Labels, class_positions, listed
from digit.pipeline.manifest import (
    MANIFEST,
    RELEASED,
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
from digit.runtime.plots import grid
from digit.runtime.progress import Progress
from digit.runtime.scalars import as_int
from digit.runtime.version import __version__
from digit.sampling.config import SamplingConfig, StageSampling, with_changes
from digit.sampling.kept import KeptSamplers
from digit.sampling.kinds import get_kind
from digit.sampling.sampler import Sampler
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.encoders import FrozenEncoder
from digit.tokenizers.quantizers import load_quantizer
from digit.tokenizers.vq import VQTokenizer

PARTS = ("tokenizer", "vq", "prior", "renderer")
CARD_SAMPLES = 16  # on a model card, at least


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
        return self.sample_request(request, cfg, start, last, on_step=on_step)

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
        batches = [
            batch.tokens for batch in self.sample_request(request, self.sized(self.settings(**sampling)), pixels=False)
        ]
        return {name: torch.cat([b[name] for b in batches]) for name in batches[0]} | {"labels": request.labels}

    @overload
    def complete(self, *args: Any, output: Literal["pil"], **kwargs: Any) -> list[Image.Image]: ...
    @overload
    def complete(self, *args: Any, output: Literal["numpy"], **kwargs: Any) -> UInt8[np.ndarray, "B S S 3"]: ...
    @overload
    def complete(
        self,
        images: Images,
        keep: Keep = ...,
        seed: int = ...,
        labels: Labels | None = ...,
        *,
        pixels: Pixels = ...,
        output: Literal["torch"] = ...,
        **sampling: Any,
    ) -> UInt8[Tensor, "B 3 S S"]: ...
    def complete(
        self,
        images: Images,
        keep: Keep = 0.5,
        seed: int = 0,
        labels: Labels | None = None,
        *,
        pixels: Pixels = "kept",
        output: Output = "torch",
        **sampling: Any,
    ) -> UInt8[Tensor, "B 3 S S"] | UInt8[np.ndarray, "B S S 3"] | list[Image.Image]:
        """Keep a part of each image and sample the rest (paper, section 4.5) -> (B, 3, H, W) uint8.

        Args:
            images: (B, 3, H, W) uint8, or what else `digit.data.pictures.as_images` takes, of any sizes; made
                square as the training pictures were (`preprocess.fit`) where the size differs.
            keep: fraction of the rows kept, in (0, 1], from the top, rounded to whole rows of each token grid; the
                name of an area (upper, lower, left, right, centre, border); or a mask, true where an image is kept, in
                cells of one of the token grids or in pixels (S, S). Of a mask of pixels the tokens of whole cells are
                kept, and all of its pixels.
            seed: of the first image.
            labels: one for all images or one for each, as in `stream`; None takes for each image the class under
                which its tokens are most likely.
            pixels: kept (the default): what is kept has the image's own pixels, and next to it the sampled part is
                shifted so that no seam shows; pasted: without the shift; decoded: every pixel as the tokens give it,
                as in the paper.
            output, sampling: as in `generate`.

        Raises DigitError for anything but images, and as `stream` does.

        Note: as in the paper, the kept tokens are computed from the whole image, so that an encoder with a wide
        receptive field reveals some of the hidden part. A next-token model sees what is kept before a hole, in raster
        order, and not what is kept after it; a masked model sees both.
        """
        check_output(output)
        check_pixels(pixels)
        images = fit_batch(images, self.image_size, self.preprocess.fit)
        request = self.completion(images, keep, seed, labels)
        decoded = self._pixels(self.sample_request(request, self.sized(self.settings(**sampling))))
        return as_output(self.compose(images, decoded, keep, pixels), output)

    def completion(
        self, images: UInt8[Tensor, "B 3 S S"], keep: Keep, seed: int = 0, labels: Labels | None = None
    ) -> GenerationRequest:
        """What `complete` samples; image i has seed + i. Arguments, and errors, as there, for images of our size."""
        if self._require_sampling() is self.prior:
            self.require("tokenizer")
        keep, tokens = as_keep(keep, self._grids, self.image_size), {}
        classes = self.guess_labels(images) if labels is None else self.labels_of_each(images, labels)
        for name, tokenizer in self.tokenizers.items():
            if name == "vq" and self.renders_pixels:
                continue
            tokens[name] = tokenizer.encode(images)
            if not isinstance(keep, Tensor):  # the first rows, whose number needs no look at a mask
                tokens[name] = tokens[name][:, : kept_tokens(tokenizer.grid, keep) * levels_of(tokenizer)]
                continue
            cells = kept_cells(keep, tokenizer.grid, self.image_size).flatten()
            cells = cells.repeat_interleave(levels_of(tokenizer))  # all tokens of a cell
            tokens[f"keep_{name}"] = cells.expand(len(images), -1)
        return GenerationRequest(seed=seed, labels=classes, **tokens)

    def compose(
        self, images: UInt8[Tensor, "B 3 S S"], decoded: UInt8[Tensor, "B 3 S S"], keep: Keep, pixels: Pixels = "kept"
    ) -> UInt8[Tensor, "B 3 S S"]:
        """Completions from the images (of our size) and what was decoded around them: see `complete`."""
        check_pixels(pixels)
        return compose(images, decoded, self.kept_pixels(keep), pixels, reach=self.image_size / self._grids[-1][0])

    def kept_pixels(self, keep: Keep) -> Bool[Tensor, "S S"]:
        """Which pixels `complete` keeps."""
        return kept_pixels(as_keep(keep, self._grids, self.image_size), self._grids[-1], self.image_size)

    @property
    def _grids(self) -> list[tuple[int, int]]:
        """Grids of the tokenizers whose tokens are sampled, that of what the decoder reads last."""
        return [t.grid for name, t in self.tokenizers.items() if not (name == "vq" and self.renders_pixels)]

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
            return self._pixels(self.sample_request(request, self.sized(self.settings(**sampling))))
        return self.decode(self.render_tokens(tokens, seed, **sampling), self.settings(**sampling).precision)

    def render_tokens(
        self, tokens: Integers, seed: int = 0, *, on_step: OnStep | None = None, **sampling: Any
    ) -> Int64[Tensor, "B M"]:
        """As `render`, before pixels: (B, N) -> VQ tokens (B, M) int64; `on_step` as in `stream`."""
        if self.renders_pixels:
            raise DigitError("this renderer goes straight to pixels, without VQ tokens: call render()")
        self.require("vq", "renderer")
        request = self._token_request(tokens, seed)
        batches = self.sample_request(request, self.sized(self.settings(**sampling)), pixels=False, on_step=on_step)
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

    def sample_request(
        self,
        request: GenerationRequest,
        cfg: SamplingConfig,
        start: int = 0,
        end: int | None = None,
        *,
        pixels: bool = True,
        on_step: OnStep | None = None,
    ) -> Iterator[SampleBatch]:
        """Batches of images `start` .. `end - 1` of a request; tensors stay on the device until a batch is complete."""
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
                conditions: dict[str, Any] = {"prefix": prefix, "labels": rows.labels_of(model)}
                if rows.vq is None or renderer.output == "images":
                    with watched(renderer, "renderer", len(rows.labels), None, on_step):
                        rendered = renderer(rows.seeds, **conditions)
                else:
                    rendered = self._around(renderer, rows, rows.vq, rows.keep_vq, on_step, **conditions)
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
        tokens, keep = rows.discriminative, rows.keep_discriminative
        if tokens is not None and (prior is None or _is_whole(tokens, keep, prior)):
            return tokens.to(self.device)
        assert prior is not None, "checked by _require_sampling"
        labels = rows.labels_of(self._require_prior())
        if tokens is not None:
            return self._around(prior, rows, tokens, keep, on_step, labels=labels)
        with watched(prior, "prior", len(rows.labels), None, on_step):
            return prior(rows.seeds, labels=labels)

    def _around(
        self, sampler: Sampler, rows: GenerationRequest, tokens: Tensor, keep: Tensor | None, on_step: OnStep | None,
        *, prefix: Tensor | None = None, labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The given tokens where they are kept, the others sampled."""
        tokens = tokens.to(self.device)
        if _is_whole(tokens, keep, sampler):
            return tokens.clone()
        if keep is not None:
            return sample_around(sampler, rows.seeds, tokens, keep, prefix=prefix, labels=labels, on_step=on_step)
        with watched(sampler, sampler.stage, len(rows.labels), tokens, on_step):
            return sampler(rows.seeds, prefix=prefix, labels=labels, given=tokens)

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

    def labels_of_each(self, images: Tensor, labels: Labels) -> Int64[Tensor, " B"]:
        """The class of each image, from one label for all or one for each. Raises DigitError as `stream` does."""
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

    def write_card(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        licence: str | None = None,
        data: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        samples: UInt8[Tensor, "B 3 S S"] | None = None,
    ) -> Path:
        """Write a model card into a pipeline's folder: README.md, and samples.png beside it.

        Args:
            name: OWNER/NAME on the Hub, for the lines that use it.
            licence: of this model, by the Hub's names: mit, apache-2.0, cc-by-4.0.
            data: what it was trained on and under which licence; None takes the name of the data.
            metrics: metrics.json of the run's report.
            samples: pictures to show; None samples some, every class in turn.
        """
        note = ""
        if samples is None and self.renderer is not None:
            samples = self.generate(min(max(CARD_SAMPLES, self.num_classes), 4 * CARD_SAMPLES), seed=0)
            note = "Samples of seed 0, every class in turn." if self.num_classes else "Samples of seed 0."
        parts = [
            (part, repr(made)) for part, made in (("tokenizer", self.tokenizer), ("VQ tokenizer", self.vq)) if made
        ]
        for part, model in (("prior", self.prior), ("renderer", self.renderer)):
            if model is not None:
                count = sum(p.numel() for p in model.parameters()) / 1e6
                parts.append((part, f"{type(model).__name__}({model.cfg.kind}, {count:.1f} M parameters)"))
        card = Card(
            title=str(self.info.get("recipe") or "DiGIT pipeline"),
            image_size=self.image_size,
            classes=self.classes,
            num_classes=self.num_classes,
            parts=parts,
            sampling=asdict(self.sampling),
            info=self.info,
            origins=part_origins(self.tokenizer, self.vq, self.info),
            metrics=metrics,
            licence=licence,
            data=data,
            samples_note=note,
        )
        picture = None if samples is None else grid(samples, 8, scale=max(1, 96 // self.image_size))
        return write_card(as_path(folder), card, picture, name)

    def push_to_hub(
        self,
        name: str,
        *,
        licence: str | None = None,
        data: str | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload the pipeline with a model card to huggingface.co/NAME; returns the page's address.

        Args:
            name: OWNER/NAME; made where it does not exist.
            licence, data: for the card, see `write_card`.
            private: make the repository private, where it is made now.
            token: of the Hub; by default that of `huggingface-cli login`.

        Raises DigitError in one line: offline, without a login, for a name of somebody else.
        """
        require_uploads(name)
        with TemporaryDirectory() as place:
            folder = self.save_pretrained(place)
            self.write_card(folder, name=name, licence=licence, data=data)
            return upload_folder(folder, name, private=private, token=token, message=f"DiGIT {__version__}")

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read a pipeline folder, or a run folder of `digit fit`, onto a device: cpu or cuda.

        Args:
            folder: the folder, or the name of a pipeline on the Hugging Face Hub: OWNER/NAME where no folder of this
                name can be meant, or hf:OWNER/NAME. Offline, a copy in the Hub's cache is read.
            device: cpu or cuda.

        Raises DigitError where the folder is missing or damaged, a name cannot be fetched, or the device is missing.
        """
        device = choose_device(device)
        if str(folder) != RELEASED and (name := hub_name(folder)) is not None:
            folder = fetch_pipeline(name)
        folder = find_pipeline(folder)
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


def _is_whole(tokens: Tensor, keep: Tensor | None, sampler: Sampler) -> bool:
    """Whether every token of a model is given and kept."""
    return tokens.shape[1] == sampler.model.cfg.target_len if keep is None else bool(keep.all())


def kept_tokens(grid: tuple[int, int], keep: float) -> int:
    """Cells in the kept first rows of a (rows, columns) grid: at least one row."""
    return kept_rows(grid, keep) * grid[1]
