"""Codebook, tokens and a run folder on toy data, on as many ranks as are started: `torchrun ... toy_ranks.py DIR`."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny import tiny_recipe
from toy_images import NoiseSource, PatchEncoder

from digit.data.preprocess import PreprocessConfig
from digit.data.token_writer import write_tokens
from digit.errors import DigitError, Stopped
from digit.models.vqgan import VQGAN
from digit.runs.fit import Run
from digit.runtime import distributed, progress
from digit.runtime.files import write_json
from digit.tokenizers.discriminative import fit_codebook
from digit.tokenizers.kmeans import unfinished
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.vq import VQTokenizer

SMALL = PreprocessConfig(image_size=8, encoder_size=8)
BROKEN = (7, 20)
SHARD_BYTES = 640  # 20 rows of 16 VQ tokens


class SumTokenizer:
    """A token is the sum of its cell's pixels; `at` call number `when`, `hook` is called."""

    def __init__(self, side: int = 2, vocab_size: int = 1000, when: int = 0, hook=None) -> None:
        self.grid, self.vocab_size, self.fingerprint = (side, side), vocab_size, f"sum-{vocab_size}-{side}"
        self.calls, self.when, self.hook = 0, when, hook

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.when:
            self.hook()
        cells = torch.nn.functional.adaptive_avg_pool2d(images.double(), self.grid[0]).sum(1).flatten(1)
        return (cells * 100).round().long() % self.vocab_size


class HookedEncoder(PatchEncoder):
    """Calls `hook` at call number `when`."""

    def __init__(self, when: int = 0, hook=None) -> None:
        super().__init__()
        self.when, self.hook = when, hook

    def features(self, images: torch.Tensor) -> torch.Tensor:
        features = super().features(images)
        if self.calls == self.when:
            self.hook()
        return features


def make_tokens(folder: Path, tokenizer: SumTokenizer | None = None, **changes) -> None:
    """25 images in 3 crops, in batches of 4 rows that do not end where images do."""
    settings = dict(crops_per_image=3, seed=5, batch_size=4, max_bad_fraction=0.5) | changes
    source = NoiseSource(25, BROKEN)
    write_tokens(folder, source, SMALL, tokenizer or SumTokenizer(), SumTokenizer(4, 65536), **settings)


def make_codebook(folder: Path, encoder: PatchEncoder | None = None, source: NoiseSource | None = None, **changes):
    """Codes of the 16 patches of each of 23 images that can be read; every iteration is kept."""
    unfinished.SAVE_EVERY_SECONDS, unfinished.SAVING_SHARE = 0.0, float("inf")
    settings = dict(subset=1.0, batch_size=4, max_bad_fraction=0.2, across_ranks=True, folder=folder) | changes
    cfg, source = settings.pop("cfg", KEPT), source or NoiseSource(25, BROKEN)
    codebook = fit_codebook(source, SMALL, encoder or PatchEncoder(), cfg, **settings)
    distributed.on_main(lambda: codebook.save(folder))
    return codebook


KEPT = KMeansConfig(num_clusters=12, num_iterations=6, tolerance=0, precision="fp32", init="k-means++")
STREAMED = replace(
    KEPT, num_clusters=4, max_points_per_centroid=None, memory_budget_bytes=2600
)  # holds no sample of all


def make_run(folder: Path) -> Run:
    """A run's codebook and tokens, with a VQGAN that is at hand."""
    recipe = replace(tiny_recipe(), crops_per_image=2)
    if distributed.is_main():
        torch.manual_seed(3)
        VQTokenizer(VQGAN(recipe.vqgan)).save(folder / "vqgan")
    distributed.barrier()
    run = Run(recipe, NoiseSource(17), folder / "run", reuse={"vqgan": folder / "vqgan"}, device="cpu")
    assert len(run.write_tokens()) == 34
    return run


def only_on(rank: int, hook):
    """`hook` on one rank, nothing on the others."""
    return hook if distributed.rank() == rank else lambda: None


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def outcome(work) -> str:
    """What came of it, in words."""
    try:
        work()
    except (Stopped, DigitError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def main(folder: Path) -> None:
    progress.quiet()
    torch.set_num_threads(1)
    distributed.start("cpu")
    said = {
        "tokens": outcome(lambda: make_tokens(folder / "tokens")),
        "shards": outcome(lambda: make_tokens(folder / "shards", shard_bytes=SHARD_BYTES)),
        "left by four": outcome(lambda: make_tokens(folder / "left_by_four")),
        "tokens, stop": outcome(
            lambda: make_tokens(folder / "stopped", SumTokenizer(when=2, hook=only_on(1, ask_to_stop)))
        ),
        "tokens, go on": outcome(lambda: make_tokens(folder / "stopped")),
        "tokens, for one rank": outcome(
            lambda: make_tokens(folder / "moved", SumTokenizer(when=3, hook=only_on(0, ask_to_stop)))
        ),
        "bad": outcome(lambda: make_tokens(folder / "bad", max_bad_fraction=0.05)),
        "codebook": outcome(lambda: make_codebook(folder / "codebook")),
        "codebook, bad": outcome(lambda: make_codebook(folder / "bad_codebook", max_bad_fraction=0.05)),
        "codebook, one batch": outcome(lambda: make_codebook(folder / "one_batch", batch_size=64)),
        "streamed": outcome(lambda: make_codebook(folder / "streamed", cfg=STREAMED)),
        "streamed, stop": outcome(
            lambda: make_codebook(folder / "again", HookedEncoder(12, only_on(1, ask_to_stop)), cfg=STREAMED)
        ),
        "streamed, go on": outcome(lambda: make_codebook(folder / "again", cfg=STREAMED)),
        "streamed, for one rank": outcome(
            lambda: make_codebook(folder / "moved_codebook", HookedEncoder(12, only_on(0, ask_to_stop)), cfg=STREAMED)
        ),
        "run": outcome(lambda: make_run(folder)),
    }
    write_json(folder / f"said{distributed.rank()}.json", said)
    distributed.stop(together=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
