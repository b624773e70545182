"""Help pages. `digit COMMAND --help` is a short page of the options that most people set; `--help-all` lists every one.

FIRST_SCREEN decides what the short page shows; tests/cli/test_help.py checks it against the parsers.
"""

import argparse
import re
import sys
import textwrap
import typing
from collections.abc import Collection, Iterator
from types import NoneType, UnionType
from typing import Any, Literal

from jsonargparse import ArgumentParser

MAX_OPTIONS = 20
MIN_WIDTH = 20  # columns of a page, however narrow the terminal is
_RUN = {
    "data": "data --split --limit --labels_from --preprocess.image_size --preprocess.fit",
    "what is trained": "--recipe --config --encoder.name --encoder.weights --kmeans.num_clusters --renderer_kind "
    "--reuse_vqgan",
    "size and length": "--more --prior.depth --prior_training.num_steps --renderer_training.num_steps",
    "sampling": "--sampling.prior.top_p",
    "machine": "--device",
    "output": "--out --seed",
}
_STAGES = " ".join(
    f"--{stage}.{name}"
    for stage in ("prior", "renderer")
    for name in ("temperature", "top_k", "top_p", "cfg_scale", "num_steps")
)
_FEW = "--prior.top_p --prior.cfg_scale --renderer.top_p --renderer.cfg_scale"
_NETWORK = (
    "--protocol --inception --network --weights --image_size --num_splits --num_neighbours --kernel_subsets "
    "--kernel_subset_size --seed"
)

