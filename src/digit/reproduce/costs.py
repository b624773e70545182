"""Rough estimates of the seconds of each kind of work in a reproduction: stages by `digit plan`, other work by rates
measured on two CPU cores and scaled to this machine's speed.

The estimates may be wrong by a factor of two; results record the true seconds beside each estimate.
"""

from functools import cached_property
from typing import Any

import torch

from digit.planning.machines import Machine, this_machine
from digit.planning.stages import Order, Planner
from digit.runs.checks import MIN_IMAGES
from digit.runs.recipes import Recipe
from digit.runs.roles import get_role

REFERENCE_FLOPS = 4e11  # bf16 FLOP/s of the machine of PER_SECOND: two cores of an AMD EPYC with AVX-512
PER_SECOND = {
    "judge": 250.0,
    "probe": 2500.0,
    "pretrain": 100.0,
}  # images of 64 px per second; time grows with the number of pixels


class Costs:
    """Estimates for one machine and one recipe."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self._planners: dict[tuple[Recipe, Order], Planner] = {}

    @cached_property
    def machine(self) -> Machine:
        """The machine that runs the work."""
        return this_machine(self.device)

    def _planner(self, recipe: Recipe | None = None, **order: Any) -> Planner:
        """The planner of a recipe and an order, made once: a target asks for the same ones many times."""
        key = recipe or self.recipe, Order(**order)
        if key not in self._planners:
            self._planners[key] = Planner(key[0], self.machine, key[1], chosen=())
        return self._planners[key]

    def images(self, kind: str, count: int) -> float:
        """Seconds for `count` images in one kind of work: tokens, judge, probe or pretrain."""
        if kind == "tokens":
            return self._tokens(count)
        pixels = (self.recipe.preprocess.image_size / 64) ** 2
        return count * pixels / PER_SECOND[kind] * REFERENCE_FLOPS / self.machine.peaks["bf16"]

    def _tokens(self, crops: int) -> float:
        """Seconds for both kinds of tokens of `crops` crops."""
        images = max(MIN_IMAGES, crops // self.recipe.crops_per_image)
        return self._planner(images=images, reuse=frozenset({"codebook", "vqgan"})).tokens().seconds

    def parts(self, num_images: int, num_rows: int) -> float:
        """Seconds for codebook, VQGAN and tokens."""
        planner = self._planner(images=num_images)
        stages = (planner.features(), planner.quantizer(), planner.vqgan())
        return sum(stage.seconds for stage in stages) + self._tokens(num_rows)

    def model(self, name: str, recipe: Recipe | None = None) -> float:
        """Seconds to train one model; a VQ-only model takes as long as prior and renderer together (equal FLOPs)."""
        planner = self._planner(recipe)
        return sum(planner.training_seconds(part) for part in (get_role(name).replaces or (name,)))

    def sampling(self, count: int) -> float:
        """Seconds to sample, decode and judge `count` images."""
        return self._planner(samples=count).sampling().seconds + self.images("judge", count)
