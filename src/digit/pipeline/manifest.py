"""The folder of a pipeline: pipeline.json beside encoder/, codebook/, vqgan/, prior.* and renderer.*."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from digit.convert.reading import WEIGHT_DTYPES
from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.runtime.config_json import from_json
from digit.runtime.files import MAKE_AGAIN, as_path, load_tensors, read_json, save_tensors, write_json, write_result
from digit.runtime.paths import nearest
from digit.sampling.config import SamplingConfig, released_prior, released_renderer
from digit.sampling.kinds import get_kind

FORMAT_VERSION = 2  # format 1 was that of digit 0.1, which named the settings of the parts differently
MAX_WEIGHT = 1e6  # trained weights stay below 100; a flipped exponent bit gives 1e38, and then NaN everywhere
LARGE_WIDTH = 1536  # of the paper's large model (A.3)
MANIFEST = "pipeline.json"
RELEASED = "DAMO-NLP-SG/DiGIT"  # the authors' repository of checkpoints, which is no pipeline folder
CONTENT: dict[str, type] = {"parts": list, "preprocess": dict, "classes": list, "sampling": dict, "info": dict}


def find_pipeline(folder: str | Path) -> Path:
    """The pipeline folder at `folder` or in its sub-folder `pipeline`. Raises DigitError where there is none."""
    folder = as_path(folder)
    for candidate in (folder, folder / "pipeline"):
        if (candidate / MANIFEST).is_file():
            return candidate
    what = f"does not exist{nearest(folder)}" if not folder.exists() else f"holds no {MANIFEST}"
    advice = "give the --out folder of a finished `digit fit`"
    if str(folder) == RELEASED:
        advice = f"fetch it by released_pipeline() of digit.released.hub, or by digit sample --from {folder}"
    raise DigitError(f"{folder} {what}: {advice}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """pipeline.json of a pipeline folder. Raises DigitError where it has another format or is damaged."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise DigitError(f"{folder / MANIFEST} is damaged (no JSON object with a format): {MAKE_AGAIN}")
    if manifest.get("format") != FORMAT_VERSION:
        raise DigitError(
            f"{folder} is a pipeline of format {manifest.get('format')}, this version reads {FORMAT_VERSION}: "
            "make it again in another --out (digit fit, digit convert), or use the digit that made it (format 1: "
            "version 0.1)"
        )
    odd = [name for name, kind in CONTENT.items() if not isinstance(manifest.get(name), kind)]
    lists = [name for name in ("parts", "classes") if name not in odd]
    odd += [name for name in lists if not all(isinstance(entry, str) for entry in manifest[name])]
    if odd:
        raise DigitError(f"{folder / MANIFEST} is damaged ({', '.join(odd)}): {MAKE_AGAIN}")
    from_json(PreprocessConfig, manifest["preprocess"], f"{folder / MANIFEST}: preprocess")
    from_json(SamplingConfig, manifest["sampling"], f"{folder / MANIFEST}: sampling")
    return manifest


def write_manifest(
    folder: Path,
    parts: Sequence[str],
    preprocess: PreprocessConfig,
    classes: Sequence[str],
    sampling: SamplingConfig,
    info: dict[str, Any],
) -> None:
    """Write pipeline.json. Call it last: a folder with a manifest is complete."""
    content = {"format": FORMAT_VERSION, "parts": list(parts), "preprocess": asdict(preprocess)}
    content |= {"classes": list(classes), "sampling": asdict(sampling), "info": info}
    write_result(folder / MANIFEST, content)


def read_sampling(saved: dict[str, Any]) -> SamplingConfig:
    """The SamplingConfig of a manifest."""
    return from_json(SamplingConfig, saved, f"sampling in {MANIFEST}")


def released_sampling(
    sampling: SamplingConfig, *, prior: SequenceConfig | None = None, renderer: SequenceConfig | None = None
) -> SamplingConfig:
    """`sampling` with the authors' settings for the models that are given, by their size, labels and kind."""
    if prior is not None:
        stage = released_prior(large=prior.embed_dim >= LARGE_WIDTH, labels=bool(prior.num_classes))
        sampling = replace(sampling, prior=stage)
    if renderer is not None:
        sampling = replace(sampling, renderer=released_renderer(masked=renderer.masked))
    return sampling


def save_sequence_model(model: SequenceModel, folder: Path, name: str) -> None:
    """Write NAME.safetensors and NAME.json (kind and configuration)."""
    save_tensors(folder / f"{name}.safetensors", model.state_dict())
    write_json(folder / f"{name}.json", model.cfg.to_dict())


def load_sequence_model(folder: Path, name: str) -> SequenceModel:
    """Read what `save_sequence_model` wrote; weights are mapped, not copied. Raises DigitError for damaged ones."""
    about, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    saved = read_json(about)
    if not isinstance(saved, dict) or not isinstance(saved.get("kind"), str):
        raise DigitError(f"{about} names no kind of model: {MAKE_AGAIN}")
    kind = get_kind(saved.pop("kind"))
    cfg, state = from_json(kind.config, saved, str(about)), load_tensors(weights)
    require_weights(state, str(weights))
    try:
        with torch.device("meta"):
            model = kind.model(cfg)
        model.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, ValueError, OverflowError) as error:  # sizes too large for a tensor, other names or shapes
        raise DigitError(
            f"{weights} does not fit {about.name} ({' '.join(str(error).split())[:300]}): {MAKE_AGAIN}"
        ) from error
    return model.eval()


def require_weights(state: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise DigitError for weights that are not floating point, NaN, or outside +-MAX_WEIGHT."""
    for name, tensor in state.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise DigitError(f"{source} is damaged: {name} is {tensor.dtype}, not floating point: {MAKE_AGAIN}")
        low, high = (float(edge) for edge in torch.aminmax(tensor)) if tensor.numel() else (0.0, 0.0)
        if not -MAX_WEIGHT <= low <= high <= MAX_WEIGHT:  # false for NaN too
            raise DigitError(f"{source} is damaged: {name} holds {low:g} to {high:g}: {MAKE_AGAIN}")
