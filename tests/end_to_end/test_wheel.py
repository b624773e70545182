"""The wheel, built from the tree and installed elsewhere: it is whole, and its `digit` makes pictures."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from toy_pipeline import toy_pipeline

from digit.runtime.version import __version__

ROOT = Path(__file__).parents[2]
FILES = ("pyproject.toml", "README.md", "LICENSE", "src")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git knows or would add, so that neither old builds nor ignored files come along."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *FILES],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    names = [name for name in listed.stdout.split("\0") if name]
    if listed.returncode:  # not a clone
        names = [str(p.relative_to(ROOT)) for f in FILES for p in [ROOT / f, *(ROOT / f).rglob("*")] if p.is_file()]
    for name in names:
        if (ROOT / name).is_file() and "__pycache__" not in name:
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*build, "-w", folder, folder / "tree"], cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Python of a new environment with the wheel in it; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).strip())
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    run([*install, wheel], cwd=folder)
    # a plain path in a .pth file comes after the wheel, and .pth files behind it (the editable install's) are not read
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(command: list, *, cwd: Path) -> str:
    """Standard output of a command that must succeed, outside the tree and without its PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_and_file(wheel):
    held = {name.removeprefix("digit/") for name in zipfile.ZipFile(wheel).namelist() if name.startswith("digit/")}
    package = ROOT / "src" / "digit"
    wanted = {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert held == wanted
    assert {"py.typed", "assets/vqgan64.safetensors", "assets/vqgan64_shapes.json"} <= held


def test_the_installed_package_is_the_wheels(python, tmp_path):
    where, version = run([python, "-c", "import digit; print(digit.__file__, digit.__version__)"], cwd=tmp_path).split()
    assert Path(where).is_relative_to(python.parents[1]) and version == __version__


def test_the_installed_command_samples(python, tmp_path):
    digit = python.with_name("digit")
    assert run([digit, "--version"], cwd=tmp_path).strip() == __version__
    toy_pipeline().save_pretrained(tmp_path / "pipeline")
    run([digit, "sample", "--from", "pipeline", "--num", "3", "--out", "samples", "--device", "cpu"], cwd=tmp_path)
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 3 and (tmp_path / "samples" / "grid.png").is_file()
