"""An experiment is a list of steps and a summary; finished steps are read from their files."""

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from digit import __version__
from digit.runtime.files import atomic_path, plain, read_json, write_json
from digit.runtime.hardware import describe_machine
from digit.runtime.progress import Stages, format_duration

DAY = 86_400.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Step:
    """One part of an experiment, whose result is saved as JSON."""

    name: str
    """Name of its file, OUT/steps/NAME.json; steps of two experiments with one name are the same step."""
    seconds: float
    """Estimated time on this machine."""
    make: Callable[[], Any]
    version: int = 1
    """Increase it when the computation changes: results of older versions are computed again."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of an experiment."""

    table: str
    """Markdown; the paper's values beside ours."""
    metrics: dict[str, Any]
    """All metrics, for results.json."""
    pictures: list[Path] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure of the paper at one scale."""

    title: str
    steps: Sequence[Step]
    summarise: Callable[[dict[str, Any], Path], Outcome]
    """(results of the steps by name, the experiment's folder) -> Outcome; it writes plots into the folder."""


def plan(experiment: Experiment, out: Path) -> str:
    """List the steps with estimated times, and which are done, as text."""
    lines = [f"{experiment.title}"]
    left = 0.0
    for step in experiment.steps:
        done = kept_result(out, step) is not None
        left += 0 if done else step.seconds
        lines.append(f"  {'done' if done else about(step.seconds):>9}  {step.name}")
    lines.append(f"  {about(left):>9}  to go")
    return "\n".join(lines)


def about(seconds: float) -> str:
    """`~4:10`, `~13 days`."""
    return f"~{seconds / DAY:.0f} days" if seconds > 3 * DAY else f"~{format_duration(seconds)}"


def step_path(out: Path, step: Step) -> Path:
    """File of a step's result."""
    return out / "steps" / f"{step.name}.json"


def kept_result(out: Path, step: Step) -> dict[str, Any] | None:
    """Content of a step's file: result, seconds, version, revision, hardware; None if the step has to run."""
    path = step_path(out, step)
    kept = read_json(path) if path.exists() else None
    if not isinstance(kept, dict) or "result" not in kept or "seconds" not in kept:
        return None
    return kept if kept.get("version", 1) == step.version else None


def perform(experiment: Experiment, out: Path, name: str, context: dict[str, Any]) -> Outcome:
    """Run the remaining steps, then write the summary: OUT/NAME/results.json, table.md and plots."""
    results, made = {}, {}
    done = [step.name for step in experiment.steps if kept_result(out, step) is not None]
    seconds = {step.name: 0.0 if step.name in done else step.seconds for step in experiment.steps}
    stages = Stages(list(seconds), seconds)
    for step in experiment.steps:
        kept = kept_result(out, step)
        if kept is None:
            started = time.monotonic()
            with stages.enter(step.name):
                result = plain(step.make())
            kept = {"result": result, "seconds": time.monotonic() - started, "estimated_seconds": step.seconds}
            kept |= {"version": step.version} | provenance()
            write_json(step_path(out, step), kept)
        results[step.name] = kept["result"]
        made[step.name] = {name: value for name, value in kept.items() if name != "result"}
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    outcome = experiment.summarise(results, folder)
    for picture in outcome.pictures:
        if picture.parent != folder:  # written by an evaluation
            shutil.copyfile(picture, folder / picture.name)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(f"# {experiment.title}\n\n{outcome.table.rstrip()}\n", encoding="utf-8")
    write_json(
        folder / "results.json",
        plain(
            {"experiment": name, "title": experiment.title}
            | context
            | {"metrics": outcome.metrics, "steps": made, "seconds": sum(step["seconds"] for step in made.values())}
            | {"summarised_by": provenance()}
        ),
    )
    return outcome


def provenance() -> dict[str, Any]:
    """Versions, source revision and hardware, for results files."""
    return {"digit": __version__, "torch": torch.__version__, "revision": revision(), "hardware": describe_machine()}


def revision() -> str | None:
    """Git commit of the package's checkout, "-dirty" if files differ from it; None for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
