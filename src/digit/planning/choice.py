"""Which of the recipes for photographs suits a machine, and for how many updates it trains there.

It goes by the machine's own speed, whatever else runs on it at the moment: a machine that is busy now gets the same
recipe, and the person is told that it takes longer while it is.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from digit.planning.machines import Machine
from digit.planning.remaining import stage_seconds
from digit.planning.stages import Order, Planner, count
from digit.runs.changes import steps_of
from digit.runs.recipe import Recipe, with_settings
from digit.runs.recipes import get_recipe
from digit.runtime.settings import flat

ANY_MACHINE = "photos"  # the recipe that stands for the one chosen here
PHOTOGRAPHS, CLASSES = 3000, 10  # of the data set that times are told for
CPU_SECONDS = 2700.0  # that a run on a CPU may take by plan, so that it ends within the hour
LARGE_GPU = 22 * 2**30  # bytes; cards sold with 24 GB have 22 to 24 GiB
SEVERAL_TIMES = (4, 2, 1)  # the recipe's updates, where the time allows


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The recipe for photographs that suits a machine; `str` says so in one line."""

    recipe: Recipe
    machine: str
    seconds: float
    """Time of the run by plan, for PHOTOGRAPHS pictures."""
    why_not_larger: str = ""
    busy: str = ""
    """What `Machine.busy` says."""

    def __str__(self) -> str:
        prior, renderer = (count(flat(self.recipe)[name]) for name in steps_of(self.recipe))
        minutes = max(1, round(self.seconds / 60))
        larger, busy = (f" ({why})" if why else "" for why in (self.why_not_larger, self.busy))
        pixels = self.recipe.preprocess.crop_size
        return (
            f"recipe {self.recipe.name} for this machine, {self.machine}{larger}: {pixels} px, "
            f"{prior} updates of the prior and {renderer} of the renderer, "
            f"about {minutes} minutes for {count(PHOTOGRAPHS)} photographs{busy}; "
            "--recipe photos64, photos128 or photos256 chooses another one, --more 2x goes on afterwards"
        )


def choose_photos(machine: Machine, *, online: bool = True) -> Choice:
    """The recipe for a machine.

    On a GPU of 24 GB or more photos256, on a smaller one photos128; on a CPU photos128 where it takes at most
    CPU_SECONDS by plan, else photos64. It trains for two or four times the updates where that fits into the time.

    Args:
        online: whether weights may be fetched, which photos256 needs.
    """
    if not machine.gpu:
        large = longest(get_recipe("photos128"), machine)
        return large if large.seconds <= CPU_SECONDS else longest(get_recipe("photos64"), machine)
    missing = lacking(online=online)
    if machine.memory >= LARGE_GPU and not missing:
        return longest(get_recipe("photos256"), machine, (1,))
    why = missing or "photos256 takes a GPU of 24 GB"
    return longest(get_recipe("photos128"), machine, why_not_larger=why)


def lacking(*, online: bool) -> str:
    """What photos256 needs and this machine lacks; nothing where it has all."""
    if importlib.util.find_spec("transformers") is None:
        return "photos256 needs transformers: pip install '.[hub]'"
    return "" if online else "photos256 fetches weights, and this machine is offline"


def longest(
    recipe: Recipe, machine: Machine, factors: Sequence[int] = SEVERAL_TIMES, why_not_larger: str = ""
) -> Choice:
    """A recipe with its updates times the largest of the factors that fits into CPU_SECONDS by plan."""
    fixed, training = planned_seconds(recipe, machine)
    factor = next((f for f in factors if fixed + f * training <= CPU_SECONDS), factors[-1])
    values = flat(recipe)
    return Choice(
        recipe=with_settings(recipe, {name: factor * values[name] for name in steps_of(recipe)}),
        machine=machine.name,
        seconds=fixed + factor * training,
        why_not_larger=why_not_larger,
        busy=machine.busy,
    )


def planned_seconds(recipe: Recipe, machine: Machine) -> tuple[float, float]:
    """Seconds of `digit fit` on PHOTOGRAPHS pictures: those of everything but prior and renderer, and theirs."""
    planner = Planner(recipe, machine, Order(images=PHOTOGRAPHS, num_classes=CLASSES))
    others = ["codebook", *(["vqgan"] if recipe.has_vqgan else []), "tokens"]
    fixed = sum(stage_seconds(planner, name) for name in others) + planner.ending_seconds
    return fixed, sum(stage_seconds(planner, name) for name in recipe.model_names)
