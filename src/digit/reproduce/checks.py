"""What a reproduction checks before anything starts, so that nothing fails after hours of work.

Weights, labels and folders to reuse (`Study.validate`, the targets themselves), then the memory of every stage by the
plan beside the device's own, room on the disk, and the number of samples.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from digit.errors import DigitError
from digit.planning.machines import Machine, this_machine
from digit.planning.stages import Order, Planner, Stage, size
from digit.planning.work import num_parameters
from digit.reproduce.experiment import Experiment, Step, to_do
from digit.reproduce.study import Study
from digit.runs.recipes import Recipe
from digit.runtime import distributed
from digit.runtime.files import as_path, require_space
from digit.tokenizers.encoders import load_encoder

log = logging.getLogger(__name__)
FEATURE_BYTES = 21_000  # of one judged image: 2048 + 2023 + 1008 numbers of Inception in float32, and a little more
ADAM_BYTES = 16  # of one parameter in a checkpoint: weight, two moments, average


def check_everything(experiments: Sequence[Experiment], study: Study) -> None:
    """Raise DigitError for what would fail later. All ranks call it together; rank 0 decides."""
    study.validate()
    steps = to_do(experiments, study.out)
    distributed.on_main(lambda: check_counts(study))
    distributed.on_main(lambda: check_encoders(steps))
    ranks = distributed.world_size()
    distributed.on_main(lambda: check_memory(steps, study, ranks))
    distributed.on_main(lambda: check_disk(steps, study, ranks))


def check_counts(study: Study) -> None:
    """Raise DigitError for a scale without seeds or samples; say where some classes get no sample."""
    scale = study.scale
    if not scale.seeds or len(set(scale.seeds)) < len(scale.seeds):
        raise DigitError(f"seeds are {list(scale.seeds)}: give at least one, each once")
    if min(scale.num_samples, len(study.test)) < 2:
        raise DigitError(
            f"{scale.num_samples} samples and {len(study.test)} test images: a distance needs 2 or more of each"
        )
    if scale.num_samples < len(study.train.classes):
        log.warning(
            "%d samples are fewer than the %d classes: class-conditional samples show only some classes",
            scale.num_samples, len(study.train.classes),
        )  # fmt: skip


def check_encoders(steps: Sequence[Step]) -> None:
    """Raise DigitError for weights of further encoders that are missing, damaged or of another network."""
    for cfg in dict.fromkeys(cfg for step in steps for cfg in step.needs.encoders):
        load_encoder(cfg)


# -------------------------------------------------------------------- memory


def check_memory(steps: Sequence[Step], study: Study, ranks: int) -> None:
    """Raise DigitError, with the settings that fit, for a stage that does not fit into the memory of this device."""
    machine = this_device(study, ranks)
    known: set[Any] = set()
    for step in steps:
        for model, recipe in step.needs.models:
            if not known & {(model, recipe_key(recipe))}:
                known.add((model, recipe_key(recipe)))
                plan = planner(study, recipe, machine, ranks)
                check_stage(plan.training(model) if machine.gpu else weights(plan, model), machine)
    if any(step.needs.tokens for step in steps) and machine.gpu:
        stages = planner(study, study.recipe, machine, ranks)
        missing = [] if "codebook" in study.reuse else [stages.features(), stages.quantizer()]
        for stage in missing if "tokens" in study.reuse else [*missing, stages.tokens()]:
            check_stage(stage, machine)


def weights(plan: Planner, model: str) -> Stage:
    """A model's weights, gradients and moments alone: tracing its step on a CPU takes minutes for a large model."""
    return Stage(name=model, what="", memory=ADAM_BYTES * num_parameters(plan.work.sequence(model)), times={})


def check_stage(stage: Stage, machine: Machine) -> None:
    """Raise DigitError where a stage of the plan takes more than a device may use."""
    if stage.memory > machine.usable:
        advice = "; ".join(stage.advice) or "choose a device with more memory"
        raise DigitError(
            f"{stage.name} takes {size(stage.memory)} on each device by its plan, and {machine.name} has "
            f"{size(machine.usable)} to use: {advice}"
        )


def this_device(study: Study, ranks: int) -> Machine:
    """The machine of one rank: its GPU, or its share of a CPU's memory."""
    machine = this_machine(study.device)
    if machine.gpu:
        return replace(machine, count=ranks)
    return replace(machine, memory=machine.memory / distributed.local_size())


def planner(study: Study, recipe: Recipe, machine: Machine, ranks: int) -> Planner:
    """The plan of a recipe of this study. A CPU's share of a batch is planned as a batch of its own."""
    if not machine.gpu and ranks > 1:
        changes = {name: shared(getattr(recipe, name), ranks) for name in ("prior_training", "renderer_training")}
        recipe = replace(recipe, **changes)
    classes = len(study.train.classes) if recipe.class_conditional else 0
    order = Order(images=len(study.train), num_classes=classes, reuse=frozenset(study.reuse))
    return Planner(recipe, machine, order, chosen=())


def shared(cfg: Any, ranks: int) -> Any:
    """The training settings of one of several ranks. Raises DigitError where they cannot share the batch."""
    pieces = ranks * cfg.accumulate
    if cfg.batch_size % pieces:
        raise DigitError(
            f"a batch of {cfg.batch_size} does not split into {pieces} equal micro-batches ({ranks} processes x "
            "accumulate): give a multiple, --prior_training.batch_size or --renderer_training.batch_size"
        )
    return replace(cfg, batch_size=cfg.batch_size // ranks)


def recipe_key(recipe: Recipe) -> str:
    """What decides the memory of a recipe's models, as text."""
    parts = (recipe.prior, recipe.renderer, recipe.prior_training, recipe.renderer_training, recipe.quantizer_cfg)
    return repr((*parts, recipe.class_conditional, recipe.preprocess))


# -------------------------------------------------------------------- disk


def check_disk(steps: Sequence[Step], study: Study, ranks: int) -> None:
    """Raise DigitError where the results of the remaining steps do not fit on the disk."""
    needed = sum(step_bytes(step, study, ranks) for step in steps)
    if needed and not (study.out / "test_images" / "crops.json").exists():
        needed += 3 * len(study.test) * study.recipe.preprocess.crop_size**2
    if needed:
        out = as_path(study.out).absolute()
        there = next(folder for folder in (out, *out.parents) if folder.exists())
        require_space(there, math.ceil(needed), "this reproduction")


def step_bytes(step: Step, study: Study, ranks: int) -> float:
    """Bytes that a step leaves on the disk: token stores, checkpoints and weights, features of images."""
    needs, machine = step.needs, this_device(study, ranks)
    total = float(needs.images * FEATURE_BYTES)
    if needs.tokens:
        total += planner(study, study.recipe, machine, ranks).store_bytes
    for model, recipe in needs.models:
        plan = planner(study, recipe, machine, ranks)
        kept = plan.training_config(model).keep_checkpoints + 1  # one more while it is written
        total += num_parameters(plan.work.sequence(model)) * (ADAM_BYTES * kept + 4)
    return total
