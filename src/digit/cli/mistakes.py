"""Turns a mistake into one line that names what the person typed, and suggests what they may have meant."""

import argparse
import difflib
import itertools
import re
from collections.abc import Sequence

from digit.runtime.names import closest, did_you_mean

TYPES = {"INT": "a whole number", "FLOAT": "a number", "true|false": "true or false"}
UNKNOWN_NAME = re.compile(
    r"\b(?:(?:no|nothing) [\w ]*?named|unknown \w+) '?(?P<name>[^\s':]+)'?[^:]*: "
    r"(?P<list>choose (?:one of )?(?P<names>.+))"
)


def with_suggestion(text: str) -> str:
    """A message `no X named Y: choose one of A, B`, as every room writes it, with the closest name before the list."""
    if (match := UNKNOWN_NAME.search(text)) is None:
        return text
    names = re.split(r", | or |; ", match["names"])
    if len(names) < 3 or not (found := closest(match["name"], names)):
        return text
    return f"{text[: match.start('list')]}did you mean {found[0]}? {text[match.start('list') :]}"


def with_typed_option(text: str, argv: Sequence[str]) -> str:
    """A message `depth is 0` or `prior.depth is 0` about `--prior.depth 0` names the option, where one fits."""
    typed: dict[str, set[str]] = {}
    for option in (word.partition("=")[0] for word in argv if word.startswith("--")):
        for name in {option.lstrip("-"), option.lstrip("-").rpartition(".")[2].replace("-", "_")}:
            typed.setdefault(name, set()).add(option)
    for match in re.finditer(r"(?<![\w./'-])[\w.]*\w(?= is )", text):
        if len(options := typed.get(match[0], set())) == 1:
            return text[: match.start()] + options.pop() + text[match.end() :]
    return _with_neighbour(text, argv)


def _with_neighbour(text: str, argv: Sequence[str]) -> str:
    """A message `start is 600: it must be below num_steps 4` about a typed `--a.num_steps 4` names `--a.start`."""
    from digit.runs.recipes import RECIPES, get_recipe
    from digit.runtime.settings import flat

    if (match := re.match(r"(\w+) is ", text)) is None:
        return text
    found = {
        f"{option.rpartition('.')[0]}.{match[1]}"
        for option, value in _typed_pairs(argv)
        if re.search(rf"\b{re.escape(option.rpartition('.')[2])} {re.escape(value)}(?![\w.])", text[match.end() :])
    }
    found = {option for option in found if option.removeprefix("--") in flat(get_recipe(next(iter(RECIPES))))}
    return found.pop() + text[match.end(1) :] if len(found) == 1 else text


def _typed_pairs(argv: Sequence[str]) -> list[tuple[str, str]]:
    """The options of a command line with the word that follows each."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return [(option, value) for option, value in itertools.pairwise(words) if option.startswith("--") and value]


def with_typed_output(text: str, argv: Sequence[str]) -> str:
    """A message `cannot write PATH; choose another --out` about `--sheet PATH` names that option instead of --out."""
    written = [(len(value), option) for option, value in _typed_pairs(argv) if f"cannot write {value}" in text]
    return text.replace("another --out", f"another {max(written)[1]}") if written else text


def explain(parser: argparse.ArgumentParser, message: str) -> str:
    """The parser's message in the words that the person typed."""
    from digit.cli.help import options_of

    more = f"(see {parser.prog} --help)"
    message = " ".join(message.split())
    if match := re.fullmatch(r"unrecognized arguments: (.*)", message):
        return f"{_unknown(match[1].split(), list(options_of(parser)))} {more}"
    if match := re.fullmatch(r"the following arguments are required: (.*)", message):
        return f"missing: {', '.join(typed_name(parser, dest) for dest in match[1].split(', '))} {more}"
    if match := re.fullmatch(r"argument (\S+?)(?:/\S+)?: expected (?:one|at least one) argument", message):
        return f"{match[1]} needs a value {more}"
    if match := re.fullmatch(r"Group '(.*)' does not accept option '(.*)'", message):
        return f"{_unknown_setting(f'{match[1]}.{match[2]}', parser)} {more}"
    if match := re.fullmatch(r"Option '(.*)' is not accepted", message):
        return f"{_unknown_setting(match[1], parser)} {more}"
    if match := re.match(r"Parser key \"(?P<dest>[^\"]+)\": (?P<reason>.*)", message):
        return f"{_wrong_value(parser, match['dest'], match['reason'])} {more}"
    if match := re.match(r"(?:Problems parsing config|Unexpected config): (.*)", message):
        return f"--config: not a YAML file of NAME: VALUE lines: {match[1]} {more}"
    return f"{message} {more}"


def typed_name(parser: argparse.ArgumentParser, dest: str) -> str:
    """How a person types the argument that the program calls `dest`: --from for source, DATA for data."""
    from digit.cli.help import spelling

    for action in parser._actions:
        if dest == action.dest or dest in action.option_strings:
            return spelling(action)
    return dest


def _unknown(words: list[str], options: list[str]) -> str:
    for word in words:
        if word.startswith("-"):
            name = word.partition("=")[0]
            return f"no option named {name}{did_you_mean('--' + name.lstrip('-'), options)}"
    return f"unexpected argument {words[0]}"


def _unknown_setting(name: str, parser: argparse.ArgumentParser) -> str:
    settings = {action.dest for action in parser._actions}
    groups = {dest.rpartition(".")[0] for dest in settings}
    group = name.partition(".")[0]
    if group not in groups | settings and (near := difflib.get_close_matches(group, groups - {""}, n=1)):
        return f"no setting named {group}: did you mean {near[0]}?"
    return f"no setting named {name}{did_you_mean(name, settings)}"


def _wrong_value(parser: argparse.ArgumentParser, dest: str, reason: str) -> str:
    from digit.cli.help import value_name

    option = typed_name(parser, dest)
    action = next((action for action in parser._actions if action.dest == dest), None)
    value = re.search(r"(?:Got|Given) value: (.*)$", reason)
    if "nable to load config" in reason and (file := re.search(r"config '([^']*)'", reason)):
        return f"{option}: cannot read {file[1]}: give a YAML file, or single settings as {option}.NAME VALUE"
    if action is None or value is None:
        return f"{option}: {reason}"
    kind = value_name(action)
    if "," in kind:
        return f"{option} is {value[1].strip('[]')}: give {kind}, with commas between the values"
    if "|" in kind and kind not in TYPES:
        choices = [TYPES.get(choice, choice) for choice in kind.split("|")]
        found = closest(value[1], choices)
        hint = f"did you mean {found[0]}? " if found else ""
        return f"{option} is {value[1]}: {hint}choose {', '.join(choices[:-1])} or {choices[-1]}"
    return f"{option} is {value[1]}: it must be {TYPES.get(kind, 'text')}"
