"""What the commands share: the register of commands, parsers that teach, and the arguments that several take."""

import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from digit.errors import DigitError
from digit.runtime.distributed import launched_rank

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
DATA_HELP = (
    "a folder of images (a class a folder, nested, or flat), Hub-layout Parquet, WebDataset .tar shards, "
    "or shapes[:num=16000,size=64,seed=0] for rendered scenes"
)
FROM_HELP = (
    "run folder of `digit fit`, a pipeline folder, or DAMO-NLP-SG/DiGIT for the authors' checkpoints, which are "
    "fetched and converted once"
)


@dataclass(frozen=True)
class Command:
    """A word after `digit`: what runs it, and an example for its help page."""

    run: Callable[["ArgumentParser", list[str]], None]
    example: str
    ranks: bool = False  # whether several processes may share its work (torchrun, srun)

    @property
    def summary(self) -> str:
        """The docstring of the function: its first line stands in `digit --help`, the whole in the command's own."""
        return inspect.cleandoc(self.run.__doc__ or "")


MAX_SETTINGS, MAX_SETTINGS_BYTES = 100_000, 2**22
LISTS: set[str] = set()  # options that take several values
COMMANDS: dict[str, Command] = {}  # in the order of `digit --help`


def command(name: str, example: str, *, ranks: bool = False) -> Callable[[Callable], Callable]:
    """Register `run(parser, argv)` under a name; `ranks` where several processes may share its work."""

    def register(run: Callable) -> Callable:
        COMMANDS[name] = Command(run, example, ranks)
        return run

    return register


SEVERAL = "\n\nseveral GPUs or machines (docs/cluster.md):\n  torchrun --nproc-per-node=8 -m digit -- {name} ..."


def make_parser(name: str) -> "ArgumentParser":
    """A parser that never abbreviates, raises instead of exiting, and shows an example."""
    import argparse

    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    several = SEVERAL.format(name=name) if COMMANDS[name].ranks else ""
    return ArgumentParser(
        prog=f"digit {name}",
        description=COMMANDS[name].summary,
        epilog=f"example:\n  {COMMANDS[name].example}{several}",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_help_formatter(argparse.RawDescriptionHelpFormatter),
    )


def _help_formatter(base: type) -> type:
    from jsonargparse import DefaultHelpFormatter

    return type("HelpFormatter", (DefaultHelpFormatter, base), {})


def bracketed(argv: Sequence[str]) -> list[str]:
    """Values of list options, given with commas alone, in the brackets that the parser wants."""
    words: list[str] = []
    for word in argv:
        option, equals, value = word.partition("=")
        if equals and option in LISTS and not value.startswith("["):
            word = f"{option}=[{value}]"
        elif words and words[-1] in LISTS and not word.startswith(("[", "--")):
            word = f"[{word}]"
        words.append(word)
    return words


def parse(parser: "ArgumentParser", argv: list[str]) -> Any:
    """Parse and build dataclasses; a mistake becomes one line."""
    from jsonargparse import ArgumentError

    try:
        for path in settings_files(argv):
            refuse_bomb(path)
        args = parser.parse_args(bracketed(argv))
        refuse_nulls(parser, args)
        return parser.instantiate(args)
    except UnicodeDecodeError as error:
        raise DigitError(f"the settings file is no UTF-8 text ({error.reason}): save it as UTF-8") from error
    except RecursionError as error:
        raise DigitError("the settings are nested too deeply: give each as --NAME.FIELD, see --help") from error
    except ArgumentError as error:
        raise DigitError(f"{' '.join(str(error).split())} (see {parser.prog} --help)") from error
    except (TypeError, ValueError, OverflowError, AttributeError) as error:  # odd values in a settings file
        reason = " ".join(str(error).split())[:200]
        raise DigitError(f"a setting cannot be used ({reason}): see {parser.prog} --help") from error


