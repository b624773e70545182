"""A reproduction of a size that means nothing, on as many ranks as are started: `reproduced.py OUT TARGETS`."""

import sys
from dataclasses import replace
from pathlib import Path

from tiny import tiny_recipe

from digit.evaluation.sweep import SweepConfig
from digit.reproduce import Scale, Study, reproduce_all
from digit.runs.recipes import ModelSpec
from digit.runtime import distributed, progress

DATA = "shapes:num=60,size=32"


def micro_scale() -> Scale:
    """Seconds for each target; batches of 4 samples, so that ranks have something to share."""
    recipe = replace(tiny_recipe(), class_conditional=False)
    recipe = replace(recipe, sampling=replace(recipe.sampling, batch_size=4, precision="bf16"))
    for stage in ("prior", "renderer"):  # dropout depends on how a batch is cut, and rounding on bf16
        training = replace(getattr(recipe, f"{stage}_training"), precision="fp32")
        recipe = replace(recipe, **{stage: replace(getattr(recipe, stage), dropout=0.0), f"{stage}_training": training})
    larger = ModelSpec(depth=2, embed_dim=48, num_heads=2, dropout=0.0)
    return Scale(
        name="tiny", recipe=recipe, num_train=40, num_test=30, num_samples=14, seeds=(0,), num_stability=40,
        num_completed=10, num_swept=10, clusters=(6, 12), large=replace(recipe, prior=larger, renderer=larger),
        prefixes=(0.5,), sweep=SweepConfig(top_k=(2,), top_p=(0.5,)),
    )  # fmt: skip


def reproduce_micro(out: Path, targets: str) -> None:
    """Reproduce targets, with commas between them."""
    reproduce_all(targets.split(","), Study(DATA, micro_scale(), out, device="cpu"))


if __name__ == "__main__":
    progress.quiet()
    distributed.start("cpu")
    reproduce_micro(Path(sys.argv[1]), sys.argv[2])
    distributed.stop(together=True)
