"""argv -> one call. A user's mistake ends in one line on stderr and exit code 2; only this file prints."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from digit import __version__
from digit.errors import DigitError
from digit.machine import keep_freed_memory

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
DATA_HELP = (
    "a folder of images (a class a folder, nested, or flat), Hub-layout Parquet, WebDataset .tar shards, "
    "or shapes[:num=16000,size=64,seed=0] for rendered scenes"
)
FROM_HELP = (
    "run folder of `digit fit`, a pipeline folder, or DAMO-NLP-SG/DiGIT for the authors' checkpoints, which are "
    "fetched and converted once"
)
EPILOG = {
    "inspect": "digit inspect photos/            # counts, classes, sizes, bad files, contact sheet",
    "fit": "digit fit shapes --recipe demo --out runs/demo\n"
    "  digit fit photos/ --recipe small --out runs/photos --prior.depth 8",
    "codebook": "digit codebook photos/ --recipe small --out runs/photos --kmeans.num_clusters 2048",
    "tokenize": "digit tokenize photos/ --recipe small --out runs/photos",
    "train": "digit train prior photos/ --recipe small --out runs/photos\n"
    "  digit train vq_ar photos/ --recipe small --out runs/photos   # baseline",
    "convert": "digit convert --encoder dinov2_vitb14_reg4_pretrain.pth --codebook km_8k.npy "
    "--vqgan vqgan_jax_strongaug.ckpt --prior stage1.pt --renderer stage2.pt --out digit-base\n"
    "  digit convert --prior stage1.pt --renderer stage2.pt --out digit-base   # all of it is in these two",
    "sample": "digit sample --from runs/demo --num 64 --labels 0,3 --seed 0 --out samples/\n"
    "  digit sample --from DAMO-NLP-SG/DiGIT --variant large --num 8 --out samples/",
    "complete": "digit complete picture.jpg --from runs/demo --keep 0.5 --out completed/",
    "info": "digit info                       # recipes\n  digit info runs/demo             # a pipeline",
}


def make_parser(command: str, summary: str) -> "ArgumentParser":
    """A parser that never abbreviates, raises instead of exiting, and shows an example."""
    import argparse

    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(
        prog=f"digit {command}",
        description=summary,
        epilog=f"example:\n  {EPILOG[command]}",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_help_formatter(argparse.RawDescriptionHelpFormatter),
    )


def _help_formatter(base: type) -> type:
    from jsonargparse import DefaultHelpFormatter

    return type("HelpFormatter", (DefaultHelpFormatter, base), {})


# -------------------------------------------------------------------- runs


def add_run_arguments(parser: "ArgumentParser", argv: Sequence[str]) -> str:
    """DATA, --recipe, --out and every field of the recipe as a dotted option; returns the recipe of the defaults."""
    from digit.recipes import RECIPES, Recipe, get_recipe

    name = _value_of(argv, "--recipe") or "small"
    recipe = get_recipe(name)
    parser.add_argument("data", help=DATA_HELP)
    parser.add_argument("--recipe", default="small", help=f"named run to start from: {', '.join(sorted(RECIPES))}")
    parser.add_argument(
        "--out", required=True, help="run folder; a later run with the same one goes on from what is done"
    )
    parser.add_argument(
        "--split", default=None, help="split of a Hub-layout data set (default: train where there is one)"
    )
    parser.add_argument("--limit", type=int, default=None, help="use LIMIT images only, spread evenly")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    for part in ("codebook", "vqgan", "tokens"):
        parser.add_argument(
            f"--reuse_{part}", default=None, help=f"folder of another run's {part}, used instead of making it"
        )
    parser.add_argument("--config", action="config", help="YAML file with settings; later options win")
    parser.add_class_arguments(Recipe, as_group=True)
    parser.set_defaults({f.name: _default(getattr(recipe, f.name)) for f in fields(recipe)})
    return name


def _default(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) else value


def _value_of(argv: Sequence[str], option: str) -> str | None:
    """Value of an option before the real parser exists: the recipe decides the defaults."""
    for i, word in enumerate(argv):
        if word == option and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(option + "="):
            return word.split("=", 1)[1]
    return None


def make_run(args: Any, base: str) -> Any:
    """The Run that parsed arguments describe; `base` is the recipe whose settings are the defaults."""
    from digit.data.images import open_source
    from digit.fit import Run
    from digit.recipes import Recipe

    if args.recipe != base:
        raise DigitError(f"recipe {args.recipe} is not where the defaults came from: give it as --recipe")
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    reuse = {part: folder for part in ("codebook", "vqgan", "tokens") if (folder := getattr(args, f"reuse_{part}"))}
    source = open_source(args.data, split=args.split, limit=args.limit)
    return Run(recipe, source, args.out, reuse=reuse, device=args.device)


def run_fit(parser: "ArgumentParser", argv: list[str]) -> None:
    """Images -> codebook, VQGAN, tokens, prior, renderer, pipeline, samples and report."""
    base = add_run_arguments(parser, argv)
    run = make_run(parse(parser, argv), base)
    from digit.fit import fit
    from digit.report import write_report

    pipe = fit(run)
    page = write_report(run, pipe)
    say(f"done: open {page}; draw more with: digit sample --from {run.out} --num 64 --out samples")


def run_codebook(parser: "ArgumentParser", argv: list[str]) -> None:
    """Fit the codebook of discriminative tokens: K-means on features of a frozen encoder."""
    base = add_run_arguments(parser, argv)
    run = make_run(parse(parser, argv), base)
    codebook = run.codebook
    say(f"{run.out / 'codebook'}: {codebook.summary()}")


def run_tokenize(parser: "ArgumentParser", argv: list[str]) -> None:
    """Write discriminative and VQ tokens of every image (makes codebook and VQGAN first where they are missing)."""
    base = add_run_arguments(parser, argv)
    run = make_run(parse(parser, argv), base)
    store = run.tokens
    say(
        f"{run.out / 'tokens'}: {len(store)} rows of {store.disc.shape[1]} discriminative "
        f"and {store.vq.shape[1]} VQ tokens"
    )


def run_train(parser: "ArgumentParser", argv: list[str]) -> None:
    """Train one model: vqgan, prior, renderer, renderer_masked, or a baseline of the paper: vq_ar, vq_masked."""
    parser.add_argument("model", help="vqgan, prior, renderer, renderer_masked, vq_ar or vq_masked")
    base = add_run_arguments(parser, argv)
    args = parse(parser, argv)
    from digit.files import read_json
    from digit.fit import MODEL_NAMES

    if args.model not in ("vqgan", *MODEL_NAMES):
        raise DigitError(f"no model named {args.model}: choose one of vqgan, {', '.join(MODEL_NAMES)}")
    run = make_run(args, base)
    if args.model == "vqgan":
        _ = run.vq
    else:
        run.model(args.model)
    metrics = run.out / args.model / "metrics.json"
    say(f"{run.out / args.model}: {read_json(metrics) if metrics.exists() else 'taken as it is'}")


# -------------------------------------------------------------------- pictures


def run_inspect(parser: "ArgumentParser", argv: list[str]) -> None:
    """Say what is found at PATH: counts, classes, sizes, bad files; write a contact sheet."""
    parser.add_argument("path", help=DATA_HELP)
    parser.add_argument("--split", default=None, help="split of a Hub-layout data set")
    parser.add_argument("--limit", type=int, default=None, help="look at LIMIT images only, spread evenly")
    parser.add_argument("--sheet", default="contact_sheet.png", help="where the contact sheet goes; empty for none")
    args = parse(parser, argv)
    from digit.data.images import open_source
    from digit.data.inspect import inspect_source

    report = inspect_source(open_source(args.path, split=args.split, limit=args.limit))
    say(report.to_text())
    if args.sheet:
        report.save_contact_sheet(args.sheet)
        say(f"contact sheet: {args.sheet}")


def run_convert(parser: "ArgumentParser", argv: list[str]) -> None:
    """Turn the authors' files into a pipeline folder: encoder, codebook, VQGAN, prior, renderer, or any of them."""
    from digit.released import ReleasedFiles, convert_release

    parser.add_class_arguments(ReleasedFiles, as_group=True)
    parser.add_argument("--out", required=True, help="pipeline folder; parts that are there already stay")
    args = parse(parser, argv)
    files = ReleasedFiles(**{f.name: getattr(args, f.name) for f in fields(ReleasedFiles)})
    for line in convert_release(files, args.out):
        say(line)


