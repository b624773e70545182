"""Training of the sequence models (prior, renderers, VQ baseline) by label-smoothed likelihood (paper 3.3 and A.3)."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.errors import DigitError
from digit.machine import multiplies_bf16
from digit.training import distributed
from digit.training.ema import EMA
from digit.training.forward import TransformerForward
from digit.training.log import Figures
from digit.training.loop import Precision, Stateful, TrainConfig, TrainState, step_seed, train
from digit.training.optim import build_optimizer, clip_gradients, learning_rate_at, set_lr
from digit.training.peak import peak_flops

Batch = dict[str, Tensor | None]


class LossModule(nn.Module):
    """Calls `model.loss` as its forward, so that DistributedDataParallel sees it; `how` is entered meanwhile."""

    def __init__(self, model: nn.Module, how: AbstractContextManager | None = None):
        super().__init__()
        self.model, self.how = model, how or nullcontext()

    def forward(self, batch: Batch, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        with self.how:
            return self.model.loss(**batch, **options)


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


class LikelihoodUpdate:
    """One step: `update(step)` fetches batch `step`, and moves the model, the optimizer and the average.

    The batch is cut into world_size x accumulate equal pieces and every piece has its own random seed, so that 2
    processes are 1 process with accumulate=2, dropout and masks included.
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
        self.objective = distributed.wrap(LossModule(model, TransformerForward(model, cfg)))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.precision == "fp16")
        self.ema = EMA(model, cfg.ema_decay) if cfg.ema_decay else None
        self.generator = torch.Generator(self.device)

    def state(self) -> TrainState:
        """The state at step 0, of the objects that a checkpoint must hold."""
        objects: dict[str, Stateful] = {"model": self.model, "optimizer": self.optimizer}
        if self.scaler.is_enabled():
            objects["scaler"] = self.scaler
        if self.ema is not None:
            objects["ema"] = self.ema
        return TrainState(0, objects)

    def __call__(self, step: int) -> Figures:
        lr = set_lr(self.optimizer, learning_rate_at(step, self.cfg))
        started = time.perf_counter()
        batch = self.batches(step)
        data_seconds = time.perf_counter() - started
        figures = self.forward_backward(batch, step)
        grad_norm = self.optimizer_step()
        if self.ema is not None:
            self.ema.update(step)
        return {**figures, **grad_norm, "lr": lr, "data_seconds": data_seconds}

    def forward_backward(self, batch: Batch, step: int) -> Figures:
        """Gradients of the mean loss over the global batch; returns the mean figures of this rank's share."""
        accumulate, first = self.cfg.accumulate, distributed.rank() * self.cfg.accumulate
        if batch["target"].shape[0] != self.cfg.batch_size:
            raise DigitError(f"batch {step} has {batch['target'].shape[0]} rows, batch_size is {self.cfg.batch_size}")
        mine = distributed.slices(batch, self.pieces)[first : first + accumulate]
        totals: Figures = {}
        for i, piece in enumerate(mine):
            self.seed(step, first + i)
            piece = {name: None if value is None else moved(value, self.device) for name, value in piece.items()}
            waiting = i + 1 < accumulate and isinstance(self.objective, nn.parallel.DistributedDataParallel)
            with self.objective.no_sync() if waiting else nullcontext():  # ranks meet once per step, in the last piece
                with autocast(self.cfg.precision, self.device):
                    options = {"label_smoothing": self.cfg.label_smoothing, "generator": self.generator}
                    loss, figures = self.objective(piece, **options)
                self.scaler.scale(loss / accumulate).backward()
            for name, value in {**figures, "loss": loss}.items():
                value = value.detach() if isinstance(value, Tensor) else value
                totals[name] = totals.get(name, 0.0) + value / accumulate
        return totals

    def seed(self, step: int, piece: int) -> None:
        """Make every random number of one piece a function of (seed, step, piece)."""
        seed = step_seed(self.cfg.seed, step, piece)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # dropout; torch.manual_seed takes 0.1 ms and more
        else:
            torch.manual_seed(seed)
        self.generator.manual_seed(seed)  # masks and dropped labels

    def optimizer_step(self) -> Figures:
        """Clip, step, forget the gradients; under fp16 an overflowing step is skipped and counted."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.cfg.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.scaler.is_enabled():
            return {"grad_norm": norm}
        overflow = ~norm.isfinite()
        return {"grad_norm": norm.masked_fill(overflow, 0.0), "skipped": overflow.float()}


def train_likelihood(
    model: nn.Module,
    batches: Callable[[int], Batch],
    cfg: TrainConfig,
    out: str | Path,
    *,
    about: dict[str, Any] | None = None,
    validate: Callable[[int], dict[str, float]] | None = None,
    flops_per_image: float | None = None,
    description: str = "train",
) -> tuple[nn.Module, dict[str, float]]:
    """Train a SequenceModel in place; run again with the same `out` to go on where it stopped.

    `batches(step)` gives the global batch as keywords of `model.loss`: target (B, M) int64 and, where the model has
    them, prefix (B, N) int64 and labels (B,) int64, with B = cfg.batch_size. `model.loss(**batch, label_smoothing=...,
    generator=...)` returns the mean loss, (), and a dict of figures. Put the model on its device first.
    `validate(step)` sees the model in eval mode with the averaged weights in it, if there is an average.
    `flops_per_image` of forward and backward pass (`digit.models.sequence.training_flops`) puts the share of the
    hardware's peak, `mfu`, into the log.

    Returns the model and the last logged figures. The model is then in eval mode and holds the average of its weights
    if `cfg.ema_decay` is set, else the last weights. Raises what `digit.training.loop.train` raises.
    """
    update = LikelihoodUpdate(model, batches, cfg)
    model.train()

    def validate_average(step: int) -> dict[str, float]:
        model.eval()
        with torch.no_grad(), update.ema.applied() if update.ema else nullcontext():
            figures = validate(step)
        model.train()
        return figures

    checked = validate_average if validate is not None else None
    peak = None if flops_per_image is None else peak_flops(update.device) * distributed.world_size() / flops_per_image
    figures = train(
        update, update.state(), cfg, out,
        about=about, validate=checked, peak_images_per_second=peak, description=description,
    )  # fmt: skip
    if update.ema is not None:
        update.ema.copy_to_model()
    return model.eval(), figures
