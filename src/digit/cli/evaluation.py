"""Commands that measure: evaluate, statistics, stability, probe and sweep."""

from functools import partial
from typing import TYPE_CHECKING, Any

from digit.cli.arguments import (
    DATA_HELP,
    DEVICE_HELP,
    FROM_HELP,
    HOLD_OUT_HELP,
    add_config,
    add_reading,
    command,
    load_pipeline,
    open_data,
    parse,
    read_config,
    say,
)
from digit.errors import DigitError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from digit.data.source import ImageSource
    from digit.metrics.stability import StabilityConfig
    from digit.pipeline.pipeline import DigitPipeline

UNUSED_BY_STATISTICS = (
    "measures", "num", "num_splits", "num_neighbours", "density_neighbours", "kernel_subsets", "kernel_subset_size",
    "num_directions", "seed",
)  # fmt: skip
IMAGES_HELP = DATA_HELP + ", or an .npz with arr_0 uint8 (N, H, W, 3)"


@command(
    "evaluate",
    "digit evaluate samples/ photos/val --report report/        # a page with pictures\n"
    "  digit evaluate samples/ photos/val --out result.json      # fd_efficientnet_lite2 and related metrics\n"
    "  digit evaluate samples/ imagenet/val --inception pt_inception-2015-12-05-6726825d.pth\n"
    "  digit evaluate samples.npz VIRTUAL_imagenet256_labeled.npz --protocol adm --inception pt_inception-....pth",
    ranks=True,
)
def run_evaluate(parser: "ArgumentParser", argv: list[str]) -> None:
    """Score samples against a reference: FID, Inception Score, KID, sFID, precision, recall.

    Beside them FID_infinity, the FID ratio to real images, CMMD, MIND, density, coverage, authenticity
    and Vendi score. Each metric has its interval, and the table says which direction is better.

    The metrics have FID's names only with the weights of FID's Inception network (--inception). Without them
    EfficientNet-Lite2 is used, or the encoder of --network, and the metrics have other names: they do not compare with
    any published FID.
    docs/evaluation.md says which protocol belongs to which paper. The command warns of problems such as JPEG samples, a
    wrong size or repeated images.
    """
    from digit.evaluation.samples import EvaluateConfig

    parser.add_argument("samples", help=IMAGES_HELP)
    parser.add_argument(
        "reference",
        help="the same, or statistics (mu, sigma) or features of other programs: .npz, .pt of torch-fidelity",
    )
    add_config(parser, EvaluateConfig)
    parser.add_argument(
        "--held_out",
        default=None,
        help="real images that were not trained on, where REFERENCE is the training set: shows whether samples copy it",
    )
    parser.add_argument("--out", default=None, help="JSON file for all results")
    parser.add_argument(
        "--report",
        default=None,
        help="folder for report.html, a page with measures, warnings, classes and pictures, and result.json",
    )
    parser.add_argument("--device", default=None, help=DEVICE_HELP)
    args = parse(parser, argv)
    from digit.evaluation.samples import evaluate
    from digit.evaluation.table import to_table
    from digit.runtime.files import check_writable

    if args.out is not None:
        check_writable(args.out)
    if args.report is not None:
        check_writable(args.report, folder=True)
    cfg = read_config(args, EvaluateConfig)
    result = evaluate(
        args.samples, args.reference, cfg, args.out, args.device, report=args.report, held_out=args.held_out
    )
    say(to_table(result))
    if args.report is not None:
        say(f"\npage: {args.report}/report.html")


@command(
    "statistics", "digit statistics photos/val --out val.npz      # then: digit evaluate samples/ val.npz", ranks=True
)
def run_statistics(parser: "ArgumentParser", argv: list[str]) -> None:
    """Save a reference's statistics (mu, sigma, mu_s, sigma_s) as .npz for `digit evaluate`."""
    from digit.evaluation.samples import EvaluateConfig

    parser.add_argument("images", help=IMAGES_HELP)
    parser.add_class_arguments(EvaluateConfig, as_group=True, skip=set(UNUSED_BY_STATISTICS))
    parser.add_argument("--out", required=True, help=".npz file for the statistics")
    parser.add_argument("--device", default=None, help=DEVICE_HELP)
    args = parse(parser, argv)
    from digit.evaluation.samples import statistics_npz
    from digit.runtime.files import as_path, check_writable

    if as_path(args.out).suffix.lower() != ".npz":
        raise DigitError(f"--out is {args.out}: statistics are an .npz file, by which digit evaluate knows them")
    check_writable(args.out)
    defaults = EvaluateConfig()
    for name in UNUSED_BY_STATISTICS:
        setattr(args, name, getattr(defaults, name))
    statistics_npz(args.images, args.out, read_config(args, EvaluateConfig), args.device)
    say(f"statistics in {args.out}")