# command -> heading -> positional arguments (by name) and options (as typed), at most MAX_OPTIONS of these
FIRST_SCREEN: dict[str, dict[str, str]] = {
    "fit": _RUN,
    "codebook": {
        "data": "data --split --limit --labels_from --codebook_subset --preprocess.image_size",
        "what is fitted": "--recipe --config --encoder.name --encoder.weights --encoder.layer --encoder.input_size",
        "size and length": "--kmeans.num_clusters --kmeans.num_iterations --kmeans.init",
        "machine": "--device --encoder.precision",
        "output": "--out --seed",
    },
    "tokenize": {
        "data": "data --split --limit --labels_from --preprocess.image_size --crops_per_image",
        "what is trained": "--recipe --config --encoder.name --encoder.weights --kmeans.num_clusters",
        "what is reused": "--reuse_codebook --reuse_vqgan",
        "size and length": "--vqgan_training.num_steps --vqgan_training.batch_size",
        "machine": "--device",
        "output": "--out --seed",
    },
    "train": {
        "data": "data --split --limit --labels_from",
        "what is trained": "model --recipe --config --reuse_codebook --reuse_vqgan --reuse_tokens",
        "size and length": "--prior.depth --prior.embed_dim --prior_training.num_steps --prior_training.batch_size "
        "--renderer.depth --renderer.embed_dim --renderer_training.num_steps --renderer_training.batch_size "
        "--vqgan_training.num_steps",
        "machine": "--device",
        "output": "--out --seed",
    },
    "replay": {"data": "dump", "machine": "--device"},
    "pretrain": {
        "data": "data --split --limit --labels_from --source_size",
        "what is trained": "--method --config",
        "size and length": "--image_size --patch_size --depth --embed_dim --num_heads --training.num_steps "
        "--training.batch_size --training.learning_rate",
        "machine": "--device --training.precision",
        "output": "--out --seed",
    },
    "inspect": {"data": "path --split --limit --labels_from --pixel_max", "output": "--fit --sheet"},
    "convert": {
        "files to convert": "--encoder --codebook --vqgan --prior --renderer",
        "what the files do not say": "--vqgan_format --renderer_kind --encoder_family --encoder_heads --encoder_layer "
        "--position_interpolation --image_size --encoder_size",
        "output": "--out",
    },
    "sample": {
        "what is sampled": "--from --variant --num --labels --seed",
        "sampling (not set: as the pipeline was saved)": _STAGES,
        "machine": "--device --batch_size --precision",
        "output": "--out",
    },
    "complete": {
        "data": "images --num --keep --pixels --each",
        "what is sampled": "--from --variant --labels --seed",
        "sampling (not set: as the pipeline was saved)": _FEW,
        "machine": "--device --batch_size --precision",
        "output": "--out",
    },
    "vary": {
        "data": "images --num --each --keep_discriminative --keep_vq",
        "between two pictures": "--toward --steps",
        "what is sampled": "--from --variant --labels --seed",
        "sampling (not set: as the pipeline was saved)": _FEW,
        "machine": "--device --batch_size --precision",
        "output": "--out",
    },
    "export": {"data": "run", "machine": "--device", "output": "--out"},
    "info": {"data": "folder"},
    "studio": {
        "what is shown": "run --data --runs --variant",
        "where it is served": "--port --open --host --allow_host --token",
        "what others may do": "--read_only --max_upload",
        "machine": "--device",
    },
    "evaluate": {
        "data": "samples reference --num --num_reference --held_out",
        "how it is measured": _NETWORK,
        "machine": "--device --batch_size --cache",
        "output": "--report --out",
    },
    "statistics": {
        "data": "images --num_reference",
        "how it is measured": "--protocol --inception --image_size",
        "machine": "--device --batch_size --cache",
        "output": "--out",
    },
    "stability": {
        "data": "data --split --num",
        "what is measured": "--from --variant --snrs --unit --power --confidence --seed",
        "machine": "--device",
        "output": "--out",
    },
    "probe": {
        "data": "data --split --labels_from --num_train --test --test_split --hold_out --num_test",
        "what is measured": "--from --variant",
        "classifiers": "--solver --l2 --learning_rates --weight_decays --num_epochs --batch_size "
        "--validation_fraction --seed",
        "machine": "--device",
        "output": "--out",
    },
    "sweep": {
        "data": "data --split --num_reference",
        "what is measured": "--from --variant --num --inception --seed",
        "sampling": "--top_k --top_p --joint",
        "machine": "--device",
        "output": "--out",
    },
    "reproduce": {
        "data": "--data --labels_from --test_split --hold_out",
        "what is reproduced": "target --scale --config --plan --rehearse --inception",
        "size": "--seeds --num_samples",
        "what is trained": "--encoder.name --encoder.input_size --encoder.weights --encoders --reuse_codebook "
        "--reuse_vqgan --reuse_tokens",
        "machine": "--device",
        "output": "--out",
    },
    "bench": {
        "what is timed": "part --size --precision --repeats --images",
        "machine": "--device",
        "output": "--json --profile",
    },
    "plan": {
        "data": "--images --classes",
        "what is planned": "recipe --config --reuse",
        "size and length": "--epochs --prior.depth --prior.embed_dim --prior_training.batch_size "
        "--prior_training.num_steps --prior_training.accumulate",
        "sampling": "--samples",
        "machine": "--gpu --gpus --gpu-memory --cores --price",
        "output": "--json",
    },
}

_HELP = argparse._HelpAction
PROPER_NAMES = ("Gumbel", "Adam", "Lloyd")  # stay capitals at the start of a help text


