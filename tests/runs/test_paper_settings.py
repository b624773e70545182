"""The paper's values, each with its place in the paper, against what a run of the paper's recipes would truly use."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from paper_models import paper_config

from digit.errors import DigitError
from digit.models.sequence import SequenceModel, training_flops
from digit.runs.checks import check_recipe, unused_settings, vqgan_config
from digit.runs.recipes import Recipe, digit_base, digit_large
from digit.runs.roles import get_role
from digit.runtime.settings import refuse_unused
from digit.training.optim import learning_rate_at

IMAGES = 1_281_167  # training images of ImageNet-1k
RECIPES = {"base": digit_base, "large": digit_large}
EPOCHS = [  # (where, recipe, model, epochs)
    ("A.3", "base", "prior", 200),
    ("A.3, Table 3 (9.13)", "base", "renderer", 400),
    ("Table 3 (9.04)", "base", "renderer_masked", 200),
    ("Table 3 (24.38)", "base", "vq_ar_epochs", 200),
    ("A.3", "large", "prior", 200),
    ("A.3, Table 3 (4.59)", "large", "renderer", 200),
]
TRAINING = [  # (where, recipe, setting of every model, value)
    ("A.3", "base", "batch_size", 2048),
    ("A.3", "large", "batch_size", 1024),
    ("A.3", "both", "learning_rate", 3e-4),
    ("A.3", "both", "betas", (0.9, 0.98)),
    ("A.3", "both", "schedule", "inverse_sqrt"),
    ("A.3: 10 epochs", "base", "warmup_steps", 6250),
    ("A.3: 10 epochs", "large", "warmup_steps", 12_500),
    ("released code", "both", "weight_decay", 0.01),
    ("released code", "both", "label_smoothing", 0.1),
    ("released code", "both", "max_norm", 1.0),
    ("released code", "both", "warmup_from", 1e-7),
]
SHAPES = [  # (where, recipe, depth, width, heads, millions)
    ("A.3, Table 2", "base", 16, 1024, 16, 219),
    ("A.3, Table 2", "large", 24, 1536, 16, 732),
]
SAMPLING = [  # (where, recipe, renderer, labelled, stage, setting, value)
    ("A.3", "base", "renderer", False, "prior", "top_k", 200),
    ("A.3", "large", "renderer", False, "prior", "top_k", 400),
    ("released script", "base", "renderer", True, "prior", "top_k", 300),
    ("released script", "large", "renderer", True, "prior", "top_k", 300),
    ("A.3", "both", "renderer", False, "renderer", "top_p", 0.8),
    ("A.3", "both", "renderer", False, "renderer", "temperature", 1.0),
    ("A.3", "both", "vq_ar_epochs", False, "renderer", "top_p", 0.8),
    ("released code", "both", "renderer_masked", False, "renderer", "top_p", 1.0),
    ("released code", "both", "vq_masked", False, "renderer", "top_p", 1.0),
    ("released code", "both", "renderer_masked", False, "renderer", "top_k", 0),
    ("released code", "both", "renderer_masked", False, "renderer", "num_steps", 8),
    ("released code", "both", "renderer_masked", False, "renderer", "choice_temperature", 4.5),
]
TOKENS = [  # (where, recipe, setting, value)
    ("4.1", "base", "kmeans.num_clusters", 8192),
    ("4.1", "large", "kmeans.num_clusters", 16_000),
    ("4.1: 10%", "both", "codebook_subset", 0.1),
    ("faiss's default", "both", "kmeans.num_iterations", 20),
    ("faiss's default", "both", "kmeans.max_points_per_centroid", 256),
    ("faiss's default", "both", "kmeans.init", "random"),
    ("faiss: no early stop", "both", "kmeans.tolerance", 0.0),
    ("released code", "both", "codebook_path", "released_kmeans"),
    ("A.3: third-to-last", "both", "encoder.layer", None),
    ("4.1", "both", "encoder.name", "dinov2_vitb14_reg4"),
    ("released code", "both", "encoder.input_size", 224),
    ("4.3", "both", "preprocess.image_size", 256),
    ("A.3", "both", "preprocess.random_crop", True),
    ("A.3", "both", "preprocess.flip", True),
]


def recipes(name: str) -> list[Recipe]:
    return [make() for key, make in RECIPES.items() if name in (key, "both")]


@pytest.mark.parametrize(("where", "recipe", "model", "epochs"), EPOCHS)
def test_epochs(where, recipe, model, epochs):
    cfg = RECIPES[recipe]().training(get_role(model))
    assert cfg.num_steps * cfg.batch_size / IMAGES == pytest.approx(epochs, rel=2e-3), where


@pytest.mark.parametrize(("where", "recipe", "setting", "value"), TRAINING)
def test_training(where, recipe, setting, value):
    for one in recipes(recipe):
        for model in ("prior", "renderer", "renderer_masked", "vq_ar", "vq_ar_epochs"):
            assert getattr(one.training(get_role(model)), setting) == value, (where, model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_learning_rate_peaks_after_ten_epochs_and_decays_with_the_root(recipe):
    cfg = RECIPES[recipe]().prior_training
    assert learning_rate_at(cfg.warmup_steps, cfg) == pytest.approx(3e-4, rel=1e-3)
    assert learning_rate_at(4 * cfg.warmup_steps, cfg) == pytest.approx(1.5e-4, rel=1e-3)
    assert cfg.warmup_steps * cfg.batch_size / IMAGES == pytest.approx(10, rel=2e-3)


@pytest.mark.parametrize(("where", "recipe", "depth", "width", "heads", "millions"), SHAPES)
def test_shapes_and_parameters(where, recipe, depth, width, heads, millions):
    for model in ("prior", "renderer"):
        cfg = paper_config(model, RECIPES[recipe]())
        assert (cfg.depth, cfg.embed_dim, cfg.num_heads, cfg.dropout) == (depth, width, heads, 0.1), where
    with torch.device("meta"):
        prior = SequenceModel(paper_config("prior", RECIPES[recipe]()))
    assert prior.transformer.blocks[0].mlp.fc1.out_features == 4 * width, where
    assert sum(p.numel() for p in prior.parameters()) / 1e6 == pytest.approx(millions, rel=5e-3), where


@pytest.mark.parametrize(("where", "recipe", "renderer", "labelled", "stage", "setting", "value"), SAMPLING)
def test_sampling(where, recipe, renderer, labelled, stage, setting, value):
    for one in recipes(recipe):
        sampling = one.sampling_of(renderer, labelled=labelled)
        assert getattr(getattr(sampling, stage), setting) == value, where
        assert sampling.precision == "bf16"


@pytest.mark.parametrize(("where", "recipe", "setting", "value"), TOKENS)
def test_tokens(where, recipe, setting, value):
    for found in recipes(recipe):
        for name in setting.split("."):
            found = getattr(found, name)
        assert found == value, where


def test_no_guidance_in_the_paper():
    for recipe in recipes("both"):
        for stage in (recipe.sampling.prior, recipe.sampling.renderer):
            assert stage.cfg_scale == 1 and stage.temperature == 1
        assert not recipe.prior.label_dropout and not recipe.renderer.prefix_dropout


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("changes", [{}, {"renderer_kind": "masked"}, {"class_conditional": True}])
def test_the_recipes_can_run(name, changes):
    recipe = replace(RECIPES[name](), **changes)
    request = dict(reuse={"vqgan": {}}, num_images=IMAGES, num_classes=1000, num_processes=8, gpu=True)
    check_recipe(recipe, chosen=(), vqgan=vqgan_config(recipe), **request)
    masked, used = recipe.renderer_kind == "masked", set()
    for setting in ("masked_steps", "masked_top_p", "class_top_k", "sampling.renderer.top_p"):
        with suppress(DigitError):
            refuse_unused(recipe, [setting], unused_settings(recipe))
            used.add(setting)
    assert used == {
        *(("masked_steps", "masked_top_p") if masked else ("sampling.renderer.top_p",)),
        *(("class_top_k",) if recipe.class_conditional else ()),
    }


def test_the_two_baselines_are_equal_in_epochs_and_in_compute():
    """vq_ar_epochs has the paper's 200 epochs; vq_ar as many updates as prior and renderer cost together."""
    recipe = digit_base()
    flops = {name: training_flops(paper_config(name, recipe)) for name in ("prior", "renderer", "vq_ar")}
    both = sum(flops[name] * recipe.training(get_role(name)).num_steps for name in ("prior", "renderer"))
    assert both / flops["vq_ar"] > 4 * recipe.training(get_role("vq_ar_epochs")).num_steps
