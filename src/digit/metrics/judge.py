"""The judge: features of a network, a Fréchet distance in them, and a linear classifier on them.

The judge is not the tokenizer's encoder, so models are not trained on the features that evaluate them. The protocol is
METRIC (on EfficientNet-Lite2), JUDGE_INPUT_SIZE and the number of images. Its distances compare with each other and
never with an FID, which needs the Inception network. Networks are callables, so any features can be used.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int64, Real, UInt8
from torch import Tensor
from torch.nn import functional as F

from digit.errors import DigitError, MismatchError
from digit.metrics.frechet import FeatureStats, frechet_distance
from digit.models.tokens import Integers, as_integers
from digit.runtime.files import load_tensors, save_tensors
from digit.runtime.pixels import Pixels, as_uint8
from digit.runtime.progress import Progress

METRIC = "fd_efficientnet_lite2"
JUDGE_INPUT_SIZE = 128  # px, part of the protocol; the smallest multiple of 32 without an error on 500 held-out shapes
Features = Callable[[UInt8[Tensor, "B 3 H W"]], Real[Tensor, "B D"]]  # RGB images -> features


def judge_input(images: Pixels, size: int = JUDGE_INPUT_SIZE) -> UInt8[Tensor, "B 3 S S"]:
    """Resize uint8 (B, 3, H, W) to uint8 (B, 3, size, size): bicubic with antialiasing, the same for real and sampled.

    Takes what else `digit.runtime.pixels.as_uint8` takes; raises DigitError for anything else.
    Without antialiasing, aliasing would change the distance of larger images (Parmar et al. 2022).
    """
    images = as_uint8(images)
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def collect_features(
    batches: Iterable[Tensor],
    features: Features,
    *,
    input_size: int | None = JUDGE_INPUT_SIZE,
    description: str = "judge",
    total: int | None = None,
) -> Float32[Tensor, "N D"]:
    """Features of every image: batches of uint8 (B, 3, H, W) -> float32 (N, D) on the CPU, in order.

    input_size None passes the images on unchanged. total is the number of images, for the progress bar only.
    """
    parts = []
    with Progress(description, total) as bar:
        for images in batches:
            ready = images if input_size is None else judge_input(images, input_size)
            part = features(ready).float().cpu()
            if part.ndim != 2 or len(part) != len(images):
                raise DigitError(f"{len(images)} images gave features {tuple(part.shape)}, wanted (B, D): pool them")
            parts.append(part)
            bar.update(len(images))
    if not parts:
        raise DigitError("judge got no images: give at least 2")
    return torch.cat(parts)


@dataclass(frozen=True)
class Judged:
    """Outputs of a judge network for N images, float32 on the CPU, in order; about 20 kB per image with Inception."""

    pooled: Float[Tensor, "N D"]
    spatial: Float[Tensor, "N E"]
    """The first channels of an inner feature map."""
    logits: Float[Tensor, "N C"]

    def __len__(self) -> int:
        return len(self.pooled)

    @classmethod
    def cat(cls, parts: Sequence["Judged"]) -> "Judged":
        """Concatenate the outputs for several sets of images."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@runtime_checkable
class JudgeNetwork(Protocol):
    """A network whose features and logits the metrics use (ours are in evaluation/networks.py)."""

    name: str

    def judge(self, images: UInt8[Tensor, "B 3 H W"]) -> Judged:
        """uint8 (B, 3, H, W) RGB of any size -> features and logits."""
        ...

    def metric(self, name: str) -> str:
        """The full name of "fd", "is", "kd", "sfd", "precision" or "recall" on this network."""
        ...

    def describe(self) -> dict[str, Any]:
        """The protocol for a results file: name, weights, resize."""
        ...


def collect_judged(
    batches: Iterable[Tensor], network: JudgeNetwork, total: int | None = None, description: str = "judge"
) -> Judged:
    """Features and logits of every image, in one pass over batches of uint8 (B, 3, H, W).

    Batches come one at a time and are not kept, so that a generator may decode or sample them. total is the number of
    images, for the progress bar only. Raises DigitError without images.
    """
    parts: dict[str, list[Tensor]] = {field.name: [] for field in fields(Judged)}
    with Progress(description, total) as bar:
        for images in batches:
            for name, values in vars(network.judge(images)).items():
                parts[name].append(values)
            bar.update(len(images))
    if not any(parts.values()):
        raise DigitError("judge got no images: give at least 2")
    return Judged(**{name: torch.cat(parts.pop(name)) for name in list(parts)})  # frees each before the next


def fd(first: Real[Tensor, "N D"] | FeatureStats, second: Real[Tensor, "M D"] | FeatureStats) -> float:
    """||mu1 - mu2||² + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), between two sets of the judge's features.

    Each set is features (N, D) or their statistics; 0 for equal sets. On our judge's features this is METRIC.
    """
    a, b = (x if isinstance(x, FeatureStats) else FeatureStats.of(x) for x in (first, second))
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


