"""Tables 1 to 4 of the paper: stability, linear probe, unconditional and class-conditional generation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.errors import DigitError
from digit.evaluation import paper, stability
from digit.evaluation import probe as probing
from digit.metrics.frechet import count_warnings
from digit.metrics.intervals import Interval, seeds_interval
from digit.metrics.stability import StabilityConfig
from digit.models.sequence import training_flops
from digit.reproduce.experiment import Experiment, Needs, Outcome, Step
from digit.reproduce.study import BATCH_SIZE, Study, as_tensor, variant
from digit.runs.fit import Run
from digit.runs.roles import get_role
from digit.runtime import distributed, plots
from digit.training.log import last_metrics

METHODS: dict[str, tuple[str | None, str]] = {  # name -> (prior, renderer)
    "DiGIT + AR": ("prior", "renderer"),
    "DiGIT + MaskGIT": ("prior", "renderer_masked"),
    "VQ-only AR": (None, "vq_ar"),
    "VQ-only MaskGIT": (None, "vq_masked"),
}


# -------------------------------------------------------------------- steps


def parts_step(study: Study) -> Step:
    """Step: codebook, VQGAN and tokens of the base run."""
    rows = len(study.train) * study.recipe.crops_per_image

    def make() -> dict[str, Any]:
        run = study.base
        return {
            "codebook": run.fit_codebook().summary(),
            "rows": len(run.write_tokens()),
            "vq_codes": run.train_vqgan().vocab_size,
        }

    return Step(name="parts", seconds=study.costs.parts(len(study.train), rows), make=make, needs=Needs(tokens=rows))


def training_step(study: Study, model: str, seed: int, conditional: bool) -> Step:
    """Step: one trained model, with images seen, FLOPs, seconds and likelihood."""
    name = f"{variant(conditional)}_{model}_{seed}"
    return Step(
        name=name,
        seconds=study.costs.model(model),
        make=lambda: trained(study.seeded(seed, conditional=conditional), model),
        needs=Needs(models=((model, replace(study.recipe, class_conditional=conditional)),)),
    )


def trained(run: Run, model: str) -> dict[str, Any]:
    """Train a model of a run, unless it is trained; returns its cost and likelihood."""
    run.train_model(model)
    cfg, last = run.training_config(model), distributed.on_main(lambda: last_metrics(run.out / model))
    images = cfg.num_steps * cfg.batch_size
    flops = training_flops(run.sequence_config(model)) * images
    return {"images": images, "training_pflops": flops / 1e15, "seconds": last["seconds"], "nll": last["nll"]}


def samples_step(study: Study, method: str, seed: int, conditional: bool) -> Step:
    """Step: scores of the samples of one method and seed."""
    prior, renderer = METHODS[method]
    label = f"{variant(conditional)}_{renderer}"

    def make() -> dict[str, Any]:
        run = study.seeded(seed, conditional=conditional)
        return study.scores(study.samples(label, run, prior, renderer, seed))

    count = study.scale.num_samples
    seconds, needs = study.costs.sampling(count), Needs(images=count)
    return Step(name=f"{label}_{seed}_samples", seconds=seconds, make=make, needs=needs)


def probe_step(study: Study, model: str, seed: int) -> Step:
    """Step: linear probe of every layer of an unconditional model, prior or vq_ar."""
    rows = len(study.train) * study.recipe.crops_per_image + len(study.test)

    def make() -> dict[str, Any]:
        run = study.seeded(seed)
        study.prepare(run, model)
        return distributed.on_main(lambda: probed(study, run, model, study.out / "probes" / f"{model}_{seed}"))

    return Step(name=f"plain_{model}_{seed}_probe", seconds=study.costs.images("probe", rows), make=make, version=2)


def probed(study: Study, run: Run, model: str, out: Path) -> dict[str, Any]:
    """Probe one model of a run on the training tokens and the test images' tokens."""
    kind, network = get_role(model).target, run.train_model(model)
    stores = (run.write_tokens(), study.test_tokens(run))
    features = [
        probing.prior_features(network, as_tensor(getattr(store, kind)), batch_size=BATCH_SIZE, precision="bf16")
        for store in stores
    ]
    labels = [as_tensor(store.labels) for store in stores]
    if min(int(split.min()) for split in labels) < 0:
        raise DigitError(f"{study.train.name} has images without a class: a probe needs one for each image")
    crops = run.recipe.crops_per_image
    result = probing.probe_features(
        {model: (features[0], features[1])},
        labels[0],
        labels[1],
        study.scale.probe,
        out=out,
        notes={model: probing.notes_on(network)},
        about={"crops": f"{crops} at random (with flips) of each training image, one in the centre of a test image"},
        groups=torch.arange(len(labels[0])) // crops,
    )
    return result["probes"][model] | {"protocol": result["protocol"]}


