"""Runs whose VQGAN gives several codes a cell: renderer, completion, variation, folder, report, plan, checks."""

from dataclasses import replace

import pytest
import torch
from tiny import SHAPES, tiny_recipe

from digit.data.images import open_source
from digit.errors import DigitError
from digit.models.tokenizer import first_level_vectors
from digit.pipeline.cells import fill_cells
from digit.pipeline.export import export_pipeline
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.variations import vary
from digit.planning.work import Work
from digit.runs.checks import check_levels, check_sizes, check_training, unused_settings, vqgan_config
from digit.runs.fit import Run, fit
from digit.runs.report import usage
from digit.runs.report_page import describe
from digit.runtime.settings import refuse_unused


def of_levels(**changes):
    recipe = tiny_recipe(informed_start=True, **changes)
    return replace(
        recipe, vqgan=replace(recipe.vqgan, num_levels=2), renderer=replace(recipe.renderer, conditioning="aligned")
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    recipe = of_levels()
    training = replace(recipe.renderer_training, input_noise=0.2, input_noise_codes="near", next_code_weight=1.0)
    recipe = replace(recipe, renderer_training=training, validation_fraction=0.2)
    run = Run(recipe, open_source(SHAPES), tmp_path_factory.mktemp("vq_levels"))
    return run, fit(run)


def test_what_a_run_makes(fitted):
    run, pipe = fitted
    cells = pipe.vq.grid[0] * pipe.vq.grid[1]
    assert pipe.vq.num_levels == 2 and run.write_tokens().vq.shape == (24, 2 * cells)
    cfg = pipe.renderer.cfg
    assert (cfg.levels, cfg.target_len, cfg.target_places) == (2, 2 * cells, cells)
    log = (run.out / "renderer" / "log.jsonl").read_text()
    assert '"nll_0"' in log and '"nll_1"' in log and '"val_nll"' in log
    assert f"{pipe.vq.vocab_size} codes of 2 levels on" in describe(pipe)
    images = pipe.generate(3, seed=1)
    tokens = pipe.vq.encode(images)
    used = [len(tokens[:, level::2].unique()) for level in range(2)]
    assert usage(pipe.vq, images) == sum(used) / (2 * pipe.vq.vocab_size)
    assert first_level_vectors(pipe.vq).shape == (pipe.vq.vocab_size, pipe.vq.vqgan.cfg.z_channels)


def test_images_completions_and_the_folder(fitted, tmp_path):
    run, pipe = fitted
    images, tokens = pipe.generate(3, seed=1), pipe.generate_tokens(3, seed=1)
    assert tokens["vq"].shape == (3, 32) and torch.equal(pipe.decode(tokens["vq"]), images)
    again = DigitPipeline.from_pretrained(run.out)
    assert torch.equal(again.generate(3, seed=1), images)
    own = pipe.vq.encode(images[:1]).view(1, 16, 2)
    filled = fill_cells(pipe, images[:1], torch.tensor([[True, False], [False, False]]), num=2)
    kept = [0, 1, 4, 5]
    assert torch.equal(filled.vq.view(2, 16, 2)[:, kept], own[:, kept].expand(2, -1, -1))
    assert pipe.complete(images, keep=0.5).shape == images.shape
    assert vary(pipe, images[:1], num=2, keep_vq=0.5).shape == (2, 3, 32, 32)
    with pytest.raises(DigitError, match="predicts 2 codes at each position, which are not exported yet"):
        export_pipeline(pipe, tmp_path / "exported")


def test_the_plan_counts_all_levels():
    work = Work(of_levels(), num_classes=3)
    cfg = work.sequence("renderer")
    assert (cfg.levels, cfg.target_len) == (2, 2 * cfg.target_places)


def test_what_cannot_work_is_refused(unchecked):
    recipe = of_levels()
    with pytest.raises(DigitError, match="2 codes a cell .*, and the masked model renderer_masked predicts one"):
        check_sizes(replace(recipe, renderer_kind="masked"), recipe.vqgan, 3)
    with pytest.raises(DigitError, match="the masked model vq_masked predicts one"):
        check_levels("vq_masked", recipe.vqgan)
    check_sizes(replace(recipe, renderer_kind="masked"), replace(recipe.vqgan, num_levels=1), 3)  # a reused one
    carried = replace(recipe, vqgan_start="vqgan64", preprocess=replace(recipe.preprocess, image_size=128))
    cfg = vqgan_config(carried)
    assert (cfg.num_levels, cfg.vocab_size, cfg.grid) == (2, 1024, (16, 16))
    untrained = replace(carried, vqgan_training=replace(carried.vqgan_training, num_steps=0))
    with pytest.raises(DigitError, match="the carried VQGAN has one level, and training gives codes to the others"):
        check_training(untrained, (), 1, False)
    refuse_unused(carried, ["vqgan.num_levels"], unused_settings(carried))
    with pytest.raises(DigitError, match="has sizes of its own"):
        refuse_unused(carried, ["vqgan.vocab_size"], unused_settings(carried))
    with pytest.raises(DigitError, match="it is of VQ tokens, and renderer_kind is pixels"):
        pixels = replace(recipe, renderer_kind="pixels")
        refuse_unused(pixels, ["vqgan.num_levels"], unused_settings(pixels))
