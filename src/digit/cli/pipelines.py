"""Commands on data and pipelines: inspect, convert, sample, complete, vary, export, info."""

from functools import partial
from typing import TYPE_CHECKING, Any

from digit.cli.arguments import (
    DATA_HELP,
    DEVICE_HELP,
    FROM_HELP,
    PICTURES_SPLIT_HELP,
    PIXEL_MAX_HELP,
    SHEET,
    add_config,
    add_reading,
    command,
    load_pipeline,
    note,
    open_data,
    parse,
    parse_labels,
    read_config,
    say,
    say_assumptions,
)
from digit.errors import DigitError
from digit.runtime.files import as_path
from digit.runtime.scalars import as_int

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from torch import Tensor

    from digit.pipeline.labels import ClassPositions
    from digit.pipeline.pipeline import DigitPipeline

LABELS_HELP = "names or numbers of classes, separated by commas, used in turn"


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


def add_sampling_arguments(parser: "ArgumentParser", files: str = "tokens.npz and samples.json") -> None:
    """Add --from, --out, --seed and the sampling options of both stages; without one the saved setting applies."""
    parser.add_argument("--from", dest="source", required=True, help=FROM_HELP)
    parser.add_argument(
        "--variant",
        default=None,
        help="which released checkpoints, with --from DAMO-NLP-SG/DiGIT: base (default), base_cls, "
        "base_200epoch, base_cls_400epoch, large or large_cls",
    )
    parser.add_argument("--out", required=True, help=f"folder for PNGs, grid.png, {files}")
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


@command(
    "complete",
    "digit complete picture.jpg --from runs/demo --keep 0.5 --out completed/\n"
    "  digit complete picture.jpg --from runs/demo --keep mask.png --each 4 --out completed/",
)
def run_complete(parser: "ArgumentParser", argv: list[str]) -> None:
    """Keep a part of pictures and sample the rest around it.

    What is kept has its own pixels; next to it the sampled part is shifted so that no seam shows.
    """
    parser.add_argument("images", help=DATA_HELP + "; or one image file")
    parser.add_argument("--split", default=None, help=PICTURES_SPLIT_HELP)
    parser.add_argument("--pixel_max", type=int, default=None, help=PIXEL_MAX_HELP)
    add_sampling_arguments(parser, "and completions.json")
    parser.add_argument(
        "--keep",
        default="0.5",
        help="what is kept: a fraction of the rows from the top; upper, lower, left, right, centre or border; or a "
        "black and white picture, white where it is kept (or opaque, of one with transparency). "
        "A next-token model sees what stands before a gap, row by row, and not what comes after it",
    )
    parser.add_argument(
        "--pixels",
        default="kept",
        help="kept: own pixels, without a seam; pasted: own pixels as they are; decoded: all as the tokens give them, "
        "as in the paper",
    )
    parser.add_argument("--each", type=int, default=1, help="completions of each picture")
    parser.add_argument("--num", type=int, default=8, help="at most this many pictures, spread evenly over DATA")
    parser.add_argument("--labels", default=None, help=LABELS_HELP)
    args = parse(parser, argv)
    from digit.pipeline.around import check_pixels
    from digit.runs.pictures import read_keep, require_free, write_completions

    require_free(as_path(args.out))
    check_pixels(args.pixels)
    each = as_int("each", args.each, least=1)
    pipe, images, labels, names = read_pictures(args)
    keep = read_keep(args.keep, pipe.image_size, pipe.preprocess.fit)
    classes = pipe.guess_labels(images) if labels is None else labels
    done = pipe.complete(
        images.repeat_interleave(each, 0),
        keep,
        args.seed,
        class_labels(pipe, classes.repeat_interleave(each)),
        pixels=args.pixels,
        **sampling_changes(args),
    )
    about = {"keep": args.keep, "pixels": args.pixels} | describe_request(args, names)
    write_completions(as_path(args.out), images, done, pipe.kept_pixels(keep), about)
    say(f"{len(done)} completions in {args.out} (grid.png: original, kept part, completion{'s' * (each > 1)})")