def add_sampling_arguments(parser: "ArgumentParser") -> None:
    """--from, --out, --seed and how both stages draw; what is left out is what the pipeline was saved with."""
    parser.add_argument("--from", dest="source", required=True, help=FROM_HELP)
    parser.add_argument(
        "--variant",
        default=None,
        help="released checkpoints, with --from DAMO-NLP-SG/DiGIT: base (default), base_cls, "
        "base_200epoch, base_cls_400epoch, large or large_cls",
    )
    parser.add_argument("--out", required=True, help="folder for PNGs, grid.png, tokens.npz and samples.json")
    parser.add_argument("--seed", type=int, default=0, help="image i uses seed + i, whatever the batch")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--batch_size", type=int, default=None, help="images drawn together")
    parser.add_argument("--precision", default=None, help="fp32 or bf16 (faster)")
    for stage in ("prior", "renderer"):
        for name, kind, text in (
            ("temperature", float, "divides the logits; 0 takes the likeliest token"),
            ("top_k", int, "keep the k likeliest tokens; 0: all"),
            ("top_p", float, "keep the likeliest tokens up to this probability"),
            ("cfg_scale", float, "guidance; 1: off"),
            ("num_steps", int, "iterations of a masked model"),
        ):
            parser.add_argument(f"--{stage}.{name}", type=kind, default=None, help=f"{stage}: {text}")


