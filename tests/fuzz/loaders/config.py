"""Command lines and YAML files through the real parsers, up to where the work would start."""

import contextlib
import io
import json
import os
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from digit.cli import COMMANDS, main
from digit.errors import DigitError

from ..mutate import STRANGE, damage, strange_json

WORDS = (
    "0",
    "-1",
    "1",
    "3",
    "x",
    "",
    "nan",
    "inf",
    "1e9",
    "99999999999999999999",
    "null",
    "[]",
    "[1,2]",
    "{}",
    '{"a": 1}',
    "true",
    "../x",
    "0.5",
    "--",
    "-",
    "[",
    "{",
    "!!python/object/apply:os.system [touch executed]",
    "&a [*a]",
    "a: b",
    "é",
    "\n",
    "\x00",
    "1_000",
    "0x10",
    "2020-01-01",
    "yes",
    "~",
    "@",
    "`",
    "%",
)
COMMANDS_TRIED = (
    "fit",
    "codebook",
    "tokenize",
    "train",
    "plan",
    "pretrain",
    "evaluate",
    "stability",
    "probe",
    "sweep",
    "sample",
    "complete",
    "convert",
    "inspect",
    "info",
    "bench",
    "reproduce",
)
DATA = "shapes:num=8,size=64"
PARSERS: dict[tuple[str, str], dict[str, Any]] = {}  # (command, recipe): attributes of the parser
RECIPES = ("demo", "small", "cifar", "paper_cifar", "digit_base", "digit_large", "nothing", "")


