"""Table 1: how much tokens, features and codes change under pixel noise, for every tokenizer of a pipeline."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from digit.data.crops import centre_crops
from digit.data.preprocess import PreprocessConfig
from digit.data.source import ImageSource
from digit.evaluation.curves import Curve, curves_png
from digit.evaluation.paper import TABLE1
from digit.metrics.stability import StabilityConfig, Tokenizer, measure_stability
from digit.runtime.files import plain, write_json

GROUPS = {"token_change": ("token_change",), "cosine": ("feature_cosine", "code_cosine")}  # Table 1's -> ours
ARROWS = {"token_change": "↓", "cosine": "↑"}


def run_stability(
    tokenizers: Mapping[str, Tokenizer],
    images: ImageSource | Tensor,
    preprocess: PreprocessConfig,
    cfg: StabilityConfig | None = None,
    *,
    num: int = 1000,
    out: str | Path,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Measure, write OUT/stability.json and OUT/stability.png, return what the JSON holds.

    Args:
        tokenizers: by name, `pipe.tokenizers` for example.
        images: a source, of which `num` images spread evenly are cropped in the centre; or uint8 (N, 3, S, S), all
            of it as it is.
        preprocess: the tokenizers' preprocessing; of it only the size of the crop counts here.
        batch_size: images at a time; the result does not depend on it.
    """
    cfg = cfg or StabilityConfig()
    batches: Iterable[Tensor]
    if isinstance(images, Tensor):
        batches, total, name = images.split(batch_size), len(images), "given images"
    else:
        batches = (crops for crops, _ in centre_crops(images, preprocess, num=num, batch_size=batch_size))
        total, name = min(num, len(images)), images.name
    result = plain(measure_stability(tokenizers, batches, cfg, total))
    result["protocol"]["images"] = name
    result["paper"] = TABLE1
    write_json(Path(out) / "stability.json", result)
    plot(result, Path(out) / "stability.png")
    return result


def published(result: Mapping[str, Any]) -> list[str]:
    """Tokenizers whose figures can stand beside Table 1's: of its names, with the SNR meant as we read the paper."""
    protocol = result["protocol"]
    same = protocol["unit"] == "db" and protocol["power"] == "mean_square"
    return [name for name in result["tokenizers"] if same and name in TABLE1]


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Token change and cosine against SNR, the noise growing to the right; the paper's Table 1 thin and dashed."""
    snrs, measured, ratio = result["protocol"]["snrs"], result["tokenizers"], result["protocol"]["unit"] == "ratio"
    colours = {name: place for place, name in enumerate(measured)}
    shown: dict[str, list[Curve]] = {}
    for group, measures in GROUPS.items():
        shown[words(group)] = [
            Curve.of(
                measured[name][measure], snrs, name=f"{name}, {words(measure)}", colour=colour,
                line=":" if measure == "code_cosine" else "-",
            )
            for measure in measures
            for name, colour in colours.items()
            if measure in measured[name]
        ] + [
            Curve(name=f"{name}, paper", x=TABLE1["snr"], y=TABLE1[name][group], colour=colours[name], reference=True)
            for name in published(result)
        ]  # fmt: skip
    xlabel = "signal-to-noise ratio" + ("" if ratio else " (dB)")
    curves_png(path, shown, xlabel=xlabel, falling=True, logarithmic=ratio)


def words(measure: str) -> str:
    """token_change -> token change."""
    return measure.replace("_", " ")


def to_table(result: Mapping[str, Any]) -> str:
    """Markdown in the layout of Table 1, a column an SNR: ours with half the interval, then the paper's."""
    protocol, measured = result["protocol"], result["tokenizers"]
    snrs, unit = protocol["snrs"], "dB" if protocol["unit"] == "db" else "ratio"
    rows = [[f"SNR ({unit})", *(f"{snr:g}" for snr in snrs)], ["---"] * (1 + len(snrs))]
    for group, measures in GROUPS.items():
        shown = [(name, measure) for measure in measures for name in measured if measure in measured[name]]
        for name, measure in shown:
            rows.append([f"{name} {words(measure)} {ARROWS[group]}", *map(with_half_width, measured[name][measure])])
        for name in published(result):
            at = {snr: f"{value:.3f}" for snr, value in zip(TABLE1["snr"], TABLE1[name][group], strict=True)}
            rows.append([f"*paper: {name} {words(group)}* {ARROWS[group]}", *(at.get(snr, "–") for snr in snrs)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = f"± half the {100 * protocol['confidence']:g} % interval over {protocol['num_images']} images"
    return "\n".join(lines) + (
        f"\n\n{note} ({protocol['images']}). The paper measured DINOv2 and MAGE's VQGAN on ImageNet, and does not say "
        "which cosine it gives.\n"
    )


def with_half_width(interval: Mapping[str, float]) -> str:
    """{"value": 0.114, "low": 0.11, "high": 0.118} -> "0.114 ±0.004"."""
    return f"{interval['value']:.3f} ±{(interval['high'] - interval['low']) / 2:.3f}"
