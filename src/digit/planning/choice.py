"""Which of the recipes for photographs suits a machine, and for how many updates it trains there."""

import importlib.util
from dataclasses import dataclass
from typing import NamedTuple

from digit.planning.machines import Machine
from digit.planning.remaining import stage_seconds
from digit.planning.stages import Order, Planner, count
from digit.runs.changes import steps_of
from digit.runs.recipe import Recipe, with_settings
from digit.runs.recipes import get_recipe
from digit.runtime.settings import flat

ANY_MACHINE = "photos"  # the recipe that stands for the one chosen here
PHOTOGRAPHS, CLASSES = 3000, 10  # of the data set that times are told for
CPU_SECONDS = 3600.0  # that a run on a CPU may take
LARGE_GPU = 22 * 2**30  # bytes; cards sold with 24 GB have 22 to 24 GiB
SEVERAL_TIMES = (4, 2, 1)  # the recipe's updates, where the time allows


class Size(NamedTuple):
    """A recipe, and how many times its updates."""

    recipe: str
    times: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The recipe for photographs that suits a machine; `str` says so in one line."""

    recipe: Recipe
    machine: str
    seconds: float
    """Time of the run by plan, for PHOTOGRAPHS pictures."""
    why_not_larger: str = ""

    def __str__(self) -> str:
        prior, renderer = (count(flat(self.recipe)[name]) for name in steps_of(self.recipe))
        minutes = max(1, round(self.seconds / 60))
        larger = f" ({self.why_not_larger})" if self.why_not_larger else ""
        pixels = self.recipe.preprocess.crop_size
        return (
            f"recipe {self.recipe.name} for this machine, {self.machine}{larger}: {pixels} px, "
            f"{prior} and {renderer} updates, about {minutes} minutes for {count(PHOTOGRAPHS)} photographs; --recipe "
            "photos64, photos128 or photos256 chooses another one, --more 2x goes on afterwards"
        )


def choose_photos(machine: Machine, *, online: bool = True) -> Choice:
    """The recipe for a machine.

    On a GPU of 24 GB or more photos256, on a smaller one photos128; on a CPU photos128 where it takes at most an hour
    by plan, else photos64. On a CPU it trains for two or four times the updates where that fits into the hour.

    Args:
        online: whether weights may be fetched, which photos256 needs.
    """
    if machine.gpu:
        missing = lacking(online=online)
        if machine.memory >= LARGE_GPU and not missing:
            return described(Size("photos256", 1), machine)
        return described(Size("photos128", 4), machine, missing or "photos256 takes a GPU of 24 GB")
    sizes = [Size(name, times) for name in ("photos128", "photos64") for times in SEVERAL_TIMES]
    fitting = (found for size in sizes if (found := described(size, machine)).seconds <= CPU_SECONDS)
    return next(fitting, described(sizes[-1], machine))


def lacking(*, online: bool) -> str:
    """What photos256 needs and this machine lacks; nothing where it has all."""
    if importlib.util.find_spec("transformers") is None:
        return "photos256 needs transformers: pip install '.[hub]'"
    return "" if online else "photos256 fetches weights, and this machine is offline"


def described(size: Size, machine: Machine, why_not_larger: str = "") -> Choice:
    """A recipe of so many times its updates, with its planned time on a machine."""
    recipe = get_recipe(size.recipe)
    values = flat(recipe)
    recipe = with_settings(recipe, {name: size.times * values[name] for name in steps_of(recipe)})
    seconds = planned_total(recipe, machine)
    return Choice(recipe=recipe, machine=machine.name, seconds=seconds, why_not_larger=why_not_larger)


def planned_total(recipe: Recipe, machine: Machine) -> float:
    """Seconds of a whole `digit fit` on PHOTOGRAPHS pictures, report included."""
    planner = Planner(recipe, machine, Order(images=PHOTOGRAPHS, num_classes=CLASSES))
    stages = ["codebook", *(["vqgan"] if recipe.has_vqgan else []), "tokens", *recipe.model_names]
    return sum(stage_seconds(planner, name) for name in stages) + planner.sampling().seconds
