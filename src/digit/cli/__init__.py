"""argv -> one call. A user's mistake ends in one line on stderr and exit code 2."""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from digit.cli import benchmark, evaluation, pipelines, planning, reproduction, runs, studio
from digit.cli.arguments import COMMANDS, make_parser, parse_labels, say, say_here
from digit.cli.mistakes import with_suggestion, with_typed_option, with_typed_output
from digit.errors import DigitError, Stopped, printable
from digit.runtime import distributed
from digit.runtime.hardware import keep_freed_memory
from digit.runtime.lock import set_command
from digit.runtime.names import closest
from digit.runtime.output import Output, kept_open
from digit.runtime.progress import give_back_terminal, quiet
from digit.runtime.signals import leave, received, stoppable
from digit.runtime.version import __version__

# sections of `digit --help`; each module registers its commands
SECTIONS = {
    runs: "train",
    pipelines: "look and sample",
    studio: "in the browser",
    evaluation: "measure",
    reproduction: "the paper",
    benchmark: "speed",
    planning: "plan",
}


def usage() -> str:
    """The page of `digit --help`."""
    lines = []
    for module, title in SECTIONS.items():
        commands = [(name, c) for name, c in COMMANDS.items() if c.run.__module__ == module.__name__]
        lines += [title, *(f"  {name:<11}{c.summary.splitlines()[0]}" for name, c in commands), ""]
    return "\n".join(
        [
            "usage: digit COMMAND ...        (digit COMMAND --help explains each)",
            "",
            "DiGIT: discriminative image tokens and autoregressive image generation.",
            "",
            *lines,
            "start here:",
            "  digit fit shapes --recipe demo --out runs/demo      # no data needed, some minutes on a laptop",
            "  digit sample --from runs/demo --num 64 --out samples",
        ]
    )


def program() -> NoReturn:
    """The program `digit`: runs one command and ends the process."""
    code = main()
    if code > 128:
        leave(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    0: done. 2: a user's mistake, or a result that could not be printed. 128 + the signal's number (130 for Ctrl-C, 143
    for SIGTERM): stopped on request; what was saved is intact, and the same command continues. Of several processes
    (torchrun, srun) one prints.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = argv[argv[:1] == ["--"] :]  # torchrun reads no options after it
    with kept_open() as out:
        try:
            code = answer(argv)
        except SystemExit:  # after a help page
            if (code := printed(out)) == 0:
                raise
        return code or printed(out)


def printed(out: Output) -> int:
    """0 where all that the command printed was written; says why not, and returns 2, where it was lost."""
    out.flush()
    if out.error is None or isinstance(out.error, BrokenPipeError):  # `digit ... | head` has read enough
        return 0
    reason = getattr(out.error, "strerror", None) or out.error
    return fail(f"the command is done, but what it printed was lost ({reason}): run it again with another > FILE", 2)


def answer(argv: list[str]) -> int:
    """Print the page that was asked for, or run one command in a process that can be stopped; the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        say(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        say(__version__)
        return 0
    keep_freed_memory()
    set_command(same_command(argv))
    with stoppable(lambda: tell_abandoned(argv)):
        return run_to_the_end(argv)


def run_to_the_end(argv: list[str]) -> int:
    """Run one command, and say why it did not end as it should; the exit code."""
    try:
        run_command(argv[0], argv[1:])
    except Stopped as stopped:
        return tell_stopped(stopped, argv)
    except DigitError as error:
        said = with_typed_output(with_typed_option(with_suggestion(str(error)), argv), argv)
        return fail(said, 2)
    except OSError as error:
        return fail(str(error), 2)
    except KeyboardInterrupt:
        return fail("interrupted; run the same command again to continue", 130)
    except Exception as error:
        if (lost := distributed.lost_peer(error)) is None:
            if distributed.first_to_speak():
                raise
            return 1
        if (number := received()) is not None:  # the other process was asked to stop as well
            return 128 + number
        return fail(f"{lost}: what was saved is intact, run the same command again to continue", 2)
    return 0


def tell_stopped(stopped: Stopped, argv: list[str]) -> int:
    """Say how far the work is and how to continue it, and leave the other processes; the exit code."""
    say(f"{printable(str(stopped))}; to continue:\n  {same_command(argv)}")
    report_to_launcher(str(stopped))
    numbers = [received()]
    with suppress(RuntimeError):  # another process is gone already
        if stopped.together:  # one signal may have stopped all
            numbers += distributed.gather(received())
        distributed.stop(together=stopped.together)
    return 128 + next((number for number in numbers if number), signal.SIGTERM)


def tell_abandoned(argv: list[str]) -> None:
    """Say that the process ends although its main thread hangs; asks no other process."""
    give_back_terminal()
    if distributed.environment().get("LOCAL_RANK", "0") == "0":
        say_here(f"stopped while waiting: what was saved is intact; to continue:\n  {same_command(argv)}")
        report_to_launcher("stopped while waiting")


def run_command(name: str, argv: list[str]) -> None:
    """Run a command in this process, which may be one of several."""
    if name not in COMMANDS:
        raise DigitError(f"no command named {name}: {suggestion(name)}")
    asks_for_help = not {"-h", "--help", "--help-all"}.isdisjoint(argv)
    if distributed.launched_size() == 1 or asks_for_help:
        return COMMANDS[name].run(make_parser(name), argv)
    if not COMMANDS[name].ranks:
        shared = ", ".join(other for other, c in COMMANDS.items() if c.ranks)
        raise DigitError(
            f"digit {name} runs as one process, but {distributed.launched_size()} were started: "
            f"the commands that can share work are {shared}"
        )
    quiet(distributed.launched_rank() > 0)
    distributed.start(given_device(argv))
    COMMANDS[name].run(make_parser(name), argv)
    distributed.stop(together=True)


def suggestion(name: str) -> str:
    """What to type instead of an unknown command."""
    found = [] if name.startswith("-") else closest(name, COMMANDS)
    return f"did you mean {found[0]}? (see digit --help)" if found else "see digit --help"


def given_device(argv: Sequence[str]) -> str | None:
    """The value of --device, read without a parser: the processes must connect first."""
    for i, word in enumerate(argv):
        if word.startswith("--device="):
            return word.partition("=")[2]
        if word == "--device" and i + 1 < len(argv):
            return argv[i + 1]
    return None


def same_command(argv: Sequence[str]) -> str:
    """The command line that starts the same work again."""
    size = distributed.launched_size()
    if size == 1:
        return shlex.join(["digit", *argv])
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join(["srun", f"--ntasks={size}", "digit", *argv])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    nodes = [f"--nnodes={size // local}"] if size > local else ["--standalone"]
    return shlex.join(["torchrun", *nodes, f"--nproc-per-node={local}", "-m", "digit", "--", *argv])


def fail(text: str, code: int) -> int:
    """Print what went wrong, unless another process does, and return the exit code."""
    if first_message():
        sys.stderr.write(f"digit: {text}\n")
        report_to_launcher(text)
    return code


def first_message() -> bool:
    """Whether this process prints an error: before they connect the first of each machine, later the first to fail."""
    if distributed.launched_size() == 1:
        return True
    return (
        distributed.first_to_speak()
        if distributed.world_size() > 1
        else distributed.environment().get("LOCAL_RANK", "0") == "0"
    )


def report_to_launcher(text: str) -> None:
    """Write the message to the file from which torchrun takes its summary of the first failure."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(about), encoding="utf-8")


__all__ = ["COMMANDS", "main", "parse_labels", "program"]
