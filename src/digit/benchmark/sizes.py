"""The sizes to time: `small` for two CPU cores, the paper's `base` and `large`, and `micro` for tests."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.vit import SIZES as VITS
from digit.models.vit import ViTConfig
from digit.models.vqgan import VQGANConfig
from digit.runs.recipes import ModelSpec, Recipe, TokenSpace, digit_base, digit_large
from digit.runtime.hardware import Precision
from digit.tokenizers.encoders import PRECISIONS
from digit.tokenizers.kmeans.config import KMeansConfig


@dataclass(frozen=True, kw_only=True)
class Points:
    """A K-means problem on random points."""

    num: int
    """Number of points N."""
    dim: int
    """Dimension D."""
    clusters: int
    """Number of centroids K."""
    iterations: int
    """Lloyd iterations; all of them run."""

    @property
    def name(self) -> str:
        """Such as 200k x 768, K=1024."""
        num = f"{self.num / 1e6:.3g}M" if self.num >= 10**6 else f"{self.num / 1000:.3g}k"
        return f"{num} x {self.dim}, K={self.clusters}"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of every part of the benchmark."""

    recipe: Recipe
    """Sizes of prior, renderer, codebook and VQGAN, and the sampling settings."""
    discriminative_len: int = 256
    """Discriminative tokens per image."""
    batch: int
    """Images sampled per batch."""
    train_batch: int
    """Images per training step."""
    train_steps: int
    """Training steps per round."""
    vit: ViTConfig
    """The frozen encoder; only its blocks up to the third-to-last run."""
    vit_side: int = 224
    """Side of the encoder's input in pixels."""
    encode_batch: int
    """Images encoded per round."""
    points: tuple[Points, ...]
    """K-means problems."""
    store_rows: int
    """Rows of the token store."""
    store_batch: int = 1024
    """Rows per batch read from the token store."""
    num_images: int
    """JPEG files decoded per round."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """Precisions to time."""
    repeats: int = 5
    """Rounds; K-means runs three at most."""

    def sequence_config(self, name: str) -> SequenceConfig:
        """Configuration of the unconditional prior, renderer or renderer_masked."""
        vq = self.recipe.vqgan
        tokens = {
            "discriminative": TokenSpace(
                self.recipe.quantizer_cfg.vocab_size, self.discriminative_len, math.isqrt(self.discriminative_len)
            ),
            "vq": TokenSpace(vq.vocab_size, vq.num_tokens, vq.grid[0], vq.num_levels),
        }
        return self.recipe.sequence_config(name, tokens, num_classes=0)

    def model(self, name: str, device: torch.device) -> SequenceModel:
        """Builds that model with random float32 weights on the device."""
        with device:
            return SequenceModel(self.sequence_config(name))


def _third_to_last(cfg: ViTConfig) -> ViTConfig:
    return replace(cfg, num_blocks=cfg.depth - 2)


def micro() -> Size:
    """A few seconds on any machine: for tests."""
    vqgan = VQGANConfig(resolution=32, channels=8, channel_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=8,
                        vocab_size=16, num_groups=4)  # fmt: skip
    model = ModelSpec(depth=2, embed_dim=32, num_heads=2)
    return Size(
        recipe=replace(digit_base(), kmeans=KMeansConfig(num_clusters=256), vqgan=vqgan, prior=model, renderer=model),
        discriminative_len=9,
        batch=2,
        train_batch=4,
        train_steps=2,
        vit=_third_to_last(ViTConfig(embed_dim=32, depth=4, num_heads=2, num_registers=4)),
        vit_side=56,
        encode_batch=4,
        points=(Points(num=2000, dim=16, clusters=8, iterations=2),),
        store_rows=500,
        store_batch=64,
        num_images=4,
        repeats=2,
    )


def small() -> Size:
    """Two CPU cores: six blocks of width 384, a VQGAN with a quarter of the channels, ViT-B/14 with registers."""
    model = ModelSpec(depth=6, embed_dim=384, num_heads=6)
    recipe = replace(
        digit_base(),
        kmeans=KMeansConfig(num_clusters=1024),
        vqgan=VQGANConfig(channels=32),
        prior=model,
        renderer=model,
    )
    points = (
        Points(num=200_000, dim=768, clusters=1024, iterations=10),
        Points(num=1_280_000, dim=64, clusters=4096, iterations=10),
    )
    return Size(
        recipe=recipe,
        batch=8,
        train_batch=8,
        train_steps=4,
        vit=_third_to_last(VITS["dinov2_vitb14_reg4"]),
        encode_batch=16,
        points=points,
        store_rows=200_000,
        num_images=64,
        repeats=3,
    )


def base() -> Size:
    """The paper's base model, its VQGAN at 256 px and its K-means on one GPU, in bf16."""
    return Size(
        recipe=digit_base(),
        batch=128,
        train_batch=128,
        train_steps=5,
        vit=_third_to_last(VITS["dinov2_vitb14_reg4"]),
        encode_batch=1024,
        points=(Points(num=2_097_152, dim=768, clusters=8192, iterations=20),),
        store_rows=1_000_000,
        num_images=256,
        precisions=("bf16",),
    )


def large() -> Size:
    """The paper's large model; otherwise as `base`."""
    return replace(base(), recipe=digit_large(), train_batch=64, repeats=3)


SIZES: dict[str, Callable[[], Size]] = {"micro": micro, "small": small, "base": base, "large": large}


def get_size(name: str | None, device: torch.device, precision: str | None = None) -> Size:
    """Returns a size by name, by default small on a CPU and base on a GPU; `precision` replaces its precisions.

    Raises DigitError for an unknown name or precision.
    """
    name = name or ("small" if device.type == "cpu" else "base")
    if name not in SIZES:
        raise DigitError(f"no benchmark size named {name}: choose one of {', '.join(SIZES)}")
    if precision is not None and precision not in PRECISIONS:
        raise DigitError(f"no precision named {precision}: choose one of {', '.join(PRECISIONS)}")
    size = SIZES[name]()
    return size if precision is None else replace(size, precisions=(precision,))
