"""Rough seconds of each kind of work, for plans: counts times rates seen on two CPU cores, by this machine's speed.

The rates are of 64-pixel pipelines and grow with the pixels; training goes by its floating-point operations. Expect to
be wrong by a factor of two; the true seconds are kept beside every estimate.
"""

from functools import cached_property

import torch

from digit.machine import matmul_flops
from digit.models.sequence import SequenceConfig, training_flops
from digit.recipes import Recipe

REFERENCE_FLOPS = 4e11  # bf16 products a second of the machine of the rates: two cores of an AMD EPYC with AVX-512
TRAINING_EFFICIENCY = 0.5  # of that, when small models are trained
PER_SECOND = {  # images of 64 px
    "features": 350.0,
    "tokens": 180.0,
    "vqgan": 57.0,
    "draw": 130.0,
    "judge": 250.0,
    "probe": 2500.0,
    "pretrain": 100.0,
}


class Costs:
    """Estimates for one machine and one recipe."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device

    @cached_property
    def speed(self) -> float:
        """This machine's, the reference's being 1."""
        return matmul_flops(self.device) / REFERENCE_FLOPS

    def images(self, kind: str, count: float) -> float:
        """Seconds for so many images of one kind of work."""
        pixels = (self.recipe.preprocess.image_size / 64) ** 2
        return count * pixels / PER_SECOND[kind] / self.speed

    def parts(self, num_images: int, num_rows: int) -> float:
        """Codebook, VQGAN and tokens."""
        training = self.recipe.vqgan_training
        return (
            self.images("features", self.recipe.codebook_subset * num_images)
            + self.images("vqgan", training.num_steps * training.batch_size)
            + self.images("tokens", num_rows)
        )

    def model(self, name: str, recipe: Recipe | None = None) -> float:
        """Training of one model; a VQ-only model trains as long as prior and renderer together (equal FLOPs)."""
        recipe = recipe or self.recipe
        flops = 0.0
        for part in ("prior", "renderer") if name.startswith("vq") else (name,):
            training = recipe.prior_training if part == "prior" else recipe.renderer_training
            flops += training_flops(self._sizes(recipe, part)) * training.num_steps * training.batch_size
        return flops / (REFERENCE_FLOPS * self.speed * TRAINING_EFFICIENCY)

    def _sizes(self, recipe: Recipe, model: str) -> SequenceConfig:
        """A model's configuration, with token counts as the recipe lets expect them."""
        side = recipe.preprocess.image_size
        disc = 16 if recipe.encoder.name.startswith("efficientnet") else 256
        return recipe.sequence_config(
            model,
            disc_vocab=recipe.kmeans.num_clusters,
            disc_len=disc,
            vq_vocab=1024,
            vq_len=(side // (16 if side >= 256 else 8)) ** 2,
            num_classes=0,
        )

    def drawn(self, count: int) -> float:
        """Drawing, decoding and judging."""
        return self.images("draw", count) + self.images("judge", count)
