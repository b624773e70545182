"""Tables 1 to 4 of the paper: stability, linear probe, unconditional and class-conditional generation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from digit.evaluation import paper, stability
from digit.metrics.frechet import count_warnings
from digit.metrics.intervals import Interval, seeds_interval
from digit.metrics.judge import Judged
from digit.metrics.stability import StabilityConfig
from digit.reproduce.experiment import Experiment, Needs, Outcome, Step
from digit.reproduce.probes import model_probe_step
from digit.reproduce.study import Study
from digit.reproduce.variants import (
    Variant,
    folder_of,
    home,
    links_vq_tokens,
    made_parts,
    model_name,
    parts_run,
    recipe_of,
    run_name,
    run_of,
)
from digit.runs.fit import Run
from digit.runtime import distributed, plots
from digit.training.log import last_metrics


class Method(NamedTuple):
    """What a row of Table 3 or 4 samples with: models (names of ROLES) of one variant of the recipe."""

    prior: str | None
    renderer: str
    variant: Variant = "base"

    @property
    def models(self) -> tuple[str, ...]:
        """The models that it needs."""
        return (self.prior, self.renderer) if self.prior else (self.renderer,)


METHODS = {
    "DiGIT + AR": Method("prior", "renderer"),
    "DiGIT + MaskGIT": Method("prior", "renderer_masked"),
    "DiGIT + AR, large": Method("prior", "renderer", "large"),
    "VQ-only AR": Method(None, "vq_ar"),  # the compute of prior and renderer together
    "VQ-only AR, own epochs": Method(None, "vq_ar_epochs"),  # the paper's 200
    "VQ-only MaskGIT": Method(None, "vq_masked"),
}


def methods_of(study: Study) -> dict[str, Method]:
    """The methods that a study compares: the large recipe and the baseline's own epochs where its scale has them."""
    left_out = {"DiGIT + AR, large"} if not study.scale.large_rows else set()
    left_out |= {"VQ-only AR, own epochs"} if study.recipe.vq_only_steps is None else set()
    return {label: method for label, method in METHODS.items() if label not in left_out}


def vq_only(study: Study) -> str:
    """Label of the VQ-only baseline that the paper's 24.38 stands for: its own epochs where there is such a one."""
    return next(label for label in ("VQ-only AR, own epochs", "VQ-only AR") if label in methods_of(study))


def reported_of(study: Study, rows: Sequence[paper.Generation]) -> dict[str, tuple[float, float | str]]:
    """Label of our row -> the paper's (FID, IS); the VQ-only AR row stands for the one of 200 epochs if it is alone."""
    reported = paper.by_label(rows)
    if vq_only(study) == "VQ-only AR":
        reported["VQ-only AR"] = reported.pop("VQ-only AR, own epochs")
    return reported


# -------------------------------------------------------------------- steps


def parts_step(study: Study, name: Variant = "base") -> Step:
    """Step: codebook, VQGAN and tokens, as far as a variant of the recipe makes its own."""
    made, recipe = made_parts(study, name), recipe_of(study, name)

    def make() -> dict[str, Any]:
        run = parts_run(study, name)
        return {
            "codebook": run.fit_codebook().summary(),
            "rows": len(run.write_tokens()),
            "vq_codes": run.train_vqgan().vocab_size,
        }

    linked = name != "base" and links_vq_tokens(study, recipe, made)
    folders = tuple(f"runs/{name}/{part}" for part in made)
    needs = Needs(parts=made, recipe=recipe, linked=linked, folders=folders)
    seconds = study.costs.parts(len(study.train), made, recipe, linked=linked)
    return Step(name="parts" if name == "base" else f"{name}_parts", seconds=seconds, make=make, needs=needs)


def training_step(study: Study, model: str, seed: int, conditional: bool, variant: Variant = "base") -> Step:
    """Step: one trained model, with images seen, FLOPs, seconds and likelihood. Equal models are one step."""
    made_by, classes = home(study, variant, model, conditional)
    return Step(
        name=model_name(study, variant, model, seed, conditional),
        seconds=study.costs.model(model, recipe_of(study, made_by)),
        make=lambda: trained(run_of(study, made_by, seed, classes), model),
        needs=Needs(
            models=((model, replace(recipe_of(study, made_by), class_conditional=classes)),),
            folders=(f"runs/{folder_of(study, made_by, seed, classes).name}/{model}",),
        ),
    )


def model_steps(study: Study, model: str, seed: int, conditional: bool, variant: Variant = "base") -> list[Step]:
    """The steps to one trained model: the parts that its variant makes for itself, and its training."""
    own = made_parts(study, variant) if variant != "base" else ()
    parts = [parts_step(study, variant)] if own else []
    return [*parts, training_step(study, model, seed, conditional, variant)]