# -------------------------------------------------------------------- Table 1


def table1(study: Study) -> Experiment:
    """Stability of both tokenizers under pixel noise."""
    return Experiment(
        title="Table 1: stability of the latent spaces under noise",
        steps=[parts_step(study), stability_step(study)],
        summarise=lambda results, out: Outcome(
            table=stability.to_table(results["stability"]),
            metrics=results["stability"],
            pictures=[study.out / "stability" / "stability.png"],
        ),
    )


def stability_step(study: Study) -> Step:
    """Step: token change and cosine at every SNR; the intervals hold for all SNRs together (Bonferroni)."""
    count = study.scale.num_stability

    def make() -> dict[str, Any]:
        run = study.base
        tokenizers = {"discriminative": run.tokenizer(), "vq": run.train_vqgan()}
        cfg = StabilityConfig(seed=study.recipe.seed, confidence=1 - 0.05 / len(StabilityConfig().snrs))  # Bonferroni
        images, out = study.some_test_images(count), study.out / "stability"
        return stability.run_stability(tokenizers, images, study.recipe.preprocess, cfg, out=out, name=study.test.name)

    noisy = count * (1 + len(StabilityConfig().snrs))
    return Step(name="stability", seconds=study.costs.images("tokens", noisy), make=make, version=2)


# -------------------------------------------------------------------- Table 2


def table2(study: Study) -> Experiment:
    """Linear probe of the unconditional models, best layer."""
    study.require_labels("a linear probe")
    models = {"DiGIT": "prior", "VQ-only AR": "vq_ar"}
    reported = {"DiGIT": "71.7 (219 M), 80.3 (732 M)", "VQ-only AR": "61.8 (VIM + VQGAN, 650 M)"}
    seeds = study.scale.seeds
    steps = [parts_step(study)]
    for seed in seeds:
        for model in models.values():
            steps += [training_step(study, model, seed, False), probe_step(study, model, seed)]

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        top1 = {
            method: [best_top1(results[f"plain_{model}_{seed}_probe"]) for seed in seeds]
            for method, model in models.items()
        }
        lines = ["| method | top-1, best layer, % | seeds | paper (ImageNet) |", "|---|---|---|---|"]
        for method, values in top1.items():
            lines.append(f"| {method} | {over_seeds(values)} | {listed(values)} | {reported[method]} |")
        picture = out / "table2.png"
        plots.bars_png(picture, {m: whiskers(v) for m, v in top1.items()}, xlabel="top-1 accuracy, %")
        return Outcome(table="\n".join(lines), metrics={"top1": top1, "paper": paper.TABLE2}, pictures=[picture])

    return Experiment(title="Table 2: linear probe of the autoregressive models", steps=steps, summarise=summarise)


def best_top1(result: dict[str, Any]) -> float:
    """Test accuracy in % of the layer that is best on held-out training images."""
    return 100 * result["best"]["top1"]["value"]


# -------------------------------------------------------------------- Tables 3 and 4


def table3(study: Study) -> Experiment:
    """Class-unconditional generation."""
    return generation(study, "Table 3: class-unconditional generation", False, paper.TABLE3)


def table4(study: Study) -> Experiment:
    """Class-conditional generation."""
    return generation(study, "Table 4: class-conditional generation", True, paper.TABLE4)


def generation(study: Study, title: str, conditional: bool, reported: dict[str, tuple[float, float]]) -> Experiment:
    """Four methods at equal training FLOPs, for every seed, and the two rows of validation data."""
    if conditional:
        study.require_labels(title)
    seeds, kind = study.scale.seeds, variant(conditional)
    steps = [parts_step(study)]
    for seed in seeds:
        for model in ("prior", "renderer", "renderer_masked", "vq_ar", "vq_masked"):
            steps.append(training_step(study, model, seed, conditional))
        steps += [samples_step(study, method, seed, conditional) for method in METHODS]
    steps += [golden_step(study, conditional), floor_step(study)]

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        rows = {
            method: [results[f"{kind}_{renderer}_{seed}_samples"] for seed in seeds]
            for method, (_, renderer) in METHODS.items()
        }
        rows["validation data: DiGIT + VQ"] = [results[f"{kind}_golden"]]
        rows["validation data: VQ only"] = [results["floor"]]
        costs = {
            method: sum(results[f"{kind}_{m}_{seeds[0]}"]["training_pflops"] for m in models if m)
            for method, models in METHODS.items()
        }
        return generation_outcome(study, rows, reported, out, costs)

    return Experiment(title=title, steps=steps, summarise=summarise)


