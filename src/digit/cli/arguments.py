"""What the commands share: the table of commands, their parsers, and the arguments that several of them take."""

import inspect
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from digit.cli.mistakes import explain, typed_name
from digit.errors import DigitError, printable
from digit.runtime.distributed import launched_rank
from digit.runtime.paths import is_path
from digit.runtime.settings import flat

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from digit.data.images import ImageSource
    from digit.pipeline.labels import ClassPositions
    from digit.pipeline.pipeline import DigitPipeline


SHEET = "contact_sheet.png"
DEFAULT_RECIPE = "photos"  # whose settings `digit fit` and `digit plan` show as defaults
RELEASED = "DAMO-NLP-SG/DiGIT"  # as of `digit.pipeline.manifest`, which is slow to import
DATA_HELP = (
    "folder or .zip of images (one subfolder per class, nested, or flat), Parquet in the Hub's layout, WebDataset "
    ".tar shards, or shapes[:num=16000,size=64,seed=0] for rendered scenes"
)
FROM_HELP = (
    "run folder of `digit fit`, a pipeline folder, OWNER/NAME of a pipeline on the Hugging Face Hub, or "
    "DAMO-NLP-SG/DiGIT for the authors' checkpoints (fetched and converted once)"
)


@dataclass(frozen=True)
class Command:
    """One command: the function that runs it, and an example for its help page."""

    run: Callable[["ArgumentParser", list[str]], None]
    example: str
    ranks: bool = False  # whether several processes can share its work (torchrun, srun)

    @property
    def summary(self) -> str:
        """The function's docstring: `digit --help` shows its first line, `digit COMMAND --help` all of it."""
        return inspect.cleandoc(self.run.__doc__ or "")


MAX_SETTINGS, MAX_SETTINGS_BYTES = 100_000, 2**22
COMMANDS: dict[str, Command] = {}  # by name


def command(name: str, example: str, *, ranks: bool = False) -> Callable[[Callable], Callable]:
    """Register `run(parser, argv)` under a name; set `ranks` where several processes can share its work."""

    def register(run: Callable) -> Callable:
        COMMANDS[name] = Command(run, example, ranks)
        return run

    return register


DEVICE_HELP = "cpu or cuda (default: cuda where there is one)"
CONFIG_HELP = "YAML file with settings; later options win (--print_config prints such a file)"
HOLD_OUT_HELP = "test on every fifth image of DATA, although it has splits to test on"
PICTURES_SPLIT_HELP = "split of a data set that has splits (default: validation, else test: no model saw those)"
PIXEL_MAX_HELP = (
    "value of white in images of more than 8 bits per channel, such as 4095 for 12 bits (default: as the file states, "
    "or as the largest values of some images show)"
)
SEVERAL = "\n\nseveral GPUs or machines (docs/cluster.md):\n  torchrun --nproc-per-node=8 -m digit -- {name} ..."


def add_reading(parser: "ArgumentParser", limit: bool = True) -> None:
    """Add the options that say how a data set is read; `open_data` takes them."""
    parser.add_argument("--split", default=None, help="split of a data set that has splits (default: train)")
    if limit:
        parser.add_argument("--limit", type=int, default=None, help="use LIMIT images only, spread evenly")
    parser.add_argument(
        "--labels_from",
        default="auto",
        help="where labels come from: auto (label files, columns and keys of the usual names, else folders), none, "
        "folders (whole paths), top (first folders), a column or key, or a label file (PATH or PATH:COLUMN)",
    )
    parser.add_argument(
        "--read_contents",
        type=bool | None,
        default=None,
        help="whether the contents of all files tell if the data have changed, or the times of the files' last change "
        "(default: contents of up to 10,000 files of 512 MB in all)",
    )
    parser.add_argument("--pixel_max", type=int, default=None, help=PIXEL_MAX_HELP)


