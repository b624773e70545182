"""Training a VQGAN (Esser et al. 2021, section 3): reconstruction, perceptual and adversarial terms, a living codebook.

Everything an update does is a function of the step: the learning rate, the batch, every random number. The
quantiser's codes are moving averages of the features assigned to them (van den Oord et al. 2017, appendix A.1), are
started by k-means on the first features, and are put back on a live feature when nothing chooses them any more.

Shapes: B images, S pixels a side, n = B * M features in a batch, C = z_channels, K = vocab_size.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from digit.models.discriminator import PatchDiscriminator
from digit.models.perceptual import load_perceptual
from digit.models.vqgan import VQGAN, nearest_code
from digit.training import distributed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GANConfig:
    """How a VQGAN is trained. The defaults suit the 64 px asset on two CPU cores."""

    num_steps: int = 6000
    """Updates in all; the learning rate falls to zero at the last."""
    batch_size: int = 16
    """Images per update."""
    learning_rate: float = 8e-4
    """Peak learning rate of encoder and decoder."""
    warmup_steps: int = 100
    """Updates of linear warm-up before the cosine."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's averages for encoder and decoder."""
    l1_weight: float = 1.0
    """Weight of mean |x - x_hat|, images in [0, 1]."""
    l2_weight: float = 1.0
    """Weight of mean (x - x_hat)^2."""
    commitment_weight: float = 0.25
    """Weight of mean (z - code)^2, which holds the encoder to its codes."""
    perceptual: str = "vgg"
    """Trunk of the perceptual term: vgg, alex or none. Without its weights training goes on without the term."""
    perceptual_weight: float = 0.5
    """Weight of the perceptual distance."""
    perceptual_stages: int = 3
    """Trunk stages compared, 1 to 5."""
    perceptual_crop: int = 32
    """Side in pixels of the random window the trunk sees each step; 0 = the whole image, which costs much more."""
    adversarial_weight: float = 0.25
    """Factor on the adaptive weight of the adversarial term; 0 trains without a discriminator."""
    adversarial_start: int = 3000
    """First update with the discriminator."""
    discriminator_channels: int = 48
    """Channels of the discriminator's first layer."""
    discriminator_learning_rate: float = 4e-4
    """Peak learning rate of the discriminator."""
    codebook_start: int = 200
    """First update that quantises; features before it pass through, the latest start the codes by k-means."""
    codebook_decay: float = 0.99
    """Decay of the codes' moving averages."""
    restart_below: float = 0.05
    """A code chosen less than this fraction of the average is put on a random feature of the batch."""
    restart_every: int = 20
    """Updates between two looks for dead codes."""
    ema_decay: float = 0.998
    """Decay of the weights' moving average, which is the model returned; 0 returns the last weights."""
    max_norm: float = 1.0
    """Gradient norm is clipped here, each network by itself."""
    bf16: bool = True
    """Run networks under bfloat16 autocast; quantiser, losses and weights stay float32."""
    seed: int = 0
    """Seed of windows, restarts and the discriminator's initial weights."""


