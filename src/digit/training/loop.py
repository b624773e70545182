"""The training loop. Everything in it is a function of the step: so a resumed run equals an uninterrupted one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from digit import ranks
from digit.errors import DigitError, MismatchError, Stopped
from digit.stop import StopSignals
from digit.training import checkpoint
from digit.training.faults import NotFiniteError, explain
from digit.training.log import Figures, RunLog, last_figures
from digit.training.optim import Optimizer, Schedule
from digit.training.parallel import Parallel

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
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss too, where there is a validation."""
    tensorboard: bool = True
    """Write TensorBoard events to OUT/tensorboard where tensorboard is installed."""
    deterministic: bool = False
    """On a GPU use deterministic algorithms alone, slower ones among them, so that a resumed run equals one that was
    never interrupted bit for bit; on a CPU it does so anyway."""

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
    parallel: Parallel = "ddp"
    """With several processes (torchrun): ddp, a replica of the model in each, or fsdp, weights, gradients and optimizer
    state cut up among them (fully_shard), for models that fill a GPU. Checkpoints of both go on with either."""
    max_skipped: int = 0
    """Updates that may be left out in the whole run because their loss or gradient is not finite; 0 stops at the
    first."""

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
        self.require(self.parallel in get_args(Parallel), "parallel", " or ".join(get_args(Parallel)))
        self.require(self.max_skipped >= 0, "max_skipped", "at least 0")
        self.require(self.optimizer != "muon" or self.parallel == "ddp", "parallel", "ddp under optimizer muon")
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

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds; all ranks call this."""
        return {name: thing.state_dict() for name, thing in self.objects.items()}

    def save(self, folder: Path, keep: int, figures: dict[str, float] | None = None, keep_best: bool = False) -> Path:
        """Write a checkpoint; all ranks call this."""
        return checkpoint.save(folder, self.step, self.content(), keep, figures=figures, keep_best=keep_best)

    def load(self, path: Path) -> None:
        """Take over a checkpoint's content. Raises MismatchError where it holds other objects or other shapes."""
        manifest, parameters = checkpoint.read_manifest(path), {}
        for name, thing in self.objects.items():
            if isinstance(thing, torch.optim.Optimizer):
                parameters[name] = [p for group in thing.param_groups for p in group["params"]]
        saved = checkpoint.load(path, self.content(), parameters)
        if set(saved) != set(self.objects):
            holds, has = ", ".join(sorted(saved)), ", ".join(sorted(self.objects))
            raise MismatchError(f"{path} holds {holds}, this run has {has}: choose another --out")
        for name, thing in self.objects.items():
            try:
                thing.load_state_dict(saved[name])
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                reason = " ".join(str(error).split())[:300]  # torch gives a line per parameter
                raise MismatchError(f"the {name} in {path} is another one ({reason}): choose another --out") from error
        self.step = manifest["step"]


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
    batches: Callable[[int], Any] | None = None,
    peak_images_per_second: float | None = None,
    description: str = "train",
) -> dict[str, float]:
    """Call `update(step)` for every step up to `cfg.num_steps`, from the newest good checkpoint in `out` on.

    `update` does all of one step (learning rate, forward and backward, clipping, optimizer, EMA) as a function of
    `step` alone and returns figures, floats or 0-d tensors that need not be ready; `data_seconds` among them is the
    time it waited for data. `validate(step)` is called before each save that is due and its figures are logged. `about`
    (JSON) says what else makes this run this run: it is kept in config.json and compared on resume. `batches(step)`, a
    dict of tensors, goes into the crash dump of a step that fails. With `peak_images_per_second`, what the hardware
    could do at most, the log tells the share reached, `mfu`. Returns the last figures.

    Raises Stopped after SIGINT or SIGTERM, once the step is finished and saved (on every rank where one of them got
    it); KeyboardInterrupt at once at a second SIGINT. Raises DigitError at a NaN or Inf figure (naming step and dump)
    and at a full disk, MismatchError where `out` holds another run.
    """
    out, folder = Path(out), Path(out) / "checkpoints"
    log = RunLog(
        out, 0, cfg.num_steps,
        description=description, tensorboard=cfg.tensorboard, peak_images_per_second=peak_images_per_second,
    )  # fmt: skip
    state.objects["log"] = log
    last_good = resume(state, cfg, folder, about)
    log.step = state.step
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    exact = deterministic_algorithms() if cfg.deterministic else nullcontext()
    try:
        with log, StopSignals() as signals, torch.random.fork_rng(devices), exact:
            while state.step < cfg.num_steps:
                figures = update(state.step)
                state.step += 1
                log.add(state.step, figures)
                last, stopped = state.step == cfg.num_steps, ranks.any_rank(signals.asked)
                if last or due(state.step, cfg.log_every):
                    log.write(cfg.batch_size)
                if last or stopped or due(state.step, cfg.save_every):
                    log.check()
                    found = validate(state.step) if validate and (last or due(state.step, cfg.save_every)) else {}
                    if found:
                        log.put(found)
                    last_good = state.save(folder, cfg.keep_checkpoints, found, cfg.keep_best)
                if stopped and not last:
                    where = f"step {state.step} of {cfg.num_steps}"
                    raise Stopped(f"{description} stopped at {where}, saved in {last_good}")
    except NotFiniteError as error:
        settings = checkpoint.describe_run(cfg, about)
        raise explain(error, out, batches, settings, last_good, lambda path: state.save(path, 1)) from error
    return last_figures(out)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Within it an operation that has no deterministic algorithm raises, and cuBLAS keeps its workspaces."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def resume(state: TrainState, cfg: LoopConfig, folder: Path, about: dict[str, Any] | None = None) -> Path | None:
    """Bring `state` to the newest good checkpoint in `folder` and return it, if there is one; write config.json."""
    if (found := checkpoint.newest(folder)) is not None:
        checkpoint.check_config(folder, cfg, about)
        state.load(found)
        if state.step > cfg.num_steps:
            raise MismatchError(f"{found} is past num_steps {cfg.num_steps}: give more, or choose another --out")
    ranks.on_main(lambda: checkpoint.save_config(folder, cfg, about))
    return found
