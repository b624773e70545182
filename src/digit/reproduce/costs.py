"""Rough seconds of each kind of work in a reproduction, before it runs: the stages as `digit plan` sees them, and rates
of the work around them, seen on two CPU cores, by this machine's speed.

Expect to be wrong by a factor of two; the true seconds are kept beside every estimate.
"""

from functools import cached_property

import torch

from digit.planning.machines import Machine, this_machine
from digit.planning.stages import Order, Planner
from digit.runs.recipes import Recipe
from digit.runs.roles import get_role

REFERENCE_FLOPS = 4e11  # bf16 products a second of the machine of the rates: two cores of an AMD EPYC with AVX-512
PER_SECOND = {"judge": 250.0, "probe": 2500.0, "pretrain": 100.0}  # images of 64 px; they grow with the pixels


class Costs:
    """Estimates for one machine and one recipe."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device

    @cached_property
    def machine(self) -> Machine:
        """Where the work runs."""
        return this_machine(self.device)

    def _planner(self, recipe: Recipe | None = None, **order: int) -> Planner:
        return Planner(recipe or self.recipe, self.machine, Order(**order))

    def images(self, kind: str, count: int) -> float:
        """Seconds for so many images of one kind of work: tokens, judge, probe or pretrain."""
        if kind == "tokens":
            return self._tokens(count)
        pixels = (self.recipe.preprocess.image_size / 64) ** 2
        return count * pixels / PER_SECOND[kind] * REFERENCE_FLOPS / self.machine.peaks["bf16"]

    def _tokens(self, crops: int) -> float:
        """Both kinds of tokens of so many crops."""
        return self._planner(images=max(1, crops // self.recipe.crops_per_image)).tokens().seconds

    def parts(self, num_images: int, num_rows: int) -> float:
        """Codebook, VQGAN and tokens."""
        planner = self._planner(images=num_images)
        made = (planner.features(), planner.quantizer(), planner.vqgan())
        return sum(stage.seconds for stage in made) + self._tokens(num_rows)

    def model(self, name: str, recipe: Recipe | None = None) -> float:
        """Training of one model; a VQ-only model trains as long as prior and renderer together (equal FLOPs)."""
        planner = self._planner(recipe)
        return sum(planner.training_seconds(part) for part in (get_role(name).replaces or (name,)))

    def drawn(self, count: int) -> float:
        """Drawing, decoding and judging."""
        return self._planner(samples=count).sampling().seconds + self.images("judge", count)
