"""The command that reproduces the paper: every table, figure and claim, or all of them."""

from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from digit.cli.arguments import (
    CONFIG_HELP,
    DATA_HELP,
    DEVICE_HELP,
    HOLD_OUT_HELP,
    PIXEL_MAX_HELP,
    command,
    note,
    parse,
    say,
    say_assumptions,
    typed_settings,
)
from digit.cli.runs import value_of
from digit.errors import DigitError
from digit.runtime import distributed
from digit.runtime.settings import changed, refuse_unused

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from digit.reproduce import Scale
    from digit.runs.recipes import Recipe
    from digit.runtime.settings import Rule

DEFAULT_SCALE = "tiny"
# settings of a recipe that the targets set themselves: what to do instead
DECIDED = {
    "seed": "give --seeds, such as --seeds 0,1,2",
    "class_conditional": "the target decides it: table4 is class-conditional, the others are not",
    "renderer_kind": "the target decides it: table3 and table4 train both kinds",
    "name": "the scale has a name",
}
FIXED = ("name", "encoders")  # fields of a scale that are no options, beside its recipes
SHORT = {  # shorter words for some options
    "--samples": "--num_samples",
    "--encoder": "--encoder.name",
    "--encoder_size": "--encoder.input_size",
    "--encoder_weights": "--encoder.weights",
}


@command(
    "reproduce",
    "digit reproduce claims --scale tiny                              # on rendered shapes, minutes\n"
    "  digit reproduce table3 --scale small --data photos/ --plan       # the plan alone\n"
    "  digit reproduce table1,table3 --scale small --data photos/ --seeds 0 --prior_training.num_steps 500\n"
    "  digit reproduce all --scale paper --data imagenet/ --reuse_vqgan vqgan --encoder_weights dinov2.pth ...",
    ranks=True,
)
def run_reproduce(parser: "ArgumentParser", argv: list[str]) -> None:
    """Reproduce a table or figure of the paper, or test its claims, at a chosen scale.

    TARGET is table1 (stability), table2 (probe), table3, table4 (generation), fig1 (overview), fig3a, fig3b (ablation),
    fig4a (encoders), fig4b (completion), fig5 (sampling), fig6 (theory), fig7, fig8 (pictures), latent (equations 1 to
    6) or claims; several with commas; or all. It prints a plan with estimated times first, and checks weights, labels,
    memory and disk. Finished work is reused, and targets of one folder share codebook, VQGAN, tokens and models. Every
    setting of the scale and its recipe can be changed.
    """
    argv = [*map(long_form, argv)]
    refuse_decided(argv)
    base = add_arguments(parser, argv)
    args = parse(parser, argv)
    from digit.reproduce import Study, build_all, check_everything, chosen_targets, perform_all, plan
    from digit.reproduce.rehearsal import listed, rehearsed

    targets = chosen_targets(args.target)
    scale = chosen_scale(args, argv, base)
    reuse = {part: folder for part in ("codebook", "vqgan", "tokens") if (folder := getattr(args, f"reuse_{part}"))}
    scale, cuts = rehearsed(scale) if args.rehearse else (scale, [])
    out = args.out or f"reproduced/{scale.name}{'-rehearsal' * args.rehearse}-{Path(args.data.split(':')[0]).name}"
    how = dict(inception=args.inception, device=args.device, pixel_max=args.pixel_max, cuts=cuts)
    how |= dict(labels_from=args.labels_from, test_split=args.test_split, every_fifth=args.hold_out)
    study = Study(args.data, scale, out, reuse=reuse, **how)
    say_assumptions(study.train)
    say_assumptions(study.test)
    for text in study.notes:
        note(text)
    say(f"test images: {study.tested_on} ({len(study.test)})")
    by_target = build_all(targets, study)
    experiments = list(by_target.values())
    text = distributed.on_main(lambda: plan(experiments, study.out))
    if busy := study.costs.machine.busy:
        text += f"\n{busy}"
    if args.plan:
        say(text)
        check_everything(experiments, study)
        return
    check_everything(experiments, study)
    say(f"{listed(cuts)}\n\n{text}" if cuts else text)
    for outcome, folder in perform_all(by_target, study):
        say(f"\n{outcome.table}\n\nresults, table and pictures: {folder}")


def long_form(word: str) -> str:
    """An argument with the full name of its option."""
    option, equals, value = word.partition("=")
    return SHORT.get(option, option) + equals + value


def refuse_decided(argv: Sequence[str]) -> None:
    """Raise DigitError for a setting of the recipe that the targets set themselves."""
    for word in argv:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in DECIDED:
            raise DigitError(f"--{name} cannot be set here: {DECIDED[name]}")


