"""Training of a network whose output is images: reconstruction, perceptual and adversarial loss (Esser et al. 2021).

What reconstructs is the business of each trainer: a VQGAN its own input (`training/vqgan.py`), a renderer the crop
behind its tokens (`training/pixels.py`). Everything in an update is a function of the step: the learning rate, the
batch, every random number. Under torchrun every rank takes its slice of the batch; gradients are those of the whole
batch.

Shapes: B images, S pixels a side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.discriminator import SMALLEST_SIDE, PatchDiscriminator
from digit.models.memory_format import channels_last
from digit.models.perceptual import load_perceptual
from digit.runtime import distributed
from digit.runtime.settings import within
from digit.training.config import LoopConfig
from digit.training.ema import EMA
from digit.training.log import Metrics
from digit.training.loop import step_seed
from digit.training.optim import clip_gradients, cosine, set_lr
from digit.training.parallel import sum_over_ranks
from digit.training.precision import AutoPrecision, autocast

NUM_EVALUATED = 8  # batches scored after training, those of the steps after the last


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(LoopConfig):
    """Training of a network whose output is images. The defaults suit 64 px on two CPU cores."""

    num_steps: int = within("[0, inf)", 6000)
    """Updates in the whole run; the learning rates fall to zero at the last."""
    batch_size: int = within("[1, inf)", 16)
    """Images per update, over all processes together."""
    learning_rate: float = within("(0, inf)", 8e-4)
    """Peak learning rate of the network."""
    warmup_steps: int = within("[0, inf)", 100)
    """Updates of linear warm-up before the cosine."""
    betas: tuple[float, float] = within("[0, 1)", (0.9, 0.99))
    """Decay rates of Adam's moments for the network."""
    l1_weight: float = within("[0, inf)", 1.0)
    """Weight of mean |x - x_hat|, images in [0, 1]."""
    l2_weight: float = within("[0, inf)", 1.0)
    """Weight of mean (x - x_hat)^2."""
    perceptual: Literal["vgg", "alex", "encoder", "none"] = "vgg"
    """Network of the perceptual loss: vgg, alex, encoder (the distance passed to the training; `digit` passes
    EfficientNet-Lite0's) or none. If the weights of vgg or alex are missing, training runs without this loss."""
    perceptual_weight: float = within("[0, inf)", 0.5)
    """Weight of the perceptual distance."""
    perceptual_stages: int = within("[1, 5]", 3)
    """Stages of the perceptual network that are compared, 1 to 5."""
    window: int = within("[0, inf)", 0)
    """Side in pixels of the random window of the images that a step decodes and compares, a multiple of the pixels per
    token; 0 = whole images. At half the side a step takes a third of the time."""
    whole_from: float = within("[0, 1]", 0.8)
    """With window: share of the updates after which whole images are decoded, because a norm over a window differs from
    that over an image."""
    perceptual_crop: int = within("[0, inf)", 32)
    """Side in pixels of the random window that the perceptual network sees in a step; 0 = the whole image (4 times
    slower at 64 px)."""
    adversarial_weight: float = within("[0, inf)", 0.25)
    """Factor on the adaptive weight of the adversarial loss; 0 trains without a discriminator."""
    adversarial_start: int = within("[0, inf)", 3000)
    """First update with the discriminator."""
    adversarial_ramp: int = within("[0, inf)", 200)
    """Updates over which the adversarial loss grows to its full weight, while the discriminator learns."""
    discriminator_channels: int = within("[1, inf)", 48)
    """Channels of the discriminator's first layer."""
    discriminator_learning_rate: float = within("(0, inf)", 4e-4)
    """Peak learning rate of the discriminator."""
    ema_decay: float = within("(0, 1)", 0.998)
    """Decay of the moving average of the weights, which is the run's result."""
    max_norm: float = within("[0, inf)", 1.0)
    """Largest L2 norm of each network's gradients; larger ones are scaled down to it. 0 = no clipping."""
    precision: AutoPrecision = "auto"
    """Arithmetic of the networks: fp32, bf16, or auto: bf16 where the hardware multiplies it, else fp32. Weights and
    losses stay fp32, and so does a codebook."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps:  # 0 trains nothing
            num_steps = self.num_steps
            joins = not self.adversarial_weight or self.adversarial_start < num_steps
            never = f"below num_steps {num_steps}, or adversarial_weight 0 for a training without discriminator"
            self.require(joins, "adversarial_start", never)
        large = not self.window or not self.adversarial_weight or self.window >= SMALLEST_SIDE
        self.require(large, "window", f"0 or at least the {SMALLEST_SIDE} px that the discriminator needs")

    @property
    def may_grow(self) -> bool:
        return False  # the cosine ends at num_steps

    def window_at(self, step: int, side: int) -> int:
        """Side in pixels of the window that a step decodes, of images of `side` pixels."""
        windowed = 0 < self.window < side and step < self.whole_from * self.num_steps
        return self.window if windowed else side

    def require_cells(self, reduction: int) -> None:
        """Raise DigitError for a window that is not made of whole cells of `reduction` pixels."""
        self.require(not self.window % reduction, "window", f"a multiple of {reduction}, the pixels per token")


def hinge_loss(real: Float[Tensor, ...], fake: Float[Tensor, ...]) -> Float[Tensor, ""]:
    """(mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat))) / 2, the discriminator's loss on patch scores.

    Lim and Ye 2017; halved as in VQGAN's released code.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """lambda = ||grad_L L_rec|| / (||grad_L L_gan|| + delta), (): the weight of the adversarial loss.

    L is the decoder's last layer (Esser et al. 2021, Eq. 7); delta 1e-4 and the cap 1e4 are those of the released code.
    """
    return (reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(max=1e4)


class AdversarialTrainer(ABC):
    """`update(step)` does one step; `objects` must be in a checkpoint for an exact resume.

    `network` is trained in place and holds the last weights; `average` holds their moving average.

    Args:
        network: what is trained, in channels-last order; its name in checkpoints is `name`.
        reduction: pixels a side of a cell of the decoder's input.
        weights: those of its parameters that the optimizer updates.
        last: the weights of the layer that gives the image, for the adaptive weight of the adversarial loss.
        perceptual: `perceptual(image, target) -> (B,)` in place of the network that `cfg.perceptual` names; required
            if that is encoder.
    """

    name: str
    title: str
    """What messages call the network."""

    def __init__(
        self,
        network: nn.Module,
        cfg: AdversarialConfig,
        *,
        reduction: int,
        weights: Iterable[nn.Parameter],
        last: Tensor,
        perceptual: nn.Module | None,
    ) -> None:
        if cfg.batch_size % (processes := distributed.world_size()):
            parts = f"{processes} equal parts, one per process"
            raise DigitError(
                f"batch_size {cfg.batch_size} of the {self.title} cannot be split into {parts}: choose a multiple"
            )
        cfg.require_cells(reduction)
        self.cfg, self.last, self.reduction = cfg, last, reduction
        self.network = network.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.discriminator = self._place(PatchDiscriminator(cfg.discriminator_channels))
        assert perceptual is not None or cfg.perceptual != "encoder", "perceptual is encoder: pass the distance"
        if perceptual is None and cfg.perceptual != "none" and cfg.perceptual_weight > 0:
            perceptual = load_perceptual(cfg.perceptual, cfg.perceptual_stages)
        self.perceptual = None if perceptual is None else self._place(perceptual)
        self.weights = list(weights)
        self.optimizer = torch.optim.Adam(self.weights, lr=cfg.learning_rate, betas=cfg.betas)
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=cfg.discriminator_learning_rate, betas=(0.5, 0.9)
        )
        self.average = EMA(network, cfg.ema_decay)

    @property
    def device(self) -> torch.device:
        return self.last.device

    def _place(self, network: nn.Module) -> nn.Module:
        return channels_last(network.to(self.device))

    @property
    def objects(self) -> dict[str, Any]:
        names = ("discriminator", "optimizer", "discriminator_optimizer", "average")
        return {self.name: self.network} | {name: getattr(self, name) for name in names}

    def previewed(
        self, preview: Callable[[nn.Module, int], Mapping[str, Path]] | None
    ) -> Callable[[int], Mapping[str, Path]] | None:
        """`preview` with the averaged weights, as the loop calls it; None stays None."""
        if preview is None:
            return None

        def show(step: int) -> Mapping[str, Path]:
            with self.average.applied(), torch.no_grad():
                pictures = preview(self.network.eval(), step)
            self.network.train()
            return pictures

        return show

    def autocast(self) -> AbstractContextManager:
        return autocast(self.cfg.precision, self.device)

    @abstractmethod
    def batch(self, step: int) -> dict[str, Any]:
        """This rank's slice of a step's batch: keywords of `reconstruct`, with "images" uint8 (B, 3, S, S)."""

    @abstractmethod
    def reconstruct(
        self, images: Tensor, step: int, generator: torch.Generator, **given: Any
    ) -> tuple[Tensor, Tensor | None, Metrics]:
        """Reconstruction (B, 3, S, S) float32, a loss of the network's own or None, and metrics.

        `images` are float in [0, 1], and `given` is what else is in the batch. In a step that decodes windows, `images`
        are those, and given["cells"] is their place in the decoder's input, as two slices.
        """

    def update(self, step: int) -> Metrics:
        """Update network and discriminator; returns the step's metrics, 0-d tensors."""
        cfg, generator = self.cfg, torch.Generator().manual_seed(step_seed(self.cfg.seed, step))
        schedule = {"num_steps": cfg.num_steps, "warmup_steps": cfg.warmup_steps}
        set_lr(self.optimizer, cosine(step, cfg.learning_rate, **schedule))
        set_lr(self.discriminator_optimizer, cosine(step, cfg.discriminator_learning_rate, **schedule))
        batch = self.batch(step)
        images = batch.pop("images").to(self.device)
        if (window := cfg.window_at(step, images.shape[-1])) < images.shape[-1]:
            batch["cells"] = random_window(images.shape[-1] // self.reduction, window // self.reduction, generator)
            images = images[..., *(scaled(cells, self.reduction) for cells in batch["cells"])]
        images = images.contiguous(memory_format=torch.channels_last).float() / 255
        fakes, metrics = self.update_network(images, step, generator, **batch)
        if self.is_adversarial(step):
            metrics["discriminator_loss"] = self.update_discriminator(images, fakes)
        self.average.update(step)
        return metrics

    def is_adversarial(self, step: int) -> bool:
        return self.cfg.adversarial_weight > 0 and step >= self.cfg.adversarial_start

    def update_network(
        self, images: Tensor, step: int, generator: torch.Generator, **given: Any
    ) -> tuple[Tensor, Metrics]:
        """Update the network; returns the detached reconstruction and metrics."""
        reconstruction, own_loss, metrics = self.reconstruct(images, step, generator, **given)
        output = reconstruction.detach().requires_grad_()  # the losses' graphs end here, so each is traversed once
        gradient, values = self.reconstruction_gradient(output, images, generator)
        metrics |= values
        if self.is_adversarial(step):
            extra, values = self.adversarial_gradient(output, reconstruction, gradient, step)
            gradient, metrics = gradient + extra, metrics | values
        surrogate = (reconstruction * gradient).sum()  # its gradient at the reconstruction is `gradient`
        (surrogate if own_loss is None else surrogate + own_loss).backward()
        metrics["grad_norm"] = self.apply(self.optimizer, self.weights)
        return output.detach(), metrics

    def apply(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Average the gradients over the ranks, clip, step; returns the gradient norm."""
        parameters = list(parameters)
        sum_over_ranks([p.grad for p in parameters if p.grad is not None], mean=True)
        norm = clip_gradients(parameters, self.cfg.max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def reconstruction_gradient(
        self, output: Tensor, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Metrics]:
        """Gradient (B, 3, S, S) of reconstruction and perceptual loss at the decoder's output, and their values."""
        l1, l2 = F.l1_loss(output, images), F.mse_loss(output, images)
        loss = self.cfg.l1_weight * l1 + self.cfg.l2_weight * l2
        metrics: Metrics = {"l1": l1.detach(), "l2": l2.detach()}
        if self.perceptual is not None:
            window = random_window(output.shape[-1], self.cfg.perceptual_crop, generator)
            with self.autocast():
                distance = self.perceptual(output[..., *window], images[..., *window]).mean()
            loss = loss + self.cfg.perceptual_weight * distance
            metrics["perceptual"] = distance.detach()
        return torch.autograd.grad(loss, output)[0], metrics

    def adversarial_gradient(
        self, output: Tensor, reconstruction: Tensor, gradient: Tensor, step: int
    ) -> tuple[Tensor, Metrics]:
        """Weighted gradient (B, 3, S, S) of the adversarial loss at the decoder's output, and its metrics."""
        self.discriminator.requires_grad_(False)
        with self.autocast():
            loss = -self.discriminator(output).float().mean()  # hinge: the generator wants high scores
        self.discriminator.requires_grad_(True)
        adversarial = torch.autograd.grad(loss, output)[0]
        # the last layer's weight gradients need one convolution's backward from those at its output
        at_last = [
            torch.autograd.grad(reconstruction, self.last, g, retain_graph=True)[0] for g in (gradient, adversarial)
        ]
        sum_over_ranks(at_last, mean=True)
        weight = adaptive_weight(*at_last)
        ramp = min(1.0, (step - self.cfg.adversarial_start + 1) / max(1, self.cfg.adversarial_ramp))
        metrics = {"adversarial": loss.detach(), "adaptive_weight": weight}
        return ramp * self.cfg.adversarial_weight * weight * adversarial, metrics

    def update_discriminator(self, images: Tensor, fakes: Tensor) -> Tensor:
        with self.autocast():
            real, fake = self.discriminator(torch.cat([images, fakes])).float().chunk(2)
        loss = hinge_loss(real, fake)
        loss.backward()
        self.apply(self.discriminator_optimizer, self.discriminator.parameters())
        return loss.detach()


def random_window(side: int, window: int, generator: torch.Generator) -> tuple[slice, slice]:
    """A random square window of side `window` as two slices; the whole image for 0."""
    window = min(window, side) or side
    top, left = torch.randint(side - window + 1, (2,), generator=generator).tolist()
    return slice(top, top + window), slice(left, left + window)


def scaled(cells: slice, factor: int) -> slice:
    """A range of cells in pixels."""
    return slice(cells.start * factor, cells.stop * factor)


def image_psnr(output: Float[Tensor, "B 3 S S"], images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, " B"]:
    """10 log10(1 / MSE): peak signal-to-noise ratio of each image in dB, images in [0, 1]; 100 for identical ones."""
    return -10 * (output - images).square().mean((1, 2, 3)).clamp(min=1e-10).log10()
