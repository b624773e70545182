"""Table 2, Figure 3b and Acc@OL of Figure 4a: linear probes of priors, VQ-only models and encoders.

The features are described in `probed_features`. The released code crops training images at random for each of its
100,000 updates and runs the frozen networks again: 1.0e8 images, 1.1e19 FLOP for the base prior, 8 hours of an H100.
Here images are cropped once, so that one pass (6 minutes) gives the features of every layer.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.data.source import ImageSource
from digit.errors import DigitError
from digit.evaluation.curves import Curve, curves_png
from digit.evaluation.feature_files import FeatureFiles, discard
from digit.evaluation.paper import FIG4A, TABLE2
from digit.evaluation.probe_state import states_in
from digit.evaluation.probed_features import collect, last_position, notes_on, training_of
from digit.evaluation.splits import labelled
from digit.metrics.feature_rows import Features
from digit.metrics.probe import LayerResult, ProbeConfig, best_layer, probe_layers, top1_difference
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime import distributed
from digit.runtime.files import as_path, plain, write_result
from digit.runtime.hardware import Precision

POOLED = "pooled"  # features of `FrozenEncoder.pooled`

# ---------------------------------------------------------------- probes


def run_probe(
    pipes: DigitPipeline | Mapping[str, DigitPipeline], train: ImageSource, test: ImageSource,
    cfg: ProbeConfig | None = None, *, out: str | Path, num_train: int | None = None, num_test: int | None = None,
    batch_size: int = 64, precision: Precision = "fp32", tested_on: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Probe the models of pipelines, write OUT/probe.json and OUT/probe.png, return what the JSON holds.

    All ranks call it together: they share the images, rank 0 trains the classifiers, and each gets the result.

    Args:
        pipes: one pipeline, or several by name ("K = 1024"), whose curves share the plot; an encoder that
            several pipelines share is probed once.
        train, test: labelled sources; the test images get the class numbers of the training source.
        num_train, num_test: maximum numbers of images, spread evenly.
        tested_on: where the test images come from, for the results (`splits.probe_splits` says it).

    Raises DigitError where no test image has a class that the training images have.
    """
    named = {"": pipes} if isinstance(pipes, DigitPipeline) else dict(pipes)
    if not named:
        raise DigitError("no pipeline to probe: give at least one")
    test = test.with_classes(train.classes)
    all_labels = test.labels()
    num_unknown = 0 if all_labels is None else int((all_labels < 0).sum())
    if num_unknown == len(test) and labelled(train):
        raise DigitError(
            f"no image of {test.name} has a class of {train.name} ({', '.join(train.classes[:5])}, ...): give a test "
            "set with the same names of classes"
        )
    cfg, folder = cfg or ProbeConfig(), as_path(out) / "features"
    features: dict[str, tuple[Features, Features]] = {}
    notes: dict[str, list[str]] = {}
    settings: dict[str, Any] = dict(batch_size=batch_size, precision=precision, cfg=cfg)
    probed_encoders = set()
    labels = test_labels = torch.zeros(0, dtype=torch.int64)  # of the last pipeline: all see the same images
    for number, (name, pipe) in enumerate(named.items()):
        of = partial(collect, pipe, **settings)
        trained, labels = of(train, num=num_train, description="training features", folder=folder / f"train{number}")
        tested, test_labels = of(test, num=num_test, description="test features", folder=folder / f"test{number}")
        encoder = (pipe.tokenizer and pipe.tokenizer.encoder.fingerprint, pipe.preprocess)
        if encoder in probed_encoders:
            trained.pop("encoder", None)
        probed_encoders.add(encoder)
        for kind, values in trained.items():
            label = f"{name} {kind}".strip()
            features[label] = (values, tested[kind])
            model = {"prior": pipe.prior, "vq_only": pipe.renderer}.get(kind)
            notes[label] = (
                [f"trained {training_of(pipe)}"] if model is None else notes_on(model, last_position(pipe, cfg))
            )
    about = {"train_images": train.name, "test_images": test.name, "crops": "one in the centre of each image"}
    if tested_on is not None:
        about["tested_on"] = tested_on
    left_out = [
        f"{len(chosen) - len(found)} of {len(chosen)} {noun} images have no class of the training images, or are broken"
        for noun, chosen, found in (
            ("training", train.limit(num_train), labels),
            ("test", test.limit(num_test), test_labels),
        )
        if len(found) < len(chosen)
    ]  # on rank 0, which has the labels of all
    if left_out:
        about["left_out"] = "; ".join(left_out)
    device = next(iter(named.values())).device

    def finish() -> dict[str, Any]:
        found = probe_features(
            features, labels, test_labels, cfg, out=out, notes=notes, about=about, device=device, states=folder
        )
        discard(folder)
        return found

    return distributed.on_main(finish)


