"""Every table and figure of the paper as one command: a plan, resumable steps, then our results beside the paper's.

    digit reproduce table3 --scale small --data photos/

The results are OUT/TARGET/results.json, table.md and plots. All targets of a folder share models, tokens and features.
"""

from collections.abc import Callable
from pathlib import Path

from digit.errors import DigitError
from digit.reproduce.claims import claims
from digit.reproduce.experiment import Experiment, Outcome, perform, plan
from digit.reproduce.figures import fig3a, fig3b, fig4a, fig4b, fig5, fig6
from digit.reproduce.latent import latent
from digit.reproduce.pictures import fig1, fig7, fig8
from digit.reproduce.scales import SCALES, Scale, get_scale
from digit.reproduce.study import Study
from digit.reproduce.tables import table1, table2, table3, table4

TARGETS: dict[str, Callable[[Study], Experiment]] = {
    target.__name__: target
    for target in (
        *(table1, table2, table3, table4),
        *(fig1, fig3a, fig3b, fig4a, fig4b, fig5, fig6, fig7, fig8),
        *(latent, claims),
    )
}


def build(target: str, study: Study) -> Experiment:
    """Build the experiment of a target. Raises DigitError that lists the targets."""
    if target not in TARGETS:
        raise DigitError(f"nothing named {target} to reproduce: choose one of {', '.join(TARGETS)}")
    return TARGETS[target](study)


def reproduce(target: str, study: Study) -> tuple[Outcome, Path]:
    """Run the remaining steps of a target; returns its outcome and the folder of results.json, table.md and plots."""
    experiment = build(target, study)
    study.validate()
    study.claim()
    outcome = perform(experiment, study.out, target, study.describe())
    return outcome, study.out / target


__all__ = ["SCALES", "TARGETS", "Experiment", "Outcome", "Scale", "Study", "build", "get_scale", "plan", "reproduce"]