def add_pipeline_arguments(parser: "ArgumentParser", out: str) -> None:
    """Add --from, --variant, --out, --device and how the data are read."""
    parser.add_argument("--from", dest="source", required=True, help=FROM_HELP)
    parser.add_argument(
        "--variant", default=None, help="which released checkpoints, with --from DAMO-NLP-SG/DiGIT (default: base)"
    )
    parser.add_argument("--out", required=True, help=f"folder for {out}")
    add_reading(parser, limit=False)
    parser.add_argument("--device", default=None, help=DEVICE_HELP)


@command("stability", "digit stability photos/ --from runs/photos --out stability/")
def run_stability(parser: "ArgumentParser", argv: list[str]) -> None:
    """Measure how much tokens and features change under pixel noise (paper, Table 1).

    It also reports how much of each codebook is used, and with --distances how far the images of the changed tokens are
    from the pictures.
    """
    from digit.evaluation.stability import NUM_IMAGES
    from digit.metrics.stability import StabilityConfig

    parser.add_argument("data", help=DATA_HELP)
    add_pipeline_arguments(parser, "stability.json and stability.png")
    parser.add_argument("--num", type=int, default=NUM_IMAGES, help="images, spread evenly over the data")
    parser.add_argument(
        "--distances",
        type=bool,
        default=False,
        help="decode the tokens of noisy images too, and measure the distance of these images to the pictures",
    )
    parser.add_argument(
        "--inception", default=None, help="weights of FID's Inception network for --distances (default: Lite2's)"
    )
    add_config(parser, StabilityConfig)
    args = parse(parser, argv)
    from digit.evaluation import stability
    from digit.runtime.files import check_writable

    check_writable(args.out, folder=True)

    pipe = load_pipeline(args)
    cfg, source = read_config(args, StabilityConfig), open_data(args, args.data)
    result = stability.run_stability(pipe.tokenizers, source, pipe.preprocess, cfg, num=args.num, out=args.out)
    lines = [
        f"{name}: {found['codebook']['usage']:.1%} of {found['vocab_size']} codes used, "
        f"{found['codebook']['entropy_bits']:.2f} bits, {found['codebook']['dead_codes']} never"
        for name, found in result["tokenizers"].items()
    ]
    say("\n".join([stability.to_table(result), *lines]))
    if args.distances:
        say_distances(args, pipe, source, cfg, result)
    say(f"plot and metrics: {args.out}")


def say_distances(args: Any, pipe: "DigitPipeline", source: "ImageSource", cfg: "StabilityConfig", result: Any) -> None:
    """Measure the distances of `digit stability --distances`, add them to stability.json and say them."""
    import torch

    from digit.data.crops import centre_crops
    from digit.evaluation.networks import load_judge_network
    from digit.evaluation.perturbed import perturbed_distances, to_lines, token_decoders
    from digit.runtime.files import as_path, write_result

    network = load_judge_network(args.inception, device=args.device)
    images = torch.cat([crops for crops, _ in centre_crops(source, pipe.preprocess, num=args.num)])
    result["perturbed"] = perturbed_distances(token_decoders(pipe), images, network, cfg)
    write_result(as_path(args.out) / "stability.json", result)
    say(to_lines(result["perturbed"], network.metric("fd")) + "\n")


