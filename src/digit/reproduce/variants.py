"""Variants of a scale's recipe, and what they have in common: a part or a model that two need is made once.

A variant is a recipe of the scale by the name of its field: base, short, longer, large, compared. Its run makes the
parts (codebook, VQGAN, tokens) that its settings change, and takes the others from the base run. A model is decided by
its tokens, size, training and seed, and by the classes if it is given any: a renderer sees no class (ROLES), so that
Table 4 samples with Table 3's renderers.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

from digit.data.taken_tokens import crop_settings
from digit.reproduce.study import PARTS, Study, variant
from digit.runs.checks import unchanged_parts
from digit.runs.fit import Run
from digit.runs.layout import is_done
from digit.runs.recipes import Recipe
from digit.runs.roles import ROLES, get_role
from digit.runtime import distributed

Variant = Literal["base", "short", "longer", "large", "compared"]
OF_NO_MODEL = ("name", "sampling", "masked_top_p", "class_top_k", "max_bad_fraction")  # fields


def recipe_of(study: Study, name: Variant) -> Recipe:
    """The recipe of a variant, with the crops of the study."""
    if name == "base":
        return study.recipe
    recipe: Recipe = getattr(study.scale, name) or study.recipe
    return replace(recipe, name=study.recipe.name, crops_per_image=study.recipe.crops_per_image)


def changes_of(study: Study, name: Variant) -> dict[str, Any]:
    """The fields of the recipe in which a variant differs from the base, with the variant's values."""
    recipe, base = recipe_of(study, name), study.recipe
    named = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    return {field: value for field, value in named.items() if value != getattr(base, field)}


def shared_parts(study: Study, name: Variant) -> tuple[str, ...]:
    """The parts that a variant takes from the base run."""
    kept = unchanged_parts([f"recipe.{field}" for field in changes_of(study, name)])
    return tuple(part for part in PARTS if part in kept)


# -------------------------------------------------------------------- models


def home(study: Study, name: Variant, model: str, conditional: bool) -> tuple[Variant, bool]:
    """(variant, conditional) of the run that makes a model; other runs that need an equal one read it there."""
    made_by: Variant = "base" if same_model(study.recipe, recipe_of(study, name), model) else name
    return made_by, conditional and get_role(model).labels


def same_model(first: Recipe, second: Recipe, model: str) -> bool:
    """Whether two recipes give the same model, on equal data and with an equal seed."""

    def deciding(recipe: Recipe) -> list[Any]:
        roles = [get_role(name) for name in (model, *get_role(model).replaces)]
        whole = [getattr(recipe, field.name) for field in fields(recipe) if field.name not in (*OF_NO_MODEL, *OF_ROLES)]
        return whole + [(recipe.size(role), recipe.training(role)) for role in roles]

    return deciding(first) == deciding(second)


OF_ROLES = (  # fields that decide single models: `Recipe.size` and `Recipe.training` read them
    "prior", "prior_training", "renderer", "renderer_training", "renderer_kind", "masked_steps", "vq_only_steps",
    "pixels", "pixels_training", "class_conditional",
)  # fmt: skip


def model_name(study: Study, name: Variant, model: str, seed: int, conditional: bool) -> str:
    """Name of the step that trains a model; equal models have one name."""
    made_by, classes = home(study, name, model, conditional)
    return f"{run_name(made_by, seed, classes, model)}"


def run_name(name: Variant, seed: int, conditional: bool, what: str = "") -> str:
    """Name of a run or step: plain_0, large_class_prior_0."""
    return "_".join(part for part in ("" if name == "base" else name, variant(conditional), what, str(seed)) if part)


# -------------------------------------------------------------------- runs


def run_of(study: Study, name: Variant, seed: int, conditional: bool) -> Run:
    """The run of a variant with a seed, with or without classes; it reads parts and models that others have made."""
    if is_base(study, name, seed, conditional):
        return study.base
    reuse = own_parts(study, name) | made_elsewhere(study, name, seed, conditional)
    changes = changes_of(study, name) | {"seed": seed, "class_conditional": conditional}
    return study.run(run_name(name, seed, conditional), shared=shared_parts(study, name), reuse=reuse, **changes)


def made_elsewhere(study: Study, name: Variant, seed: int, conditional: bool) -> dict[str, Path]:
    """Folders of the finished models that another run makes; rank 0 looks, since a file may show late elsewhere."""
    homes = {model: home(study, name, model, conditional) for model in ROLES}
    folders = {
        model: folder_of(study, made_by, seed, classes) / model
        for model, (made_by, classes) in homes.items()
        if (made_by, classes) != (name, conditional)
    }
    done = distributed.on_main(lambda: [model for model, folder in folders.items() if is_done(folder, model)])
    return {model: folders[model] for model in done}


def is_base(study: Study, name: Variant, seed: int, conditional: bool) -> bool:
    """Whether the base run itself is meant."""
    return name == "base" and seed == study.recipe.seed and conditional == study.recipe.class_conditional


def folder_of(study: Study, name: Variant, seed: int, conditional: bool) -> Path:
    """Folder of `run_of`."""
    base = is_base(study, name, seed, conditional)
    return study.out / "runs" / ("base" if base else run_name(name, seed, conditional))


def own_parts(study: Study, name: Variant) -> dict[str, Path]:
    """Folders of the parts that a variant does not take from the base run; made here, once for all its seeds."""
    if not (own := made_parts(study, name)):
        return {}
    run = parts_run(study, name)
    run.write_tokens()
    return {part: run.reuse.get(part, run.out / part) for part in own}


def made_parts(study: Study, name: Variant) -> tuple[str, ...]:
    """The parts that a variant makes: of the base those that are not given, of others those that they do not share."""
    shared = study.reuse if name == "base" else shared_parts(study, name)
    return tuple(part for part in PARTS if part not in shared)


def links_vq_tokens(study: Study, recipe: Recipe, made: Sequence[str]) -> bool:
    """Whether a run beside the base run that makes some parts takes the VQ tokens of the base run (`Study.run`)."""
    base = study.recipe
    crops = [crop_settings(asdict(one.preprocess)) for one in (recipe, base)]
    equal = (recipe.seed, recipe.crops_per_image, crops[0]) == (base.seed, base.crops_per_image, crops[1])
    return "tokens" in made and "vqgan" not in made and equal


def parts_run(study: Study, name: Variant) -> Run:
    """The run that makes the parts of a variant, OUT/runs/NAME."""
    if name == "base":
        return study.base
    return study.run(name, shared=shared_parts(study, name), **changes_of(study, name))
