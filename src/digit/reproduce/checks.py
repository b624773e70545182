"""What a reproduction checks before anything starts, so that nothing fails after hours of work.

Weights, labels and folders to reuse (`Study.validate`, the targets themselves), then the memory of every stage by the
plan beside the device's own, room on the disk, and the number of samples.
"""

import logging
import math
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.planning.machines import Machine, this_machine
from digit.planning.stages import VQ_TOKENS, Order, Planner, Stage, size
from digit.planning.work import num_parameters
from digit.reproduce.experiment import Experiment, Needs, Step, to_do
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
    plans = Plans(study, distributed.world_size())
    distributed.on_main(lambda: check_memory(steps, plans))
    distributed.on_main(lambda: check_disk(steps, plans))


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


class Plans:
    """The plans of a study's recipes for the device of one of its ranks, each made once."""

    def __init__(self, study: Study, ranks: int):
        self.study, self.ranks = study, ranks
        self.plans: dict[tuple[str, bool], Planner] = {}
        self.parameters: dict[tuple[str, str], int] = {}

    @cached_property
    def machine(self) -> Machine:
        """The machine of one rank."""
        return this_device(self.study, self.ranks)

    def of(self, recipe: Recipe, *, linked: bool = False) -> Planner:
        """The plan of a recipe; linked: its store takes the VQ tokens of another."""
        key = recipe_key(recipe), linked
        if key not in self.plans:
            self.plans[key] = planner(self.study, recipe, self.machine, self.ranks, linked=linked)
        return self.plans[key]

    def num_parameters(self, model: str, recipe: Recipe) -> int:
        """Parameters of a model of a recipe."""
        key = model, recipe_key(recipe)
        if key not in self.parameters:
            self.parameters[key] = num_parameters(self.of(recipe).work.sequence(model))
        return self.parameters[key]


def check_memory(steps: Sequence[Step], plans: Plans) -> None:
    """Raise DigitError, with the settings that fit, for a stage that does not fit into the memory of this device."""
    models = {(model, recipe_key(recipe)): recipe for step in steps for model, recipe in step.needs.models}
    for (model, _), recipe in models.items():
        gpu = plans.machine.gpu
        check_stage(plans.of(recipe).training(model) if gpu else weights(plans, model, recipe), plans.machine)
    for recipe, parts in [(step.needs.recipe, step.needs.parts) for step in steps]:
        if recipe is not None and parts and plans.machine.gpu:
            stages = plans.of(recipe)
            codebook = [stages.features(), stages.quantizer()] if "codebook" in parts else []
            for stage in [*codebook, stages.tokens()] if "tokens" in parts else codebook:
                check_stage(stage, plans.machine)


def weights(plans: Plans, model: str, recipe: Recipe) -> Stage:
    """A model's weights, gradients and moments alone: tracing its step on a CPU takes minutes for a large model."""
    return Stage(name=model, what="", memory=ADAM_BYTES * plans.num_parameters(model, recipe), times={})


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


def planner(study: Study, recipe: Recipe, machine: Machine, ranks: int, *, linked: bool = False) -> Planner:
    """The plan of a recipe of this study. A CPU's share of a batch is planned as a batch of its own."""
    if not machine.gpu and ranks > 1:
        changes = {name: shared(getattr(recipe, name), ranks) for name in ("prior_training", "renderer_training")}
        recipe = replace(recipe, **changes)
    classes = len(study.train.classes) if recipe.class_conditional else 0
    reuse = frozenset(study.reuse) | ({VQ_TOKENS} if linked else set())
    order = Order(images=len(study.train), num_classes=classes, reuse=reuse)
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
    """What decides the memory of a recipe's models and the size of its token store, as text."""
    models = (recipe.prior, recipe.renderer, recipe.prior_training, recipe.renderer_training, recipe.class_conditional)
    crops = (recipe.preprocess, recipe.crops_per_image, recipe.training_crops)
    tokens = (recipe.quantizer_cfg, recipe.encoder, recipe.vqgan, *crops)
    return repr((*models, *tokens))


# -------------------------------------------------------------------- disk


def check_disk(steps: Sequence[Step], plans: Plans) -> None:
    """Raise DigitError where the files of the remaining steps do not fit on the disk, beside what is there of them."""
    if needed := disk_bytes(steps, plans):
        out = as_path(plans.study.out).absolute()
        there = next(folder for folder in (out, *out.parents) if folder.exists())
        require_space(there, needed, "this reproduction")


def disk_bytes(steps: Sequence[Step], plans: Plans) -> int:
    """Bytes that the remaining steps still write: what they keep, and the most that one of them deletes again."""
    study, out = plans.study, plans.study.out
    kept = sum(missing(out, kept_bytes(step, plans), step.needs.folders) for step in steps)
    passing = max((missing(out, step.needs.passing, step.needs.passing_folders) for step in steps), default=0)
    if any(step.needs.images for step in steps):  # they are compared with the test images
        kept += missing(out, FEATURE_BYTES * len(study.test), ("judged/test",))
    if any(step.needs != Needs() for step in steps):
        kept += missing(out, 3 * len(study.test) * study.recipe.preprocess.crop_size**2, ("test_images",))
    return math.ceil(kept + passing)


def kept_bytes(step: Step, plans: Plans) -> float:
    """Bytes that a step leaves on the disk: token stores, checkpoints and weights, features of images."""
    needs, total = step.needs, float(step.needs.images * FEATURE_BYTES)
    if needs.recipe is not None and "tokens" in needs.parts:
        total += plans.of(needs.recipe, linked=needs.linked).store_bytes
    for model, recipe in needs.models:
        kept = plans.of(recipe).training_config(model).keep_checkpoints + 1  # one more while it is written
        total += plans.num_parameters(model, recipe) * (ADAM_BYTES * kept + 4)
    return total


def missing(out: Path, needed: float, folders: Sequence[str]) -> float:
    """What is left of `needed` bytes beside what lies on the disk in some folders, glob patterns in `out`."""
    found = sum(allocated(folder) for pattern in folders for folder in out.glob(pattern))
    return max(0.0, needed - found)


def allocated(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk; those of a sparse file that are not allocated do not count."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # deleted meanwhile
            about = path.lstat()
            if not stat.S_ISREG(about.st_mode):
                continue
            total += 512 * about.st_blocks if hasattr(about, "st_blocks") else about.st_size
    return total