def training_steps(study: Study, methods: Iterable[Method], seed: int, conditional: bool) -> list[Step]:
    """The steps to the trained models of some methods."""
    return [
        step
        for method in methods
        for model in method.models
        for step in model_steps(study, model, seed, conditional, method.variant)
    ]


def trained(run: Run, model: str) -> dict[str, Any]:
    """Train a model of a run, unless it is trained; returns its cost and likelihood."""
    run.train_model(model)
    cfg, last = run.training_config(model), distributed.on_main(lambda: last_metrics(run.out / model))
    images = cfg.num_steps * cfg.batch_size
    flops = run.flops_per_image(model) * images
    return {"images": images, "training_pflops": flops / 1e15, "seconds": last["seconds"], "nll": last["nll"]}


def scores_step(study: Study, method: Method, seed: int, conditional: bool) -> Step:
    """Step: scores of the samples of one method and seed."""
    count, folder = study.scale.num_samples, f"judged/{samples_label(study, method, seed, conditional)}_*"
    return Step(
        name=samples_name(study, method, seed, conditional),
        seconds=study.costs.sampling(count, method.models, recipe_of(study, method.variant)),
        make=lambda: study.scores(samples_of(study, method, seed, conditional)),
        needs=Needs(images=count, folders=(folder,)),
    )


def samples_name(study: Study, method: Method, seed: int, conditional: bool) -> str:
    """Name of the step of a method's scores. A variant that changes none of the models has the base's samples."""
    return f"{samples_label(study, method, seed, conditional)}_samples"


def samples_label(study: Study, method: Method, seed: int, conditional: bool) -> str:
    """What a method's samples are called: plain_renderer_0."""
    return run_name(sampled_as(study, method), seed, conditional, method.renderer)


def sampled_as(study: Study, method: Method) -> Variant:
    """The variant whose samples a method has: the base where every model is the base's."""
    homes = {home(study, method.variant, model, False)[0] for model in method.models}
    return "base" if homes == {"base"} else method.variant


def samples_of(study: Study, method: Method, seed: int, conditional: bool) -> Judged:
    """Features of the samples of one method and seed, from models that are trained."""
    run = run_of(study, sampled_as(study, method), seed, conditional)
    label = samples_label(study, method, seed, conditional)
    return study.samples(label.removesuffix(f"_{seed}"), run, method.prior, method.renderer, seed)


def probe_step(study: Study, model: str, seed: int, variant: Variant = "base") -> Step:
    """Step: linear probe of every layer of an unconditional model, prior or vq_ar."""
    name, recipe = model_name(study, variant, model, seed, False), recipe_of(study, variant)
    return model_probe_step(study, f"{name}_probe", name, model, recipe, lambda: run_of(study, variant, seed, False))


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
    models: dict[str, tuple[str, Variant]] = {"DiGIT": ("prior", "base"), "VQ-only AR": ("vq_ar", "base")}
    if study.scale.large_rows:
        models["DiGIT, large"] = ("prior", "large")
    reported = {"DiGIT": "71.7 (219 M)", "DiGIT, large": "80.3 (732 M)", "VQ-only AR": "61.8 (VIM + VQGAN, 650 M)"}
    seeds = study.scale.seeds
    steps = [parts_step(study)]
    probes = {
        (label, seed): probe_step(study, model[0], seed, model[1]) for label, model in models.items() for seed in seeds
    }
    for (label, seed), probe in probes.items():
        steps += [*model_steps(study, models[label][0], seed, False, models[label][1]), probe]

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        top1 = {method: [best_top1(results[probes[method, seed].name]) for seed in seeds] for method in models}
        lines = ["| method | top-1, best layer, % | seeds | paper (ImageNet) |", "|---|---|---|---|"]
        for method, values in top1.items():
            lines.append(f"| {method} | {over_seeds(values)} | {listed(values)} | {reported[method]} |")
        lines += ["", paper.cited_probes()]
        picture = out / "table2.png"
        plots.bars_png(picture, {m: whiskers(v) for m, v in top1.items()}, xlabel="top-1 accuracy, %")
        return Outcome(
            table="\n".join(lines),
            metrics={"top1": top1, "paper": [asdict(row) for row in paper.TABLE2_ROWS]},
            pictures=[picture],
        )

    return Experiment(title="Table 2: linear probe of the autoregressive models", steps=steps, summarise=summarise)


def best_top1(result: dict[str, Any]) -> float:
    """Test accuracy in % of the layer that is best on held-out training images."""
    return 100 * result["best"]["top1"]["value"]


