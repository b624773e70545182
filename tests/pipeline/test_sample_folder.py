"""Folders of sampled images: what they hold, which requests they refuse; and the stream that fills them."""

import json
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from toy_pipeline import toy_pipeline
from toy_samples import NUM, SIZE, contents, draw

from digit.errors import DigitError, MismatchError
from digit.pipeline import sample_folder, sample_journal
from digit.pipeline.batch import SampleBatch
from digit.pipeline.manifest import read_sampling, write_manifest
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime import plots
from digit.sampling.config import SamplingConfig
from digit.tokenizers.vq import VQTokenizer

# -------------------------------------------------------------------- stream


def test_a_stream_is_generate_batch_by_batch(pipe):
    batches = list(pipe.stream(NUM, seed=3, batch_size=SIZE))
    assert [(b.first, len(b)) for b in batches] == [(0, 4), (4, 4), (8, 4), (12, 1)]
    assert torch.equal(torch.cat([b.images for b in batches]), pipe.generate(NUM, seed=3, batch_size=SIZE))
    tokens = pipe.generate_tokens(NUM, seed=3, batch_size=SIZE)
    for name in ("discriminative", "vq"):
        assert torch.equal(torch.cat([b.tokens[name] for b in batches]), tokens[name])
    assert torch.equal(torch.cat([b.labels for b in batches]), tokens["labels"])
    assert torch.equal(pipe.decode(tokens["vq"]), torch.cat([b.images for b in batches]))


@pytest.mark.parametrize("changes", [dict(prior=False), dict(masked=True), dict(num_classes=0)])
def test_a_stream_begins_at_any_batch(changes):
    pipe = toy_pipeline(**changes)
    images = pipe.generate(NUM, seed=3, batch_size=SIZE)
    later = list(pipe.stream(NUM, seed=3, start=8, batch_size=SIZE))
    assert later[0].first == 8 and torch.equal(torch.cat([b.images for b in later]), images[8:])
    assert "discriminative" in later[0].tokens or "prior" in str(changes)
    assert not list(pipe.stream(NUM, seed=3, start=16, batch_size=SIZE))
    parts = [pipe.stream(NUM, seed=3, start=a, end=b, batch_size=SIZE) for a, b in ((0, 4), (4, 12), (12, NUM))]
    assert torch.equal(torch.cat([b.images for part in parts for b in part]), images)


def test_a_stream_that_cannot_be_is_refused_at_the_call(pipe):
    for start in (3, -4):
        with pytest.raises(DigitError, match=f"start is {start}: give a multiple of the batch size 4"):
            pipe.stream(NUM, start=start, batch_size=SIZE)
    with pytest.raises(DigitError, match="end is 6: give a multiple of the batch size 4"):
        pipe.stream(NUM, end=6, batch_size=SIZE)
    with pytest.raises(DigitError, match="label 3 is out of range"):
        pipe.stream(NUM, labels=[3])


# -------------------------------------------------------------------- folder


def test_what_a_folder_holds(pipe, tmp_path):
    paths = draw(pipe, tmp_path, labels=[2, 0])
    names = [f"{i:05d}.png" for i in range(NUM)]
    assert [path.name for path in paths] == names
    assert sorted(contents(tmp_path)) == sorted([*names, "grid.png", "tokens.npz", "samples.json", ".digit"])
    how = dict(labels=[2, 0], seed=3, batch_size=SIZE)
    images, tokens = pipe.generate(NUM, **how), pipe.generate_tokens(NUM, **how)
    assert torch.equal(sample_folder.read_pictures(paths), images)
    with np.load(tmp_path / "tokens.npz") as saved:
        assert set(saved) == set(tokens) and all(saved[name].dtype == np.int32 for name in saved)
        assert all(np.array_equal(saved[name], tokens[name].numpy()) for name in tokens)
    grid = plots.grid(images, 8, scale=8)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(grid))
    about = json.loads((tmp_path / "samples.json").read_text())
    assert about["labels"] == [2, 0] * 6 + [2] and about["classes"][:2] == ["owl", "cat"]
    assert about["rounding"] == "nearest" and about["seed"] == 3
    assert about["request"]["batch_size"] == SIZE and about["request"]["weights"]["vqgan"] == pipe.vq.fingerprint


def test_the_grid_shows_the_first(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_folder, "GRID_IMAGES", 3)
    paths = draw(pipe, tmp_path)
    grid = plots.grid(sample_folder.read_pictures(paths[:3]), 3, scale=8)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(grid))


def test_names_sort_as_numbers(tmp_path):
    request = {"num": 200_000, "batch_size": 1}
    folder = sample_folder.SampleFolder(tmp_path, request, {}, torch.zeros(0, dtype=torch.int64), [])
    names = [folder.picture(i).name for i in (99_999, 100_000)]
    assert names == sorted(names) and all(sample_journal.OURS.fullmatch(name) for name in names)


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


