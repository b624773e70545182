"""Commands that train: fit and its stages codebook, tokenize and train; pretrain for encoders."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from digit.cli.arguments import (
    CONFIG_HELP,
    DATA_HELP,
    DEFAULT_RECIPE,
    DEVICE_HELP,
    SHEET,
    add_config,
    add_reading,
    command,
    note,
    open_data,
    parse,
    read_config,
    say,
    typed_settings,
    value_of,
    wants_help,
)
from digit.errors import DigitError
from digit.runtime import distributed
from digit.runtime.settings import changed

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from digit.runs.fit import Run
    from digit.runs.recipe import Recipe

MORE_HELP = (
    "go on from what is in --out for more updates of prior and renderer: a factor such as 2x or 1.5x, or a number of "
    "updates; the schedule is that of the longer run from there on, the VQGAN stays"
)


class Base(NamedTuple):
    """What sets the defaults of a run's options, and what to say of it once the settings are known to be right."""

    recipe: "Recipe"
    said: str = ""


def add_run_arguments(parser: "ArgumentParser", argv: Sequence[str], *, more: bool = False) -> Base:
    """Add DATA, --recipe, --out, one dotted option for each field of the recipe, and with `more` --more.

    Returns the recipe whose settings are the defaults (`choose_base`).
    """
    from digit.runs.recipe import Recipe
    from digit.runs.recipes import RECIPES

    base = distributed.on_main(lambda: choose_base(argv))  # all processes of a job, one base
    parser.add_argument("data", help=DATA_HELP)
    parser.add_argument(
        "--recipe",
        default=None,
        help=f"recipe that sets the defaults shown here: {', '.join(sorted(RECIPES))} (default: that of the run in "
        f"--out, for a new one {DEFAULT_RECIPE}, whose size and length suit this machine)",
    )
    parser.add_argument(
        "--out",
        required=True,
        help="run folder; run again with the same folder to continue, or with other settings: what these do not touch "
        "is kept, what was there before goes to OUT/earlier",
    )
    add_reading(parser)
    parser.add_argument("--device", default=None, help=DEVICE_HELP)
    for part in ("codebook", "vqgan", "tokens"):
        parser.add_argument(
            f"--reuse_{part}", default=None, help=f"folder of another run's {part} to use instead of making one"
        )
    parser.add_argument(
        "--reuse_vq_tokens",
        default=None,
        help="folder of another run's tokens, of the same crops and VQGAN: its VQ tokens are taken (hard links)",
    )
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_class_arguments(Recipe, as_group=True)
    parser.set_defaults({f.name: _default(getattr(base.recipe, f.name)) for f in fields(base.recipe)})
    if more:
        parser.add_argument("--more", default=None, help=MORE_HELP)
    return base


def choose_base(argv: Sequence[str]) -> Base:
    """The recipe that sets the defaults of a run, read before the parser exists.

    A run in --out keeps its settings where no recipe is typed, or the one for any machine; a recipe that is typed sets
    all defaults, with the updates that --more gave the run. A new run without a recipe takes the one for any machine.
    """
    from digit.planning.choice import ANY_MACHINE, choose_photos
    from digit.planning.machines import this_machine
    from digit.runs.changes import keep_length
    from digit.runs.recipes import get_recipe
    from digit.runtime.files import as_path
    from digit.runtime.hardware import choose_device
    from digit.runtime.network import offline

    name, out = value_of(argv, "--recipe"), value_of(argv, "--out")
    if wants_help(argv):
        return Base(get_recipe(name or DEFAULT_RECIPE))
    folder = as_path(out) if out else None
    if name in (None, ANY_MACHINE) and folder and (there := settings_there(folder)) is not None:
        return Base(there)
    if name in (None, ANY_MACHINE):
        choice = choose_photos(this_machine(choose_device(value_of(argv, "--device"))), online=not offline())
        return Base(choice.recipe, str(choice))
    recipe = get_recipe(name)
    typed = [word.partition("=")[0].removeprefix("--") for word in argv]
    return Base(keep_length(recipe, folder, typed) if folder else recipe)


def settings_there(out: Path) -> "Recipe | None":
    """The settings of the run in a folder; None where there is none that can be read."""
    from digit.runs.changes import read_recipe
    from digit.runs.status import is_run

    try:
        return read_recipe(out) if is_run(out) else None
    except (DigitError, OSError):
        return None  # the run says what is wrong with it


def keep_reading(args: Any, argv: Sequence[str]) -> None:
    """Read the data as before where the run in --out is continued: with the options that it was made with and that are
    not typed now. Says which these are."""
    from digit.runs.reading import option_words
    from digit.runtime.files import as_path

    there = distributed.on_main(lambda: reading_there(as_path(args.out), args.data))
    typed = {name for name in there if value_of(argv, f"--{name}") is not None}
    typed |= {name for name in there if getattr(args, name) not in (None, "auto")}  # in a settings file
    kept = {name: value for name, value in there.items() if name not in typed}
    for name, value in kept.items():
        setattr(args, name, value)
    if kept:
        note(f"{shlex.join(option_words(kept))} as before: {args.out} was made so")


