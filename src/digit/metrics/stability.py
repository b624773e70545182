"""Stability of image tokens under pixel noise (paper, section 2.2 and Table 1).

Gaussian noise is added to the pixels, and the tokenizer's output is compared with its output for the clean image:

    token change      share of positions whose token changes
    feature cosine    cosine of the features before quantisation, mean over positions
    code cosine       cosine of the code vectors (centroids) of the tokens, mean over positions

The paper leaves three things open. The unit of its SNR: decibels here, since the paper's values at SNR 1 and 0.01 are
nearly equal, which ratios would not give. The power of an image: the mean square of its pixels here, or their variance
by option. Which cosine it reports, of features or of codes: both are computed, on vectors that are not centred.

Shapes: B images, N positions of a tokenizer's grid, D channels of its features and codes, S SNRs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64, UInt8
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.intervals import difference_interval, mean_interval
from digit.models.tokenizer import ImageTokenizer, levels_of, tokens_of
from digit.runtime import distributed
from digit.runtime.pixels import Pixels, as_uint8
from digit.runtime.progress import Progress

MAX_DECIBELS = 200
METRICS = ("token_change", "feature_cosine", "code_cosine")


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """The noise and the definition of its strength."""

    snrs: tuple[float, ...] = (30, 25, 20, 15, 10, 5, 1, 0.01)
    """Signal-to-noise ratios (paper, Table 1)."""
    unit: Literal["db", "ratio"] = "db"
    """db: noise power = signal power / 10^(snr / 10); ratio: noise power = signal power / snr."""
    power: Literal["mean_square", "variance"] = "mean_square"
    """Signal power of an image with pixel values in 0..1: the mean square, or the variance about the image's mean."""
    seed: int = 0
    """Seed of the noise; each image has its own random stream."""
    confidence: float = 0.95
    """Confidence of the intervals over images (bootstrap)."""

    def __post_init__(self) -> None:
        if not self.snrs or not all(math.isfinite(snr) for snr in self.snrs):
            raise DigitError(f"snrs are {self.snrs}: give at least one finite signal-to-noise ratio")
        if self.unit not in ("db", "ratio"):
            raise DigitError(f"unit is {self.unit!r}: choose db or ratio")
        if self.power not in ("mean_square", "variance"):
            raise DigitError(f"power is {self.power!r}: choose mean_square or variance")
        if self.unit == "db" and max(map(abs, self.snrs)) > MAX_DECIBELS:
            raise DigitError(f"snrs are {self.snrs}: decibels lie between -{MAX_DECIBELS} and {MAX_DECIBELS}")
        if self.unit == "ratio" and min(self.snrs) <= 0:
            raise DigitError(f"snrs hold {min(self.snrs)}: a ratio is above 0 (use unit db for other numbers)")


# ---------------------------------------------------------------- noise


def unit_noise(shape: tuple[int, ...], *, seed: int, first: int = 0) -> Float32[Tensor, "B 3 H W"]:
    """Standard normal noise (B, 3, H, W) float32; row i depends on (seed, first + i), H and W alone."""
    noise = np.empty(shape, dtype=np.float32)
    for i, row in enumerate(noise):
        np.random.default_rng([seed % 2**64, first + i]).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise)


def noise_scale(images: UInt8[Tensor, "B 3 H W"], snr: float, cfg: StabilityConfig) -> Float32[Tensor, "B 1 1 1"]:
    """sigma = sqrt(P / 10^(snr / 10)) for unit db, sqrt(P / snr) for unit ratio; P is `signal_power`.

    Standard deviation (B, 1, 1, 1) of the noise of each image (B, 3, H, W), for pixel values in 0..1.
    """
    power = signal_power(images, cfg)
    return (power / (10 ** (snr / 10) if cfg.unit == "db" else snr)).sqrt().view(-1, 1, 1, 1)


def signal_power(images: UInt8[Tensor, "B 3 H W"], cfg: StabilityConfig) -> Float32[Tensor, " B"]:
    """P = mean x², or mean (x - mean x)² for power variance: (B,) float32 of uint8 images as x in 0..1."""
    x = images.flatten(1).float() / 255
    return x.square().mean(1) if cfg.power == "mean_square" else x.var(1, unbiased=False)


def noise_power(images: UInt8[Tensor, "B 3 H W"], noisy: UInt8[Tensor, "B 3 H W"]) -> Float64[Tensor, ""]:
    """sum_images mean (x_noisy - x)², for pixel values x in 0..1: a float64 scalar."""
    return ((noisy.float() - images.float()) / 255).square().flatten(1).mean(1).double().sum()


