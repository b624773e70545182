"""The command plan: memory, time and cost before anything runs."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from digit.cli.arguments import (
    CONFIG_HELP,
    DEFAULT_RECIPE,
    command,
    note,
    parse,
    read_config,
    say,
    typed_settings,
    value_of,
    wants_help,
)
from digit.errors import DigitError
from digit.runtime.settings import check_number

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from digit.planning.machines import Machine
    from digit.runs.recipe import Recipe

IMAGENET_CLASSES = 1000
MACHINE_OPTIONS = {
    "gpus": "[1, 1_000_000]",
    "gpu_memory": "(0, 100_000]",
    "price": "[0, 1_000_000]",
    "cores": "(0, 10_000]",
}


@command(
    "plan",
    "digit plan photos --images 2640                             # on this machine, which decides size and length\n"
    "  digit plan photos256 --gpu rtx4090 --images 3000 --classes 10\n"
    "  digit plan digit_base --gpus 8 --reuse vqgan                 # ImageNet-1k on eight H100\n"
    "  digit plan digit_large --gpus 64 --gpu-memory 40 --price 2.1 --reuse vqgan --prior_training.accumulate 4\n"
    "  digit plan digit_large --gpus 256 --reuse vqgan --images 1000000000 --epochs 1",
)
def run_plan(parser: "ArgumentParser", argv: list[str]) -> None:
    """Estimate memory, time, cost and disk space of a recipe before anything runs.

    Training memory comes from running one step on tensors without storage. Time is the longest of three: floating-point
    operations at an assumed share of the machine's peak, decoding images, and reading bytes. Where a batch does not fit
    one GPU, the plan says how to split it (accumulate). Every setting of the recipe can be changed as in digit fit.
    """
    name = argv[0] if argv and not argv[0].startswith("-") else DEFAULT_RECIPE  # for the help
    from digit.planning.machines import GPUS
    from digit.planning.stages import IMAGENET_IMAGES
    from digit.runs.recipe import Recipe
    from digit.runs.recipes import RECIPES

    check_is_no_folder(name)
    recipe = planned_recipe(name, argv)
    parser.add_argument("recipe", help=f"recipe to plan: {', '.join(sorted(RECIPES))}")
    parser.add_argument("--images", type=int, default=IMAGENET_IMAGES, help="number of images in the data set")
    parser.add_argument(
        "--samples", type=int, default=0, help="number of images to sample after the run, beside those of its report"
    )
    parser.add_argument(
        "--epochs", type=float, default=None, help="passes of each model over the images (default: the recipe's steps)"
    )
    parser.add_argument(
        "--classes",
        type=int,
        default=None,
        help=f"number of classes of a class-conditional recipe (default: {IMAGENET_CLASSES}, ImageNet-1k's)",
    )
    parser.add_argument(
        "--reuse", default="", help="parts that you already have, with commas: codebook,vqgan,tokens,vq_tokens"
    )
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
    from digit.runs.checks import chosen_settings

    reuse = frozenset(word.strip() for word in args.reuse.split(",") if word.strip())
    planned = read_config(args, Recipe)
    chosen = [*typed_settings(argv, planned), *chosen_settings(planned, recipe)]
    classes = choose_classes(args.classes, planned.class_conditional)
    order = Order(images=args.images, samples=args.samples, epochs=args.epochs, num_classes=classes, reuse=reuse)
    planner = Planner(planned, choose_machine(args), order, chosen=chosen)
    if value_of(argv, "--images") is None:
        note(f"planned for ImageNet-1k, {IMAGENET_IMAGES:,} images: --images N says how many you have")
    say(to_text(planner))
    if args.json:
        from digit.runtime.files import write_json

        write_json(args.json, as_json(planner))


def check_is_no_folder(name: str) -> None:
    """Raises DigitError for pictures in the place of a recipe: a plan takes their number."""
    from digit.runs.recipes import RECIPES

    if name not in RECIPES and (os.sep in name or os.path.exists(name)):
        raise DigitError(
            f"{name} is no recipe: a plan takes a recipe's name and the number of pictures, not the pictures; "
            f"type digit plan {DEFAULT_RECIPE} --images 3000 --classes 10 (digit inspect {name} counts them)"
        )


def planned_recipe(name: str, argv: Sequence[str]) -> "Recipe":
    """The recipe of this name; the one for any machine is chosen for the machine of the options, which it says."""
    from digit.planning.choice import ANY_MACHINE, choose_photos
    from digit.runs.recipes import get_recipe

    if name != ANY_MACHINE or not argv or wants_help(argv):
        return get_recipe(name)
    options: dict[str, Any] = dict.fromkeys(MACHINE_OPTIONS) | {"gpu": value_of(argv, "--gpu")}
    for option, kind in (("gpus", int), ("gpu_memory", float), ("price", float), ("cores", float)):
        text = value_of(argv, f"--{option.replace('_', '-')}") or value_of(argv, f"--{option}")
        with suppress(ValueError):  # the parser refuses it
            options[option] = None if text is None else kind(text)
    choice = choose_photos(choose_machine(SimpleNamespace(**options)))
    note(str(choice))
    return choice.recipe


def choose_classes(given: int | None, class_conditional: bool) -> int:
    """The number of classes that --classes gives. Raises DigitError where it is none, or the recipe takes no labels."""
    if given is None:
        return IMAGENET_CLASSES
    if not class_conditional:
        raise DigitError(f"--classes is {given}, but class_conditional is false: leave it out, or set it to true")
    if given < 1:
        raise DigitError(f"--classes is {given}: give at least 1, or --class_conditional false for data without labels")
    return given


def choose_machine(args: Any) -> "Machine":
    """The machine that the options describe. Raises DigitError for a number out of range."""
    from digit.planning.machines import get_gpu, this_machine
    from digit.runtime.hardware import choose_device

    for name, interval in MACHINE_OPTIONS.items():
        if (value := getattr(args, name)) is not None:
            check_number(f"--{name.replace('_', '-')}", value, interval)
    if args.gpu is None and args.gpus is None and args.gpu_memory is None:
        machine = this_machine(choose_device(None))
    else:
        machine = get_gpu(args.gpu or "h100")
    changes = {"count": args.gpus, "price": args.price, "cores": args.cores}
    if args.gpu_memory is not None:
        changes["memory"] = args.gpu_memory * 2**30
    return replace(machine, **{name: value for name, value in changes.items() if value is not None})
