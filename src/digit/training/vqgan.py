"""Training of a VQGAN (Esser et al. 2021, section 3): reconstruction, perceptual and adversarial loss, EMA codebook.

The losses are those of `training/adversarial.py`. The codes are moving averages of the features assigned to them (van
den Oord et al. 2017, appendix A.1). K-means on the first features starts them, and unused codes restart on a feature of
the batch. Under torchrun the code statistics are those of the whole batch.

Shapes: B images, S pixels a side, n = B * M features in a batch, C = z_channels, K = vocab_size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.memory_format import channels_last
from digit.models.vq_layout import MAGE
from digit.models.vqgan import VQGAN
from digit.runtime import distributed
from digit.runtime.files import as_path, write_json
from digit.runtime.settings import within
from digit.training.adversarial import NUM_EVALUATED, AdversarialConfig, AdversarialTrainer, image_psnr
from digit.training.ema_codebook import LevelCodebooks, flat_features
from digit.training.log import Metrics
from digit.training.loop import TrainState, train

Batches = Callable[[int], Tensor]  # step -> uint8 (B, 3, S, S), the same on every rank
log = logging.getLogger(__name__)
DEAD_SHARE = 0.5  # share of dead codes above which, after many restarts, the codebook has collapsed
SETTLED_RESTARTS = 20  # checks for dead codes before the warning of a collapse


@dataclass(frozen=True, kw_only=True)
class GANConfig(AdversarialConfig):
    """Training of a VQGAN. The defaults suit 64 px on two CPU cores; the included 64 px VQGAN was trained with them."""

    commitment_weight: float = within("[0, inf)", 0.25)
    """Weight of mean (z - code)^2, which keeps the encoder close to its codes."""
    codebook_start: int = within("[0, inf)", 200)
    """First update that quantises. Features of earlier updates pass through, and k-means on the latest of them starts
    the codes. 0 keeps the existing codes (fine-tuning)."""
    codebook_decay: float = within("(0, 1)", 0.99)
    """Decay of the codes' moving averages."""
    restart_below: float = within("[0, 1]", 0.05)
    """A code used less than this fraction of the average moves to a random feature of the batch."""
    restart_every: int = within("[1, inf)", 20)
    """Updates between two checks for dead codes; the last tenth of the run has none, so that the decoder converges."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps:  # 0 trains nothing
            quantises, num_steps = self.codebook_start < self.num_steps, self.num_steps
            self.require(quantises, "codebook_start", f"below num_steps {num_steps}, or the codes are never learnt")


class VQGANTrainer(AdversarialTrainer):
    """Updates encoder, decoder, codebook and discriminator; `objects` must be in a checkpoint for an exact resume.

    `vqgan` is trained in place and holds the last weights; `average` holds their moving average.
    """

    name, title = "vqgan", "VQGAN"
    cfg: GANConfig

    def __init__(self, vqgan: VQGAN, batches: Batches, cfg: GANConfig, perceptual: nn.Module | None = None) -> None:
        if vqgan.layout != MAGE:
            raise DigitError(
                "this VQGAN has the layout of another project, which is not trained here: take it as it is"
            )
        self.vqgan, self.batches, self.warned = channels_last(vqgan), batches, False
        table = vqgan.quantize.embedding.weight.requires_grad_(False)
        self.codebook = LevelCodebooks(table, vqgan.cfg.num_levels, cfg.codebook_decay, cfg.restart_below)
        weights = [*vqgan.encoder.parameters(), *vqgan.decoder.parameters()]
        last, reduction = vqgan.decoder.conv_out.weight, vqgan.cfg.reduction
        super().__init__(vqgan, cfg, reduction=reduction, weights=weights, last=last, perceptual=perceptual)

    @property
    def objects(self) -> dict[str, Any]:
        return super().objects | {"codebook": self.codebook}

    def batch(self, step: int) -> dict[str, Any]:
        return {"images": self.batches(step).chunk(distributed.world_size())[distributed.rank()]}

    def reconstruct(
        self, images: Tensor, step: int, generator: torch.Generator, **given: Any
    ) -> tuple[Tensor, Tensor, Metrics]:
        """Reconstruction (B, 3, S, S), weighted commitment loss (0 before codebook_start) and metrics."""
        if step < self.cfg.codebook_start:
            with self.autocast():
                z = self.vqgan.encoder(images)
                reconstruction = self.vqgan.decoder(z)
            self.codebook.collect(flat_features(z))
            return reconstruction.float(), z.new_zeros((), dtype=torch.float32), {}
        self.codebook.start(generator)
        with self.autocast():
            z = self.vqgan.features(images)
            self.codebook.start_new(flat_features(z), generator)
            codes, indices = self.vqgan.quantize(z)
            reconstruction = self.vqgan.decode(z + (codes - z).detach())
        commitment = F.mse_loss(z.float(), codes.detach())
        features, tokens = flat_features(z), indices.reshape(-1, self.vqgan.cfg.num_levels)
        self.codebook.update(features, tokens)
        metrics: Metrics = {"commitment": commitment.detach()}
        if step % self.cfg.restart_every == 0 and step < 0.9 * self.cfg.num_steps:
            metrics["dead_codes"] = self.restart_dead(features, tokens, step, generator)
        return reconstruction.float(), self.cfg.commitment_weight * commitment, metrics

    def restart_dead(self, features: Tensor, tokens: Tensor, step: int, generator: torch.Generator) -> float:
        """Restart dead codes on features (n, C) with tokens (n, L), return how many; warns once if most stay dead."""
        cfg, num_dead = self.vqgan.cfg, self.codebook.restart_dead(features, tokens, generator)
        total = cfg.vocab_size * cfg.num_levels
        settled = step > self.cfg.codebook_start + SETTLED_RESTARTS * self.cfg.restart_every
        if settled and num_dead > DEAD_SHARE * total and not self.warned and distributed.is_main():
            self.warned = True
            advice = "a smaller vocab_size, more data or a lower learning_rate may help"
            log.warning("step %d: %d of %d codes are dead in spite of restarts: %s", step, num_dead, total, advice)
        return float(num_dead)


def train_vqgan(
    vqgan: VQGAN,
    batches: Batches,
    cfg: GANConfig,
    out: str | Path,
    *,
    perceptual: nn.Module | None = None,
    preview: Callable[[nn.Module, int], Mapping[str, Path]] | None = None,
) -> dict[str, Any]:
    """Train `vqgan` in place, resuming from OUT/checkpoints; leaves it in eval mode with the averaged weights.

    `batches(step)` returns uint8 (B, 3, S, S), a function of the step alone. To fine-tune existing weights, set
    codebook_start=0 and a low learning_rate. `perceptual(image, target) -> (B,)` replaces the network that
    `cfg.perceptual` names and is required if that is encoder. `preview(model, step)` is called after each checkpoint
    with the averaged weights and returns PNG files by name for TensorBoard. Returns the metrics of `evaluate_vqgan` on
    the batches after the last step and writes them to OUT/metrics.json.
    """
    trainer = VQGANTrainer(vqgan, batches, cfg, perceptual)
    train(
        trainer.update, TrainState(0, trainer.objects), cfg, out,
        about=vqgan.cfg.to_dict(), preview=trainer.previewed(preview), description="vqgan",
    )  # fmt: skip
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
    exp of the entropy of code use, of several levels of its mean; num_images.
    """
    training, device = vqgan.training, vqgan.quantize.embedding.weight.device
    vqgan.eval()
    num_codes, num_levels = vqgan.cfg.vocab_size, vqgan.cfg.num_levels
    counts, psnr = torch.zeros(num_levels, num_codes, dtype=torch.int64), []
    for batch in batches:
        images = batch.to(device).float() / 255
        tokens = vqgan.encode(images)[1]
        output = vqgan.decode_tokens(tokens).clamp(0, 1).mul(255).round() / 255
        for level, chosen in zip(counts, tokens.cpu().reshape(-1, num_levels).unbind(1), strict=True):
            level += torch.bincount(chosen, minlength=num_codes)
        psnr.append(image_psnr(output, images).cpu())
    vqgan.train(training)
    shares = [level[level > 0] / level.sum() for level in counts]
    return {
        "psnr": float(torch.cat(psnr).mean()),
        "usage": float((counts > 0).float().mean()),
        "dead_codes": int((counts == 0).sum()),
        "perplexity": float(torch.exp(-torch.stack([(share * share.log()).sum() for share in shares]).mean())),
        "num_images": sum(len(p) for p in psnr),
    }
