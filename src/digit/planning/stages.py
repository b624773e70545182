"""The stages of a recipe on a machine: memory per device, time, and the bottleneck."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, training_flops
from digit.pipeline.batch_size import choose_batch_size, sampling_bytes
from digit.planning.machines import CPU_SAMPLING, GPU_SAMPLING, KERNEL_SECONDS, KERNELS_PER_BLOCK, Kind, Machine
from digit.planning.memory import TrainingMemory, training_memory
from digit.planning.work import BlankVQ, Network, Work, blank_model, num_parameters
from digit.runs.checks import check_recipe, check_reuse, chosen_settings, vqgan_config
from digit.runs.judgement import OTHER_WAY_SECONDS, REFERENCE, ways_of
from digit.runs.recipes import Recipe
from digit.runs.report import num_judged, num_shown
from digit.runs.roles import get_role
from digit.runtime.hardware import Precision
from digit.runtime.settings import check_settings, flat, within
from digit.sampling.config import SamplingConfig, StageSampling, with_changes
from digit.tokenizers.base import FitCost
from digit.training.adversarial import AdversarialConfig
from digit.training.config import TrainConfig

IMAGENET_IMAGES = 1_281_167
IMAGENET_BYTES = 110e3  # mean size of its JPEGs
LABEL_BYTES, TOKEN_BYTES = 4, 2  # in the token store: int32 and uint16
ENCODING_BATCH = 64  # images
PARTS = ("codebook", "vqgan", "tokens")
VQ_TOKENS = "vq_tokens"  # of another store, which a new one links
# read even if it is reused
SIZE_OF_A_PART = re.compile(r"vqgan\..*|vqgan_start|([a-z]+_)?kmeans\.num_(clusters|levels)|crops_per_image")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of a plan."""

    name: str
    """Name of the stage, as in the run folder."""
    what: str
    """Amount of work: images, steps, parameters."""
    memory: float
    """Bytes on one device."""
    times: dict[str, float]
    """Seconds by what could limit the stage; they overlap, so the stage takes the longest of them."""
    advice: tuple[str, ...] = ()
    """Settings that would fit, if the stage does not."""

    @property
    def bottleneck(self) -> str:
        """What limits the stage: the longest of `times`."""
        return max(self.times, key=self.times.__getitem__)

    @property
    def seconds(self) -> float:
        """Seconds of the stage."""
        return self.times[self.bottleneck]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to plan, beside recipe and machine."""

    images: int = within("[1, 1_000_000_000_000]", IMAGENET_IMAGES)
    """Images of the data set."""
    samples: int = within("[0, 1_000_000_000_000]", 0)
    """Images sampled after the run, beside those of its report."""
    epochs: float | None = within("(0, 1_000_000]", None)
    """Passes of each model over the images, with one crop of each; None takes the recipe's number of steps."""
    num_classes: int = within("[0, 1_000_000_000]", 0)
    """Classes of the data, for a class-conditional recipe."""
    reuse: frozenset[str] = field(default_factory=frozenset)
    """Parts that exist already: codebook, vqgan, tokens; or vq_tokens alone."""

    def __post_init__(self) -> None:
        check_settings(self)
        if unknown := sorted(self.reuse - {*PARTS, VQ_TOKENS}):
            raise DigitError(f"reuse names {', '.join(unknown)}: choose among {', '.join((*PARTS, VQ_TOKENS))}")


