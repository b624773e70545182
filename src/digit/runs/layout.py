"""What a run folder holds, and which version of digit made it; read by whatever makes, continues or describes a run."""

from pathlib import Path
from typing import Any

from digit.errors import DigitError

FORMAT = 2  # of config.json; 1 was that of digit 0.1, which named neither it nor the settings as here
RESULTS = {"codebook": "codebook.json", "vqgan": "vqgan.json", "tokens": "manifest.json"}  # written last in each stage

PAGE = "report.html"  # of a run, written last
EARLIER = "earlier"  # OUT/earlier/N: what the N-th change of settings replaced (`changes.py`)

# what a run may take from another run, --reuse_NAME, and the stage of that run in whose folder it lies
REUSABLE = {"codebook": "codebook", "vqgan": "vqgan", "tokens": "tokens", "vq_tokens": "tokens"}


def result_of(folder: Path, stage: str) -> Path:
    """The file in a stage's folder that is written last: without it the stage is not done."""
    return folder / RESULTS.get(stage, "model.json")


def is_done(folder: Path, stage: str) -> bool:
    """Whether all files of a stage's result are in its folder; what was damaged and deleted is so made again."""
    weights = {"codebook": ["codebook.safetensors"], "vqgan": ["vqgan.safetensors"], "tokens": []}
    others = weights.get(stage, ["model.safetensors", "tokens.json"])
    return result_of(folder, stage).is_file() and all((folder / name).is_file() for name in others)


def require_format(cfg: Any, path: Path) -> None:
    """Raise DigitError where another version of digit made the run folder that `path`, its config.json, is in."""
    found = cfg.get("format", 1) if isinstance(cfg, dict) else None
    if found != FORMAT:
        raise DigitError(
            f"{path.parent} is a run of format {found}, this version reads {FORMAT}: make it again in another --out, "
            "or use the digit that made it (format 1: version 0.1)"
        )
