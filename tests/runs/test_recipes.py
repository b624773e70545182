"""Every recipe builds; the paper's two have the paper's sizes."""

import pytest
import torch
from paper_models import paper_config

from digit.errors import DigitError
from digit.models.sequence import SequenceModel
from digit.runs.recipes import RECIPES, TokenSpace, digit_base, digit_large, get_recipe
from digit.runs.roles import ROLES
from digit.sampling.kinds import get_kind

TOKENS = {"discriminative": TokenSpace(512, 64), "vq": TokenSpace(1024, 64)}


@pytest.mark.parametrize(("recipe", "millions"), [(digit_base, 219), (digit_large, 732)])
def test_sizes_of_the_paper(recipe, millions):
    with torch.device("meta"):
        model = SequenceModel(paper_config("prior", recipe()))
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - millions) <= 0.01 * millions


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_builds_every_model(name):
    recipe = get_recipe(name)
    assert recipe.name == name
    for model in ROLES:
        cfg = recipe.sequence_config(model, TOKENS, num_classes=10)
        with torch.device("meta"):
            get_kind(cfg.kind).model(cfg)


def test_every_recipe_shows_its_command():
    for name, recipe in RECIPES.items():
        assert f"--recipe {name} --out" in recipe.__doc__


def test_unknown_names_are_listed():
    with pytest.raises(DigitError, match=r"no recipe named huge: choose one of cifar, cifar_pixels, demo"):
        get_recipe("huge")
    with pytest.raises(DigitError, match=r"no model named decoder"):
        digit_base().sequence_config("decoder", TOKENS, num_classes=0)
