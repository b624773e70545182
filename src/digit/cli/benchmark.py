"""Commands about speed: the measured speed of this machine, beside its limit."""

from typing import TYPE_CHECKING

from digit.cli.arguments import command, parse, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@command(
    "bench",
    "digit bench                      # every part at this machine's size\n  digit bench train --json train.json",
)
def run_bench(parser: "ArgumentParser", argv: list[str]) -> None:
    """Time every stage on this machine, beside the fastest possible time (the floor).

    A floor is the time of the matrix products alone (or of a memory copy, or of JPEG decoding), measured in the same
    run. Weights and data are random. `python -m digit.benchmark` takes the same arguments and needs only torch.
    """
    from digit.benchmark.bench import BenchConfig, add_arguments
    from digit.benchmark.bench import run_bench as bench

    add_arguments(parser)
    args = parse(parser, argv)
    bench(BenchConfig(**{name: getattr(args, name) for name in BenchConfig.__dataclass_fields__}), say)
