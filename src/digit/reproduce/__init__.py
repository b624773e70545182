"""Every table and figure of the paper as one command: a plan, then the work, resumable, then the paper's beside ours.

    digit reproduce table3 --scale small --data photos/

OUT/TARGET/results.json, table.md and pictures; models, tokens and judged images of a folder are shared by its targets.
"""

from collections.abc import Callable
from pathlib import Path

from digit.errors import DigitError
from digit.reproduce.claims import claims
from digit.reproduce.experiment import Experiment, Outcome, perform, plan
from digit.reproduce.figures import fig3a, fig3b, fig4a, fig4b, fig5, fig6
from digit.reproduce.scales import SCALES, Scale, get_scale
from digit.reproduce.study import Study
from digit.reproduce.tables import table1, table2, table3, table4

TARGETS: dict[str, Callable[[Study], Experiment]] = {
    target.__name__: target
    for target in (table1, table2, table3, table4, fig3a, fig3b, fig4a, fig4b, fig5, fig6, claims)
}


def build(target: str, study: Study) -> Experiment:
    """The experiment of a target's name. Raises DigitError that lists the names."""
    if target not in TARGETS:
        raise DigitError(f"nothing named {target} to reproduce: choose one of {', '.join(TARGETS)}")
    return TARGETS[target](study)


def reproduce(target: str, study: Study) -> tuple[Outcome, Path]:
    """Run what is not done of a target; returns what it says and the folder of results.json, table.md and pictures."""
    experiment = build(target, study)
    study.validate()
    study.claim()
    outcome = perform(experiment, study.out, target, study.describe())
    return outcome, study.out / target


__all__ = ["SCALES", "TARGETS", "Experiment", "Outcome", "Scale", "Study", "build", "get_scale", "plan", "reproduce"]