def generation_outcome(
    study: Study,
    rows: Mapping[str, Sequence[Mapping[str, float]]],
    reported: dict[str, tuple[float, float]],
    out: Path,
    costs: Mapping[str, float] | None = None,
) -> Outcome:
    """Table, bar plot and metrics: distance and inception score by method, the paper's beside ours."""
    distance, score = study.network.metric("fd"), study.network.metric("is")
    lines = [
        f"| method | {distance} | {score} | images | training PFLOPs | paper FID | paper IS |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, by_seed in rows.items():
        fid, inception = reported.get(method, ("", ""))
        cost = f"{costs[method]:.3g}" if costs and method in costs else ""
        values = [over_seeds([row[name] for row in by_seed]) for name in (distance, score)]
        lines.append(
            f"| {method} | {values[0]} | {values[1]} | {by_seed[0]['images']} | {cost} | {fid} | {inception} |"
        )
    picture = out / "distances.png"
    plots.bars_png(
        picture, {m: whiskers([row[distance] for row in by_seed]) for m, by_seed in rows.items()}, xlabel=distance
    )
    num_seeds = max(len(by_seed) for by_seed in rows.values())
    spread = f" ± is one standard deviation over {num_seeds} seeds." if num_seeds > 1 else " One seed."
    counts = {row["images"] for by_seed in rows.values() for row in by_seed}
    unequal = " Fewer images alone give larger distances." if len(counts) > 1 else ""
    lines += ["", protocol(study) + spread + unequal]
    return Outcome(table="\n".join(lines), metrics={"rows": rows, "paper": reported}, pictures=[picture])


def protocol(study: Study) -> str:
    """Definition of the distances, as text."""
    rounding = study.base.train_vqgan().rounding
    compared = f"{study.scale.num_samples} samples ({rounding} 8 bits) against {len(study.reference)} test images"
    numbers = study.scale.num_samples, len(study.reference), study.reference.pooled.shape[1]
    warnings = "".join(f" Warning: {text}." for text in count_warnings(*numbers))
    if study.inception:
        return f"FID and IS by the Inception network {Path(study.inception).name}, {compared}.{warnings}"
    return (
        f"Distances on EfficientNet-Lite2 features, {compared}; they are not FID, and the paper's values beside "
        f"them are for ImageNet at 256 px.{warnings}"
    )


def golden_step(study: Study, conditional: bool) -> Step:
    """Step: the AR renderer on the test images' own discriminative tokens, as if from a perfect prior."""
    kind, count = variant(conditional), min(study.scale.num_samples, len(study.test))

    def make() -> dict[str, Any]:
        run = study.seeded(study.scale.seeds[0], conditional=conditional)
        pipe = study.sampler(run, "prior", "renderer")
        tokenizer = pipe.tokenizer
        assert tokenizer is not None

        def render(images: Tensor, first: int) -> Tensor:
            return pipe.render(tokenizer.encode(images), seed=first)

        return study.scores(study.test_judged(f"{kind}_golden", render, count))

    return Step(name=f"{kind}_golden", seconds=study.costs.sampling(count), make=make, needs=Needs(images=count))


def floor_step(study: Study) -> Step:
    """Step: VQGAN reconstructions of the test images, a lower bound for every renderer."""
    count = min(study.scale.num_samples, len(study.test))

    def make() -> dict[str, Any]:
        vq = study.base.train_vqgan()
        return study.scores(study.test_judged("floor", lambda images, _: study.reconstruct(vq, images), count))

    return Step(name="floor", seconds=study.costs.sampling(count), make=make, needs=Needs(images=count))


# -------------------------------------------------------------------- values as text


def over_seeds(values: Sequence[float]) -> str:
    """`mean ± standard deviation`, or the value alone if there is only one."""
    if len(values) == 1:
        return f"{values[0]:.4g}"
    mean = sum(values) / len(values)
    return f"{mean:.4g} ± {(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5:.2g}"


def listed(values: Sequence[float]) -> str:
    """The values, separated by commas."""
    return ", ".join(f"{value:.4g}" for value in values)


def whiskers(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of the 95% interval over seeds; three equal values for one seed."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    interval: Interval = seeds_interval(values)
    return interval.value, interval.low, interval.high


def shown(interval: dict[str, Any] | None, digits: int = 4, missing: str = "") -> str:
    """`123.4 [120.1, 126.7]`, `123.4 [–]` where no interval can be had, or `missing` for None."""
    if interval is None:
        return missing
    if "missing" in interval:
        return f"{interval['value']:.{digits}g} [–]"
    value, low, high = (f"{interval[end]:.{digits}g}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
