"""The training loop. Everything in it is a function of the step, so a resumed run equals an uninterrupted one."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from digit.errors import MismatchError, Stopped
from digit.runtime import distributed
from digit.runtime.files import as_path
from digit.runtime.signals import StopSignals, saving
from digit.training import checkpoint
from digit.training.config import LoopConfig, check_config, describe_run, save_config
from digit.training.faults import NotFiniteError, dump_crash
from digit.training.log import Metrics, RunLog, last_metrics
from digit.training.peak import PeakSpeed

logger = logging.getLogger(__name__)


@runtime_checkable
class Stateful(Protocol):
    """What a checkpoint can hold: a module, an optimizer, a gradient scaler, an EMA."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass
class TrainState:
    """All that a resumed run needs: the number of finished steps and the objects that they changed."""

    step: int
    objects: dict[str, Stateful]

    def content(self) -> dict[str, Any]:
        """The content of a checkpoint; all ranks call this."""
        return {name: stateful.state_dict() for name, stateful in self.objects.items()}

    def save(self, folder: Path, keep: int, metrics: dict[str, float] | None = None, keep_best: bool = False) -> Path:
        """Write a checkpoint; all ranks call this."""
        return checkpoint.save(folder, self.step, self.content(), keep, metrics=metrics, keep_best=keep_best)

    def load(self, path: Path) -> None:
        """Load a checkpoint into the objects. Raises MismatchError where it holds other objects or other shapes."""
        manifest, parameters = checkpoint.read_manifest(path), {}
        for name, stateful in self.objects.items():
            if isinstance(stateful, torch.optim.Optimizer):
                parameters[name] = [p for group in stateful.param_groups for p in group["params"]]
        saved = checkpoint.load(path, self.content(), parameters)
        if not isinstance(saved, dict):
            got = type(saved).__name__
            raise MismatchError(f"{path} holds a {got} where a run's objects should be: choose another --out")
        if set(saved) != set(self.objects):
            got, wanted = ", ".join(sorted(saved)), ", ".join(sorted(self.objects))
            raise MismatchError(f"{path} holds {got}, this run has {wanted}: choose another --out")
        for name, stateful in self.objects.items():
            try:
                stateful.load_state_dict(saved[name])
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
                reason = " ".join(str(error).split())[:300]  # torch writes one line per parameter
                raise MismatchError(
                    f"the {name} in {path} does not fit this run ({reason}): choose another --out"
                ) from error
        self.step = manifest["step"]


def step_seed(seed: int, step: int, micro_batch: int = 0) -> int:
    """A 63-bit seed for one micro-batch of one step. Random numbers in training depend on nothing else."""
    return int(np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64)[0] >> 1)


def due(step: int, every: int) -> bool:
    """Whether an action that happens every `every` steps happens after `step` finished steps."""
    return step % every == 0


