"""How long the stages of `digit fit` that are not done will take, for its progress."""

from digit.planning.machines import this_machine
from digit.planning.stages import Order, Planner
from digit.runs.fit import Run
from digit.runs.report import JUDGED_SAMPLES
from digit.runtime import distributed
from digit.runtime.progress import Stages

REPORT = "report"  # the last stage: samples, pictures and metrics


def stages_of(run: Run) -> Stages:
    """The stages of a run and its report, with the plan's estimate of each; without any where there is no plan."""
    names = [*(name for name, _ in run.stages()), REPORT]
    todo = [name for name in names if name == REPORT or not run.is_done(name)]
    seconds = distributed.on_main(lambda: planned_seconds(run))
    return Stages(names, {name: seconds[name] if name in todo else 0.0 for name in names} if seconds else {})


def planned_seconds(run: Run) -> dict[str, float]:
    """Seconds of every stage by its name in the run folder; {} if they cannot be planned."""
    order = Order(
        images=len(run.source), samples=JUDGED_SAMPLES, num_classes=run.num_classes, reuse=frozenset(run.reuse)
    )
    try:
        planned = {stage.name: stage.seconds for stage in Planner(run.recipe, this_machine(run.device), order).stages}
    except Exception:  # an estimate that cannot be made must not end the run
        return {}
    planned["codebook"] = planned.pop("features", 0.0) + planned.get("codebook", 0.0)
    planned[REPORT] = planned.pop("sampling")
    return {name: planned.get(name, 0.0) for name in (*(name for name, _ in run.stages()), REPORT)}
