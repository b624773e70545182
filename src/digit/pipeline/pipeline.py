"""DigitPipeline: label or image -> discriminative tokens -> VQ tokens -> pixels (paper, Figure 2 and section 4.3).

    stage 1   [label or start] -> prior -> discriminative tokens (B, N)
    stage 2   [discriminative tokens | start] -> renderer -> VQ tokens (B, M) -> VQGAN decoder -> pixels
    or        discriminative tokens -> renderer straight to pixels -> pixels

A pipeline without prior is a baseline of the paper: its renderer models VQ tokens alone ("VQ only").
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self, overload

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor

from digit.data.pictures import Images, Output, as_images, as_output, check_output
from digit.data.preprocess import PreprocessConfig, fit_batch
from digit.errors import DigitError
from digit.models.sequence import SequenceModel
from digit.models.tokenizer import ImageTokenizer, levels_of
from digit.models.tokens import Integers, as_tokens
from digit.pipeline.around import (
    Keep,
    Pixels,
    as_keep,
    check_pixels,
    compose,
    kept_cells,
    kept_pixels,
    kept_tokens,
)
from digit.pipeline.batch import SampleBatch
from digit.pipeline.batch_size import choose_batch_size
from digit.pipeline.card import Card, part_origins, write_card
from digit.pipeline.generation import GenerationRequest, Generator
from digit.pipeline.hub import fetch_pipeline, hub_name, require_uploads, upload_folder
from digit.pipeline.labels import ClassPositions, Labels, class_positions, listed, most_likely_classes
from digit.pipeline.manifest import (
    MANIFEST,
    RELEASED,
    find_pipeline,
    load_sequence_model,
    read_manifest,
    read_sampling,
    released_sampling,
    write_manifest,
)
from digit.pipeline.parts import PARTS, Parts
from digit.pipeline.steps import OnStep
from digit.runtime.files import MAKE_AGAIN, as_path
from digit.runtime.hardware import Precision, choose_device, free_memory, hardware_precision
from digit.runtime.plots import grid
from digit.runtime.scalars import as_int
from digit.runtime.version import __version__
from digit.sampling.config import SamplingConfig, with_changes
from digit.sampling.kept import KeptSamplers
from digit.sampling.kinds import can_guide
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.vq import VQTokenizer

CARD_SAMPLES = 16  # on a model card, at least


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
        self._parts.check(preprocess)

    def __repr__(self) -> str:
        size, names = self.image_size, listed(self.classes, ": ")
        lines = [f"DigitPipeline on {self.device}: {size} x {size} images, {self.num_classes or 'no'} classes{names}"]
        lines += [f"  {name:<11}{text}" for name, text in self._parts.described()]
        return "\n".join(lines)

    @property
    def _parts(self) -> Parts:
        return Parts(tokenizer=self.tokenizer, vq=self.vq, prior=self.prior, renderer=self.renderer)

    def require(self, *names: str) -> None:
        """Raise DigitError unless the pipeline has the named parts (tokenizer, vq, prior, renderer)."""
        self._parts.require(*names)

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
        return self._parts.renders_pixels

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._parts.device

    @property
    def num_classes(self) -> int:
        """Classes that labels choose among; 0 where the pipeline is unconditional or has no model to sample first."""
        model = self.prior or self.renderer
        return model.cfg.num_classes if model is not None else 0

    @property
    def renderer_sees_labels(self) -> bool:
        """Whether the renderer was trained with labels, beside the discriminative tokens or in place of them."""
        return self.renderer is not None and self.renderer.cfg.num_classes > 0

    @property
    def guided_stages(self) -> list[str]:
        """The stages, of prior and renderer, that can sample with guidance (cfg_scale)."""
        models = {"prior": self.prior, "renderer": self.renderer}
        return [stage for stage, model in models.items() if model is not None and can_guide(model.cfg)]

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
        self._parts.to(choose_device(device))
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
        tokens, batch_size = tokenizer.encode(images).to(self.device), self.sized(self.sampling).batch_size
        assert batch_size is not None, "sized"
        return most_likely_classes(first, tokens, batch_size)

    def decode(self, vq_tokens: Integers, precision: Precision | None = None) -> UInt8[Tensor, "B 3 S S"]:
        """VQ tokens (B, M), of any integer type -> pixels (B, 3, H, W) uint8. Raises as `VQTokenizer.decode`.

        Precision bf16 is that of pipelines that sample in bf16, where the hardware has it; otherwise the VQ tokenizer's
        own holds.
        """
        in_bf16 = precision == "bf16" and hardware_precision("bf16", self.device) == "bf16"
        return self._require_vq().decode(vq_tokens, "bf16" if in_bf16 else None)

    def render(
        self, tokens: Integers, seed: int = 0, *, labels: Labels | None = None, **sampling: Any
    ) -> UInt8[Tensor, "B 3 S S"]:
        """Stage 2 alone: discriminative tokens (B, N), of any integer type -> (B, 3, H, W) uint8.

        `labels`, one for all or one for each, are of use to a renderer that was trained with them (`renderer.labels`);
        None gives no class.

        Raises DigitError for anything but integers and unknown labels, MismatchError for tokens that the renderer does
        not know.
        """
        if self.renders_pixels:
            request = self._token_request(tokens, seed, labels)
            return self._pixels(self.sample_request(request, self.sized(self.settings(**sampling))))
        rendered = self.render_tokens(tokens, seed, labels=labels, **sampling)
        return self.decode(rendered, self.settings(**sampling).precision)

    def rerender(
        self, images: Images, seed: int = 0, *, labels: Labels | None = None, **sampling: Any
    ) -> UInt8[Tensor, "B 3 S S"]:
        """Images (B, 3, S, S) rendered again from their own discriminative tokens, as `render` does.

        `labels`, one for all or one for each, are of use to a renderer that sees them; None takes for each image the
        class under which its tokens are most likely, where there is a prior to tell. Raises as `render`.
        """
        self.require("tokenizer")
        assert self.tokenizer is not None
        if labels is None and self.renderer_sees_labels and self.prior is not None:
            labels = ClassPositions(self.guess_labels(images).tolist())
        return self.render(self.tokenizer.encode(images), seed, labels=labels, **sampling)

    def render_tokens(
        self,
        tokens: Integers,
        seed: int = 0,
        *,
        labels: Labels | None = None,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> Int64[Tensor, "B M"]:
        """As `render`, before pixels: (B, N) -> VQ tokens (B, M) int64; `on_step` as in `stream`."""
        if self.renders_pixels:
            raise DigitError("this renderer goes straight to pixels, without VQ tokens: call render()")
        self.require("vq", "renderer")
        request = self._token_request(tokens, seed, labels)
        batches = self.sample_request(request, self.sized(self.settings(**sampling)), pixels=False, on_step=on_step)
        nothing = torch.empty(0, self._require_renderer().cfg.target_len, dtype=torch.int64)
        return torch.cat([nothing, *(batch.tokens["vq"] for batch in batches)])

    def _token_request(self, tokens: Integers, seed: int, labels: Labels | None = None) -> GenerationRequest:
        """Images of these discriminative tokens. Raises as `render`."""
        renderer = self._require_renderer().cfg
        if not renderer.prefix_len:
            raise DigitError("this pipeline is VQ-only: its renderer takes no discriminative tokens")
        tokens = as_tokens(
            tokens, vocab_size=renderer.prefix_vocab_size, num_tokens=renderer.prefix_len, owner="the renderer"
        )
        classes = torch.full((len(tokens),), -1) if labels is None else self.labels_of_each(tokens, labels)
        return GenerationRequest(seed=seed, labels=classes, discriminative=tokens)

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
        """Batches of images `start` .. `end - 1` of a request; tensors stay on the device until a batch is complete.

        `cfg` is one of `sized`.
        """
        renderer, end = self._require_renderer(), len(request.labels) if end is None else end
        generator = Generator(self.prior, renderer, self._samplers, self.decode if pixels else None)
        return generator.batches(request, cfg, start, end, on_step)

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
        if not self.num_classes:
            raise DigitError("labels were given, but this model is unconditional: leave them out")
        return class_positions(labels, self.classes, self.num_classes, self.knows_unlabelled)

    @property
    def knows_unlabelled(self) -> bool:
        """Whether the model was trained on images without a class: unlabelled ones, or classes dropped at random."""
        model = self.prior or self.renderer
        return (model is not None and model.cfg.label_dropout > 0) or bool(self.info.get("num_unlabelled"))

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
                self._parts.refuse_ignored(stage, list(given))
        return cfg

    def sized(self, cfg: SamplingConfig) -> SamplingConfig:
        """`cfg` as this device samples: in fp32 where it only emulates bf16, and with a batch size, its own or one that
        fits into the memory that is now free."""
        cfg = replace(cfg, precision=hardware_precision(cfg.precision, self.device))
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
        folder = as_path(folder)
        names = self._parts.save(folder)
        write_manifest(folder, names, self.preprocess, self.classes, self.sampling, self.info)
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
        card = Card(
            title=str(self.info.get("recipe") or "DiGIT pipeline"),
            image_size=self.image_size,
            classes=self.classes,
            num_classes=self.num_classes,
            parts=self._parts.described(),
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
            parts = Parts.read(folder, manifest["parts"])
            pipe = cls(
                **{name: getattr(parts, name) for name in PARTS},
                preprocess=PreprocessConfig(**manifest["preprocess"]),
                classes=manifest["classes"],
                sampling=read_sampling(manifest["sampling"]),
                info=manifest["info"],
            )
            return pipe.to(device)
        except (KeyError, TypeError, AttributeError) as error:
            raise DigitError(f"{folder / MANIFEST} is damaged ({error!r}): {MAKE_AGAIN}") from error


def vq_only_baseline(folder: str | Path, pipe: DigitPipeline) -> DigitPipeline | None:
    """The paper's VQ-only baseline of a run (`digit train vq_ar`), with the pipeline's VQGAN; None without one."""
    model = as_path(folder) / "vq_ar"
    if not (model / "model.json").is_file():
        return None
    renderer = load_sequence_model(model, "model").to(pipe.device)
    return DigitPipeline(vq=pipe.vq, renderer=renderer, preprocess=pipe.preprocess, classes=pipe.classes)