def train(
    update: Callable[[int], Metrics],
    state: TrainState,
    cfg: LoopConfig,
    out: str | Path,
    *,
    about: dict[str, Any] | None = None,
    validate: Callable[[int], dict[str, float]] | None = None,
    batches: Callable[[int], Any] | None = None,
    preview: Callable[[int], Mapping[str, Path]] | None = None,
    peak: PeakSpeed | None = None,
    description: str = "train",
) -> dict[str, float]:
    """Call `update(step)` for every step up to `cfg.num_steps`, starting from the newest good checkpoint in `out`.

    `update` does all of one step (learning rate, forward and backward, clipping, optimizer, EMA) as a function of
    `step` alone. It returns metrics: floats or 0-d tensors, which the loop does not wait for. The metric `data_seconds`
    is the time that the step waited for data. `validate(step)` runs before each regular save, and its metrics are
    logged; one that is NaN or Inf is warned of and left out. `about` (JSON) identifies the run beside `cfg`: it is kept
    in config.json and compared on resume. `batches(step)`, a dict of tensors, is written to the crash dump of a step
    that fails. `preview(step)` runs after each regular save and returns PNG files by name, which TensorBoard shows.
    With `peak`, the hardware's limit, the log has the share of it that was reached, `mfu`. Returns the last
    metrics.

    Raises Stopped after SIGINT or SIGTERM, once the step is finished and saved (on every rank if any rank got the
    signal); KeyboardInterrupt at once at a second SIGINT. Raises DigitError at a NaN or Inf metric (naming step and
    dump) and at a full disk, MismatchError if `out` holds another run.
    """
    out = as_path(out)
    folder = out / "checkpoints"
    log = RunLog(
        out, 0, cfg.num_steps,
        description=description, tensorboard=cfg.tensorboard, peak=peak,
    )  # fmt: skip
    state.objects["log"] = log
    last_good = resume(state, cfg, folder, about)
    log.step = state.step
    try:
        with log, StopSignals() as signals, reproducible(cfg.deterministic):
            while state.step < cfg.num_steps:
                metrics = update(state.step)
                state.step += 1
                log.add(state.step, metrics)
                last, stopped = state.step == cfg.num_steps, distributed.any_rank(signals.asked)
                regular_save = last or due(state.step, cfg.save_every)
                if last or due(state.step, cfg.log_every):
                    log.write(cfg.batch_size)
                if regular_save or stopped:
                    with saving():
                        last_good = save(state, cfg, folder, log, validate if regular_save else None)
                    if preview is not None and regular_save and not stopped:
                        log.show(preview(state.step))
                if stopped:
                    break
            if distributed.any_rank(signals.asked):  # again: a signal during the last save stops the next stage too
                saved = f"step {state.step} of {cfg.num_steps}, saved in {last_good or out}"
                raise Stopped(f"{description} stopped at {saved}")
    except NotFiniteError as error:
        settings = describe_run(cfg, about)
        raise dump_crash(error, out, batches, settings, last_good, lambda path: state.save(path, 1)) from error
    return last_metrics(out)


def resume(state: TrainState, cfg: LoopConfig, folder: Path, about: dict[str, Any] | None = None) -> Path | None:
    """Load the newest good checkpoint in `folder`, if there is one, and return its path; write config.json."""
    if (newest := checkpoint.newest(folder)) is not None:
        check_config(folder, cfg, about)
        state.load(newest)
        distributed.on_main(lambda: checkpoint.prune(folder, state.step, cfg.keep_checkpoints, cfg.keep_best))
        if state.step > cfg.num_steps:
            raise MismatchError(f"{newest} is past num_steps {cfg.num_steps}: raise num_steps, or choose another --out")
    distributed.on_main(lambda: save_config(folder, cfg, about))
    return newest


def save(
    state: TrainState, cfg: LoopConfig, folder: Path, log: RunLog, validate: Callable[[int], dict[str, float]] | None
) -> Path:
    """Check that all metrics are finite, validate, and write a checkpoint; returns its path."""
    log.check()
    metrics = finite_only(validate(state.step), state.step, log) if validate else {}
    if metrics:
        log.put(metrics)
    log.sync()
    return state.save(folder, cfg.keep_checkpoints, metrics, cfg.keep_best)


def finite_only(metrics: dict[str, float], step: int, log: RunLog) -> dict[str, float]:
    """The validation metrics without NaN and Inf, which are warned of and noted: no checkpoint is the best by them."""
    odd = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if odd and distributed.is_main():
        values = ", ".join(f"{name} {value}" for name, value in odd.items())
        text = f"validation gave {values}: look at the held-out images, or go on from an earlier checkpoint"
        logger.warning("step %d: %s", step, text)
        log.note(text)
    return {name: value for name, value in metrics.items() if name not in odd}


@contextmanager
def reproducible(deterministic: bool) -> Iterator[None]:
    """Restore torch's random state afterwards; with `deterministic`, an operation that is not deterministic raises."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        if not deterministic:
            yield
            return
        before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cudnn.benchmark = before[1]
