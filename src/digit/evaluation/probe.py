"""Table 2, Figure 3b and Acc@OL of Figure 4a: linear probes of priors, VQ-only models and encoders.

Features of a sequence model are those of the released code except for the last position (`prior_features`): the mean
over positions, including the start symbol, of each layer n; n = 0 is the embedding, n = depth the last block (before a
pre-norm model's final norm). The released code trains heads on n = 0 .. depth - 1; here n = depth is probed too. The
released code crops training images at random in every epoch; here they are cropped once, so that one pass of the frozen
networks gives the features of every layer.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from digit.data.loader import CropLoader
from digit.data.preprocess import PreprocessConfig
from digit.data.source import ImageSource
from digit.errors import DigitError
from digit.evaluation.curves import Curve, curves_png
from digit.evaluation.paper import FIG4A, TABLE2
from digit.evaluation.sharing import rows_to_main
from digit.evaluation.splits import labelled
from digit.metrics.probe import LayerResult, ProbeConfig, best_layer, probe_layers, top1_difference
from digit.models.sequence import SequenceModel
from digit.pipeline.batch_size import micro_batch_size
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime import distributed
from digit.runtime.files import as_path, plain, write_result
from digit.runtime.hardware import Precision
from digit.runtime.progress import Progress
from digit.tokenizers.base import Encoder

LABELS = "labels"


# ---------------------------------------------------------------- features


@torch.no_grad()
def prior_features(
    model: SequenceModel,
    tokens: Integer[Tensor, "N M"],
    *,
    batch_size: int = 64,
    precision: Precision = "fp32",
    last_position: bool = False,
) -> Float[Tensor, "N L D"]:
    """Tokens (N, M) of images -> (N, depth + 1, D) float32 on the CPU, the mean over positions of every layer.

    Positions are the start symbol and the tokens. The last token is never a training input in our models, so its
    position embedding is untrained, and it is left out unless `last_position` is set. Released models end in an extra
    symbol that they were trained on, and the released code's mean is over all positions. A conditional model gets the
    unconditional start symbol, since the class would reveal the label (`notes_on` tells if that symbol is untrained).
    Raises DigitError for a model with a prefix and for other lengths.
    """
    if model.cfg.prefix_len:
        raise DigitError("a renderer reads the prefix too: probe the prior, or a VQ-only model")
    if tokens.ndim != 2 or tokens.shape[1] != model.cfg.target_len:
        raise DigitError(f"tokens are {tuple(tokens.shape)}, the model reads (N, {model.cfg.target_len})")
    device, training = model.device, model.training
    model.eval()
    parts = []
    for chunk in tokens.split(micro_batch_size(model, batch_size)):
        hidden: list[Tensor] = []
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            model.features(chunk.long().to(device), hidden=hidden)  # as return_hidden=True, without the logits
        kept = hidden if last_position or model.cfg.masked else [h[:, :-1] for h in hidden]
        parts.append(torch.stack([h.float().mean(1) for h in kept], 1).cpu())  # (B, L, D)
    model.train(training)
    return torch.cat(parts)


def encoder_features(encoder: Encoder, images: UInt8[Tensor, "N 3 S S"]) -> Float[Tensor, "N 1 D"]:
    """uint8 (N, 3, S, S) -> (N, 1, D) float32 on the CPU: the mean over patches at the layer the tokens are made of."""
    return encoder.features(images).mean(1, keepdim=True).float().cpu()


def notes_on(model: SequenceModel) -> list[str]:
    """Caveats about a model's features, for the results."""
    if model.cfg.num_classes and not model.cfg.label_dropout:
        return ["trained with a class on every sequence: the unconditional start symbol that is used here is untrained"]
    return []


def training_of(pipe: DigitPipeline) -> str:
    """What the encoder was trained on, if known."""
    assert pipe.tokenizer is not None
    return str(pipe.tokenizer.encoder.describe().get("training", "on what is not recorded"))


