"""Runs in a folder: how far each is, its losses and pictures; starting, stopping and continuing a fit.

The page names a run by the name of its folder, never by a path, and only folders that lie in the folder that the studio
was given, and are no links, are runs. A fit is started from settings alone: the command line that a lock file holds is
shown, never run.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from digit.data.images import open_source
from digit.errors import DigitError
from digit.runs.previews import FOLDER as PREVIEWS
from digit.runs.previews import GROWTH
from digit.runs.recipes import RECIPES, Recipe
from digit.runs.roles import ROLES
from digit.runs.status import STAGES, TimeLeft, describe_stage, is_run, last_note, read_losses, seconds_left, time_left
from digit.runtime import lock
from digit.runtime.files import differences, read_json
from digit.runtime.request import with_defaults

PICTURES = ("samples.png", "reconstructions.png", "token_map.png", "loss.png")
MAX_RUNS, MAX_POINTS, MAX_LOG_BYTES = 200, 240, 32 * 2**20
MAX_FILES = 20_000  # counted for the size of a run
MAX_STARTED = 2  # fits at a time
LARGEST = 1e300  # number in metrics.json that the page shows
PROGRAM = (sys.executable, "-m", "digit")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
PATH = re.compile(r"(?<![\w.])(?:~|\.{0,2})/(?:[^\s/:;,'\"()]+/)+(?=[^\s/])")


def without_paths(text: str) -> str:
    """A message with the folders left out of its paths: the page shows what a file is called, not where it lies."""
    return PATH.sub("", text)


class Folder:
    """The runs in one folder.

    Args:
        root: the folder; None shows no runs.
        data: data sets that a fit may be started on, by the names that the page shows.
        read_only: refuse to start, stop and continue.
    """

    def __init__(self, root: Path | None, data: Mapping[str, str] | None = None, *, read_only: bool = False) -> None:
        self.root, self.read_only = root, read_only
        self.data = {"shapes": "shapes", **(data or {})}
        self.started: dict[str, subprocess.Popen] = {}
        self._lock = threading.Lock()  # requests run in several threads
        self._fingerprints: dict[str, str] = {}  # of the data sets
        self._messages: Path | None = None  # a folder of this process, made when the first fit starts

    def find(self, name: str) -> Path:
        """The folder of a run. Raises DigitError for a name that is none."""
        if self.root is not None and NAME.fullmatch(name):
            folder = self.root / name
            if not folder.is_symlink() and folder.is_dir() and is_safe_run(folder):
                return folder
        raise DigitError("there is no run of this name: load the page again")

    def describe_all(self) -> list[dict[str, Any]]:
        """Every run in a few words, the one that was changed last first."""
        if self.root is None or not self.root.is_dir():
            return []
        folders = [f for f in self.root.iterdir() if NAME.fullmatch(f.name) and not f.is_symlink() and f.is_dir()]
        found = [f for f in folders if is_safe_run(f)]
        found.sort(key=lambda f: -newest(f))
        told = []
        for folder in found[:MAX_RUNS]:
            with suppress(DigitError, OSError):  # somebody removes it meanwhile
                told.append(self.describe(folder))
        return told

    def describe(self, folder: Path) -> dict[str, Any]:
        """A run: its stages, whether it is at work, what it takes on the disk, and its last message."""
        cfg = as_dict(read_json(folder / "config.json"))
        recipe, data = as_dict(cfg.get("recipe")), as_dict(cfg.get("data"))
        stages, done = [], 0
        for stage in STAGES:
            with suppress(DigitError, OSError, ValueError):
                for state in describe_stage(folder, stage):
                    stages.append({"name": stage, "state": without_paths(state), "done": state.startswith("done")})
                    done += state.startswith("done")
        holder = lock.holder(folder)
        pictures = [name for name in PICTURES if is_plain(folder / name)]
        current = next((s["name"] for s in stages if not s["done"]), None)
        left = self.time_left(folder)
        return {
            "name": folder.name,
            "recipe": str(recipe.get("name", "?")),
            "data": without_paths(str(data.get("name", "?"))).rpartition("/")[2],
            "stages": stages,
            "done": (folder / "pipeline" / "pipeline.json").is_file(),
            "stages_done": done,
            "at_work": holder is not None,
            "since": str((holder or {}).get("since", "")),
            "current": current,
            "left": seconds_left(folder / current) if holder is not None and current is not None else None,
            "whole": None if left is None else {"seconds": left.seconds, "unknown": list(left.unknown)},
            "message": self.message(folder.name) or (without_paths(last_note(folder / current)) if current else ""),
            "ended": self.ended(folder.name),
            "bytes": size_of(folder),
            "changed": newest(folder),
            "pictures": pictures,
            "previews": previews(folder),
            "can_stop": self.can_stop(folder, holder),
            "can_continue": holder is None
            and not self.read_only
            and not (folder / "metrics.json").is_file()
            and self.spec_of(cfg) is not None,
            "metrics": numbers(folder / "metrics.json"),
        }

    @staticmethod
    def time_left(folder: Path) -> TimeLeft | None:
        """How long a run will still train; None where that is not known, or nothing is left."""
        with suppress(DigitError, OSError, ValueError):
            return time_left(folder)
        return None

    def starting(self) -> list[dict[str, Any]]:
        """The fits that the page has started and whose folders are no runs yet, because they begin or have failed."""
        if self.root is None:
            return []
        return [
            {"name": name, "message": self.message(name), "ended": self.ended(name)}
            for name in list(self.started)
            if not is_safe_run(self.root / name)
        ]

    def ended(self, name: str) -> int | None:
        """The exit status of a fit that the page has started; None where it is at work, or was started elsewhere."""
        process = self.started.get(name)
        return None if process is None else process.poll()

    def curves(self, name: str) -> dict[str, Any]:
        """Losses of each model of a run, {"prior": {"step": [...], "nll": [...], "val_nll": [[step, value], ...]}}."""
        folder, found = self.find(name), {}
        for model in ("vqgan", *ROLES):
            path = folder / model / "log.jsonl"
            if not is_plain(path) or path.stat().st_size > MAX_LOG_BYTES:
                continue
            losses = read_losses(path.parent)
            entry = {key: points[:: max(1, len(points) // MAX_POINTS)] for key, points in losses.items()}
            if entry:
                found[model] = entry
        return found

    def compare(self, first: str, second: str) -> dict[str, Any]:
        """Two runs: the settings in which they differ, and the metrics of both."""
        folders = [self.find(first), self.find(second)]
        left, right = (self.config_of(f) for f in folders)
        straight = any(as_dict(cfg["recipe"]).get("renderer_kind") == "pixels" for cfg in (left, right))
        differing = [
            {"name": name.removeprefix("recipe."), "first": shown(old), "second": shown(new)}
            for name, old, new in differences(left, right)
            if not name.endswith("fingerprint") and (straight or not name.startswith("recipe.pixels"))
        ]
        return {
            "differences": differing[:200],
            "metrics": [numbers(f / "metrics.json") for f in folders],
            "pictures": [[n for n in PICTURES if is_plain(f / n)] for f in folders],
        }

    @staticmethod
    def config_of(folder: Path) -> dict[str, Any]:
        """config.json of a run; settings that its version of digit did not know yet have their defaults."""
        cfg = as_dict(read_json(folder / "config.json"))
        return cfg | {"recipe": with_defaults(Recipe, as_dict(cfg.get("recipe")))}

    def picture(self, name: str, picture: str) -> Path:
        """A picture of a run. Raises DigitError for any other file."""
        path = self.find(name) / picture
        if picture not in PICTURES or not is_plain(path):
            raise DigitError("there is no such picture of this run")
        return path

    def preview(self, name: str, picture: str) -> Path:
        """A picture that shows how a model grew. Raises DigitError for any other file."""
        folder = self.find(name)
        if picture not in previews(folder):
            raise DigitError("there is no such picture of this run")
        return folder / PREVIEWS / picture

    # ---------------------------------------------------------------- processes

    def require_writing(self) -> Path:
        """The folder of the runs. Raises DigitError where nothing may be started."""
        if self.read_only:
            raise DigitError("this studio is read-only: start it without --read_only to train")
        if self.root is None:
            raise DigitError("this studio has no folder of runs: start it with --runs FOLDER")
        return self.root

    def spec_of(self, cfg: Any) -> str | None:
        """The data of a run as the command line takes it, where they are known to be the same."""
        data = as_dict(as_dict(cfg).get("data"))
        for spec in self.data.values():
            if spec not in self._fingerprints:
                self._fingerprints[spec] = ""
                with suppress(DigitError, OSError):
                    self._fingerprints[spec] = open_source(spec).fingerprint
            if self._fingerprints[spec] and self._fingerprints[spec] == data.get("fingerprint"):
                return spec
        return None

    def start(self, name: str, recipe: str, data: str, seed: int) -> None:
        """Begin a fit in a new folder. Raises DigitError for names that are taken or unknown."""
        root = self.require_writing()
        if recipe not in RECIPES:
            raise DigitError(f"no recipe of this name: choose one of {', '.join(sorted(RECIPES))}")
        if data not in self.data:
            raise DigitError(f"no data of this name: choose one of {', '.join(self.data)}, or start with --data")
        if (root / name).exists() or (root / name).is_symlink():
            raise DigitError(f"there is a folder {name} already: choose another name")
        self._spawn(name, ["fit", self.data[data], "--recipe", recipe, "--seed", str(seed), "--out", str(root / name)])

    def go_on(self, name: str) -> None:
        """Continue a fit with the settings of its config.json. Raises DigitError where it runs, or its data are not
        among those that the studio was given."""
        self.require_writing()
        folder = self.find(name)
        if lock.holder(folder) is not None:
            raise DigitError(f"{name} is at work already")
        cfg = read_json(folder / "config.json")
        if (spec := self.spec_of(cfg)) is None:
            raise DigitError(f"the data of {name} are not known here: start the studio with --data, or type digit info")
        recipe = as_dict(cfg.get("recipe"))
        base = str(recipe.get("name"))
        settings = self._output(name).with_suffix(".yaml")
        settings.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        words = ["fit", spec, *(["--recipe", base] if base in RECIPES else []), "--config", str(settings)]
        self._spawn(name, [*words, "--out", str(folder)])

    def can_stop(self, folder: Path, holder: dict[str, Any] | None) -> bool:
        return not self.read_only and holder is not None and self._pid(folder, holder) is not None

    def _pid(self, folder: Path, holder: dict[str, Any]) -> int | None:
        """The process that writes to a run: one that this studio started, or of this person on this machine."""
        own = self.started.get(folder.name)
        if own is not None and own.poll() is None:
            return own.pid
        pid = holder.get("pid")
        return pid if holder.get("host") == socket.gethostname() and type(pid) is int and is_digit(pid) else None

    def stop(self, name: str) -> None:
        """Ask the process of a run to save and end (SIGTERM)."""
        self.require_writing()
        folder = self.find(name)
        holder = lock.holder(folder)
        pid = None if holder is None else self._pid(folder, holder)
        if pid is None:
            raise DigitError(f"{name} is not at work on this machine: there is nothing to stop")
        os.kill(pid, signal.SIGTERM)

    def _spawn(self, name: str, words: list[str]) -> None:
        with self._lock:
            for known in [n for n, p in self.started.items() if p.poll() is not None and n != name]:
                if len(self.started) > 20:
                    self.started.pop(known)
            running = [n for n, process in self.started.items() if process.poll() is None]
            if name in running:
                raise DigitError(f"{name} is at work already")
            if len(running) >= MAX_STARTED:
                raise DigitError(f"{' and '.join(running)} are at work: stop one of them, or wait")
            with open(self._output(name), "wb") as out:
                self.started[name] = subprocess.Popen(
                    [*PROGRAM, *words],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip

    def _output(self, name: str) -> Path:
        """Where the messages of a run that the studio started go; its folder may not exist yet."""
        if self._messages is None:
            self._messages = Path(tempfile.mkdtemp(prefix="digit-studio-"))
        return self._messages / f"{name}.log"

    def message(self, name: str) -> str:
        """The last line that a run which this studio started has printed."""
        if name not in self.started:
            return ""
        with suppress(OSError), open(self._output(name), "rb") as out:
            out.seek(max(0, os.fstat(out.fileno()).st_size - 4000))
            lines = out.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            return without_paths("".join(c for c in last if c.isprintable()))[:400]
        return ""

    def close(self) -> None:
        """Stop every fit that this studio started, and wait for it to save; remove their messages."""
        for process in self.started.values():
            if process.poll() is None:
                process.terminate()
        for process in self.started.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
        if self._messages is not None:
            shutil.rmtree(self._messages, ignore_errors=True)


# -------------------------------------------------------------------- files


def is_safe_run(folder: Path) -> bool:
    """Whether a folder is a run whose config.json can be read."""
    try:
        return is_plain(folder / "config.json") and is_run(folder)
    except (DigitError, OSError):
        return False


def is_plain(path: Path) -> bool:
    """Whether a path is a regular file and no link."""
    return path.is_file() and not path.is_symlink()


def is_digit(pid: int) -> bool:
    """Whether a process is one of ours that runs digit; its number may have been given to another one since."""
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.getuid():
            return False
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, AttributeError):
        return False
    return any(word.rpartition(b"/")[2] in (b"digit",) for word in words) or b"digit" in words


def previews(folder: Path) -> list[str]:
    """The pictures that show how each model of a run grew, in the order of the stages."""
    names = [f"{stage}_{GROWTH}.png" for stage in STAGES]
    place = folder / PREVIEWS
    return [] if place.is_symlink() else [name for name in names if is_plain(place / name)]


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; of the first MAX_FILES."""
    total = count = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
            count += 1
        if count > MAX_FILES:
            break
    return total


def newest(folder: Path) -> float:
    """When a run was changed last, in seconds since 1970."""
    times = [0.0]
    for path in (folder, folder / "metrics.json", *(folder / stage / "log.jsonl" for stage in ("vqgan", *ROLES))):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def numbers(path: Path) -> dict[str, float]:
    """The plain numbers in a JSON file; {} without one."""
    if not is_plain(path):
        return {}
    try:
        found = as_dict(read_json(path))
    except DigitError:
        return {}
    values = {str(k): v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {name: value for name, value in values.items() if abs(value) < LARGEST}  # JSON has no infinity


def as_dict(value: Any) -> dict[str, Any]:
    """The value where it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def shown(value: Any) -> str:
    """A setting in a table."""
    text = json.dumps(value, ensure_ascii=False)
    return without_paths(text if len(text) <= 120 else text[:117] + "...")