@dataclass(frozen=True, kw_only=True)
class LinearClassifier:
    """Multinomial logistic regression on standardised features; all float32 on the CPU."""

    weight: Float32[Tensor, "C D"]
    bias: Float32[Tensor, " C"]
    mean: Float32[Tensor, " D"]
    scale: Float32[Tensor, " D"]

    def logits(self, features: Real[Tensor, "N D"]) -> Float32[Tensor, "N C"]:
        """(N, D) -> (N, C) float32. Raises MismatchError for another D."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise MismatchError(f"features have shape {tuple(features.shape)}, classifier wants (N, {len(self.mean)})")
        return F.linear((features.float().cpu() - self.mean) / self.scale, self.weight, self.bias)

    def predict(self, features: Real[Tensor, "N D"]) -> Int64[Tensor, " N"]:
        """(N, D) -> classes (N,) int64."""
        return self.logits(features).argmax(1)

    def accuracy(self, features: Real[Tensor, "N D"], labels: Integers) -> float:
        """1/N sum_i [argmax_c logits_ic = label_i]: accuracy 0..1 on features (N, D) with labels (N,)."""
        labels = as_integers("labels", labels)
        if len(labels) != len(features):
            raise DigitError(f"{len(labels)} labels for {len(features)} images: give one label per image")
        return float((self.predict(features) == labels.cpu()).double().mean())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        save_tensors(path, {"weight": self.weight, "bias": self.bias, "mean": self.mean, "scale": self.scale})

    @classmethod
    def load(cls, path: str | Path) -> "LinearClassifier":
        """Read what `save` wrote. Raises DigitError for a missing file and for one of another kind."""
        tensors = load_tensors(path)
        if set(tensors) != {"weight", "bias", "mean", "scale"}:
            held = ", ".join(sorted(tensors)[:4]) or "nothing"
            raise DigitError(f"{path} is no linear classifier, it holds {held}: fit the classifier again")
        return cls(**tensors)


def fit_linear_classifier(
    features: Real[Tensor, "N D"],
    labels: Integers,
    *,
    num_classes: int | None = None,
    l2: float = 1e-2,
    max_iterations: int = 200,
    tolerance: float = 1e-9,
) -> LinearClassifier:
    """min_W,b  1/N sum_i CE(W (x_i - m) / s + b, y_i) + l2/2 ||W||²,  W (C, D), b (C,).

    Fits by L-BFGS in float64 from zero, so there is no seed. x are features (N, D) with mean m and deviation s (D,),
    y labels (N,) in 0..C-1. The fit stops when a step changes the loss by less than `tolerance`; 1e-14 brings the
    weights within 1e-6 of the optimum. Raises DigitError for missing labels (-1), labels that are too large, and a
    wrong number of labels.
    """
    labels = as_integers("labels", labels).cpu()
    num_classes = _check_labels(features, labels, num_classes)
    with torch.inference_mode(False), torch.enable_grad():
        x, labels = features.detach().cpu().double().clone(), labels.clone()  # (N, D); caller may use inference_mode
        mean, scale = x.mean(0), nonzero_scale(x.std(0, unbiased=False))
        x = (x - mean) / scale
        weight = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, requires_grad=True)
        bias = torch.zeros(num_classes, dtype=x.dtype, requires_grad=True)

        def loss() -> Tensor:
            return F.cross_entropy(F.linear(x, weight, bias), labels) + 0.5 * l2 * weight.square().sum()

        _minimise(loss, [weight, bias], max_iterations, tolerance)
    weight, bias = weight.detach(), bias.detach()
    return LinearClassifier(weight=weight.float(), bias=bias.float(), mean=mean.float(), scale=scale.float())


def nonzero_scale(scale: Tensor) -> Tensor:
    """Replace standard deviations of constant features (up to 1e-6 of the largest) by 1, in place."""
    scale[scale <= 1e-6 * scale.max().clamp(min=1e-12)] = 1.0
    return scale


def _minimise(loss: Callable[[], Tensor], parameters: list[Tensor], max_iterations: int, tolerance: float) -> None:
    tolerances: dict[str, Any] = dict(tolerance_grad=1e-6 if tolerance >= 1e-9 else 1e-9, tolerance_change=tolerance)
    optimizer = torch.optim.LBFGS(parameters, max_iter=max_iterations, line_search_fn="strong_wolfe", **tolerances)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def _check_labels(features: Tensor, labels: Tensor, num_classes: int | None) -> int:
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        raise DigitError(f"{len(labels)} labels for features {tuple(features.shape)}, wanted N labels for (N, D)")
    if not torch.isfinite(features).all():
        raise DigitError("features hold NaN or infinity: check the images and the network's weights")
    least, most = int(labels.min()), int(labels.max())
    num_classes = most + 1 if num_classes is None else num_classes
    if least < 0 or most >= num_classes:
        raise DigitError(
            f"labels run from {least} to {most}, wanted 0 to {num_classes - 1}: leave out unlabelled images"
        )
    return num_classes
