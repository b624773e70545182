"""Runs whose renderer goes straight to pixels: what they make and leave out, resume, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from tiny import SHAPES, pixel_recipe, tiny_recipe

from digit.data.images import open_source
from digit.data.shapes import ShapesSource
from digit.errors import DigitError, Stopped
from digit.pipeline.labels import ClassPositions
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.sample_folder import sample
from digit.runs.fit import Run, fit
from digit.runtime.files import read_json, sha256_tensors
from digit.training import adversarial


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    run = Run(pixel_recipe(), open_source(SHAPES), tmp_path_factory.mktemp("pixels"))
    return run, fit(run)


def sized(recipe=None, **changes):
    """The recipe with other settings of the renderer."""
    recipe = recipe or pixel_recipe()
    return replace(recipe, pixels=replace(recipe.pixels, **changes))


def trained(**changes):
    """The recipe with other settings of the renderer's training."""
    recipe = pixel_recipe()
    return replace(recipe, pixels_training=replace(recipe.pixels_training, **changes))


def weights(run):
    return sha256_tensors(run.train_model("renderer_pixels").state_dict())


def test_a_run_makes_no_vq_tokens(fitted):
    run, pipe = fitted
    assert [name for name, _ in run.stages()] == ["codebook", "vqgan", "tokens", "prior", "renderer_pixels"]
    assert run.write_tokens().vq is None
    assert pipe.vq is None and pipe.renders_pixels
    assert read_json(run.out / "pipeline" / "pipeline.json")["parts"] == ["encoder", "codebook", "prior", "renderer"]
    assert read_json(run.out / "renderer_pixels" / "metrics.json")["psnr"] > 5


def test_from_scratch_a_run_has_no_vqgan(tmp_path):
    run = Run(sized(start="scratch"), open_source(SHAPES), tmp_path)
    fit(run)
    assert not (tmp_path / "vqgan").exists()
    assert "vqgan" not in [name for name, _ in run.stages()]


def test_the_decoder_starts_from_the_vqgan(tmp_path):
    run = Run(trained(num_steps=1, learning_rate=1e-12, adversarial_start=0), open_source(SHAPES), tmp_path)
    decoder = run.train_model("renderer_pixels").decoder.state_dict()
    for name, weight in run.train_vqgan().vqgan.decoder.state_dict().items():
        torch.testing.assert_close(decoder[name], weight, rtol=0, atol=1e-6)  # one update at rate 1e-12


def test_sampling_completion_and_the_folder(fitted, tmp_path):
    run, pipe = fitted
    images = pipe.generate(3, seed=1)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(pipe.generate(2, ClassPositions([1, 2]), seed=2), images[1:])  # each is of its own seed
    tokens = pipe.generate_tokens(3, seed=1)
    assert set(tokens) == {"discriminative", "labels"}
    assert torch.equal(pipe.render(tokens["discriminative"], seed=1), images)
    assert pipe.complete(images, keep=0.5).shape == images.shape
    again = DigitPipeline.from_pretrained(run.out)
    assert torch.equal(again.generate(3, seed=1), images)
    assert len(sample(again, tmp_path, 3, seed=1)) == 3
    assert read_json(tmp_path / "samples.json")["request"]["rounding"] == "nearest"
    with pytest.raises(DigitError, match="straight to pixels, without VQ tokens: call render"):
        pipe.render_tokens(tokens["discriminative"])
    with pytest.raises(DigitError, match="top_p is given, but this renderer is pixels and takes no settings"):
        pipe.generate(1, renderer={"top_p": 0.5})


def test_noise_is_of_the_images_own_seed(tmp_path):
    run = Run(sized(noise_channels=2), open_source(SHAPES), tmp_path)
    pipe = run.make_pipeline()
    tokens = run.write_tokens().batch([0])["discriminative"].expand(4, -1)
    images = pipe.render(tokens, seed=3)
    assert torch.equal(pipe.render(tokens[:2], seed=5), images[2:])
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_training_resumes_to_the_bit(fitted, tmp_path, monkeypatch):
    run = Run(trained(save_every=1), open_source(SHAPES), tmp_path)
    update = adversarial.AdversarialTrainer.update

    def stop(trainer, step):
        if step == 3 and trainer.name == "renderer":
            raise Stopped("killed")
        return update(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(adversarial.AdversarialTrainer, "update", stop)
        with pytest.raises(Stopped):
            run.train_model("renderer_pixels")
    again = Run(run.recipe, open_source(SHAPES), tmp_path)
    assert weights(again) == weights(fitted[0])


def test_noisy_prefix_fresh_crops_and_validation(tmp_path):
    recipe = pixel_recipe(training_crops="fresh", validation_fraction=0.1)
    run = Run(sized(recipe, prefix_noise=0.5, noise_channels=1), open_source(SHAPES), tmp_path)
    run.train_model("renderer_pixels")
    metrics = read_json(tmp_path / "renderer_pixels" / "metrics.json")
    assert 0 < metrics["val_l1"] < 1 and metrics["val_psnr"] > 5


def test_a_renderer_straight_to_pixels_beside_one_of_vq_tokens(tmp_path):
    run = Run(pixel_recipe(renderer_kind="ar"), ShapesSource(20), tmp_path, chosen=[])
    pipe = run.make_pipeline("prior", "renderer_pixels")
    assert pipe.vq is None and pipe.generate(2).shape == (2, 3, 32, 32)
    assert run.make_pipeline("prior", "renderer").vq is not None


def test_a_prior_of_a_run_with_vq_tokens_is_reused(tmp_path):
    first = Run(tiny_recipe(), open_source(SHAPES), tmp_path / "vq")
    first.train_model("prior")
    reuse = {name: tmp_path / "vq" / name for name in ("codebook", "tokens", "prior")}
    second = Run(sized(start="scratch"), open_source(SHAPES), tmp_path / "pixels", reuse=reuse)
    assert second.make_pipeline().generate(1).shape == (1, 3, 32, 32)


def test_what_is_refused(fitted, tmp_path):
    run, _ = fitted
    with pytest.raises(DigitError, match="renderer predicts VQ tokens, and .* holds none"):
        run.train_model("renderer")

    def refused(setting, **changes):
        with pytest.raises(DigitError) as error:
            Run(pixel_recipe(**changes), open_source(SHAPES), tmp_path / "none", chosen=[setting])
        return str(error.value)

    assert "set pixels instead" in refused("renderer.depth")
    assert "set pixels_training instead" in refused("renderer_training.num_steps")
    assert "one pass" in refused("sampling.renderer.top_p")
    assert "no perceptual loss" in refused("pixels_training.perceptual_weight")
    with pytest.raises(DigitError, match="set renderer_kind to pixels"):
        Run(tiny_recipe(), open_source(SHAPES), tmp_path / "none", chosen=["pixels.depth"])
    with pytest.raises(DigitError, match="leave out --reuse_vq_tokens"):
        reuse = {"vq_tokens": run.out / "tokens"}
        Run(pixel_recipe(), open_source(SHAPES), tmp_path / "none", reuse=reuse)
    with pytest.raises(DigitError, match="pixels_training.num_steps is 0: an untrained renderer"):
        Run(trained(num_steps=0), open_source(SHAPES), tmp_path / "none")
