"""How far a run folder is, and what to type next; read from its files, whatever state it is in."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.pipeline.sample_journal import GRID, JOURNAL, SAMPLES
from digit.runs.codebook_quality import quality_text
from digit.runs.layout import RESULTS, is_done, require_format
from digit.runs.roles import ROLES
from digit.runtime import lock
from digit.runtime.files import as_path, read_json
from digit.runtime.ledger import progress
from digit.training import checkpoint
from digit.training.config import CONFIG
from digit.training.log import last_metrics, read_log

STAGES = ("codebook", "vqgan", "tokens", *ROLES)
LOSSES = ("nll", "loss", "val_nll")
LARGEST = 1e12  # a loss that a curve shows


def is_run(folder: str | Path) -> bool:
    """Whether `digit fit` or one of its stages wrote to this folder."""
    path = as_path(folder) / "config.json"
    return path.is_file() and isinstance(read_json(path), dict) and "recipe" in read_json(path)


def describe_run(folder: str | Path) -> str:
    """One line per stage that was begun, which process is running, and the command to continue. Raises DigitError."""
    folder = as_path(folder)
    cfg = read_json(folder / "config.json")
    require_format(cfg, folder / "config.json")
    recipe, data = (part if isinstance(part := cfg.get(name), dict) else {} for name in ("recipe", "data"))
    lines = [f"run        recipe {recipe.get('name', '?')} on {data.get('name', '?')}"]
    lines += [f"{stage:<10} {state}" for stage in STAGES for state in describe_stage(folder, stage)]
    return "\n".join([*lines, *describe_work(folder)])


def describe_stage(folder: Path, stage: str) -> Iterator[str]:
    """At most one line: done, how far, or nothing where it was not begun."""
    place = folder / stage
    if is_done(place, stage):
        yield f"done{quality_of(place) if stage == 'codebook' else metrics_of(place)}"
    elif stage == "tokens" and (place / "journal.json").is_file():
        yield f"{progress(place / 'journal.json')} rows are done"
    elif stage == "codebook" and list(place.glob("*.partial*")):
        yield "the fit is under way"
    elif (place / "checkpoints" / CONFIG).is_file():
        yield describe_training(place)


def describe_training(place: Path) -> str:
    """'step 400 of 1000, saved 400, best val_nll 3.1 at step 300, loss 3.2'."""
    folder = place / "checkpoints"
    cfg = read_json(folder / CONFIG)
    train = cfg.get("train") if isinstance(cfg, dict) else None
    total = train.get("num_steps", "?") if isinstance(train, dict) else "?"
    saved = [step for step, _ in checkpoint.list_checkpoints(folder)]
    metrics = last_metrics(place)
    parts = [f"step {metrics.get('step', saved[-1] if saved else 0)} of {total}"]
    parts.append(f"saved at step {saved[-1]}" if saved else "nothing saved yet")
    if (best := checkpoint.best(folder)) is not None:
        parts.append(f"lowest validation loss {best[1]:.4g} in {best[0].name}")
    if crashes := sorted(place.glob("crash/step_*")):
        parts.append(f"a step failed: {crashes[-1]}")
    return ", ".join(parts) + shown(metrics)


def read_losses(place: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a model's log.jsonl, (step, value), of LOSSES that were logged, without NaN and infinity."""
    lines = read_log(place / "log.jsonl")
    curves = {
        key: [
            (line["step"], line[key])
            for line in lines
            if isinstance(line.get(key), int | float) and abs(line[key]) < LARGEST
        ]
        for key in LOSSES
    }
    return {key: points for key, points in curves.items() if points}


def seconds_left(place: Path) -> float | None:
    """Seconds until the training in a stage's folder ends, at the speed of its log; None where that is unknown."""
    try:
        total = read_json(place / "checkpoints" / CONFIG)["train"]["num_steps"]
        timed = [line for line in read_log(place / "log.jsonl") if isinstance(line.get("seconds"), int | float)]
        return max(0.0, (total - timed[-1]["step"]) * timed[-1]["seconds"] / max(1, timed[-1]["step"]))
    except (DigitError, OSError, KeyError, TypeError, IndexError):
        return None


def metrics_of(place: Path) -> str:
    """The last metrics of a trained model, in brackets."""
    try:
        return shown(last_metrics(place))
    except (DigitError, OSError):
        return ""


def quality_of(place: Path) -> str:
    """What a codebook's tokens keep, in brackets."""
    try:
        about = read_json(place / RESULTS["codebook"])
    except DigitError:
        return ""
    text = quality_text(about) if isinstance(about, dict) else ""
    return f" ({text})" if text else ""


def shown(metrics: dict[str, Any]) -> str:
    """' (loss 3.2, val_nll 3.1)', or nothing."""
    known = {name: metrics[name] for name in ("loss", "val_nll", "psnr") if isinstance(metrics.get(name), int | float)}
    told = [f"{name} {value:.4g}" for name, value in known.items()]
    return f" ({', '.join(told)})" if told else ""


def is_sample_folder(folder: str | Path) -> bool:
    """Whether `digit sample` wrote to this folder."""
    return any((as_path(folder) / name).is_file() for name in (SAMPLES, JOURNAL))


def describe_sample_folder(folder: str | Path) -> str:
    """How many of the images are sampled, and what to type next; it only reads, so sampling may go on meanwhile."""
    folder = as_path(folder)
    done = (folder / SAMPLES).is_file()
    about = read_json(folder / (SAMPLES if done else JOURNAL))
    request = about.get("request") if isinstance(about, dict) else None
    num = request.get("num", "?") if isinstance(request, dict) else "?"
    if done:
        return f"samples    {num} images, all sampled: {folder / GRID}"
    begun = f"samples    {progress(folder / JOURNAL)} of {num} images are sampled"
    return "\n".join([begun, *describe_work(folder)])


def describe_work(folder: Path) -> Iterator[str]:
    """Which process is running, or what to type next."""
    if (holder := lock.holder(folder)) is not None:
        yield f"at work    {lock.describe(holder)}: {holder.get('command', 'digit')}"
    elif (folder / "pipeline").is_dir():
        yield f"next       digit sample --from {shlex.quote(str(folder))} --num 64 --out samples"
    else:
        command = str(lock.last_writer(folder).get("command", ""))
        # a lock file that something else wrote must not tell the user what to type
        known = command.split(" ")[0] in ("digit", "torchrun", "srun")
        again = command if known else "the command that began it, with the same --out"
        yield f"next       not running; to continue: {again}"
