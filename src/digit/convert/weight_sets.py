"""Finds a network's tensors in a foreign file that wraps them: other names in front, other parts and copies beside.

DDP, FSDP and torch.compile add a component to names that means nothing: it is removed wherever it stands. All else in
front of a name is a place: keys of nested dicts, then components of the names, `state_dict.model` for example. A file
may hold several sets of weights of one network (student and teacher, weights and their moving average). FILE#PLACE
chooses one of them; without it the average or the teacher is taken, and the choice is logged.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from digit.convert.reading import MAX_LISTED, SAVE_STATE, Unread, kind_of, listed, require_state, split_place
from digit.errors import DigitError

log = logging.getLogger(__name__)

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
COUNTERS = {"n_averaged"}  # beside the weights in torch.optim.swa_utils.AveragedModel
AVERAGED = re.compile(r"(.*_)?(ema|teacher|averaged|shadow|target)(_.*)?")
MAX_DEPTH = 4  # nested dicts


@dataclass(frozen=True)
class WeightSet:
    """One set of weights of the wanted network."""

    place: str
    """Where it is in the file: keys and components of names, separated by dots; empty for the names themselves."""
    state: dict[str, Tensor]
    """Its tensors, without the place in their names."""
    beside: tuple[str, ...]
    """Names of the other tensors in the same dict."""


def choose_set(
    loaded: Any,
    mark: str,
    source: str,
    *,
    shape: tuple[int, ...] | None = None,
    preferred: str | None = None,
    known: str = "",
) -> dict[str, Tensor]:
    """The wanted network's tensors in the content of a file, without wrappers and place in their names.

    Args:
        loaded: the file's content.
        mark: a name that each network of the wanted kind has.
        source: the file as it was given, FILE or FILE#PLACE.
        shape: shape of the mark's tensor; of several sets, only those that have it are considered.
        preferred: the component of a place that is taken first; None takes an average or a teacher first.
        known: pattern of the names of other parts that may lie beside a place without a word.

    A file without the mark gives its largest dict of tensors, for the caller to say what it lacks. Raises DigitError
    for a PLACE that does not exist, for several sets without a preferred one, and for entries that are no tensors.
    """
    sets = [found for place, state in tensor_dicts(loaded) for found in sets_in(state, place, mark, source)]
    if (place := split_place(source)[1]) is not None:
        return named_set(sets, place, source).state
    fitting = [found for found in sets if shape is None or tuple(found.state[mark].shape) == shape] or sets
    if not fitting:
        return largest(loaded, source)
    chosen = best_set(fitting, preferred, source)
    if others := [found for found in fitting if found is not chosen]:
        text = "%s holds %d sets of weights that fit: took %s; to take another, give %s"
        log.warning(text, source, len(fitting), chosen.place or "the names without prefix", choices(others, source))
    if left := [name for name in chosen.beside if not re.fullmatch(known, name)]:
        log.warning("%s: took the weights under %s; left out, not of it: %s", source, chosen.place, listed(left))
    return chosen.state


def tensor_dicts(node: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """(keys, dict) of each nested dict that holds tensors by name; an optimizer's are left out."""
    if not isinstance(node, Mapping) or len(place) > MAX_DEPTH:
        return
    if any(isinstance(value, Tensor) for value in node.values()):
        yield place, node
    for key, value in node.items():
        if "optim" not in str(key):
            yield from tensor_dicts(value, (*place, str(key)))


def sets_in(state: Mapping[str, Any], place: tuple[str, ...], mark: str, source: str) -> list[WeightSet]:
    """The sets of weights in one dict, one for each prefix in front of the mark."""
    if not any(isinstance(name, str) and name.endswith(mark) for name in state):
        return []
    plain = without_wrappers(require_state(state, source), source)
    prefixes = sorted((n.removesuffix(mark) for n in plain if n == mark or n.endswith(f".{mark}")), key=len)
    owner = {name: max((p for p in prefixes if name.startswith(p)), key=len, default=None) for name in plain}
    return [
        WeightSet(
            ".".join((*place, *prefix.split(".")[:-1])),
            {name.removeprefix(prefix): tensor for name, tensor in plain.items() if owner[name] == prefix},
            tuple(name for name in plain if owner[name] is None),
        )
        for prefix in prefixes
    ]


def without_wrappers(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Removes wrappers' components from the names. Raises DigitError if two tensors then have one name."""
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if ours in plain:
            raise DigitError(f"{source} holds {ours} twice, the second time as {name}: save one of the two")
        if ours not in COUNTERS:
            plain[ours] = tensor
    return plain


def named_set(sets: list[WeightSet], place: str, source: str) -> WeightSet:
    """The set at `place`, or the only one whose place contains it. Raises DigitError that lists the places."""
    exact = [found for found in sets if found.place == place]
    around = [found for found in sets if place and f".{place}." in f".{found.place}."]
    if len(found := exact or around) == 1:
        return found[0]
    file = split_place(source)[0]
    advice = f"choose {choices(sets, str(file))}" if sets else "give another file"
    raise DigitError(f"{file} holds {len(around) or 'no'} sets of weights under {place!r}: {advice}")


def best_set(sets: list[WeightSet], preferred: str | None, source: str) -> WeightSet:
    """The only set, or the preferred one of several. Raises DigitError that lists the places if none is preferred."""

    def is_preferred(found: WeightSet) -> bool:
        parts = found.place.split(".")
        return preferred in parts if preferred else any(AVERAGED.fullmatch(part.lower()) for part in parts)

    first = [found for found in sets if is_preferred(found)] if len(sets) > 1 else sets
    if len(first) == 1:
        return first[0]
    raise DigitError(
        f"{source} holds {len(sets)} sets of weights that fit: choose one by giving {choices(sets, source)}"
    )


def choices(sets: list[WeightSet], file: str) -> str:
    """How to name each set, `FILE#PLACE`, whole: it is to be copied."""
    places = [f"{file}#{found.place}" for found in sets[:MAX_LISTED]]
    return ", ".join(places) + (f", ... ({len(sets)} in all)" if len(sets) > MAX_LISTED else "")


def largest(loaded: Any, source: str) -> dict[str, Tensor]:
    """The largest dict of tensors in a file. Raises DigitError that says what the file holds if there is none."""
    dicts = [state for _, state in tensor_dicts(loaded)]
    if not dicts and (objects := sorted({kind_of(value) for value in unread(loaded)})):
        arrays = "save them as tensors (torch.from_numpy), and give that file"
        advice = arrays if set(objects) <= {"NumPy array", "NumPy number", "dtype"} else SAVE_STATE
        raise DigitError(f"{source} holds no tensors by name but pickled objects ({listed(objects)}): {advice}")
    return without_wrappers(require_state(max(dicts, key=len, default=loaded), source), source)


def unread(node: Any, depth: int = 0) -> Iterator[Unread]:
    """The objects of unknown classes in a file's content."""
    if isinstance(node, Unread):
        yield node
    elif isinstance(node, Mapping) and depth <= MAX_DEPTH:
        for value in node.values():
            yield from unread(value, depth + 1)
