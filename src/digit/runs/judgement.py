"""How good a run's pictures are, on a scale: beside real pictures, and what its tokenizer makes of real pictures.

Samples, as many real pictures and their reconstructions are compared with the same training pictures, so that the same
bias is in all three. A reconstruction is the floor: samples made of the same tokens can hardly do better.

Shapes: S samples, R training pictures, H other real pictures, N discriminative and M VQ tokens, D features, S pixels.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from torch import Tensor

from digit.data.images import ImageSource
from digit.data.loader import CropLoader
from digit.data.preprocess import PreprocessConfig
from digit.data.tokens import TokenStore
from digit.metrics.frechet import count_warnings
from digit.metrics.intervals import proportion_interval
from digit.metrics.judge import JUDGE_INPUT_SIZE, METRIC, LinearClassifier, collect_features, fd, fit_linear_classifier
from digit.metrics.neighbours import Neighbours, compare_at, copying_score
from digit.metrics.stability import StabilityConfig, measure_stability
from digit.models.sequence import SequenceConfig
from digit.pipeline.pipeline import DigitPipeline
from digit.runs.pictures import real_images
from digit.runtime import distributed
from digit.runtime.progress import Progress
from digit.runtime.spread import spread
from digit.sampling.config import SamplingConfig
from digit.sampling.kinds import can_guide
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_encoder

# EfficientNet-Lite2: another network than the tokens' encoder, so that it does not judge its own features
JUDGE = EncoderConfig(name="efficientnet_lite2", layer="pooled", input_size=JUDGE_INPUT_SIZE)
REFERENCE = 2000  # training pictures that are compared with
JUDGED_TOGETHER = 64  # images
NUM_NEIGHBOURS, NUM_COVERAGE = 3, 5  # k of precision and recall, of coverage (as their papers)
MOST_CLASSES = 200  # that a classifier on so few pictures tells apart
NOISY, SNRS = 48, (30.0, 20.0)  # pictures under noise, and decibels; 30 is hardly seen
OTHER_WAY_SECONDS = 300.0  # of sampling, up to which samples are judged with and without guidance
TRIED = {"prior": 1.5, "renderer": 2.0}  # scales for a run that was trained for guidance and samples without
NUM_PAIRS = 6  # samples beside their nearest training picture, of each kind
NEAR = 0.5  # of the distance between a training picture and its nearest other: below, a sample looks like a copy
LOOKED_UP = 20_000  # training crops whose VQ tokens are compared one by one with the samples'
REPEATABLE = 200_000  # training crops whose tokens may be repeated whole
NEARLY = 0.9  # share of equal VQ tokens
SIGNIFICANT, FEWEST = 3.0, 20  # of the copying score, and of the pictures that it needs
Sampling = dict[str, Any]


def load_judge() -> FrozenEncoder:
    """The network that judges a run's samples."""
    return load_encoder(JUDGE)


# -------------------------------------------------------------------- guidance


@dataclass(frozen=True)
class Ways:
    """The two ways to sample a run that was trained for guidance."""

    guided: Sampling
    """Changes of the settings for guidance, {"prior": {"cfg_scale": 1.5}, ...}."""
    plain: Sampling
    """Changes of the settings for none."""
    by_default: bool
    """Whether the pipeline samples with guidance."""

    @property
    def other(self) -> Sampling:
        """Changes for the way that is not the pipeline's own."""
        return self.plain if self.by_default else self.guided

    @property
    def names(self) -> tuple[str, str]:
        """What the pipeline's own way and the other one are called."""
        first, second = "with guidance", "without guidance"
        return (first, second) if self.by_default else (second, first)


def find_ways(pipe: DigitPipeline) -> Ways | None:
    """The ways to sample; None where no model was trained with dropped labels or prefixes."""
    models = {"prior": pipe.prior, "renderer": pipe.renderer}
    return ways_of({stage: model.cfg for stage, model in models.items() if model is not None}, pipe.sampling)