def reading_there(out: Path, data: str) -> dict[str, Any]:
    """The options with which the run in a folder reads its DATA; none where it is of other DATA."""
    from digit.data.source import readable
    from digit.runs.reading import recorded_reading, same_data

    if settings_there(out) is None:
        return {}
    reading = recorded_reading(out) or typed_reading(out)
    path = reading.pop("path", None)
    return reading if path is not None and same_data(path, readable(data)) else {}


def typed_reading(out: Path) -> dict[str, Any]:
    """As `recorded_reading`, in a folder of an older version, which did not record it: as its last `digit fit` said."""
    from digit.runs.reading import OPTIONS
    from digit.runtime.lock import last_writer

    words = shlex.split(str(last_writer(out).get("command", "")))
    if words[:2] != ["digit", "fit"] or len(words) < 3:
        return {}
    typed = {name: value_of(words, f"--{name}") for name, kind in OPTIONS.items() if kind is not bool}
    return {"path": words[2]} | {name: OPTIONS[name](value) for name, value in typed.items() if value is not None}


def _default(value: Any) -> Any:
    return asdict(cast(Any, value)) if is_dataclass(value) else value


def make_run(args: Any, argv: Sequence[str], base: Base, *, more: str | None = None) -> "Run":
    """Build the Run that parsed arguments describe; `base` set the defaults, `more` lengthens the run in --out."""
    from digit.runs.changes import with_more
    from digit.runs.checks import chosen_settings
    from digit.runs.fit import Run
    from digit.runs.layout import REUSABLE
    from digit.runs.recipe import Recipe
    from digit.runtime.files import as_path

    if args.recipe != value_of(argv, "--recipe"):
        raise DigitError(
            f"--recipe {args.recipe} stands in a settings file, which is read too late for it: give it as an option"
        )
    recipe, record = read_config(args, Recipe), None
    keep_reading(args, argv)
    source = open_data(args, args.data)
    if base.said:
        note(base.said)
    reuse = {part: folder for part in REUSABLE if (folder := getattr(args, f"reuse_{part}"))}
    if recipe.published_vqgan and "vqgan" not in reuse:
        reuse["vqgan"] = fetch_published(recipe.published_vqgan, recipe.preprocess.crop_size)
    if more is not None:
        longer = distributed.on_main(lambda: with_more(recipe, as_path(args.out), more))
        recipe, record = longer.recipe, longer.record
    chosen = [*typed_settings(argv, recipe), *chosen_settings(recipe, base.recipe)]
    run = Run(
        recipe,
        source,
        args.out,
        reuse=reuse,
        device=args.device,
        chosen=chosen,
        reuse_unchanged=True,
        lengthened=record,
    )
    for text in run.notes:
        note(text)
    return run


def fetch_published(name: str, size: int) -> Path:
    """The folder of a published VQ tokenizer for pictures of `size` px, in the cache; fetched and converted once.

    Processes on several machines need a cache that all of them see (DIGIT_CACHE).
    """
    from digit.released.convert import ReleasedFiles, convert_release
    from digit.runtime.files import cache_folder

    folder = cache_folder() / "vq_tokenizers" / f"{name}-{size}"

    def fetch() -> None:
        if not (folder / "vqgan" / "vqgan.json").is_file():
            for text in convert_release(ReleasedFiles(vqgan=name, image_size=size), folder):
                if not text.startswith("digit fit takes"):  # which is at work
                    note(text)

    distributed.on_main(fetch)
    return folder / "vqgan"


@command(
    "fit",
    "digit fit photos/ --out runs/photos                         # size and length suit this machine\n"
    "  digit fit photos/ --out runs/photos --more 2x               # go on: twice the updates\n"
    "  digit fit photos/ --out runs/photos --prior.depth 8         # another prior, the rest is kept\n"
    "  digit fit shapes --recipe demo --out runs/demo              # no pictures needed",
    ranks=True,
)
def run_fit(parser: "ArgumentParser", argv: list[str]) -> None:
    """Train everything on your images, from codebook to renderer; write samples and a report.

    Run the same command again to continue: finished stages are kept. With other settings in the same folder every stage
    that they do not touch is kept too, and what was there before goes to OUT/earlier. --more 2x goes on from what is
    there.
    """
    base = add_run_arguments(parser, argv, more=True)
    args = parse(parser, argv)
    run = make_run(args, argv, base, more=args.more)
    distributed.on_main(lambda: show_fit(run))
    from digit.planning.remaining import stages_of
    from digit.runs.changes import finish_lengthening
    from digit.runs.fit import fit
    from digit.runs.report import write_report

    stages = stages_of(run)
    pipe = fit(run, stages)
    with stages.enter("report"):
        page = distributed.on_main(lambda: write_report(run, pipe))
    distributed.on_main(lambda: finish_lengthening(run.out))
    say(f"done: open {page}; more images: digit sample --from {run.out} --num 64 --out samples")


