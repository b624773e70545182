"""Commands that measure: stability, probe, evaluate, sweep, and every table and figure of the paper."""

from pathlib import Path
from typing import TYPE_CHECKING

from digit.cli.arguments import DATA_HELP, command, parse, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@command(
    "reproduce",
    "digit reproduce claims --scale tiny                              # on rendered shapes, minutes\n"
    "  digit reproduce table3 --scale small --data photos/ --plan       # what it would take\n"
    "  digit reproduce table3 --scale small --data photos/",
)
def run_reproduce(parser: "ArgumentParser", argv: list[str]) -> None:
    """Reproduce a table or figure of the paper, or test its three claims, on your images at a scale you can afford.

    TARGET is table1 (stability), table2 (probe), table3, table4 (generation), fig3a, fig3b (ablation), fig4a
    (encoders), fig4b (completion), fig5 (sampling), fig6 (theory) or claims. A plan with estimated times comes first;
    work that is done is read, not made again, and targets of one folder share codebook, VQGAN, tokens and models.
    """
    parser.add_argument(
        "target", help="table1, table2, table3, table4, fig3a, fig3b, fig4a, fig4b, fig5, fig6 or claims"
    )
    parser.add_argument("--scale", default="tiny", help="tiny (minutes), small (an hour or two on two cores) or paper")
    parser.add_argument(
        "--data", default="shapes", help=DATA_HELP + "; its test split, or every fifth image, is kept out"
    )
    parser.add_argument("--out", default=None, help="folder (default: reproduced/SCALE-DATA)")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument(
        "--inception", default=None, help="weights of FID's Inception network; without, EfficientNet-Lite2 judges"
    )
    parser.add_argument("--encoder", default=None, help="encoder of the tokens, as --encoder.name of digit fit")
    parser.add_argument("--encoder_weights", default=None, help="its weights file, as --encoder.weights of digit fit")
    for part in ("codebook", "vqgan", "tokens"):
        parser.add_argument(f"--reuse_{part}", default=None, help=f"folder of another run's {part}")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    args = parse(parser, argv)
    from digit.reproduce import Study, build, get_scale, plan, reproduce

    scale = get_scale(args.scale).with_encoder(args.encoder, args.encoder_weights)
    reuse = {part: folder for part in ("codebook", "vqgan", "tokens") if (folder := getattr(args, f"reuse_{part}"))}
    out = args.out or f"reproduced/{args.scale}-{Path(args.data.split(':')[0]).name}"
    study = Study(args.data, scale, out, reuse=reuse, inception=args.inception, device=args.device)
    say(plan(build(args.target, study), study.out))
    if args.plan:
        return
    outcome, folder = reproduce(args.target, study)
    say(f"\n{outcome.table}\n\nresults, table and pictures: {folder}")