def add_arguments(parser: "ArgumentParser", argv: Sequence[str]) -> "Scale":
    """Add all options; the scale, which is read before, gives their defaults. Returns it."""
    from digit.reproduce import SCALES, Scale, get_scale
    from digit.runs.recipes import Recipe

    scale = get_scale(value_of(argv, "--scale") or DEFAULT_SCALE)
    parser.add_argument(
        "target",
        help="table1 to 4, fig1, fig3a, fig3b, fig4a, fig4b, fig5 to 8, latent, claims, beyond; all; several by commas",
    )
    parser.add_argument(
        "--scale",
        default=DEFAULT_SCALE,
        help=f"{', '.join(SCALES)}: minutes, an hour or two on two cores, or the paper's own on GPUs; it sets the "
        "defaults shown here",
    )
    parser.add_argument(
        "--data", default="shapes", help=DATA_HELP + "; its labelled test or validation split is tested on"
    )
    parser.add_argument(
        "--labels_from",
        default="auto",
        help="where labels come from, as of digit fit; a file of ImageNet's labels, too",
    )
    parser.add_argument("--test_split", default=None, help="split of DATA to test on, with or without labels")
    parser.add_argument("--hold_out", type=bool, default=False, help=HOLD_OUT_HELP)
    parser.add_argument("--pixel_max", type=int, default=None, help=PIXEL_MAX_HELP)
    parser.add_argument("--out", default=None, help="folder (default: reproduced/SCALE-DATA)")
    parser.add_argument("--plan", action="store_true", help="print the plan, check what can be checked, and stop")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="the same commands, structure, tokens and code with few steps and narrow models: tries everything",
    )
    parser.add_argument(
        "--inception", default=None, help="weights of FID's Inception network (default: EfficientNet-Lite2 instead)"
    )
    parser.add_argument(
        "--encoders", default="", help="weights files for fig4a --scale paper: MAE=mae.pth,MoCo=moco.pth,iBOT=ibot.pth"
    )
    for part in ("codebook", "vqgan", "tokens"):
        parser.add_argument(
            f"--reuse_{part}", default=None, help=f"folder of another run's {part} to use instead of making one"
        )
    parser.add_argument("--device", default=None, help=DEVICE_HELP)
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    fixed = {field.name for field in fields(Scale)}.difference(option_names(scale))
    parser.add_class_arguments(Scale, as_group=True, skip={*fixed})
    parser.add_class_arguments(Recipe, as_group=True, skip={*DECIDED})
    parser.set_defaults(
        {name: plain_value(getattr(scale, name)) for name in option_names(scale)}
        | {name: plain_value(getattr(scale.recipe, name)) for name in option_names(scale.recipe)}
    )
    return scale


def plain_value(value: Any) -> Any:
    return asdict(cast(Any, value)) if is_dataclass(value) else value


def option_names(cfg: Any) -> list[str]:
    """The fields of a scale or a recipe that are options; a scale's recipes are changed together."""
    fixed = FIXED if hasattr(cfg, "recipe") else DECIDED
    return [field.name for field in fields(cfg) if field.name not in fixed and "Recipe" not in str(field.type)]


def chosen_scale(args: Any, argv: Sequence[str], base: "Scale") -> "Scale":
    """The scale that parsed arguments describe. Raises DigitError for settings that its runs would not use."""
    from digit.runs.checks import check_own_steps
    from digit.runs.recipes import Recipe

    if args.scale != base.name:
        raise DigitError(
            f"--scale {args.scale} stands in a settings file, which is read too late for it: give it as an option"
        )
    given = replace(base.recipe, **{name: getattr(args, name) for name in option_names(base.recipe)})
    recipe = with_fitting_encoder(given, base.recipe)
    chosen = {*typed_settings(argv, recipe), *changed(given, base.recipe)}
    reuse = [part for part in ("codebook", "vqgan", "tokens") if getattr(args, f"reuse_{part}")]
    refuse_unused(recipe, sorted(chosen), unused_by_all(recipe, reuse))
    check_own_steps(recipe, chosen)
    scale = replace(base, **{name: getattr(args, name) for name in option_names(base)})
    recipes = {field.name: getattr(base, field.name) for field in fields(base)}
    scale = replace(
        scale,
        **{name: with_changes(r, recipe, base.recipe) for name, r in recipes.items() if isinstance(r, Recipe)},
    )
    return scale.with_encoder_files(dict(pair.partition("=")[::2] for pair in args.encoders.split(",") if pair))


def unused_by_all(recipe: "Recipe", reuse: Sequence[str]) -> "list[Rule]":
    """The settings that no target uses: they train both kinds of renderers, with and without classes."""
    from digit.runs.checks import unused_settings

    kinds: Any = [(classes, kind) for classes in (False, True) for kind in ("ar", "masked")]
    made = [replace(recipe, class_conditional=classes, renderer_kind=kind) for classes, kind in kinds]
    rules = [unused_settings(one, reuse) for one in made]
    applying = [{(pattern, why) for applies, pattern, why in of if applies} for of in rules]
    found = [(True, pattern, why) for _, pattern, why in rules[0] if all((pattern, why) in one for one in applying)]
    return [
        *found,
        (True, r"renderer\.labels", "Table 4 samples with Table 3's renderers, which see no class: leave it out"),
    ]


def with_changes(cfg: Any, given: Any, base: Any) -> Any:
    """`cfg` with those settings that differ between `given` and `base`, two configs of its class."""
    values = {}
    for name in (field.name for field in fields(cfg)):
        own, new, old = (getattr(config, name) for config in (cfg, given, base))
        nested = is_dataclass(own) and type(own) is type(new) is type(old)
        values[name] = with_changes(own, new, old) if nested else new if new != old else own
    return replace(cfg, **values)


def with_fitting_encoder(recipe: "Recipe", base: "Recipe") -> "Recipe":
    """Another encoder starts at its own default layer; crops are cut at the size of its input, unless they are set."""
    encoder, before = recipe.encoder, base.encoder
    if encoder.name != before.name and encoder.layer == before.layer:
        encoder = replace(encoder, layer=None)
    preprocess = recipe.preprocess
    if encoder.input_size != before.input_size and preprocess.encoder_size == base.preprocess.encoder_size:
        preprocess = replace(preprocess, encoder_size=encoder.input_size)
    return replace(recipe, encoder=encoder, preprocess=preprocess)
