"""Commands that look at data and pipelines, convert and sample: inspect, convert, sample, complete, info."""

from typing import TYPE_CHECKING, Any

from digit.cli.arguments import (
    DATA_HELP,
    DEVICE_HELP,
    FROM_HELP,
    PIXEL_MAX_HELP,
    SHEET,
    add_config,
    add_reading,
    command,
    load_pipeline,
    open_data,
    parse,
    parse_labels,
    read_config,
    say,
    say_assumptions,
)
from digit.runtime.files import as_path

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@command("inspect", "digit inspect photos/            # counts, classes, sizes, broken files, contact sheet")
def run_inspect(parser: "ArgumentParser", argv: list[str]) -> None:
    """Describe the images at PATH: counts, classes, sizes, broken files, a contact sheet."""
    parser.add_argument("path", help=DATA_HELP)
    add_reading(parser)
    parser.add_argument("--sheet", default=SHEET, help="PNG file for the contact sheet; '' for none")
    from digit.data.preprocess import Fit

    parser.add_argument(
        "--fit",
        default="crop",
        type=Fit,
        help="show what training sees of each picture: crop, pad or squeeze (--preprocess.fit of digit fit)",
    )
    args = parse(parser, argv)
    from digit.data.inspect import choose_sheet, inspect_source
    from digit.runtime.files import check_writable

    sheet = args.sheet and choose_sheet(args.sheet, args.path, named=args.sheet != SHEET)
    if sheet:
        check_writable(sheet)
    report = inspect_source(open_data(args, args.path, say_notes=False))
    say(report.to_text())
    if advice := report.advise_fit(args.fit):
        say(f"  fit          {advice}")
    if sheet:
        report.save_contact_sheet(sheet, args.fit)
        say(f"contact sheet: {sheet}")


@command(
    "convert",
    "digit convert --encoder dinov2_vitb14_reg4_pretrain.pth --codebook km_8k.npy "
    "--vqgan vqgan_jax_strongaug.ckpt --prior stage1.pt --renderer stage2.pt --out digit-base\n"
    "  digit convert --prior stage1.pt --renderer stage2.pt --out digit-base   # these two files hold all parts",
)
def run_convert(parser: "ArgumentParser", argv: list[str]) -> None:
    """Convert the authors' checkpoint files to a pipeline folder.

    Give any of encoder, codebook, VQGAN, prior and renderer; a renderer's file holds the other parts too.
    """
    from digit.released.convert import ReleasedFiles, convert_release

    add_config(parser, ReleasedFiles)
    parser.add_argument("--out", required=True, help="pipeline folder; parts that it already holds stay")
    args = parse(parser, argv)
    for line in convert_release(read_config(args, ReleasedFiles), args.out):
        say(line)


def add_sampling_arguments(parser: "ArgumentParser") -> None:
    """Add --from, --out, --seed and the sampling options of both stages; without one the saved setting applies."""
    parser.add_argument("--from", dest="source", required=True, help=FROM_HELP)
    parser.add_argument(
        "--variant",
        default=None,
        help="which released checkpoints, with --from DAMO-NLP-SG/DiGIT: base (default), base_cls, "
        "base_200epoch, base_cls_400epoch, large or large_cls",
    )
    parser.add_argument("--out", required=True, help="folder for PNGs, grid.png, tokens.npz and samples.json")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="image i uses seed + i; give runs that you compare seeds at least --num apart",
    )
    parser.add_argument("--device", default=None, help=DEVICE_HELP)
    parser.add_argument(
        "--batch_size", type=int, default=None, help="images sampled together (default: as many as fit into memory)"
    )
    parser.add_argument("--precision", default=None, help="fp32 or bf16 (faster)")
    for stage in ("prior", "renderer"):
        for name, kind, text in (
            ("temperature", float, "divides the logits; 0 takes the most likely token"),
            ("top_k", int, "keep the k most likely tokens; 0 keeps all"),
            ("top_p", float, "keep the most likely tokens up to this probability"),
            ("cfg_scale", float, "classifier-free guidance; 1 is off"),
            ("num_steps", int, "iterations of a masked model (MaskGIT)"),
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
    """Sample new images from a trained pipeline.

    Run the same command again to continue after an interruption, or with a larger --num to add images.
    """
    add_sampling_arguments(parser)
    parser.add_argument("--num", type=int, default=16, help="how many images (in Python, one per label)")
    parser.add_argument(
        "--labels",
        default=None,
        help="names or numbers of classes, separated by commas, used in turn; none for no class (default: every class)",
    )
    args = parse(parser, argv)
    from digit.pipeline.sample_folder import GRID_IMAGES, sample

    pipe = load_pipeline(args)
    labels = parse_labels(args.labels, pipe)
    num = len(sample(pipe, args.out, args.num, labels, args.seed, **sampling_changes(args)))
    say(f"{num} images in {args.out} (grid.png shows {'all' if num <= GRID_IMAGES else f'the first {GRID_IMAGES}'})")


@command("complete", "digit complete picture.jpg --from runs/demo --keep 0.5 --out completed/")
def run_complete(parser: "ArgumentParser", argv: list[str]) -> None:
    """Keep the first rows of pictures and sample the rest."""
    parser.add_argument("images", help=DATA_HELP + "; or one image file")
    parser.add_argument("--pixel_max", type=int, default=None, help=PIXEL_MAX_HELP)
    add_sampling_arguments(parser)
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the rows to keep")
    parser.add_argument("--num", type=int, default=8, help="at most this many pictures of the folder")
    parser.add_argument("--labels", default=None, help="names or numbers of classes, separated by commas, used in turn")
    args = parse(parser, argv)
    from digit.pipeline.labels import ClassPositions
    from digit.runs.report import load_images, open_images, require_free, write_completions

    require_free(as_path(args.out))
    source = open_images(args.images, args.pixel_max)
    say_assumptions(source)
    pipe = load_pipeline(args)
    images = load_images(source, pipe.preprocess, args.num)
    labels = parse_labels(args.labels, pipe)
    if labels is not None:
        labels = ClassPositions(pipe.labels(len(images), labels).tolist())
    done = pipe.complete(images, args.keep, args.seed, labels, **sampling_changes(args))
    write_completions(as_path(args.out), images, done, args.keep)
    say(f"{len(done)} completions in {args.out} (grid.png: original, kept part, completion)")


@command(
    "info", "digit info                # the recipes\n  digit info runs/demo      # a run: progress and next command"
)
def run_info(parser: "ArgumentParser", argv: list[str]) -> None:
    """List the recipes, or describe a folder: a run, samples or a pipeline.

    For a run or samples it prints the progress and the next command.
    """
    parser.add_argument(
        "folder", nargs="?", default=None, help="run, samples or pipeline folder (default: list the recipes)"
    )
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
    if not started or (as_path(args.folder) / "pipeline").is_dir():
        say(describe(DigitPipeline.from_pretrained(args.folder)))
