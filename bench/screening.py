"""Screens ideas for recipes on CIFAR-10 at equal training FLOPs, before anything is trained for long.

    digit fit DATA --recipe paper_cifar --out runs/cifar        # VQGAN, tokens of the 4 x 4 grid, the paper's recipe
    python bench/screening.py DATA --base runs/cifar --out runs/screening --variant grid8 --variant grid8_aligned

Every variant takes the VQGAN of --base and has the FLOPs of the recipe `paper_cifar`, prior and renderer together;
`prior` in VARIANTS is the prior's share. Figures (fd_efficientnet_lite2; not FID): `golden`, the renderer on the test
images' own discriminative tokens, and `samples`, class-conditional ones. Each is swept over the scales of guidance.
Finished models, tokens and figures are read, not made again.
"""

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_judge import CifarJudge, save_class_rows
from digit.pipeline.pipeline import DigitPipeline
from digit.runs.fit import Run
from digit.runs.layout import is_done
from digit.runs.recipes import Recipe, get_recipe, with_settings
from digit.runtime.files import write_json

GRID8 = {"encoder.layer": -6}  # stride 16: 8 x 8 of 112 features
DROPS = {"prior.label_dropout": 0.1, "renderer.prefix_dropout": 0.1}
ALIGNED = {"renderer.conditioning": "aligned"}
PRE = {"prior.norm": "pre", "prior_training.optimizer": "muon"}
BEST = {"prior": 0.4, **GRID8, **DROPS, **ALIGNED, **PRE}
CODE_LOSSES = {
    f"{stage}_training.{token}_code_weight": 1.0 for stage in ("prior", "renderer") for token in ("current", "next")
}
NEAR_NOISE = {f"{stage}_training.input_noise": 0.5 for stage in ("prior", "renderer")}
REAR_NOISE = {  # as released: any code, up to all tokens of an image
    f"{stage}_training.{name}": value
    for stage in ("prior", "renderer")
    for name, value in (("input_noise", 1.0), ("input_noise_codes", "uniform"))
}
OTHER_FEATURES = {name: value for name, value in BEST.items() if name not in GRID8}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"prior": 0.13},
    "paper_drops": {"prior": 0.13, **DROPS},
    "paper_aligned": {"prior": 0.2, **DROPS, **ALIGNED},
    "grid8": {"prior": 0.4, **GRID8, **DROPS},
    "grid8_aligned": {"prior": 0.4, **GRID8, **DROPS, **ALIGNED},
    "pre": BEST,
    "noise": BEST | {"renderer.prefix_noise": 0.3, "prior_of": "pre"},
    "qk": BEST | {"renderer.qk_norm": True, "prior_of": "pre"},
    "random_order": BEST | {"renderer.random_order": 1.0, "prior_of": "pre"},
    "rotary": BEST | {"renderer.rotary": "2d", "prior_of": "pre"},
    "tied": BEST | {"renderer.tied_embeddings": True, "prior_of": "pre"},
    "encoder2": BEST | {"renderer.encoder_depth": 2, "prior_of": "pre"},
    "added4": BEST | {"renderer.added_blocks": 4, "prior_of": "pre"},
    "k4096": BEST | {"kmeans.num_clusters": 4096},
    "k256": BEST | {"kmeans.num_clusters": 256},
    "layers": OTHER_FEATURES | {"encoder.layers": (-6, -3)},
    "pca": BEST | {"kmeans.pca": 64},
    "white": BEST | {"kmeans.pca": 64, "kmeans.whiten": True},
    "layers_white": OTHER_FEATURES | {"encoder.layers": (-6, -3), "kmeans.pca": 64, "kmeans.whiten": True},
    "residual2": BEST | {"quantizer": "residual_kmeans", "residual_kmeans.num_levels": 2},
    "residual3": BEST | {"quantizer": "residual_kmeans", "residual_kmeans.num_levels": 3},
    "product2": BEST | {"quantizer": "product_kmeans", "product_kmeans.num_levels": 2},
    "noisy_inputs": BEST | NEAR_NOISE,
    "code_losses": BEST | CODE_LOSSES,
    "rear": BEST | REAR_NOISE | CODE_LOSSES,
    "vq_only": {"prior": 0.0, "prior.label_dropout": 0.1},
}
TOKEN_SETTINGS = (
    "encoder.",
    "kmeans.",
    "quantizer",
    "residual_kmeans.",
    "product_kmeans.",
)  # variants that differ in others share one store


def main() -> None:
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    screening = Screening(args, out)
    for name in args.variant or VARIANTS:
        screening.run(name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", help="CIFAR-10 in the Hub's layout")
    parser.add_argument("--base", required=True, help="finished run of the recipe paper_cifar")
    parser.add_argument("--out", required=True)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: all; give it several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=1000, help="samples and golden images for each figure")
    parser.add_argument("--scales", default="1,2", help="of guidance, swept in both stages")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--golden_only", action="store_true", help="train and judge the renderer alone")
    return parser.parse_args()