@command(
    "vary",
    "digit vary picture.jpg --from runs/demo --each 4 --out varied/\n"
    "  digit vary one.jpg --toward other.jpg --steps 7 --from runs/demo --out between/",
)
def run_vary(parser: "ArgumentParser", argv: list[str]) -> None:
    """Sample pictures that are like given ones, or that lie between two.

    Discriminative tokens say what is where, VQ tokens what it looks like. By default all of the first are kept and
    the looks are sampled again; --keep_discriminative 0 --keep_vq 0.5 is the reverse. A renderer straight to pixels has
    no VQ tokens: half of the discriminative ones are kept then. --toward mixes the encoder's features of two pictures,
    cell by cell: what stands at other places fades, and does not move.
    """
    parser.add_argument("images", help=DATA_HELP + "; or one image file")
    parser.add_argument("--split", default=None, help=PICTURES_SPLIT_HELP)
    parser.add_argument("--pixel_max", type=int, default=None, help=PIXEL_MAX_HELP)
    add_sampling_arguments(parser, "and variations.json")
    parser.add_argument("--each", type=int, default=4, help="variations of each picture")
    parser.add_argument("--num", type=int, default=8, help="at most this many pictures, spread evenly over DATA")
    parser.add_argument(
        "--keep_discriminative",
        type=float,
        default=None,
        help="share of the discriminative tokens that is kept, 0 to 1 (default: 1; 0.5 where equal ones give equal "
        "pictures)",
    )
    parser.add_argument("--keep_vq", type=float, default=0.0, help="share of the VQ tokens that is kept, 0 to below 1")
    parser.add_argument("--labels", default=None, help=LABELS_HELP)
    parser.add_argument("--toward", default=None, help="another picture: sample what lies between the two")
    parser.add_argument("--steps", type=int, default=7, help="with --toward: pictures, both ends included")
    args = parse(parser, argv)
    from digit.pipeline.variations import interpolate, usual_share, vary
    from digit.runs.pictures import VARIATIONS, load_images, open_images, require_free, write_between, write_variations

    out = as_path(args.out)
    require_free(out, VARIATIONS)
    pipe, images, labels, names = read_pictures(args)
    if args.toward is not None:
        if len(images) != 1:
            raise DigitError(f"--toward leads from one picture to another, {args.images} holds {len(images)}: give one")
        other, _ = load_images(open_images(args.toward, args.pixel_max), pipe.preprocess, 1)
        known = class_labels(pipe, labels)
        changes = sampling_changes(args)
        found = interpolate(pipe, images, other, steps=args.steps, seed=args.seed, labels=known, **changes)
        write_between(out, images, other, found.images, {"toward": args.toward} | describe_request(args, names))
        changed = (found.tokens[0] != found.tokens[-1]).sum()
        say(f"{len(found.images)} pictures in {out}; {changed} of {found.tokens.shape[1]} tokens change on the way")
        return
    kept = usual_share(pipe) if args.keep_discriminative is None else args.keep_discriminative
    if args.keep_discriminative is None and kept < 1:
        note(f"{kept:g} of each picture's discriminative tokens are kept: this renderer draws equal ones equally")
    shares = {"keep_discriminative": kept, "keep_vq": args.keep_vq}
    done = vary(
        pipe,
        images,
        num=args.each,
        seed=args.seed,
        labels=class_labels(pipe, labels),
        **shares,
        **sampling_changes(args),
    )
    write_variations(out, images, done, shares | describe_request(args, names))
    say(f"{len(done)} variations in {out} (grid.png: a picture and its variations in each row)")


def describe_request(args: Any, names: list[str]) -> dict[str, Any]:
    """What completions.json and variations.json say of a command: of which pictures, by which run and settings."""
    asked = {"from": args.source, "images": names, "labels": args.labels, "seed": args.seed}
    return asked | {"sampling": sampling_changes(args)}


def read_pictures(args: Any) -> tuple["DigitPipeline", "Tensor", "Tensor | None", list[str]]:
    """The pipeline of --from, at most --num pictures at its size, spread evenly, the classes that --labels gives, and
    the pictures' names.

    Of a data set with splits they are those of its validation or else its test split: no model was trained on them.
    """
    from digit.evaluation.splits import chosen_on
    from digit.runs.pictures import load_images, open_images

    source, where = chosen_on(args.images, args.split, partial(open_images, pixel_max=args.pixel_max))
    if where.startswith("the "):
        say(f"pictures of {where}")
    say_assumptions(source)
    pipe = load_pipeline(args)
    images, names = load_images(source, pipe.preprocess, args.num)
    labels = parse_labels(args.labels, pipe)
    return pipe, images, None if labels is None else pipe.labels(len(images), labels), names


def class_labels(pipe: "DigitPipeline", labels: "Tensor | None") -> "ClassPositions | None":
    """Positions of classes as labels; None for a model that knows no classes."""
    from digit.pipeline.labels import ClassPositions

    return None if labels is None or not pipe.num_classes else ClassPositions(labels.tolist())


@command("export", "digit export runs/demo --out exported/")
def run_export(parser: "ArgumentParser", argv: list[str]) -> None:
    """Export the decoder and a decoding step for programs that have torch alone.

    torch.export writes them. Each file is read again and compared with the pipeline. export.json says what goes in and
    what comes out.
    """
    parser.add_argument("run", help=FROM_HELP)
    parser.add_argument("--out", required=True, help="folder for the .pt2 files and export.json")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda: where the exported networks will run")
    args = parse(parser, argv)
    from digit.pipeline.export import export_pipeline
    from digit.pipeline.pipeline import DigitPipeline

    found = export_pipeline(DigitPipeline.from_pretrained(args.run, args.device), args.out)
    for file, difference in found.items():
        say(f"{file:<22}within {difference:.1g} of the pipeline")
    say(f"{len(found)} networks in {args.out}; export.json lists their inputs and outputs")


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