class LivingCodebook:
    """Moving-average codes with k-means start and restart of dead codes; writes into `embedding.weight` (K, C)."""

    def __init__(self, embedding: nn.Embedding, decay: float, restart_below: float) -> None:
        self.weight = embedding.weight.requires_grad_(False)
        self.decay, self.restart_below = decay, restart_below
        self.counts = torch.ones(len(self.weight), device=self.weight.device)  # (K,)
        self.sums = self.weight.detach().clone()  # (K, C)

    @torch.no_grad()
    def start(self, features: Tensor, generator: torch.Generator, num_iterations: int = 10) -> None:
        """Set the codes by k-means on features (n, C)."""
        codes = draw_rows(features, len(self.weight), generator)
        for _ in range(num_iterations):
            counts, sums = self.assign(features, nearest_code(features, codes))
            empty = counts == 0
            codes = sums / counts.clamp(min=1)[:, None]
            codes[empty] = draw_rows(features, int(empty.sum()), generator)
        self.weight.copy_(codes)
        self.counts.fill_(len(features) * distributed.world_size() / len(self.weight))
        self.sums.copy_(codes * self.counts[:, None])

    def assign(self, features: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How many features chose each code (K,), and their sum (K, C)."""
        counts = torch.bincount(indices, minlength=len(self.weight)).to(features)
        sums = torch.zeros_like(self.weight).index_add_(0, indices, features)
        sum_over_ranks([counts, sums])
        return counts, sums

    @torch.no_grad()
    def update(self, features: Tensor, indices: Tensor) -> None:
        """Move the codes towards the features (n, C) that chose them."""
        counts, sums = self.assign(features, indices)
        # N_k <- d N_k + (1 - d) n_k;  m_k <- d m_k + (1 - d) sum x;  c_k = m_k / N_k  (van den Oord et al. 2017, Eq. 6-8)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.weight.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])

    @torch.no_grad()
    def restart_dead(self, features: Tensor, generator: torch.Generator) -> int:
        """Put codes that hardly anything chooses on random features (n, C); returns how many."""
        average = self.counts.mean()
        dead = self.counts < self.restart_below * average
        number = int(dead.sum())
        self.weight[dead] = draw_rows(features, number, generator)
        self.counts[dead] = 0.5 * average  # time to prove themselves before the next look
        self.sums[dead] = self.weight[dead] * self.counts[dead, None]
        return number

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])


def draw_rows(features: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Random rows (number, C) of features (n, C), the first rank's on every rank; repeated only where n < number."""
    if number > len(features):
        rows = torch.randint(len(features), (number,), generator=generator)
    else:
        rows = torch.randperm(len(features), generator=generator)[:number]
    drawn = features[rows.to(features.device)]
    if distributed.world_size() > 1:
        dist.broadcast(drawn, 0)
    return drawn


def sum_over_ranks(tensors: list[Tensor], divide: bool = False) -> None:
    """Add (or average) tensors over all ranks, in place, in one exchange."""
    if distributed.world_size() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat = flat / distributed.world_size() if divide else flat
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    sum_over_ranks([p.grad for p in parameters if p.grad is not None], divide=True)


class WeightAverage:
    """Moving average of a model's weights; `model` is the averaged copy."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # a short memory at first, or the start would weigh for long
        ours, theirs = list(self.model.parameters()), [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero at `num_steps`."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator loss on patch scores."""
    # mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat)), halved  (Lim & Ye 2017)
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """Balance of the two terms, from their gradients at the decoder's last layer."""
    # lambda = ||grad_L L_rec|| / (||grad_L L_gan|| + delta)  (Esser et al. 2021, Eq. 7; delta and the cap as released)
    return (reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(max=1e4)


class VQGANTrainer:
    """One `update(step)` at a time; `objects` are what a checkpoint must hold for an exact resume."""

    def __init__(self, vqgan: VQGAN, batches: Callable[[int], Tensor], config: GANConfig, fresh: bool = True) -> None:
        """`batches(step)` gives uint8 (B, 3, S, S). `fresh` False keeps the codes of `vqgan` (fine-tuning)."""
        self.config, self.batches = config, batches
        self.vqgan = vqgan.to(memory_format=torch.channels_last).train()
        self.codebook = LivingCodebook(vqgan.quantize.embedding, config.codebook_decay, config.restart_below)
        self.codebook_start = config.codebook_start if fresh else 0
        self.perceptual = load_perceptual(config.perceptual, config.perceptual_stages) if self.wants_perceptual else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.discriminator = PatchDiscriminator(config.discriminator_channels)
        for network in (self.perceptual, self.discriminator):
            if network is not None:
                network.to(self.device, memory_format=torch.channels_last)
        self.weights = [*vqgan.encoder.parameters(), *vqgan.decoder.parameters()]
        self.optimizer = torch.optim.Adam(self.weights, lr=config.learning_rate, betas=config.betas)
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=config.discriminator_learning_rate, betas=(0.5, 0.9)
        )
        self.average = WeightAverage(vqgan, config.ema_decay)
        self.reservoir: list[Tensor] = []  # features before codebook_start

    @property
    def wants_perceptual(self) -> bool:
        return self.config.perceptual != "none" and self.config.perceptual_weight > 0

    @property
    def device(self) -> torch.device:
        return self.codebook.weight.device

    @property
    def objects(self) -> dict[str, Any]:
        return {
            "vqgan": self.vqgan,
            "discriminator": self.discriminator,
            "optimizer": self.optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
            "codebook": self.codebook,
            "average": self.average,
        }

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.config.bf16 else nullcontext()

    def update(self, step: int) -> dict[str, float]:
        """One update of everything; returns the figures of the step."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        factor = learning_rate_factor(step, config.num_steps, config.warmup_steps)
        self.optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        self.discriminator_optimizer.param_groups[0]["lr"] = config.discriminator_learning_rate * factor
        images = self.batches(step).chunk(distributed.world_size())[distributed.rank()]
        images = images.to(self.device, memory_format=torch.channels_last).float() / 255
        figures = self.update_generator(images, step, generator)
        self.average.update(self.vqgan, step)
        return figures

    def reconstruct(self, images: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None, dict]:
        """Reconstruction (B, 3, S, S), commitment loss (None before codebook_start) and figures."""
        if step < self.codebook_start:
            with self.autocast():
                z = self.vqgan.encoder(images)
                reconstruction = self.vqgan.decoder(z)
            self.reservoir = [*self.reservoir[-7:], flat_features(z)]
            return reconstruction.float(), None, {}
        if self.reservoir:
            self.codebook.start(torch.cat(self.reservoir), generator)
            self.reservoir = []
        with self.autocast():
            reconstruction, z, tokens = self.vqgan(images)
        codes = self.vqgan.quantize.lookup(tokens.view(len(z), *z.shape[-2:]))
        commitment = F.mse_loss(z.float(), codes.detach())
        figures = {"commitment": float(commitment.detach()), **self.tend_codebook(flat_features(z), tokens, step, generator)}
        return reconstruction.float(), commitment, figures

    def tend_codebook(self, features: Tensor, tokens: Tensor, step: int, generator: torch.Generator) -> dict[str, float]:
        self.codebook.update(features, tokens.flatten())
        dead = 0
        if step % self.config.restart_every == 0 and step < 0.9 * self.config.num_steps:  # then the decoder settles
            dead = self.codebook.restart_dead(features, generator)
        return {"restarted": dead} if dead else {}

    def update_generator(self, images: Tensor, step: int, generator: torch.Generator) -> dict[str, float]:
        config = self.config
        reconstruction, commitment, figures = self.reconstruct(images, step, generator)
        output = reconstruction.detach().requires_grad_()  # the losses' graphs end here: each is walked once
        gradient, values = self.reconstruction_gradient(output, images, generator)
        figures |= values
        adversarial = config.adversarial_weight > 0 and step >= config.adversarial_start
        if adversarial:
            extra, values = self.adversarial_gradient(output, reconstruction, gradient)
            gradient, figures = gradient + extra, figures | values
        surrogate = (reconstruction * gradient).sum()  # its gradient at the reconstruction is `gradient`
        (surrogate if commitment is None else surrogate + config.commitment_weight * commitment).backward()
        average_gradients(self.weights)
        figures["grad_norm"] = float(nn.utils.clip_grad_norm_(self.weights, config.max_norm, error_if_nonfinite=True))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if adversarial:
            figures["discriminator_loss"] = self.update_discriminator(images, output.detach())
        return figures

    def reconstruction_gradient(self, output: Tensor, images: Tensor, generator: torch.Generator):
        """Gradient (B, 3, S, S) of the reconstruction and perceptual terms at the decoder's output, and their values."""
        config = self.config
        l1, l2 = F.l1_loss(output, images), F.mse_loss(output, images)
        loss, figures = config.l1_weight * l1 + config.l2_weight * l2, {"l1": float(l1.detach()), "l2": float(l2.detach())}
        if self.perceptual is not None:
            window = random_window(output.shape[-1], config.perceptual_crop, generator)
            with self.autocast():
                distance = self.perceptual(output[..., *window], images[..., *window]).mean()
            loss = loss + config.perceptual_weight * distance
            figures["perceptual"] = float(distance.detach())
        return torch.autograd.grad(loss, output)[0], figures

    def adversarial_gradient(self, output: Tensor, reconstruction: Tensor, gradient: Tensor):
        """Weighted gradient of the adversarial term at the decoder's output, and its figures."""
        self.discriminator.requires_grad_(False)
        with self.autocast():
            loss = -self.discriminator(output).float().mean()  # hinge: the generator wants high scores
        self.discriminator.requires_grad_(True)
        fooled = torch.autograd.grad(loss, output)[0]
        # both gradients at the last layer are one convolution's backward away from those at its output
        last = self.vqgan.decoder.conv_out.weight
        norms = [torch.autograd.grad(reconstruction, last, g, retain_graph=True)[0] for g in (gradient, fooled)]
        balance = adaptive_weight(*norms)
        return self.config.adversarial_weight * balance * fooled, {
            "adversarial": float(loss.detach()),
            "adaptive_weight": float(balance),
        }

    def update_discriminator(self, images: Tensor, fakes: Tensor) -> float:
        with self.autocast():
            real, fake = self.discriminator(torch.cat([images, fakes])).float().chunk(2)
        loss = hinge_loss(real, fake)
        loss.backward()
        average_gradients(self.discriminator.parameters())
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.config.max_norm, error_if_nonfinite=True)
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def flat_features(z: Tensor) -> Tensor:
    return z.detach().float().movedim(1, -1).flatten(0, 2)  # (B, C, h, h) -> (B * h * h, C)


