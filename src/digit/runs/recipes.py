"""Named runs: each function returns a full configuration; its docstring gives the paper's result, ours, and the cost.

Every field can be changed on the command line (`digit fit DATA --recipe small --prior.depth 8`) or in a YAML file.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError
from digit.models.vqgan import VQGANConfig
from digit.runs.recipe import (
    EPOCHS_200,
    NO_TOKENS,
    OWN_STEPS,
    RELEASED_TRAINING,
    ModelSpec,
    PixelSpec,
    Recipe,
    TokenSpace,
    pixel_config,
    with_settings,
)
from digit.sampling.config import CLASS_TOP_K, SamplingConfig, StageSampling, released_prior
from digit.tokenizers.encoders import EncoderConfig
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.training.adversarial import AdversarialConfig
from digit.training.config import Optimizer, TrainConfig
from digit.training.vqgan import GANConfig

__all__ = [  # what a recipe is (`recipe.py`) beside the named ones
    "NO_TOKENS",
    "OWN_STEPS",
    "RECIPES",
    "RELEASED_TRAINING",
    "ModelSpec",
    "PixelSpec",
    "Recipe",
    "TokenSpace",
    "get_recipe",
    "pixel_config",
    "with_settings",
]

RECIPES: dict[str, Callable[[], Recipe]] = {}


def register(recipe: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Make a recipe known by its function's name."""
    RECIPES[recipe.__name__] = recipe
    return recipe


def get_recipe(name: str) -> Recipe:
    """Build a recipe by name. Raises DigitError that lists the names."""
    if name not in RECIPES:
        raise DigitError(f"no recipe named {name}: choose one of {', '.join(sorted(RECIPES))}")
    return replace(RECIPES[name](), name=name)


# -------------------------------------------------------------------- small machines