def ways_of(models: Mapping[str, SequenceConfig], sampling: SamplingConfig) -> Ways | None:
    """The ways to sample models, {"prior": ..., "renderer": ...}; also for a plan of them (`planning.stages`)."""
    scales = {stage: getattr(sampling, stage).cfg_scale for stage, cfg in models.items() if can_guide(cfg)}
    if not scales:
        return None
    by_default = any(scale != 1 for scale in scales.values())
    chosen = scales if by_default else {stage: TRIED[stage] for stage in scales}
    return Ways(
        {stage: {"cfg_scale": scale} for stage, scale in chosen.items()},
        {stage: {"cfg_scale": 1.0} for stage in scales},
        by_default,
    )


# -------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Real:
    """Real pictures of a run, by their places in the source."""

    features: Float32[Tensor, "R D"]
    labels: Int64[Tensor, " R"]
    indices: Int64[Tensor, " R"]


@dataclass(frozen=True)
class Samples:
    """Sampled pictures with what they were made of."""

    images: UInt8[Tensor, "S 3 H W"]
    features: Float32[Tensor, "S D"]
    labels: Int64[Tensor, " S"]
    tokens: Mapping[str, Tensor]
    seconds: float
    """That sampling and decoding took."""


@dataclass(frozen=True)
class Pair:
    """A sample beside its nearest training picture."""

    sample: int
    image: int
    """Place of the training picture in the source."""
    ratio: float
    """Their distance over that of the training picture to its own nearest other."""


@dataclass(frozen=True)
class Judgement:
    """What was measured, for metrics.json and the page."""

    metrics: dict[str, Any]
    samples: Samples
    pairs: dict[str, list[Pair]]
    """Evenly spread over the samples, and the closest."""
    ways: Ways | None