class Planner:
    """Plans a recipe on a machine, stage by stage. Raises DigitError for whatever `digit fit` would refuse.

    Args:
        chosen: dotted names of the settings that somebody chose, as for `runs.fit.Run`.
        warn: whether to warn of what is allowed and seldom meant.
    """

    def __init__(
        self,
        recipe: Recipe,
        machine: Machine,
        order: Order,
        *,
        chosen: Sequence[str] | None = None,
        warn: bool = True,
    ) -> None:
        classes = order.num_classes if recipe.class_conditional else 0
        recipe = recipe if chosen and "crops_per_image" in chosen else recipe.without_equal_crops()
        self.recipe, self.machine, self.order = recipe, machine, order
        check_reuse(recipe, order.reuse)
        existing = order.reuse | ({"vqgan"} if recipe.published_vqgan else frozenset())  # fetched, not made
        sizes = {name: value for name, value in flat(recipe).items() if SIZE_OF_A_PART.fullmatch(name)}
        check_recipe(
            recipe,
            chosen=chosen_settings(recipe) if chosen is None else chosen,
            reuse=dict.fromkeys(existing - {VQ_TOKENS}, sizes),  # a plan knows of them what the recipe says
            vqgan=vqgan_config(recipe),
            num_images=order.images,
            num_classes=classes,
            num_processes=machine.count,
            gpu=machine.gpu,
            warn=warn,
        )
        self.work = Work(recipe, classes)

    @cached_property
    def stages(self) -> list[Stage]:
        """All stages, in order."""
        return list(self._stages())

    def _stages(self) -> Iterator[Stage]:
        reuse, recipe = self.order.reuse, self.recipe
        if "codebook" not in reuse:
            yield self.features()
            yield self.quantizer()
        if "vqgan" not in reuse and recipe.has_vqgan and recipe.vqgan_training.num_steps:
            yield self.vqgan()
        if "tokens" not in reuse:
            yield self.tokens()
        for name in recipe.model_names:
            yield self.training(name)
        yield self.sampling()
        yield self.report()

    # ---------------------------------------------------------------- pixels

    def _seconds(self, kind: Kind, flops: float) -> float:
        return flops / self.machine.rate(kind)

    def _decoding(self, images: float) -> dict[str, float]:
        """Seconds to decode JPEGs on all cores."""
        return {"JPEG decoding": images / self.machine.decoded}

    def _inference_memory(self, net: Network, maps: float) -> float:
        """Bytes of a float32 network with `maps` elements of feature maps."""
        return 4.0 * (net.weights + maps)

    @property
    def codebook_images(self) -> int:
        """Number of images that the codebook is fitted on."""
        least = math.ceil(self.recipe.quantizer_cfg.min_points / self.work.num_tokens)
        subset = math.ceil(self.recipe.codebook_subset * self.order.images)
        return min(self.order.images, max(subset, least))

    @property
    def fit_cost(self) -> FitCost:
        """What the fit of the quantizer takes."""
        return self.recipe.quantizer_cfg.cost(self.codebook_images * self.work.num_tokens, self.work.dim)

    def _encoder_memory(self) -> float:
        work = self.work
        per_token = 4 * work.dim  # the widest map: the feed-forward layer's
        return self._inference_memory(work.encoder, ENCODING_BATCH * work.num_tokens * per_token * 3)

    def features(self) -> Stage:
        """Encoder features of the codebook's images."""
        passes = self.fit_cost.num_passes
        images = self.codebook_images * passes
        times = {self.work.encoder.kind: self._seconds(self.work.encoder.kind, images * self.work.encoder.flops)}
        times["random sample"] = self.fit_cost.host_seconds / self.machine.count
        what = f"{count(self.codebook_images)} images" + (f", {passes} times" if passes > 1 else "")
        return Stage(name="features", what=what, memory=self._encoder_memory(), times=times | self._decoding(images))

    def quantizer(self) -> Stage:
        """The fit of the quantizer to the features."""
        cost = self.fit_cost
        what = f"{count(cost.num_points)} x {self.work.dim}, {cost.description}"
        times = {"matrix multiplication": self._seconds("k-means", cost.flops)}
        return Stage(name="codebook", what=what, memory=cost.memory_bytes, times=times)

    def vqgan(self) -> Stage:
        """Training of the VQGAN."""
        cfg, work = self.recipe.vqgan_training, self.work
        images = cfg.num_steps * cfg.batch_size
        times = {"vqgan training": self._seconds("vqgan training", images * work.vqgan_training_flops)}
        return Stage(
            name="vqgan",
            what=f"{count(cfg.num_steps)} steps of {cfg.batch_size}",
            memory=self._adversarial_memory(cfg, work.vq_encoder.weights + work.vq_decoder.weights, networks=2),
            times=times | self._decoding(min(images, self.order.images)),  # crops are cached
        )

    def _adversarial_memory(self, cfg: AdversarialConfig, weights: float, networks: int) -> float:
        """Bytes to train encoder and decoder (two networks), or a decoder alone, with so many weights in all."""
        rows = math.ceil(cfg.batch_size / self.machine.count)
        maps = rows * sum(self._network_maps()) * networks * (4 if cfg.precision == "fp32" else 2)
        return 4.0 * 5 * weights + maps  # weights, gradients, two moments, average

    def _network_maps(self) -> Iterator[float]:
        """Elements that one image's backward pass needs, per level of encoder or decoder."""
        cfg = self.work.vqgan
        for level, channels in enumerate(cfg.level_channels):
            side = cfg.resolution / 2**level
            # a residual block keeps its input, two norms (each before and after swish) and two convolutions' outputs
            yield (cfg.num_res_blocks + 1) * 6 * channels * side**2

    def tokens(self) -> Stage:
        """The tokens of every crop: both kinds, or the discriminative ones alone where nothing needs the others."""
        crops = self.order.images * self.recipe.crops_per_image
        kinds = ("discriminative", "vq") if self._makes_vq_tokens else ("discriminative",)
        times = {"encoding": self._encoding(crops, kinds)} | self._decoding(self.order.images)
        return Stage(name="tokens", what=f"{count(crops)} crops", memory=self._tokenizing_memory(), times=times)

    @property
    def _makes_vq_tokens(self) -> bool:
        """Whether the run makes VQ tokens: a model needs them, and no other store has them."""
        return self.recipe.has_vq_tokens and VQ_TOKENS not in self.order.reuse

    def _encoding(self, crops: float, kinds: Sequence[str]) -> float:
        """Seconds to turn crops into some kinds of tokens, without decoding."""
        work, seconds = self.work, 0.0
        if "discriminative" in kinds:
            seconds += self._seconds(work.encoder.kind, crops * work.encoder.flops)
            seconds += self._seconds("nearest code", crops * work.nearest_flops)
        if "vq" in kinds:
            seconds += self._seconds("convolutions", crops * work.vq_encoder.flops)
        return seconds

    def _tokenizing_memory(self) -> float:
        """Bytes of both tokenizers at work."""
        work = self.work
        maps = ENCODING_BATCH * 3 * work.vqgan.channels * work.vqgan.resolution**2 / 4  # 16 images at a time
        return self._encoder_memory() + self._inference_memory(work.vq_encoder, maps)

    @property
    def store_bytes(self) -> float:
        """Bytes of the token store on disk, without VQ tokens that are links."""
        vq_tokens = self.work.vqgan.num_tokens if self._makes_vq_tokens else 0
        row = TOKEN_BYTES * (self.work.num_tokens * self.work.num_levels + vq_tokens) + LABEL_BYTES
        return float(row * self.order.images * self.recipe.crops_per_image)

    # ---------------------------------------------------------------- models

    def training_config(self, name: str) -> TrainConfig | AdversarialConfig:
        """The recipe's training settings, with the number of steps that `epochs` takes if it is set."""
        cfg = self.recipe.training(get_role(name))
        if self.order.epochs is None:
            return cfg
        return replace(cfg, num_steps=max(1, math.ceil(self.order.epochs * self.order.images / cfg.batch_size)))

    def memory(self, name: str, training: TrainConfig) -> TrainingMemory:
        """Memory of a training step on one device."""
        cfg = self.work.sequence(name)
        devices = {"num_devices": self.machine.count, "gpu": self.machine.gpu}
        return training_memory(cfg, training, code_dim=self.work.code_dim(name), **devices)

    def training(self, name: str) -> Stage:
        """Training of one model."""
        cfg = self.training_config(name)
        if isinstance(cfg, AdversarialConfig):
            parameters = self.work.pixel_renderer.weights
            return Stage(
                name=name,
                what=f"{count(parameters)} parameters, {count(cfg.num_steps)} steps of {cfg.batch_size}",
                memory=self._adversarial_memory(cfg, parameters, networks=1) + self._beside,
                times=self.training_times(name),
            )
        memory = self.memory(name, cfg).peak + self._beside
        parameters = num_parameters(self.work.sequence(name))
        split = f" in {cfg.accumulate} micro-batches" if cfg.accumulate > 1 else ""
        return Stage(
            name=name,
            what=f"{count(parameters)} parameters, {count(cfg.num_steps)} steps of {cfg.batch_size}{split}",
            memory=memory,
            times=self.training_times(name),
            advice=self.make_fit(name, cfg) if memory > self.machine.usable else (),
        )

    @property
    def _beside(self) -> float:
        """Bytes on each device beside the training itself: the tokenizers, where they encode fresh crops."""
        return self._tokenizing_memory() if self.fresh else 0.0

    @property
    def fresh(self) -> bool:
        """Whether training encodes new crops."""
        return self.recipe.training_crops == "fresh"

    def training_seconds(self, name: str) -> float:
        """Seconds to train one sequence model."""
        return max(self.training_times(name).values())

    def training_times(self, name: str) -> dict[str, float]:
        """Seconds to train one sequence model, by what could limit it. Fresh crops are encoded between the steps, on
        the same devices, and decoded meanwhile on the CPU."""
        cfg = self.training_config(name)
        flops = self.work.training_flops(name) * cfg.num_steps * cfg.batch_size
        images = cfg.num_steps * cfg.batch_size
        if isinstance(cfg, AdversarialConfig):
            seconds, limit = self._seconds("vqgan training", flops), "vqgan training"
        else:
            flops *= 4 / 3 if cfg.checkpoint_activations else 1  # a second forward pass
            seconds, limit = self._seconds("training", flops), "matrix multiplication"
        if not self.fresh:
            crops = self._decoding(images) if limit == "vqgan training" else {}  # of every step; tokens are stored
            return {limit: seconds} | crops
        return {"training and encoding": seconds + self.encoding_seconds(name)} | self._decoding(images)

    def encoding_seconds(self, name: str) -> float:
        """Seconds of a model's training that encode fresh crops, one for each image seen, into its role's tokens."""
        cfg = self.training_config(name)
        return self._encoding(cfg.num_steps * cfg.batch_size, get_role(name).tokens) if self.fresh else 0.0

    def make_fit(self, name: str, cfg: TrainConfig) -> tuple[str, ...]:
        """Ways to make a batch fit: the fewest pieces, and activation checkpointing with the fewest."""
        section, fitting = f"--{get_role(name).settings}_training", []
        rows = cfg.batch_size // self.machine.count
        for checkpointing in {cfg.checkpoint_activations, True}:
            for accumulate in (n for n in divisors(rows) if n >= (1 if checkpointing else cfg.accumulate)):
                candidate = replace(cfg, accumulate=accumulate, checkpoint_activations=checkpointing)
                if (memory := self.memory(name, candidate).peak + self._beside) <= self.machine.usable:
                    settings = [f"{section}.accumulate {accumulate}"]
                    settings += [f"{section}.checkpoint_activations true"] if checkpointing else []
                    fitting.append(f"{name} fits with {' '.join(settings)}: {size(memory)}")
                    break
        if fitting:
            return tuple(fitting)
        least = self.memory(name, replace(cfg, accumulate=rows, checkpoint_activations=True))
        return (
            f"{name} does not fit with any number of micro-batches: one image takes {size(least.peak)}, "
            f"{size(least.weights)} of it weights and moments; choose a GPU with more memory or a smaller model",
        )

    # ---------------------------------------------------------------- sampling

    def sampling(self) -> Stage:
        """Token by token, then pixels: the images of the report, also with or without guidance, and further ones."""
        names, more = self.recipe.model_names, self.order.samples
        own, (which, other) = self.sampling_settings(names), self.other_way(names)
        batch, memory = self._sampled_together(names, own)
        shown, judged = num_shown(self.work.num_classes), num_judged(self.order.images)
        times = self.sampling_times(shown + judged + more, names, own)
        what = f"{count(shown + judged)} images of the report"
        if other is not None:
            beside = max(self.sampling_times(judged, names, own).values()) <= OTHER_WAY_SECONDS
            again = shown + judged * beside
            what += f", {count(again)} of them also {which}"
            for cause, seconds in self.sampling_times(again, names, other).items():
                times[cause] = times.get(cause, 0.0) + seconds
        what += f"{f', {count(more)} more' * bool(more)}, {batch} together, {own.precision}"
        return Stage(name="sampling", what=what, memory=memory, times=times)

    @property
    def ending_seconds(self) -> float:
        """Seconds of what `digit fit` does after its last model: samples, pictures and metrics."""
        return self.sampling().seconds + self.report().seconds

    def report(self) -> Stage:
        """Training pictures, samples and other real pictures through the network that judges them, and the decoder."""
        names, images = self.recipe.model_names, self.order.images
        reference, judged = min(REFERENCE, images), num_judged(images)
        _, other = self.other_way(names)
        sets = 3 + (other is not None)  # samples in one or two ways, real pictures and their reconstructions
        work = self.work
        straight = get_role(names[-1]).kind == "pixels"
        rebuilt = work.pixel_renderer.flops if straight else work.vq_encoder.flops + work.vq_decoder.flops
        times = {
            "judge": self._seconds(work.judge.kind, (reference + sets * judged) * work.judge.flops)
            + self._seconds("convolutions", judged * rebuilt)
        }
        what = f"{count(reference)} training pictures and {sets} sets of {count(judged)} judged"
        return Stage(name="report", what=what, memory=4.0 * work.judge.weights, times=times)

    def sampling_settings(self, names: Sequence[str]) -> SamplingConfig:
        """How the recipe samples some models here, the renderer last: with guidance where they are trained for it."""
        own = self.recipe.sampling_of(names[-1], labelled=bool(self.work.num_classes))
        return replace(own, precision=self.sampling_precision)

    @property
    def sampling_precision(self) -> Precision:
        """That of the recipe, but fp32 on a machine without bf16."""
        return self.recipe.sampling.precision if self.machine.bf16 else "fp32"

    def other_way(self, names: Sequence[str]) -> tuple[str, SamplingConfig | None]:
        """("with guidance" or "without guidance", settings) of the report's second samples, ("", None) for none."""
        own = self.sampling_settings(names)
        ways = ways_of(dict(zip(("prior", "renderer"), map(self.work.sequence, names), strict=True)), own)
        return ("", None) if ways is None else (ways.names[1], with_changes(own, ways.other))

    def sampling_times(
        self, samples: int, names: Sequence[str], sampling: SamplingConfig | None = None
    ) -> dict[str, float]:
        """Seconds to sample images with some models (names of ROLES, the renderer last), by what could limit it.

        `sampling` None takes the recipe's settings.
        """
        sampling = sampling or self.sampling_settings(names)
        batch, _ = self._sampled_together(names, sampling)
        totals: dict[str, float] = {}
        straight = get_role(names[-1]).kind == "pixels"
        for name in names[:-1] if straight else names:
            settings = getattr(sampling, get_role(name).settings)
            for cause, seconds in self.batch_seconds(self.work.sequence(name), settings, batch).items():
                totals[cause] = totals.get(cause, 0.0) + seconds
        batches = math.ceil(samples / batch / self.machine.count)
        decoder = self.work.pixel_renderer if straight else self.work.vq_decoder
        pixels = self._seconds("convolutions", samples * decoder.flops)
        return {cause: seconds * batches + pixels for cause, seconds in totals.items()}

    def _sampled_together(self, names: Sequence[str], sampling: SamplingConfig) -> tuple[int, float]:
        """(images in a batch, bytes) of a pipeline of some models."""
        work = self.work
        *priors, renderer = (self._stand_in(name) for name in names)
        prior, vq = (priors[0] if priors else None), BlankVQ(work.vqgan, self._device)
        weights = 4.0 * sum(num_parameters(work.sequence(name)) for name in names)
        if get_role(names[-1]).kind == "pixels":
            vq = None
        else:
            weights += 4.0 * work.vq_decoder.weights
        free = int(self.machine.usable - weights)
        batch = sampling.batch_size or choose_batch_size(prior, renderer, vq, sampling, free)
        return batch, weights + sampling_bytes(prior, renderer, vq, sampling, batch)

    def decoding_seconds(self, images: float) -> float:
        """Seconds to turn images into VQ tokens and back."""
        return self._seconds("convolutions", images * (self.work.vq_encoder.flops + self.work.vq_decoder.flops))

    @property
    def _device(self) -> torch.device:
        """Device that the plan's tensors would lie on."""
        return torch.device("cuda" if self.machine.gpu else "cpu")

    def _stand_in(self, name: str) -> Any:
        """What the estimate of sampling's memory looks at of a model; there may be no GPU here to put a tensor on."""
        cfg = self.work.sequence(name)
        parameters = blank_model(cfg).parameters
        return SimpleNamespace(cfg=cfg, device=self._device, dtype=torch.float32, parameters=parameters)

    def batch_seconds(self, cfg: SequenceConfig, sampling: StageSampling, batch: int) -> dict[str, float]:
        """Seconds to sample one batch of tokens on one device, by what could limit it."""
        machine, width = self.machine, 4 if self.sampling_precision == "fp32" else 2  # bytes
        share = GPU_SAMPLING if machine.gpu else CPU_SAMPLING
        rows = batch * (2 if sampling.cfg_scale != 1 else 1)
        peak = machine.peaks["fp32" if width == 4 and machine.gpu else "bf16"] * share
        forward = training_flops(cfg) / 3 * rows  # a forward pass is a third of a training step
        if cfg.masked:
            return {"matrix multiplication": sampling.num_steps * forward / peak}
        matrices = 12.0 * cfg.depth * cfg.embed_dim**2 + cfg.embed_dim * cfg.vocab_size
        matrices += (cfg.levels - 1) * (4.0 * cfg.embed_dim**2 + cfg.embed_dim * cfg.vocab_size)  # `models/depth.py`
        cache = (
            2.0 * cfg.depth * rows * (cfg.start_position + cfg.target_places / 2) * cfg.embed_dim
        )  # keys and values, mean over positions
        read = cfg.target_places * (matrices + cache) * width  # bytes: all weights and the cache so far, for each token
        times = {"matrix multiplication": forward / peak, "memory bandwidth": read / (machine.bandwidth * share)}
        if machine.gpu:
            times["kernel launches"] = cfg.target_places * cfg.depth * KERNELS_PER_BLOCK * KERNEL_SECONDS
        return times


def divisors(number: int) -> list[int]:
    """Divisors of a number, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def count(number: float) -> str:
    """Formats 1,281,167 as 1.28 M."""
    for unit, name in ((1e9, " G"), (1e6, " M")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:,.0f}"


def size(number: float) -> str:
    """Formats bytes in KiB, MiB, GiB, TiB or PiB."""
    for power, name in ((50, "PiB"), (40, "TiB"), (30, "GiB")):
        if number >= 2**power:
            return f"{number / 2**power:.1f} {name}"
    return f"{number / 2**20:.0f} MiB" if number >= 2**20 else f"{number / 2**10:.0f} KiB"
