"""A crash dump of a sequence model, run again: its batch through its weights, and where it goes wrong first."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.runtime.config_json import from_json
from digit.runtime.files import load_tensors, read_json
from digit.training import checkpoint
from digit.training.config import TrainConfig
from digit.training.optim import clip_gradients
from digit.training.sequence import SequenceUpdate


@dataclass(frozen=True)
class Replay:
    """What came of it."""

    step: int
    """The step that failed, counted from 1."""
    metrics: dict[str, float]
    """Of the step as it ran again, grad_norm among them."""
    bad_weights: list[str]
    """Parameters that were not finite before the step."""
    first_bad: str | None
    """The first module whose output was not finite; None where all were."""
    bad_gradients: list[str]
    """Parameters whose gradients are not finite."""

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        lines = [f"step {self.step} again: {shown}"]
        lines.append(f"weights before the step: {named(self.bad_weights, 'all finite')}")
        lines.append(f"first output that is not finite: {self.first_bad or 'none'}")
        lines.append(f"gradients that are not finite: {named(self.bad_gradients, 'none')}")
        return "\n".join(lines)


def named(names: list[str], nothing: str, shown: int = 5) -> str:
    """'a, b and 3 more'."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more or nothing


def replay(folder: str | Path, device: str | torch.device = "cpu") -> Replay:
    """Run the step of OUT/MODEL/crash/step_... again, from its state and its batch.

    Raises DigitError where the dump is of another kind of model, or has no state from before the step.
    """
    folder = Path(folder)
    report = read_json(folder / "report.json")
    if not isinstance(report, dict) or not isinstance(report.get("settings"), dict) or "step" not in report:
        raise DigitError(f"{folder / 'report.json'} is no report of a failed step: give RUN/MODEL/crash/step_...")
    states = [path for _, path in checkpoint.list_checkpoints(folder / "state")]
    if not states:
        raise DigitError(
            f"{folder} holds no state from before the step (on a GPU nobody looked in time): go on from the last good "
            "checkpoint with max_skipped 1, which looks at each step"
        )
    update = rebuild(report, load_tensors(folder / "batch.safetensors"), torch.device(device))
    checkpoint.verify(states[-1])
    update.model.load_state_dict(checkpoint.load(states[-1], {"model": update.model.state_dict()})["model"])
    return run_again(update, report["step"])


def rebuild(report: dict[str, Any], batch: dict[str, Tensor], device: torch.device) -> SequenceUpdate:
    """The trainer of the dump; what several processes shared is cut into as many pieces here."""
    about, train = dict(report["settings"]["about"]), report["settings"]["train"]
    about.pop("tokens", None)
    try:
        model = SequenceModel(from_json(SequenceConfig, about, "report.json")).to(device).train()
        cfg = from_json(TrainConfig, train | {"compile": False, "parallel": "ddp"}, "report.json")
    except (DigitError, TypeError) as error:
        raise DigitError(f"the dump is of another model than a prior or renderer ({error})") from error
    pieces = cfg.accumulate * report.get("processes", 1)
    return SequenceUpdate(model, lambda step: batch, replace(cfg, accumulate=pieces))


def run_again(update: SequenceUpdate, step: int) -> Replay:
    """Forward and backward of one step, with an eye on every module."""
    weights = [name for name, p in update.model.named_parameters() if not p.isfinite().all()]
    found: list[str] = []
    hooks = [module.register_forward_hook(watch(name, found)) for name, module in update.model.named_modules() if name]
    metrics = update.forward_backward(update.batches(step - 1), step - 1)
    for hook in hooks:
        hook.remove()
    named_gradients = [(name, p.grad) for name, p in update.model.named_parameters() if p.grad is not None]
    gradients = [name for name, gradient in named_gradients if not gradient.isfinite().all()]
    metrics = metrics | {"grad_norm": clip_gradients(update.parameters, 0.0)}
    told = {name: float(value) for name, value in metrics.items()}
    return Replay(step, told, weights, found[0] if found else None, gradients)


def watch(name: str, found: list[str]) -> Any:
    """A forward hook that notes a module whose output is not finite; inner modules come before those around them."""

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            found.append(name)

    return look