def sampling_changes(args: Any) -> dict[str, Any]:
    """The sampling options that were given."""
    changes: dict[str, Any] = {
        s: {k: v for k, v in vars(getattr(args, s)).items() if v is not None} for s in ("prior", "renderer")
    }
    return changes | {k: getattr(args, k) for k in ("batch_size", "precision") if getattr(args, k) is not None}


def run_sample(parser: "ArgumentParser", argv: list[str]) -> None:
    """Draw new images from a trained pipeline."""
    add_sampling_arguments(parser)
    parser.add_argument("--num", type=int, default=16, help="how many images")
    parser.add_argument(
        "--labels",
        default=None,
        help="class numbers or names, separated by commas, used in turn (default: every class)",
    )
    args = parse(parser, argv)
    from digit.report import write_samples

    pipe = load_pipeline(args)
    labels = parse_labels(args.labels, pipe.classes)
    tokens = pipe.generate_tokens(args.num, labels, args.seed, **sampling_changes(args))
    write_samples(Path(args.out), pipe.decode(tokens["vq"]), tokens, seed=args.seed, classes=pipe.classes)
    say(f"{args.num} images in {args.out} (grid.png shows all)")


def run_complete(parser: "ArgumentParser", argv: list[str]) -> None:
    """Keep the first rows of pictures and draw the rest."""
    parser.add_argument("images", help=DATA_HELP + "; or one image file")
    add_sampling_arguments(parser)
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the rows that is kept")
    parser.add_argument("--num", type=int, default=8, help="how many pictures of the folder")
    parser.add_argument("--labels", default=None, help="class numbers or names, separated by commas, used in turn")
    args = parse(parser, argv)
    from digit.report import load_images, write_completions

    pipe = load_pipeline(args)
    images = load_images(args.images, pipe.preprocess, args.num)
    labels = parse_labels(args.labels, pipe.classes)
    if labels is not None:
        labels = [labels[i % len(labels)] for i in range(len(images))]
    done = pipe.complete(images, args.keep, args.seed, labels, **sampling_changes(args))
    write_completions(Path(args.out), images, done, args.keep)
    say(f"{len(done)} completions in {args.out} (grid.png: original, kept part, completion)")


