"""Commands that show or draw: inspect, convert, sample, complete, info."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from digit.cli.arguments import (
    DATA_HELP,
    FROM_HELP,
    add_config,
    command,
    load_pipeline,
    parse,
    parse_labels,
    read_config,
    say,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@command("inspect", "digit inspect photos/            # counts, classes, sizes, bad files, contact sheet")
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


@command(
    "convert",
    "digit convert --encoder dinov2_vitb14_reg4_pretrain.pth --codebook km_8k.npy "
    "--vqgan vqgan_jax_strongaug.ckpt --prior stage1.pt --renderer stage2.pt --out digit-base\n"
    "  digit convert --prior stage1.pt --renderer stage2.pt --out digit-base   # all of it is in these two",
)
def run_convert(parser: "ArgumentParser", argv: list[str]) -> None:
    """Turn the authors' files into a pipeline folder: encoder, codebook, VQGAN, prior, renderer, or any of them."""
    from digit.released.convert import ReleasedFiles, convert_release

    add_config(parser, ReleasedFiles)
    parser.add_argument("--out", required=True, help="pipeline folder; parts that are there already stay")
    args = parse(parser, argv)
    for line in convert_release(read_config(args, ReleasedFiles), args.out):
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
    parser.add_argument(
        "--batch_size", type=int, default=None, help="images drawn together; by default as many as fit into memory"
    )
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


@command(
    "sample",
    "digit sample --from runs/demo --num 64 --labels 0,3 --seed 0 --out samples/\n"
    "  digit sample --from DAMO-NLP-SG/DiGIT --variant large --num 8 --out samples/",
    ranks=True,
)
def run_sample(parser: "ArgumentParser", argv: list[str]) -> None:
    """Draw new images from a trained pipeline. Killed at any moment and run again, it goes on where it was."""
    add_sampling_arguments(parser)
    parser.add_argument("--num", type=int, default=16, help="how many images")
    parser.add_argument(
        "--labels",
        default=None,
        help="class numbers or names, separated by commas, used in turn (default: every class)",
    )
    args = parse(parser, argv)
    from digit.pipeline.sample_folder import GRID_IMAGES, sample

    pipe = load_pipeline(args)
    labels = parse_labels(args.labels, pipe.classes)
    num = len(sample(pipe, args.out, args.num, labels, args.seed, **sampling_changes(args)))
    say(f"{num} images in {args.out} (grid.png shows {'all' if num <= GRID_IMAGES else f'the first {GRID_IMAGES}'})")


@command("complete", "digit complete picture.jpg --from runs/demo --keep 0.5 --out completed/")
def run_complete(parser: "ArgumentParser", argv: list[str]) -> None:
    """Keep the first rows of pictures and draw the rest."""
    parser.add_argument("images", help=DATA_HELP + "; or one image file")
    add_sampling_arguments(parser)
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the rows that is kept")
    parser.add_argument("--num", type=int, default=8, help="how many pictures of the folder")
    parser.add_argument("--labels", default=None, help="class numbers or names, separated by commas, used in turn")
    args = parse(parser, argv)
    from digit.runs.report import load_images, write_completions

    pipe = load_pipeline(args)
    images = load_images(args.images, pipe.preprocess, args.num)
    labels = parse_labels(args.labels, pipe.classes)
    if labels is not None:
        labels = [labels[i % len(labels)] for i in range(len(images))]
    done = pipe.complete(images, args.keep, args.seed, labels, **sampling_changes(args))
    write_completions(Path(args.out), images, done, args.keep)
    say(f"{len(done)} completions in {args.out} (grid.png: original, kept part, completion)")


@command("info", "digit info                       # recipes\n  digit info runs/demo             # a pipeline")
def run_info(parser: "ArgumentParser", argv: list[str]) -> None:
    """List recipes, or say how far a run or a drawing is and what to type next, or what a pipeline folder holds."""
    parser.add_argument("folder", nargs="?", default=None, help="run or pipeline folder; leave out to list the recipes")
    args = parse(parser, argv)
    if args.folder is None:
        from digit.runs.recipes import RECIPES

        for name, recipe in sorted(RECIPES.items()):
            say(f"{name}\n    " + "\n    ".join(line.strip() for line in (recipe.__doc__ or "").strip().splitlines()))
        return
    from digit.pipeline.pipeline import DigitPipeline
    from digit.runs.report import describe
    from digit.runs.status import describe_run, describe_sample_folder, is_run, is_sample_folder

    if is_sample_folder(args.folder):
        return say(describe_sample_folder(args.folder))
    started = is_run(args.folder)
    if started:
        say(describe_run(args.folder))
    if not started or (Path(args.folder) / "pipeline").is_dir():
        say(describe(DigitPipeline.from_pretrained(args.folder)))
