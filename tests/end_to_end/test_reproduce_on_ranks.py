"""Two ranks reproduce what one does: from nothing, and measuring models that are there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reproduced

TESTS = Path(__file__).parents[1]
MEASURED = "table1,fig4b,fig5"
PATIENCE = 400  # seconds


def on_two_ranks(out: Path, targets: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS / "helpers")])}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line += [str(TESTS / "helpers/reproduced.py"), str(out), targets]
    done = subprocess.run(
        line, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one rank has made."""
    out = tmp_path_factory.mktemp("reproduced") / "one"
    reproduced.reproduce_micro(out, MEASURED)
    return out


def metrics(out: Path, target: str) -> dict:
    """Numbers of a target by their place in results.json."""
    return dict(flat(json.loads((out / target / "results.json").read_text())["metrics"]))


def flat(value, place: str = ""):
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(inner, f"{place}/{key}")
    elif isinstance(value, int | float):
        yield place, value


def judged(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / "judged").rglob("*.safetensors")}


def test_two_ranks_measure_the_same_of_the_same_models(one, tmp_path):
    two = tmp_path / "two"
    shutil.copytree(one, two)
    for made in ("steps", "judged", "test_images", "stability", "completion", "sweep", *MEASURED.split(",")):
        shutil.rmtree(two / made)
    on_two_ranks(two, MEASURED)
    assert judged(two) == judged(one) and len(judged(one)) > 5
    for target in MEASURED.split(","):
        assert metrics(two, target) == pytest.approx(metrics(one, target), rel=1e-9)
        steps = json.loads((two / target / "results.json").read_text())["steps"].values()
        assert all(step["ranks"] == 2 for step in steps)


def test_two_ranks_begin_with_nothing(one, tmp_path):
    on_two_ranks(tmp_path / "new", "table2,fig6")
    ours, theirs = (
        json.loads((out / "steps/plain_prior_0.json").read_text())["result"] for out in (one, tmp_path / "new")
    )
    assert theirs["nll"] == pytest.approx(ours["nll"], rel=1e-3) and theirs["images"] == ours["images"]
    assert (tmp_path / "new" / "fig6" / "table.md").is_file()
