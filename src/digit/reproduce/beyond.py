"""Beyond the paper: what each of this package's own ideas gains over the paper's recipe, at equal training FLOPs.

Every row trains on the same images with the FLOPs of the paper's prior and renderer together. `share` is the part of
them that the prior gets; steps follow from it. A row with another grid makes its own codebook and tokens, with the base
run's VQGAN.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from digit.metrics.neighbours import precision_recall
from digit.planning.work import Work
from digit.reproduce.experiment import Experiment, Needs, Outcome, Step
from digit.reproduce.study import PARTS, Study
from digit.reproduce.tables import floor_step, num_rendered, over_seeds, parts_step, protocol, trained, whiskers
from digit.runs.checks import unchanged_parts
from digit.runs.fit import Run
from digit.runs.recipes import Recipe, with_settings
from digit.runtime import distributed, plots

DROPPED = {"prior.label_dropout": 0.1, "renderer.prefix_dropout": 0.1}
GUIDED = {"sampling.prior.cfg_scale": 2.0, "sampling.renderer.cfg_scale": 2.0}
ALIGNED = {"renderer.conditioning": "aligned"}
GRID = {"encoder.layer": -6}  # of EfficientNet-Lite0 at 128 px: 8 x 8, the grid of the 64 px VQGAN


@dataclass(frozen=True, kw_only=True)
class Idea:
    """One row: settings that differ from the base recipe, and how the FLOPs are shared."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted names of settings with their values."""
    share: float | None = None
    """The prior's share of the FLOPs; None keeps the recipe's numbers of updates."""
    renderer: str = "renderer"
    """Name of ROLES."""
    prior: bool = True
    """False for a VQ-only row, which gets all FLOPs."""

    @property
    def models(self) -> tuple[str, ...]:
        """Models that it trains."""
        return ("prior", self.renderer) if self.prior else (self.renderer,)


IDEAS: dict[str, Idea] = {
    "the paper's recipe": Idea(),
    "guidance": Idea(settings=DROPPED | GUIDED),
    "aligned conditioning, guidance": Idea(settings=DROPPED | GUIDED | ALIGNED, share=0.2),
    "8 x 8 grid, guidance": Idea(settings=DROPPED | GUIDED | GRID, share=0.4),
    "8 x 8 grid, aligned, without guidance": Idea(settings=GRID | ALIGNED, share=0.4),
    "8 x 8 grid, aligned, guidance": Idea(settings=DROPPED | GUIDED | GRID | ALIGNED, share=0.4),
    "VQ-only": Idea(prior=False, renderer="vq_ar"),
    "VQ-only, guidance by label": Idea(
        prior=False,
        renderer="vq_ar",
        settings=DROPPED | {"sampling.renderer.cfg_scale": 2.0},
    ),
}


def beyond(study: Study) -> Experiment:
    """Each idea alone and together: distance, recall, and the renderer on the test images' own tokens."""
    conditional, seeds = bool(study.train.classes), study.scale.seeds
    known = {
        name: idea for name, idea in IDEAS.items() if "encoder.layer" not in idea.settings or has_smaller_grid(study)
    }
    rows = {name: Row(study, name, idea, conditional) for name, idea in known.items()}
    steps = [parts_step(study), floor_step(study)]
    for row in rows.values():
        steps += [step for seed in seeds for step in row.steps(seed)]

    def summarise(results: dict[str, Any], out: Path) -> Outcome:
        scores = {name: [results[row.name(seed)] for seed in seeds] for name, row in rows.items()}
        distance = study.network.metric("fd")
        lines = [
            f"| recipe | {distance} | recall | from the images' own tokens | training PFLOPs |",
            "|---|---|---|---|---|",
        ]
        for name, by_seed in scores.items():
            flops = sum(results[rows[name].model(model, seeds[0])]["training_pflops"] for model in IDEAS[name].models)
            own = over_seeds([score["own"] for score in by_seed]) if "own" in by_seed[0] else ""
            values = [over_seeds([score[value] for score in by_seed]) for value in (distance, "recall")]
            lines.append(f"| {name} | {' | '.join(values)} | {own} | {flops:.3g} |")
        lines.append(f"| VQGAN reconstructions of test images | {results['floor'][distance]:.4g} | | | |")
        picture = out / "beyond.png"
        bars = {name: whiskers([score[distance] for score in by_seed]) for name, by_seed in scores.items()}
        plots.bars_png(picture, bars, xlabel=distance)
        spread = f" ± is one standard deviation over {len(seeds)} seeds." if len(seeds) > 1 else " One seed."
        return Outcome(
            table="\n".join([*lines, "", protocol(study) + spread]), metrics={"rows": scores}, pictures=[picture]
        )

    return Experiment(title="Beyond the paper: ideas at equal training FLOPs", steps=steps, summarise=summarise)


def has_smaller_grid(study: Study) -> bool:
    """Whether an image has fewer discriminative than VQ tokens, as in the recipes for 64 px and not in the paper's."""
    work = Work(study.recipe)
    return work.num_tokens < work.vqgan.num_tokens


