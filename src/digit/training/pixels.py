"""Training of a renderer straight to pixels, with the losses of a VQGAN's training (`training/adversarial.py`).

Shapes: B images, S pixels a side, P discriminative tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from digit.models.memory_format import channels_last
from digit.models.pixels import PixelRenderer
from digit.runtime import distributed
from digit.training.adversarial import NUM_EVALUATED, AdversarialConfig, AdversarialTrainer, image_psnr
from digit.training.log import Metrics
from digit.training.loop import TrainState, train


@runtime_checkable
class PixelBatches(Protocol):
    """Rows of a step's batch, a function of the step alone: {"target": uint8 (B, 3, S, S), "prefix": int64 (B, P)}, and
    "labels" int64 (B,) for a renderer that sees them."""

    def part(self, step: int, start: int, stop: int) -> dict[str, Any]: ...


class PixelTrainer(AdversarialTrainer):
    """`update(step)` does one step; the noise of a batch is sampled for the whole batch, so that N processes train on
    what one would."""

    name, title = "renderer", "renderer straight to pixels"

    def __init__(
        self,
        renderer: PixelRenderer,
        batches: PixelBatches,
        cfg: AdversarialConfig,
        perceptual: nn.Module | None = None,
    ) -> None:
        self.renderer, self.batches = channels_last(renderer), batches  # may replace the parameters
        weights, last = renderer.parameters(), renderer.decoder.conv_out.weight
        reduction = renderer.cfg.decoder.reduction
        super().__init__(renderer, cfg, reduction=reduction, weights=weights, last=last, perceptual=perceptual)

    def batch(self, step: int) -> dict[str, Any]:
        size = self.cfg.batch_size // distributed.world_size()
        first = distributed.rank() * size
        found = self.batches.part(step, first, first + size)
        return {"images": found["target"], "prefix": found["prefix"], "labels": found.get("labels"), "first": first}

    def reconstruct(
        self, images: Tensor, step: int, generator: torch.Generator, **given: Any
    ) -> tuple[Tensor, None, Metrics]:
        """Images (B, 3, S, S) of the tokens `prefix` (B, P); row 0 is row `first` of the whole batch."""
        prefix, labels, first = given["prefix"], given.get("labels"), given["first"]
        # noise asks for the number of rows, and whether there are labels
        whole = {"prefix": prefix.new_empty(self.cfg.batch_size, 0), "labels": labels}
        rows = slice(first, first + len(prefix))
        noise = {name: x[rows].to(self.device) for name, x in self.renderer.noise(whole, generator).items()}
        if labels is not None:
            labels = labels.to(self.device)
            labels = labels.masked_fill(noise["drop_labels"], -1) if "drop_labels" in noise else labels
        with self.autocast():
            output = self.renderer.render(prefix.to(self.device), noise.get("noise"), labels, cells=given.get("cells"))
        return output.float(), None, {}


def train_pixels(
    renderer: PixelRenderer,
    batches: PixelBatches,
    cfg: AdversarialConfig,
    out: str | Path,
    *,
    about: dict[str, Any] | None = None,
    perceptual: nn.Module | None = None,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    preview: Callable[[nn.Module, int], Mapping[str, Path]] | None = None,
    description: str = "renderer_pixels",
) -> dict[str, float]:
    """Train `renderer` in place, resuming from OUT/checkpoints; leaves it in eval mode with the averaged weights.

    Args:
        batches: rows of the batch of any step.
        about: what identifies the run beside `cfg`; None is the renderer's configuration.
        perceptual: `perceptual(image, target) -> (B,)`, in place of the network that `cfg.perceptual` names; required
            if that is encoder.
        validate: model to metrics of held-out images, with the averaged weights, before each checkpoint.
        preview: (model, step) to PNG files by name for TensorBoard, with the averaged weights, after each checkpoint.

    Returns {"psnr": mean over images in dB} of the batches after the last step.
    """
    trainer = PixelTrainer(renderer, batches, cfg, perceptual)

    def validated(step: int) -> dict[str, float]:
        assert validate is not None
        with trainer.average.applied(), torch.no_grad():
            renderer.eval()
            metrics = validate(renderer)
            renderer.train()
        return metrics

    train(
        trainer.update, TrainState(0, trainer.objects), cfg, out,
        about=renderer.cfg.to_dict() if about is None else about, validate=validated if validate else None,
        preview=trainer.previewed(preview), description=description,
    )  # fmt: skip
    trainer.average.copy_to_model()
    after = (batches.part(cfg.num_steps + n, 0, cfg.batch_size) for n in range(NUM_EVALUATED))
    return evaluate_pixels(renderer.eval(), after)


@torch.no_grad()
def evaluate_pixels(renderer: PixelRenderer, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """{"psnr": dB, "num_images": n}: of the output, clamped and rounded to 8 bits, against the crops behind the tokens;
    noise of seed 0."""
    psnr, generator = [], torch.Generator().manual_seed(0)
    for batch in batches:
        images = batch["target"].to(renderer.device).float() / 255
        noise = renderer.noise({"prefix": batch["prefix"]}, generator).get("noise")
        noise = None if noise is None else noise.to(renderer.device)
        labels = None if batch.get("labels") is None else batch["labels"].to(renderer.device)
        output = renderer.render(batch["prefix"].to(renderer.device), noise, labels)
        psnr.append(image_psnr(output.float().clamp(0, 1).mul(255).round() / 255, images).cpu())
    return {"psnr": float(torch.cat(psnr).mean()), "num_images": float(sum(len(p) for p in psnr))}