def run_info(parser: "ArgumentParser", argv: list[str]) -> None:
    """List recipes, or say what a run or pipeline folder holds."""
    parser.add_argument("folder", nargs="?", default=None, help="run or pipeline folder; leave out to list the recipes")
    args = parse(parser, argv)
    if args.folder is None:
        from digit.recipes import RECIPES

        for name, recipe in sorted(RECIPES.items()):
            say(f"{name}\n    " + "\n    ".join(line.strip() for line in (recipe.__doc__ or "").strip().splitlines()))
        return
    from digit.pipeline import DigitPipeline
    from digit.report import describe

    say(describe(DigitPipeline.from_pretrained(args.folder)))


def load_pipeline(args: Any) -> Any:
    """The pipeline of --from on --device."""
    from digit.pipeline import DigitPipeline, choose_device

    source, device = Path(args.source), choose_device(args.device)
    if not source.exists() and HUB_NAME.fullmatch(args.source):
        from digit.hub import released_pipeline

        source = released_pipeline(args.source, args.variant or "base")
    elif args.variant:
        raise DigitError(f"--variant chooses among released checkpoints, and {source} is a folder: leave it out")
    return DigitPipeline.from_pretrained(source, device)


def parse_labels(text: str | None, classes: Sequence[str]) -> list[int] | None:
    """'0,3' or 'cube,torus' -> class numbers."""
    if text is None:
        return None
    if classes and all(name.isdecimal() for name in classes):
        raise_ambiguous = [w for w in text.split(",") if w.strip() not in classes]
        if raise_ambiguous:
            raise DigitError(f"classes are named by numbers, and none is {raise_ambiguous[0]!r}: give names of classes")
    numbers = []
    for word in (w.strip() for w in text.split(",")):
        if word in classes:
            numbers.append(list(classes).index(word))
        elif word.removeprefix("-").isdecimal():
            numbers.append(int(word))
        else:
            raise DigitError(
                f"no class named {word!r}: classes are {', '.join(classes[:20]) or 'none (unconditional model)'}"
            )
    return numbers


# -------------------------------------------------------------------- entry

COMMANDS: dict[str, Callable[["ArgumentParser", list[str]], None]] = {
    "inspect": run_inspect,
    "fit": run_fit,
    "codebook": run_codebook,
    "tokenize": run_tokenize,
    "train": run_train,
    "convert": run_convert,
    "sample": run_sample,
    "complete": run_complete,
    "info": run_info,
}


def usage() -> str:
    """The page of `digit --help`."""
    lines = [f"  {name:<10}{(command.__doc__ or '').strip().splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: digit COMMAND ...        (digit COMMAND --help teaches each)",
            "",
            "DiGIT: discriminative image tokens and autoregressive image generation.",
            "",
            *lines,
            "",
            "start here:",
            "  digit fit shapes --recipe demo --out runs/demo      # no data needed, some minutes on a laptop",
            "  digit sample --from runs/demo --num 64 --out samples",
        ]
    )


def say(text: str) -> None:
    """Print a result."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def parse(parser: "ArgumentParser", argv: list[str]) -> Any:
    """Parse and build dataclasses; a mistake becomes one line."""
    from jsonargparse import ArgumentError

    try:
        return parser.instantiate(parser.parse_args(argv))
    except ArgumentError as error:
        raise DigitError(f"{' '.join(str(error).split())} (see {parser.prog} --help)") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a user's mistake, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        say(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        say(__version__)
        return 0
    try:
        command, rest = argv[0], argv[1:]
        if command not in COMMANDS:
            raise DigitError(f"no command named {command}: choose one of {', '.join(COMMANDS)}")
        run = COMMANDS[command]
        keep_freed_memory()
        run(make_parser(command, (run.__doc__ or "").strip()), rest)
    except DigitError as error:
        sys.stderr.write(f"digit: {error}\n")
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        sys.stderr.write(f"digit: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("digit: interrupted; run the same command again to go on\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
