"""A run folder whose settings change: which stages that touches, and where what they were is kept.

OUT/earlier/N/       what the N-th change replaced: stages, pictures of the report, config.json of then. It is a run
                     folder itself. The old settings bring its stages back; deleting it frees the disk.
OUT/lengthened.json  how many updates `digit fit --more` made of how many
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.runs.checks import CODEBOOK, DECIDED_BY, SHARED, VQGAN
from digit.runs.layout import EARLIER, PAGE, RESULTS, is_done, result_of
from digit.runs.recipe import OWN_STEPS, ModelSpec, Recipe, with_settings
from digit.runs.roles import ROLES, Role, get_role
from digit.runtime.config_json import from_json
from digit.runtime.files import disk_errors, format_bytes, mark_output, read_json, write_json
from digit.runtime.request import shown, with_defaults
from digit.runtime.settings import flat
from digit.training.config import CONFIG, ENDING_SCHEDULES

STAGES = (*RESULTS, *ROLES)
LENGTHENED, PREVIEWS = "lengthened.json", "previews"
# settings that change no result, or only what is sampled afterwards
FREE_SETTING = re.compile(
    r"data\.name|reading(\..*)?|recipe\.(name|max_bad_fraction|previews|sampling\..*|masked_top_p|class_top_k"
    r"|.*\.(log_every|save_every|keep_checkpoints|keep_best|tensorboard|accumulate|checkpoint_activations|compile"
    r"|parallel|max_skipped|deterministic))"
)
DRAWING = re.compile(r"sampling\..*|masked_top_p|class_top_k")  # settings of what is sampled afterwards
STEPS = re.compile(r"(prior|renderer|pixels)_training\.num_steps|masked_steps|vq_only_steps")
MORE = re.compile(r"(?P<factor>\d+(?:\.\d+)?)x|(?P<steps>\d+)")
MAX_SHOWN = 3  # settings that a note names


# -------------------------------------------------------------------- which stages a setting decides


def changed_settings(before: Recipe, wanted: Recipe) -> list[str]:
    """Dotted names of the settings in which two recipes differ, without those that change no result."""
    old = flat(before)
    names = [name for name, value in flat(wanted).items() if old[name] != value]
    return [name for name in names if not FREE_SETTING.fullmatch(f"recipe.{name}")]


def drawing_settings(before: Recipe, wanted: Recipe) -> list[str]:
    """Dotted names of the settings of sampling in which two recipes differ: they touch the report alone."""
    old = flat(before)
    return [name for name, value in flat(wanted).items() if old[name] != value and DRAWING.fullmatch(name)]


def touching(stage: str, before: Recipe, wanted: Recipe) -> list[str]:
    """The changed settings that decide a stage (codebook, vqgan, tokens or one of ROLES)."""
    changed = changed_settings(before, wanted)
    if stage in ROLES:
        role = get_role(stage)
        labels = before.sees_labels(role) or wanted.sees_labels(role)
        return [name for name in changed if decides(name, role, labels=labels)]
    deciding = set(DECIDED_BY[stage])
    if stage == "tokens" and not (before.has_vq_tokens or wanted.has_vq_tokens):
        deciding -= set(VQGAN)
    own = [name for name in changed if name.partition(".")[0] in deciding]
    if stage == "tokens" and before.has_vq_tokens != wanted.has_vq_tokens:
        own += [name for name in changed if name == "renderer_kind"]
    return own


def decides(name: str, role: Role, *, labels: bool) -> bool:
    """Whether a setting of the recipe, by its dotted name, decides a trained model, which sees `labels` or not."""
    fields = {*SHARED, "crops_per_image", "training_crops", "validation_fraction", "informed_start"}
    fields |= {role.settings, f"{role.settings}_training", OWN_STEPS.get(role.name, role.settings)}
    fields |= set(CODEBOOK) if "discriminative" in role.tokens else set()
    fields |= set(VQGAN) if "vq" in role.tokens or role.target == "pixels" else set()
    fields |= {"class_conditional"} if labels else set()
    steps = {f"{get_role(replaced).settings}_training.num_steps" for replaced in role.replaces}
    return name.partition(".")[0] in fields or name in steps or (labels and name == "prior.label_dropout")


def lengthens(stage: str, touched: Iterable[str], before: Recipe, wanted: Recipe, *, by_more: bool) -> bool:
    """Whether a model only trains for more updates, and goes on from its checkpoint.

    `by_more`: the person asked to go on (--more). Otherwise that needs a schedule under which a longer run begins as
    the shorter one did.
    """
    if stage not in ROLES or not (touched := list(touched)) or not all(map(STEPS.fullmatch, touched)):
        return False
    old, new, role = flat(before), flat(wanted), get_role(stage)
    if any(new[name] is None or new[name] < (old[name] or 0) for name in touched):
        return False
    return by_more or begins_alike(role, wanted)


def begins_alike(role: Role, recipe: Recipe) -> bool:
    """Whether a longer training of a model begins as a shorter one: learning rate, noise and order do not see its
    length."""
    size = recipe.size(role)
    noise = size.prefix_noise if role.prefix else 0.0
    annealed = noise or (isinstance(size, ModelSpec) and role.kind == "next_token" and size.random_order)
    return recipe.training(role).may_grow and not annealed


# -------------------------------------------------------------------- a folder


@dataclass(frozen=True)
class Change:
    """What other settings mean for the stages that a run folder holds."""

    remade: Mapping[str, list[str]]
    """Stages that are made anew, each with the settings that decide it."""
    longer: list[str]
    """Models that go on."""
    kept: list[str]
    """Stages that stay."""
    back: Sequence[str] = ()
    """Stages that were made earlier with the wanted settings and are brought back."""


def find_change(out: Path, before: Recipe, wanted: Recipe, *, by_more: bool = False) -> Change:
    """Compare two recipes for the stages in a run folder, finished or begun."""
    remade: dict[str, list[str]] = {}
    longer, kept = [], []
    for stage in present(out):
        touched = touching(stage, before, wanted)
        if not touched:
            kept.append(stage)
        elif lengthens(stage, touched, before, wanted, by_more=by_more):
            longer.append(stage)
        else:
            remade[stage] = touched
    return Change(remade, longer, kept)


def present(out: Path) -> list[str]:
    """The stages that a run folder holds, finished or begun."""
    return [stage for stage in STAGES if (out / stage).is_dir() and any((out / stage).iterdir())]


def apply_change(out: Path, change: Change, config: Mapping[str, Any], *, report: bool = False) -> Path | None:
    """Move what is made anew into OUT/earlier/N, and copy there what goes on.

    A kill at any moment loses nothing: the same command, or the earlier one, finds each stage in either place. `config`
    is the config.json of what is there; `report`: the report is made anew, and copied as well. Returns that folder,
    None where none is needed.
    """
    finished = [stage for stage in change.longer if is_done(out / stage, stage)]
    if not change.remade and not finished and not (report and (out / PAGE).is_file()):
        return None
    with disk_errors(out):
        folder = next(path for n in range(1, 10**6) if not (path := out / EARLIER / str(n)).exists())
        folder.mkdir(parents=True)
        write_json(folder / CONFIG, config)
        mark_output(folder)
        for path in [*out.glob("*.png"), *out.glob("*.html"), *out.glob("metrics.json")]:
            shutil.copy2(path, folder)
        for stage in finished:
            copy_stage(out / stage, folder / stage)
            result_of(out / stage, stage).unlink()  # it is not done any more
        for stage in change.remade:
            os.replace(out / stage, folder / stage)
            for picture in (out / PREVIEWS).glob(f"{stage}_*.png"):
                (folder / PREVIEWS).mkdir(exist_ok=True)
                os.replace(picture, folder / PREVIEWS / picture.name)
    return folder


def copy_stage(stage: Path, target: Path) -> None:
    """Copy a trained model's folder. Its weights and checkpoints, which are only ever replaced, become hard links."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(stage, partial, copy_function=link_or_copy)
    os.replace(partial, target)