def add_noise(
    images: Pixels,
    snr: float,
    *,
    cfg: StabilityConfig,
    first: int = 0,
    noise: Float32[Tensor, "B 3 H W"] | None = None,
) -> UInt8[Tensor, "B 3 H W"]:
    """x + sigma * noise, clipped to 0..1 and rounded to uint8: noisy copies of uint8 images (B, 3, H, W).

    Image i has index first + i in the data set, which selects its noise; every SNR scales the same noise. Clipping
    reduces the power of strong noise; `measure_stability` reports the SNR after clipping.

    Args:
        noise: `unit_noise` of these images, if it was computed before.
    """
    images = as_uint8(images)
    noise = unit_noise(tuple(images.shape), seed=cfg.seed, first=first) if noise is None else noise
    x = images.float() / 255 + noise_scale(images, snr, cfg) * noise.to(images.device)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------- metrics


def measure_stability(
    tokenizers: Mapping[str, ImageTokenizer],
    batches: Iterable[Pixels],
    cfg: StabilityConfig,
    total: int | None = None,
    *,
    first: int = 0,
) -> dict[str, Any]:
    """token_change = mean_n [t'_n != t_n], feature_cosine and code_cosine = mean_n cos(v'_n, v_n), at every SNR.

    t are the tokens (B, N) of the clean images, v their features or code vectors (B, N, D); t' and v' are those of the
    noisy images. Means over images, with intervals, as a dict for JSON.

    Args:
        tokenizers: by name; all get the same noisy images. For the cosine of features a tokenizer also has
            `encode_features(images) -> (tokens, features (B, N, D))`, which runs the encoder once, or
            `features(images)`, which runs it again.
        batches: uint8 images (B, 3, H, W), or what else `digit.runtime.pixels.as_uint8` takes; the
            result does not depend on the batch sizes.
        total: number of images, for the progress bar only.
        first: index of the first image, which selects its noise; above 0 where ranks share the images.

    All ranks of a job call it together, each with its share of the images, in rank order; each gets the whole result.

    Returns:
        protocol: all settings. snr_as_fed_db: the SNRs after clipping and rounding, over all images.
        tokenizers: for each its vocab_size, grid, codebook health on the clean images, and for each metric a list over
            SNRs of intervals {value, low, high} (feature_cosine only for tokenizers with features).
        differences: for each pair the intervals of first minus second, paired by image. Each interval holds for one SNR
            alone: at 95 % confidence one in twenty misses the true value.
    """
    if not tokenizers:
        raise DigitError("no tokenizer to evaluate: give at least one")
    results = {name: _TokenizerResults() for name in tokenizers}
    signal, error, count = 0.0, torch.zeros(len(cfg.snrs), dtype=torch.float64), 0
    with Progress("stability", total) as bar:
        for batch in batches:
            images = as_uint8(batch)
            noise = unit_noise(tuple(images.shape), seed=cfg.seed, first=first + count)
            noisy = [add_noise(images, snr, cfg=cfg, noise=noise) for snr in cfg.snrs]
            signal += float(signal_power(images, cfg).double().sum())
            error += torch.stack([noise_power(images, other) for other in noisy])
            for name, tokenizer in tokenizers.items():
                results[name].add(tokenizer, images, noisy)
            count += len(images)
            bar.update(len(images))
    shares = distributed.gather((signal, error, count, results))
    signal, count = sum(share[0] for share in shares), sum(share[2] for share in shares)
    error = torch.stack([share[1] for share in shares]).sum(0)
    results = {name: _TokenizerResults.joined([share[3][name] for share in shares]) for name in tokenizers}
    if count < 2:
        raise DigitError(f"stability got {count} images: an interval over images needs at least 2")
    about = "noise is Gaussian, clipped and rounded to 8 bits; intervals are a bootstrap over images"
    return {
        "protocol": {"about": f"{about} (paper, Table 1)", "num_images": count} | asdict(cfg),
        "snr_as_fed_db": [10 * math.log10(signal / e) if e > 0 and signal else None for e in error.tolist()],
        "tokenizers": {name: results[name].summary(tokenizers[name], cfg) for name in tokenizers},
        "differences": [
            {"first": a, "second": b} | results[a].minus(results[b], cfg) for a, b in combinations(tokenizers, 2)
        ],
    }