@command(
    "probe",
    "digit probe photos/train --test photos/val --from runs/photos --out probe/\n"
    "  digit probe DATA --split train --test_split test --from runs/cifar --out probe/",
    ranks=True,
)
def run_probe(parser: "ArgumentParser", argv: list[str]) -> None:
    """Train linear classifiers on the features of each layer (paper, Table 2).

    The layers are those of prior, encoder and, if the run has trained one, the VQ-only baseline.
    """
    from digit.metrics.probe import ProbeConfig

    parser.add_argument("data", help=DATA_HELP + "; labelled, to train the classifiers")
    parser.add_argument(
        "--test",
        default=None,
        help="labelled test images (default: DATA's test or validation split, and without one every fifth image)",
    )
    parser.add_argument("--test_split", default=None, help="split of DATA, or of --test, to test on")
    parser.add_argument("--hold_out", type=bool, default=False, help=HOLD_OUT_HELP)
    add_pipeline_arguments(parser, "probe.json and probe.png")
    parser.add_argument(
        "--num_train", type=int, default=None, help="at most this many training images, spread evenly (default: all)"
    )
    parser.add_argument(
        "--num_test", type=int, default=None, help="at most this many test images, spread evenly (default: all)"
    )
    add_config(parser, ProbeConfig)
    args = parse(parser, argv)
    from digit.evaluation import probe
    from digit.evaluation.splits import probe_splits
    from digit.pipeline.pipeline import vq_only_baseline
    from digit.runtime.files import check_writable

    check_writable(args.out, folder=True)
    chosen = (args.data, args.split, args.test, args.test_split)
    train, test, where = probe_splits(*chosen, opened=partial(open_data, args), every_fifth=args.hold_out)
    pipe = load_pipeline(args)
    baseline = vq_only_baseline(args.source, pipe)
    pipes = {"DiGIT": pipe} if baseline is None else {"DiGIT": pipe, "VQ-only": baseline}
    kwargs: dict[str, Any] = dict(out=args.out, num_train=args.num_train, num_test=args.num_test, tested_on=where)
    say(probe.to_table(probe.run_probe(pipes, train, test, read_config(args, ProbeConfig), **kwargs)))
    say(f"plot and metrics: {args.out}")


@command(
    "sweep",
    "digit sweep photos/val --from runs/photos --out sweep/\n"
    "  digit sweep photos/val --from runs/photos --out sweep/ --joint true --top_k 50,100,200 --top_p 0.6,0.8,1\n"
    "  digit sweep photos/val --from runs/photos --out sweep/ --joint_guidance true --cfg_scale 1,1.5,2,3",
)
def run_sweep(parser: "ArgumentParser", argv: list[str]) -> None:
    """Find good sampling settings: distance by top-k, top-p (paper, Figure 5) and guidance."""
    from digit.evaluation import sweep

    parser.add_argument(
        "data", help=DATA_HELP + "; real images to compare with (default: its validation or else its test split)"
    )
    add_pipeline_arguments(parser, "sweep.json, sweep.png and the cache that makes it resumable")
    parser.add_argument("--num", type=int, default=sweep.NUM_SAMPLES, help="samples per setting")
    parser.add_argument(
        "--num_reference",
        type=int,
        default=10_000,
        help="real images, spread evenly (digit evaluate takes all: compare distances of equal numbers only)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample; the same for every setting")
    parser.add_argument(
        "--inception", default=None, help="weights of FID's Inception network (default: EfficientNet-Lite2 instead)"
    )
    add_config(parser, sweep.SweepConfig)
    args = parse(parser, argv)
    from digit.data.crops import centre_crops
    from digit.evaluation.networks import load_judge_network
    from digit.evaluation.splits import chosen_on
    from digit.metrics.judge import collect_judged
    from digit.runtime.files import check_writable

    check_writable(args.out, folder=True)
    source, where = chosen_on(args.data, args.split, partial(open_data, args))
    pipe, network = load_pipeline(args), load_judge_network(args.inception, device=args.device)
    say(f"compared with {where}")
    real = centre_crops(source, pipe.preprocess, num=args.num_reference)
    reference = collect_judged((images for images, _ in real), network).pooled
    cfg = read_config(args, sweep.SweepConfig)
    result = sweep.run_sweep(pipe, reference, network, cfg, args.out, num=args.num, seed=args.seed)
    distance = network.metric("fd")
    best = result["best"][distance]
    ends = f"no interval: {best['missing']}" if "missing" in best else f"{best['low']:.4g}, {best['high']:.4g}"
    say(f"lowest {distance}: {best['value']:.4g} [{ends}] with {best['sampling']}")
    for text in result["warnings"]:
        say(f"warning: {text}")
    say(f"plots and metrics: {args.out}")