def open_data(args: Any, path: str, *, say_notes: bool = True, **changes: Any) -> "ImageSource":
    """Open the images at `path` as the options of `add_reading` say; say what was assumed and what is not used."""
    from digit.data.images import open_source

    names = ("split", "limit", "labels_from", "read_contents", "pixel_max")
    source = open_source(path, **{name: getattr(args, name) for name in names if hasattr(args, name)} | changes)
    if say_notes:
        say_assumptions(source)
    return source


def say_assumptions(source: "ImageSource") -> None:
    """Say on stderr what was assumed of the data and what is not used; of several processes, one does."""
    notes = [*source.notes]
    if source.pixel_range and source.pixel_range.white:
        notes.append(str(source.pixel_range))
    for note in notes if launched_rank() == 0 else ():
        print(f"note: {source.name}: {note}", file=sys.stderr)


def make_parser(name: str) -> "ArgumentParser":
    """A parser of one command that takes no abbreviations and raises instead of exiting."""
    from jsonargparse import set_parsing_settings

    from digit.cli.help import CommandParser, HelpFormatter

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    several = SEVERAL.format(name=name) if COMMANDS[name].ranks else ""
    return CommandParser(
        command=name,
        prog=f"digit {name}",
        description=COMMANDS[name].summary,
        epilog=f"example:\n  {COMMANDS[name].example}{several}",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )


def list_options(parser: "ArgumentParser") -> set[str]:
    """The options that take several values, such as --snrs, also where they may be null."""
    lists = [action for action in parser._actions if "tuple[" in str(getattr(action, "_typehint", ""))]
    return {option for action in lists for option in action.option_strings}


def bracketed(argv: Sequence[str], lists: set[str]) -> list[str]:
    """Put the values of list options in the brackets that the parser needs: `--snrs 10,20` to `--snrs [10,20]`."""
    words: list[str] = []
    for word in argv:
        option, equals, value = word.partition("=")
        if equals and option in lists and not value.startswith("["):
            word = f"{option}=[{value}]"
        elif words and words[-1] in lists and not word.startswith(("[", "--")):
            word = f"[{word}]"
        words.append(word)
    return words


def parse(parser: "ArgumentParser", argv: list[str]) -> Any:
    """Parse the arguments and build their dataclasses. Raises DigitError with one line for a mistake."""
    from jsonargparse import ArgumentError

    try:
        for path in settings_files(argv):
            refuse_bomb(path)
        args = parser.parse_args(bracketed(argv, list_options(parser)))
        refuse_nulls(parser, args)
        return parser.instantiate(args)
    except UnicodeDecodeError as error:
        raise DigitError(f"the settings file is no UTF-8 text ({error.reason}): save it as UTF-8") from error
    except RecursionError as error:
        raise DigitError("the settings are nested too deeply: give each as --NAME.FIELD, see --help") from error
    except ArgumentError as error:
        raise DigitError(explain(parser, str(error))) from error
    except (TypeError, ValueError, OverflowError, AttributeError) as error:  # odd values in a settings file
        reason = " ".join(str(error).split())[:200]
        raise DigitError(f"a setting cannot be used ({reason}): see {parser.prog} --help") from error


def settings_files(argv: Sequence[str]) -> list[Path]:
    """The existing files that --config names; the parser reports a missing one."""
    words = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    words += [value for word, value in itertools.pairwise(argv) if word == "--config"]
    return [path for word in words if "\0" not in word and os.path.isfile(path := Path(word))]


def refuse_bomb(path: Path) -> None:
    """Raise DigitError for a YAML file that is too large, as it stands or with its references written out."""
    import yaml

    if path.stat().st_size > MAX_SETTINGS_BYTES:
        raise DigitError(f"{path} is larger than {MAX_SETTINGS_BYTES} bytes, too large for a settings file")
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
        size = sizes[id(node)]
        if size is None or size > MAX_SETTINGS:
            raise DigitError(f"{path} refers to itself, or grows past {MAX_SETTINGS} settings: write each one out")
        return size

    if root is not None:
        count(root)


