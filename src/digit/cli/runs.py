"""Commands that train: fit and its stages codebook, tokenize and train; pretrain for encoders."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from digit.cli.arguments import (
    CONFIG_HELP,
    DATA_HELP,
    DEFAULT_RECIPE,
    DEVICE_HELP,
    add_config,
    add_reading,
    command,
    open_data,
    parse,
    read_config,
    say,
    typed_settings,
)
from digit.errors import DigitError
from digit.runtime import distributed
from digit.runtime.settings import changed

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_run_arguments(parser: "ArgumentParser", argv: Sequence[str]) -> str:
    """Add DATA, --recipe, --out and one dotted option for each field of the recipe. Returns the recipe's name."""
    from digit.runs.recipes import RECIPES, Recipe, get_recipe

    name = value_of(argv, "--recipe") or DEFAULT_RECIPE  # sets the defaults, so it is read before the parser exists
    recipe = get_recipe(name)
    parser.add_argument("data", help=DATA_HELP)
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        help=f"recipe that sets the defaults shown here: {', '.join(sorted(RECIPES))}",
    )
    parser.add_argument("--out", required=True, help="run folder; run again with the same folder to continue")
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
    parser.set_defaults({f.name: _default(getattr(recipe, f.name)) for f in fields(recipe)})
    return name


def _default(value: Any) -> Any:
    return asdict(cast(Any, value)) if is_dataclass(value) else value


def value_of(argv: Sequence[str], option: str) -> str | None:
    """The value of an option, read without a parser."""
    for i, word in enumerate(argv):
        if word == option and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(option + "="):
            return word.split("=", 1)[1]
    return None


def make_run(args: Any, argv: Sequence[str], base: str) -> Any:
    """Build the Run that parsed arguments describe; `base` is the recipe that set the defaults."""
    from digit.runs.checks import chosen_settings
    from digit.runs.fit import Run
    from digit.runs.layout import REUSABLE
    from digit.runs.recipes import Recipe, get_recipe

    if args.recipe != base:
        raise DigitError(
            f"--recipe {args.recipe} stands in a settings file, which is read too late for it: give it as an option"
        )
    recipe = read_config(args, Recipe)
    reuse = {part: folder for part in REUSABLE if (folder := getattr(args, f"reuse_{part}"))}
    source = open_data(args, args.data)
    chosen = [*typed_settings(argv, recipe), *chosen_settings(recipe, get_recipe(base))]
    return Run(recipe, source, args.out, reuse=reuse, device=args.device, chosen=chosen)


def beside(argv: Sequence[str], kept: Mapping[str, Path]) -> list[str]:
    """The arguments of the same work in a new folder next to --out, which reuses the `kept` parts of the run there."""
    words, given = [], value_of(argv, "--out") or ""
    new = next(name for n in itertools.count(2) if not Path(name := f"{given.rstrip('/')}-{n}").exists())
    for i, word in enumerate(argv):
        after_out = i > 0 and argv[i - 1] == "--out"
        words.append(new if after_out else f"--out={new}" if word.startswith("--out=") else word)
    free = [part for part in kept if value_of(argv, f"--reuse_{part}") is None]
    return [*words, *(word for part in free for word in (f"--reuse_{part}", str(kept[part])))]


@command(
    "fit",
    "digit fit shapes --recipe demo --out runs/demo\n"
    "  digit fit photos/ --recipe small --out runs/photos --prior.depth 8",
    ranks=True,
)
def run_fit(parser: "ArgumentParser", argv: list[str]) -> None:
    """Train everything on your images, from codebook to renderer; write samples and a report.

    Run the same command again to continue: finished stages are kept.
    """
    base = add_run_arguments(parser, argv)
    run = make_run(parse(parser, argv), argv, base)
    from digit.planning.remaining import stages_of
    from digit.runs.fit import fit
    from digit.runs.report import write_report

    stages = stages_of(run)
    pipe = fit(run, stages)
    with stages.enter("report"):
        page = distributed.on_main(lambda: write_report(run, pipe))
    say(f"done: open {page}; more images: digit sample --from {run.out} --num 64 --out samples")


@command("codebook", "digit codebook photos/ --recipe small --out runs/photos --kmeans.num_clusters 2048", ranks=True)
def run_codebook(parser: "ArgumentParser", argv: list[str]) -> None:
    """Fit the codebook of discriminative tokens: K-means on features of a frozen encoder."""
    base = add_run_arguments(parser, argv)
    run = make_run(parse(parser, argv), argv, base)
    codebook = run.fit_codebook()
    say(f"{run.out / 'codebook'}: {codebook.summary()}")


@command("tokenize", "digit tokenize photos/ --recipe small --out runs/photos", ranks=True)
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
    "digit train prior photos/ --recipe small --out runs/photos\n"
    "  digit train vq_ar photos/ --recipe small --out runs/photos   # baseline",
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
