"""Does the stability of tokens predict how well a model generates from them? Twelve tokenizers, all else equal.

    python bench/stability_generation.py DATA --out runs/stability_generation

DATA is CIFAR-10 in the Hub's layout. Every tokenizer gives an image of 64 px 8 x 8 tokens, and gets the same images,
prior and decoder: a prior of `cifar` and a renderer straight to pixels that starts from the carried VQGAN's decoder.
VQ tokens have no renderer: the VQGAN itself is tuned by the same losses and for as many updates. Measured on test
images that no model saw:

    change     share of the tokens that noise of 20 dB changes (paper, Table 1); less is more stable
    own        distance of pictures rendered from the test images' own tokens: what the tokens keep
    probe      accuracy of a linear classifier on an image's mean code vector
    generation distance of class-conditional samples; fd_efficientnet_lite2, which is not FID

The table ends with Spearman's rank correlation of each with generation, and its interval by the bootstrap over
tokenizers. Finished parts are read, not made again; `--only NAME` makes some rows.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_judge import CifarJudge, save_class_rows
from digit.metrics.judge import fit_linear_classifier
from digit.metrics.stability import StabilityConfig, measure_stability
from digit.models.tokenizer import ImageTokenizer
from digit.runs.fit import Run
from digit.runs.pretrain import PretrainConfig, pretrain
from digit.runs.recipes import Recipe, get_recipe, with_settings
from digit.runs.report import real_images, spread
from digit.runtime import plots
from digit.runtime.files import write_json
from digit.runtime.progress import quiet
from digit.training.ssl.train import MethodName, SSLConfig

SNR, NUM_STABILITY, NUM_PROBE = 20.0, 1000, 4000  # dB; test images; training images, half of them to fit
PRIOR_STEPS, RENDERER_STEPS = 500, 250
PRETRAIN_STEPS = 1500
RESAMPLES = 10_000
MEASURES = {"change": "tokens that change at 20 dB", "own": "distance from own tokens", "probe": "linear probe"}


@dataclass(frozen=True)
class Row:
    """A tokenizer: settings of the recipe, or a method by which its encoder is trained on the same images."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    method: MethodName | None = None
    steps: int = PRETRAIN_STEPS
    vq: bool = False


