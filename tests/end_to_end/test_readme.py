"""Every `digit` command and the Python lines of README.md run, on small pictures with the tiny recipe."""

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import tiny_recipe

from digit.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, few_scenes) -> Path:
    """A working folder with photos/, tiny.yaml, and runs/demo made with the tiny recipe."""
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for name in ("apple", "pear"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(
                folder / "photos" / name / f"{i}.jpg"
            )
    (folder / "photo.jpg").write_bytes((folder / "photos" / "pear" / "0.jpg").read_bytes())
    (folder / "tiny.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(tiny_recipe())))))
    tiny = ["--config", str(folder / "tiny.yaml")]
    assert main(["fit", "shapes:num=24,size=32", *tiny, "--out", str(folder / "runs/demo")]) == 0
    return folder


@pytest.fixture
def released(folder, golden) -> None:
    """Tiny checkpoints in the released formats, under the names that the README gives them."""
    for name in ("stage1", "stage2"):
        (folder / f"{name}.pt").symlink_to(golden / f"{name.replace('2', '2_ar')}.pt")


def test_the_commands(folder, released, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("digit.released.hub.released_pipeline", lambda repository, variant: folder / "runs/demo")
    lines = [line.split("#")[0].strip() for line in README.splitlines() if re.match(r"    digit \w", line)]
    assert {line.split()[1] for line in lines} >= {"inspect", "fit", "sample", "complete"}
    for line in lines:
        argv = shlex.split(line)[1:]
        extra = {"fit": ["--config", "tiny.yaml"], "convert": ["--encoder_heads", "3"]}
        extra["reproduce"] = ["--data", "shapes:num=400,size=64"]  # photos/ has too few patches for its codebook
        assert main([*argv, *extra.get(argv[0], [])]) == 0, line


def test_the_python_lines(folder, monkeypatch):
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    names: dict = {}
    exec(code, names)
    assert names["images"].shape == (16, 3, 32, 32) and names["tokens"].shape[0] == 16
    assert names["completed"].shape == names["images"].shape


def test_pictures_that_the_documents_show_exist():
    for page in ("README.md", *(f"docs/{p.name}" for p in (Path(__file__).parents[2] / "docs").glob("*.md"))):
        path = Path(__file__).parents[2] / page
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / name).is_file(), f"{page} shows {name}"
