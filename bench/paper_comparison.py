"""The paper's comparison on real images: DiGIT and VQ-only, AR and MaskGIT, at equal training FLOPs.

    python bench/paper_comparison.py DATA --run runs/cifar --out runs/cifar_comparison --seeds 0,1,2

Codebook, VQGAN and tokens come from --run (a finished `digit fit`); every model is trained for every seed. The metric
is the Frechet distance on EfficientNet-Lite2 features between samples and the test split; it is not FID. The same
distance of the reconstructed test images is the lowest that a renderer can reach. Everything is resumable: finished
models, feature files and seeds are reused.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from digit.data.images import open_source
from digit.metrics.frechet import FeatureStats
from digit.metrics.judge import METRIC, collect_features, fd
from digit.models.sequence import training_flops
from digit.pipeline.pipeline import DigitPipeline
from digit.runs.fit import Run
from digit.runs.recipes import get_recipe
from digit.runs.report import load_judge, real_images, spread
from digit.runtime import plots
from digit.runtime.files import save_npy, write_json
from digit.sampling.config import StageSampling
from digit.training.adversarial import image_psnr
from digit.training.log import last_metrics

METHODS = {  # name -> (prior, renderer)
    "DiGIT + AR": ("prior", "renderer"),
    "DiGIT + MaskGIT": ("prior", "renderer_masked"),
    "VQ-only AR": (None, "vq_ar"),
    "VQ-only MaskGIT": (None, "vq_masked"),
}


def main() -> None:
    args = arguments()
    out = Path(args.out)
    source, test = open_source(args.data, split="train"), open_source(args.data, split="test")
    judge = Judge(out / "features")
    recipe = get_recipe(args.recipe)
    test_images, _ = real_images(test, recipe.preprocess, range(len(test)))
    truth = judge.stats("test", lambda: test_images)
    results = {"metric": METRIC, "samples": args.num, "test_images": len(test_images), "rows": [], "golden": []}
    for seed in map(int, args.seeds.split(",")):
        reuse = {part: Path(args.run) / part for part in ("codebook", "vqgan", "tokens")}
        if seed == recipe.seed:  # the run itself has prior and renderer; another recipe raises
            run = Run(recipe, source, args.run, device=args.device)
        else:
            run = Run(replace(recipe, seed=seed), source, out / f"seed{seed}", reuse=reuse, device=args.device)
        if "floor" not in results:
            results["floor"] = floor(run, judge, truth, test_images)
        for method, (prior, renderer) in METHODS.items():
            results["rows"].append(row(run, judge, truth, method, prior, renderer, args, seed))
            write_json(out / "comparison.json", results)
        results["golden"].append(golden(run, judge, truth, test_images[: args.num], seed))
    results["summary"] = summary(results)
    write_json(out / "comparison.json", results)
    sys.stdout.write(table(results))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", help="Hub-layout data set with a train and a test split")
    parser.add_argument(
        "--run", required=True, help="finished `digit fit` run whose codebook, VQGAN and tokens are used"
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--recipe", default="paper_cifar")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--num", type=int, default=5000, help="samples per method and seed")
    parser.add_argument("--device", default=None)
    return parser.parse_args()


class Judge:
    """EfficientNet-Lite2 features of named image sets, cached on disk."""

    def __init__(self, folder: Path):
        self.folder, self._net = folder, None

    def stats(self, name: str, images) -> FeatureStats:
        path = self.folder / f"{name}.npy"
        if not path.exists():
            self._net = self._net or load_judge()
            save_npy(path, collect_features(images().split(64), self._net.pooled).numpy())
        return FeatureStats.of(torch.from_numpy(np.load(path)))


def floor(run: Run, judge: Judge, truth: FeatureStats, images: torch.Tensor) -> dict[str, float]:
    """Distances that no renderer can beat: test images through the VQGAN, and real training images."""
    tokens = run.train_vqgan().encode(images)
    decoded = run.train_vqgan().decode(tokens)
    train, _ = real_images(run.source, run.recipe.preprocess, spread(len(run.source), 5000))
    return {
        "reconstructed_test": fd(judge.stats("reconstructed", lambda: decoded), truth),
        "real_train_5000": fd(judge.stats("train5000", lambda: train), truth),
        "psnr_db": float(image_psnr(decoded / 255, images / 255).mean()),
        "vq_codes_used": len(tokens.unique()) / run.train_vqgan().vocab_size,
    }


def golden(run: Run, judge: Judge, truth: FeatureStats, images: torch.Tensor, seed: int) -> dict:
    """The AR renderer on the test images' own discriminative tokens: a perfect prior (Table 3, last rows)."""
    pipe = run.make_pipeline()
    pipe.sampling = replace(pipe.sampling, precision="bf16", batch_size=250)
    stats = judge.stats(f"golden_{seed}_{len(images)}", lambda: pipe.render(pipe.tokenizer.encode(images), seed))
    return {"seed": seed, METRIC: fd(stats, truth)}


