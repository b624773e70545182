"""Floating-point operations (FLOPs) per image in each stage of a recipe, counted on tensors without storage."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from digit.models.discriminator import PatchDiscriminator
from digit.models.efficientnet import EfficientNet
from digit.models.pixels import PixelConfig, PixelRenderer
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.planning.machines import Kind
from digit.runs.checks import vqgan_config
from digit.runs.judgement import JUDGE
from digit.runs.recipes import Recipe, TokenSpace
from digit.runs.roles import get_role
from digit.sampling.kinds import get_kind
from digit.tokenizers.encoders import blank_net
from digit.tokenizers.vq import VQTokenizer
from digit.training.adversarial import AdversarialConfig
from digit.training.config import TrainConfig
from digit.training.sequence import image_flops

VGG_FLOPS_PER_PIXEL = (77e3, 111e3, 184e3, 184e3, 55e3)  # FLOPs per input pixel of each stage of VGG16
LITE0_FLOPS_128 = 0.25e9  # EfficientNet-Lite0 at 128 px: the perceptual loss `encoder`


@dataclass(frozen=True)
class Network:
    """A network that turns one image into tokens, or tokens into an image."""

    flops: float
    """FLOPs of one image's forward pass."""
    weights: int
    """Number of parameters."""
    kind: Kind
    """Kind of work, which decides the rate."""


