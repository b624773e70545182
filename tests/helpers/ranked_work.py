"""What ranks do together, whatever their number: `python ranked_work.py work INPUTS OUT` on each of them.

`python ranked_work.py draw FOLDER` draws slowly, so that it can be stopped or killed midway.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from toy_images import NoiseSource, PatchEncoder
from toy_judge import ToyJudge
from toy_pipeline import toy_pipeline

from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError, Stopped
from digit.evaluation import features, sharing
from digit.evaluation.probe import run_probe
from digit.evaluation.samples import EvaluateConfig, evaluate, statistics_npz
from digit.metrics.probe import ProbeConfig
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.pipeline import pipeline
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.sample_folder import sample
from digit.runtime import distributed, plots, progress
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.kmeans.codebook import Codebook

MANY = 120  # images of the slow drawing
SECONDS = 0.1  # that the first image of each of its batches takes


def make_small(change=setattr) -> None:
    """Parts of a few images, and a batch size that ranks would not agree on."""
    change(features, "SHARD", 5)
    change(sharing, "PIECE", 7)
    change(pipeline, "choose_batch_size", lambda *_: 4 + distributed.rank())  # as where less memory is free


def make_inputs(folder: Path) -> Path:
    """Samples and a reference for `digit evaluate`; one repeats, one is a copy; and sets with a broken image."""
    for name, seed in (("samples", 0), ("reference", 1), ("cut", 2), ("unreadable", 2), ("held_out", 3)):
        images = np.random.default_rng(seed).integers(0, 256, (23, 16, 16, 3), dtype=np.uint8)
        if name == "samples":
            images[22] = images[1]
            images[3] = np.random.default_rng(1).integers(0, 256, images.shape, dtype=np.uint8)[20]
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{i:02d}.png")
    for number in (13, 21):
        path = folder / "cut" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:-200])  # the header is whole
        (folder / "unreadable" / f"{number}.png").write_bytes(b"no picture")
    return folder


def draw_folders(out: Path) -> int:
    """Three drawings; returns how many images this rank has drawn."""
    pipe, drawn, stream = toy_pipeline(), 0, DigitPipeline.stream

    def counted(*args, **how):
        nonlocal drawn
        for batch in stream(pipe, *args, **how):
            drawn += len(batch)
            yield batch

    pipe.stream = counted
    sample(pipe, out / "samples", 13, seed=3, batch_size=4)
    sample(pipe, out / "few", 3, seed=3, batch_size=4)  # fewer batches than ranks
    sample(pipe, out / "auto", 13, seed=3)
    return drawn


def judge_folders(inputs: Path, out: Path) -> tuple[int, list[str]]:
    """Figures, statistics and what broken images say; returns how many images this rank's network saw too."""
    network, problems = ToyJudge(), []
    cfg = EvaluateConfig(cache="none", kernel_subset_size=10, kernel_subsets=3, num_splits=2, batch_size=4)
    how, pair = dict(cfg=cfg, network=network), (inputs / "samples", inputs / "reference")
    cached = dict(cfg=EvaluateConfig(cache=str(out / "cache")), network=network)
    found = [
        evaluate(*pair, out=out / "result.json", report=out / "report", held_out=inputs / "held_out", **how),
        statistics_npz(inputs / "reference", out / "reference.npz", **how).sigma.tolist(),
        evaluate(inputs / "samples", out / "reference.npz", **how),
        evaluate(*pair, **cached),
        evaluate(*pair, **cached),
    ]
    (out / f"found.{distributed.rank()}.json").write_text(json.dumps(found))
    seen = network.seen
    for name in ("cut", "unreadable"):
        try:
            evaluate(inputs / name, inputs / "reference", **how)
        except DigitError as error:
            problems.append(str(error))
    return seen, problems


def probe_toys(out: Path) -> int:
    """A probe of 90 and 40 images, some broken, a whole batch among them; returns how many batches this rank made."""
    torch.manual_seed(0)
    tokenizer = DiscriminativeTokenizer(PatchEncoder(), Codebook(torch.rand(8, 3)))
    prior = SequenceModel(SequenceConfig(depth=2, embed_dim=16, num_heads=2, vocab_size=8, target_len=16))
    small = PreprocessConfig(image_size=16, encoder_size=16)
    pipe = DigitPipeline(tokenizer=tokenizer, prior=prior, preprocess=small)
    train, test = NoiseSource(90, broken=(3, 88, *range(16, 24))), NoiseSource(40, broken=tuple(range(20, 40)))
    result = run_probe(pipe, train, test, ProbeConfig(l2=(0.01,)), out=out / "probe", batch_size=8)
    (out / f"probe.{distributed.rank()}.json").write_text(json.dumps(result))
    calls = tokenizer.encoder.calls
    streamed = ProbeConfig(solver="sgd", num_epochs=3, batch_size=16, memory_budget_bytes=0)
    run_probe(pipe, train, test, streamed, out=out / "streamed_probe", batch_size=8)
    return calls


def work(inputs: Path, out: Path) -> None:
    """Everything; what is of this rank alone goes into OUT/rank.R.json."""
    if distributed.is_main():
        out.mkdir()
    distributed.barrier()
    drawn, (seen, problems), batches = draw_folders(out), judge_folders(inputs, out), probe_toys(out)
    about = {"drawn": drawn, "seen": seen, "problems": problems, "batches": batches}
    (out / f"rank.{distributed.rank()}.json").write_text(json.dumps(about))


def draw_slowly(folder: Path) -> None:
    """MANY images, batch by batch; says where it was stopped."""
    save = plots.save_png

    def patient(path, image):
        time.sleep(SECONDS * (int(Path(path).stem) % 4 == 0 if Path(path).stem.isdigit() else 0))
        save(path, image)

    plots.save_png = patient
    folder.with_suffix(f".pid{distributed.rank()}").write_text(str(os.getpid()))
    try:
        sample(toy_pipeline(), folder, MANY, seed=3, batch_size=4)
    except Stopped as stopped:
        folder.with_suffix(f".stopped{distributed.rank()}").write_text(str(stopped))


if __name__ == "__main__":
    torch.set_num_threads(1)
    progress.quiet()
    make_small()
    distributed.start("cpu")
    {"work": work, "draw": draw_slowly}[sys.argv[1]](*map(Path, sys.argv[2:]))
    distributed.stop(together=True)
