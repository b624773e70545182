"""The command plan: memory, time and cost before anything runs."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from digit.cli.arguments import CONFIG_HELP, command, parse, read_config, say
from digit.errors import DigitError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from digit.planning.machines import Machine


@command(
    "plan",
    "digit plan small --images 2640                              # on this machine\n"
    "  digit plan digit_base --gpus 8 --reuse vqgan                 # ImageNet-1k on eight H100\n"
    "  digit plan digit_large --gpus 64 --gpu-memory 40 --price 2.1 --prior_training.accumulate 4\n"
    "  digit plan digit_large --gpus 256 --images 1000000000 --epochs 1",
)
def run_plan(parser: "ArgumentParser", argv: list[str]) -> None:
    """Estimate memory, time, cost and disk space of a recipe before anything runs.

    Training memory comes from running one step on tensors without storage. Time is the longest of three: floating-point
    operations at an assumed share of the machine's peak, decoding images, and reading bytes. Where a batch does not fit
    one GPU, the plan says how to split it (accumulate). Every setting of the recipe can be changed as in digit fit.
    """
    name = argv[0] if argv and not argv[0].startswith("-") else "digit_base"
    from digit.planning.machines import GPUS
    from digit.planning.stages import IMAGENET_IMAGES
    from digit.runs.recipes import RECIPES, Recipe, get_recipe

    recipe = get_recipe(name)
    parser.add_argument("recipe", help=f"recipe to plan: {', '.join(sorted(RECIPES))}")
    parser.add_argument("--images", type=int, default=IMAGENET_IMAGES, help="number of images in the data set")
    parser.add_argument("--samples", type=int, default=50_000, help="number of images to sample at the end")
    parser.add_argument(
        "--epochs", type=float, default=None, help="passes of each model over the images (default: the recipe's steps)"
    )
    parser.add_argument(
        "--classes", type=int, default=1000, help="number of classes, where the recipe is class-conditional"
    )
    parser.add_argument("--reuse", default="", help="parts that you already have, with commas: codebook,vqgan,tokens")
    parser.add_argument("--gpu", default=None, help=f"kind of GPU: {', '.join(GPUS)} (default: this machine)")
    parser.add_argument("--gpus", type=int, default=None, help="number of GPUs (default: 1; h100 without --gpu)")
    parser.add_argument(
        "--gpu-memory",
        "--gpu_memory",
        dest="gpu_memory",
        type=float,
        default=None,
        help="GiB of each GPU (default: that of its kind)",
    )
    parser.add_argument(
        "--price", type=float, default=None, help="dollars per GPU and hour (default: that of its kind)"
    )
    parser.add_argument(
        "--cores",
        type=float,
        default=None,
        help="CPU cores per GPU, which decode images (default: those of the machine)",
    )
    parser.add_argument("--json", default=None, help="also write the plan to this file")
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_class_arguments(Recipe, as_group=True)
    parser.set_defaults(asdict(recipe))
    args = parse(parser, argv)
    if args.recipe != name:
        raise DigitError(f"recipe {args.recipe} does not come first: type digit plan {args.recipe} ...")
    from digit.planning.report import as_json, to_text
    from digit.planning.stages import Order, Planner

    reuse = frozenset(word.strip() for word in args.reuse.split(",") if word.strip())
    order = Order(
        images=args.images, samples=args.samples, epochs=args.epochs, num_classes=args.classes, reuse=reuse
    )  # fmt: skip
    planner = Planner(read_config(args, Recipe), choose_machine(args), order)
    say(to_text(planner))
    if args.json:
        from digit.runtime.files import write_json

        write_json(args.json, as_json(planner))


def choose_machine(args: Any) -> "Machine":
    """The machine that the options describe. Raises DigitError for a number out of range."""
    from digit.planning.machines import get_gpu, this_machine
    from digit.runtime.hardware import choose_device

    if args.gpus is not None and args.gpus < 1:
        raise DigitError(f"--gpus is {args.gpus}: it must be at least 1")
    for option, value in (("--gpu-memory", args.gpu_memory), ("--cores", args.cores)):
        if value is not None and value <= 0:
            raise DigitError(f"{option} is {value}: it must be above 0")
    if args.price is not None and args.price < 0:
        raise DigitError(f"--price is {args.price}: it must be at least 0")
    if args.gpu is None and args.gpus is None and args.gpu_memory is None:
        machine = this_machine(choose_device(None))
    else:
        machine = get_gpu(args.gpu or "h100")
    changes = {"count": args.gpus, "price": args.price, "cores": args.cores}
    if args.gpu_memory is not None:
        changes["memory"] = args.gpu_memory * 2**30
    return replace(machine, **{name: value for name, value in changes.items() if value is not None})