@dataclass(frozen=True)
class Row:
    """An idea in a study."""

    study: Study
    label: str
    idea: Idea
    conditional: bool

    @property
    def slug(self) -> str:
        """The label as a file name."""
        return "beyond_" + "".join(c if c.isalnum() else "_" for c in self.label.replace("'", "")).replace("__", "_")

    def name(self, seed: int) -> str:
        """Name of the step of its scores."""
        return f"{self.slug}_{seed}"

    def model(self, model: str, seed: int) -> str:
        """Name of the step that trains a model."""
        return f"{self.slug}_{seed}_{model}"

    def recipe(self, seed: int) -> Recipe:
        """The study's recipe with the idea's settings, as many updates as the FLOPs allow, and the seed."""
        study, idea = self.study, self.idea
        classes = len(study.train.classes) if self.conditional else 0
        settings = {"seed": seed, "class_conditional": self.conditional} | dict(idea.settings)
        if not self.conditional:
            settings = {name: value for name, value in settings.items() if name != "prior.label_dropout"}
            settings = settings | ({"sampling.prior.cfg_scale": 1.0} if "sampling.prior.cfg_scale" in settings else {})
        recipe = with_settings(study.recipe, settings)
        if idea.share is None:
            return recipe
        base = Work(with_settings(study.recipe, {"class_conditional": self.conditional}), classes)
        budget = sum(
            base.training_flops(model) * training.num_steps * training.batch_size
            for model, training in (("prior", base.recipe.prior_training), ("renderer", base.recipe.renderer_training))
        )
        own, shares = Work(recipe, classes), {"prior": idea.share, "renderer": 1 - idea.share}
        steps = {
            f"{model}_training.num_steps": round(
                share * budget / (own.training_flops(model) * getattr(recipe, f"{model}_training").batch_size)
            )
            for model, share in shares.items()
        }
        return with_settings(recipe, steps)

    def changes(self, recipe: Recipe) -> dict[str, Any]:
        """Fields in which a recipe differs from the study's."""
        base = self.study.recipe
        return {name: value for name, value in vars(recipe).items() if value != getattr(base, name)}

    @property
    def parts_recipe(self) -> Recipe:
        """The study's recipe with those settings alone that decide tokens; rows with equal ones share what it makes."""
        deciding = {name: value for name, value in self.idea.settings.items() if name.startswith("encoder.")}
        return with_settings(self.study.recipe, deciding)

    @property
    def parts_name(self) -> str:
        """Name of the step, and of the run, that makes parts other than the base run's."""
        return f"beyond_layer_{self.parts_recipe.encoder.layer}_parts"

    @property
    def own_parts(self) -> tuple[str, ...]:
        """Parts that the row does not take from the base run."""
        kept = unchanged_parts([f"recipe.{name}" for name in self.changes(self.parts_recipe)])
        return tuple(part for part in PARTS if part not in kept)

    def run(self, seed: int) -> Run:
        """The run of a seed, whose tokens are made once for all seeds."""
        changes, own = self.changes(self.recipe(seed)), self.own_parts
        shared = tuple(part for part in PARTS if part not in own)
        if not own:
            return self.study.run(f"{self.slug}_{seed}", **changes)
        maker = self.study.run(self.parts_name, shared=shared, **self.changes(self.parts_recipe))
        maker.write_tokens()
        made = {part: maker.out / part for part in own}
        return self.study.run(f"{self.slug}_{seed}", shared=shared, reuse=made, **changes)

    def steps(self, seed: int) -> list[Step]:
        """Its own parts, its models, its scores."""
        study, recipe, steps = self.study, self.recipe(seed), []
        if own := self.own_parts:
            seconds = study.costs.parts(len(study.train), own, recipe, linked=True)
            needs = Needs(parts=own, recipe=self.parts_recipe, linked=True, folders=(f"runs/{self.parts_name}",))
            make = partial(self.make_parts, seed)
            steps.append(Step(name=self.parts_name, seconds=seconds, make=make, needs=needs))
        for model in self.idea.models:
            needs = Needs(models=((model, recipe),), folders=(f"runs/{self.slug}_{seed}/{model}",))
            seconds = study.costs.model(model, recipe)
            make = partial(self.train, model, seed)
            steps.append(Step(name=self.model(model, seed), seconds=seconds, make=make, needs=needs))
        count = study.scale.num_samples
        seconds = 2 * study.costs.sampling(count, self.idea.models, recipe)
        needs = Needs(images=2 * count, folders=(f"judged/{self.slug}_*",))
        steps.append(Step(name=self.name(seed), seconds=seconds, make=partial(self.score, seed), needs=needs))
        return steps

    def make_parts(self, seed: int) -> dict[str, Any]:
        """Codebook and tokens of its own."""
        return {"rows": len(self.run(seed).write_tokens())}

    def train(self, model: str, seed: int) -> dict[str, Any]:
        """Cost and likelihood of a trained model."""
        return trained(self.run(seed), model)

    def score(self, seed: int) -> dict[str, Any]:
        """Distance and recall of samples; with a prior also the distance from the test images' own tokens."""
        study, idea, run = self.study, self.idea, self.run(seed)
        samples = study.samples(self.slug, run, "prior" if idea.prior else None, idea.renderer, seed)
        reference = study.reference.pooled
        recall = distributed.on_main(lambda: precision_recall(reference, samples.pooled)[1])
        result = study.scores(samples) | {"recall": float(recall), "sampling": asdict(run.recipe.sampling)}
        if idea.prior:
            result["own"] = study.scores(self.own(run, seed))[study.network.metric("fd")]
        return result

    def own(self, run: Run, seed: int) -> Any:
        """Judged images that the renderer makes of the test images' own tokens."""
        pipe = self.study.sampler(run, "prior", self.idea.renderer)
        return self.study.test_judged(f"{self.slug}_{seed}_own", pipe.rerender, num_rendered(self.study))
