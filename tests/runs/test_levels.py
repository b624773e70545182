"""Runs whose codebook gives several codes for each feature: every renderer, completion, folder, report, checks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import SHAPES, pixel_recipe, tiny_recipe

from digit.data.images import open_source
from digit.errors import DigitError
from digit.metrics.stability import StabilityConfig, measure_stability
from digit.models.tokenizer import first_level_vectors
from digit.pipeline.cells import fill_cells
from digit.pipeline.export import export_pipeline
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.variations import interpolate, vary
from digit.runs.batches import NoisyPrefix
from digit.runs.checks import check_codebook, check_sizes, unused_settings
from digit.runs.fit import Run, fit, near_codes
from digit.runs.report import write_token_map
from digit.runs.report_page import describe
from digit.runtime.files import read_json
from digit.runtime.settings import refuse_unused
from digit.tokenizers.kmeans.config import ProductKMeansConfig, ResidualKMeansConfig

RESIDUAL = dict(
    quantizer="residual_kmeans",
    residual_kmeans=ResidualKMeansConfig(num_clusters=6, num_levels=2, num_iterations=3),
    informed_start=True,
)
PRODUCT = dict(
    quantizer="product_kmeans",
    product_kmeans=ProductKMeansConfig(num_clusters=5, num_levels=3, num_iterations=3, pca=6, whiten=True),
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    recipe = tiny_recipe(**RESIDUAL)
    recipe = replace(recipe, renderer=replace(recipe.renderer, conditioning="aligned", prefix_noise=0.5))
    run = Run(replace(recipe, validation_fraction=0.2), open_source(SHAPES), tmp_path_factory.mktemp("residual"))
    return run, fit(run)


def test_what_a_run_makes(fitted):
    run, pipe = fitted
    store = run.write_tokens()
    assert store.discriminative.shape == (24, 8) and int(np.array(store.discriminative).max()) < 6
    prior, renderer = pipe.prior.cfg, pipe.renderer.cfg
    assert (prior.levels, prior.target_len, prior.vocab_size) == (2, 8, 6)
    assert (renderer.prefix_levels, renderer.prefix_len, renderer.levels, renderer.aligned) == (2, 8, 1, True)
    log = (run.out / "prior" / "log.jsonl").read_text()
    assert '"nll_0"' in log and '"nll_1"' in log and '"val_nll"' in log
    about = read_json(run.out / "codebook" / "codebook.json")
    assert about["quantizer"] == "residual_kmeans" and 0 < about["quality"]["quantization_error"] < 1
    assert "6 codes of 2 levels on 2 x 2 cells" in describe(pipe)


def test_images_completions_and_the_folder(fitted, tmp_path):
    run, pipe = fitted
    images = pipe.generate(3, seed=1)
    tokens = pipe.generate_tokens(3, seed=1)
    assert tokens["discriminative"].shape == (3, 8) and tokens["vq"].shape == (3, 16)
    assert torch.equal(pipe.render(tokens["discriminative"], seed=1), images)
    again = DigitPipeline.from_pretrained(run.out)
    assert torch.equal(again.generate(3, seed=1), images)
    done = pipe.complete(images, keep=0.5)
    assert done.shape == images.shape
    own = pipe.tokenizer.encode(images[:1])
    filled = fill_cells(pipe, images[:1], torch.tensor([[True, False], [False, True]]), num=2)
    kept = filled.discriminative.view(2, 4, 2)[:, [0, 3]]
    assert torch.equal(kept, own.view(1, 4, 2)[:, [0, 3]].expand(2, -1, -1))
    assert pipe.guess_labels(images).shape == (3,)
    assert vary(pipe, images[:1], num=2, keep_discriminative=0.5).shape == (2, 3, 32, 32)
    between = interpolate(pipe, images[:1], images[1:2], steps=3)
    assert torch.equal(between.tokens[[0, 2]], pipe.tokenizer.encode(images[:2]))
    with pytest.raises(DigitError, match="predicts 2 codes at each position, which are not exported yet"):
        export_pipeline(pipe, tmp_path / "exported")
    write_token_map(pipe, images, tmp_path, 1)
    found = measure_stability(pipe.tokenizers, [images], StabilityConfig(snrs=(20,)))
    assert 0 <= found["tokenizers"]["discriminative"]["token_change"][0]["value"] <= 1
    assert first_level_vectors(pipe.tokenizer).shape[0] == 6


def test_parts_of_other_levels_do_not_fit(fitted):
    _, pipe = fitted
    other = replace(pipe.prior.cfg, levels=4)
    with pytest.raises(DigitError, match="prior levels is 4, codebook levels 2"):
        DigitPipeline(
            tokenizer=pipe.tokenizer, prior=type(pipe.prior)(other), renderer=pipe.renderer, vq=pipe.vq,
            preprocess=pipe.preprocess,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["ar", "masked"])
def test_renderers_behind_a_product_codebook(tmp_path, kind):
    run = Run(tiny_recipe(**PRODUCT, renderer_kind=kind), open_source(SHAPES), tmp_path)
    pipe = fit(run)
    assert pipe.prior.cfg.levels == pipe.renderer.cfg.prefix_levels == 3
    assert pipe.generate(2).shape == (2, 3, 32, 32)


def test_straight_to_pixels(tmp_path):
    recipe = pixel_recipe(**RESIDUAL)
    recipe = replace(recipe, pixels=replace(recipe.pixels, prefix_noise=0.3, noise_channels=2))
    pipe = fit(Run(recipe, open_source(SHAPES), tmp_path))
    assert pipe.renderer.cfg.prefix_levels == 2 and pipe.renderer.cfg.grid == (2, 2)
    images = pipe.generate(2, seed=3)
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(DigitPipeline.from_pretrained(tmp_path).generate(2, seed=3), images)


def test_fresh_crops_are_tokenized_alike(tmp_path):
    fit(Run(tiny_recipe(**RESIDUAL, training_crops="fresh"), open_source(SHAPES), tmp_path))


def test_near_codes_are_of_the_same_level(fitted):
    run, _ = fitted
    book = run.fit_codebook()
    near = near_codes(book)
    assert near.shape == (2, 6, 5)
    for level in range(2):
        vectors = book.level_vectors[level]
        for code in range(6):
            order = (vectors - vectors[code]).square().sum(1).argsort().tolist()
            assert near[level, code].tolist() == [other for other in order if other != code]
    noisy = NoisyPrefix(run.batches("renderer", run.recipe.renderer_training), near, 1.0, 100, 8, 0)
    clean, swapped = noisy.batches.part(0, 0, 8)["prefix"], noisy(0)["prefix"]
    assert (clean != swapped).all() and int(swapped.max()) < 6
    noisy.close()


def test_settings_that_a_run_would_not_use_are_refused():
    recipe = tiny_recipe(**RESIDUAL)
    with pytest.raises(DigitError, match=r"kmeans\.num_clusters is 12.*quantizer is residual_kmeans"):
        refuse_unused(recipe, ["kmeans.num_clusters"], unused_settings(recipe))
    plain = tiny_recipe()
    with pytest.raises(DigitError, match=r"residual_kmeans\.num_levels is 2.*set that to residual_kmeans"):
        refuse_unused(plain, ["residual_kmeans.num_levels"], unused_settings(plain))
    refuse_unused(recipe, ["residual_kmeans.num_levels", "quantizer"], unused_settings(recipe))


def test_sizes_are_checked_before_any_work():
    check_sizes(recipe := tiny_recipe(**RESIDUAL), recipe.vqgan, 3)
    product = tiny_recipe(**PRODUCT)
    check_codebook(product, 24)
    for changes, says in (
        ({"num_levels": 7}, "product_kmeans.num_levels is 7, and there are 6 numbers to cut"),
        ({"pca": 2000}, "product_kmeans.pca is 2000, the encoder gives 112 features"),
    ):
        with pytest.raises(DigitError, match=says):
            check_codebook(replace(product, product_kmeans=replace(product.product_kmeans, **changes)), 24)
