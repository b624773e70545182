"""Folders of drawn images: what a kill, a full disk and another request leave; and the stream that fills them."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from digit import pictures, samples
from digit.drawn import Drawn
from digit.errors import DigitError, MismatchError
from digit.manifest import read_sampling, write_manifest
from digit.pipeline import DigitPipeline, SamplingConfig
from digit.samples import sample
from digit.tokenizers.vq import VQTokenizer
from toy_pipeline import toy_pipeline

NUM, SIZE = 13, 4  # three batches and one image
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pipe() -> DigitPipeline:
    return toy_pipeline()


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory) -> dict[str, bytes]:
    """Every file of a drawing that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "samples"
    draw(pipe, folder)
    return contents(folder)


def draw(pipe: DigitPipeline, folder: Path, **changes) -> list[Path]:
    return sample(pipe, folder, **{"num": NUM, "seed": 3, "batch_size": SIZE} | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -------------------------------------------------------------------- stream


def test_a_stream_is_generate_batch_by_batch(pipe):
    batches = list(pipe.stream(NUM, seed=3, batch_size=SIZE))
    assert [(b.first, len(b)) for b in batches] == [(0, 4), (4, 4), (8, 4), (12, 1)]
    assert torch.equal(torch.cat([b.images for b in batches]), pipe.generate(NUM, seed=3, batch_size=SIZE))
    tokens = pipe.generate_tokens(NUM, seed=3, batch_size=SIZE)
    for name in ("disc", "vq"):
        assert torch.equal(torch.cat([b.tokens[name] for b in batches]), tokens[name])
    assert torch.equal(torch.cat([b.labels for b in batches]), tokens["labels"])
    assert torch.equal(pipe.decode(tokens["vq"]), torch.cat([b.images for b in batches]))


@pytest.mark.parametrize("changes", [dict(prior=False), dict(masked=True), dict(num_classes=0)])
def test_a_stream_begins_at_any_batch(changes):
    pipe = toy_pipeline(**changes)
    images = pipe.generate(NUM, seed=3, batch_size=SIZE)
    later = list(pipe.stream(NUM, seed=3, start=8, batch_size=SIZE))
    assert later[0].first == 8 and torch.equal(torch.cat([b.images for b in later]), images[8:])
    assert "disc" in later[0].tokens or "prior" in str(changes)
    assert not list(pipe.stream(NUM, seed=3, start=16, batch_size=SIZE))


def test_a_stream_that_cannot_be_is_refused_at_the_call(pipe):
    for start in (3, -4):
        with pytest.raises(DigitError, match=f"start is {start}: give a multiple of the batch size 4"):
            pipe.stream(NUM, start=start, batch_size=SIZE)
    with pytest.raises(DigitError, match="label 3 is out of range"):
        pipe.stream(NUM, labels=[3])


# -------------------------------------------------------------------- folder


def test_what_a_folder_holds(pipe, tmp_path):
    paths = draw(pipe, tmp_path, labels=[2, 0])
    names = [f"{i:05d}.png" for i in range(NUM)]
    assert [path.name for path in paths] == names
    assert sorted(contents(tmp_path)) == sorted([*names, "grid.png", "tokens.npz", "samples.json"])
    how = dict(labels=[2, 0], seed=3, batch_size=SIZE)
    images, tokens = pipe.generate(NUM, **how), pipe.generate_tokens(NUM, **how)
    assert torch.equal(samples.read_pictures(paths), images)
    with np.load(tmp_path / "tokens.npz") as saved:
        assert set(saved) == set(tokens) and all(saved[name].dtype == np.int32 for name in saved)
        assert all(np.array_equal(saved[name], tokens[name].numpy()) for name in tokens)
    grid = pictures.grid(images, 8, scale=8)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(grid))
    about = json.loads((tmp_path / "samples.json").read_text())
    assert about["labels"] == [2, 0] * 6 + [2] and about["classes"][:2] == ["owl", "cat"]
    assert about["rounding"] == "nearest" and about["seed"] == 3
    assert about["request"]["batch_size"] == SIZE and about["request"]["weights"]["vqgan"] == pipe.vq.fingerprint


def test_the_grid_shows_the_first(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "GRID_IMAGES", 3)
    paths = draw(pipe, tmp_path)
    grid = pictures.grid(samples.read_pictures(paths[:3]), 3, scale=8)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(grid))


def test_names_sort_as_numbers(tmp_path):
    request = {"num": 200_000, "batch_size": 1}
    folder = samples.SampleFolder(tmp_path, request, {}, torch.zeros(0), [])
    names = [folder.picture(i).name for i in (99_999, 100_000)]
    assert names == sorted(names) and all(samples.OURS.fullmatch(name) for name in names)


