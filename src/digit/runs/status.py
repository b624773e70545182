"""How far a run folder is, and what to type next; read from its files, whatever state it is in."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.models.sequence import training_flops
from digit.pipeline.sample_journal import GRID, JOURNAL, SAMPLES
from digit.runs.codebook_quality import quality_text
from digit.runs.layout import EARLIER, PAGE, RESULTS, is_done, require_format
from digit.runs.reading import recorded_reading, with_reading
from digit.runs.recipe import Recipe, TokenSpace
from digit.runs.roles import ROLES, get_role
from digit.runtime import lock
from digit.runtime.config_json import from_json
from digit.runtime.files import as_path, read_json
from digit.runtime.ledger import progress
from digit.runtime.progress import format_duration
from digit.training import checkpoint
from digit.training.config import CONFIG
from digit.training.log import last_metrics, read_log

STAGES = ("codebook", "vqgan", "tokens", *ROLES)
LOSSES = ("nll", "loss", "val_nll", "l1", "val_l1")  # nats per token; mean absolute error of pixels
LARGEST = 1e12  # a loss that a curve shows
RECENT = 20  # lines of a log that tell the present speed


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
    lines += [f"left       {left}" for left in [time_left(folder)] if left is not None and left.seconds]
    return "\n".join([*lines, *describe_earlier(folder), *describe_work(folder)])


def describe_earlier(folder: Path) -> Iterator[str]:
    """At most one line: where what other settings replaced is kept."""
    kept = sorted((int(path.name) for path in (folder / EARLIER).glob("*") if path.name.isdecimal()), reverse=True)
    if kept:
        changes, newest = "change" if len(kept) == 1 else "changes", folder / EARLIER / str(kept[0])
        yield f"earlier    {len(kept)} {changes} of settings, what the last one replaced: {newest}"


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


def last_note(place: Path) -> str:
    """The last note in the log of a stage's folder, about a loss that jumped, for example; empty without one."""
    try:
        notes = [line["note"] for line in read_log(place / "log.jsonl") if isinstance(line.get("note"), str)]
    except OSError:
        return ""
    return notes[-1] if notes else ""


def seconds_left(place: Path) -> float | None:
    """Seconds until the training in a stage's folder ends, at its present speed; None where its log does not tell."""
    try:
        total = read_json(place / "checkpoints" / CONFIG)["train"]["num_steps"]
        step, pace = speed_of(place)
        left = max(0.0, (total - step) * pace)
        return left if left < LARGEST else None
    except (DigitError, OSError, KeyError, TypeError, IndexError, OverflowError):
        return None


