"""Training of the sequence models (prior, renderers, VQ baseline): label-smoothed cross-entropy (paper 3.3 and A.3)."""

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.code_heads import CodeHeads, code_head_flops
from digit.models.sequence import SequenceConfig, SequenceModel, training_flops
from digit.runtime import distributed
from digit.training import parallel
from digit.training.compile import TransformerForward
from digit.training.config import TrainConfig
from digit.training.ema import EMA
from digit.training.faults import NotFiniteError
from digit.training.log import Metrics
from digit.training.loop import Stateful, TrainState, step_seed, train
from digit.training.optim import build_optimizer, clip_gradients, learning_rate_at, set_lr
from digit.training.peak import PeakSpeed, peak_flops
from digit.training.precision import autocast

Batch = dict[str, Tensor | None]

SMALLEST_SCALE = 2.0**-8  # of the loss with fp16: gradients that overflow nevertheless are no matter of scale
SCALE_CHECKED_EVERY = 10  # steps; reading the scale waits for the GPU
OF_CODE_HEADS = 1_000_003  # in place of a micro-batch: random numbers of the code heads' start

log = logging.getLogger(__name__)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a copy to a GPU runs in the background."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()  # a copy from pageable memory would block
    return value.to(device, non_blocking=True)


class SkippedUpdates:
    """The number of updates that a run has skipped, as part of its checkpoints."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"number": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["number"]


class SequenceUpdate:
    """`update(step)` does one step: it fetches batch `step` and updates the model, the optimizer and the EMA.

    Batches with a method `part(step, start, stop)` give each process its own rows alone; others give it the whole
    batch. The batch is split into world_size x accumulate equal micro-batches. The loss's random numbers
    (`model.noise`) are generated for the whole batch, so N processes give what one gives. Dropout is seeded per
    micro-batch, so N processes give what one gives with accumulate=N.
    """

    def __init__(self, model: nn.Module, batches: Callable[[int], Batch], cfg: TrainConfig):
        self.device = next(model.parameters()).device
        if cfg.precision == "fp16" and self.device.type == "cpu":
            raise DigitError("precision fp16 needs a GPU, but the model is on the CPU: choose fp32 or bf16")
        self.num_micro_batches = distributed.world_size() * cfg.accumulate
        if cfg.batch_size % self.num_micro_batches:
            parts = f"{self.num_micro_batches} equal micro-batches (processes x accumulate)"
            raise DigitError(f"batch_size {cfg.batch_size} cannot be split into {parts}: choose a multiple")
        self.model, self.batches, self.cfg = model, batches, cfg
        if cfg.parallel == "fsdp" and distributed.world_size() > 1:
            self.model = parallel.shard(copy.deepcopy(model.cpu()).to(self.device))  # the whole model stays on the CPU
        self.objective = parallel.objective(self.model, TransformerForward(self.model, cfg))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.precision == "fp16")
        self.ema = EMA(self.model, cfg.ema_decay) if cfg.ema_decay else None
        self.generator = torch.Generator(self.device)
        self.skipped = SkippedUpdates()
        self.ddp_buckets_final = not isinstance(self.objective, nn.parallel.DistributedDataParallel)
        # Checking the norm syncs the GPU; unless skipping is enabled, the log detects non-finite values.
        self.checks_norm = self.device.type == "cpu" or cfg.max_skipped > 0

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
        batch = self.fetch(step)
        data_seconds = time.perf_counter() - started
        if not self.ddp_buckets_final:  # DDP rebuilds them after its first backward, which changes the order of sums
            self.ddp_buckets_final = True
            self.forward_backward(batch, step)
            self.optimizer.zero_grad(set_to_none=True)
        metrics = self.forward_backward(batch, step)
        metrics = self.optimizer_step(step, metrics) | {"lr": lr, "data_seconds": data_seconds}
        if self.ema is not None:
            self.ema.update(step)
        return metrics

    def fetch(self, step: int) -> Batch:
        """Batch `step`: this process's rows where the batches can be had in parts, else the whole."""
        part = getattr(self.batches, "part", None)
        if part is None:
            return self.batches(step)
        rows = self.cfg.batch_size // distributed.world_size()
        return part(step, distributed.rank() * rows, (distributed.rank() + 1) * rows)

    def split(self, batch: Batch, step: int) -> tuple[Batch, list[Batch]]:
        """The whole batch's random numbers, and this process's micro-batches with theirs.

        Raises DigitError for a batch that is neither the whole nor this process's share of it.
        """
        accumulate, first = self.cfg.accumulate, distributed.rank() * self.cfg.accumulate
        target = batch["target"]
        assert target is not None
        total, share = self.cfg.batch_size, self.cfg.batch_size // distributed.world_size()
        if target.shape[0] not in (total, share):
            raise DigitError(f"batch {step} has {target.shape[0]} rows, batch_size is {total}")
        if target.shape[0] == total:
            noise = self.noise(batch, step)
            whole = parallel.split_batch(batch | noise, self.num_micro_batches)
            return noise, whole[first : first + accumulate]
        outline = {n: None if v is None else v[:1].expand(total, *v.shape[1:]) for n, v in batch.items()}
        noise = self.noise(outline, step)  # it looks at shapes alone
        noises = parallel.split_batch(noise, self.num_micro_batches)[first : first + accumulate]
        own = parallel.split_batch(batch, accumulate)
        return noise, [part | of_part for part, of_part in zip(own, noises, strict=True)]

    def forward_backward(self, batch: Batch, step: int) -> Metrics:
        """Compute the gradients of the global batch's mean loss; returns metrics, to be averaged over the ranks.

        `batch` is the whole batch, or this process's rows of it.
        """
        accumulate, first = self.cfg.accumulate, distributed.rank() * self.cfg.accumulate
        noise, micro_batches = self.split(batch, step)
        totals: Metrics = {}
        for i, micro_batch in enumerate(micro_batches):
            self.seed(step, first + i)
            weight = self.weight(noise, micro_batch) / accumulate
            inputs = {name: None if v is None else to_device(v, self.device) for name, v in micro_batch.items()}
            last = i + 1 == accumulate  # the ranks exchange gradients once per step
            with nullcontext() if last else parallel.without_gradient_sync(self.objective):
                with autocast(self.cfg.precision, self.device):
                    loss, metrics = self.objective(inputs, label_smoothing=self.cfg.label_smoothing)
                self.scaler.scale(loss * weight).backward()
            for name, value in {**metrics, "loss": loss}.items():
                value = value.detach() if isinstance(value, Tensor) else value
                totals[name] = totals.get(name, 0.0) + value * weight
        return totals

    def noise(self, batch: Batch, step: int) -> Batch:
        """The loss's random numbers for the global batch, the same on every rank; {} if it has none."""
        draw: Any = getattr(self.model, "noise", None)
        if draw is None:
            return {}
        self.generator.manual_seed(step_seed(self.cfg.seed, step))
        return draw(batch, self.generator)

    def weight(self, noise: Batch, micro_batch: Batch) -> Tensor | float:
        """Weight of a micro-batch's mean loss, 1 on average: a masked model averages over its hidden tokens only."""
        if (hide := noise.get("hide")) is None or self.num_micro_batches == 1:
            return 1.0
        part = micro_batch["hide"]
        assert part is not None
        return part.sum() * self.num_micro_batches / hide.sum()

    def seed(self, step: int, micro_batch: int) -> None:
        """Seed the dropout of one micro-batch by (seed, step, micro_batch)."""
        seed = step_seed(self.cfg.seed, step, micro_batch)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes at least 0.1 ms
        else:
            torch.manual_seed(seed)

    def optimizer_step(self, step: int, metrics: Metrics) -> Metrics:
        """Clip, step and clear the gradients; returns the metrics with grad_norm, and skipped where steps can be.

        A step whose gradients are not finite is skipped, at most max_skipped times; after that it raises NotFiniteError
        and leaves the weights as they were. With fp16 and max_skipped 0 the scaler skips every step that overflows, and
        NotFiniteError comes where the loss scale is at SMALLEST_SCALE and gradients overflow nevertheless.
        """
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.cfg.max_norm)
        if self.scaler.is_enabled() and not self.cfg.max_skipped:
            overflow = ~norm.isfinite()
            if step % SCALE_CHECKED_EVERY == 0 and (scale := self.scaler.get_scale()) <= SMALLEST_SCALE and overflow:
                raise NotFiniteError(step + 1, metrics | {"grad_norm": norm, "loss_scale": scale})
            metrics = metrics | {"grad_norm": norm.masked_fill(overflow, 0.0), "skipped": overflow.float()}
        elif self.checks_norm and not norm.isfinite():
            metrics = self.skip(step, metrics | {"grad_norm": norm})
        else:
            metrics = metrics | {"grad_norm": norm} | ({"skipped": 0.0} if self.cfg.max_skipped else {})
        if self.scaler.is_enabled() or not metrics.get("skipped"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def skip(self, step: int, metrics: Metrics) -> Metrics:
        """Count a skipped update; raises NotFiniteError if the config allows no more of them."""
        if self.skipped.count >= self.cfg.max_skipped:
            raise NotFiniteError(step + 1, metrics)
        self.skipped.count += 1
        if distributed.is_main():
            count = f"{self.skipped.count} of at most {self.cfg.max_skipped}"
            log.warning("step %d gave a loss or gradient that is not finite: skipped, %s", step + 1, count)
        return {"skipped": 1.0}

    def finish(self, model: nn.Module) -> None:
        """Put the result into `model`: the EMA if there is one, else the last weights."""
        if self.ema is not None:
            self.ema.copy_to_model()
        if self.model is not model:
            parallel.copy_whole(self.model, model)
            model.to(self.device)


@contextmanager
def code_heads(model: nn.Module, codes: Tensor | None, cfg: TrainConfig) -> Iterator[None]:
    """Context in which the model has the code heads of the config's losses, if it has any (`models/code_heads.py`)."""
    add_code_heads(model, codes, cfg)
    try:
        yield
    finally:
        if isinstance(model, SequenceModel):
            model.code_heads = None


def add_code_heads(model: nn.Module, codes: Tensor | None, cfg: TrainConfig) -> None:
    """Give the model the code heads of the config's losses, if it has any. Their start depends on its seed alone.

    Raises DigitError for a model that cannot have them, and for `codes` that are not those of its target.
    """
    if not cfg.code_weights:
        return
    names = " and ".join(f"{name}_code_weight" for name in cfg.code_weights)
    if not isinstance(model, SequenceModel) or model.cfg.masked:
        raise DigitError(f"{names}: only a next-token model has current and next tokens, leave the weights at 0")
    if codes is None or codes.shape[:2] != (model.cfg.levels, model.cfg.vocab_size):
        got = "none" if codes is None else tuple(codes.shape)
        wanted = f"({model.cfg.levels}, {model.cfg.vocab_size}, C)"
        raise DigitError(f"{names} need the code vectors of the target, codes {wanted}, and got {got}")
    if model.cfg.target_places < 2:
        raise DigitError(f"{names}: the model predicts one position alone, leave the weights at 0")
    layers = cfg.code_layers(model.cfg.depth)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(step_seed(cfg.seed, 0, OF_CODE_HEADS))
        heads = CodeHeads(codes.detach().cpu(), model.cfg.embed_dim, layers=layers, weights=cfg.code_weights)
    model.code_heads = heads if model.device.type == "cpu" else heads.to(model.device)


def image_flops(cfg: SequenceConfig, training: TrainConfig, code_dim: int) -> float:
    """FLOPs of one training image, with the code heads; `code_dim` is the C of the target's code vectors."""
    return training_flops(cfg) + len(training.code_weights) * code_head_flops(
        cfg.target_places, cfg.embed_dim, code_dim
    )


def train_sequence_model(
    model: nn.Module,
    batches: Callable[[int], Batch],
    cfg: TrainConfig,
    out: str | Path,
    *,
    about: dict[str, Any] | None = None,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    preview: Callable[[nn.Module, int], Mapping[str, Path]] | None = None,
    flops_per_image: float | None = None,
    codes: Tensor | None = None,
    description: str = "train",
) -> tuple[nn.Module, dict[str, float]]:
    """Train a SequenceModel in place; a second call with the same `out` resumes the run.

    `batches(step)` returns the global batch as keyword arguments of `model.loss`: target (B, M) int64 and, if the model
    has them, prefix (B, N) int64 and labels (B,) int64, with B = cfg.batch_size. If `batches` has a method `part(step,
    start, stop)`, each process asks it for its own rows of the batch; if it has `rows(step)`, that names the rows of a
    batch that fails. `model.loss(**batch, label_smoothing=...)` returns the mean loss, (), and a dict of metrics. If
    the model has `noise(batch, generator)`, the tensors that it returns are further keyword arguments; it may look at
    the shapes of the batch alone. Put the model on its device first. `validate(model)` gets the model in eval mode
    (with fsdp a sharded copy, on all ranks), holding the averaged weights if there is an average. So does
    `preview(model, step)`, after each regular save; it returns PNG files by name for TensorBoard. With
    `flops_per_image` of forward and backward pass (`image_flops`) the log has the share of the hardware's peak, `mfu`.
    `codes` (L, V, C), the code vectors of the target's tokens, are needed for `current_code_weight` and
    `next_code_weight`: the checkpoints hold the networks of these losses, the model that is returned does not.

    Returns the model, in eval mode, and the last logged metrics. The model holds the average of its weights if
    `cfg.ema_decay` is set, else the last weights. Raises the errors of `digit.training.loop.train`.
    """
    with code_heads(model, codes, cfg):
        metrics = _train(
            SequenceUpdate(model, batches, cfg), model, out,
            about=about, validate=validate, preview=preview, flops_per_image=flops_per_image, description=description,
        )  # fmt: skip
    return model.eval(), metrics


def _train(
    update: SequenceUpdate,
    model: nn.Module,
    out: str | Path,
    *,
    about: dict[str, Any] | None,
    validate: Callable[[nn.Module], dict[str, float]] | None,
    preview: Callable[[nn.Module, int], Mapping[str, Path]] | None,
    flops_per_image: float | None,
    description: str,
) -> dict[str, float]:
    """What `train_sequence_model` does, with a model that has what the training needs; returns the last metrics."""
    cfg, batches = update.cfg, update.batches
    update.model.train()

    @contextmanager
    def averaged() -> Iterator[nn.Module]:
        update.model.eval()
        with torch.no_grad(), update.ema.applied() if update.ema else nullcontext():
            yield update.model
        parallel.reshard(update.model)
        update.model.train()

    def validate_average(step: int) -> dict[str, float]:
        assert validate is not None
        with averaged() as whole:
            return validate(whole)

    def preview_average(step: int) -> Mapping[str, Path]:
        assert preview is not None
        with averaged() as whole:
            return preview(whole, step)

    peak = None
    if flops_per_image is not None:
        peak = PeakSpeed(device=update.device, flops_per_image=flops_per_image, num_devices=distributed.world_size())
        peak_flops(update.device)  # measured before the run keeps the machine busy
    metrics = train(
        update, update.state(), cfg, out,
        about=about, validate=validate_average if validate else None, batches=batches,
        preview=preview_average if preview else None, peak=peak, description=description,
    )  # fmt: skip
    update.finish(model)
    return metrics
