"""Training of a VQGAN (Esser et al. 2021, section 3): reconstruction, perceptual and adversarial loss, EMA codebook.

Everything in an update is a function of the step: the learning rate, the batch, every random number. The codes are
moving averages of the features assigned to them (van den Oord et al. 2017, appendix A.1). K-means on the first features
starts them, and unused codes restart on a feature of the batch. Under torchrun every rank takes its slice of the batch;
gradients and code statistics are those of the whole batch.

Shapes: B images, S pixels a side, n = B * M features in a batch, C = z_channels, K = vocab_size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.discriminator import PatchDiscriminator
from digit.models.memory_format import channels_last
from digit.models.perceptual import load_perceptual
from digit.models.vq_layout import MAGE
from digit.models.vqgan import VQGAN
from digit.runtime import distributed
from digit.runtime.files import as_path, write_json
from digit.runtime.settings import within
from digit.training.config import LoopConfig
from digit.training.ema import EMA
from digit.training.ema_codebook import EMACodebook, flat_features
from digit.training.log import Metrics
from digit.training.loop import TrainState, step_seed, train
from digit.training.optim import clip_gradients, cosine, set_lr
from digit.training.parallel import sum_over_ranks
from digit.training.precision import AutoPrecision, autocast

Batches = Callable[[int], Tensor]  # step -> uint8 (B, 3, S, S), the same on every rank
log = logging.getLogger(__name__)
DEAD_SHARE = 0.5  # share of dead codes above which, after many restarts, the codebook has collapsed
SETTLED_RESTARTS = 20  # checks for dead codes before the warning of a collapse
NUM_EVALUATED = 8  # batches scored after training, those of the steps after the last


@dataclass(frozen=True, kw_only=True)
class GANConfig(LoopConfig):
    """Training of a VQGAN. The defaults suit 64 px on two CPU cores; the included 64 px VQGAN was trained with them."""

    num_steps: int = within("[0, inf)", 6000)
    """Updates in the whole run; the learning rates fall to zero at the last."""
    batch_size: int = within("[1, inf)", 16)
    """Images per update, over all processes together."""
    learning_rate: float = within("(0, inf)", 8e-4)
    """Peak learning rate of encoder and decoder."""
    warmup_steps: int = within("[0, inf)", 100)
    """Updates of linear warm-up before the cosine."""
    betas: tuple[float, float] = within("[0, 1)", (0.9, 0.99))
    """Decay rates of Adam's moments for encoder and decoder."""
    l1_weight: float = within("[0, inf)", 1.0)
    """Weight of mean |x - x_hat|, images in [0, 1]."""
    l2_weight: float = within("[0, inf)", 1.0)
    """Weight of mean (x - x_hat)^2."""
    commitment_weight: float = within("[0, inf)", 0.25)
    """Weight of mean (z - code)^2, which keeps the encoder close to its codes."""
    perceptual: Literal["vgg", "alex", "encoder", "none"] = "vgg"
    """Network of the perceptual loss: vgg, alex, encoder (the distance passed to `train_vqgan`; `digit` passes
    EfficientNet-Lite0's) or none. If the weights of vgg or alex are missing, training runs without this loss."""
    perceptual_weight: float = within("[0, inf)", 0.5)
    """Weight of the perceptual distance."""
    perceptual_stages: int = within("[1, 5]", 3)
    """Stages of the perceptual network that are compared, 1 to 5."""
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
    codebook_start: int = within("[0, inf)", 200)
    """First update that quantises. Features of earlier updates pass through, and k-means on the latest of them starts
    the codes. 0 keeps the existing codes (fine-tuning)."""
    codebook_decay: float = within("(0, 1)", 0.99)
    """Decay of the codes' moving averages."""
    restart_below: float = within("[0, 1]", 0.05)
    """A code used less than this fraction of the average moves to a random feature of the batch."""
    restart_every: int = within("[1, inf)", 20)
    """Updates between two checks for dead codes; the last tenth of the run has none, so that the decoder converges."""
    ema_decay: float = within("(0, 1)", 0.998)
    """Decay of the moving average of the weights, which is the run's result."""
    max_norm: float = within("[0, inf)", 1.0)
    """Largest L2 norm of each network's gradients; larger ones are scaled down to it. 0 = no clipping."""
    precision: AutoPrecision = "auto"
    """Arithmetic of the networks: fp32, bf16, or auto: bf16 where the hardware multiplies it, else fp32. Weights,
    losses and codebook stay fp32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps:  # 0 trains nothing
            quantises, num_steps = self.codebook_start < self.num_steps, self.num_steps
            self.require(quantises, "codebook_start", f"below num_steps {num_steps}, or the codes are never learnt")
            joins = not self.adversarial_weight or self.adversarial_start < num_steps
            never = f"below num_steps {num_steps}, or adversarial_weight 0 for a training without discriminator"
            self.require(joins, "adversarial_start", never)

    @property
    def may_grow(self) -> bool:
        return False  # the cosine ends at num_steps


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


class VQGANTrainer:
    """`update(step)` does one step; `objects` must be in a checkpoint for an exact resume.

    `vqgan` is trained in place and holds the last weights; `average` holds their moving average.
    """

    def __init__(self, vqgan: VQGAN, batches: Batches, cfg: GANConfig, perceptual: nn.Module | None = None) -> None:
        if cfg.batch_size % (processes := distributed.world_size()):
            parts = f"{processes} equal parts, one per process"
            raise DigitError(
                f"batch_size {cfg.batch_size} of the VQGAN cannot be split into {parts}: choose a multiple"
            )
        if vqgan.layout != MAGE:
            raise DigitError(
                "this VQGAN has the layout of another project, which is not trained here: take it as it is"
            )
        self.cfg, self.batches = cfg, batches
        self.vqgan = channels_last(vqgan).train()
        self.codebook = EMACodebook(vqgan.quantize.embedding, cfg.codebook_decay, cfg.restart_below)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.discriminator = self._place(PatchDiscriminator(cfg.discriminator_channels))
        assert perceptual is not None or cfg.perceptual != "encoder", "perceptual is encoder: pass the distance"
        if perceptual is None and cfg.perceptual != "none" and cfg.perceptual_weight > 0:
            perceptual = load_perceptual(cfg.perceptual, cfg.perceptual_stages)
        self.perceptual = None if perceptual is None else self._place(perceptual)
        self.weights = [*vqgan.encoder.parameters(), *vqgan.decoder.parameters()]
        self.optimizer = torch.optim.Adam(self.weights, lr=cfg.learning_rate, betas=cfg.betas)
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=cfg.discriminator_learning_rate, betas=(0.5, 0.9)
        )
        self.average = EMA(vqgan, cfg.ema_decay)
        self.warned = False

    @property
    def device(self) -> torch.device:
        return self.codebook.weight.device

    def _place(self, network: nn.Module) -> nn.Module:
        return channels_last(network.to(self.device))

    @property
    def objects(self) -> dict[str, Any]:
        names = ("vqgan", "discriminator", "optimizer", "discriminator_optimizer", "codebook", "average")
        return {name: getattr(self, name) for name in names}

    def autocast(self) -> AbstractContextManager:
        return autocast(self.cfg.precision, self.device)

    def update(self, step: int) -> Metrics:
        """Update encoder, decoder, codebook and discriminator; returns the step's metrics, 0-d tensors."""
        cfg, generator = self.cfg, torch.Generator().manual_seed(step_seed(self.cfg.seed, step))
        schedule = {"num_steps": cfg.num_steps, "warmup_steps": cfg.warmup_steps}
        set_lr(self.optimizer, cosine(step, cfg.learning_rate, **schedule))
        set_lr(self.discriminator_optimizer, cosine(step, cfg.discriminator_learning_rate, **schedule))
        images = self.batches(step).chunk(distributed.world_size())[distributed.rank()].to(self.device)
        images = images.contiguous(memory_format=torch.channels_last).float() / 255
        fakes, metrics = self.update_vqgan(images, step, generator)
        if self.is_adversarial(step):
            metrics["discriminator_loss"] = self.update_discriminator(images, fakes)
        self.average.update(step)
        return metrics

    def is_adversarial(self, step: int) -> bool:
        return self.cfg.adversarial_weight > 0 and step >= self.cfg.adversarial_start

    def update_vqgan(self, images: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """Update encoder, codebook and decoder; returns the detached reconstruction and metrics."""
        reconstruction, commitment, metrics = self.reconstruct(images, step, generator)
        output = reconstruction.detach().requires_grad_()  # the losses' graphs end here, so each is traversed once
        gradient, values = self.reconstruction_gradient(output, images, generator)
        metrics |= values
        if self.is_adversarial(step):
            extra, values = self.adversarial_gradient(output, reconstruction, gradient, step)
            gradient, metrics = gradient + extra, metrics | values
        surrogate = (reconstruction * gradient).sum()  # its gradient at the reconstruction is `gradient`
        (surrogate + self.cfg.commitment_weight * commitment).backward()
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

    def reconstruct(self, images: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, dict]:
        """Reconstruction (B, 3, S, S), commitment loss (0 before codebook_start) and metrics."""
        if step < self.cfg.codebook_start:
            with self.autocast():
                z = self.vqgan.encoder(images)
                reconstruction = self.vqgan.decoder(z)
            self.codebook.collect(flat_features(z))
            return reconstruction.float(), z.new_zeros((), dtype=torch.float32), {}
        self.codebook.start(generator)
        with self.autocast():
            reconstruction, z, tokens = self.vqgan(images)
        codes = self.vqgan.quantize.lookup(tokens.view(len(z), *z.shape[-2:]))
        commitment = F.mse_loss(z.float(), codes.detach())
        self.codebook.update(flat_features(z), tokens.flatten())
        metrics: Metrics = {"commitment": commitment.detach()}
        if step % self.cfg.restart_every == 0 and step < 0.9 * self.cfg.num_steps:
            metrics["dead_codes"] = self.restart_dead(flat_features(z), step, generator)
        return reconstruction.float(), commitment, metrics

    def restart_dead(self, features: Tensor, step: int, generator: torch.Generator) -> float:
        """Restart dead codes on features (n, C), return how many; warns once if most codes stay dead."""
        num_dead, total = self.codebook.restart_dead(features, generator), len(self.codebook.weight)
        settled = step > self.cfg.codebook_start + SETTLED_RESTARTS * self.cfg.restart_every
        if settled and num_dead > DEAD_SHARE * total and not self.warned and distributed.is_main():
            self.warned = True
            advice = "a smaller vocab_size, more data or a lower learning_rate may help"
            log.warning("step %d: %d of %d codes are dead in spite of restarts: %s", step, num_dead, total, advice)
        return float(num_dead)

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
        last = self.vqgan.decoder.conv_out.weight
        at_last = [torch.autograd.grad(reconstruction, last, g, retain_graph=True)[0] for g in (gradient, adversarial)]
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


def train_vqgan(
    vqgan: VQGAN, batches: Batches, cfg: GANConfig, out: str | Path, *, perceptual: nn.Module | None = None
) -> dict[str, Any]:
    """Train `vqgan` in place, resuming from OUT/checkpoints; leaves it in eval mode with the averaged weights.

    `batches(step)` returns uint8 (B, 3, S, S), a function of the step alone. To fine-tune existing weights, set
    codebook_start=0 and a low learning_rate. `perceptual(image, target) -> (B,)` replaces the network that
    `cfg.perceptual` names and is required if that is encoder. Returns the metrics of `evaluate_vqgan` on the batches
    after the last step and writes them to OUT/metrics.json.
    """
    trainer = VQGANTrainer(vqgan, batches, cfg, perceptual)
    train(trainer.update, TrainState(0, trainer.objects), cfg, out, about=vqgan.cfg.to_dict(), description="vqgan")
    trainer.average.copy_to_model()
    metrics = evaluate_vqgan(vqgan.eval(), (batches(cfg.num_steps + n) for n in range(NUM_EVALUATED)))
    if distributed.is_main():
        write_json(as_path(out) / "metrics.json", metrics)
    return metrics


@torch.no_grad()
def evaluate_vqgan(vqgan: VQGAN, batches: Iterable[UInt8[Tensor, "B 3 S S"]]) -> dict[str, Any]:
    """Reconstruction metrics over uint8 batches (B, 3, S, S).

    psnr: mean over images, in dB, of the output clamped and rounded to 8 bits; usage: fraction of codes used at least
    once; dead_codes: number of codes never used (few images cannot use all: each has 64 tokens at 64 px); perplexity:
    exp of the entropy of code use; num_images.
    """
    training, device = vqgan.training, vqgan.quantize.embedding.weight.device
    vqgan.eval()
    counts, psnr = torch.zeros(vqgan.cfg.vocab_size, dtype=torch.int64), []
    for batch in batches:
        images = batch.to(device).float() / 255
        tokens = vqgan.encode(images)[1]
        output = vqgan.decode_tokens(tokens).clamp(0, 1).mul(255).round() / 255
        counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
        psnr.append(image_psnr(output, images).cpu())
    vqgan.train(training)
    share = counts[counts > 0] / counts.sum()
    return {
        "psnr": float(torch.cat(psnr).mean()),
        "usage": float((counts > 0).float().mean()),
        "dead_codes": int((counts == 0).sum()),
        "perplexity": float(torch.exp(-(share * share.log()).sum())),
        "num_images": sum(len(p) for p in psnr),
    }


def image_psnr(output: Float[Tensor, "B 3 S S"], images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, " B"]:
    """10 log10(1 / MSE): peak signal-to-noise ratio of each image in dB, images in [0, 1]; 100 for identical ones."""
    return -10 * (output - images).square().mean((1, 2, 3)).clamp(min=1e-10).log10()
