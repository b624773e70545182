"""The documentation: the notebook runs, commands parse, the site builds without a warning and loads nothing remote."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import pixel_recipe

from digit.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    import execute

    notebook = json.loads((ROOT / "docs" / "journey.ipynb").read_text(encoding="utf-8"))
    committed = [len(cell["outputs"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with torch.random.fork_rng(devices=[]):
        names = execute.execute(notebook)
    assert [len(cell["outputs"]) for cell in notebook["cells"] if cell["cell_type"] == "code"] == committed
    assert names["metrics"]["loss"] < 6.2  # nats a VQ token; log 1024 = 6.9 without training


def commands(page: Path) -> list[list[str]]:
    """The `digit ...` lines of a page's code blocks, continued lines joined, without comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:    )+(?:torchrun [^\n]*-m )?(digit (?:-- )?[a-z][^\n]*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_has_the_options_that_it_is_given(page):
    for argv in commands(page):
        name, *rest = [word for word in argv if word != "--"]
        assert name in COMMANDS, f"{page.name}: digit {' '.join(argv)}"
        known = option_names(name)
        unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known]
        assert not unknown, f"{page.name}: digit {' '.join(argv)} has no {unknown}"


@cache
def option_names(command: str) -> set[str]:
    """What `digit COMMAND --help` lists."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        main([command, "--help-all"])
    return set(re.findall(r"--[\w.]+", page.getvalue()))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_needs_no_other_server(site):
    loaded = (
        r"""<(?:script|img|iframe|source)[^>]*src=["']?(?:https?:)?//"""
        r"""|<link[^>]*rel=["']?(?:stylesheet|preconnect)["']?[^>]*//"""
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        assert not re.findall(loaded, page.read_text(encoding="utf-8")), page
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"url\(\s*[\"']?(?:https?:)?//", styles)


@pytest.mark.slow
def test_every_room_has_a_page_of_reference(site):
    rooms = [path.parent.name for path in (ROOT / "src" / "digit").glob("*/__init__.py")]
    for room in rooms:
        page = (site / "api" / f"{room}.html").read_text(encoding="utf-8")
        assert f"digit.{room}" in page and "doc-heading" in page, room
    assert (site / "pictures" / "journey_0.png").is_file()


SHORTER = {  # what a command of the tutorial gets besides, so that it takes seconds
    "fit": ["--config", "tiny.yaml", "--prior.depth", "1"],
    "pretrain": [
        "--depth",
        "2",
        "--embed_dim",
        "32",
        "--num_heads",
        "2",
        "--training.num_steps",
        "2",
        "--training.batch_size",
        "4",
        "--training.warmup_steps",
        "1",
    ],
    "sweep": ["--top_k", "0", "--top_p", "0.9"],
}


OF_VQ_TOKENS, OF_PIXELS = ("renderer", "renderer_training"), ("pixels", "pixels_training")


def write_recipe(path: Path, kind: str, without: tuple[str, ...]) -> None:
    """A tiny recipe with a renderer of one kind, without the settings of the other, which would be refused."""
    settings = json.loads(json.dumps(asdict(pixel_recipe(renderer_kind=kind))))
    path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if name not in without}))


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("apple", "pear"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            picture = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
            picture.save(tmp_path / "photos" / name / f"{i}.jpg")
    write_recipe(tmp_path / "tiny.yaml", "pixels", without=OF_VQ_TOKENS)
    write_recipe(tmp_path / "tiny_vq.yaml", "ar", without=OF_PIXELS)
    for argv in commands(ROOT / "docs" / "own-pictures.md"):
        more = list(SHORTER.get(argv[0], []))
        more = [word.replace("tiny", "tiny_vq") for word in more] if "--renderer_kind" in argv else more
        more += [word for option in argv if option.endswith(".num_steps") for word in (option, "4")]
        for option in ("--encoder.name", "--encoder.input_size"):  # said again after the tiny recipe
            if option in argv:
                more += [option, argv[argv.index(option) + 1]]
        assert main([*argv, *more]) == 0, argv
