"""A run folder belongs to one run: its settings are written when work begins.

Others are refused afterwards, or the stages that they touch are made anew and the earlier ones kept (`changes.py`).
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from digit.data.images import ImageSource
from digit.errors import MismatchError
from digit.runs import changes
from digit.runs.changes import FREE_SETTING
from digit.runs.checks import unchanged_parts
from digit.runs.layout import FORMAT, RESULTS, REUSABLE, require_format
from digit.runs.recipe import Recipe
from digit.runs.roles import ROLES
from digit.runtime.config_json import from_json
from digit.runtime.files import differences, plain, read_json, remove_leftovers, write_json, write_result
from digit.runtime.lock import lock_folder
from digit.runtime.request import require_same_request, with_defaults
from digit.runtime.settings import flat


class OtherSettingsError(MismatchError):
    """The run folder holds a run with other settings.

    Attributes:
        kept: folders of the finished parts that another run could reuse, since no other setting decides them.
    """

    def __init__(self, text: str, kept: dict[str, Path]):
        super().__init__(text)
        self.kept = kept

    def __reduce__(self) -> tuple[Any, ...]:
        """As rank 0 sends it to the other ranks."""
        return type(self), (str(self), self.kept)


def claim_folder(
    out: Path,
    recipe: Recipe,
    source: ImageSource,
    *,
    reuse_unchanged: bool = False,
    lengthened: Mapping[str, Any] | None = None,
) -> list[str]:
    """Lock a run folder; write config.json, or compare with what is there as far as results exist that it made.

    Args:
        reuse_unchanged: with other settings, keep the stages that these do not touch, and move the others into
            OUT/earlier (`changes.apply_change`). Otherwise other settings are refused.
        lengthened: the record of `changes.with_more`, where the run is to go on for more updates.

    Returns what to tell the person. Raises OtherSettingsError or MismatchError where the folder holds a run with other
    settings that are refused, or of other data.
    """
    pixel_range = source.pixel_range
    white = {"pixel_max": pixel_range.white} if pixel_range and pixel_range.white else {}
    wanted = {
        "format": FORMAT,
        "recipe": asdict(recipe),
        "data": {"name": source.name, **white, "fingerprint": source.fingerprint},
    }
    if source.reading is not None:
        wanted["reading"] = plain(source.reading)  # so that the same command without its options goes on (`reading.py`)
    lock_folder(out)
    places = [out / name for name in (*RESULTS, *ROLES)]
    remove_leftovers(out, *places, *(place / "checkpoints" for place in places))
    path, notes = out / "config.json", []
    if path.exists() and (changes.present(out) if reuse_unchanged else holds_results(out)):
        before = read_json(path)
        require_format(before, path)
        before["recipe"] = with_defaults(Recipe, before["recipe"])  # younger settings
        other = [name for name, *_ in differences(before.get("data") or {}, wanted["data"]) if name != "name"]
        if other == ["fingerprint"]:
            old = before["data"].get("name", source.name)
            raise MismatchError(
                f"{out} was made with other images, labels or class names than {source.name} holds now"
                f"{'' if old == source.name else f', from {old}'} "
                "(or DiGIT reads them otherwise: see --labels_from, --limit and --split, and what digit inspect "
                f"says): choose another --out, or give the old data (digit info {out} shows its command)"
            )
        if source.reading is None and "reading" in before:
            wanted["reading"] = before["reading"]
        if other or not reuse_unchanged:
            require_same_settings(out, before, plain(wanted))
        else:
            notes = change_settings(out, before, recipe, by_more=lengthened is not None)
    elif reuse_unchanged and (back := changes.bring_back(out, recipe)):
        notes.append(f"{out}: {', '.join(back)} made earlier with these settings, brought back from {out / 'earlier'}")
    if lengthened is not None:
        write_json(out / changes.LENGTHENED, lengthened)
    if not path.exists() or read_json(path) != plain(wanted):
        write_result(path, wanted)
    return notes


def holds_results(out: Path) -> bool:
    """Whether a stage of a run folder is finished, or a model's training was begun and would go on."""
    made = [*(f"{stage}/{result}" for stage, result in RESULTS.items()), *(f"{m}/model.json" for m in ROLES)]
    begun = any(any((out / model / "checkpoints").glob("step_*")) for model in ROLES)
    return begun or any((out / result).exists() for result in made)


def change_settings(out: Path, before: dict[str, Any], wanted: Recipe, *, by_more: bool) -> list[str]:
    """Make room in a run folder for the stages that other settings touch, and bring back those that were made with them
    earlier; returns what to tell the person."""
    recipe = from_json(Recipe, before["recipe"], f"{out / 'config.json'}: recipe")
    change = changes.find_change(out, recipe, wanted, by_more=by_more)
    drawn = changes.drawing_settings(recipe, wanted)
    aside = changes.apply_change(out, change, before, report=bool(drawn))
    change = replace(change, back=changes.bring_back(out, wanted))
    if not (drawn or change.back or changes.changed_settings(recipe, wanted)):
        return []
    return changes.describe_change(out, change, recipe, wanted, aside)


def require_same_settings(out: Path, before: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise OtherSettingsError, with the parts that could be kept, where a run with other settings is here."""
    other = [name for name, _, _ in differences(before, wanted) if not FREE_SETTING.fullmatch(name)]
    folders = {part: out / REUSABLE[part] for part in unchanged_parts(other)}
    kept = {part: folder for part, folder in folders.items() if (folder / RESULTS[folder.name]).exists()}
    try:
        advice = "choose another --out, or the old setting"
        require_same_request(out, before, wanted, advice, ignore=FREE_SETTING.fullmatch)
    except MismatchError as error:
        raise OtherSettingsError(str(error), kept) from None


def settings_of(part: Path) -> dict[str, Any]:
    """Settings of the run that made a part, by dotted name; none where the folder is not that of a run."""
    path = part.parent / "config.json"
    made = read_json(path) if path.is_file() else None
    recipe = made.get("recipe") if isinstance(made, dict) else None
    return flat(recipe) if isinstance(recipe, dict) else {}