def row(
    run: Run, judge: Judge, truth: FeatureStats, method: str, prior: str | None, renderer: str, args, seed: int
) -> dict:
    """Trains (or loads) the models of one method, samples, and measures."""
    pipe = run.make_pipeline(prior, renderer)
    name = f"{renderer}_{seed}_{args.num}"
    samples = judge.stats(name, lambda: sample(pipe, args.num, seed, Path(args.out) / f"{renderer}_{seed}.png"))
    models = [m for m in (prior, renderer) if m]
    flops = sum(
        training_flops(run.sequence_config(m)) * (c := run.training_config(m)).num_steps * c.batch_size for m in models
    )
    return {
        "method": method,
        "seed": seed,
        METRIC: fd(samples, truth),
        "training_pflops": flops / 1e15,
        "steps": {m: run.training_config(m).num_steps for m in models},
        "training_seconds": sum(last_metrics(run.out / m)["seconds"] for m in models),
    }


def sample(pipe: DigitPipeline, num: int, seed: int, picture: Path) -> torch.Tensor:
    """Samples `num` images, evenly over the classes, and saves a grid of ten per class."""
    sampling = replace(pipe.sampling, precision="bf16", batch_size=250)
    if pipe.prior is None and not pipe.renderer.cfg.masked:
        sampling = replace(sampling, renderer=StageSampling(top_p=pipe.sampling.renderer.top_p))
    pipe.sampling = sampling
    images = pipe.generate(num, None, seed=1_000_000 * seed)
    classes = max(1, len(pipe.classes))
    shown = torch.cat([images[k::classes][:10] for k in range(classes)])
    plots.save_png(picture, plots.grid(shown, 10, row_names=pipe.classes))
    return images


def summary(results: dict) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds by method."""
    values = {m: [r[METRIC] for r in results["rows"] if r["method"] == m] for m in METHODS}
    return {
        m: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, "values": v}
        for m, v in values.items()
    }


def table(results: dict) -> str:
    """Formats a Markdown table."""
    lines = [f"| method | {METRIC} (mean ± sd) | seeds |", "|---|---|---|"]
    for method, s in results["summary"].items():
        lines.append(f"| {method} | {s['mean']:.2f} ± {s['std']:.2f} | {', '.join(f'{v:.2f}' for v in s['values'])} |")
    values = [r[METRIC] for r in results["golden"]]
    lines.append(f"| AR renderer on the test images' own discriminative tokens | {np.mean(values):.1f} | {values} |")
    f = results["floor"]
    lines.append(f"| test images through the VQGAN (floor) | {f['reconstructed_test']:.2f} | |")
    lines.append(f"| 5000 real training images | {f['real_train_5000']:.2f} | |")
    return "\n".join(lines) + "\n" + json.dumps({k: f[k] for k in ("psnr_db", "vq_codes_used")}) + "\n"


if __name__ == "__main__":
    main()
