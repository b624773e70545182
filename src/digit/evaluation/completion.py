"""Figure 4b of the paper: distance of completed images against the kept prefix, one curve per pipeline.

Completion keeps whole token rows of every grid of a pipeline. A fraction that one of its grids cannot keep exactly is
left out for that pipeline: with 4 x 4 discriminative and 8 x 8 VQ tokens, "12.5 %" would keep a quarter of the former
and an eighth of the latter, which would favour that pipeline.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from digit.data.pictures import Images, as_images
from digit.data.preprocess import fit_batch
from digit.errors import DigitError
from digit.evaluation.cache import pipeline_key, remember_rows, request_key
from digit.evaluation.curves import Curve, curves_png
from digit.evaluation.features import fingerprint
from digit.metrics.completion import Complete, complete_and_judge, curve_difference, distance_curve
from digit.metrics.frechet import FeatureStats, count_warnings
from digit.metrics.intervals import Interval
from digit.metrics.judge import JudgeNetwork
from digit.models.sequence import SequenceModel
from digit.pipeline.pipeline import DigitPipeline, kept_tokens
from digit.runtime import distributed, plots
from digit.runtime.files import as_path, plain, sha256_tensors, write_result

SHOWN = 8  # images in the grids
BATCH = 256  # images that are completed together
NOTE = "kept tokens are computed from whole images: a wide receptive field reveals some of the hidden part"


def run_completion(
    pipes: Mapping[str, DigitPipeline],
    images: Images,
    reference: Tensor | FeatureStats,
    network: JudgeNetwork,
    keeps: Sequence[float],
    out: str | Path,
    *,
    seed: int = 0,
    labels: Sequence[int | str] | None = None,
) -> dict[str, Any]:
    """Complete images by every pipeline at every fraction; write completion.json, completion.png, completed_NAME.png.

    Args:
        pipes: by name; the first is compared with each other one, usually "discriminative" against "VQ-only".
        images: uint8 (N, 3, S, S), or what else `as_images` takes, held out from training; cropped
            to the size of the pipelines.
        reference: pooled features (M, D) of real images from `network`, or their statistics.
        network: gives the features and the metric's name.
        keeps: fractions of the rows (the paper's: metrics.completion.KEEPS).
        out: folder; OUT/cache keeps features by pipeline and fraction, and cached completions are not sampled again.
        seed: of the first image.
        labels: names or numbers (N,) of the classes of the images; with None a
            conditional pipeline predicts each from its whole image.

    Returns the JSON's content: pipes.NAME.curve lists {"keep", "kept", "distance"}, skipped the fractions left out.
    All ranks call it together: they share the images, and rank 0 measures and writes. Raises DigitError, before any
    sampling, where a pipeline can keep none of the fractions exactly.
    """
    out, reference = as_path(out), reference if isinstance(reference, FeatureStats) else FeatureStats.of(reference)
    images = as_images(images)
    exact = {name: exact_fractions(pipe, keeps) for name, pipe in pipes.items()}
    completed = {
        name: completions(pipe, images, exact[name], network, out / "cache", seed, labels)
        for name, pipe in pipes.items()
    }
    return distributed.on_main(lambda: measure(pipes, images, completed, reference, network, keeps, out, seed, labels))


def measure(
    pipes: Mapping[str, DigitPipeline],
    images: Tensor,
    completed: Mapping[str, Mapping[float, Mapping[str, Tensor]]],
    reference: FeatureStats,
    network: JudgeNetwork,
    keeps: Sequence[float],
    out: Path,
    seed: int,
    labels: Sequence[int | str] | None,
) -> dict[str, Any]:
    """Distances of what `completions` gave by pipeline; writes completion.json and the plots."""
    features, curves = {}, {}
    for name, pipe in pipes.items():
        path = out / f"completed_{re.sub('[^A-Za-z0-9-]+', '_', name)}.png"
        plot_grid(path, images, completed[name], pipe.image_size)
        features[name] = {keep: entry["features"] for keep, entry in completed[name].items()}
        curves[name] = distance_curve(features[name], reference)
    result = {
        "metric": network.metric("fd"),
        "network": network.describe(),
        "num_images": len(images),
        "reference_images": reference.count,
        "seed": seed,
        "note": NOTE,
        "pipes": {name: describe(pipe, curves[name], keeps, labels) for name, pipe in pipes.items()},
        "differences": differences(features, reference),
        "warnings": count_warnings(len(images), reference.count, reference.dim),
    }
    result = plain(result)
    write_result(out / "completion.json", result)
    plot_curves(out / "completion.png", result)
    return result


def completions(
    pipe: DigitPipeline,
    images: Tensor,
    keeps: Sequence[float],
    network: JudgeNetwork,
    cache: Path,
    seed: int,
    labels: Sequence[int | str] | None,
) -> dict[float, Mapping[str, Tensor]]:
    """Fraction -> {"features" (N, D), "shown"}, cached; fraction 1 keeps all: the VQGAN's reconstruction."""
    fitted, complete = fit_batch(images, pipe.image_size, pipe.preprocess.fit), completer(pipe, seed, labels)
    request = {"pipe": pipeline_key(pipe), "sampling": asdict(pipe.sampling), "network": fingerprint(network)}
    request |= {"images": sha256_tensors({"images": fitted}), "seed": seed, "labels": labels and list(labels)}

    def rows(keep: float) -> Mapping[str, Tensor]:
        path = cache / f"{request_key(**request, keep=keep)}.safetensors"
        return remember_rows(path, len(fitted), block, lambda start, stop: completed_rows(keep, start, stop))

    def completed_rows(keep: float, start: int, stop: int) -> dict[str, Tensor]:
        def judged(batch: Tensor) -> Tensor:
            return network.judge(batch).pooled

        def complete_part(images: Tensor, keep: float, first: int) -> Tensor:
            return complete(images, keep, start + first)

        shown = max(0, SHOWN - start)
        return complete_and_judge(
            complete_part, fitted[start:stop], keep, judged, batch_size=stop - start, num_shown=shown
        )

    block = pipe.sampling.batch_size or BATCH
    return {keep: rows(keep) for keep in (*keeps, 1.0)}


def describe(
    pipe: DigitPipeline, curve: Mapping[float, Interval], keeps: Sequence[float], labels: Sequence[int | str] | None
) -> dict[str, Any]:
    """The JSON entry of one pipeline."""
    skipped = sorted(set(keeps) - curve.keys())
    points = {keep: distance for keep, distance in curve.items() if keep < 1}
    return {
        "fingerprint": pipeline_key(pipe),
        "sampling": asdict(pipe.sampling),
        "labels": label_source(pipe, labels),
        "grids": grids(pipe),
        "curve": [{"keep": k, "kept": kept(pipe, k), "distance": d.to_dict()} for k, d in points.items()],
        "skipped": [{"keep": keep, "kept": kept(pipe, keep)} for keep in skipped],
        "reconstruction": curve[1.0].to_dict(),
    }


def differences(features: Mapping[str, Mapping[float, Tensor]], reference: FeatureStats) -> list[dict[str, Any]]:
    """The first curve minus each other one, at the fractions that both have; below 0 the first completes better."""
    (first, first_features), *others = features.items()
    return [
        {"first": first, "second": name, "keep": keep, "difference": difference.to_dict()}
        for name, other_features in others
        for keep, difference in curve_difference(first_features, other_features, reference).items()
        if keep < 1
    ]


def completer(pipe: DigitPipeline, seed: int, labels: Sequence[int | str] | None) -> Complete:
    """A pipeline as `metrics.completion.Complete`; image i is sampled with seed + i and its own label."""

    def complete(images: UInt8[Tensor, "B 3 S S"], keep: float, first: int) -> UInt8[Tensor, "B 3 S S"]:
        labelled = labels is not None and bool(first_model(pipe).cfg.num_classes)
        batch_labels = list(labels[first : first + len(images)]) if labelled and labels is not None else None
        return pipe.complete(images, keep, seed + first, batch_labels, pixels="decoded")  # as in the paper

    return complete


def first_model(pipe: DigitPipeline) -> SequenceModel:
    """The model that samples first; it takes the class labels."""
    pipe.require(*(["renderer"] if pipe.renders_pixels else ["vq", "renderer"]))
    assert pipe.renderer is not None
    model = pipe.prior if pipe.renderer.cfg.prefix_len else pipe.renderer
    assert model is not None
    return model


def label_source(pipe: DigitPipeline, labels: Sequence[int | str] | None) -> str:
    """Where the classes of the images came from, as text for the JSON."""
    if not first_model(pipe).cfg.num_classes:
        return "none: the pipeline is unconditional"
    return "predicted from each whole image, which reveals something of its hidden part" if labels is None else "given"


# -------------------------------------------------------------------- what can be kept


def grids(pipe: DigitPipeline) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each kind of token that a completion keeps."""
    assert pipe.renderer is not None
    names = [*(["discriminative"] if pipe.renderer.cfg.prefix_len else []), *([] if pipe.renders_pixels else ["vq"])]
    return {name: pipe.tokenizers[name].grid for name in names}


def kept(pipe: DigitPipeline, keep: float) -> dict[str, float]:
    """The fraction of each kind of token that is kept when `keep` is rounded to whole rows."""
    return {name: kept_tokens(grid, keep) / math.prod(grid) for name, grid in grids(pipe).items()}


def exact_fractions(pipe: DigitPipeline, keeps: Sequence[float]) -> list[float]:
    """The fractions that every grid of the pipeline can keep exactly, sorted. Raises DigitError if there are none."""
    if not all(0 < keep < 1 for keep in keeps):
        raise DigitError(f"fractions to keep are {list(keeps)}: wanted numbers between 0 and 1, such as 0.5")
    requested = sorted(set(keeps))
    exact = [keep for keep in requested if all(math.isclose(got, keep) for got in kept(pipe, keep).values())]
    if not exact:
        rows = math.gcd(*(grid[0] for grid in grids(pipe).values()))
        possible = ", ".join(f"{row / rows:g}" for row in range(1, rows)) or "none"
        raise DigitError(f"token grids {grids(pipe)} keep none of {requested} in whole rows: choose among {possible}")
    return exact


# -------------------------------------------------------------------- plots


def plot_curves(path: Path, result: dict[str, Any]) -> None:
    """Plot distance against prefix length in percent, as Figure 4b; dashed, the distance of VQGAN reconstructions."""
    curves, floors = [], {}
    for colour, (name, pipe) in enumerate(result["pipes"].items()):
        x = [100 * point["keep"] for point in pipe["curve"]]
        curves.append(Curve.of([point["distance"] for point in pipe["curve"]], x, name=name, colour=colour))
        floor = pipe["reconstruction"]["value"]
        floors[floor] = Curve(name="all kept", x=[0, 100], y=[floor] * 2, colour=colour, reference=True)
    curves += floors.values()  # one line where the pipelines share a VQGAN
    curves_png(path, {result["metric"]: curves}, xlabel="prefix length / %")


def plot_grid(path: Path, images: Tensor, completed: Mapping[float, Mapping[str, Tensor]], size: int) -> None:
    """Save a grid: the images, then one row per fraction; a pale line marks the end of the kept part."""
    rows, names = [fit_batch(images[:SHOWN].cpu(), size)], ["image"]
    for keep, entry in sorted(completed.items()):
        rows.append(entry["shown"] if keep == 1 else with_cut(entry["shown"], keep))
        names.append("all kept" if keep == 1 else f"{100 * keep:g}%")
    scale = max(1, 96 // size)
    plots.save_png(path, plots.grid(torch.cat(rows), len(rows[0]), scale=scale, row_names=names))


def with_cut(images: UInt8[Tensor, "B 3 S S"], keep: float) -> UInt8[Tensor, "B 3 S S"]:
    """Copies of the images with the last kept row of pixels blended half with white."""
    marked, row = images.clone(), round(images.shape[2] * keep) - 1
    marked[:, :, row] = ((marked[:, :, row].int() + 255) // 2).to(torch.uint8)
    return marked