class Work:
    """FLOPs of one image in every stage of a recipe. Raises DigitError for an encoder of unknown shape."""

    def __init__(self, recipe: Recipe, num_classes: int = 0) -> None:
        self.recipe, self.num_classes = recipe, num_classes
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def _count(
        self, make: Callable[[], nn.Module], call: Callable[[nn.Module], Any], kind: Kind, device: str = "cpu"
    ) -> Network:
        """Counts the FLOPs of `call(net)` on fake CPU tensors (autocast does not support meta tensors) or on meta."""
        math_attention = sdpa_kernel(SDPBackend.MATH)  # the counter does not count the CPU's fused attention
        placement = self.fake if device == "cpu" else torch.device(device)
        with placement, torch.no_grad(), math_attention, FlopCounterMode(display=False) as counter:
            net = make()
            call(net)
        return Network(counter.get_total_flops(), sum(p.numel() for p in net.parameters()), kind)

    @cached_property
    def _encoder(self) -> Any:
        """The encoder up to its layer, without its weights."""
        return blank_net(self.recipe.encoder)

    @cached_property
    def encoder(self) -> Network:
        """The frozen encoder up to its layer."""
        net = getattr(self._encoder, "net", self._encoder)  # of several layers
        kind: Kind = "mobile net" if isinstance(net, EfficientNet) else "transformer"
        side = self.recipe.encoder.input_size
        return self._count(lambda: self._encoder, lambda net: net(torch.empty(1, 3, side, side)), kind, "meta")

    @cached_property
    def judge(self) -> Network:
        """The network that judges the report's pictures."""
        side = JUDGE.input_size
        return self._count(
            lambda: blank_net(JUDGE), lambda net: net(torch.empty(1, 3, side, side)), "mobile net", "meta"
        )

    @cached_property
    def _features(self) -> tuple[int, int]:
        """(tokens per image, features per token) of the encoder."""
        return math.prod(self._encoder.grid(self.recipe.encoder.input_size)), self._encoder.dim

    @property
    def num_tokens(self) -> int:
        """Cells of the encoder's grid: discriminative tokens per image, or so many of each level."""
        return self._features[0]

    @property
    def num_levels(self) -> int:
        """Discriminative tokens of each cell."""
        return self.recipe.quantizer_cfg.num_levels

    @property
    def token_rows(self) -> int:
        """Rows of their grid."""
        return self._encoder.grid(self.recipe.encoder.input_size)[0]

    @property
    def dim(self) -> int:
        """Feature dimension D of the encoder."""
        return self._features[1]

    @cached_property
    def vqgan(self) -> VQGANConfig:
        """Sizes of the VQGAN that the recipe trains, or of the bundled one that it starts from."""
        return vqgan_config(self.recipe)

    @cached_property
    def vq_encoder(self) -> Network:
        """The VQGAN's encoder."""
        side = self.vqgan.resolution
        return self._count(
            lambda: VQGAN(self.vqgan).encoder, lambda e: e(torch.empty(1, 3, side, side)), "convolutions"
        )

    @cached_property
    def vq_decoder(self) -> Network:
        """The VQGAN's decoder."""
        z = (1, self.vqgan.z_channels, *self.vqgan.grid)
        return self._count(lambda: VQGAN(self.vqgan).decoder, lambda d: d(torch.empty(z)), "convolutions")

    @cached_property
    def nearest_flops(self) -> float:
        """FLOPs of the distances from an image's features to all codes of the codebook."""
        scored = self.num_levels if self.recipe.quantizer == "residual_kmeans" else 1  # a product scores parts
        return 2.0 * self.num_tokens * self.dim * self.recipe.quantizer_cfg.vocab_size * scored

    @cached_property
    def pixel_renderer(self) -> Network:
        """The renderer straight to pixels."""
        tokens = torch.zeros(1, self.num_tokens * self.num_levels, dtype=torch.int64)
        cfg = self.sequence("renderer_pixels")
        assert isinstance(cfg, PixelConfig)
        noise = torch.zeros(1, *cfg.noise_shape)

        def render(net: nn.Module) -> Any:
            assert isinstance(net, PixelRenderer)
            return net.render(tokens, noise)

        return self._count(lambda: PixelRenderer(cfg), render, "convolutions")

    @cached_property
    def vqgan_training_flops(self) -> float:
        """FLOPs per training image: forward and backward (three forwards), perceptual loss and discriminator."""
        cfg = self.recipe.vqgan_training
        networks = 3.0 * (self.vq_encoder.flops + self.vq_decoder.flops)
        return networks * self._decoded_share(cfg) + self._loss_flops(cfg)

    def _step_mean(self, cfg: AdversarialConfig, cost: Callable[[int], float], start: float = 0.0) -> float:
        """Mean over all steps of a training of `cost(side)`, side in pixels of what a step decodes: a window at first,
        whole images from `whole_from` on. Steps before `start`, a share of the training as well, cost nothing."""
        whole = self.vqgan.resolution
        window, whole_from = (cfg.window, cfg.whole_from) if 0 < cfg.window < whole else (whole, 0.0)
        start = min(1.0, start)
        return max(0.0, whole_from - start) * cost(window) + (1 - max(whole_from, start)) * cost(whole)

    def _decoded_share(self, cfg: AdversarialConfig, start: float = 0.0) -> float:
        """Share of the pixels of all steps that are decoded from `start` on: fewer where steps decode windows."""
        return self._step_mean(cfg, lambda side: (side / self.vqgan.resolution) ** 2, start)

    def _loss_flops(self, cfg: AdversarialConfig) -> float:
        """FLOPs per training image of the perceptual loss and the discriminator."""
        side, total = self.vqgan.resolution, 0.0
        if cfg.perceptual == "encoder":
            total += 3 * LITE0_FLOPS_128  # forward for target and output, backward to the output
        elif cfg.perceptual != "none":
            # of what is decoded it sees a crop, or all of it
            seen = self._step_mean(cfg, lambda decoded: (min(cfg.perceptual_crop, decoded) or decoded) ** 2)
            total += 3 * seen * sum(VGG_FLOPS_PER_PIXEL[: cfg.perceptual_stages])
        if cfg.adversarial_weight and cfg.num_steps:
            discriminator = self._count(
                lambda: PatchDiscriminator(cfg.discriminator_channels),
                lambda d: d(torch.empty(1, 3, side, side)),
                "convolutions",
            )
            passes = 8  # its training on two images (6), the generator's gradient (2)
            total += passes * discriminator.flops * self._decoded_share(cfg, cfg.adversarial_start / cfg.num_steps)
        return total

    def sequence(self, name: str) -> SequenceConfig:
        """The configuration of one of ROLES."""
        tokens = {
            "discriminative": TokenSpace(
                self.recipe.quantizer_cfg.vocab_size,
                self.num_tokens * self.num_levels,
                self.token_rows,
                self.num_levels,
            ),
            "vq": TokenSpace(self.vqgan.vocab_size, self.vqgan.num_tokens, self.vqgan.grid[0], self.vqgan.num_levels),
        }
        return self.recipe.sequence_config(name, tokens, num_classes=self.num_classes, vqgan=self.vqgan)

    def training_flops(self, name: str) -> float:
        """Of one training image of one of ROLES."""
        if get_role(name).kind == "pixels":
            cfg = self.recipe.pixels_training
            return 3.0 * self.pixel_renderer.flops * self._decoded_share(cfg) + self._loss_flops(cfg)
        training = self.recipe.training(get_role(name))
        assert isinstance(training, TrainConfig)
        return image_flops(self.sequence(name), training, self.code_dim(name))

    def code_dim(self, name: str) -> int:
        """Numbers of a code vector of the tokens that one of ROLES predicts."""
        return self.dim if get_role(name).target == "discriminative" else self.vqgan.z_channels


class BlankVQ(VQTokenizer):
    """A VQ tokenizer without storage that reports `device`, which this machine need not have."""

    def __init__(self, cfg: VQGANConfig, device: torch.device) -> None:
        with torch.device("meta"):
            super().__init__(VQGAN(cfg))
        self._device = device

    @property
    def device(self) -> torch.device:
        return self._device


def blank_model(cfg: SequenceConfig) -> SequenceModel:
    """Builds a sequence model without storage."""
    with torch.device("meta"):
        return get_kind(cfg.kind).model(cfg)


def num_parameters(cfg: SequenceConfig) -> int:
    """Number of parameters of a sequence model."""
    return sum(p.numel() for p in blank_model(cfg).parameters())