def probe_features(
    features: Mapping[str, tuple[Features, Features]], labels: Tensor, test_labels: Tensor,
    cfg: ProbeConfig | None = None, *, out: str | Path, notes: Mapping[str, list[str]] | None = None,
    about: Mapping[str, Any] | None = None, groups: Tensor | None = None, device: torch.device | None = None,
    states: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """As `run_probe`, from features by name, (train (N, L, D), test (M, L, D)), all of the same images.

    groups (N,) says which training rows are crops of one image. sgd computes on `device`, None: where the features
    are. It keeps its state in the folder `states`, which the caller discards in the end: what was killed goes on there.
    """
    cfg, notes = cfg or ProbeConfig(), notes or {}
    probed = {}
    for name, (train, test) in features.items():
        of_fits = states and states_in(states, cfg, train, labels, groups)
        names = layer_names(train.shape[1], name)
        probed[name] = probe_layers(train, labels, test, test_labels, cfg, names, groups, device, of_fits)
    best = {name: best_layer(layers) for name, layers in probed.items()}
    result = plain(
        {
            "protocol": dict(about or {}) | {
                "about": "linear probe of the mean over positions (paper, Table 2); settings and best layer chosen on "
                "held-out training images; intervals over test images",
                "num_train": len(labels) if groups is None else len(groups.unique()), "train_rows": len(labels),
                "num_test": len(test_labels), "num_classes": int(labels.max()) + 1,
                "chance": float(torch.bincount(test_labels).max() / len(test_labels)),
                "features": stored(features),
            } | asdict(cfg),
            "probes": {name: describe(layers, best[name], notes.get(name, [])) for name, layers in probed.items()},
            "differences": [
                {"first": a, "second": b, "top1": top1_difference(best[a], best[b], cfg).to_dict()}
                for a, b in combinations(best, 2)
            ],
        }
    )  # fmt: skip
    write_result(as_path(out) / "probe.json", result)
    plot(result, as_path(out) / "probe.png")
    return result


def stored(features: Mapping[str, tuple[Features, Features]]) -> str:
    """How the training features were kept."""
    files = any(isinstance(train, FeatureFiles) for train, _ in features.values())
    return "float16, in files" if files else "float32, in memory"


def layer_names(num: int, name: str = "") -> list[str]:
    """Names of a model's layers: embedding, block 1, ...; a single layer is an encoder's patches or its last output."""
    if num > 1:
        return ["embedding", *(f"block {n}" for n in range(1, num))]
    return ["last layer" if name == POOLED else "patches"]


def describe(layers: list[LayerResult], best: LayerResult, notes: list[str]) -> dict[str, Any]:
    """One model's entry in the JSON."""
    return {"best": best.to_dict(), "layers": [layer.to_dict() for layer in layers], "notes": notes}


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plot top-1 over layers, as Figure 3b; an encoder has one layer, plotted as a horizontal line."""
    curves, depth = [], max(len(entry["layers"]) for entry in result["probes"].values()) - 1
    for colour, (name, entry) in enumerate(result["probes"].items()):
        intervals = [layer["top1"] for layer in entry["layers"]]
        flat = len(intervals) == 1
        x, intervals = ((0, max(depth, 1)), intervals * 2) if flat else (range(len(intervals)), intervals)
        curves.append(Curve.of(intervals, x, factor=100, name=name, colour=colour, line=":" if flat else "-"))
    curves_png(path, {"top-1 accuracy (%)": curves}, xlabel="layer (0 is the embedding)")


def to_table(result: Mapping[str, Any]) -> str:
    """Markdown: the best layer of each probe, then the paper's values."""
    protocol, lines = result["protocol"], ["| features | best layer | top-1 (%) | setting |", "|---|---|---|---|"]
    for name, entry in result["probes"].items():
        best = entry["best"]
        top1 = "{value:.1f} [{low:.1f}, {high:.1f}]".format(**{end: 100 * v for end, v in best["top1"].items()})
        setting = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in best["setting"].items())
        lines.append(f"| {name} | {best['name']} | {top1} | {setting} |")
    lines += [f"| *paper: {name}* | | {top1} | |" for name, top1 in TABLE2.items()]
    lines += [f"| *paper: encoder {name}* | | {metrics[-1]} | |" for name, metrics in FIG4A.items() if metrics[-1]]
    notes = [f"Tested on {protocol['tested_on']}."] if "tested_on" in protocol else []
    notes += [f"{protocol['left_out']}."] if "left_out" in protocol else []
    notes += [f"{name}: {note}." for name, entry in result["probes"].items() for note in entry["notes"]]
    return "\n".join(lines) + (
        f"\n\n{protocol['num_classes']} classes, {protocol['num_train']} training and {protocol['num_test']} test "
        f"images; the most frequent class alone gives {100 * protocol['chance']:.1f} %. The paper: ImageNet, 1000 "
        f"classes. {' '.join(notes)}\n"
    )
