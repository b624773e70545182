"""The folder of a pipeline: pipeline.json beside encoder/, codebook/, vqgan/, prior.* and renderer.*."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError
from digit.files import load_tensors, read_json, save_tensors, write_json
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.sampling.config import SamplingConfig, StageSampling

FORMAT_VERSION = 1
MANIFEST = "pipeline.json"


def find_pipeline(folder: str | Path) -> Path:
    """The pipeline folder at `folder` or in its sub-folder `pipeline`. Raises DigitError where there is none."""
    folder = Path(folder)
    for candidate in (folder, folder / "pipeline"):
        if (candidate / MANIFEST).is_file():
            return candidate
    what = "does not exist" if not folder.exists() else f"holds no {MANIFEST}"
    raise DigitError(f"{folder} {what}: give the --out folder of a finished `digit fit`")


def read_manifest(folder: Path) -> dict[str, Any]:
    """pipeline.json of a pipeline folder. Raises DigitError where it is of another version or no object."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise DigitError(f"{folder / MANIFEST} is damaged (no JSON object): make the pipeline again")
    if manifest.get("format") != FORMAT_VERSION:
        raise DigitError(
            f"{folder} has format {manifest.get('format')}, this version reads {FORMAT_VERSION}: update digit"
        )
    return manifest


def write_manifest(
    folder: Path,
    parts: Sequence[str],
    preprocess: PreprocessConfig,
    classes: Sequence[str],
    sampling: SamplingConfig,
    info: dict[str, Any],
) -> None:
    """Write pipeline.json, last: a folder with a manifest is whole."""
    content = {"format": FORMAT_VERSION, "parts": list(parts), "preprocess": asdict(preprocess)}
    content |= {"classes": list(classes), "sampling": asdict(sampling), "info": info}
    write_json(folder / MANIFEST, content)


def read_sampling(saved: dict[str, Any]) -> SamplingConfig:
    """The SamplingConfig of a manifest."""
    return SamplingConfig(**saved | {stage: StageSampling(**saved[stage]) for stage in ("prior", "renderer")})


def save_sequence_model(model: SequenceModel, folder: Path, name: str) -> None:
    """Write NAME.safetensors and NAME.json (the SequenceConfig)."""
    save_tensors(folder / f"{name}.safetensors", model.state_dict())
    write_json(folder / f"{name}.json", asdict(model.cfg))


def load_sequence_model(folder: Path, name: str) -> SequenceModel:
    """Read what `save_sequence_model` wrote; weights are mapped, not copied."""
    with torch.device("meta"):
        model = SequenceModel(SequenceConfig(**read_json(folder / f"{name}.json")))
    try:
        model.load_state_dict(load_tensors(folder / f"{name}.safetensors"), strict=True, assign=True)
    except RuntimeError as error:
        raise DigitError(
            f"{folder / name}.safetensors does not fit {name}.json: {' '.join(str(error).split())}"
        ) from error
    return model.eval()
