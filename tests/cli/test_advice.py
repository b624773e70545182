"""Advice in messages: each command and each option that a message names exists where the person meets the message."""

import ast
import io
import re
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest

import digit
from digit.cli import COMMANDS, main
from digit.cli.mistakes import with_typed_output

ROOT = Path(digit.__file__).parent
OPTION, COMMAND = re.compile(r"(?<![\w-])--[a-z][\w.]*"), re.compile(r"\bdigit (?!that\b|import\b)[a-z]+")
WRITERS = (
    "evaluate",
    "statistics",
    "stability",
    "probe",
    "sweep",
    "reproduce",
    "convert",
    "sample",
    "complete",
    "vary",
    "export",
    "fit",
)
WRITERS += ("codebook", "tokenize", "train", "pretrain")  # the commands with --out
TRAINERS = ("fit", "train", "pretrain")
MET_IN = {  # the commands in which a file's messages are met; the longest beginning of its path counts
    "evaluation/samples.py": ("evaluate",),
    "evaluation/published.py": ("evaluate",),
    "evaluation/settings.py": ("evaluate",),
    "benchmark/": ("bench",),
    "convert/vit_checkpoints.py": ("convert",),  # infer_shape asks for --encoder_heads there alone
    "convert/vqgan.py": ("convert",),
    "data/": ("fit", "train"),
    "data/inspect.py": ("inspect",),
    "evaluation/npz.py": ("evaluate",),
    "evaluation/splits.py": ("probe", "reproduce"),
    "evaluation/traps.py": ("evaluate",),
    "pipeline/card.py": ("sample",),
    "pipeline/sample_folder.py": ("sample",),
    "pipeline/sample_journal.py": ("sample",),
    "planning/": ("plan",),
    "planning/choice.py": ("fit",),
    "released/convert.py": ("convert",),
    "released/vq_tokenizers.py": ("convert",),
    "reproduce/": ("reproduce",),
    "runs/": ("fit", "train"),
    "runs/pictures.py": ("complete",),
    "studio/": ("studio",),
    "studio/commands.py": ("complete",),  # the lines to copy of sample and complete, whose options complete has all
    "runtime/distributed.py": tuple(name for name, c in COMMANDS.items() if c.ranks),
    "runtime/files.py": WRITERS,  # others have their option put in, see test_the_typed_option_takes_the_place_of_out
    "runtime/lock.py": ("fit", "train", "pretrain", "sample", "codebook", "tokenize"),
    "training/": TRAINERS,
}
WHOLE_COMMANDS = {
    "pipeline/manifest.py",
    "released/hub.py",
    "runs/report.py",
    "runs/status.py",
}  # messages with a command line to copy
NOT_OURS = {  # options of other programs
    ("benchmark/targets.py", "--missed"),
    ("convert/onnx_weights.py", "--no"),
    ("convert/reading.py", "--no"),
    ("convert/reading.py", "--force"),
    ("models/perceptual.py", "--no"),
    *(("studio/folders.py", option) for option in ("--recipe", "--seed", "--config", "--out")),  # words of `digit fit`
    *(("reproduce/experiment.py", option) for option in ("--always", "--dirty", "--abbrev", "--exclude")),
}


def texts(path: Path) -> list[str]:
    """The string literals of a file that are no docstrings."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
    return [node.value for node in constants if isinstance(node.value, str)]


MESSAGES = {
    str(path.relative_to(ROOT)): texts(path) for path in sorted(ROOT.rglob("*.py")) if path.parent.name != "cli"
}
NAMED = [
    (name, found)
    for name, words in MESSAGES.items()
    for found in sorted({option for word in words for option in OPTION.findall(word)})
    if (name, found) not in NOT_OURS
]


@cache
def options(command: str) -> set[str]:
    """The options that a command takes."""
    with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
        main([command, "--help-all"])
    return set(re.findall(r"--[a-z][\w.]*", shown.getvalue()))


def test_every_command_that_a_message_names_exists():
    named = {(name, found) for name, words in MESSAGES.items() for word in words for found in COMMAND.findall(word)}
    assert len(named) > 15 and not {(name, c) for name, c in named if c.removeprefix("digit ") not in COMMANDS}


@pytest.mark.parametrize(("name", "option"), NAMED, ids=[f"{name}{option}" for name, option in NAMED])
def test_every_option_that_a_message_names_is_one_of_its_command(name, option):
    if name in WHOLE_COMMANDS or name.startswith("convert/file_kinds"):
        commands: tuple[str, ...] = ("convert", "sample")
        assert any(option in options(command) for command in commands)
        return
    commands = MET_IN[max((start for start in MET_IN if name.startswith(start)), key=len, default=name)]
    assert not [command for command in commands if not takes(command, option)]


def takes(command: str, option: str) -> bool:
    """Whether a command takes an option; '--reuse_' is the beginning of several."""
    return option in options(command) or (option.endswith("_") and any(o.startswith(option) for o in options(command)))


def test_the_commands_that_write_take_out():
    assert set(WRITERS) == {command for command in COMMANDS if "--out" in options(command)}


@pytest.mark.parametrize("option", ["--sheet", "--out"])
def test_the_typed_option_takes_the_place_of_out(tmp_path, capsys, option):
    """A folder stands where the file should go: the advice names the option that gave the place."""
    words = {
        "--sheet": ["inspect", "shapes:num=4,size=32", "--sheet", str(tmp_path)],
        "--out": ["evaluate", "shapes:num=4,size=32", "shapes:num=4,size=32", "--out", str(tmp_path)],
    }
    assert main(words[option]) == 2
    text = capsys.readouterr().err
    assert f"cannot write {tmp_path}" in text and text.endswith(f"choose another {option}\n")


def test_the_longest_typed_path_is_the_one_that_is_written():
    text = "cannot write runs/a/samples: Is a file; choose another --out"
    assert with_typed_output(text, ["sample", "--from", "runs/a", "--out=runs/a/samples"]) == text
    assert with_typed_output(text, ["plan", "--json=runs/a/samples"]).endswith("choose another --json")
    assert with_typed_output(text, ["bench", "--json", "runs/b"]) == text


def test_the_cache_has_a_place_of_its_own(tmp_path, monkeypatch):
    from digit.errors import DigitError
    from digit.runtime.files import cache_folder, write_json

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DigitError, match="cannot write .*; set DIGIT_CACHE to another folder"):
        write_json(cache_folder() / "a.json", 1)