def link_or_copy(source: str, target: str) -> None:
    """For shutil.copytree: a hard link to a file of tensors where the file system has links, else a copy."""
    if source.endswith(".safetensors"):
        try:
            return os.link(source, target)
        except OSError:
            pass
    shutil.copy2(source, target)


def bring_back(out: Path, wanted: Recipe) -> list[str]:
    """Move stages that were made with the wanted settings back from OUT/earlier, where none is; returns their names."""
    back = []
    for stage in STAGES:
        if stage not in present(out):
            for folder, recipe in earlier(out):
                if (folder / stage).is_dir() and not touching(stage, recipe, wanted):
                    with disk_errors(out):
                        if (out / stage).is_dir():
                            (out / stage).rmdir()  # empty
                        os.replace(folder / stage, out / stage)
                    back.append(stage)
                    break
    return back


def earlier(out: Path) -> Iterator[tuple[Path, Recipe]]:
    """The folders OUT/earlier/N with the recipe that each was made with, newest first."""
    numbers = (int(path.name) for path in (out / EARLIER).glob("*") if path.name.isdecimal())
    for number in sorted(numbers, reverse=True):
        folder = out / EARLIER / str(number)
        try:
            yield folder, read_recipe(folder)
        except DigitError:
            continue


def read_recipe(folder: Path) -> Recipe:
    """The recipe in a run folder's config.json, with defaults for younger settings. Raises DigitError."""
    config = read_json(folder / CONFIG)
    given = config.get("recipe") if isinstance(config, dict) else None
    if not isinstance(given, dict):
        raise DigitError(f"{folder / CONFIG} holds no recipe: choose another --out")
    return from_json(Recipe, with_defaults(Recipe, given), f"{folder / CONFIG}: recipe")


