"""Rough estimates of the seconds of each kind of work in a reproduction: stages by `digit plan`, other work by rates
measured on two CPU cores and scaled to this machine's speed.

The estimates may be wrong by a factor of two; results record the true seconds beside each estimate.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from digit.metrics.probe import ProbeConfig
from digit.models.vqgan import VQGANConfig
from digit.planning.machines import Machine, this_machine
from digit.planning.stages import PARTS, VQ_TOKENS, Order, Planner
from digit.runs.checks import MIN_IMAGES
from digit.runs.recipes import Recipe
from digit.runs.roles import get_role
from digit.runtime import distributed

REFERENCE_FLOPS = 4e11  # bf16 FLOP/s of the machine of PER_SECOND: two cores of an AMD EPYC with AVX-512
PER_SECOND = {
    "judge": 250.0,
    "probe": 2500.0,
    "pretrain": 100.0,
}  # images of 64 px per second; time grows with the number of pixels
SHARED = ("judge",)  # work that all ranks share


class Costs:
    """Estimates for the ranks' machines and one recipe.

    Args:
        vqgan: sizes of a VQGAN that is given, in place of those of the recipes.
    """

    def __init__(self, recipe: Recipe, device: torch.device, vqgan: VQGANConfig | None = None):
        self.recipe, self.device, self.vqgan = recipe, device, vqgan
        self._planners: dict[tuple[Recipe, Order], Planner] = {}

    @cached_property
    def machine(self) -> Machine:
        """The machine that runs the work, as many times as there are ranks."""
        return replace(this_machine(self.device), count=distributed.world_size())

    def _planner(
        self, recipe: Recipe | None = None, made: Iterable[str] = (), linked: bool = False, **order: Any
    ) -> Planner:
        """The planner of a recipe that makes some parts, made once: a target asks for the same ones many times."""
        reuse = frozenset(PARTS).difference(made) | ({VQ_TOKENS} if linked else set())
        key = recipe or self.recipe, Order(**order, reuse=reuse)
        if key not in self._planners:
            given = {} if self.vqgan is None else {"vqgan": self.vqgan, "vqgan_start": "scratch"}
            self._planners[key] = Planner(replace(key[0], **given), self.machine, key[1], chosen=())
        return self._planners[key]

    def images(self, kind: str, count: int) -> float:
        """Seconds for `count` images in one kind of work: tokens, judge, probe or pretrain."""
        if kind == "tokens":
            images = max(MIN_IMAGES, count // self.recipe.crops_per_image)
            return self._planner(images=images).tokens().seconds
        pixels = (self.recipe.preprocess.image_size / 64) ** 2
        seconds = count * pixels / PER_SECOND[kind] * REFERENCE_FLOPS / self.machine.peaks["bf16"]
        return seconds / self.machine.count if kind in SHARED else seconds

    def parts(
        self, num_images: int, made: Sequence[str] = PARTS, recipe: Recipe | None = None, *, linked: bool = False
    ) -> float:
        """Seconds for those parts of a run that are made: codebook, VQGAN, tokens of every crop; linked: the VQ tokens
        are those of another store."""
        planner = self._planner(recipe, made, linked, images=num_images)
        stages = [planner.features(), planner.quantizer()] if "codebook" in made else []
        stages += [planner.vqgan()] if "vqgan" in made and planner.recipe.vqgan_training.num_steps else []
        stages += [planner.tokens()] if "tokens" in made else []
        return sum(stage.seconds for stage in stages)

    def model(self, name: str, recipe: Recipe | None = None) -> float:
        """Seconds to train one model; a VQ-only model takes as long as prior and renderer together (equal FLOPs)."""
        planner = self._planner(recipe)
        return sum(planner.training_seconds(part) for part in (get_role(name).replaces or (name,)))

    def sampling(
        self, count: int, models: Sequence[str] = ("prior", "renderer"), recipe: Recipe | None = None
    ) -> float:
        """Seconds to sample images with some models (names of ROLES, the renderer last), decode and judge them."""
        times = self._planner(recipe).sampling_times(count, models)
        return max(times.values()) + self.images("judge", count)

    def reconstruction(self, count: int) -> float:
        """Seconds to encode and decode `count` images with the VQGAN, and judge them."""
        return self._planner().decoding_seconds(count) + self.images("judge", count)

    def probe(self, cfg: ProbeConfig, rows: int, values: int, num_classes: int, model: str, recipe: Recipe) -> float:
        """Seconds for the features of a model's layers, `values` numbers of each image, and their classifiers."""
        planner = self._planner(recipe)
        forward = rows * planner.work.training_flops(model) / 3 / self.machine.rate("training")
        return forward + self.classifiers(cfg, rows, values, num_classes)

    def probe_itself(self, cfg: ProbeConfig, rows: int, values: int, num_classes: int) -> float:
        """As `probe`, for the encoder of the recipe: once to its layer of the tokens, once to its end."""
        encoder = self._planner().work.encoder
        return 2 * rows * encoder.flops / self.machine.rate(encoder.kind) + self.classifiers(
            cfg, rows, values, num_classes
        )

    def classifiers(self, cfg: ProbeConfig, rows: int, values: int, num_classes: int) -> float:
        """Seconds to train a probe's classifiers, on rank 0 alone.

        sgd: logits and the gradient, 4 FLOP for each value, class, setting, row and epoch, in float32.
        """
        if cfg.solver == "lbfgs":
            return self.images("probe", rows)
        settings = len(cfg.settings) + 1  # the sweep, then the chosen one on all rows
        flops = 4.0 * values * num_classes * settings * rows * cfg.num_epochs
        return flops / (self.machine.rate("nearest code") / self.machine.count)
