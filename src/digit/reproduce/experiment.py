"""An experiment is a list of steps and a summary; finished steps are read from their files.

Several ranks (torchrun) make a step together. Rank 0 alone looks which steps are done and writes their files, because a
shared file system can show new files late; every rank gets the same results.
"""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from digit.runs.recipes import Recipe
from digit.runtime import distributed
from digit.runtime.files import atomic_path, plain, read_json, write_json
from digit.runtime.hardware import describe_machine
from digit.runtime.progress import Stages, format_duration
from digit.runtime.version import __version__
from digit.tokenizers.encoders import EncoderConfig

DAY = 86_400.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a step needs of the machine and of its user, for the checks before anything starts (`checks.py`)."""

    models: tuple[tuple[str, Recipe], ...] = ()
    """Models (names of ROLES) that it trains, each with its recipe."""
    images: int = 0
    """Images that it samples or reconstructs, and whose features it keeps."""
    parts: tuple[str, ...] = ()
    """Parts of a run (codebook, vqgan, tokens) that it makes,"""
    recipe: Recipe | None = None
    """with this recipe."""
    linked: bool = False
    """Whether the VQ tokens of its store are links to those of the base run."""
    encoders: tuple[EncoderConfig, ...] = ()
    """Encoders that it loads beside the recipe's."""
    folders: tuple[str, ...] = ()
    """Where it writes all of that: glob patterns in OUT. What a killed run has left there needs no further room."""
    passing: int = 0
    """Bytes of files that it deletes when it is done: a probe's features,"""
    passing_folders: tuple[str, ...] = ()
    """and where it writes them."""


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
    serial: bool = False
    """Rank 0 makes it alone while the others wait. Such a step may use no run of the study, which all ranks share."""
    needs: Needs = field(default_factory=Needs)
    """For the checks before anything starts."""


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
    """Each counts once, however often it is listed."""
    summarise: Callable[[dict[str, Any], Path], Outcome]
    """(results of the steps by name, the experiment's folder) -> Outcome; it writes plots into the folder. Every rank
    calls it, so that what it asks of the study is asked on all of them; only rank 0's folder is kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", list({step.name: step for step in self.steps}.values()))


def plan(experiments: Experiment | Sequence[Experiment], out: Path) -> str:
    """List the steps with estimated times, and which are done, as text; a step of several experiments counts once."""
    listed = [experiments] if isinstance(experiments, Experiment) else experiments
    lines, left = [], 0.0
    names: set[str] = set()
    for experiment in listed:
        lines.append(experiment.title)
        for step in experiment.steps:
            done, known = kept_result(out, step) is not None, step.name in names
            left += 0 if done or known else step.seconds
            lines.append(f"  {'done' if done else 'as above' if known else about(step.seconds):>9}  {step.name}")
            names.add(step.name)
    lines.append(f"  {about(left):>9}  to go")
    return "\n".join(lines)


def to_do(experiments: Sequence[Experiment], out: Path) -> list[Step]:
    """The steps without a result, each once; the same on every rank."""
    steps = {step.name: step for experiment in experiments for step in experiment.steps}
    missing = distributed.on_main(lambda: [name for name, step in steps.items() if kept_result(out, step) is None])
    return [steps[name] for name in missing]


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
    """Run the remaining steps, then write the summary: OUT/NAME/results.json, table.md and plots.

    All ranks call it together, and each gets the outcome.
    """
    results, made = {}, {}
    kept_steps = distributed.on_main(lambda: {step.name: kept_result(out, step) for step in experiment.steps})
    seconds = {step.name: 0.0 if kept_steps[step.name] else step.seconds for step in experiment.steps}
    stages = Stages(list(seconds), seconds)
    for step in experiment.steps:
        kept = kept_steps[step.name]
        if kept is None:
            with stages.enter(step.name):
                kept = make_step(step, out)
        results[step.name] = kept["result"]
        made[step.name] = {key: value for key, value in kept.items() if key != "result"}
    title = f"REHEARSAL: {experiment.title}" if context.get("rehearsal") else experiment.title
    about = {"experiment": name, "title": title} | context
    outcome = summarised(experiment, results, out / name)
    distributed.on_main(lambda: write_outcome(outcome, out / name, about, made))
    return outcome


def make_step(step: Step, out: Path) -> dict[str, Any]:
    """Make a step on all ranks; rank 0 writes its file. Returns the file's content."""
    started = time.monotonic()
    result = distributed.on_main(step.make) if step.serial else step.make()

    def keep() -> dict[str, Any]:
        kept = {"result": plain(result), "seconds": time.monotonic() - started, "estimated_seconds": step.seconds}
        kept |= {"ranks": ranks, "version": step.version} | provenance()
        write_json(step_path(out, step), kept)
        return kept

    ranks = distributed.world_size()
    return distributed.on_main(keep)


def summarised(experiment: Experiment, results: dict[str, Any], folder: Path) -> Outcome:
    """Summarise on every rank; what ranks other than 0 write is thrown away."""
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        return experiment.summarise(results, folder)
    with tempfile.TemporaryDirectory() as scratch:
        return experiment.summarise(results, Path(scratch))


def write_outcome(outcome: Outcome, folder: Path, about: Mapping[str, Any], made: dict[str, Any]) -> None:
    """Write table.md and results.json, and copy pictures that an evaluation has written elsewhere."""
    for picture in outcome.pictures:
        if picture.parent != folder:
            shutil.copyfile(picture, folder / picture.name)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(f"# {about['title']}\n\n{outcome.table.rstrip()}\n", encoding="utf-8")
    whole = {"metrics": outcome.metrics, "steps": made, "seconds": sum(step["seconds"] for step in made.values())}
    write_json(folder / "results.json", plain({**about, **whole, "summarised_by": provenance()}))


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