class ConfigLoader:
    """`digit COMMAND ...` with the work mocked out; the files are argv.json and config.yaml."""

    name = "config"

    def prepare(self) -> None:
        """The options of every command, and the slowest parsers."""
        for command in COMMANDS_TRIED:
            names(command)
        with tempfile.TemporaryDirectory() as folder:
            for command in (["fit"], ["codebook"], ["tokenize"], ["train", "prior"]):
                for recipe in RECIPES[:2]:
                    argv = [*command, DATA, "--recipe", recipe, "--out", folder, "--seed", "x"]
                    with work_mocked_out(), contextlib.redirect_stderr(io.StringIO()):
                        main(argv)

    def build(self, folder: Path, rng: random.Random) -> None:
        command = rng.choice(("fit", "fit", "fit", "pretrain", *COMMANDS_TRIED))
        argv = [command, *(["prior"] if command == "train" else [])]
        if command == "plan":
            argv += ["small", "--images", "100"]
        elif command in ("evaluate",):
            argv += ["a", "b"]
        elif command not in ("sample", "info", "bench", "convert", "reproduce"):
            argv += [DATA]
        if command in ("sample", "complete", "stability", "probe", "sweep"):
            argv += ["--from", "nowhere"]
        if command not in ("plan", "evaluate", "inspect", "info", "bench"):
            argv += ["--out", "out"]
        if command in ("fit", "codebook", "tokenize", "train"):
            argv += ["--recipe", rng.choice(RECIPES[:2] if rng.random() < 0.9 else RECIPES)]
        if command in ("fit", "codebook", "train", "plan", "pretrain") and rng.random() < 0.6:
            (folder / "config.yaml").write_bytes(yaml_file(command, rng))
            argv += ["--config", "config.yaml"]
        for _ in range(rng.randrange(4)):
            option = f"--{rng.choice(names(command) or ['x'])}"
            value = rng.choice(WORDS) if rng.random() < 0.7 else str(rng.choice(STRANGE))[:200]
            argv += rng.choice(([option, value], [f"{option}={value}"], [option], [option + "x", value]))
        if rng.random() < 0.05:
            argv.insert(rng.randrange(len(argv)), rng.choice(WORDS))
        (folder / "argv.json").write_text(json.dumps(argv))

    def load(self, folder: Path) -> None:
        argv = json.loads((folder / "argv.json").read_text())
        said, before = io.StringIO(), os.getcwd()
        os.chdir(folder)
        try:
            with work_mocked_out(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = main(argv)
        except SystemExit as ended:
            code = 0 if ended.code in (0, None) else 1
        finally:
            os.chdir(before)
        assert not (folder / "executed").exists(), "code of a YAML file ran"
        assert code in (0, 2), f"exit code {code}"
        if code == 2:
            text = said.getvalue()
            assert "Traceback" not in text, "a traceback"
            lines = text[text.rfind("\ndigit: ") + 1 :]  # after notes and warnings
            assert lines.startswith("digit: ") and lines.endswith("\n"), "no message"
            raise DigitError(lines[7:-1])


@contextlib.contextmanager
def work_mocked_out() -> Iterator[None]:
    """Ends commands where they would start to compute."""
    from digit.cli.arguments import value_of
    from digit.cli.runs import Base, add_run_arguments
    from digit.runs.recipes import get_recipe

    def remembered(parser: Any, argv: list[str], **how: Any) -> Base:
        """Calls add_run_arguments, which takes most of the time, once for each command and recipe."""
        name = value_of(argv, "--recipe") or "small"
        recipe = get_recipe(name)
        if (parser.prog, name) in PARSERS:
            vars(parser).update(PARSERS[parser.prog, name])
        else:
            add_run_arguments(parser, [*argv, "--recipe", name], **how)
            PARSERS[parser.prog, name] = dict(vars(parser))
        return Base(recipe)

    from digit.runs.recipes import TokenSpace

    def used(run: Any) -> None:
        tokens = {"discriminative": TokenSpace(8, 4), "vq": TokenSpace(8, 4)}
        run.recipe.sequence_config("prior", tokens, num_classes=2)

    nothing = mock.MagicMock(name="nothing")
    with contextlib.ExitStack() as stack:
        for place, value in (
            ("jsonargparse.set_parsing_settings", nothing),  # help texts, which are not looked at
            ("digit.cli.runs.add_run_arguments", remembered),
            ("digit.runs.fit.fit", used),
            ("digit.runs.fit.Run.fit_codebook", nothing),
            ("digit.runs.fit.Run.write_tokens", nothing),
            ("digit.runs.fit.Run.train_vqgan", nothing),
            ("digit.runs.fit.Run.train_model", lambda run, name: used(run)),
            ("digit.runs.report.write_report", nothing),
            ("digit.runs.pretrain.pretrain", nothing),
            ("digit.benchmark.bench.run_bench", nothing),
            ("digit.planning.report.to_text", lambda planner: "planned"),
            ("digit.planning.report.as_json", lambda planner: {}),
            ("digit.reproduce.reproduce", nothing),
            ("digit.released.convert.convert_release", lambda files, out: []),
        ):
            stack.enter_context(mock.patch(place, value))
        yield


@cache
def settings(command: str) -> dict[str, Any]:
    """Every setting of a command's YAML file, at its default."""
    from digit.runs.pretrain import PretrainConfig
    from digit.runs.recipes import get_recipe

    return json.loads(json.dumps(asdict(PretrainConfig() if command == "pretrain" else get_recipe("demo"))))


@cache
def names(command: str) -> list[str]:
    """Dotted options of a command, as its help lists them."""
    said = io.StringIO()
    words = {"plan": ["small"], "train": ["prior"]}.get(command, [])
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit, DigitError):
        main([command, *words, "--help"])
    return sorted(set(re.findall(r"--([\w.]+)", said.getvalue())) - {"help"}) if command in COMMANDS else []


def yaml_file(command: str, rng: random.Random) -> bytes:
    """Settings with strange values, sometimes damaged text or YAML's own pitfalls."""
    whole = settings("pretrain" if command == "pretrain" else "fit")
    kept = {key: whole[key] for key in rng.sample(sorted(whole), rng.randrange(1, 6))}
    action = rng.random()
    if action < 0.1:
        return damage(yaml.safe_dump(kept).encode(), rng)
    if action < 0.2:
        return rng.choice(
            (
                laughs(),
                b"&a [*a]",
                b"prior: &a\n  depth: *a\n",
                b"!!python/object/apply:os.system ['touch executed']",
                b"- 1\n- 2\n",
                b"5",
                b"",
                b"\xff\xfe\x00",
                b"a: 1\na: 2\n",
                b"config: config.yaml\n",
                b"[" * 3000,
                b"prior: {depth: 1, depth: 2}\n",
                b"seed: 0o17\n",
                b"seed: 1:30\n",
                b"<<: {seed: 1}\n",
                b"null",
                b"? [a, b]\n: 1\n",
                b"1: 2\n",
                b"data: other\n",
                b"out: /x\n",
                b"---\nseed: 1\n---\nseed: 2\n",
            )
        )
    return yaml.safe_dump(strange_json(kept, rng), allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def laughs() -> bytes:
    """Nine levels of ten references each, which expand to 10^9 words."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    return "\n".join(lines).encode()
