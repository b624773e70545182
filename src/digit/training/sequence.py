"""Training of the sequence models (prior, renderers, VQ baseline) by label-smoothed likelihood (paper 3.3 and A.3)."""

import copy
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.errors import DigitError
from digit.runtime import distributed
from digit.runtime.hardware import multiplies_bf16
from digit.training import parallel
from digit.training.compile import TransformerForward
from digit.training.config import Precision, TrainConfig
from digit.training.ema import EMA
from digit.training.faults import NotFiniteError
from digit.training.log import Metrics
from digit.training.loop import Stateful, TrainState, step_seed, train
from digit.training.optim import build_optimizer, clip_gradients, learning_rate_at, set_lr
from digit.training.peak import peak_flops

Batch = dict[str, Tensor | None]

log = logging.getLogger(__name__)


def autocast(precision: Precision, device: torch.device) -> Any:
    """The context of the forward pass: none for fp32, else torch's autocast to bf16 or fp16."""
    if precision == "fp32" or (precision == "auto" and not multiplies_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16)


def moved(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a copy to a GPU goes on while the CPU does other things."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()  # from other memory the copy would be waited for
    return value.to(device, non_blocking=True)


class Skipped:
    """How many updates a run has left out; it is part of the checkpoint."""

    def __init__(self) -> None:
        self.number = 0

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


class SequenceUpdate:
    """One step: `update(step)` fetches batch `step`, and moves the model, the optimizer and the average.

    The batch is cut into world_size x accumulate equal pieces. What the loss draws row by row is drawn for the whole
    batch, so that N processes are one; dropout is drawn piece by piece, so that N processes are one with accumulate=N.
    """

    def __init__(self, model: nn.Module, batches: Callable[[int], Batch], cfg: TrainConfig):
        self.device = next(model.parameters()).device
        if cfg.precision == "fp16" and self.device.type == "cpu":
            raise DigitError("precision fp16 needs a GPU, the model is on the CPU: choose fp32 or bf16")
        self.pieces = distributed.world_size() * cfg.accumulate
        if cfg.batch_size % self.pieces:
            pieces = f"{self.pieces} equal pieces (processes x accumulate)"
            raise DigitError(f"batch_size {cfg.batch_size} cannot be cut into {pieces}")
        self.model, self.batches, self.cfg = model, batches, cfg
        if cfg.parallel == "fsdp" and distributed.world_size() > 1:
            self.model = parallel.shard(copy.deepcopy(model.cpu()).to(self.device))  # the whole one waits on the CPU
        self.objective = parallel.objective(self.model, TransformerForward(self.model, cfg))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.precision == "fp16")
        self.ema = EMA(self.model, cfg.ema_decay) if cfg.ema_decay else None
        self.generator = torch.Generator(self.device)
        self.skipped = Skipped()
        self.settled = not isinstance(self.objective, nn.parallel.DistributedDataParallel)
        # on a GPU a look at the norm would wait for it: without leave to skip, the log finds what is not finite
        self.looks = self.device.type == "cpu" or cfg.max_skipped > 0

    def state(self) -> TrainState:
        """The state at step 0, of the objects that a checkpoint must hold."""
        objects: dict[str, Stateful] = {"model": self.model, "optimizer": self.optimizer, "skipped": self.skipped}
        if self.scaler.is_enabled():
            objects["scaler"] = self.scaler
        if self.ema is not None:
            objects["ema"] = self.ema
        return TrainState(0, objects)

    def __call__(self, step: int) -> Metrics:
        lr = set_lr(self.optimizer, learning_rate_at(step, self.cfg))
        started = time.perf_counter()
        batch = self.batches(step)
        data_seconds = time.perf_counter() - started
        if not self.settled:  # DDP settles its buckets after its first backward pass, and they order the sums
            self.settled = True
            self.forward_backward(batch, step)
            self.optimizer.zero_grad(set_to_none=True)
        metrics = self.forward_backward(batch, step)
        metrics = self.optimizer_step(step, metrics) | {"lr": lr, "data_seconds": data_seconds}
        if self.ema is not None:
            self.ema.update(step)
        return metrics

    def forward_backward(self, batch: Batch, step: int) -> Metrics:
        """Gradients of the mean loss over the global batch; returns metrics whose mean over ranks counts."""
        accumulate, first = self.cfg.accumulate, distributed.rank() * self.cfg.accumulate
        if batch["target"].shape[0] != self.cfg.batch_size:
            raise DigitError(f"batch {step} has {batch['target'].shape[0]} rows, batch_size is {self.cfg.batch_size}")
        batch = batch | self.noise(batch, step)
        totals: Metrics = {}
        for i, piece in enumerate(parallel.slices(batch, self.pieces)[first : first + accumulate]):
            self.seed(step, first + i)
            share = self.share(batch, piece) / accumulate
            piece = {name: None if value is None else moved(value, self.device) for name, value in piece.items()}
            last = i + 1 == accumulate  # ranks meet once a step
            with nullcontext() if last else parallel.without_exchange(self.objective):
                with autocast(self.cfg.precision, self.device):
                    loss, metrics = self.objective(piece, label_smoothing=self.cfg.label_smoothing)
                self.scaler.scale(loss * share).backward()
            for name, value in {**metrics, "loss": loss}.items():
                value = value.detach() if isinstance(value, Tensor) else value
                totals[name] = totals.get(name, 0.0) + value * share
        return totals

    def noise(self, batch: Batch, step: int) -> Batch:
        """What the loss draws for the global batch, the same on every rank."""
        if not hasattr(self.model, "noise"):
            return {}
        self.generator.manual_seed(step_seed(self.cfg.seed, step))
        return self.model.noise(batch, self.generator)

    def share(self, batch: Batch, piece: Batch) -> Tensor | float:
        """Weight of a piece's mean, 1 on average: that of a masked model is over as many tokens as are hidden."""
        if (hide := batch.get("hide")) is None or self.pieces == 1:
            return 1.0
        return piece["hide"].sum() * self.pieces / hide.sum()

    def seed(self, step: int, piece: int) -> None:
        """Make the dropout of one piece a function of (seed, step, piece)."""
        seed = step_seed(self.cfg.seed, step, piece)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.1 ms and more
        else:
            torch.manual_seed(seed)

    def optimizer_step(self, step: int, metrics: Metrics) -> Metrics:
        """Clip, step, forget the gradients; returns the metrics with grad_norm, and skipped where that may be.

        Under fp16 an overflowing step is skipped and counted. Otherwise one whose gradients are not finite is skipped
        as often as the config allows. Raises NotFiniteError, nothing moved, beyond that.
        """
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.cfg.max_norm)
        if self.scaler.is_enabled():
            overflow = ~norm.isfinite()
            metrics = metrics | {"grad_norm": norm.masked_fill(overflow, 0.0), "skipped": overflow.float()}
        elif self.looks and not norm.isfinite():
            metrics = self.skip(step, metrics | {"grad_norm": norm})
        else:
            metrics = metrics | {"grad_norm": norm} | ({"skipped": 0.0} if self.cfg.max_skipped else {})
        if self.scaler.is_enabled() or not metrics.get("skipped"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def skip(self, step: int, metrics: Metrics) -> Metrics:
        """Leave an update out, while the config allows it."""
        if self.skipped.number >= self.cfg.max_skipped:
            raise NotFiniteError(step + 1, metrics)
        self.skipped.number += 1
        if distributed.is_main():
            left = f"{self.skipped.number} of at most {self.cfg.max_skipped}"
            log.warning("step %d gave a loss or gradient that is not finite: skipped, %s", step + 1, left)
        return {"skipped": 1.0}

    def finish(self, model: nn.Module) -> None:
        """Leave the result in `model`: the average where there is one, else the last weights."""
        if self.ema is not None:
            self.ema.copy_to_model()
        if self.model is not model:
            parallel.copy_whole(self.model, model)
            model.to(self.device)


def train_sequence_model(
    model: nn.Module,
    batches: Callable[[int], Batch],
    cfg: TrainConfig,
    out: str | Path,
    *,
    about: dict[str, Any] | None = None,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    flops_per_image: float | None = None,
    description: str = "train",
) -> tuple[nn.Module, dict[str, float]]:
    """Train a SequenceModel in place; run again with the same `out` to go on where it stopped.

    `batches(step)` gives the global batch as keywords of `model.loss`: target (B, M) int64 and, where the model has
    them, prefix (B, N) int64 and labels (B,) int64, with B = cfg.batch_size. `model.loss(**batch, label_smoothing=...)`
    returns the mean loss, (), and a dict of metrics; a model with a `noise(batch, generator)` gets what that draws as
    further keywords. Put the model on its device first. `batches.rows(step)`, where there is such a method, names the
    rows of a batch that fails. `validate(model)` sees the model (under fsdp a copy that is cut up, on all ranks) in
    eval mode, with the averaged weights in it if there is an average.
    `flops_per_image` of forward and backward pass (`digit.models.sequence.training_flops`) puts the share of the
    hardware's peak, `mfu`, into the log.

    Returns the model and the last logged metrics. The model is then in eval mode and holds the average of its weights
    if `cfg.ema_decay` is set, else the last weights. Raises what `digit.training.loop.train` raises.
    """
    update = SequenceUpdate(model, batches, cfg)
    update.model.train()

    def validate_average(step: int) -> dict[str, float]:
        update.model.eval()
        with torch.no_grad(), update.ema.applied() if update.ema else nullcontext():
            metrics = validate(update.model)
        parallel.cut_again(update.model)
        update.model.train()
        return metrics

    checked = validate_average if validate is not None else None
    peak = None if flops_per_image is None else peak_flops(update.device) * distributed.world_size() / flops_per_image
    metrics = train(
        update, update.state(), cfg, out,
        about=about, validate=checked, batches=batches, peak_images_per_second=peak, description=description,
    )  # fmt: skip
    update.finish(model)
    return model.eval(), metrics