def choose_real(total: int, num: int, *, held_out: Sequence[int] = ()) -> tuple[list[int], list[int]]:
    """Places of the training pictures that are compared with, and of other real pictures; no picture is in both.

    The others are at most `num` and a quarter of all; those that are held out of training come first.
    """
    num = min(num, total // 4)
    rng = np.random.default_rng(0)  # evenly spaced ones could all be of one class, where classes take turns
    kept = rng.permutation(np.array(held_out, dtype=np.int64))[:num].tolist()
    rest = sorted(set(range(total)) - set(held_out))
    others = sorted([*kept, *rng.permutation(rest)[: num - len(kept)].tolist()])
    training = sorted(set(rest) - set(others)) or rest
    return [training[i] for i in spread(len(training), REFERENCE)], others


def crop_batches(
    source: ImageSource, cfg: PreprocessConfig, indices: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(images (B, 3, S, S) uint8, labels (B,), places in the source (B,)) of the readable ones, centre-cropped."""
    centre = replace(cfg, random_crop=False, flip=False)
    loader = CropLoader(
        source, centre, indices=np.array(indices, dtype=np.int64), batch_size=JUDGED_TOGETHER, max_bad_fraction=1.0
    )
    for batch in loader:
        if batch.ok.any():
            yield batch.images[batch.ok], batch.labels[batch.ok], batch.indices[batch.ok]


def judge_real(judge: FrozenEncoder, source: ImageSource, cfg: PreprocessConfig, indices: Sequence[int]) -> Real:
    """Features of real pictures, without keeping the pictures."""
    labels, places = [], []

    def images() -> Iterable[Tensor]:
        for batch, own, at in crop_batches(source, cfg, indices):
            labels.append(own)
            places.append(at)
            yield batch

    features = collect_features(images(), judge.pooled, description="judge training pictures", total=len(indices))
    return Real(features, torch.cat(labels), torch.cat(places))


def draw(
    judge: FrozenEncoder, pipe: DigitPipeline, num: int, seed: int, changes: Sampling, description: str
) -> Samples:
    """Sample `num` pictures, every class in turn, and their features."""
    began, labels = perf_counter(), pipe.labels(num)
    tokens: dict[str, Tensor] = {}
    if pipe.renders_pixels:
        images = pipe.generate(num, None, seed, **changes)
    else:
        tokens = pipe.generate_tokens(num, None, seed, **changes)
        tokens.pop("labels")
        images = pipe.decode(tokens["vq"], pipe.settings(**changes).precision)
    seconds = perf_counter() - began
    features = collect_features(images.split(JUDGED_TOGETHER), judge.pooled, description=description, total=num)
    return Samples(images.cpu(), features, labels, tokens, seconds)


def reconstruct(pipe: DigitPipeline, images: UInt8[Tensor, "B 3 S S"]) -> UInt8[Tensor, "B 3 S S"]:
    """Images through the VQ tokens, or through the tokens of a renderer straight to pixels."""
    if pipe.renders_pixels:
        return pipe.rerender(images)
    assert pipe.vq is not None
    return pipe.vq.decode(pipe.vq.encode(images))


# -------------------------------------------------------------------- the judgement


def judge_run(
    pipe: DigitPipeline,
    source: ImageSource,
    *,
    num: int,
    seed: int,
    held_out: Sequence[int] = (),
    store: TokenStore | None = None,
) -> Judgement:
    """Judge a pipeline on the pictures that it was trained on.

    Args:
        num: samples; as many other real pictures are taken where there are so many.
        seed: of the first sample.
        held_out: places of pictures that no model was trained on.
        store: the tokens of the training crops.
    """
    judge = load_judge().to(pipe.device)
    training, others = choose_real(len(source), num, held_out=held_out)
    reference = judge_real(judge, source, pipe.preprocess, training)
    sampled = draw(judge, pipe, num, seed, {}, "judge samples")
    metrics: dict[str, Any] = {METRIC: fd(sampled.features, reference.features)}
    metrics[f"{METRIC}_images"] = [len(sampled.features), len(reference.features)]
    metrics[f"{METRIC}_warnings"] = count_warnings(*metrics[f"{METRIC}_images"], dim=reference.features.shape[1])

    sets: dict[str, Float32[Tensor, "S D"]] = {"samples": sampled.features}
    ways, other = find_ways(pipe), None
    if ways is not None and sampled.seconds <= OTHER_WAY_SECONDS:
        other = draw(judge, pipe, num, seed, ways.other, f"judge samples {ways.names[1]}")
        sets["other_way"] = other.features
    real_labels = torch.empty(0, dtype=torch.int64)
    if others:
        real, real_labels = real_images(source, pipe.preprocess, others)
        rebuilt = torch.cat([reconstruct(pipe, part) for part in real.split(JUDGED_TOGETHER)])
        for name, images in (("real", real), ("reconstructions", rebuilt)):
            sets[name] = collect_features(images.split(JUDGED_TOGETHER), judge.pooled, description=f"judge {name}")
    metrics["guidance"] = None if ways is None else {"default": ways.names[0], "scales": ways.guided}
    with Progress("compare with training pictures", 3) as bar:
        metrics["scale"] = scale(sets, reference.features)
        bar.update()
        metrics |= recognition(sets, sampled.labels, reference, real_labels, pipe)
        bar.update()
        found = compare(reference.features, sampled.features)
        metrics["memorising"] = memorising(sampled, sets, reference, found, store)
        bar.update()
    metrics["stability"] = stability(pipe, source, training)
    return Judgement(metrics, sampled, choose_pairs(found, reference), ways)


def compare(reference: Float32[Tensor, "R D"], features: Float32[Tensor, "S D"]) -> list[Neighbours] | None:
    """Neighbours with k of precision and recall, and of coverage; None where there are too few pictures."""
    if min(len(reference), len(features)) <= NUM_COVERAGE:
        return None
    return compare_at(reference, features, (NUM_NEIGHBOURS, NUM_COVERAGE))


def scale(sets: Mapping[str, Float32[Tensor, "S D"]], reference: Float32[Tensor, "R D"]) -> dict[str, Any]:
    """Distance, precision, recall and coverage of each set of equally many pictures against the training pictures.

    {"images": n, "reference": R, "sets": {"samples": {METRIC, "precision", "recall", "coverage"}, "real": ...}}; the
    shares are intervals. Empty where no other real pictures are at hand.
    """
    num = min(len(features) for features in sets.values())
    if "real" not in sets or num < 2:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name, features in sets.items():
        found[name] = {METRIC: fd(features[:num], reference)}
        if (near := compare(reference, features[:num])) is not None:
            few, more = near
            shares = {"precision": few.precision(), "recall": few.recall(), "coverage": more.coverage()}
            found[name] |= {share: interval.to_dict() for share, interval in shares.items()}
    return {"images": num, "reference": len(reference), "sets": found}


def recognition(
    sets: Mapping[str, Float32[Tensor, "S D"]],
    labels: Int64[Tensor, " S"],
    reference: Real,
    real_labels: Int64[Tensor, " H"],
    pipe: DigitPipeline,
) -> dict[str, Any]:
    """Share of pictures that a linear classifier, trained on the training pictures' features, takes for their class.

    The same for other real pictures, and for their reconstructions. {} without classes, with more than MOST_CLASSES, or
    with fewer labelled training pictures than classes.
    """
    known, num_classes = reference.labels >= 0, len(pipe.classes)
    if not pipe.num_classes or not 2 <= num_classes <= MOST_CLASSES or int(known.sum()) < num_classes:
        return {}
    classifier = fit_linear_classifier(
        reference.features[known], reference.labels[known], num_classes=num_classes, max_iterations=100
    )
    right = classifier.predict(sets["samples"]) == labels
    result: dict[str, Any] = {
        "recognised": float(right.float().mean()),
        "recognised_interval": proportion_interval(int(right.sum()), len(right)).to_dict(),
        "recognised_by_class": by_class(right, labels, pipe.classes),
        "recognised_images": len(right),
    }
    if "other_way" in sets:
        other = classifier.predict(sets["other_way"]) == labels
        result["recognised_other_way"] = float(other.float().mean())
        result["recognised_other_way_by_class"] = by_class(other, labels, pipe.classes)
    told = real_labels >= 0
    for name, key in (("real", "recognised_real"), ("reconstructions", "recognised_reconstructions")):
        if name in sets and told.any():
            result[key] = classifier.accuracy(sets[name][told], real_labels[told])
    if "recognised_real" in result:
        real = accuracy_rows(classifier, sets["real"], real_labels)
        result["recognised_real_by_class"] = by_class(real[told], real_labels[told], pipe.classes)
    return result


def accuracy_rows(classifier: LinearClassifier, features: Tensor, labels: Tensor) -> Tensor:
    """Whether each picture is taken for its class, (N,) bool."""
    return classifier.predict(features) == labels


def by_class(right: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """The share that is right of each class that occurs."""
    return {
        name: float(right[labels == place].float().mean())
        for place, name in enumerate(classes)
        if bool((labels == place).any())
    }


# -------------------------------------------------------------------- memorising


def memorising(
    sampled: Samples,
    sets: Mapping[str, Float32[Tensor, "S D"]],
    reference: Real,
    found: list[Neighbours] | None,
    store: TokenStore | None,
) -> dict[str, Any]:
    """Whether samples repeat training pictures: {"verdict", "text", "score", "near", "near_real", "repeated", ...}.

    The copying score (Meehan et al. 2020) asks whether samples lie nearer to the training pictures than reconstructions
    of other real pictures do; reconstructions, since decoding moves samples too. `near` is the share of samples closer
    to a training picture than NEAR of that one's distance to its nearest other; `near_real` that of the
    reconstructions. `repeated` counts samples whose tokens are those of a training crop, `repeated_real` is the share
    of training pictures whose discriminative tokens another one has too.
    """
    result: dict[str, Any] = {"training_pictures": len(reference.features), "samples": len(sampled.features)}
    rebuilt = sets.get("reconstructions")
    if found is not None:
        result["near"] = near_share(found[0])
        if rebuilt is not None and (real := compare(reference.features, rebuilt)) is not None:
            result["near_real"] = near_share(real[0])
    if rebuilt is not None and min(len(rebuilt), len(sampled.features)) >= FEWEST:
        result["score"], result["p"] = copying_score(reference.features, rebuilt, sampled.features)
    if store is not None and sampled.tokens:
        own = rows_of(store, "discriminative", REPEATABLE, store.crops_per_image)
        result["repeated_real"] = count_twice(own) / len(own)
        result["repeated"] = {
            kind: count_repeated(sampled.tokens[kind], rows_of(store, kind, REPEATABLE)) for kind in sampled.tokens
        }
        if "vq" in sampled.tokens:
            equal = most_equal(sampled.tokens["vq"], rows_of(store, "vq", LOOKED_UP))
            result["most_equal_vq_tokens"] = float(equal.max())
            result["nearly_repeated"] = int((equal >= NEARLY).sum())
    result["verdict"], result["text"] = verdict_on_copies(result)
    return result


def near_share(found: Neighbours) -> float:
    """Share of the pictures that lie nearer to a training picture than NEAR of that one's distance to another."""
    return float((found.nearest_squares < NEAR**2 * found.own_squares).mean())


def rows_of(store: TokenStore, kind: str, most: int, step: int = 1) -> np.ndarray:
    """Stored tokens (rows, N) of a kind, of every `step`-th row at most so many, evenly spread."""
    rows = store.vq if kind == "vq" else store.discriminative
    assert rows is not None
    return rows[step * np.array(spread(len(rows) // step, most), dtype=np.int64)]


def count_twice(rows: np.ndarray) -> int:
    """How many rows are equal to another one."""
    times = Counter(row.tobytes() for row in rows)
    return sum(count for count in times.values() if count > 1)


def count_repeated(tokens: Int64[Tensor, "S N"], rows: np.ndarray) -> int:
    """How many samples have exactly the tokens of a stored row."""
    sampled = {row.tobytes() for row in tokens.cpu().numpy().astype(rows.dtype)}
    seen = {key for row in rows if (key := row.tobytes()) in sampled}
    return sum(row.tobytes() in seen for row in tokens.cpu().numpy().astype(rows.dtype))


def most_equal(tokens: Int64[Tensor, "S M"], rows: np.ndarray) -> Float64[np.ndarray, " S"]:
    """The largest share of tokens that each sample has in common with a stored row, each token at its own place."""
    stored = np.ascontiguousarray(rows)
    return np.array([(stored == row).mean(1).max() for row in tokens.cpu().numpy().astype(rows.dtype)])


def verdict_on_copies(found: Mapping[str, Any]) -> tuple[str, str]:
    """("copies", "none" or "unknown"), and a sentence."""
    num = found["samples"]
    whole = found.get("repeated", {}).get("vq", 0)
    near, usual, score = found.get("near", 0.0), found.get("near_real", 0.0), found.get("score")
    if whole > max(1, 0.01 * num):
        return "copies", f"{whole} of {num} samples have exactly the VQ tokens of a training crop: the models copy."
    if (nearly := found.get("nearly_repeated", 0)) > max(1, 0.01 * num):
        return (
            "copies",
            f"{nearly} of {num} samples share {NEARLY:.0%} of their VQ tokens with a training crop or more.",
        )
    if near > usual + (0.05 if score is None or score > -SIGNIFICANT else 0.01):
        return "copies", (
            f"{near:.0%} of the samples lie very near to a training picture, of reconstructions of other real pictures "
            f"{usual:.0%}{'' if score is None else f' (copying score {score:.1f})'}: they look like training pictures "
            "that were learnt by heart. Look at the pairs below."
        )
    same, alike = found.get("repeated", {}).get("discriminative", 0) / num, found.get("repeated_real", 0.0)
    known = (
        f" {same:.0%} of the samples have exactly the discriminative tokens of a training crop; of the training "
        f"pictures, {alike:.0%} share theirs with another."
        if same > 0.01
        else ""
    )
    if score is None:
        return "unknown", f"There are too few pictures to tell ({num} samples): look at the pairs below."
    lie = "about as far from training pictures as"
    if abs(score) > SIGNIFICANT:
        lie = f"{'farther from' if score > 0 else 'nearer to'} training pictures than"
    usually = ", as plain or typical pictures do, but none is nearly one of them" if score < -SIGNIFICANT else ""
    return "none", (
        f"No sign that pictures were learnt by heart: samples lie {lie} reconstructions of other real pictures "
        f"(copying score {score:.1f}){usually}.{known}"
    )


def choose_pairs(found: list[Neighbours] | None, reference: Real) -> dict[str, list[Pair]]:
    """Samples beside their nearest training picture: evenly spread, and the closest by their ratio."""
    if found is None:
        return {}
    near = found[0]
    own = np.maximum(near.own_squares, np.finfo(float).tiny)
    ratios: Float64[np.ndarray, " S"] = np.sqrt(near.nearest_squares / own)

    def pairs(rows: Iterable[int]) -> list[Pair]:
        return [
            Pair(int(row), int(reference.indices[int(near.nearest[row])]), float(min(ratios[row], 1e6))) for row in rows
        ]

    return {
        "spread": pairs(spread(len(ratios), NUM_PAIRS)),
        "closest": pairs(np.argsort(ratios, kind="stable")[:NUM_PAIRS].tolist()),
    }


# -------------------------------------------------------------------- stability


def stability(pipe: DigitPipeline, source: ImageSource, indices: Sequence[int]) -> dict[str, Any]:
    """{"snrs", "images", "changed": {name: shares}}: the share of tokens that noise of SNRS decibels changes.

    Measured on some of the pictures; {} for fewer than two.
    """
    images, _ = real_images(source, pipe.preprocess, [indices[i] for i in spread(len(indices), NOISY)])
    if len(images) < 2 or not pipe.tokenizers:
        return {}
    with distributed.alone():  # rank 0 writes the report
        found = measure_stability(pipe.tokenizers, images.split(16), StabilityConfig(snrs=SNRS), total=len(images))
    changed = {
        name: [interval["value"] for interval in entry["token_change"]] for name, entry in found["tokenizers"].items()
    }
    return {"snrs": list(SNRS), "images": len(images), "changed": changed}


def say_stability(found: Mapping[str, Any]) -> str:
    """A sentence on the tokens of these pictures."""
    if not found:
        return ""
    snr = found["snrs"][0]
    shares = {name: values[0] for name, values in found["changed"].items()}
    own = shares.get("discriminative")
    if own is None or "vq" not in shares:
        name, share = next(iter(shares.items()))
        return f"Noise that is hardly seen ({snr:g} dB) changes {share:.0%} of the {name} tokens of these pictures."
    text = (
        f"Noise that is hardly seen ({snr:g} dB) changes {own:.0%} of the discriminative tokens of these pictures and "
        f"{shares['vq']:.0%} of their VQ tokens"
    )
    if own < 0.9 * shares["vq"]:
        times = f"{shares['vq'] / own:.1f} times as stable" if own > 0.005 else "far more stable"
        return f"{text}: the former are {times}, as the paper says."
    return f"{text}: on these pictures the former are not more stable, which is what the method relies on."
