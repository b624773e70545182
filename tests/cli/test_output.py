"""The program on any terminal: every encoding, width and closed stream; no traceback, and no work lost."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from digit.cli import main

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SOURCE = str(Path(__file__).parents[2] / "src")
DIGIT = f"{sys.executable} -m digit"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images of two classes; one name is Cyrillic, one would turn the terminal red."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for name in ("кот", "a\x1b[31mred"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(folder / name / "0.png")
    return folder


def run(command: str, folder: Path, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command of bash; `digit` is this package's."""
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "PYTHONIOENCODING")}
    script = f'digit() {{ {DIGIT} "$@"; }}; set -o pipefail; {command}'
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=known | {"PYTHONPATH": SOURCE} | environment, capture_output=True
    )
    told, errors = done.stdout.decode("latin-1"), done.stderr.decode("latin-1")
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    return done.returncode, told, errors


@pytest.mark.parametrize(
    "encoding",
    [ASCII, *({"PYTHONIOENCODING": name} for name in ("latin-1", "ascii", "cp437", "cp1252:strict", "ascii:ignore"))],
)
def test_inspect_in_any_encoding(photos, tmp_path, encoding):
    code, told, errors = run(f"digit inspect {photos} --sheet sheet.png", tmp_path, **encoding)
    assert (code, errors) == (0, "") and "contact sheet: sheet.png" in told and (tmp_path / "sheet.png").is_file()
    assert "a\\x1b[31mred" in told and "\x1b" not in told and ("\\u043a" in told or "\\udcd0" in told)


@pytest.mark.parametrize(
    "redirected, code",
    [(">&-", 0), (">&- 2>&-", 0), ("2>&-", 0), ("2>/dev/full", 0), ("| head -1", 0), ("| true", 0), (">/dev/full", 2)],
)
def test_no_work_is_lost_with_its_output(photos, tmp_path, redirected, code):
    got, _, errors = run(f"digit inspect {photos} --sheet sheet.png {redirected}", tmp_path)
    assert (got, (tmp_path / "sheet.png").is_file()) == (code, True)
    assert errors == ("" if code == 0 else LOST)


LOST = (
    "digit: the command is done, but what it printed was lost (No space left on device): run it again with another "
    "> FILE\n"
)


@pytest.mark.parametrize("page", ["", "--version", "info", "sample --help-all", "fit x --out y --print_config"])
def test_pages_on_a_stream_that_fails(tmp_path, page):
    assert run(f"digit {page} >/dev/full", tmp_path)[::2] == (2, LOST)


def test_a_page_that_nobody_reads_is_no_mistake(tmp_path):
    assert run("digit fit --help-all >&- && digit fit --help-all | true", tmp_path) == (0, "", "")


def test_a_mistake_that_cannot_be_said_is_a_mistake(tmp_path):
    assert run("digit fitt >&- 2>&-", tmp_path) == (2, "", "")
    assert run("digit inspect кот", tmp_path, PYTHONIOENCODING="ascii")[0] == 2


@pytest.mark.parametrize("columns", ["1", "0", "-5", "abc", "20", "40", "200"])
def test_help_at_any_width(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help-all"])
    page = capsys.readouterr().out
    assert end.value.code == 0 and "--prior.depth" in page
    if columns == "40":
        assert re.search(r"^ {30}", page, re.M) is None  # no narrow column at the right


def test_evaluate_on_a_terminal_of_ascii(photos, tmp_path):
    code, told, _ = run(f"DIGIT_CACHE=cache digit evaluate {photos} {photos} 2>/dev/null", tmp_path, **ASCII)
    assert code == 0 and "| - (" in told and told.isascii()