def cpu_training(num_steps: int, batch_size: int = 32, optimizer: Optimizer = "adamw") -> TrainConfig:
    """Short training: many small steps, cosine to zero, since it never reaches the tail of inverse square root."""
    return TrainConfig(
        num_steps=num_steps,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=2e-3,
        warmup_steps=min(200, num_steps // 10),
        schedule="cosine",
        precision="auto",
        ema_decay=0.999,
        label_smoothing=0.0,
        save_every=250,
    )


# Starts from a carried VQGAN. The perceptual loss is on classifier features: a VGG's first stages keep textures but
# lose objects.
FINE_TUNING = GANConfig(
    num_steps=900,
    learning_rate=1e-3,
    codebook_start=0,
    perceptual="encoder",
    perceptual_weight=1.0,
    perceptual_crop=0,
    adversarial_weight=0.1,
    adversarial_start=600,
    save_every=300,
)
# Of a renderer straight to pixels that starts from the decoder of a carried VQGAN; the same losses.
PIXELS_64 = AdversarialConfig(
    num_steps=2800,
    batch_size=16,
    learning_rate=1e-3,
    perceptual="encoder",
    perceptual_weight=1.0,
    perceptual_crop=0,
    adversarial_weight=0.3,
    adversarial_start=700,
    save_every=300,
)
SMALL_64: dict[str, Any] = dict(
    preprocess=PreprocessConfig(image_size=64, encoder_size=128),
    encoder=EncoderConfig(name="efficientnet_lite0", layer=-3, input_size=128),  # third-to-last: 192 features on 4 x 4
    vqgan_start="vqgan64",
    informed_start=True,
    pixels_training=PIXELS_64,
)


TINY = ModelSpec(depth=4, embed_dim=192, num_heads=3, dropout=0.0)  # a short run sees an image once or a few times
# what docs/beyond.md found to pay: guidance in both stages, pre-norm with Muon, aligned conditioning
GUIDED_PRIOR = replace(TINY, label_dropout=0.1, norm="pre")
ALIGNED_RENDERER = replace(TINY, prefix_dropout=0.1, conditioning="aligned")
GUIDED = SamplingConfig(  # guidance of the prior makes classes clear; of the renderer it helps up to about 3
    prior=StageSampling(top_p=0.95, cfg_scale=2.0), renderer=StageSampling(top_p=0.95, cfg_scale=3.0)
)


@register
def demo() -> Recipe:
    """Rendered shapes at 64 px: the whole pipeline in six to eight minutes on two CPU cores with AVX-512.

    As many discriminative as VQ tokens, aligned conditioning and guidance (docs/beyond.md). Measured: 96% of the
    class-conditional samples are recognised by a linear classifier, 94% of reconstructions.

    digit fit shapes --recipe demo --out runs/demo
    """
    return Recipe(
        **SMALL_64
        | {
            "preprocess": PreprocessConfig(image_size=64, encoder_size=128, random_crop=False),
            "vqgan_start": "vqgan64_shapes",
            "encoder": replace(SMALL_64["encoder"], layer=-6),  # stride 16: 112 features on 8 x 8
        },
        kmeans=KMeansConfig(num_clusters=512, num_iterations=12),
        codebook_subset=0.1,
        previews=0.05,
        vqgan_training=replace(FINE_TUNING, num_steps=0),
        prior=GUIDED_PRIOR,
        prior_training=cpu_training(900, optimizer="muon"),
        renderer=ALIGNED_RENDERER,
        renderer_training=cpu_training(1600, optimizer="muon"),
        sampling=SamplingConfig(
            prior=StageSampling(top_p=0.5, cfg_scale=2.0), renderer=StageSampling(top_p=0.4, cfg_scale=3.0)
        ),
    )


@register
def paper_small() -> Recipe:
    """The paper's recipe on any folder of pictures at 64 px: 14 minutes on one core for 2,640 photographs.

    `small` has ideas of our own. Measured on GroceryStoreDataset: fd_efficientnet_lite2 432 (500 samples against 2,000
    training images).

    digit fit photos/ --recipe paper_small --out runs/paper_small
    """
    return Recipe(
        **SMALL_64,
        kmeans=KMeansConfig(num_clusters=1024),
        codebook_subset=1.0,
        crops_per_image=8,
        validation_fraction=0.05,
        vqgan_training=FINE_TUNING,
        prior=replace(TINY, dropout=0.1),
        prior_training=cpu_training(1000),
        renderer=replace(TINY, dropout=0.1),
        renderer_training=cpu_training(1250, optimizer="muon"),
        sampling=SamplingConfig(prior=StageSampling(top_p=0.9), renderer=StageSampling(top_p=0.8)),
        previews=0.05,
    )


@register
def small() -> Recipe:
    """Any folder of pictures at 64 px, straight to pixels: by plan 12 minutes on two cores for 3,000 of them.

    8 x 8 discriminative tokens, a pre-norm prior with Muon and guidance, one decoder pass (docs/beyond.md). Measured on
    GroceryStoreDataset, 81 classes: fd_efficientnet_lite2 298 (`paper_small`: 432, with less training), 48% of the
    samples are recognised; 66 minutes on one core without AVX-512.
    Another renderer_kind draws VQ tokens: set vqgan_training.num_steps too, 900 for example.

    digit fit photos/ --recipe small --out runs/photos
    """
    return replace(
        paper_small(),
        encoder=replace(SMALL_64["encoder"], layer=-6),  # stride 16: 112 features on 8 x 8
        vqgan_training=replace(FINE_TUNING, num_steps=0),  # the decoder starts from the carried one
        prior=replace(GUIDED_PRIOR, dropout=0.1),
        prior_training=cpu_training(1500, optimizer="muon"),
        renderer_kind="pixels",
        pixels_training=replace(PIXELS_64, num_steps=1400, adversarial_start=350),
        renderer=replace(ALIGNED_RENDERER, dropout=0.1),
        renderer_training=cpu_training(2000, optimizer="muon"),
        sampling=GUIDED,
    )


@register
def photos64() -> Recipe:
    """`small` under the name of its size: what `photos` chooses for slow CPU cores.

    digit fit photos/ --recipe photos64 --out runs/photos
    """
    return small()


@register
def photos128() -> Recipe:
    """A folder of photographs at 128 px for two CPU cores: by plan 40 minutes for 3,000 of them.

    8 x 8 discriminative and 16 x 16 VQ tokens: the carried VQGAN is convolutional, and its tuning goes on at 128 px.
    Aligned conditioning, guidance in both stages. Measured on 2,640 photographs of groceries, 81 classes
    (docs/results.md), 74 minutes on one core: 45% of the samples are recognised, 57% of reconstructions (21.9 dB), 88%
    of real ones. Straight to pixels as in photos64 it was worse at this size.

    digit fit photos/ --recipe photos128 --out runs/photos
    """
    recipe = photos64()
    return replace(
        recipe,
        preprocess=replace(recipe.preprocess, image_size=128),
        crops_per_image=6,
        vqgan_training=replace(FINE_TUNING, num_steps=1800, batch_size=8, adversarial_start=1200),
        prior_training=cpu_training(3000, optimizer="muon"),
        renderer_kind="ar",
        renderer_training=cpu_training(2400, batch_size=16, optimizer="muon"),
    )


@register
def photos() -> Recipe:
    """The recipe for photographs that suits the machine: photos64 or photos128 on a CPU, photos256 on a GPU of 24 GB.

    `digit fit` and `digit plan` choose it, and its length, and say so. The settings shown here are those of photos128.

    digit fit photos/ --recipe photos --out runs/photos
    """
    return photos128()


@register
def paper_cifar() -> Recipe:
    """The paper's recipe on CIFAR-10, enlarged to 64 px: 22 minutes on two cores. `cifar` has ideas of our own.

    Measured by bench/paper_comparison.py: fd_efficientnet_lite2 194 (AR), 299 (MaskGIT) against 195 and 343 VQ-only.

    digit fit DATA --recipe paper_cifar --out runs/paper_cifar
    """
    return Recipe(
        **SMALL_64,
        kmeans=KMeansConfig(num_clusters=1024),
        vqgan_training=replace(FINE_TUNING, num_steps=1800, adversarial_start=1200),
        prior=TINY,
        prior_training=cpu_training(1200),
        renderer=TINY,
        renderer_training=cpu_training(1600, optimizer="muon"),
        sampling=SamplingConfig(prior=StageSampling(top_p=0.95), renderer=StageSampling(top_p=0.95)),
        masked_top_p=0.95,  # as measured; the released MaskGIT decoding filters nothing
    )


@register
def cifar() -> Recipe:
    """CIFAR-10 (50,000 images, 10 classes), enlarged to 64 px, with the training FLOPs of `paper_cifar`.

    As many discriminative as VQ tokens (8 x 8), aligned conditioning, guidance in both stages, a pre-norm prior trained
    with Muon. Measured by bench/screening.py: one seed,
    scales 1.5 and 3: fd_efficientnet_lite2 137 (`paper_cifar`: 194), recall 0.21; from own tokens 132 (189).

    digit fit DATA --recipe cifar --out runs/cifar
    """
    paper = paper_cifar()
    return replace(
        paper,
        encoder=replace(paper.encoder, layer=-6),  # stride 16: 112 features on 8 x 8
        prior=GUIDED_PRIOR,
        prior_training=cpu_training(910, optimizer="muon"),
        renderer=ALIGNED_RENDERER,
        renderer_training=cpu_training(1082, optimizer="muon"),
        sampling=SamplingConfig(
            prior=StageSampling(top_p=0.95, cfg_scale=1.5), renderer=StageSampling(top_p=0.95, cfg_scale=3.0)
        ),
    )


@register
def cifar_pixels() -> Recipe:
    """CIFAR-10, enlarged to 64 px, straight to pixels: 8 x 8 discriminative tokens, one prior, one decoder pass.

    Neither VQ tokens nor a second stage; the decoder starts from that of the carried VQGAN, which is not tuned. It has
    the FLOPs of the VQGAN's tuning in `paper_cifar`, the prior those of both of its models. Measured (docs/beyond.md):
    fd_efficientnet_lite2 104.5 over three seeds (`paper_cifar`: 194), recall 0.4, 59% recognised; from own tokens 92,
    trained without labels 104.

    digit fit DATA --recipe cifar_pixels --out runs/cifar_pixels
    """
    recipe = cifar()
    return replace(
        recipe,
        vqgan_training=replace(FINE_TUNING, num_steps=0),
        renderer_kind="pixels",
        prior_training=cpu_training(2270, optimizer="muon"),
        pixels_training=replace(PIXELS_64, num_steps=2000, adversarial_start=400),
        sampling=SamplingConfig(prior=StageSampling(top_p=0.95, cfg_scale=1.25)),
    )


# -------------------------------------------------------------------- one GPU


@register
def photos256() -> Recipe:
    """A folder of photographs at 256 px on one GPU of 24 GB, without any VQGAN training.

    16 x 16 tokens of either kind: DINOv2's base model with registers, as in the paper, and LlamaGen's VQ tokenizer of
    16,384 codes (docs/vq_tokenizers.md: MIT, ImageNet-1k), both fetched. `digit plan photos256 --gpu rtx4090 --images
    3000` tells memory and time. Not measured by us.

    digit fit photos/ --recipe photos256 --out runs/photos
    """
    training = TrainConfig(
        num_steps=12_000,
        batch_size=64,
        optimizer="muon",
        learning_rate=1e-3,
        warmup_steps=500,
        schedule="cosine",
        precision="bf16",
        ema_decay=0.999,
        label_smoothing=0.0,
        save_every=1000,
    )
    size = ModelSpec(depth=8, embed_dim=512, num_heads=8, dropout=0.1)
    return Recipe(
        preprocess=PreprocessConfig(image_size=256, encoder_size=224),
        encoder=EncoderConfig(name="hf:facebook/dinov2-with-registers-base", input_size=224),
        kmeans=KMeansConfig(num_clusters=2048, memory_budget_bytes=2**32),
        codebook_subset=1.0,
        vqgan=VQGANConfig(
            z_channels=8, vocab_size=16_384
        ),  # LlamaGen's, as far as a plan asks: its codes are 8 numbers
        vqgan_start="llamagen_vq16",
        vqgan_training=GANConfig(num_steps=0),
        crops_per_image=16,
        validation_fraction=0.05,
        prior=replace(size, label_dropout=0.1, norm="pre"),
        prior_training=training,
        renderer=replace(size, depth=12, prefix_dropout=0.1, conditioning="aligned"),
        renderer_training=training,
        sampling=replace(GUIDED, precision="bf16"),
        informed_start=True,
        previews=0.03,
    )


# -------------------------------------------------------------------- the paper's


@register
def digit_base() -> Recipe:
    """The paper's base model: 219 M parameters, K = 8192, ImageNet-1k at 256 px.

    Paper (Tables 2 to 4): FID 9.13 unconditional and 4.79 class-conditional, 71.7% linear probe. Not measured by us.
    Prior and VQ-only baseline 200 epochs, renderer 400 (A.3); MaskGIT renderer 200 (Table 3: A.3 names 400 for
    "the decoder", the row of the table 200, and we follow the row). The learning rate is the paper's 3e-4; the released
    code trains stage 2 at 5e-4 (--renderer_training.learning_rate 5e-4). Docs: paper.md.
    100 random crops of each image are tokenized once, 123 GiB for all models of a codebook; --training_crops fresh with
    --crops_per_image 1 encodes a new crop of every image in every epoch, as released, and more than doubles the time.
    The encoder's and the VQGAN's weights must be at hand; MAGE's VQGAN becomes a folder, with the released code's
    truncation to 8 bits, by `digit convert --vqgan vqgan_jax_strongaug.ckpt --out mage`.

    digit fit imagenet/train --recipe digit_base --out runs/base --reuse_vqgan mage/vqgan \
        --encoder.weights dinov2_vitb14_reg4_pretrain.pth
    """
    return Recipe(
        encoder=EncoderConfig(name="dinov2_vitb14_reg4", input_size=224),
        kmeans=KMeansConfig(num_clusters=8192, memory_budget_bytes=2**33).as_released(),
        codebook_path="released_kmeans",
        crops_per_image=100,  # each is trained on twice in 200 epochs; the released code encodes new ones every time
        class_conditional=False,
        # 43 of 73 GiB on each of eight GPUs; 83 in one piece
        renderer_training=replace(RELEASED_TRAINING, num_steps=2 * EPOCHS_200, accumulate=2),
        masked_steps=EPOCHS_200,
        vq_only_steps=EPOCHS_200,
        sampling=SamplingConfig(prior=released_prior(), precision="bf16"),
        class_top_k=CLASS_TOP_K,
    )


@register
def digit_large() -> Recipe:
    """The paper's large model: 732 M parameters, K = 16000, batch 1024.

    Paper (Tables 2 to 4): FID 4.59 unconditional and 3.39 class-conditional, 80.3% linear probe. Not measured by us.
    200 epochs of both stages with a warm-up of 10 epochs, 12,500 updates (A.3).

    digit fit imagenet/train --recipe digit_large --out runs/large --reuse_vqgan mage/vqgan \
        --encoder.weights dinov2_vitb14_reg4_pretrain.pth
    """
    base, size = digit_base(), ModelSpec(depth=24, embed_dim=1536, num_heads=16)
    training = replace(RELEASED_TRAINING, num_steps=2 * EPOCHS_200, batch_size=1024, warmup_steps=12_500)
    return replace(
        base,
        kmeans=replace(base.kmeans, num_clusters=16000, memory_budget_bytes=2**34),
        prior=size,
        prior_training=training,
        renderer=size,
        renderer_training=replace(training, accumulate=2),  # 57 of 73 GiB on each of eight GPUs; 102 in one piece
        masked_steps=None,
        vq_only_steps=None,
        sampling=replace(base.sampling, prior=released_prior(large=True)),
    )
