"""A run folder belongs to one run: its settings are written when work begins, and others are refused afterwards."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from digit.data.images import ImageSource
from digit.errors import MismatchError
from digit.runs.checks import unchanged_parts
from digit.runs.layout import FORMAT, RESULTS, REUSABLE, require_format
from digit.runs.recipes import Recipe
from digit.runs.roles import ROLES
from digit.runtime.files import differences, plain, read_json, remove_leftovers, write_result
from digit.runtime.lock import lock_folder
from digit.runtime.request import require_same_request
from digit.runtime.settings import flat

# settings that change no result, or only what is sampled afterwards
FREE_SETTING = re.compile(
    r"data\.name|recipe\.(name|max_bad_fraction|sampling\..*|masked_top_p|class_top_k"
    r"|.*\.(log_every|save_every|keep_checkpoints|keep_best|tensorboard|accumulate|checkpoint_activations|compile"
    r"|parallel|max_skipped|deterministic))"
)


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


def claim_folder(out: Path, recipe: Recipe, source: ImageSource) -> None:
    """Lock a run folder; write config.json, or compare with what is there as far as results exist that it made.

    Raises OtherSettingsError or MismatchError where the folder holds a run with other settings or of other data.
    """
    pixel_range = source.pixel_range
    white = {"pixel_max": pixel_range.white} if pixel_range and pixel_range.white else {}
    wanted = {
        "format": FORMAT,
        "recipe": asdict(recipe),
        "data": {"name": source.name, **white, "fingerprint": source.fingerprint},
    }
    lock_folder(out)
    places = [out / name for name in (*RESULTS, *ROLES)]
    remove_leftovers(out, *places, *(place / "checkpoints" for place in places))
    path = out / "config.json"
    made = [*(f"{stage}/{result}" for stage, result in RESULTS.items()), *(f"{m}/model.json" for m in ROLES)]
    begun = any(any((out / model / "checkpoints").glob("step_*")) for model in ROLES)  # and would go on
    if path.exists() and (begun or any((out / result).exists() for result in made)):
        before = read_json(path)
        require_format(before, path)
        before["recipe"] = merged(plain(asdict(Recipe())), before["recipe"])  # younger settings
        changed = [name for name, *_ in differences(before.get("data") or {}, wanted["data"]) if name != "name"]
        if changed == ["fingerprint"]:
            raise MismatchError(
                f"{out} was made with other images, labels or class names than {source.name} holds now "
                "(or DiGIT reads them otherwise: see --labels_from, --limit and --split, and what digit inspect "
                "says): choose another --out, or give the old data"
            )
        require_same_settings(out, before, plain(wanted))
    if not path.exists() or read_json(path) != plain(wanted):
        write_result(path, wanted)


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


def merged(defaults: Any, given: Any) -> Any:
    """`given` with what it lacks, at any depth, out of `defaults`."""
    if not (isinstance(defaults, dict) and isinstance(given, dict)):
        return given
    return defaults | {key: merged(defaults.get(key), value) for key, value in given.items()}
