"""A recipe that trains in seconds: for tests of what happens, not of how well."""

from dataclasses import replace

from digit.data.preprocess import PreprocessConfig
from digit.models.vqgan import VQGANConfig
from digit.runs.recipes import ModelSpec, PixelSpec, Recipe, cpu_training
from digit.tokenizers.encoders import EncoderConfig
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.training.adversarial import AdversarialConfig
from digit.training.vqgan import GANConfig

SHAPES = "shapes:num=24,size=32"  # the data of most tests with a tiny run


def pixel_recipe(**changes) -> Recipe:
    """A tiny recipe with a renderer straight to pixels."""
    training = AdversarialConfig(
        num_steps=4,
        batch_size=8,
        learning_rate=2e-3,
        warmup_steps=0,
        perceptual="none",
        adversarial_start=2,
        log_every=2,
    )
    size = PixelSpec(depth=1, embed_dim=32, num_heads=2)
    return tiny_recipe(**{"renderer_kind": "pixels", "pixels": size, "pixels_training": training} | changes)


def tiny_recipe(**changes) -> Recipe:
    """32 px images, 2 x 2 discriminative and 4 x 4 VQ tokens, models of one block."""
    size = ModelSpec(depth=1, embed_dim=32, num_heads=2)
    recipe = Recipe(
        name="tiny",
        preprocess=PreprocessConfig(image_size=32, encoder_size=32),
        encoder=EncoderConfig(name="efficientnet_lite0", input_size=32),
        kmeans=KMeansConfig(num_clusters=12, num_iterations=3),
        codebook_subset=1.0,
        vqgan=VQGANConfig(
            resolution=32,
            channels=8,
            channel_mult=(1, 1, 2, 2),
            num_res_blocks=1,
            z_channels=8,
            vocab_size=16,
            num_groups=4,
        ),
        vqgan_training=GANConfig(num_steps=3, batch_size=4, perceptual="none", adversarial_start=1, codebook_start=1),
        prior=size,
        prior_training=replace(cpu_training(4, batch_size=8), log_every=2),
        renderer=size,
        renderer_training=replace(cpu_training(4, batch_size=8), log_every=2),
    )
    return replace(recipe, **changes)
