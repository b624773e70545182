"""How long the stages of `digit fit` that are not done will take, for its progress."""

import torch

from digit.planning.machines import this_machine
from digit.planning.stages import Order, Planner
from digit.runs.fit import Run
from digit.runs.roles import get_role
from digit.runtime import distributed
from digit.runtime.progress import Stages
from digit.training import checkpoint

REPORT = "report"  # the last stage: samples, pictures and metrics


def stages_of(run: Run) -> Stages:
    """The stages of a run and its report, with the plan's estimate of each; without any where there is no plan."""
    names = [name for name, _ in run.stages()]
    todo = [name for name in names if not run.is_done(name)]
    seconds = distributed.on_main(lambda: planned_seconds(run, todo)) if todo else {}
    return Stages([*names, REPORT], {name: seconds.get(name, 0.0) for name in (*names, REPORT)} if seconds else {})


def planned_seconds(run: Run, names: list[str]) -> dict[str, float]:
    """Seconds of some stages, by name, and of the report; {} if they cannot be planned."""
    order = Order(images=len(run.source), num_classes=run.num_classes)
    try:
        with torch.random.fork_rng([]):  # the run's own random numbers stay as they are without a plan
            machine = this_machine(run.device)
            planner = Planner(run.recipe, machine, order, warn=False)  # the run has warned
            times = {name: stage_seconds(planner, name) * share_left(run, name) for name in names}
            times[REPORT] = planner.ending_seconds
            return {name: seconds / machine.free for name, seconds in times.items()}  # beside what runs now
    except Exception:  # an estimate that cannot be made must not end the run
        return {}


def share_left(run: Run, name: str) -> float:
    """The share of a stage's updates after its newest checkpoint; 1 without one, as for a stage without updates."""
    saved = checkpoint.list_checkpoints(run.out / name / "checkpoints")
    if not saved:
        return 1.0
    cfg = run.recipe.vqgan_training if name == "vqgan" else run.recipe.training(get_role(name))
    return max(0.0, 1 - saved[-1][0] / max(1, cfg.num_steps))


def stage_seconds(planner: Planner, name: str) -> float:
    """Seconds of one stage; without its memory, which takes longer to estimate."""
    if name == "codebook":
        return planner.features().seconds + planner.quantizer().seconds
    if name == "vqgan":
        return planner.vqgan().seconds if planner.recipe.vqgan_training.num_steps else 0.0
    return planner.tokens().seconds if name == "tokens" else planner.training_seconds(name)
