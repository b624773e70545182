"""The training loop. Everything in it is a function of the step: so a resumed run equals an uninterrupted one."""

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
import torch

from digit.errors import DigitError, MismatchError
from digit.training import checkpoint, distributed
from digit.training.log import Figures, RunLog, last_figures
from digit.training.optim import Optimizer, Schedule

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop itself needs; the config of a trainer extends it."""

    num_steps: int = 125_000
    """Optimizer updates in the whole run. A run may be lengthened later, except under a cosine schedule."""
    batch_size: int = 2048
    """Images per update, over all processes and accumulated pieces together."""
    seed: int = 0
    """Seed of everything random in training: dropout, masks, dropped labels."""
    log_every: int = 50
    """Updates between two lines of log.jsonl; only then, and at a save, does the loop wait for the device."""
    save_every: int = 1000
    """Updates between two checkpoints; the last update always saves."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the second is what a damaged newest one falls back to."""
    tensorboard: bool = True
    """Write TensorBoard events to OUT/tensorboard where tensorboard is installed."""

    def __post_init__(self) -> None:
        for name, least in {"num_steps": 0, "batch_size": 1, "seed": 0}.items():
            self.require(getattr(self, name) >= least, name, f"at least {least}")
        for name in ("log_every", "save_every", "keep_checkpoints"):
            self.require(getattr(self, name) >= 1, name, "at least 1")

    def require(self, holds: bool, name: str, wanted: str) -> None:
        """Raise DigitError where a field's value is not one of those wanted."""
        if not holds:
            raise DigitError(f"{name} is {getattr(self, name)!r}: it must be {wanted}")

    @property
    def may_grow(self) -> bool:
        """Whether more steps leave the steps before them as they were."""
        return True


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """How a sequence model is trained. The defaults are the paper's for the base model (A.3; 200 epochs)."""

    accumulate: int = 1
    """Pieces that each process cuts its share of the batch into, to save memory; the gradients add up to the same."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass: fp32, bf16, fp16 with loss scaling (GPU only), or auto: bf16 where the hardware
    multiplies it, else fp32. Weights stay fp32."""
    checkpoint_activations: bool = False
    """Keep only the input of each transformer block and compute the rest again in the backward pass: far less memory
    for about a third more time. Losses and gradients stay the same."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the transformer with torch.compile; auto: on a GPU, in runs of at least 1000 updates. Dropout then draws
    other random numbers."""
    optimizer: Optimizer = "adamw"
    """adamw (the paper's Adam), or muon: AdamW but for the matrices inside the blocks; for short training."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices under muon; it follows the same schedule."""
    warmup_steps: int = 6250
    """Updates of linear warm-up from warmup_from to learning_rate."""
    warmup_from: float = 1e-7
    """Learning rate of the very first update."""
    schedule: Schedule = "inverse_sqrt"
    """After the warm-up: inverse_sqrt (the paper's), cosine (to 0 at num_steps) or constant."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of Adam's first and second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW), on every parameter, biases, norms and embeddings too, as in fairseq."""
    label_smoothing: float = 0.1
    """Share of the target's probability that is spread over the whole vocabulary."""
    max_norm: float = 1.0
    """Gradients are scaled down to this joint L2 norm; 0 = no clipping."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights; 0 = no average. With one, the average is the run's result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.precision in get_args(Precision), "precision", " or ".join(get_args(Precision)))
        self.require(self.compile in (True, False, "auto"), "compile", "true, false or auto")
        self.require(self.schedule in get_args(Schedule), "schedule", " or ".join(get_args(Schedule)))
        self.require(self.optimizer in get_args(Optimizer), "optimizer", " or ".join(get_args(Optimizer)))
        self.require(self.learning_rate > 0, "learning_rate", "above 0")
        self.require(self.muon_learning_rate > 0, "muon_learning_rate", "above 0")
        self.require(0 <= self.ema_decay < 1, "ema_decay", "0 (off) or below 1, such as 0.9999")
        self.require(self.accumulate >= 1, "accumulate", "at least 1")
        multiple = self.batch_size % self.accumulate == 0
        self.require(multiple, "batch_size", f"a multiple of accumulate {self.accumulate}")

    @property
    def may_grow(self) -> bool:
        return self.schedule != "cosine"


class Stateful(Protocol):
    """What a checkpoint can hold: a module, an optimizer, a gradient scaler, an EMA."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class TrainState:
    """All that a resumed run needs: the number of finished steps, and the objects that change with them."""

    step: int
    objects: dict[str, Stateful]

    def save(self, folder: Path, keep: int) -> None:
        """Write a checkpoint (rank 0 only)."""
        if distributed.is_main():
            content = {name: thing.state_dict() for name, thing in self.objects.items()}
            checkpoint.save(folder, self.step, {"step": self.step, "objects": content}, keep)

    def load(self, path: Path, saved: dict[str, Any]) -> None:
        """Take over a checkpoint's content. Raises MismatchError where it holds other objects or other shapes."""
        if set(saved["objects"]) != set(self.objects):
            holds, has = ", ".join(sorted(saved["objects"])), ", ".join(sorted(self.objects))
            raise MismatchError(f"{path} holds {holds}, this run has {has}: choose another --out")
        for name, thing in self.objects.items():
            try:
                thing.load_state_dict(saved["objects"][name])
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:300]  # torch gives a line per parameter
                raise MismatchError(f"the {name} in {path} is another one ({reason}): choose another --out") from error
        self.step = saved["step"]


