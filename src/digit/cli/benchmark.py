"""Commands about speed: what this machine reaches, beside what it could."""

from typing import TYPE_CHECKING

from digit.cli.arguments import command, parse, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@command(
    "bench",
    "digit bench                      # every part at this machine's size\n  digit bench train --json train.json",
)
def run_bench(parser: "ArgumentParser", argv: list[str]) -> None:
    """Speed of sampling, training, encoding, K-means and data, each beside its floor on this machine.

    A floor is the same matrix products alone (a memory copy, JPEG decoding), timed in turn with the case in one run.
    Weights and data are random. `python -m digit.benchmark` takes the same arguments and needs torch alone.
    """
    from digit.benchmark.bench import BenchConfig, add_arguments
    from digit.benchmark.bench import run_bench as bench

    add_arguments(parser)
    args = parse(parser, argv)
    bench(BenchConfig(**{name: getattr(args, name) for name in BenchConfig.__dataclass_fields__}), say)
