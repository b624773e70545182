"""The paper's three main claims, each tested on the given data: holds, does not hold, or undecided.

1. Discriminative tokens change less under noise than VQ tokens, at every SNR (Table 1).
2. An autoregressive model generates better with discriminative tokens than with VQ tokens alone, at equal training
   FLOPs (Tables 3 and 4; unconditional here).
3. A linear probe of the prior on discriminative tokens is more accurate than one on VQ tokens (Table 2).
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from digit.metrics.frechet import FeatureStats
from digit.metrics.influence import frechet_difference
from digit.metrics.intervals import Interval, seeds_interval
from digit.reproduce.experiment import Experiment, Outcome, Step
from digit.reproduce.study import Study
from digit.reproduce.tables import (
    METHODS,
    Method,
    best_top1,
    listed,
    over_seeds,
    parts_step,
    probe_step,
    protocol,
    samples_of,
    scores_step,
    shown,
    stability_step,
    training_steps,
    whiskers,
)
from digit.runtime import distributed, plots

MIN_SEEDS = 3  # with fewer, the intervals of generation and probing are over images
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


def claims(study: Study) -> Experiment:
    """All three claims, on one set of unconditional models for each seed."""
    study.require_labels("the claim on probing")
    seeds, compared = study.scale.seeds, [METHODS["DiGIT + AR"], METHODS["VQ-only AR"]]
    steps = [parts_step(study), stability_step(study)]
    for seed in seeds:
        steps += training_steps(study, compared, seed, False)
        steps += [scores_step(study, method, seed, False) for method in compared]
        steps += [probe_step(study, model, seed) for model in ("prior", "vq_ar")]
    if len(seeds) < MIN_SEEDS:
        steps.append(difference_step(study, compared[0], compared[1], seeds[0]))

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        distance = study.network.metric("fd")

        def over(pattern: str, metric: Callable[[dict[str, Any]], float]) -> list[float]:
            return [metric(results[pattern.format(seed=seed)]) for seed in seeds]

        distances = [over(f"plain_{model}_{{seed}}_samples", lambda r: r[distance]) for model in ("renderer", "vq_ar")]
        top1 = [over(f"plain_{model}_{{seed}}_probe", best_top1) for model in ("prior", "vq_ar")]
        if len(seeds) < MIN_SEEDS:
            probes = [results[f"plain_{model}_{seeds[0]}_probe"]["best"]["top1"] for model in ("prior", "vq_ar")]
            generation = images_claim(distances[0], distances[1], results["difference"], lower_is_better=True)
            probe = images_claim(top1[0], top1[1], top1_difference(*probes).to_dict(), lower_is_better=False)
        else:
            generation = seeds_claim(distances[0], distances[1], lower_is_better=True)
            probe = seeds_claim(top1[0], top1[1], lower_is_better=False)
        verdicts = {"stability": stability_claim(results["stability"]), "generation": generation, "probe": probe}
        plots_of_claims = plot_claims(study, verdicts, distance, out)
        budgets = {m: results[f"plain_{m}_{seeds[0]}"] for m in ("prior", "renderer", "vq_ar")}
        text = table(study, verdicts, distance) + "\n\n" + conditions(study, budgets)
        return Outcome(table=text, metrics=verdicts | {"budgets": budgets}, pictures=plots_of_claims)

    return Experiment(title="The paper's three claims", steps=steps, summarise=summarise)


def verdict(difference: Interval | None) -> str:
    """Verdict of a claim that its difference lies below 0."""
    if difference is None or difference.low <= 0 <= difference.high:
        return UNDECIDED
    return HOLDS if difference.high < 0 else FAILS


def stability_claim(result: dict[str, Any]) -> dict[str, Any]:
    """Holds where discriminative tokens change less than VQ tokens at every SNR, by the intervals over images."""
    pair = next(d for d in result["differences"] if (d["first"], d["second"]) == ("discriminative", "vq"))
    differences = [Interval(d["value"], d["low"], d["high"]) for d in pair["token_change"]]
    verdicts = [verdict(d) for d in differences]
    overall = HOLDS if set(verdicts) == {HOLDS} else FAILS if FAILS in verdicts else UNDECIDED
    return {
        "verdict": overall,
        "snrs": result["protocol"]["snrs"],
        "differences": [d.to_dict() for d in differences],
        "verdicts": verdicts,
    }


def difference_step(study: Study, first: Method, second: Method, seed: int) -> Step:
    """Step: difference of two methods' distances, its interval over their samples (infinitesimal jackknife)."""

    def make() -> dict[str, Any]:
        pair = [samples_of(study, method, seed, False).pooled for method in (first, second)]
        images = study.reference.pooled

        def difference() -> dict[str, Any]:
            reference = FeatureStats.of(images)
            return frechet_difference(pair[0], pair[1], reference.mean, reference.cov, paired=False).to_dict()

        return distributed.on_main(difference)

    return Step(name="difference", seconds=study.costs.images("judge", study.scale.num_samples), make=make)


def top1_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Interval:
    """p1 - p2 in %, the interval from those of both accuracies (Newcombe 1998, method 10), {"value", "low", "high"}.

    low = d - sqrt((p1 - l1)² + (u2 - p2)²), high = d + sqrt((u1 - p1)² + (p2 - l2)²). It takes the two sets of test
    images as independent; they are the same images, so that the true interval is, as a rule, narrower.
    """
    value = first["value"] - second["value"]
    below = math.hypot(first["value"] - first["low"], second["high"] - second["value"])
    above = math.hypot(first["high"] - first["value"], second["value"] - second["low"])
    return Interval(100 * value, 100 * (value - below), 100 * (value + above))


