"""What the tokens of a codebook keep of the features, and how stable they are: the entry `quality` of codebook.json.

    quantization_error = sum ||x - q(x)||² / sum ||x - mean x||²
    token_change_20db  = share of the tokens that Gaussian noise of 20 dB changes (paper, Table 1)

x are the encoder's features and q(x) the vectors of their codes. A renderer cannot know more of a picture than its
tokens do: the first number is a floor for it. Shapes: N images, P tokens an image, D features.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from digit.data.crops import gather_crops
from digit.data.preprocess import PreprocessConfig
from digit.data.source import ImageSource
from digit.metrics.judge import fit_linear_classifier
from digit.metrics.stability import StabilityConfig, add_noise
from digit.tokenizers.discriminative import DiscriminativeTokenizer

log = logging.getLogger(__name__)
QUALITY = "quality"  # of codebook.json
NUM_IMAGES = 256
TOGETHER = 64  # images
SNR = 20  # dB


def measure_quality(
    tokenizer: DiscriminativeTokenizer,
    source: ImageSource,
    preprocess: PreprocessConfig,
    *,
    seed: int = 0,
    num: int = NUM_IMAGES,
    probe: int = 0,
) -> dict[str, Any]:
    """The figures of a tokenizer on centre crops of at most `num` images, spread evenly over the source.

    Args:
        seed: of the noise.
        probe: images for a linear probe, half to fit and half to test; 0 makes none. `probe` is its accuracy on each
            image's mean code vector, `probe_features` that on its mean feature.
    """
    images, _ = gather_crops(source, preprocess, num=num)
    cfg, error, changed, first = StabilityConfig(seed=seed), 0.0, 0.0, 0
    total, squares = torch.zeros((), dtype=torch.float64), 0.0
    num_features = 0
    for part in images.split(TOGETHER):
        tokens, features = tokenizer.encode_features(part)
        x = features.double().flatten(0, 1)  # (n P, D)
        error += float((x - tokenizer.embed(tokens).double().flatten(0, 1)).square().sum())
        total, squares, num_features = total + x.sum(0).cpu(), squares + float(x.square().sum()), num_features + len(x)
        noisy = tokenizer.encode(add_noise(part, SNR, cfg=cfg, first=first))
        changed += float((noisy != tokens).double().mean(1).sum())
        first += len(part)
    variance = squares - float(total.square().sum()) / num_features
    figures: dict[str, Any] = {
        "num_images": len(images),
        "quantization_error": error / variance if variance > 0 else 0.0,
        "token_change_20db": changed / len(images),
    }
    return figures | (probed(tokenizer, source, preprocess, probe) if probe else {})


def probed(
    tokenizer: DiscriminativeTokenizer, source: ImageSource, preprocess: PreprocessConfig, num: int
) -> dict[str, Any]:
    """The probe's entries; none, and a warning, where fewer than two classes have labels."""
    images, labels = gather_crops(source, preprocess, num=num)
    images, labels = images[labels >= 0], labels[labels >= 0]
    if len(labels[::2].unique()) < 2:
        log.warning("the codebook is not probed: its images show fewer than two classes")
        return {}
    means: dict[str, list[Tensor]] = {"probe": [], "probe_features": []}
    for part in images.split(TOGETHER):
        tokens, features = tokenizer.encode_features(part)
        means["probe"].append(tokenizer.embed(tokens).mean(1).cpu())
        means["probe_features"].append(features.mean(1).cpu())
    found: dict[str, Any] = {"probe_images": len(images)}
    for name, parts in means.items():
        x = torch.cat(parts)  # (N, D)
        classifier = fit_linear_classifier(x[::2], labels[::2], num_classes=len(source.classes))
        found[name] = classifier.accuracy(x[1::2], labels[1::2])
    return found


def quality_text(about: Mapping[str, Any]) -> str:
    """One line of what codebook.json says: codes, quantization error, token change, usage, probe; empty without."""
    quality, parts = about.get(QUALITY), []
    if not isinstance(quality, Mapping):
        return ""
    number = {name: value for name, value in quality.items() if isinstance(value, int | float)}
    if "quantization_error" in number:
        parts.append(f"quantization error {number['quantization_error']:.3f} of the features' variance")
    if "token_change_20db" in number:
        parts.append(f"{number['token_change_20db']:.1%} of an image's codes change at 20 dB")
    if isinstance(usage := about.get("usage"), int | float):
        parts.append(f"{usage:.1%} of the codes in use")
    if "probe" in number:
        features = f" (features {number['probe_features']:.1%})" if "probe_features" in number else ""
        parts.append(f"linear probe {number['probe']:.1%}{features}")
    return ", ".join(parts)
