"""Table 1: change of tokens, features and codes under pixel noise, for every tokenizer of a pipeline."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from digit.data.crops import centre_crops
from digit.data.preprocess import PreprocessConfig
from digit.data.source import ImageSource
from digit.evaluation.curves import Curve, curves_png
from digit.evaluation.paper import TABLE1
from digit.metrics.stability import StabilityConfig, measure_stability
from digit.models.tokenizer import ImageTokenizer
from digit.runtime import distributed
from digit.runtime.files import as_path, plain, write_result

GROUPS = {"token_change": ("token_change",), "cosine": ("feature_cosine", "code_cosine")}  # Table 1's -> ours
NUM_IMAGES = 1000  # by default, also of `digit stability`
ARROWS = {"token_change": "↓", "cosine": "↑"}


def run_stability(
    tokenizers: Mapping[str, ImageTokenizer],
    images: ImageSource | Tensor,
    preprocess: PreprocessConfig,
    cfg: StabilityConfig | None = None,
    *,
    num: int = NUM_IMAGES,
    out: str | Path,
    batch_size: int = 32,
    name: str = "given images",
) -> dict[str, Any]:
    """Compute the metrics, write OUT/stability.json and OUT/stability.png, return what the JSON holds.

    Args:
        tokenizers: by name, `pipe.tokenizers` for example.
        images: a source, of which `num` evenly spread images are centre-cropped; or uint8 (N, 3, S, S), all of which
            are used unchanged.
        preprocess: the tokenizers' preprocessing; only its crop size is used.
        batch_size: images at a time; the result does not depend on it.
        name: of images that are given as a tensor. Several ranks share those, and rank 0 writes the files.
    """
    cfg = cfg or StabilityConfig()
    batches: Iterable[Tensor]
    first = 0
    if isinstance(images, Tensor):
        own = distributed.share(len(images), batch_size)
        batches = images[own.start : own.stop].split(batch_size) if own else ()
        total, first = len(own), own.start
    else:
        assert distributed.world_size() == 1, "ranks share a tensor of images"
        batches = (crops for crops, _ in centre_crops(images, preprocess, num=num, batch_size=batch_size))
        total, name = min(num, len(images)), images.name
    result = plain(measure_stability(tokenizers, batches, cfg, total, first=first))
    result["protocol"]["images"] = name
    result["paper"] = TABLE1
    distributed.on_main(lambda: write(result, as_path(out)))
    return result


def write(result: Mapping[str, Any], out: Path) -> None:
    """Write stability.json and stability.png."""
    write_result(out / "stability.json", result)
    plot(result, out / "stability.png")


def published(result: Mapping[str, Any]) -> list[str]:
    """Names of tokenizers that compare with Table 1: named as there, and with the SNR defined as we read the paper."""
    protocol = result["protocol"]
    same = protocol["unit"] == "db" and protocol["power"] == "mean_square"
    return [name for name in result["tokenizers"] if same and name in TABLE1]


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plot token change and cosine against SNR, noise increasing to the right; the paper's Table 1 thin and dashed."""
    snrs, tokenizers, ratio = result["protocol"]["snrs"], result["tokenizers"], result["protocol"]["unit"] == "ratio"
    colours = {name: index for index, name in enumerate(tokenizers)}
    panels: dict[str, list[Curve]] = {}
    for group, metrics in GROUPS.items():
        panels[words(group)] = [
            Curve.of(
                tokenizers[name][metric], snrs, name=f"{name}, {words(metric)}", colour=colour,
                line=":" if metric == "code_cosine" else "-",
            )
            for metric in metrics
            for name, colour in colours.items()
            if metric in tokenizers[name]
        ] + [
            Curve(name=f"{name}, paper", x=TABLE1["snr"], y=TABLE1[name][group], colour=colours[name], reference=True)
            for name in published(result)
        ]  # fmt: skip
    xlabel = "signal-to-noise ratio" + ("" if ratio else " (dB)")
    curves_png(path, panels, xlabel=xlabel, falling=True, logarithmic=ratio)


def words(metric: str) -> str:
    """token_change -> token change."""
    return metric.replace("_", " ")


def to_table(result: Mapping[str, Any]) -> str:
    """Markdown in the layout of Table 1, one column per SNR: our values with half the interval, then the paper's."""
    protocol, tokenizers = result["protocol"], result["tokenizers"]
    snrs, unit = protocol["snrs"], "dB" if protocol["unit"] == "db" else "ratio"
    rows = [[f"SNR ({unit})", *(f"{snr:g}" for snr in snrs)], ["---"] * (1 + len(snrs))]
    for group, metrics in GROUPS.items():
        shown = [(name, metric) for metric in metrics for name in tokenizers if metric in tokenizers[name]]
        for name, metric in shown:
            rows.append([f"{name} {words(metric)} {ARROWS[group]}", *map(with_half_width, tokenizers[name][metric])])
        for name in published(result):
            by_snr = {snr: f"{value:.3f}" for snr, value in zip(TABLE1["snr"], TABLE1[name][group], strict=True)}
            rows.append([f"*paper: {name} {words(group)}* {ARROWS[group]}", *(by_snr.get(snr, "–") for snr in snrs)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = f"± half the {100 * protocol['confidence']:g} % interval over {protocol['num_images']} images"
    return "\n".join(lines) + (
        f"\n\n{note} ({protocol['images']}), – where all have one value. The paper used DINOv2 and MAGE's VQGAN on "
        "ImageNet, and does not say which cosine it reports.\n"
    )


def with_half_width(interval: Mapping[str, float]) -> str:
    """{"value": 0.114, "low": 0.11, "high": 0.118} -> "0.114 ±0.004"; "0.114 –" where all images have one value."""
    if interval["high"] == interval["low"]:
        return f"{interval['value']:.3f} –"
    return f"{interval['value']:.3f} ±{(interval['high'] - interval['low']) / 2:.3f}"