def seeds_claim(ours: list[float], theirs: list[float], *, lower_is_better: bool) -> dict[str, Any]:
    """Mean difference over seeds with Student's interval, of at least MIN_SEEDS seeds; undecided with one."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    interval = seeds_interval(differences) if len(differences) > 1 else None
    return judged_claim(ours, theirs, interval, "seeds", lower_is_better=lower_is_better)


def images_claim(
    ours: list[float], theirs: list[float], difference: Mapping[str, Any], *, lower_is_better: bool
) -> dict[str, Any]:
    """Difference of the first seed with its interval over images; undecided where there is none.

    It says nothing of another training run: a claim that holds by it holds of these two models.
    """
    found = None if "missing" in difference else Interval(**{end: difference[end] for end in ("value", "low", "high")})
    return judged_claim(ours, theirs, found, "images", lower_is_better=lower_is_better)


def judged_claim(
    ours: list[float], theirs: list[float], interval: Interval | None, over: str, *, lower_is_better: bool
) -> dict[str, Any]:
    """The verdict on a difference, with what its interval is taken over: seeds or images."""
    claimed_below_0 = interval
    if interval is not None and not lower_is_better:
        claimed_below_0 = Interval(-interval.value, -interval.high, -interval.low)
    return {
        "verdict": verdict(claimed_below_0),
        "digit": ours,
        "vq_only": theirs,
        "difference": None if interval is None else interval.to_dict(),
        "interval_over": over,
    }


def table(study: Study, verdicts: dict[str, Any], distance: str) -> str:
    """The verdicts with their metrics, as Markdown."""
    generation, probe, stable = verdicts["generation"], verdicts["probe"], verdicts["stability"]
    snr, worst = max(zip(stable["snrs"], stable["differences"], strict=True), key=lambda pair: pair[1]["high"])
    better, gain = (
        shown(claim["difference"], 3, missing="none") + f", over {claim['interval_over']}"
        for claim in (generation, probe)
    )
    lines = [
        "| claim | verdict | DiGIT | VQ-only | difference [95% interval] | paper |",
        "|---|---|---|---|---|---|",
        f"| tokens change less under noise, at every SNR | **{stable['verdict']}** | | | "
        f"worst at {snr:g} dB: {shown(worst, 3)} | -0.07 to -0.35, every SNR |",
        f"| generates better ({distance}) | **{generation['verdict']}** | {over_seeds(generation['digit'])} | "
        f"{over_seeds(generation['vq_only'])} | {better} | FID 9.13 against 24.38 |",
        f"| probes better (top-1, %) | **{probe['verdict']}** | {over_seeds(probe['digit'])} | "
        f"{over_seeds(probe['vq_only'])} | {gain} | 71.7 against 61.8 (VIM + VQGAN) |",
    ]
    return "\n".join(lines)


def conditions(study: Study, budgets: dict[str, dict[str, float]]) -> str:
    """Conditions of the verdicts, as text: budgets, sampling, tokens, intervals."""
    pflops = {model: budget["training_pflops"] for model, budget in budgets.items()}
    images = {model: budget["images"] for model, budget in budgets.items()}
    sampling, tokens = study.recipe.sampling, study.recipe.encoder
    encoder_training = study.base.encoder.describe().get("training", "training unknown")
    ratio = pflops["vq_ar"] / pflops["prior"]
    return (
        f"{protocol(study)} Unconditional models. Training: prior {pflops['prior']:.2g} and renderer "
        f"{pflops['renderer']:.2g} PFLOPs ({images['prior']} and {images['renderer']} images), VQ-only "
        f"{pflops['vq_ar']:.2g} ({images['vq_ar']}): equal for the claim on generation, while the probe compares the "
        f"prior alone with {ratio:.2g} times its compute. Top-p {sampling.prior.top_p:g} of the prior, "
        f"{sampling.renderer.top_p:g} of renderer and VQ-only, not tuned for either. Tokens: {tokens.name}, "
        f"{encoder_training}, K = {study.recipe.quantizer_cfg.vocab_size}; the probe benefits from classes that an "
        "encoder was trained on. Intervals: bootstrap over images, for all SNRs together (stability); "
        f"{of_the_others(study)}"
    )


def of_the_others(study: Study) -> str:
    """What the intervals of the claims on generation and probing rest on, as text."""
    if len(study.scale.seeds) >= MIN_SEEDS:
        seeds = listed(study.scale.seeds)
        return f"Student's t over seeds {seeds} of the models, on one codebook and one VQGAN (the others)."
    return (
        f"over images of seed {study.scale.seeds[0]} alone (the others): samples for the distance, by the "
        "infinitesimal jackknife, test images for the probe, by Newcombe's; another training run may differ by more, "
        f"and fewer than {MIN_SEEDS} seeds cannot say by how much."
    )


def plot_claims(study: Study, verdicts: dict[str, Any], distance: str, out: Path) -> list[Path]:
    """Save one plot per claim and return their paths; the stability plot is that of the stability evaluation."""
    paths = [study.out / "stability" / "stability.png"]
    for claim, label in (("generation", distance), ("probe", "top-1 accuracy, %")):
        path = out / f"{claim}.png"
        plots.bars_png(
            path,
            {"DiGIT": whiskers(verdicts[claim]["digit"]), "VQ-only": whiskers(verdicts[claim]["vq_only"])},
            xlabel=label,
        )
        paths.append(path)
    return paths
