"""Two ranks give what one gives: folders of samples, figures, probes; stopped or killed, any number of them goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranked_work
from toy_pipeline import toy_pipeline

from digit.errors import DigitError
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.sample_folder import sample

TESTS = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
PATIENCE = 90  # seconds


def start(launcher: list[str], *arguments: object, **variables: str) -> subprocess.Popen:
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables
    line = [*launcher, str(TESTS / "helpers/ranked_work.py"), *map(str, arguments)]
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)


def start_ranks(count: int, *arguments: object) -> list[subprocess.Popen]:
    """As torchrun does, but nothing looks after them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [start([sys.executable], *arguments, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(count)]


def wait_for(number: int, folder: Path, process: subprocess.Popen) -> None:
    """Until so many images of a drawing are entered as done."""
    deadline = time.monotonic() + PATIENCE
    while entered(folder) < number:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)


def entered(folder: Path) -> int:
    """How many images the journals name."""
    done = set()
    for path in folder.glob("journal*.json"):
        try:
            spans = json.loads(path.read_text())["done"]
        except FileNotFoundError:  # just replaced, or joined with another
            continue
        done |= {number for first, end in spans for number in range(first, end)}
    return len(done)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> tuple[Path, Path]:
    """The folders that one rank and two ranks made of the same inputs."""
    folder = tmp_path_factory.mktemp("ranks")
    inputs = ranked_work.make_inputs(folder / "inputs")
    process = start(TORCHRUN, "work", inputs, folder / "two")
    with pytest.MonkeyPatch.context() as patch:
        ranked_work.make_small(patch.setattr)
        ranked_work.work(inputs, folder / "one")
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    return folder / "one", folder / "two"


def about(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"rank.{rank}.json").read_text())


# -------------------------------------------------------------------- two ranks are one


@pytest.mark.parametrize("name", ["samples", "few", "auto"])
def test_a_folder_of_samples_is_the_same_byte_for_byte(outputs, name):
    one, two = outputs
    assert contents(one / name) == contents(two / name)


def test_ranks_share_the_work(outputs):
    one, two = outputs
    whole, parts = about(one, 0), [about(two, rank) for rank in range(2)]
    assert [part["drawn"] for part in parts] == [16, 13], "8 + 0 + 8 and 5 + 3 + 5"
    for name in ("drawn", "seen", "batches"):
        assert sum(part[name] for part in parts) == whole[name] and min(part[name] for part in parts) > whole[name] / 3


def test_figures_and_statistics_are_the_same(outputs):
    one, two = outputs
    assert (one / "result.json").read_bytes() == (two / "result.json").read_bytes()
    assert "copying_toy" in json.loads((one / "result.json").read_text())["metrics"]  # of the held-out images
    page = (one / "report" / "report.html").read_text().replace(str(one), "OUT")
    assert page == (two / "report" / "report.html").read_text().replace(str(two), "OUT")
    whole = (one / "found.0.json").read_text().replace(str(one), "OUT")
    for rank in range(2):
        assert (two / f"found.{rank}.json").read_text().replace(str(two), "OUT") == whole
    warnings = json.loads((two / "result.json").read_text())["warnings"]
    assert any("1 of 23 samples repeat" in line for line in warnings), "rank 0 and rank 1 have one of them each"
    assert any("1 of 23 samples are reference images" in line for line in warnings)
    with np.load(one / "reference.npz") as first, np.load(two / "reference.npz") as second:
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_broken_image_is_named_by_every_rank(outputs):
    one, two = outputs
    whole = about(one, 0)["problems"]
    assert "13.png" in whole[0] and "13.png" in whole[1]
    assert about(two, 0)["problems"] == about(two, 1)["problems"] == whole


def test_probes_are_the_same(outputs):
    one, two = outputs
    whole = (one / "probe" / "probe.json").read_bytes()
    assert (two / "probe" / "probe.json").read_bytes() == whole and b'"num_train": 80' in whole
    assert all(json.loads((two / f"probe.{rank}.json").read_text()) == json.loads(whole) for rank in range(2))
    streamed = (one / "streamed_probe" / "probe.json").read_bytes()
    assert (two / "streamed_probe" / "probe.json").read_bytes() == streamed and b"float16, in files" in streamed


# -------------------------------------------------------------------- interruptions


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The slow drawing, in one go and on one rank."""
    folder = tmp_path_factory.mktemp("whole") / "s"
    sample(toy_pipeline(), folder, ranked_work.MANY, seed=3, batch_size=4)
    return contents(folder)


def test_a_stopped_drawing_goes_on_and_a_killed_one_too_on_any_number_of_ranks(whole, tmp_path):
    """torchrun is told to stop, its two ranks save and say so; two more are killed; one ends it."""
    folder = tmp_path / "s"
    process = start(TORCHRUN, "draw", folder)
    wait_for(8, folder, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    texts = [folder.with_suffix(f".stopped{rank}").read_text() for rank in range(2)]
    stopped = entered(folder)
    assert (
        texts[0] == texts[1] == f"{stopped} of {ranked_work.MANY} images are sampled"
        and 8 <= stopped < ranked_work.MANY
    )
    assert not (folder / "samples.json").exists()

    both = start_ranks(2, "draw", folder)
    wait_for(stopped + 8, folder, both[0])
    for process in both:
        process.kill()
    for process in both:
        process.communicate()
    assert stopped + 8 <= entered(folder) < ranked_work.MANY and not (folder / "samples.json").exists()

    drawn, stream = [], DigitPipeline.stream
    pipe, done = toy_pipeline(), entered(folder)
    pipe.stream = lambda *args, **how: (drawn.append(len(b)) or b for b in stream(pipe, *args, **how))
    sample(pipe, folder, ranked_work.MANY, seed=3, batch_size=4)
    assert sum(drawn) == ranked_work.MANY - done, "what the killed ranks had done is not drawn again"
    assert contents(folder) == whole


def test_two_cannot_draw_into_one_folder_and_an_interrupt_is_no_error(whole, tmp_path):
    process = start([sys.executable], "draw", tmp_path / "s")
    wait_for(4, tmp_path / "s", process)
    with pytest.raises(DigitError, match=f"is in use by process {process.pid} "):
        sample(toy_pipeline(), tmp_path / "s", ranked_work.MANY, seed=4, batch_size=4)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=PATIENCE)[1] and process.returncode == 0
    assert (
        tmp_path / "s.stopped0"
    ).read_text() == f"{entered(tmp_path / 's')} of {ranked_work.MANY} images are sampled"
    sample(toy_pipeline(), tmp_path / "s", ranked_work.MANY, seed=3, batch_size=4)
    assert contents(tmp_path / "s") == whole