def speed_of(place: Path) -> tuple[int, float]:
    """The last step in the log of a stage's folder, and seconds a step over its last RECENT lines.

    Raises OSError without a log, IndexError without a timed line.
    """
    lines = read_log(place / "log.jsonl")
    timed = [line for line in lines if isinstance(line.get("seconds"), int | float) and abs(line["seconds"]) < LARGEST]
    first, last = ([{"step": 0, "seconds": 0.0}, *timed])[-RECENT - 1 :][0], timed[-1]
    return last["step"], max(0.0, last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"])


@dataclass(frozen=True)
class TimeLeft:
    """How long a run will still train, as far as its logs tell; samples and report come after it."""

    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each stage that still has to train."""
    unknown: tuple[str, ...] = ()
    """Stages that have not begun, and whose time the others do not tell."""

    @property
    def seconds(self) -> float:
        """Seconds of all the known ones."""
        return sum(self.stages.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in self.stages.items() if seconds)
        least, others = ("at least", f"; not known yet: {', '.join(self.unknown)}") if self.unknown else ("about", "")
        return f"{least} {format_duration(self.seconds)} of training: {parts}{others}"


def time_left(folder: str | Path) -> TimeLeft | None:
    """How long a run will still train; None where nothing is left, or where config.json does not tell its stages.

    A stage that has begun goes on at the present speed of its log. A model that has not begun takes as long for each of
    its training FLOPs as a model of this run that has; those of a renderer straight to pixels are not counted.
    """
    folder = as_path(folder)
    if (folder / "pipeline" / "pipeline.json").is_file():
        return None
    try:
        recipe = from_json(Recipe, read_json(folder / "config.json")["recipe"], "config.json")
    except (DigitError, OSError, KeyError, TypeError):
        return None
    order = stages_of(recipe)
    begun = [name for name in order if next(describe_stage(folder, name), None) is not None]
    place = order.index(begun[-1]) if begun else 0  # what is missing before it was taken from another run
    left = [name for name in order[place:] if not is_done(folder / name, name)]
    pace = max((pace for name in order if (pace := flop_seconds(folder, recipe, name)) is not None), default=None)
    stages: dict[str, float | None] = {name: seconds_left(folder / name) for name in left}
    for name, flops in ((name, flops_of(folder, recipe, name)) for name in left if stages[name] is None):
        if name == "vqgan" and not recipe.vqgan_training.num_steps:  # it takes its start as it is
            stages[name] = 0.0
        elif flops is not None and pace is not None:
            stages[name] = flops * pace
    known = {name: seconds for name, seconds in stages.items() if seconds is not None and seconds < LARGEST}
    return TimeLeft(known, tuple(name for name in left if name not in known)) if left else None


def stages_of(recipe: Recipe) -> list[str]:
    """The stages of a recipe, in their order."""
    return ["codebook", *(["vqgan"] if recipe.has_vqgan else []), "tokens", *recipe.model_names]


def flop_seconds(folder: Path, recipe: Recipe, name: str) -> float | None:
    """Seconds that a model of a run took for each training FLOP; None without a log, or where nobody counts them."""
    flops = flops_of(folder, recipe, name)
    try:
        return None if not flops else speed_of(folder / name)[1] * recipe.training(get_role(name)).num_steps / flops
    except (DigitError, OSError, KeyError, TypeError, IndexError):
        return None


def flops_of(folder: Path, recipe: Recipe, name: str) -> float | None:
    """FLOPs of a sequence model's whole training, from the manifest of the run's tokens; None where those are not made,
    and for other stages."""
    if name not in ROLES or get_role(name).kind == "pixels":
        return None
    training = recipe.training(get_role(name))
    try:
        manifest = read_json(folder / "tokens" / RESULTS["tokens"])
        spaces = {
            kind: TokenSpace(made["vocab_size"], made["length"], made["grid"][0], made.get("levels", 1))
            for kind in ("discriminative", "vq")
            if (made := manifest.get(kind))
        }
        classes = len(manifest["classes"]) if recipe.class_conditional else 0
        flops = training_flops(recipe.sequence_config(name, spaces, num_classes=classes))
    except (DigitError, OSError, KeyError, TypeError, AttributeError):
        return None
    return flops * training.num_steps * training.batch_size


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
        return
    command = str(lock.last_writer(folder).get("command", ""))
    # a lock file that something else wrote must not tell the user what to type
    known = command.split(" ")[0] in ("digit", "torchrun", "srun")
    again = (
        with_reading(command, recorded_reading(folder)) if known else "the command that began it, with the same --out"
    )
    if (folder / "pipeline").is_dir() and not has_new_models(folder):
        if not (folder / PAGE).is_file() and " fit " in f"{command} ":
            yield f"report     not finished; to continue: {again}"
        yield f"next       digit sample --from {shlex.quote(str(folder))} --num 64 --out samples"
    else:
        yield f"next       not running; to continue: {again}"


def has_new_models(folder: Path) -> bool:
    """Whether models of the run's settings are still to be trained: a pipeline there is then of earlier settings."""
    cfg = read_json(folder / "config.json") if is_run(folder) else {}
    try:
        names = from_json(Recipe, cfg["recipe"], "recipe").model_names
    except (DigitError, KeyError, TypeError):
        return False
    # others may be reused ones of another folder
    own = [name for name in names if (folder / name).is_dir() or any((folder / EARLIER).glob(f"*/{name}"))]
    return any(not is_done(folder / name, name) for name in own)
