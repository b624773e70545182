"""Equations 1 to 6 of the paper, measured: D_H and D_G of both latent spaces, their sum, and the generated images.

    D_H  (Eq. 3)  D(P_h(f(X)), P_X)     the test images' own tokens, decoded, against the test images
    D_G  (Eq. 4)  D(P_g(Z), P_f(X))     generated tokens against the test images' own tokens
    Eq. 1         D(P_h(g(Z)), P_X)     generated images against the test images (gFID)

What is an estimate of what: the infima over decoders and generators become the models that were trained. D is the
Fréchet distance of a judge network, which compares images and no tokens; so both sides of D_G are decoded by one h.
The squared 2-Wasserstein distance of Gaussians obeys no triangle inequality, its root does: Equation 5's sum may lie
below the distance of the generated images, and (sqrt D_H + sqrt D_G)^2 never does, if all sets are equally large.
"""

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from digit.metrics.judge import Judged, fd
from digit.reproduce.experiment import Experiment, Outcome, Step
from digit.reproduce.study import Study
from digit.reproduce.tables import (
    Method,
    floor,
    floor_step,
    golden,
    golden_step,
    methods_of,
    parts_step,
    protocol,
    samples_of,
    scores_step,
    training_steps,
)
from digit.runtime import distributed, plots

REPORTED = {  # (D_H, generated images): Table 3, validation data and unconditional rows; D_G is in no table
    "DiGIT + AR": (1.92, 9.13),
    "VQ-only AR": (1.67, 24.38),
    "VQ-only AR, own epochs": (1.67, 24.38),
}


def latent(study: Study) -> Experiment:
    """D_H, D_G, their sum and the generated images, for discriminative and VQ tokens; one seed, unconditional."""
    seed, methods = study.scale.seeds[0], {n: m for n, m in methods_of(study).items() if n in REPORTED}
    steps = [parts_step(study), *training_steps(study, methods.values(), seed, False)]
    steps += [scores_step(study, method, seed, False) for method in methods.values()]
    steps += [golden_step(study, False), floor_step(study)]
    steps += [distances_step(study, method, seed) for method in methods.values()]

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        rows = {name: results[f"latent_{method.renderer}"] for name, method in methods.items()}
        picture = out / "latent.png"
        bars = {f"{name}: {part}": (row[part],) * 3 for name, row in rows.items() for part in ("D_H", "D_G")}
        plots.bars_png(picture, bars, xlabel=study.network.metric("fd"))
        return Outcome(table=f"{to_table(rows)}\n\n{notes(study, rows)}", metrics={"rows": rows}, pictures=[picture])

    return Experiment(title="Equations 1 to 6: what the latent space costs", steps=steps, summarise=summarise)


def distances_step(study: Study, method: Method, seed: int) -> Step:
    """Step: D_H, D_G and the distance of the generated images of one method."""
    decoded: Callable[[], Judged] = (lambda: golden(study, False)) if method.prior else (lambda: floor(study))

    def make() -> dict[str, float]:
        own, generated = decoded().pooled, samples_of(study, method, seed, False).pooled
        images = study.reference.pooled
        return distributed.on_main(lambda: distances(images, own, generated))

    seconds = study.costs.images("judge", study.scale.num_samples) / 10
    return Step(name=f"latent_{method.renderer}", seconds=seconds, make=make)


def distances(images: Tensor, own: Tensor, generated: Tensor) -> dict[str, float]:
    """The distances of the table, from features (N, D) of the test images, of their decoded own tokens, of samples."""
    d_h, d_g = fd(own, images), fd(generated, own)
    bound = (sqrt(d_h) + sqrt(d_g)) ** 2
    return {"D_H": d_h, "D_G": d_g, "sum": d_h + d_g, "generated": fd(generated, images), "bound": bound}


def to_table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown: one row for each latent space and its generator."""
    alone = "VQ-only AR, own epochs" not in rows
    lines = [
        "| method | D_H (Eq. 3) | D_G (Eq. 4) | D_H + D_G (Eq. 5) | generated (Eq. 1) | (√D_H + √D_G)² | paper: D_H, "
        "generated |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = " | ".join(f"{row[part]:.4g}" for part in ("D_H", "D_G", "sum", "generated", "bound"))
        reported = REPORTED[name] if name != "VQ-only AR" or alone else None  # of 200 epochs
        lines.append(f"| {name} | {cells} | {', '.join(map(str, reported or ()))} |")
    return "\n".join(lines)


def notes(study: Study, rows: dict[str, dict[str, float]]) -> str:
    """Which latent space is better by which distance, and what the distances are, as text."""
    lowest = {part: min(rows, key=lambda name: rows[name][part]) for part in ("D_H", "D_G", "sum", "generated")}
    return (
        f"Lowest D_H: {lowest['D_H']}; lowest D_G: {lowest['D_G']}; lowest sum: {lowest['sum']}; best images: "
        f"{lowest['generated']}. Paper (2.1): the latent space that reconstructs best need not be the best to generate "
        f"in, that of the lowest sum is. {protocol(study)} D_H: test images decoded from their own tokens, against the "
        "test images. D_G: samples against the same decoded tokens, since the judge compares images and no tokens. The "
        "models that were trained stand for the infima over decoders and generators. One seed."
    )
