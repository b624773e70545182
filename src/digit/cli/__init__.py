"""argv -> one call. A user's mistake ends in one line on stderr and exit code 2; only this package prints."""

import os
import sys
from collections.abc import Sequence

from digit import __version__
from digit.cli import measures, pictures, plans, runs, speed
from digit.cli.arguments import COMMANDS, make_parser, parse_labels, say
from digit.errors import DigitError
from digit.machine import keep_freed_memory

# each module registers its commands
SECTIONS = {runs: "train", pictures: "look and draw", measures: "measure", speed: "speed", plans: "plan"}


def usage() -> str:
    """The page of `digit --help`."""
    lines = []
    for module, title in SECTIONS.items():
        there = [(name, c) for name, c in COMMANDS.items() if c.run.__module__ == module.__name__]
        lines += [title, *(f"  {name:<11}{c.summary.splitlines()[0]}" for name, c in there), ""]
    return "\n".join(
        [
            "usage: digit COMMAND ...        (digit COMMAND --help teaches each)",
            "",
            "DiGIT: discriminative image tokens and autoregressive image generation.",
            "",
            *lines,
            "start here:",
            "  digit fit shapes --recipe demo --out runs/demo      # no data needed, some minutes on a laptop",
            "  digit sample --from runs/demo --num 64 --out samples",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a user's mistake, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        say(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        say(__version__)
        return 0
    try:
        command, rest = argv[0], argv[1:]
        if command not in COMMANDS:
            raise DigitError(f"no command named {command}: choose one of {', '.join(COMMANDS)}")
        keep_freed_memory()
        COMMANDS[command].run(make_parser(command), rest)
    except DigitError as error:
        sys.stderr.write(f"digit: {error}\n")
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        sys.stderr.write(f"digit: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("digit: interrupted; run the same command again to go on\n")
        return 130
    return 0


__all__ = ["COMMANDS", "main", "parse_labels"]
