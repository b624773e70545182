"""Requests that are stopped, killed, or run out of disk go on where they were, on any number of ranks."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_samples import SIZE, contents, draw

from digit.errors import DigitError, Stopped
from digit.pipeline import sample_folder
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.sample_folder import sample
from digit.runtime import plots
from digit.runtime.files import disk_errors

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("at", [0, 5, 11, 12])
def test_a_stopped_request_goes_on(pipe, whole, tmp_path, monkeypatch, at):
    """The writer of image `at` is interrupted."""
    save, sampled, sample_all = plots.save_png, [], DigitPipeline.sample_request

    def stopped(path, image):
        if Path(path).name == f"{at:05d}.png":
            raise KeyboardInterrupt
        save(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(plots, "save_png", stopped)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, tmp_path / "s")
    assert not (tmp_path / "s" / "samples.json").exists()
    monkeypatch.setattr(
        DigitPipeline,
        "sample_request",
        lambda self, *how, **more: sampled.append(how[2:]) or sample_all(self, *how, **more),
    )
    done = json.loads((tmp_path / "s" / "journal.json").read_text())["done"] if at else []
    draw(pipe, tmp_path / "s")
    first = at // SIZE * SIZE
    assert not any(begin <= at < end for begin, end in done) and [first] <= [end for _, end in done] + [first]
    assert sampled[0][0] == first and contents(tmp_path / "s") == whole


@pytest.mark.parametrize("place", ["save_png", "savez_compressed", "write_result"])
def test_a_request_stopped_at_the_end_goes_on(pipe, whole, tmp_path, monkeypatch, place):
    """While grid.png, tokens.npz or samples.json is written."""
    owner = {"save_png": plots, "savez_compressed": np, "write_result": sample_folder}[place]
    real, names = getattr(owner, place), ("grid.png", "samples.json")

    def stopped(target, *args, **how):
        if place == "savez_compressed" or Path(target).name in names:
            raise KeyboardInterrupt
        return real(target, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, stopped)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, tmp_path / "s")
    monkeypatch.setattr(DigitPipeline, "stream", None)  # nothing is sampled again
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def test_a_killed_process_goes_on(pipe, tmp_path):
    """SIGKILL at some moment, three times over: the files are those of one go."""
    script = (
        "import sys, time; from pathlib import Path\n"
        "import torch; torch.set_num_threads(1)\n"
        "from digit.pipeline import sample_folder; from digit.runtime import plots, progress\n"
        "from toy_pipeline import toy_pipeline\n"
        "progress.quiet(); save = plots.save_png\n"
        "plots.save_png = lambda path, image: (time.sleep(0.05), save(path, image))\n"
        "sample_folder.sample(toy_pipeline(), sys.argv[1], 40, seed=3, batch_size=4)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests/helpers")])}
    folder = tmp_path / "killed"
    for least in (5, 17):
        process = subprocess.Popen([sys.executable, "-c", script, str(folder)], env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("0*.png"))) < least:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and (folder / "journal.json").exists()
    (folder / ".00007.png.abcd1234.png").write_bytes(b"half")  # as a kill may leave it
    (folder / "notes.txt").write_text("mine")
    sample(pipe, folder, 40, seed=3, batch_size=4)
    sample(pipe, tmp_path / "whole", 40, seed=3, batch_size=4)
    assert contents(folder) == contents(tmp_path / "whole") | {"notes.txt": b"mine"}


def test_a_full_disk_says_so_and_goes_on(pipe, whole, tmp_path, monkeypatch):
    save = plots.save_png

    def full(path, image):
        if Path(path).name >= "00006.png":
            with disk_errors(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        save(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(plots, "save_png", full)
        with pytest.raises(DigitError, match=r"disk full while writing .*0000\d.png: free some space and run again"):
            draw(pipe, tmp_path / "s")
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def test_a_disk_too_full_for_the_tokens_leaves_nothing(pipe, tmp_path, monkeypatch):
    def full(self):
        self.path.write_bytes(b"some")
        raise DigitError("disk full")

    monkeypatch.setattr(sample_folder.ArrayFile, "allocate", full)
    with pytest.raises(DigitError, match="disk full"):
        draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == {}


def test_deleted_images_are_sampled_again(pipe, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_folder.SampleFolder, "finish", lambda self: None)
    draw(pipe, tmp_path / "s")
    (tmp_path / "s" / "00006.png").unlink()
    monkeypatch.undo()
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole
    (tmp_path / "s" / "00003.png").unlink()  # from a folder that was whole
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 8, 12])
def test_a_signal_lets_the_batch_at_hand_be_written(pipe, whole, tmp_path, monkeypatch, number, at):
    """The signal comes while batch `at` is sampled; after the last batch there is nothing left to stop."""
    stream, handler = DigitPipeline.stream, signal.getsignal(number)

    def signalled(*args, **how):
        for batch in stream(*args, **how):
            if batch.first == at:
                os.kill(os.getpid(), number)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(DigitPipeline, "stream", signalled)
        if at == 12:
            draw(pipe, tmp_path / "s")
        else:
            with pytest.raises(Stopped, match=f"^{at + SIZE} of 13 images are sampled$"):
                draw(pipe, tmp_path / "s")
            assert json.loads((tmp_path / "s" / "journal.json").read_text())["done"] == [[0, at + SIZE]]
    assert signal.getsignal(number) == handler
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def leave_unfinished(pipe: DigitPipeline, folder: Path, monkeypatch, **changes) -> dict:
    """A request that lacks only its end; returns its journal."""
    with monkeypatch.context() as patch:
        patch.setattr(sample_folder.SampleFolder, "finish", lambda self: None)
        draw(pipe, folder, **changes)
    return json.loads((folder / "journal.json").read_text())


def test_what_four_ranks_left_is_gone_on_with_by_one(pipe, whole, tmp_path, monkeypatch):
    """Of four batches those of ranks 1 and 3 are done; a journal of another request counts for nothing."""
    folder, sampled, sample_all = tmp_path / "s", [], DigitPipeline.sample_request
    journal = leave_unfinished(pipe, folder, monkeypatch)
    other = journal | {"request": journal["request"] | {"seed": 4}, "done": [[0, 13]]}
    for rank, entry in enumerate([{"done": []}, {"done": [[4, 8]]}, other, {"done": [[12, 13]]}]):
        name = f"journal.{rank}.json" if rank else "journal.json"
        (folder / name).write_text(json.dumps(journal | entry))
    for i in (0, 2, 9):
        (folder / f"{i:05d}.png").unlink()
    monkeypatch.setattr(
        DigitPipeline,
        "sample_request",
        lambda self, *how, **more: sampled.append(how[2:]) or sample_all(self, *how, **more),
    )
    draw(pipe, folder)
    assert sampled == [(0, 4), (8, 12)] and contents(folder) == whole


def test_ranks_share_what_is_missing_in_order(pipe, tmp_path, monkeypatch):
    leave_unfinished(pipe, tmp_path, monkeypatch, num=40)
    for i in (5, 20, 24, 39):
        (tmp_path / f"{i:05d}.png").unlink()
    request = json.loads((tmp_path / "journal.json").read_text())["request"]
    folder = sample_folder.SampleFolder(tmp_path, request, {}, torch.zeros(40, dtype=torch.int64), [])
    folder.begin()
    shares = []
    for rank in range(3):
        monkeypatch.setattr("digit.runtime.distributed.world_size", lambda: 3)
        monkeypatch.setattr("digit.runtime.distributed.rank", lambda rank=rank: rank)
        shares.append(folder.share())
    assert shares == [[(4, 8)], [(20, 24)], [(24, 28), (36, 40)]]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "no json",
        '{"request": 3}',
        '{"request": {"num": 13}, "done": 12}',
        '{"request": {"num": "x"}, "done": []}',
        '{"request": {"num": 13}, "done": [[0, 99]], "dropped": [], "notes": {}}',
    ],
)
def test_a_damaged_journal_is_named(pipe, tmp_path, text):
    (tmp_path / "journal.json").write_text(text)
    with pytest.raises(DigitError, match=r"journal.json .*: (choose another --out|delete it)"):
        draw(pipe, tmp_path)


# -------------------------------------------------------------------- more images than before


def modified(folder):
    """Name -> time of the last change, of every image."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.png")}