def test_images_are_not_kept(pipe, tmp_path, monkeypatch):
    """No more than three batches of pictures are alive at a time."""
    there, alive, stream = weakref.WeakSet(), [], DigitPipeline.stream

    def watched(*args, **how):
        for batch in stream(*args, **how):
            there.add(batch)
            alive.append(len(there))
            yield batch

    monkeypatch.setattr(DigitPipeline, "stream", watched)
    draw(pipe, tmp_path, batch_size=1)
    assert len(alive) == NUM and max(alive) <= 3


def test_writing_overlaps_with_drawing(pipe, tmp_path, monkeypatch):
    """The first batch is on its way to the disk until the second is being drawn."""
    save, stream, drawing = pictures.save_png, DigitPipeline.stream, threading.Event()

    def watched(*args, **how):
        for batch in stream(*args, **how):
            if batch.first:
                drawing.set()
            yield batch

    def patient(path, image):
        assert drawing.wait(20), "nothing was drawn while this was to be written"
        save(path, image)

    monkeypatch.setattr(DigitPipeline, "stream", watched)
    monkeypatch.setattr(pictures, "save_png", patient)
    draw(pipe, tmp_path)
    assert (tmp_path / "samples.json").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_copies_from_a_gpu_are_whole_when_looked_at():
    images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
    batch = Drawn(0, torch.zeros(64), {"images": images.cuda(), "vq": images.flatten(1).long().cuda()})
    assert torch.equal(batch.images, images) and batch.images.is_pinned()
    assert torch.equal(batch.tokens["vq"], images.flatten(1).long())