class _TokenizerResults:
    """Results of one tokenizer: the metrics for each image and SNR, and the tokens of the clean images."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.batches: dict[str, list[Tensor]] = {}  # metric -> (S, B) for each batch

    def add(self, tokenizer: ImageTokenizer, images: Tensor, noisy: list[Tensor]) -> None:
        tokens, features = tokens_and_features(tokenizer, images)
        codes = tokenizer.embed(tokens)
        by_snr: dict[str, list[Tensor]] = {}
        for noisy_images in noisy:
            noisy_tokens, noisy_features = tokens_and_features(tokenizer, noisy_images)
            by_snr.setdefault("token_change", []).append((noisy_tokens != tokens).double().mean(1))
            by_snr.setdefault("code_cosine", []).append(cosine(tokenizer.embed(noisy_tokens), codes))
            if features is not None and noisy_features is not None:
                by_snr.setdefault("feature_cosine", []).append(cosine(noisy_features, features))
        self.tokens.append(tokens.int().cpu())
        for metric, values in by_snr.items():
            self.batches.setdefault(metric, []).append(torch.stack(values).cpu())

    @classmethod
    def joined(cls, parts: "Sequence[_TokenizerResults]") -> "_TokenizerResults":
        """The results of all ranks' images, in rank order."""
        whole = cls()
        for part in parts:
            whole.tokens += part.tokens
            for metric, values in part.batches.items():
                whole.batches.setdefault(metric, []).extend(values)
        return whole

    def values(self, metric: str) -> Tensor:
        """One metric of every image at every SNR, (S, number of images)."""
        return torch.cat(self.batches[metric], 1)

    def summary(self, tokenizer: ImageTokenizer, cfg: StabilityConfig) -> dict[str, Any]:
        levels = levels_of(tokenizer)  # each has codes of its own
        level = torch.arange(tokens_of(tokenizer)) % levels
        health = codebook_health(torch.cat(self.tokens) + level * tokenizer.vocab_size, levels * tokenizer.vocab_size)
        about = {"vocab_size": tokenizer.vocab_size, "grid": list(tokenizer.grid), "codebook": health}
        bootstrap = {"confidence": cfg.confidence, "seed": cfg.seed % 2**64}
        return about | {
            metric: [mean_interval(values, **bootstrap).to_dict() for values in self.values(metric)]
            for metric in METRICS
            if metric in self.batches
        }

    def minus(self, other: "_TokenizerResults", cfg: StabilityConfig) -> dict[str, Any]:
        bootstrap = {"confidence": cfg.confidence, "seed": cfg.seed % 2**64}
        return {
            metric: [
                difference_interval(a, b, **bootstrap).to_dict()
                for a, b in zip(self.values(metric), other.values(metric), strict=True)
            ]
            for metric in METRICS
            if metric in self.batches and metric in other.batches
        }


def tokens_and_features(
    tokenizer: ImageTokenizer, images: UInt8[Tensor, "B 3 H W"]
) -> tuple[Int64[Tensor, "B M"], Float[Tensor, "B N D"] | None]:
    """Tokens (B, M) and features (B, N, D), or None for tokenizers without; one encoder pass where possible.

    M is N, or a multiple of it for a codebook of several levels.
    """
    both: Any = getattr(tokenizer, "encode_features", None)
    if both is not None:
        return both(images)
    features: Any = getattr(tokenizer, "features", None)
    return tokenizer.encode(images), None if features is None else features(images)


def cosine(a: Float[Tensor, "B N D"], b: Float[Tensor, "B N D"]) -> Float64[Tensor, " B"]:
    """mean_n a_n . b_n / (||a_n|| ||b_n||): (B,) float64 of a, b (B, N, D); equal vectors, zeros too, count as 1."""
    similarity = F.cosine_similarity(a.float(), b.float(), dim=2).double()  # (B, N)
    return similarity.masked_fill((a == b).all(2), 1.0).mean(1)


def codebook_health(tokens: Tensor | np.ndarray, vocab_size: int) -> dict[str, float]:
    """usage = 1 - dead_codes / K,  entropy_bits = H = -sum_k p_k log2 p_k,  perplexity = 2^H.

    p_k is the share of code k = 0..K-1 among the tokens (any shape), and dead codes never occur; num_tokens is returned
    too. Usage grows with the number of tokens: compare only equally many. Raises DigitError for tokens outside 0..K-1.
    """
    flat = torch.as_tensor(tokens).flatten().long().cpu()
    if not len(flat) or flat.min() < 0 or flat.max() >= vocab_size:
        values = f"{int(flat.min())} to {int(flat.max())}" if len(flat) else "no tokens"
        raise DigitError(f"tokens hold {values}, wanted 0 to {vocab_size - 1}: they belong to another codebook")
    counts = torch.bincount(flat, minlength=vocab_size).double()
    entropy = abs(float(torch.special.entr(counts / counts.sum()).sum())) / math.log(2)
    dead = int((counts == 0).sum())
    return {
        "usage": 1 - dead / vocab_size,
        "entropy_bits": entropy,
        "perplexity": 2**entropy,
        "dead_codes": dead,
        "num_tokens": len(flat),
    }