def test_writing_overlaps_with_sampling(pipe, tmp_path, monkeypatch):
    """The first batch is on its way to the disk until the second is being sampled."""
    save, stream, sampling = plots.save_png, DigitPipeline.stream, threading.Event()

    def watched(*args, **how):
        for batch in stream(*args, **how):
            if batch.first:
                sampling.set()
            yield batch

    def patient(path, image):
        assert sampling.wait(20), "nothing was sampled while this was to be written"
        save(path, image)

    monkeypatch.setattr(DigitPipeline, "stream", watched)
    monkeypatch.setattr(plots, "save_png", patient)
    draw(pipe, tmp_path)
    assert (tmp_path / "samples.json").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_copies_from_a_gpu_are_whole_when_looked_at():
    images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
    batch = SampleBatch(0, torch.zeros(64), {"images": images.cuda(), "vq": images.flatten(1).long().cuda()})
    assert torch.equal(batch.images, images) and batch.images.is_pinned()
    assert torch.equal(batch.tokens["vq"], images.flatten(1).long())


# -------------------------------------------------------------------- requests


def test_a_whole_folder_is_left_alone(pipe, tmp_path, monkeypatch):
    draw(pipe, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(DigitPipeline, "stream", None)
    draw(pipe, tmp_path)
    draw(pipe, tmp_path, batch_size=None)  # whatever it was sampled with
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
        (dict(num=12), "num = 13, now asked for 12, which is fewer: give --num 13 or more, or choose another --out"),
        (dict(num=14, seed=4), "seed = 3, now asked for 4"),
        (dict(num=14, prior={"top_k": 3}), "prior.top_k = 200, now asked for 3"),
        (dict(num=100_001), "num = 13, and the names of 100001 images are longer: choose another --out"),
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
        monkeypatch.setattr(sample_folder.SampleFolder, "finish", lambda self: None)
    monkeypatch.setattr("digit.runtime.hardware.multiplies_bf16", lambda device: True)
    draw(pipe, tmp_path)
    before = contents(tmp_path)
    other = other_weights(**changes["pipe"]) if "pipe" in changes else pipe
    with pytest.raises(MismatchError, match=message):
        draw(other, tmp_path, **{k: v for k, v in changes.items() if k != "pipe"})
    assert contents(tmp_path) == before


def test_a_folder_says_in_which_precision_it_was_sampled(pipe, tmp_path, monkeypatch):
    """Not that which was asked for: without bf16 in hardware the images are those of fp32, and go on so."""
    monkeypatch.setattr("digit.runtime.hardware.multiplies_bf16", lambda device: False)
    draw(pipe, tmp_path, precision="bf16")
    assert json.loads((tmp_path / "samples.json").read_text())["request"]["precision"] == "fp32"
    draw(pipe, tmp_path, precision="fp32")


def test_overwriting_leaves_nothing_of_the_old(pipe, whole, tmp_path):
    draw(pipe, tmp_path, num=40, seed=1)
    draw(pipe, tmp_path, overwrite=True)
    assert contents(tmp_path) == whole
    (tmp_path / "samples.json").write_text('{"labels": []}')  # of an older version
    with pytest.raises(DigitError, match="names no request"):
        draw(pipe, tmp_path)
    draw(pipe, tmp_path, overwrite=True)
    assert contents(tmp_path) == whole


def test_a_request_that_cannot_be_sampled_leaves_nothing(pipe, tmp_path, whole):
    with pytest.raises(DigitError, match="cfg_scale is 3.0"):
        draw(pipe, tmp_path / "s", prior={"cfg_scale": 3.0})
    assert contents(tmp_path / "s") == {}
    sample_folder.void(tmp_path / "s")  # as a kill before the first batch leaves it
    draw(pipe, tmp_path / "s")
    assert contents(tmp_path / "s") == whole


def test_foreign_images_are_not_overwritten(pipe, tmp_path):
    (tmp_path / "00002.png").write_bytes(b"mine")
    with pytest.raises(DigitError, match=r"holds 00002.png but no samples.json: choose another --out"):
        draw(pipe, tmp_path)
    assert contents(tmp_path) == {"00002.png": b"mine"}


def test_a_request_keeps_its_batch_size(tmp_path, monkeypatch):
    """Chosen from the memory that was free at the start, whatever is free later."""
    pipe, chosen = toy_pipeline(), iter([SIZE, 8])
    monkeypatch.setattr("digit.pipeline.pipeline.choose_batch_size", lambda *_: next(chosen))
    with monkeypatch.context() as patch:
        patch.setattr(sample_folder.SampleFolder, "finish", lambda self: None)
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
    with pytest.raises(DigitError, match="batch_size is 0: it must be at least 1"):
        SamplingConfig(batch_size=0)