class Screening:
    """Shared data, judge and budget of all variants."""

    def __init__(self, args: argparse.Namespace, out: Path) -> None:
        self.args, self.out, self.base = args, out, Path(args.base)
        self.recipe = replace(get_recipe("paper_cifar"), seed=args.seed)
        judge = CifarJudge(args.data, self.recipe.preprocess, out)
        self.source, self.figures = judge.source, judge.figures
        self.test_images, self.test_labels = judge.test_images, judge.test_labels
        paper = Run(
            self.recipe,
            self.source,
            out / "budget" / (args.variant or ["all"])[0],
            reuse=self.shared(("codebook", "vqgan", "tokens")),
        )
        self.budget = sum(flops(paper, model) for model in ("prior", "renderer"))
        self.floor = self.figures(f"floor_{args.num}", lambda: paper.train_vqgan().decode(
            paper.train_vqgan().encode(self.test_images[: args.num])), self.test_labels)  # fmt: skip
        say(f"floor {self.floor}, budget {self.budget / 1e15:.1f} PFLOPs")

    def shared(self, parts: tuple[str, ...]) -> dict[str, Path]:
        return {part: self.base / part for part in parts}

    def run(self, name: str) -> None:
        """Trains a variant, and writes its figures to OUT/NAME_SEED.json."""
        args, path = self.args, self.out / f"{name}_{self.args.seed}.json"
        settings = dict(VARIANTS[name])
        share, prior_of = settings.pop("prior"), settings.pop("prior_of", None)
        run = self.make_run(name, settings, share, prior_of)
        steps = {model: run.training_config(model).num_steps for model in self.models(name)}
        results = json.loads(path.read_text()) if path.exists() else {"variant": name, "steps": steps, "figures": {}}
        say(f"{name}: {steps}")
        if name == "vq_only":
            pipe = run.make_pipeline(None, "vq_ar")
        else:
            pipe = run.make_pipeline(None if args.golden_only else "prior")
        for label, make, labels in self.requests(name, pipe):
            label = f"{label} of {args.num}"
            if label not in results["figures"]:
                results["figures"][label] = self.figures(f"{name}_{args.seed}_{label}_{args.num}", make, labels)
                write_json(path, results)
            say(f"{name:14} {label:28} {results['figures'][label]}")

    def models(self, name: str) -> tuple[str, ...]:
        return ("vq_ar",) if name == "vq_only" else ("prior", "renderer")

    def make_run(self, name: str, settings: dict[str, Any], share: float, prior_of: str | None = None) -> Run:
        recipe: Recipe = with_settings(self.recipe, settings)
        tokens = {key: value for key, value in settings.items() if key.startswith(TOKEN_SETTINGS)}
        reuse = self.shared(("codebook", "vqgan", "tokens"))
        if tokens:  # a store of its own, shared by the variants and seeds with the same codebook
            store = self.out / "-".join(f"{key}{value}" for key, value in sorted(tokens.items()))
            if not is_done(store / "tokens", "tokens"):  # a Run would lock the folder, which other screenings read
                maker = Run(
                    with_settings(replace(self.recipe, seed=0), tokens),
                    self.source,
                    store,
                    reuse={"vqgan": self.base / "vqgan", "vq_tokens": self.base / "tokens"},
                )
                maker.write_tokens()
            reuse |= {"codebook": store / "codebook", "tokens": store / "tokens"}
        if prior_of and (made := self.out / f"{prior_of}_{self.args.seed}" / "prior" / "model.json").is_file():
            reuse["prior"] = made.parent
        trial = Run(recipe, self.source, self.out / "trial" / f"{name}_{self.args.seed}", reuse=reuse)
        if name == "vq_only":
            recipe = replace(recipe, prior_training=self.recipe.prior_training)
            return Run(recipe, self.source, self.out / f"{name}_{self.args.seed}", reuse=reuse)
        per_image = {m: trial.flops_per_image(m) * recipe.prior_training.batch_size for m in ("prior", "renderer")}
        budget = {"prior": share * self.budget, "renderer": (1 - share) * self.budget}
        steps = {model: round(budget[model] / per_image[model]) for model in per_image}
        recipe = with_settings(recipe, {f"{model}_training.num_steps": number for model, number in steps.items()})
        return Run(recipe, self.source, self.out / f"{name}_{self.args.seed}", reuse=reuse)

    def requests(self, name: str, pipe: DigitPipeline) -> Any:
        """(label, images, labels of these) of every figure."""
        args = self.args
        pipe.sampling = replace(pipe.sampling, precision="bf16", batch_size=125)
        scales = [float(scale) for scale in args.scales.split(",")]
        golden_labels, labels = self.test_labels, torch.arange(args.num) % 10
        if name != "vq_only":
            own = pipe.tokenizer.encode(self.test_images[: args.num])
            for scale in scales if pipe.renderer.cfg.prefix_dropout else [1.0]:
                stage = {"cfg_scale": scale, "top_p": args.top_p}
                yield f"golden r{scale}", lambda s=stage: pipe.render(own, args.seed, renderer=s), golden_labels
        if args.golden_only:
            return
        prior_scales = scales if name != "vq_only" and pipe.prior.cfg.label_dropout else [1.0]
        renderer_scales = scales if pipe.renderer.cfg.prefix_dropout or pipe.renderer.cfg.label_dropout else [1.0]
        for first, second in itertools.product(prior_scales, renderer_scales):
            how = {"renderer": {"cfg_scale": second, "top_p": args.top_p}}
            if name != "vq_only":
                how["prior"] = {"cfg_scale": first, "top_p": args.top_p}
            label = f"samples p{first} r{second}"
            yield label, lambda h=how, n=label: self.sample(pipe, h, f"{name}_{n}"), labels

    def sample(self, pipe: DigitPipeline, how: dict[str, Any], name: str) -> Tensor:
        images = pipe.generate(self.args.num, None, seed=1_000_000 * self.args.seed, **how)
        save_class_rows(self.out / "grids" / f"{name}_{self.args.seed}.png", images, pipe.classes)
        return images


def flops(run: Run, model: str) -> float:
    cfg = run.training_config(model)
    return run.flops_per_image(model) * cfg.num_steps * cfg.batch_size


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