def settings_files(argv: Sequence[str]) -> list[Path]:
    """The files that --config names, as far as they are there; of one that is not, the parser tells."""
    words = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    words += [value for word, value in itertools.pairwise(argv) if word == "--config"]
    return [path for word in words if "\0" not in word and os.path.isfile(path := Path(word))]


def refuse_bomb(path: Path) -> None:
    """Raise DigitError for a YAML file that is too large, or is once its references are written out."""
    import yaml

    if path.stat().st_size > MAX_SETTINGS_BYTES:
        raise DigitError(f"{path} is larger than {MAX_SETTINGS_BYTES} bytes: that is no file of settings")
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return  # the parser says what is wrong with it
    sizes: dict[int, int | None] = {}  # by node; None while its own parts are counted

    def count(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = None
            entries = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for entry in entries for part in (entry if isinstance(entry, tuple) else (entry,))]
            sizes[id(node)] = 1 + sum(map(count, parts))
        if sizes[id(node)] is None or sizes[id(node)] > MAX_SETTINGS:
            raise DigitError(f"{path} refers to itself, or grows past {MAX_SETTINGS} settings: write each one out")
        return sizes[id(node)]

    if root is not None:
        count(root)


def refuse_nulls(parser: "ArgumentParser", args: Any) -> None:
    """Raise DigitError for null where a setting needs a value: the parser lets it through in a nested group. And for a
    zero byte, which a settings file can hold, and which no path has.
    """
    if odd := [name for name, value in args.items() if isinstance(value, str) and "\0" in value]:
        raise DigitError(f"{odd[0]} holds a zero byte: write it without (see {parser.prog} --help)")
    for option in parser._actions:
        optional = option.default is None or "None" in str(getattr(option, "_typehint", "")) or option.dest == "help"
        if not optional and option.option_strings and args.get(option.dest, option.default) is None:
            raise DigitError(f"{option.dest} is null: give it a value, or leave it out (see {parser.prog} --help)")


def say(text: str) -> None:
    """Print a result; one of several processes speaks for all."""
    if launched_rank() == 0:
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()


def add_config(parser: "ArgumentParser", cfg: type) -> None:
    """Every field of a config dataclass as an option of its own; `--snrs 10,20` is `--snrs '[10,20]'`."""
    parser.add_class_arguments(cfg, as_group=True)
    LISTS.update(f"--{f.name}" for f in fields(cfg) if str(f.type).startswith("tuple["))


def read_config(args: Any, cfg: type) -> Any:
    """The config dataclass out of parsed arguments."""
    return cfg(**{f.name: getattr(args, f.name) for f in fields(cfg)})


def load_pipeline(args: Any) -> Any:
    """The pipeline of --from on --device."""
    from digit.pipeline.pipeline import DigitPipeline
    from digit.runtime.hardware import choose_device

    source, device = Path(args.source), choose_device(args.device)
    if not source.exists() and HUB_NAME.fullmatch(args.source):
        from digit.released.hub import released_pipeline

        source = released_pipeline(args.source, args.variant or "base")
    elif args.variant:
        raise DigitError(f"--variant chooses among released checkpoints, and {source} is a folder: leave it out")
    return DigitPipeline.from_pretrained(source, device)


def parse_labels(text: str | None, classes: Sequence[str]) -> list[int] | None:
    """'0,3' or 'cube,torus' -> class numbers."""
    if text is None:
        return None
    if classes and all(name.isdecimal() for name in classes):
        raise_ambiguous = [w for w in text.split(",") if w.strip() not in classes]
        if raise_ambiguous:
            raise DigitError(f"classes are named by numbers, and none is {raise_ambiguous[0]!r}: give names of classes")
    numbers = []
    for word in (w.strip() for w in text.split(",")):
        if word in classes:
            numbers.append(list(classes).index(word))
        elif word.removeprefix("-").isdecimal():
            numbers.append(int(word))
        else:
            raise DigitError(
                f"no class named {word!r}: classes are {', '.join(classes[:20]) or 'none (unconditional model)'}"
            )
    return numbers