def step_seed(seed: int, step: int, piece: int = 0) -> int:
    """A 63-bit seed for one piece of one step's batch: random numbers depend on nothing else."""
    return int(np.random.SeedSequence((seed, step, piece)).generate_state(1, np.uint64)[0] >> 1)


def due(step: int, every: int) -> bool:
    """Whether something done every `every` steps is done after finished step `step`."""
    return step % every == 0


def train(
    update: Callable[[int], Figures],
    state: TrainState,
    cfg: LoopConfig,
    out: str | Path,
    *,
    about: dict[str, Any] | None = None,
    validate: Callable[[int], dict[str, float]] | None = None,
    peak_images_per_second: float | None = None,
    description: str = "train",
) -> dict[str, float]:
    """Call `update(step)` for every step up to `cfg.num_steps`, from the newest good checkpoint in `out` on.

    `update` does all of one step (learning rate, forward and backward, clipping, optimizer, EMA) as a function of
    `step` alone and returns figures, floats or 0-d tensors that need not be ready; `data_seconds` among them is the
    time it waited for data. `validate(step)` is called before each save and its figures are logged. `about` (JSON) says
    what else makes this run this run: it is kept in config.json and compared on resume. With `peak_images_per_second`,
    what the hardware could do at most, the log tells the share reached, `mfu`. Returns the last figures.

    Raises DigitError at a NaN or Inf figure (naming the step), at a full disk, and after SIGTERM; KeyboardInterrupt
    after SIGINT; both signals only once the step is finished and saved. Raises MismatchError where `out` holds another
    run.
    """
    out, folder = Path(out), Path(out) / "checkpoints"
    resume(state, cfg, folder, about)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    log = RunLog(
        out, state.step, cfg.num_steps,
        description=description, tensorboard=cfg.tensorboard, peak_images_per_second=peak_images_per_second,
    )  # fmt: skip
    with log, StopSignals() as signals, torch.random.fork_rng(devices):
        while state.step < cfg.num_steps:
            figures = update(state.step)
            state.step += 1
            log.add(state.step, figures)
            last = state.step == cfg.num_steps
            stopped = signals.agreed(ask=last or due(state.step, cfg.log_every))
            if last or due(state.step, cfg.log_every):
                log.write(cfg.batch_size)
            if last or stopped or due(state.step, cfg.save_every):
                log.check()
                if validate is not None:
                    log.put(validate(state.step))
                state.save(folder, cfg.keep_checkpoints)
            if stopped and not last:
                raise signals.error(state.step)
    return last_figures(out)


def resume(state: TrainState, cfg: LoopConfig, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Bring `state` to the newest good checkpoint in `folder`, if there is one, and write config.json."""
    if (found := checkpoint.newest(folder)) is not None:
        checkpoint.check_config(folder, cfg, about)
        state.load(*found)
        if state.step > cfg.num_steps:
            raise MismatchError(f"{found[0]} is past num_steps {cfg.num_steps}: give more, or choose another --out")
    if distributed.any_rank(state.step != round(distributed.mean([state.step])[0])):
        raise DigitError(f"the processes found different checkpoints in {folder}: give a folder that all of them see")
    if distributed.is_main():
        checkpoint.save_config(folder, cfg, about)


class StopSignals:
    """Within the context SIGINT and SIGTERM ask for a stop after the step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        self.previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM) if main}
        return self

    def __exit__(self, *problem: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self, ask: bool) -> bool:
        """Whether to stop now: at once alone; among several ranks where `ask` lets them agree on one step."""
        if distributed.world_size() == 1:
            return self.received is not None
        return ask and distributed.any_rank(self.received is not None)

    def error(self, step: int) -> BaseException:
        """The exception that ends the run."""
        kind = KeyboardInterrupt if self.received == signal.SIGINT else DigitError
        return kind(f"stopped at step {step}, run again to go on")
