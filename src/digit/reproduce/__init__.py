"""Every table and figure of the paper as one command: a plan, resumable steps, then our results beside the paper's.

    digit reproduce table3 --scale small --data photos/
    torchrun --nproc-per-node=8 -m digit -- reproduce all --scale paper --data imagenet/ ...

The results are OUT/TARGET/results.json, table.md and plots. All targets of a folder share models, tokens and features.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from digit.errors import DigitError
from digit.reproduce.beyond import beyond
from digit.reproduce.checks import check_everything
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
        *(latent, claims, beyond),
    )
}


def build(target: str, study: Study) -> Experiment:
    """Build the experiment of a target. Raises DigitError that lists the targets."""
    if target not in TARGETS:
        raise DigitError(f"nothing named {target} to reproduce: choose one of {', '.join(TARGETS)}")
    return TARGETS[target](study)


def chosen_targets(text: str) -> list[str]:
    """The targets that `all`, or names with commas between them, stand for. Raises DigitError that lists them."""
    names = list(TARGETS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TARGETS:
            raise DigitError(f"nothing named {name} to reproduce: choose one of {', '.join(TARGETS)}, all")
    return list(dict.fromkeys(names))


def reproduce(target: str, study: Study) -> tuple[Outcome, Path]:
    """Run the remaining steps of a target; returns its outcome and the folder of results.json, table.md and plots."""
    return reproduce_all([target], study)[0]


def reproduce_all(targets: Sequence[str], study: Study) -> list[tuple[Outcome, Path]]:
    """As `reproduce`, for several targets; what would fail after hours fails before anything starts.

    All ranks of a job call it together.
    """
    experiments = build_all(targets, study)
    check_everything(list(experiments.values()), study)
    return perform_all(experiments, study)


def build_all(targets: Sequence[str], study: Study) -> dict[str, Experiment]:
    """The experiments of some targets, by name."""
    return {target: build(target, study) for target in targets}


def perform_all(experiments: Mapping[str, Experiment], study: Study) -> list[tuple[Outcome, Path]]:
    """Run the remaining steps of experiments that were checked (`check_everything`). All ranks call it together."""
    study.claim()
    about = study.describe()
    return [(perform(e, study.out, name, about), study.out / name) for name, e in experiments.items()]


__all__ = [
    "SCALES", "TARGETS", "Experiment", "Outcome", "Scale", "Study", "build", "build_all", "check_everything",
    "chosen_targets", "get_scale", "perform_all", "plan", "reproduce", "reproduce_all",
]  # fmt: skip