def find_vq_tokens(out: Path, wanted: Recipe) -> Path | None:
    """Tokens in OUT/earlier whose VQ tokens a new token store of this run can take; None for none."""
    if not wanted.has_vq_tokens or is_done(out / "tokens", "tokens") or not is_done(out / "vqgan", "vqgan"):
        return None
    vqgan = read_json(out / "vqgan" / RESULTS["vqgan"]).get("fingerprint")
    for folder, recipe in earlier(out):
        changed = {name.partition(".")[0] for name in changed_settings(recipe, wanted)}
        tokens = folder / "tokens"
        right = changed.isdisjoint(DECIDED_BY["vq_tokens"]) and recipe.has_vq_tokens and is_done(tokens, "tokens")
        if right and read_json(result_of(tokens, "tokens")).get("vqgan_hash") == vqgan:
            return tokens
    return None


# -------------------------------------------------------------------- what is said


def describe_change(out: Path, change: Change, before: Recipe, wanted: Recipe, aside: Path | None) -> list[str]:
    """Sentences on what other settings mean for a run folder: what changed, what is made anew and why, what stays."""
    old, new = flat(before), flat(wanted)
    drawn = drawing_settings(before, wanted)
    changed = [*changed_settings(before, wanted), *drawn]
    told = [f"{name} was {shown(old[name])}, now {shown(new[name])}" for name in changed[:MAX_SHOWN]]
    told += [f"{len(changed) - MAX_SHOWN} more settings changed"] if len(changed) > MAX_SHOWN else []
    remade = [f"{stage} ({reasons(touched)})" for stage, touched in change.remade.items() if stage not in change.back]
    parts = [
        ("made anew", remade or ["samples and report"] * bool(drawn)),
        (f"brought back, made earlier with these settings, from {out / EARLIER}", change.back),
        ("goes on", change.longer),
        ("kept", change.kept),
    ]
    effect = "; ".join(f"{what}: {', '.join(stages)}" for what, stages in parts if stages) or "no stage is there yet"
    if told:  # no setting changed where a stage that was missing is brought back
        effect = f"{'; '.join(told)}. {effect[0].upper()}{effect[1:]}"
    notes = [f"{out}: {effect}", *describe_lengths(change, before, wanted)]
    if aside is not None:
        size = format_bytes(sum(path.stat().st_size for path in aside.rglob("*") if path.is_file()))
        notes.append(
            f"what was there before is in {aside} ({size}): the old settings bring it back, deleting it frees the disk"
        )
    return notes


def reasons(touched: list[str]) -> str:
    """'prior.depth, prior.embed_dim and 2 more'."""
    more = f" and {len(touched) - MAX_SHOWN} more" if len(touched) > MAX_SHOWN else ""
    return ", ".join(touched[:MAX_SHOWN]) + more


def describe_lengths(change: Change, before: Recipe, wanted: Recipe) -> Iterator[str]:
    """What going on means for the models: the result of a new longer run, or not and why."""
    roles = [get_role(stage) for stage in change.longer if not get_role(stage).replaces]  # those follow from others
    for alike in (True, False):
        chosen = [role for role in roles if begins_alike(role, wanted) is alike]
        lengths = [f"{r.name} from {before.training(r).num_steps} to {wanted.training(r).num_steps}" for r in chosen]
        told = f"updates: {', '.join(lengths)}"
        if chosen and alike:
            yield f"{told}, as in a new run of that length, bit for bit on a CPU"
        elif chosen:
            trainings = [wanted.training(role) for role in chosen]
            cosine = any(getattr(cfg, "schedule", "cosine") in ENDING_SCHEDULES for cfg in trainings)
            what = "noise or order is that of the longer run"
            what = "learning rate follows the longer run's cosine" if cosine else what
            yield (
                f"{told}. From here on the {what}; the first updates had the shorter one's, so a new run of that "
                "length would give something else"
            )


