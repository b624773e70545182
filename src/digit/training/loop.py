"""The training loop. Everything in it is a function of the step: so a resumed run equals an uninterrupted one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from digit.errors import MismatchError, Stopped
from digit.runtime import distributed
from digit.runtime.signals import StopSignals
from digit.training import checkpoint
from digit.training.config import LoopConfig, check_config, describe_run, save_config
from digit.training.faults import NotFiniteError, explain
from digit.training.log import Metrics, RunLog, last_metrics


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

    def save(self, folder: Path, keep: int, metrics: dict[str, float] | None = None, keep_best: bool = False) -> Path:
        """Write a checkpoint; all ranks call this."""
        return checkpoint.save(folder, self.step, self.content(), keep, metrics=metrics, keep_best=keep_best)

    def load(self, path: Path) -> None:
        """Take over a checkpoint's content. Raises MismatchError where it holds other objects or other shapes."""
        manifest, parameters = checkpoint.read_manifest(path), {}
        for name, thing in self.objects.items():
            if isinstance(thing, torch.optim.Optimizer):
                parameters[name] = [p for group in thing.param_groups for p in group["params"]]
        saved = checkpoint.load(path, self.content(), parameters)
        if not isinstance(saved, dict):
            raise MismatchError(f"{path} holds {type(saved).__name__}, no run's objects: choose another --out")
        if set(saved) != set(self.objects):
            holds, has = ", ".join(sorted(saved)), ", ".join(sorted(self.objects))
            raise MismatchError(f"{path} holds {holds}, this run has {has}: choose another --out")
        for name, thing in self.objects.items():
            try:
                thing.load_state_dict(saved[name])
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
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
    update: Callable[[int], Metrics],
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
    `step` alone and returns metrics, floats or 0-d tensors that need not be ready; `data_seconds` among them is the
    time it waited for data. `validate(step)` is called before each save that is due and its metrics are logged. `about`
    (JSON) says what else makes this run this run: it is kept in config.json and compared on resume. `batches(step)`, a
    dict of tensors, goes into the crash dump of a step that fails. With `peak_images_per_second`, what the hardware
    could do at most, the log tells the share reached, `mfu`. Returns the last metrics.

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
                metrics = update(state.step)
                state.step += 1
                log.add(state.step, metrics)
                last, stopped = state.step == cfg.num_steps, distributed.any_rank(signals.asked)
                if last or due(state.step, cfg.log_every):
                    log.write(cfg.batch_size)
                if last or stopped or due(state.step, cfg.save_every):
                    log.check()
                    found = validate(state.step) if validate and (last or due(state.step, cfg.save_every)) else {}
                    if found:
                        log.put(found)
                    log.sync()
                    last_good = state.save(folder, cfg.keep_checkpoints, found, cfg.keep_best)
                if stopped and not last:
                    break
            if distributed.any_rank(
                signals.asked
            ):  # perhaps only during the last save: the stage after this must not begin
                where = f"step {state.step} of {cfg.num_steps}"
                raise Stopped(f"{description} stopped at {where}, saved in {last_good or out}")
    except NotFiniteError as error:
        settings = describe_run(cfg, about)
        raise explain(error, out, batches, settings, last_good, lambda path: state.save(path, 1)) from error
    return last_metrics(out)


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
        check_config(folder, cfg, about)
        state.load(found)
        distributed.on_main(lambda: checkpoint.prune(folder, state.step, cfg.keep_checkpoints, cfg.keep_best))
        if state.step > cfg.num_steps:
            raise MismatchError(f"{found} is past num_steps {cfg.num_steps}: give more, or choose another --out")
    distributed.on_main(lambda: save_config(folder, cfg, about))
    return found
