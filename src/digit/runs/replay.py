"""Runs the step of a crash dump again and reports the first values that are not finite."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.runtime.config_json import from_json
from digit.runtime.files import as_path, load_tensors, read_json
from digit.training import checkpoint
from digit.training.config import TrainConfig
from digit.training.optim import clip_gradients
from digit.training.sequence import SequenceUpdate, add_code_heads


@dataclass(frozen=True)
class Replay:
    """The outcome of a failed step that was run again."""

    step: int
    """The failed step, counted from 1."""
    metrics: dict[str, float]
    """Metrics of the repeated step, including grad_norm."""
    bad_weights: list[str]
    """Parameters that were not finite before the step."""
    first_bad: str | None
    """The first module whose output was not finite; None if all were finite."""
    bad_gradients: list[str]
    """Parameters whose gradients are not finite."""

    def __str__(self) -> str:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        lines = [f"step {self.step} again: {metrics}"]
        lines.append(f"weights that are not finite before the step: {format_names(self.bad_weights)}")
        lines.append(f"first output that is not finite: {self.first_bad or 'none'}")
        lines.append(f"gradients that are not finite: {format_names(self.bad_gradients)}")
        return "\n".join(lines)


def format_names(names: list[str], num_shown: int = 5) -> str:
    """['a', 'b', ...] -> 'a, b and 3 more'; 'none' for an empty list."""
    more = f" and {len(names) - num_shown} more" if len(names) > num_shown else ""
    return ", ".join(names[:num_shown]) + more or "none"


def replay(folder: str | Path, device: str | torch.device = "cpu") -> Replay:
    """Run the step of OUT/MODEL/crash/step_... again from its saved state and batch.

    Raises DigitError if the dump is not of a sequence model or has no state from before the step.
    """
    folder = as_path(folder)
    report = read_json(folder / "report.json")
    if not isinstance(report, dict) or not isinstance(report.get("settings"), dict) or "step" not in report:
        raise DigitError(f"{folder / 'report.json'} is not the report of a failed step: give RUN/MODEL/crash/step_...")
    states = [path for _, path in checkpoint.list_checkpoints(folder / "state")]
    if not states:
        raise DigitError(
            f"{folder} holds no state from before the step, because a GPU run checks its values only when it logs or "
            "saves: resume from the last good checkpoint with max_skipped 1, which checks every step"
        )
    checkpoint.verify(states[-1])
    state = checkpoint.load(states[-1], {})["model"]
    codes = state.get("code_heads.codes")
    update = rebuild(report, load_tensors(folder / "batch.safetensors"), torch.device(device), codes)
    update.model.load_state_dict(state)
    return run_again(update, report["step"])


def rebuild(
    report: dict[str, Any], batch: dict[str, Tensor], device: torch.device, codes: Tensor | None
) -> SequenceUpdate:
    """The trainer of the dump; the shares of several processes become micro-batches of this one.

    `codes` (L V, C) are the code vectors of its code heads, if it has any.
    """
    about, train = dict(report["settings"]["about"]), report["settings"]["train"]
    about.pop("tokens", None)
    try:
        model = SequenceModel(from_json(SequenceConfig, about, "report.json")).to(device).train()
        cfg = from_json(TrainConfig, train | {"compile": False, "parallel": "ddp"}, "report.json")
    except (DigitError, TypeError) as error:
        raise DigitError(f"the dump is not of a prior or renderer ({error})") from error
    add_code_heads(model, None if codes is None else codes.unflatten(0, (model.cfg.levels, -1)), cfg)
    num_micro_batches = cfg.accumulate * report.get("processes", 1)
    return SequenceUpdate(model, lambda step: dict(batch), replace(cfg, accumulate=num_micro_batches))


def run_again(update: SequenceUpdate, step: int) -> Replay:
    """Forward and backward of one step, checking the output of every module."""
    bad_weights = [name for name, p in update.model.named_parameters() if not p.isfinite().all()]
    bad_modules: list[str] = []
    hooks = [
        module.register_forward_hook(record_not_finite(name, bad_modules))
        for name, module in update.model.named_modules()
        if name
    ]
    metrics = update.forward_backward(update.batches(step - 1), step - 1)
    for hook in hooks:
        hook.remove()
    gradients = [(name, p.grad) for name, p in update.model.named_parameters() if p.grad is not None]
    bad_gradients = [name for name, gradient in gradients if not gradient.isfinite().all()]
    metrics = metrics | {"grad_norm": clip_gradients(update.parameters, 0.0)}
    metrics = {name: float(value) for name, value in metrics.items()}
    return Replay(step, metrics, bad_weights, bad_modules[0] if bad_modules else None, bad_gradients)


def record_not_finite(name: str, bad_modules: list[str]) -> Any:
    """A forward hook that appends `name` if the output is not finite; inner modules come before outer ones."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            bad_modules.append(name)

    return hook