class CommandParser(ArgumentParser):
    """Parser of one command, with a short help page (--help) and a full one (--help-all)."""

    def __init__(self, *args: Any, command: str, **kwargs: Any):
        self.command, self.show_all = command, False
        self.required: set[str] = set()  # the parser hides it from its actions while it parses
        super().__init__(*args, **kwargs)
        self.add_argument("--help-all", action=HelpAll)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """Add an argument, and remember whether it is required."""
        action: Any = super().add_argument(*args, **kwargs)
        if getattr(action, "required", False):
            self.required.add(action.dest)
        return action

    def format_usage(self) -> str:
        """One line: the positional arguments and the options that must be given."""
        positional = [spelling(action) for action in self._actions if not action.option_strings]
        required = [
            f"{spelling(action)} {value_name(action)}"
            for action in self._actions
            if action.option_strings and action.dest in self.required
        ]
        optional = {action.dest for action in self._actions if action.nargs == argparse.OPTIONAL}
        words = [f"[{word}]" if word.lower() in optional else word for word in positional]
        return f"usage: {' '.join([self.prog, *words, *required])} [options]\n"

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """The page that was asked for."""
        page: Any = self._get_formatter() if formatter is None else formatter
        page._width, page.required = max(page._width, MIN_WIDTH), self.required
        page._max_help_position = 36 if page._width >= 70 else 12
        paragraphs = (self.description or "").split("\n\n")
        page.add_text("\n\n".join(textwrap.fill(paragraph, page._width) for paragraph in paragraphs))
        for heading, actions in self.all_groups() if self.show_all else self.first_screen():
            page.start_section(heading)
            page.add_arguments(actions)
            page.end_section()
        shown = {action.dest for _, actions in self.first_screen() for action in actions}
        hidden = {action.dest for _, actions in self.all_groups() for action in actions} - shown
        if hidden and not self.show_all:
            page.add_text(f"{len(hidden)} more options: {self.prog} --help-all")
        page.add_text(self.epilog)
        return f"{self.format_usage()}\n{page.format_help()}"

    def first_screen(self) -> list[tuple[str, list[argparse.Action]]]:
        """(heading, actions) of the short page."""
        actions = {spelling(action): action for action in self._actions}
        actions |= {option: action for action in self._actions for option in action.option_strings}
        return [
            (heading, [actions[word if word[0] == "-" else word.upper()] for word in words.split()])
            for heading, words in FIRST_SCREEN[self.command].items()
        ]

    def all_groups(self) -> list[tuple[str, list[argparse.Action]]]:
        """(heading, actions) of the full page: one group for each part of the settings."""
        groups = []
        for group in self._action_groups:
            actions = [a for a in group._group_actions if not isinstance(a, _HELP) and a.help != argparse.SUPPRESS]
            groups += [((group.title or "").rstrip(".:"), actions)] if actions else []
        return groups


class HelpAll(_HELP):
    """--help-all: print the full page and stop."""

    def __init__(self, option_strings: Any, dest: str = argparse.SUPPRESS, **kwargs: Any):
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, help="show every option and exit")

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.show_all = True
        sys.stdout.write(parser.format_help())
        parser.exit()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each option as `--name TYPE  help (default: value)`."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return spelling(action)
        return f"{spelling(action)} {value_name(action)}".rstrip()

    required: Collection[str] = ()  # names of the required arguments

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").strip().rstrip(".")
        if text == "Path to a configuration file":  # jsonargparse's own words
            return "YAML file with the settings of this group"
        if action.dest == "print_config":
            return "print the settings as YAML, for --config, and exit"
        if re.match(r"[A-Z][a-z]+\b", text) and not text.startswith(PROPER_NAMES):
            text = text[0].lower() + text[1:]
        if action.dest in self.required:
            return f"{text} (required)"
        if value_name(action) in ("", "FILE") or not action.option_strings or re.search(r"\bdefault\b", text, re.I):
            return text
        return f"{text} (default: {'not set' if action.default in (None, '') else default_text(action.default)})"

    def _expand_help(self, action: argparse.Action) -> str:
        return self._get_help_string(action)  # as it stands: a percent sign is text


def spelling(action: argparse.Action) -> str:
    """An argument as a person types it: `--from`; DATA for a positional one."""
    if not action.option_strings:
        return action.dest.upper()
    return next((option for option in action.option_strings if option.startswith("--")), action.option_strings[0])


def value_name(action: argparse.Action) -> str:
    """What stands behind an option: INT, FLOAT, true|false, a|b|c, INT,INT,... or the option's own name."""
    if action.nargs == 0 or action.dest == "print_config":
        return ""
    if type(action).__name__ in ("ActionConfigFile", "_ActionConfigLoad"):
        return "FILE"
    name = action.dest.rpartition(".")[2].upper()
    return type_name(getattr(action, "_typehint", None) or action.type, name)


def type_name(hint: Any, name: str) -> str:
    """A type in the words of the help pages; `name` where any text will do."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, UnionType):
        return "|".join(dict.fromkeys(type_name(part, name) for part in arguments if part is not NoneType))
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        parts = [type_name(part, name) for part in arguments if part is not ...]
        return ",".join([*parts * (2 if ... in arguments else 1), *(["..."] if ... in arguments else [])])
    return {int: "INT", float: "FLOAT", bool: "true|false"}.get(hint, name)


def default_text(value: Any) -> str:
    """A default as a person types it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every option that a parser takes."""
    return (option for action in parser._actions for option in action.option_strings if option.startswith("--"))
