"""Tokens, codebook and run folder on two ranks: what one rank makes; stopped, killed and continued on any number."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_ranks import SHARD_BYTES, STREAMED, HookedEncoder, SumTokenizer, make_codebook, make_run, make_tokens

from digit.runtime.files import load_tensors, read_json, write_json
from digit.runtime.ledger import of_rank

TESTS = Path(__file__).parents[1]
TOY = TESTS / "helpers/toy_ranks.py"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
STORE = ["discriminative.npy", "labels.npy", "manifest.json", "vq.npy"]
CODEBOOK = ["codebook.json", "codebook.safetensors"]


class Kill(Exception):
    """The end of a process that nothing was prepared for."""


def kill() -> None:
    raise Kill


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{TESTS.parent / 'src'}{os.pathsep}{TESTS / 'helpers'}", "OMP_NUM_THREADS": "1"}


def leave_as_four_ranks(folder: Path) -> None:
    """A store that four ranks had begun when they were killed, each somewhere in its share of the 75 rows."""
    with pytest.raises(Kill):
        make_tokens(folder, SumTokenizer(when=19, hook=kill))  # all rows but the last batch's
    state = read_json(folder / "journal.json")
    done = [[[0, 8]], [[16, 28]], [[36, 40]], [[56, 72]]]  # shares of 19 batches of 4 begin at 0, 16, 36, 56
    for rank, spans in enumerate(done):
        first, last = spans[0]
        dropped = [span for span in state["dropped"] if first <= span[0] < last]
        notes = {name: note for name, note in state["notes"].items() if first <= note[0] < last}
        write_json(of_rank(folder / "journal.json", rank), state | {"done": spans, "dropped": dropped, "notes": notes})
    for path in folder.glob("*.partial.npy"):  # rows that nobody calls done hold anything
        with open(path, "r+b") as file:
            for row in (9, 15, 28, 35, 41, 55):
                size = (path.stat().st_size - 128) // 75
                file.seek(128 + row * size)
                file.write(b"\7" * size)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Everything as one rank makes it without a break."""
    folder = tmp_path_factory.mktemp("one")
    make_tokens(folder / "tokens")
    make_tokens(folder / "shards", shard_bytes=SHARD_BYTES)
    make_codebook(folder / "codebook")
    make_codebook(folder / "one_batch", batch_size=64)
    make_codebook(folder / "streamed", cfg=STREAMED)
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What toy_ranks.py makes on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    leave_as_four_ranks(folder / "left_by_four")
    ended = subprocess.run([*LAUNCH, str(TOY), str(folder)], env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


def assert_close(folder: Path, alone: Path) -> None:
    """The same codebook, as far as sums in another order are the same."""
    first, second = (load_tensors(path / "codebook.safetensors")["centroids"] for path in (folder, alone))
    torch.testing.assert_close(first, second)
    about, wanted = (read_json(path / "codebook.json") for path in (folder, alone))
    assert about["inertia"] == pytest.approx(wanted["inertia"], rel=1e-6)
    for name in ("counts", "num_points", "num_images", "bad", "streamed", "dead_codes"):
        assert about[name] == wanted[name], name


def test_every_rank_says_the_same(two):
    first, second = (json.loads((two / f"said{rank}.json").read_text()) for rank in range(2))
    assert first == second
    stopped = {name: text for name, text in first.items() if text.startswith("Stopped")}
    assert stopped["tokens, stop"] == "Stopped: tokens: 44 of 75 rows are done"
    assert stopped["streamed, stop"] == "Stopped: k-means: 1 of at most 6 iterations are done"
    assert len(stopped) == 4
    bad = {name: text for name, text in first.items() if text.startswith("DigitError")}
    assert bad.keys() == {"bad", "codebook, bad"}
    for text in bad.values():  # one on each rank: neither alone is too many
        assert "2 of 25 images unreadable, more than max_bad_fraction 0.05" in text and "noise/7.png" in text
    assert all(text == "done" for name, text in first.items() if name not in stopped | bad)


@pytest.mark.parametrize("name", ["tokens", "left_by_four", "stopped"])
def test_tokens_of_two_ranks_are_those_of_one(one, two, name):
    assert sorted(contents(one / "tokens")) == STORE
    assert contents(two / name) == contents(one / "tokens")


def test_shards_of_two_ranks_are_those_of_one(one, two):
    assert len(contents(one / "shards")) == 2 * 4 + 2
    assert contents(two / "shards") == contents(one / "shards")


def test_tokens_of_two_ranks_go_on_on_one(one, two):
    assert len(list((two / "moved").glob("journal*.json"))) == 2
    rest = SumTokenizer()
    make_tokens(two / "moved", rest)
    assert contents(two / "moved") == contents(one / "tokens") and 0 < rest.calls < 19


def test_tokens_of_four_ranks_go_on_on_one(one, tmp_path):
    leave_as_four_ranks(tmp_path / "t")
    rest = SumTokenizer()
    make_tokens(tmp_path / "t", rest)
    assert contents(tmp_path / "t") == contents(one / "tokens")
    assert rest.calls == 9  # batches: 19, less 2, 3, 1 and 4


@pytest.mark.parametrize("name", ["codebook", "one_batch", "streamed"])
def test_codebook_of_two_ranks_is_that_of_one(one, two, name):
    assert sorted(contents(two / name)) == CODEBOOK
    assert_close(two / name, one / name)
    assert read_json(two / name / "codebook.json")["streamed"] == (name == "streamed")


def test_stopped_codebook_of_two_ranks_goes_on_to_the_same_bytes(two):
    assert contents(two / "again") == contents(two / "streamed")


def test_stopped_codebook_of_two_ranks_goes_on_on_one(one, two):
    encoder = HookedEncoder()
    make_codebook(two / "moved_codebook", encoder, cfg=STREAMED)
    assert encoder.calls < 7 * 8  # 7 batches in the first pass, 6 iterations and the last pass
    assert_close(two / "moved_codebook", one / "streamed")


def test_run_of_two_ranks_is_that_of_one(one, two):
    for part in ("codebook", "tokens"):
        assert contents(two / "run" / part) == contents(one / "run" / part)
    assert read_json(two / "run" / "config.json") == read_json(one / "run" / "config.json")


def test_killed_codebook_goes_on_to_the_same_bytes(one, tmp_path):
    """SIGKILL in the fourth iteration: three are on the disk, and are not made again."""
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom toy_ranks import *\n"
        "encoder = HookedEncoder(31, lambda: os.kill(os.getpid(), 9))\n"
        "make_codebook(Path(sys.argv[1]), encoder, cfg=STREAMED)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "killed")], env=environment())
    assert ended.returncode == -signal.SIGKILL
    assert sorted(contents(tmp_path / "killed")) == ["kmeans.partial.safetensors"]
    encoder = HookedEncoder()
    make_codebook(tmp_path / "killed", encoder, cfg=STREAMED)
    assert encoder.calls == 7 * (1 + 3 + 1)
    assert contents(tmp_path / "killed") == contents(one / "streamed")