def random_window(side: int, window: int, generator: torch.Generator) -> tuple[slice, slice]:
    """A square window as two slices; the whole image for window 0."""
    window = min(window, side) or side
    top, left = torch.randint(side - window + 1, (2,), generator=generator).tolist()
    return slice(top, top + window), slice(left, left + window)


@torch.no_grad()
def evaluate_vqgan(vqgan: VQGAN, batches: Iterable[Tensor]) -> dict[str, float]:
    """Reconstruction figures over uint8 batches (B, 3, S, S).

    psnr: mean over images of 10 log10(1 / MSE), dB, on clamped and rounded output; usage: fraction of codes chosen at
    least once; dead_codes: the others; perplexity: exp of the entropy of the codes chosen; num_images.
    """
    training, device = vqgan.training, vqgan.quantize.embedding.weight.device
    vqgan.eval()
    counts, psnr = torch.zeros(vqgan.config.vocab_size, dtype=torch.int64), []
    for batch in batches:
        images = batch.to(device).float() / 255
        tokens = vqgan.encode(images)[1]
        output = vqgan.decode_tokens(tokens).clamp(0, 1).mul(255).round() / 255
        counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
        psnr.append(-10 * (output - images).square().mean((1, 2, 3)).clamp(min=1e-10).log10().cpu())  # dB
    vqgan.train(training)
    share = counts[counts > 0] / counts.sum()
    return {
        "psnr": float(torch.cat(psnr).mean()),
        "usage": float((counts > 0).float().mean()),
        "dead_codes": int((counts == 0).sum()),
        "perplexity": float(torch.exp(-(share * share.log()).sum())),
        "num_images": sum(len(p) for p in psnr),
    }