LITE, PCA = {"encoder.layer": -6}, {"kmeans.pca": 16, "kmeans.whiten": True}
ROWS = {
    "EfficientNet, stride 16": Row(LITE),
    "EfficientNet, stride 16, earlier": Row({"encoder.layer": -9}),
    "EfficientNet, stride 8": Row({"encoder.layer": -12, "encoder.input_size": 64, "preprocess.encoder_size": 64}),
    "EfficientNet, 16 codes": Row(LITE | {"kmeans.num_clusters": 16}),
    "EfficientNet, 16 components, whitened": Row(LITE | PCA),
    "EfficientNet, residual, 2 levels": Row(LITE | {"quantizer": "residual_kmeans", "residual_kmeans.num_levels": 2}),
    "one code (ignores the picture)": Row(LITE | {"kmeans.num_clusters": 1}),
    "ViT, random weights": Row(method="ibot", steps=0),
    "ViT, MAE": Row(method="mae"),
    "ViT, MoCo v3": Row(method="moco"),
    "ViT, iBOT": Row(method="ibot"),
    "VQGAN": Row(vq=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", help="CIFAR-10 in the Hub's layout")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", action="append", choices=ROWS, help="these rows alone; give it several times")
    parser.add_argument("--images", type=int, default=12_000, help="training images, spread evenly")
    parser.add_argument("--num", type=int, default=1000, help="samples, and test images rendered from their own tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet()
    study = Comparison(args.data, args.out, args.images, args.num, args.seed)
    for name in args.only or ROWS:
        say(f"{name}: {study.measure(name)}")
    found = study.found()
    if len(found) > 3:
        say(study.write(found))


class Comparison:
    """Shared images, judge and budget of all tokenizers."""

    def __init__(self, data: str, out: Path, images: int, num: int, seed: int) -> None:
        self.out, self.num, self.seed = out, num, seed
        base = get_recipe("cifar_pixels")
        self.recipe = replace(
            base,
            seed=seed,
            kmeans=replace(base.kmeans, num_clusters=1024),
            codebook_subset=1 / 3,
            prior_training=replace(base.prior_training, num_steps=PRIOR_STEPS, warmup_steps=PRIOR_STEPS // 10),
            pixels_training=replace(
                base.pixels_training,
                num_steps=RENDERER_STEPS,
                warmup_steps=RENDERER_STEPS // 10,
                adversarial_start=RENDERER_STEPS // 4,
            ),
            sampling=replace(base.sampling, precision="bf16", batch_size=125),
        )
        out.mkdir(parents=True, exist_ok=True)
        self.judge = CifarJudge(data, self.recipe.preprocess, out)
        self.source = self.judge.source.limit(images)

    def path(self, name: str) -> Path:
        return self.out / f"{slug(name)}_{self.seed}"

    def measure(self, name: str) -> dict[str, float]:
        """Trains what is missing of a row, and writes its figures to OUT/NAME_SEED/figures.json."""
        folder, row = self.path(name), ROWS[name]
        if (path := folder / "figures.json").exists():
            return json.loads(path.read_text())
        run = Run(self.recipe_of(row, self.out / f"{slug(name)}_encoder"), self.source, folder / "run", chosen=())
        pipe = run.make_pipeline(*((None, "vq_ar") if row.vq else ("prior", "renderer_pixels")))
        tests, labels = self.judge.test_images[: self.num], self.judge.test_labels
        tokenizer: Any = pipe.vq if row.vq else pipe.tokenizer
        tokens = tokenizer.encode(tests)
        drawn = pipe.generate(self.num, None, seed=1_000_000 * (1 + self.seed))
        key, classes = slug(name) + f"_{self.seed}", torch.arange(self.num) % len(pipe.classes)
        own = self.judge.figures(
            f"{key}_own", lambda: pipe.vq.decode(tokens) if row.vq else pipe.render(tokens, 0), labels
        )
        samples = self.judge.figures(f"{key}_samples", lambda: drawn, classes)
        figures = {
            "change": self.change(tokenizer),
            "own": own["fd"],
            "probe": self.probe(tokenizer),
            "generation": samples["fd"],
            "recall": samples["recall"],
            "recognised": samples["recognised"],
        }
        save_class_rows(folder / "samples.png", drawn, pipe.classes)
        write_json(path, figures)
        return figures

    def recipe_of(self, row: Row, folder: Path) -> Recipe:
        """The recipe of a row; trains its encoder in `folder` where it has one of its own."""
        if row.vq:
            training = replace(
                get_recipe("paper_cifar").vqgan_training,
                num_steps=RENDERER_STEPS,
                adversarial_weight=self.recipe.pixels_training.adversarial_weight,
                adversarial_start=RENDERER_STEPS // 4,
            )
            return replace(  # the VQ-only model has the prior's shape, updates and guidance
                self.recipe,
                vqgan_training=training,
                renderer_kind="ar",
                renderer=replace(self.recipe.prior, prefix_dropout=0.1),
                renderer_training=replace(self.recipe.prior_training, num_steps=1),
                sampling=replace(self.recipe.sampling, renderer=self.recipe.sampling.prior),
            )
        settings = dict(row.settings)
        if row.method is not None:
            steps = max(1, row.steps)  # one update of nothing leaves random weights
            rate = 1e-3 if row.steps else 1e-12
            cfg = PretrainConfig(
                method=row.method,
                seed=self.seed,
                training=SSLConfig(num_steps=steps, learning_rate=rate, warmup_steps=min(100, steps - 1)),
            )
            pretrain(self.source, cfg, folder)
            settings |= {
                "encoder.name": f"folder:{folder / 'encoder'}",
                "encoder.layer": -3,
                "encoder.input_size": cfg.image_size,
                "preprocess.encoder_size": cfg.image_size,
            }
        return with_settings(self.recipe, settings)

    def change(self, tokenizer: ImageTokenizer) -> float:
        batches = self.judge.test_images[:NUM_STABILITY].split(100)
        found = measure_stability({"it": tokenizer}, batches, StabilityConfig(snrs=(SNR,)))
        return round(found["tokenizers"]["it"]["token_change"][0]["value"], 4)

    def probe(self, tokenizer: ImageTokenizer) -> float:
        rows = spread(len(self.source), NUM_PROBE)
        images, labels = real_images(self.source, self.recipe.preprocess, rows)
        x = torch.cat([tokenizer.embed(tokenizer.encode(part)).float().mean(1) for part in images.split(100)])
        classifier = fit_linear_classifier(x[::2], labels[::2], num_classes=len(self.source.classes))
        return round(classifier.accuracy(x[1::2], labels[1::2]), 4)

    def found(self) -> dict[str, dict[str, float]]:
        """The figures of all finished rows."""
        paths = {name: self.path(name) / "figures.json" for name in ROWS}
        return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}

    def write(self, found: Mapping[str, Mapping[str, float]]) -> str:
        """Table, correlations and figure of the rows, in OUT; returns the table."""
        lines = [
            f"| tokenizer | {' | '.join(MEASURES.values())} | generation | recall | recognised |",
            "|---" * 7 + "|",
        ]
        for name, values in sorted(found.items(), key=lambda item: item[1]["generation"]):
            numbers = [f"{values['change']:.3f}", f"{values['own']:.1f}", f"{values['probe']:.3f}"]
            numbers += [f"{values['generation']:.1f}", f"{values['recall']:.2f}", f"{values['recognised']:.2f}"]
            lines.append(f"| {name} | {' | '.join(numbers)} |")
        generation = np.array([values["generation"] for values in found.values()])
        ranks: dict[str, dict[str, float]] = {}
        for key, words in MEASURES.items():
            x = np.array([values[key] for values in found.values()])
            ranks[key] = rank_correlation(x, generation)
            low, high = ranks[key]["low"], ranks[key]["high"]
            lines.append(
                f"\n{words} and generation: rank correlation {ranks[key]['value']:+.2f} [{low:+.2f}, {high:+.2f}]"
            )
        with plots.panels(self.out / "stability_generation.png", 3, size=(5.4, 4.6)) as axes:
            for plot, (key, words) in zip(axes[0], MEASURES.items(), strict=True):
                for number, (name, values) in enumerate(found.items(), 1):
                    plot.scatter(
                        values[key], values["generation"], s=40, label=f"{number} {name}", color=f"C{number % 10}"
                    )
                    plot.annotate(f" {number}", (values[key], values["generation"]))
                plot.set(xlabel=words, title=f"rank correlation {ranks[key]['value']:+.2f}")
                plot.set_yscale("log")  # one code is many times as far as the rest
                plot.grid(alpha=0.3, which="both")
            axes[0, 1].set_xscale("log")
            for axis in (axes[0, 1].xaxis, *(plot.yaxis for plot in axes[0])):
                axis.set_major_formatter("{x:.0f}")
                axis.set_minor_formatter("{x:.0f}")
            axes[0, 0].set_ylabel("distance of samples (less is better)")
            axes[0, 2].legend(fontsize=7, loc="upper right")
        write_json(self.out / "stability_generation.json", {"rows": found, "rank_correlations": ranks})
        (self.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return "\n".join(lines)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Spearman's, with the 95% interval of the bootstrap over tokenizers."""
    from scipy.stats import rankdata

    def spearman(rows: np.ndarray) -> float:
        a, b = rankdata(x[rows]), rankdata(y[rows])
        return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0

    rng = np.random.default_rng(0)
    drawn = [spearman(rng.integers(len(x), size=len(x))) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": spearman(np.arange(len(x))), "low": float(low), "high": float(high)}


def slug(name: str) -> str:
    """A row's name as a file name."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