def show_fit(run: "Run") -> None:
    """Write OUT/contact_sheet.png: what training sees of the pictures. Say what it loses, before hours are spent."""
    from digit.data.inspect import glance

    sheet, fit = run.out / SHEET, run.recipe.preprocess.fit
    if sheet.exists() and not run.notes:
        return
    report = glance(run.source)
    report.save_contact_sheet(sheet, fit)
    if advice := report.advise_fit(fit):
        note(f"{advice}; {sheet} shows it")


@command("codebook", "digit codebook photos/ --out runs/photos --kmeans.num_clusters 2048", ranks=True)
def run_codebook(parser: "ArgumentParser", argv: list[str]) -> None:
    """Fit the codebook of discriminative tokens: K-means on features of a frozen encoder."""
    base = add_run_arguments(parser, argv)
    run = make_run(parse(parser, argv), argv, base)
    codebook = run.fit_codebook()
    say(f"{run.out / 'codebook'}: {codebook.summary()}")


@command("tokenize", "digit tokenize photos/ --out runs/photos", ranks=True)
def run_tokenize(parser: "ArgumentParser", argv: list[str]) -> None:
    """Write discriminative and VQ tokens of every image; makes missing tokenizers first.

    Tokens that are there already are read whole and checked: every checksum, every number.
    """
    base = add_run_arguments(parser, argv)
    run = make_run(parse(parser, argv), argv, base)
    store = run.write_tokens()
    if not store.checked:  # larger stores are opened without reading them
        distributed.on_main(store.verify)
    kinds = {"discriminative": store.discriminative, "VQ": store.vq}
    lengths = [f"{tokens.shape[1]} {kind}" for kind, tokens in kinds.items() if tokens is not None]
    say(f"{run.out / 'tokens'}: {len(store)} rows of {' and '.join(lengths)} tokens")


@command(
    "train",
    "digit train prior photos/ --out runs/photos\n  digit train vq_ar photos/ --out runs/photos   # baseline",
    ranks=True,
)
def run_train(parser: "ArgumentParser", argv: list[str]) -> None:
    """Train one model: the VQGAN, the prior, a renderer of any kind or a VQ-only baseline.

    vq_ar and vq_masked are VQ-only baselines with the compute of prior and renderer together, vq_ar_epochs is the one
    of the paper, for the recipe's vq_only_steps. renderer_pixels goes straight to pixels, without VQ tokens. Missing
    codebook, VQGAN and tokens are made first.
    """
    from digit.runs.roles import ROLES

    parser.add_argument("model", help=f"vqgan, {', '.join(ROLES)}")
    base = add_run_arguments(parser, argv)
    args = parse(parser, argv)
    from digit.runs.checks import check_own_steps
    from digit.runtime.files import read_json

    if args.model not in ("vqgan", *ROLES):
        raise DigitError(f"no model named {args.model}: choose one of vqgan, {', '.join(ROLES)}")
    run = make_run(args, argv, base)
    check_own_steps(run.recipe, typed_settings(argv, run.recipe), [args.model])
    if args.model == "vqgan":
        run.train_vqgan()
    else:
        run.train_model(args.model)
    metrics = run.out / args.model / "metrics.json"
    say(f"{run.out / args.model}: {read_json(metrics) if metrics.exists() else 'used as it was'}")


@command("replay", "digit replay runs/photos/prior/crash/step_00067000")
def run_replay(parser: "ArgumentParser", argv: list[str]) -> None:
    """Repeat a failed training step from its crash dump and find what goes wrong first."""
    parser.add_argument("dump", help="crash dump of the failed run: RUN/MODEL/crash/step_...")
    parser.add_argument("--device", default="cpu", help="cpu (default, wherever the run was), or cuda")
    args = parse(parser, argv)
    from digit.runs.replay import replay

    say(str(replay(args.dump, args.device)))


@command(
    "pretrain",
    "digit pretrain scans/ --method ibot --out runs/ibot\n"
    "  digit fit scans/ --encoder.name folder:runs/ibot/encoder --encoder.input_size 64 --out runs/scans",
)
def run_pretrain(parser: "ArgumentParser", argv: list[str]) -> None:
    """Train a small encoder without labels (MAE, MoCo v3, DINO or iBOT) on your images."""
    from digit.runs.pretrain import PretrainConfig

    parser.add_argument("data", help=DATA_HELP)
    parser.add_argument("--out", required=True, help="run folder; run again with the same folder to continue")
    add_reading(parser)
    parser.add_argument("--device", default=None, help=DEVICE_HELP)
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    add_config(parser, PretrainConfig)
    args = parse(parser, argv)
    from digit.runs.pretrain import pretrain

    source, cfg = open_data(args, args.data), read_config(args, PretrainConfig)
    chosen = [*typed_settings(argv, cfg), *changed(cfg, PretrainConfig())]
    encoder = pretrain(source, cfg, args.out, device=args.device, chosen=chosen)
    say(
        f"{encoder.name} in {args.out}/encoder (pictures: {args.out}/report); use it: digit fit DATA "
        f"--encoder.name folder:{args.out}/encoder --encoder.input_size {encoder.input_size}"
    )
