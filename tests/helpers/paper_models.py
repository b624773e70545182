"""Configurations of the paper's models, by role and recipe, on 256 tokens of each kind."""

from dataclasses import replace

from digit.models.sequence import SequenceConfig
from digit.runs.recipes import Recipe, TokenSpace, digit_base


def paper_config(role: str, recipe: Recipe | None = None, **changes) -> SequenceConfig:
    """As the recipe says (by default the base one); `changes` go to the configuration."""
    recipe = recipe or digit_base()
    tokens = {"discriminative": TokenSpace(recipe.quantizer_cfg.vocab_size, 256), "vq": TokenSpace(1024, 256)}
    return replace(recipe.sequence_config(role, tokens, num_classes=0), **changes)