# -------------------------------------------------------------------- Tables 3 and 4


def table3(study: Study) -> Experiment:
    """Class-unconditional generation."""
    return generation(study, "Table 3: class-unconditional generation", False, paper.TABLE3_ROWS)


def table4(study: Study) -> Experiment:
    """Class-conditional generation."""
    return generation(study, "Table 4: class-conditional generation", True, paper.TABLE4_ROWS)


def generation(study: Study, title: str, conditional: bool, reported: Sequence[paper.Generation]) -> Experiment:
    """Every method and seed, and the two rows of validation data; renderers are those of the unconditional runs."""
    if conditional:
        study.require_labels(title)
    seeds, methods = study.scale.seeds, methods_of(study)
    steps = [parts_step(study)]
    for seed in seeds:
        steps += training_steps(study, methods.values(), seed, conditional)
        steps += [scores_step(study, method, seed, conditional) for method in methods.values()]
    steps += [golden_step(study, conditional), floor_step(study)]

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        rows = {
            label: [results[samples_name(study, method, seed, conditional)] for seed in seeds]
            for label, method in methods.items()
        }
        rows["validation data: DiGIT + VQ"] = [results["golden"]]
        rows["validation data: VQ only"] = [results["floor"]]
        costs = {
            label: [results[model_name(study, method.variant, model, seeds[0], conditional)] for model in method.models]
            for label, method in methods.items()
        }
        outcome = generation_outcome(study, rows, reported_of(study, reported), out, costs)
        table = f"{outcome.table}\n\n{paper.cited_generation(reported)}"
        return replace(
            outcome, table=table, metrics=outcome.metrics | {"costs": costs, "cited": [asdict(row) for row in reported]}
        )

    return Experiment(title=title, steps=steps, summarise=summarise)


def generation_outcome(
    study: Study,
    rows: Mapping[str, Sequence[Mapping[str, float]]],
    reported: Mapping[str, tuple[float, float | str]],
    out: Path,
    costs: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
) -> Outcome:
    """Table, bar plot and metrics: distance and inception score by method, the paper's beside ours.

    `costs` are the results of the training steps of each method's models.
    """
    distance, score = study.network.metric("fd"), study.network.metric("is")
    lines = [
        f"| method | {distance} | {score} | images | epochs | training PFLOPs | paper FID | paper IS |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, by_seed in rows.items():
        fid, inception = reported.get(method, ("", ""))
        cost, epochs = cost_of((costs or {}).get(method, ()), len(study.train))
        values = [over_seeds([row[name] for row in by_seed]) for name in (distance, score)]
        cells = (method, *values, by_seed[0]["images"], epochs, cost, fid, inception)
        lines.append(f"| {' | '.join(map(str, cells))} |")
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


def cost_of(trained: Sequence[Mapping[str, float]], num_images: int) -> tuple[str, str]:
    """(PFLOPs of the models together, epochs of each: "200 + 400"), as text; empty without models."""
    pflops = sum(model["training_pflops"] for model in trained)
    epochs = [f"{model['images'] / num_images:.3g}" for model in trained]
    return (f"{pflops:.3g}" if trained else ""), " + ".join(epochs)


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
    """Step: the AR renderer on the test images' own discriminative tokens, as if from a perfect prior.

    One step for Tables 3 and 4, which have the same renderer; `conditional` says whose prior stands beside it, unused.
    """
    return Step(
        name="golden",
        seconds=study.costs.sampling(num_rendered(study), ("renderer",)),
        make=lambda: study.scores(golden(study, conditional)),
        needs=Needs(images=num_rendered(study), folders=("judged/golden",)),
    )


def golden(study: Study, conditional: bool) -> Judged:
    """Features of the test images, rendered from their own discriminative tokens."""
    run = run_of(study, "base", study.scale.seeds[0], conditional)
    pipe = study.sampler(run, "prior", "renderer")
    return study.test_judged("golden", pipe.rerender, num_rendered(study))


def floor_step(study: Study) -> Step:
    """Step: VQGAN reconstructions of the test images, a lower bound for every renderer."""
    return Step(
        name="floor",
        seconds=study.costs.reconstruction(num_rendered(study)),
        make=lambda: study.scores(floor(study)),
        needs=Needs(images=num_rendered(study), folders=("judged/floor",)),
    )


def floor(study: Study) -> Judged:
    """Features of the VQGAN's reconstructions of the test images, not from a prior."""
    vq = study.base.train_vqgan()
    return study.test_judged("floor", lambda images, _: study.reconstruct(vq, images), num_rendered(study))


def num_rendered(study: Study) -> int:
    """Test images in the rows of validation data."""
    return min(study.scale.num_samples, len(study.test))


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