# -------------------------------------------------------------------- longer runs


@dataclass(frozen=True)
class Lengthening:
    """What `--more` asks of a run folder; `record` is written to OUT/lengthened.json when the work begins."""

    recipe: Recipe
    record: Mapping[str, Any]


def with_more(recipe: Recipe, out: Path, more: str) -> Lengthening:
    """The recipe with more updates of prior and renderer: "2x" or "1.5x" of those so far, or so many more updates.

    As long as a lengthening is not finished, the same or another one counts from where it began, so that a command that
    was killed can be typed again. The VQGAN stays as it is: another one would change all VQ tokens.

    Raises DigitError for what is no number, for fewer updates, and where there is no run to lengthen.
    """
    if not (out / CONFIG).is_file():
        raise DigitError(f"--more is {more}, but {out} holds no run that could go on: leave it out")
    record = read_record(out)
    names = steps_of(recipe)
    unfinished = record.get("done") is False and set(record.get("from", {})) == set(names)
    start = dict(record["from"]) if unfinished else {name: flat(recipe)[name] for name in names}
    longer = {name: count_more(steps, more) for name, steps in start.items()}
    if any(longer[name] <= start[name] for name in names):
        raise DigitError(f"--more is {more}: give more than 1x, or a number of updates above 0")
    record = {
        "first": record.get("first", start) if record.get("first", {}).keys() == start.keys() else start,
        "from": start,
        "to": longer,
        "asked": more,
        "done": False,
    }
    return Lengthening(with_settings(recipe, longer), record)


def count_more(steps: int, more: str) -> int:
    """Updates that `more` makes of `steps`."""
    match = MORE.fullmatch(more)
    if match is None:
        raise DigitError(f"--more is {more}: give a factor such as 2x or 1.5x, or a number of updates such as 2000")
    return round(steps * float(match["factor"])) if match["factor"] else steps + int(match["steps"])


def steps_of(recipe: Recipe) -> list[str]:
    """Names of the settings that say for how many updates the run's prior and renderer train."""
    names = []
    for role in map(get_role, recipe.model_names):
        own = OWN_STEPS.get(role.name)
        taken = own is not None and getattr(recipe, own) is not None
        names.append(own if own is not None and taken else f"{role.settings}_training.num_steps")
    return names


def read_record(out: Path) -> dict[str, Any]:
    """OUT/lengthened.json; {} where there is none."""
    path = out / LENGTHENED
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def keep_length(recipe: Recipe, out: Path, typed: Iterable[str]) -> Recipe:
    """The recipe with the updates that --more gave the run in `out`, except for settings that somebody typed now."""
    record, typed, values = read_record(out), set(typed), flat(recipe)
    first, to = (found if isinstance(found := record.get(name), dict) else {} for name in ("first", "to"))
    lengthened = {n: to[n] for n, steps in first.items() if n in to and n not in typed and values.get(n) == steps}
    return with_settings(recipe, lengthened)


def finish_lengthening(out: Path) -> None:
    """Note that the run is finished at its new length: a further --more counts from there."""
    if (record := read_record(out)).get("done") is False:
        write_json(out / LENGTHENED, record | {"done": True})


def continue_training(
    model: Path, out: Path, num_steps: int, tokens: Mapping[str, str], defaults: Mapping[str, Any]
) -> None:
    """Bring the record beside a model's checkpoints up to date, which the training compares with its settings.

    A run that was lengthened trains on to `num_steps`, whatever its schedule. Of the fingerprints in the record those
    of `tokens` stay: older versions named parts that the model does not read. Settings of the model that an older
    version lacked get their `defaults`.
    """
    path = model / "checkpoints" / CONFIG
    found = read_json(path) if path.is_file() else None
    if not isinstance(found, dict):
        return
    train, about = found.get("train"), found.get("about")
    if not isinstance(train, dict) or not isinstance(about, dict):
        return
    about = {**defaults, **about}
    steps, read = train.get("num_steps"), about.get("tokens")
    if isinstance(steps, int) and steps < num_steps and read_record(out):
        train = train | {"num_steps": num_steps}
    if isinstance(read, dict):
        about = about | {"tokens": {part: read[part] for part in read if part in tokens}}
    if (current := {**found, "train": train, "about": about}) != found:
        write_json(path, current)