def collect(
    pipe: DigitPipeline, source: ImageSource, *, num: int | None = None, batch_size: int = 64,
    precision: Precision = "fp32", description: str = "features",
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Features of each model of a pipeline that can be probed, from centre crops of the labelled images of a source.

    Returns ({"prior", "vq_only", "encoder": (N, L, D) float32}, those that the pipeline has, and labels (N,) int64).
    The encoder runs once for its own features and for the tokens. vq_only is a renderer without prefix. Each rank
    takes a share; rank 0 gets all features and labels, the others none.
    Raises DigitError if the source has no labels or the pipeline holds nothing to probe.
    """
    vq_only = pipe.renderer if pipe.renderer is not None and not pipe.renderer.cfg.prefix_len else None
    if pipe.tokenizer is None and vq_only is None:
        raise DigitError("nothing to probe: the pipeline holds neither a discriminative tokenizer nor a VQ-only model")
    chosen, num_read = source.limit(num), 0
    settings: dict[str, Any] = dict(batch_size=batch_size, precision=precision)

    def share() -> dict[str, Tensor]:
        nonlocal num_read
        parts = defaultdict(list)
        with Progress(description, len(distributed.share(len(chosen), batch_size))) as bar:
            for images, labels in _shared_crops(chosen, pipe.preprocess, batch_size):
                num_read += len(images)
                bar.update(len(images))
                images, labels = images[labels >= 0], labels[labels >= 0]
                if not len(images):
                    continue
                parts[LABELS].append(labels)
                if pipe.tokenizer is not None:
                    tokens, features = pipe.tokenizer.encode_features(images)
                    parts["encoder"].append(features.mean(1, keepdim=True).cpu())
                    if pipe.prior is not None:
                        parts["prior"].append(prior_features(pipe.prior, tokens, **settings))
                if vq_only is not None and pipe.vq is not None:
                    parts["vq_only"].append(prior_features(vq_only, pipe.vq.encode(images), **settings))
        return {name: torch.cat(part) for name, part in parts.items()}

    features = rows_to_main(share)
    if not sum(distributed.gather(num_read)):
        raise DigitError(f"{source.name} holds no image that can be read")
    if not distributed.any_rank(LABELS in features):
        classes = f" of the classes {', '.join(source.classes[:5])}" if source.classes else ""
        raise DigitError(f"{source.name} has no labels{classes}: a linear probe needs a class for each image")
    labels = features.pop(LABELS, torch.zeros(0, dtype=torch.int64))
    return features, labels


def _shared_crops(source: ImageSource, cfg: PreprocessConfig, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the batches of `centre_crops`; batch boundaries are the same for any number of ranks."""
    share = distributed.share(len(source), batch_size)
    loader = CropLoader(
        source, replace(cfg, random_crop=False, flip=False),
        batch_size=batch_size, max_bad_fraction=1.0, start_row=share.start,
    )  # fmt: skip
    with loader.sharing_cores():
        for batch in islice(loader, -(-len(share) // batch_size)):
            yield batch.images[batch.ok], batch.labels[batch.ok]


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
    features: dict[str, tuple[Tensor, Tensor]] = {}
    notes: dict[str, list[str]] = {}
    settings: dict[str, Any] = dict(batch_size=batch_size, precision=precision)
    probed_encoders = set()
    labels = test_labels = torch.zeros(0, dtype=torch.int64)  # of the last pipeline: all see the same images
    for name, pipe in named.items():
        trained, labels = collect(pipe, train, num=num_train, description="training features", **settings)
        tested, test_labels = collect(pipe, test, num=num_test, description="test features", **settings)
        encoder = (pipe.tokenizer and pipe.tokenizer.encoder.fingerprint, pipe.preprocess)
        if encoder in probed_encoders:
            trained.pop("encoder", None)
        probed_encoders.add(encoder)
        for kind, values in trained.items():
            label = f"{name} {kind}".strip()
            features[label] = (values, tested[kind])
            model = {"prior": pipe.prior, "vq_only": pipe.renderer}.get(kind)
            notes[label] = [f"trained {training_of(pipe)}"] if model is None else notes_on(model)
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
    return distributed.on_main(
        lambda: probe_features(features, labels, test_labels, cfg, out=out, notes=notes, about=about)
    )


def probe_features(
    features: Mapping[str, tuple[Tensor, Tensor]], labels: Tensor, test_labels: Tensor,
    cfg: ProbeConfig | None = None, *, out: str | Path, notes: Mapping[str, list[str]] | None = None,
    about: Mapping[str, Any] | None = None, groups: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """As `run_probe`, from features by name, (train (N, L, D), test (M, L, D)), all of the same images.

    groups (N,) says which training rows are crops of one image.
    """
    cfg, notes = cfg or ProbeConfig(), notes or {}
    probed = {
        name: probe_layers(train, labels, test, test_labels, cfg, layer_names(train.shape[1]), groups)
        for name, (train, test) in features.items()
    }
    best = {name: best_layer(layers) for name, layers in probed.items()}
    result = plain(
        {
            "protocol": dict(about or {}) | {
                "about": "linear probe of the mean over positions (paper, Table 2); settings and best layer chosen on "
                "held-out training images; intervals over test images",
                "num_train": len(labels) if groups is None else len(groups.unique()), "train_rows": len(labels),
                "num_test": len(test_labels), "num_classes": int(labels.max()) + 1,
                "chance": float(torch.bincount(test_labels).max() / len(test_labels)),
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


def layer_names(num: int) -> list[str]:
    """Names of a model's layers: embedding, block 1, ...; a single layer is an encoder's patches."""
    return ["patches"] if num == 1 else ["embedding", *(f"block {n}" for n in range(1, num))]


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