@pytest.mark.parametrize("first", [1, 3, 4, 5, 8, 12])
def test_more_images_are_added_to_a_folder(pipe, whole, tmp_path, first):
    """The folder equals one that was sampled at once, and no image that was there is written again."""
    draw(pipe, tmp_path / "s", num=first)
    before = modified(tmp_path / "s")
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole
    assert modified(tmp_path / "s") | before == modified(tmp_path / "s")


@pytest.mark.parametrize("labels", [[2, 0], 1, [1]])
def test_labels_go_on_in_turn(pipe, tmp_path, labels):
    draw(pipe, tmp_path / "at_once", labels=labels)
    for num in (2, 7, 13):
        draw(pipe, tmp_path / "s", num=num, labels=labels)
    assert contents(tmp_path / "s") == contents(tmp_path / "at_once")


@pytest.mark.parametrize("batch_size", [4, 64])
@pytest.mark.parametrize("at", [4, 6, 11, 12])
def test_adding_images_may_be_interrupted_and_asked_for_more(pipe, tmp_path, monkeypatch, at, batch_size):
    """6 images, then 13 that are interrupted at image `at`, then 15."""
    draw(pipe, tmp_path / "at_once", num=15, batch_size=batch_size)
    save = plots.save_png

    def stopped(path, image):
        if Path(path).name == f"{at:05d}.png":
            raise KeyboardInterrupt
        save(path, image)

    draw(pipe, tmp_path / "s", num=6, batch_size=batch_size)
    with monkeypatch.context() as patch:
        patch.setattr(plots, "save_png", stopped)
        if at >= 6:
            with pytest.raises(KeyboardInterrupt):
                draw(pipe, tmp_path / "s", batch_size=batch_size)
            assert not (tmp_path / "s" / "samples.json").exists(), "it would say that all is done"
    draw(pipe, tmp_path / "s", num=15, batch_size=batch_size)
    assert contents(tmp_path / "s") == contents(tmp_path / "at_once")