def refuse_nulls(parser: "ArgumentParser", args: Any) -> None:
    """Raise DigitError for null where a setting needs a value, and for a zero byte.

    The parser accepts null in a nested group. A settings file can hold a zero byte, a path cannot.
    """
    if odd := [name for name, value in args.items() if isinstance(value, str) and "\0" in value]:
        raise DigitError(f"{typed_name(parser, odd[0])} holds a zero byte: write it without (see {parser.prog} --help)")
    for option in parser._actions:
        optional = option.default is None or "None" in str(getattr(option, "_typehint", "")) or option.dest == "help"
        if not optional and option.option_strings and args.get(option.dest, option.default) is None:
            name = typed_name(parser, option.dest)
            raise DigitError(f"{name} is null: give it a value, or leave it out (see {parser.prog} --help)")


def note(text: str) -> None:
    """Say on stderr what was decided for the person; of several processes, one does."""
    if launched_rank() == 0:
        print(f"note: {text}", file=sys.stderr)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether a page is asked for, and no run."""
    return not {"-h", "--help", "--help-all", "--print_config"}.isdisjoint(argv)


def value_of(argv: Sequence[str], option: str) -> str | None:
    """The value of an option, read without a parser."""
    for i, word in enumerate(argv):
        if word == option and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(option + "="):
            return word.split("=", 1)[1]
    return None


def say(text: str) -> None:
    """Print a result, in the first process only."""
    if launched_rank() == 0:
        say_here(text)


def say_here(text: str) -> None:
    """Print in this process. Control characters, as a name of a class may hold them, are escaped."""
    sys.stdout.write(printable(text.rstrip("\n"), keep="\n") + "\n")
    sys.stdout.flush()


def add_config(parser: "ArgumentParser", cfg: type) -> None:
    """Add one option for each field of a config dataclass."""
    parser.add_class_arguments(cfg, as_group=True)


def read_config(args: Any, cfg: type) -> Any:
    """Build the config dataclass from parsed arguments."""
    return cfg(**{f.name: getattr(args, f.name) for f in fields(cfg)})


def typed_settings(argv: Sequence[str], cfg: Any) -> list[str]:
    """Dotted names of the settings of a config that are typed as options."""
    words = [word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")]
    return [name for name in words if name in flat(cfg)]


def load_pipeline(args: Any) -> Any:
    """Load the pipeline of --from on --device."""
    from digit.pipeline.pipeline import DigitPipeline
    from digit.runtime.hardware import choose_device

    if not args.source:
        raise DigitError("--from is empty: give a run or pipeline folder")
    source, device = args.source, choose_device(args.device)
    if source == RELEASED and not is_path(source):
        from digit.released.hub import released_pipeline

        source = released_pipeline(source, args.variant or "base")
    elif args.variant:
        raise DigitError(
            f"--variant chooses one of the released checkpoints, but --from {source} is another pipeline: leave "
            "--variant out"
        )
    try:
        return DigitPipeline.from_pretrained(source, device)
    except DigitError as error:
        raise type(error)(f"--from: {error}") from error


def parse_labels(text: str | None, pipe: "DigitPipeline") -> "ClassPositions | None":
    """The classes of '0,3' or 'cube,torus', as `DigitPipeline.stream` takes them. Raises DigitError naming --labels."""
    from digit.pipeline.labels import ClassPositions

    if text is None:
        return None
    try:
        return ClassPositions(pipe.class_positions(split_names(text, pipe.classes)))
    except DigitError as error:
        raise DigitError(f"--labels: {error}") from error


def split_names(text: str, classes: Sequence[str]) -> list[str]:
    """The parts between commas; parts that only together are the name of a class stay together."""
    words, known, names = text.split(","), set(classes), []
    while words:
        ends = [end for end in range(len(words), 0, -1) if ",".join(words[:end]).strip() in known]
        end = ends[0] if ends else 1
        names.append(",".join(words[:end]).strip())
        words = words[end:]
    return names