# -------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("at", [0, 5, 11, 12])
def test_a_stopped_drawing_goes_on(pipe, whole, tmp_path, monkeypatch, at):
    """The writer of image `at` is interrupted."""
    save, drawn, draw_all = pictures.save_png, [], DigitPipeline._draw

    def stopped(path, image):
        if Path(path).name == f"{at:05d}.png":
            raise KeyboardInterrupt
        save(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_png", stopped)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, tmp_path / "s")
    assert not (tmp_path / "s" / "samples.json").exists()
    assert not at or json.loads((tmp_path / "s" / "journal.json").read_text())["done"] == at // SIZE * SIZE
    monkeypatch.setattr(
        DigitPipeline, "_draw", lambda self, w, cfg, start, **k: drawn.append(start) or draw_all(self, w, cfg, start)
    )
    draw(pipe, tmp_path / "s")
    assert drawn == [at // SIZE * SIZE] and contents(tmp_path / "s") == whole


@pytest.mark.parametrize("place", ["save_png", "savez_compressed", "write_json"])
def test_a_drawing_stopped_at_the_end_goes_on(pipe, whole, tmp_path, monkeypatch, place):
    """While grid.png, tokens.npz or samples.json is written."""
    owner = {"save_png": pictures, "savez_compressed": np, "write_json": samples}[place]
    real, names = getattr(owner, place), ("grid.png", "samples.json")

    def stopped(target, *args, **how):
        if place == "savez_compressed" or Path(target).name in names:
            raise KeyboardInterrupt
        return real(target, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, stopped)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, tmp_path / "s")
    monkeypatch.setattr(DigitPipeline, "stream", None)  # nothing is drawn again
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def test_a_killed_process_goes_on(pipe, tmp_path):
    """SIGKILL at some moment, three times over: the files are those of one go."""
    script = (
        "import sys, time; from pathlib import Path\n"
        "import torch; torch.set_num_threads(1)\n"
        "from digit import pictures, progress, samples; from toy_pipeline import toy_pipeline\n"
        "progress.quiet(); save = pictures.save_png\n"
        "pictures.save_png = lambda path, image: (time.sleep(0.05), save(path, image))\n"
        "samples.sample(toy_pipeline(), sys.argv[1], 40, seed=3, batch_size=4)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
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
    save = pictures.save_png

    def full(path, image):
        if Path(path).name >= "00006.png":
            with samples.disk_errors(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        save(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_png", full)
        with pytest.raises(DigitError, match=r"disk full while writing .*0000\d.png: free some space and run again"):
            draw(pipe, tmp_path / "s")
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def test_a_disk_too_full_for_the_tokens_leaves_nothing(pipe, tmp_path, monkeypatch):
    def full(self):
        self.path.write_bytes(b"some")
        raise DigitError("disk full")

    monkeypatch.setattr(samples.ArrayFile, "allocate", full)
    with pytest.raises(DigitError, match="disk full"):
        draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == {}


def test_deleted_images_are_drawn_again(pipe, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(samples.SampleFolder, "finish", lambda self: None)
    draw(pipe, tmp_path / "s")
    (tmp_path / "s" / "00006.png").unlink()
    monkeypatch.undo()
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole
    (tmp_path / "s" / "00003.png").unlink()  # from a folder that was whole
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole


# -------------------------------------------------------------------- requests


def test_a_whole_folder_is_left_alone(pipe, tmp_path, monkeypatch):
    draw(pipe, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(DigitPipeline, "stream", None)
    draw(pipe, tmp_path)
    draw(pipe, tmp_path, batch_size=None)  # whatever it was drawn with
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def other_weights(**which) -> DigitPipeline:
    pipe, other = toy_pipeline(), toy_pipeline(1)
    for name in which:
        setattr(pipe, name, getattr(other, name))
    return pipe


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seed=4), "seed = 3, now asked for 4"),
        (dict(num=14), "num = 13, now asked for 14"),
        (dict(labels=[1]), r"labels = every class in turn, now asked for \[1\]"),
        (dict(batch_size=5), "batch_size = 4, now asked for 5"),
        (dict(precision="bf16"), "precision = fp32, now asked for bf16"),
        (dict(prior={"top_k": 3}), "prior.top_k = 200, now asked for 3"),
        (dict(renderer={"top_p": 0.5}), "renderer.top_p = 0.8, now asked for 0.5"),
        (dict(pipe=dict(prior=1)), r"weights.prior = [0-9a-f]{12}, now asked for [0-9a-f]{12}:"),
        (dict(pipe=dict(renderer=1)), "weights.renderer = "),
        (dict(pipe=dict(vq=1)), "weights.vqgan = "),
    ],
)
def test_another_request_is_refused(pipe, tmp_path, monkeypatch, changes, message, unfinished):
    if unfinished:
        monkeypatch.setattr(samples.SampleFolder, "finish", lambda self: None)
    draw(pipe, tmp_path)
    before = contents(tmp_path)
    other = other_weights(**changes["pipe"]) if "pipe" in changes else pipe
    with pytest.raises(MismatchError, match=message):
        draw(other, tmp_path, **{k: v for k, v in changes.items() if k != "pipe"})
    assert contents(tmp_path) == before


def test_overwriting_leaves_nothing_of_the_old(pipe, whole, tmp_path):
    draw(pipe, tmp_path, num=40, seed=1)
    draw(pipe, tmp_path, overwrite=True)
    assert contents(tmp_path) == whole
    (tmp_path / "samples.json").write_text('{"labels": []}')  # of an older version
    with pytest.raises(DigitError, match="names no request"):
        draw(pipe, tmp_path)
    draw(pipe, tmp_path, overwrite=True)
    assert contents(tmp_path) == whole


def test_a_request_that_cannot_be_drawn_leaves_nothing(pipe, tmp_path, whole):
    with pytest.raises(DigitError, match="cfg_scale is 3.0"):
        draw(pipe, tmp_path / "s", prior={"cfg_scale": 3.0})
    assert contents(tmp_path / "s") == {}
    samples.void(tmp_path / "s")  # as a kill before the first batch leaves it
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def test_foreign_images_are_not_overwritten(pipe, tmp_path):
    (tmp_path / "00002.png").write_bytes(b"mine")
    with pytest.raises(DigitError, match=r"holds 00002.png but no samples.json: choose another --out"):
        draw(pipe, tmp_path)
    assert contents(tmp_path) == {"00002.png": b"mine"}


def test_a_drawing_keeps_its_batch_size(tmp_path, monkeypatch):
    """Chosen from the memory that was free at the start, whatever is free later."""
    pipe, chosen = toy_pipeline(), iter([SIZE, 8])
    monkeypatch.setattr("digit.pipeline.choose_batch_size", lambda *_: next(chosen))
    with monkeypatch.context() as patch:
        patch.setattr(samples.SampleFolder, "finish", lambda self: None)
        draw(pipe, tmp_path, batch_size=None)
    draw(pipe, tmp_path, batch_size=None)
    assert json.loads((tmp_path / "samples.json").read_text())["request"]["batch_size"] == SIZE


def test_old_manifests_keep_their_batch_size(tmp_path):
    pipe = toy_pipeline()
    pipe.sampling = SamplingConfig(batch_size=7)
    pipe.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "pipeline.json").read_text())["sampling"]
    assert saved["batch_size"] == 7 and read_sampling(saved) == pipe.sampling
    again = DigitPipeline.from_pretrained(tmp_path)
    assert again.sized(again.sampling).batch_size == 7
    write_manifest(tmp_path, ["vqgan", "prior", "renderer"], pipe.preprocess, pipe.classes, SamplingConfig(), {})
    assert DigitPipeline.from_pretrained(tmp_path).sampling.batch_size is None


def test_rounding_is_part_of_the_request(pipe, tmp_path):
    draw(pipe, tmp_path)
    other = toy_pipeline()
    other.vq = VQTokenizer(other.vq.vqgan, rounding="truncate")
    with pytest.raises(MismatchError, match="rounding = nearest, now asked for truncate"):
        draw(other, tmp_path)


def test_a_batch_size_has_meaning():
    assert replace(SamplingConfig(), batch_size=3).batch_size == 3
    with pytest.raises(DigitError, match="batch_size is 0: at least 1, or leave it out"):
        SamplingConfig(batch_size=0)