@pytest.mark.parametrize("place", ["allocate", "save", "unlink"])
def test_a_kill_while_the_folder_is_lengthened_loses_nothing(pipe, whole, tmp_path, monkeypatch, place):
    owner = {"allocate": sample_folder.ArrayFile, "save": sample_folder.Ledger, "unlink": Path}[place]
    draw(pipe, tmp_path / "s", num=6)
    before = modified(tmp_path / "s")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, killed)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, tmp_path / "s")
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole and modified(tmp_path / "s") | before == modified(tmp_path / "s")


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_tokens_that_cannot_be_read_are_named_and_nothing_is_lost(pipe, tmp_path, damage):
    draw(pipe, tmp_path, num=6)
    tokens = tmp_path / "tokens.npz"
    tokens.unlink() if damage is None else tokens.write_bytes(damage)
    before = contents(tmp_path)
    with pytest.raises(DigitError, match=r"tokens\.npz cannot be read .* more images cannot be added: choose another"):
        draw(pipe, tmp_path)
    assert contents(tmp_path) == before


def test_a_picture_that_was_deleted_is_sampled_again_while_others_are_added(pipe, whole, tmp_path):
    draw(pipe, tmp_path / "s", num=6)
    (tmp_path / "s" / "00002.png").unlink()
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole
