"""Held-out likelihood of a small prior on one stored crop an image, on eight in turn, and on fresh crops.

    python bench/fresh_crops.py photos/ --out runs/fresh_crops            # about ten minutes on one core

All three see the same images in the same order for as many steps; only the crops differ. One codebook, the VQGAN that
the package carries, and one token store serve them, so that `val_nll` is of the same rows of held-out images.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np

from digit.data.images import open_source
from digit.runs.fit import Run
from digit.runs.recipes import SMALL_64, ModelSpec, Recipe, cpu_training
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.training.log import read_log
from digit.training.vqgan import GANConfig

KINDS = ("1 stored crop", "8 in turn", "fresh")


def recipe(steps: int, seed: int) -> Recipe:
    training = replace(cpu_training(steps), save_every=steps // 5, warmup_steps=50, precision="fp32")
    return Recipe(
        **SMALL_64,
        kmeans=KMeansConfig(num_clusters=512, num_iterations=12),
        codebook_subset=1.0,
        vqgan_training=GANConfig(num_steps=0),
        crops_per_image=8,
        validation_fraction=0.2,
        class_conditional=False,
        prior=ModelSpec(depth=3, embed_dim=128, num_heads=4, dropout=0.0),
        prior_training=training,
        seed=seed,
    )


def first_crop(images: np.ndarray, *_: object) -> np.ndarray:
    return np.zeros_like(images)


def train(run: Run, kind: str) -> list[float]:
    """val_nll of the prior at each fifth of its training."""
    with mock.patch("digit.data.tokens.crop_numbers", first_crop) if kind == KINDS[0] else mock.MagicMock():
        run.train_model("prior")
    return [line["val_nll"] for line in read_log(run.out / "prior" / "log.jsonl") if "val_nll" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    source = open_source(args.data, split="train").limit(args.images)
    base = Run(recipe(args.steps, 0), source, args.out / "base")
    base.write_tokens()
    reuse: dict = {part: base.out / part for part in ("codebook", "vqgan", "tokens")}
    for seed in range(args.seeds):
        for number, kind in enumerate(KINDS):
            cfg = replace(recipe(args.steps, seed), training_crops="fresh" if kind == "fresh" else "stored")
            found = train(Run(cfg, source, args.out / f"{number}_{seed}", reuse=reuse), kind)
            print(f"seed {seed}  {kind:<14}", *(f"{nll:.3f}" for nll in found), flush=True)


if __name__ == "__main__":
    main()
