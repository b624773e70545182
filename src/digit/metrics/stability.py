"""Stability of image tokens under pixel noise (paper, section 2.2 and Table 1).

Gaussian noise is added to the pixels; what comes out of a tokenizer is compared with what it gives for the clean image:

    token change      share of positions with another token
    feature cosine    cosine of the features before quantisation, mean over positions
    code cosine       cosine of the code vectors (centroids) of the tokens, mean over positions

The paper leaves three things open. The unit of its SNR: decibels here, since its values at SNR 1 and 0.01 are nearly
equal, which ratios would not give. The power of an image: the mean square of its pixels here, their variance as the
alternative. Which cosine it means, features or codes: both are given, vectors as they are, not centred.

Shapes: B images, N positions of a tokenizer's grid, D channels of its features and codes, S SNRs.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.intervals import difference_interval, mean_interval
from digit.runtime.progress import Progress

MAX_DECIBELS = 200
MEASURES = ("token_change", "feature_cosine", "code_cosine")


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """The noise, and how its strength is meant."""

    snrs: tuple[float, ...] = (30, 25, 20, 15, 10, 5, 1, 0.01)
    """Signal-to-noise ratios (paper, Table 1)."""
    unit: Literal["db", "ratio"] = "db"
    """db: noise power = signal power / 10^(snr / 10); ratio: noise power = signal power / snr."""
    power: Literal["mean_square", "variance"] = "mean_square"
    """Signal power of an image with pixel values in 0..1: mean square, or variance about the image's mean."""
    seed: int = 0
    """Seed of the noise; image i has a random stream of its own."""
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
            raise DigitError(f"snrs are {self.snrs}: decibels from -{MAX_DECIBELS} to {MAX_DECIBELS}")
        if self.unit == "ratio" and min(self.snrs) <= 0:
            raise DigitError(f"snrs hold {min(self.snrs)}: a ratio is above 0 (unit db takes any number)")


class Tokenizer(Protocol):
    """What is measured. Images are uint8 (B, 3, H, W), tokens int64 (B, N).

    Optional, for the cosine of features: `encode_features(images) -> (tokens, features (B, N, D))` in one pass of the
    encoder, or `features(images)`, at the price of a second one.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def grid(self) -> tuple[int, int]: ...

    def encode(self, images: Tensor) -> Tensor: ...

    def embed(self, tokens: Tensor) -> Tensor: ...


# ---------------------------------------------------------------- noise


def unit_noise(shape: tuple[int, ...], *, seed: int, first: int = 0) -> Tensor:
    """Standard normal noise (B, 3, H, W) float32; row i is a function of (seed, first + i) and H, W alone."""
    noise = np.empty(shape, dtype=np.float32)
    for i, row in enumerate(noise):
        np.random.default_rng([seed % 2**64, first + i]).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise)


def noise_scale(images: Tensor, snr: float, cfg: StabilityConfig) -> Tensor:
    # sigma^2 = P / 10^(snr / 10) (db) or P / snr (ratio);  P = mean x^2 or mean (x - mean x)^2
    """Standard deviation (B, 1, 1, 1) of the noise of each image, pixel values in 0..1."""
    power = signal_power(images, cfg)
    return (power / (10 ** (snr / 10) if cfg.unit == "db" else snr)).sqrt().view(-1, 1, 1, 1)


def signal_power(images: Tensor, cfg: StabilityConfig) -> Tensor:
    """(B,) float32, of uint8 images as values in 0..1."""
    x = images.flatten(1).float() / 255
    return x.square().mean(1) if cfg.power == "mean_square" else x.var(1, unbiased=False)


def noise_power(images: Tensor, noisy: Tensor) -> Tensor:
    """Mean square of the pixels' change (values 0..1), summed over the images: scalar float64."""
    return ((noisy.float() - images.float()) / 255).square().flatten(1).mean(1).double().sum()


def add_noise(
    images: Tensor, snr: float, *, cfg: StabilityConfig, first: int = 0, noise: Tensor | None = None
) -> Tensor:
    """Noisy copies of uint8 images (B, 3, H, W), clipped to 0..255 and rounded to uint8, as tokenizers take them.

    Image i is number first + i of all, which its noise depends on; every SNR scales the same noise. Clipping takes
    power from strong noise; `measure_stability` reports the SNR that is left.

    Args:
        noise: `unit_noise` of these images, where it is at hand already.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise DigitError(f"noise is added to uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    noise = unit_noise(tuple(images.shape), seed=cfg.seed, first=first) if noise is None else noise
    x = images.float() / 255 + noise_scale(images, snr, cfg) * noise.to(images.device)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------- measurement


def measure_stability(
    tokenizers: Mapping[str, Tokenizer], batches: Iterable[Tensor], cfg: StabilityConfig, total: int | None = None
) -> dict[str, Any]:
    """Change of tokens, features and codes at every SNR, with intervals over images, as a dict for JSON.

    Args:
        tokenizers: by name; all see the same noisy images.
        batches: uint8 images (B, 3, H, W); what comes out does not depend on their sizes.
        total: number of images, for the progress bar only.

    Returns:
        protocol: all settings. snr_as_fed_db: the SNRs after clipping and rounding, over all images.
        tokenizers: for each its vocab_size, grid, codebook health on the clean images, and a list over SNRs of
            intervals {value, low, high} of each measure (feature_cosine only where it gives features).
        differences: for each pair the intervals of first minus second, paired by image. One interval tells of one SNR:
            at 95 % confidence one in twenty misses.
    """
    if not tokenizers:
        raise DigitError("no tokenizer to measure: give at least one")
    found = {name: _Found() for name in tokenizers}
    signal, error, count = 0.0, torch.zeros(len(cfg.snrs), dtype=torch.float64), 0
    with Progress("stability", total) as bar:
        for images in batches:
            noise = unit_noise(tuple(images.shape), seed=cfg.seed, first=count)
            noisy = [add_noise(images, snr, cfg=cfg, noise=noise) for snr in cfg.snrs]
            signal += float(signal_power(images, cfg).double().sum())
            error += torch.stack([noise_power(images, other) for other in noisy])
            for name, tokenizer in tokenizers.items():
                found[name].add(tokenizer, images, noisy)
            count += len(images)
            bar.update(len(images))
    if count < 2:
        raise DigitError(f"stability got {count} images: an interval over images needs at least 2")
    about = "noise is Gaussian, clipped and rounded to 8 bits; intervals are a bootstrap over images"
    return {
        "protocol": {"about": f"{about} (paper, Table 1)", "num_images": count} | asdict(cfg),
        "snr_as_fed_db": [10 * math.log10(signal / e) if e > 0 and signal else None for e in error.tolist()],
        "tokenizers": {name: found[name].summary(tokenizers[name], cfg) for name in tokenizers},
        "differences": [
            {"first": a, "second": b} | found[a].minus(found[b], cfg) for a, b in combinations(tokenizers, 2)
        ],
    }


class _Found:
    """What one tokenizer gave: per image and SNR the measures, and the tokens of the clean images."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.rows: dict[str, list[Tensor]] = {}  # measure -> (S, B) each

    def add(self, tokenizer: Tokenizer, images: Tensor, noisy: list[Tensor]) -> None:
        tokens, features = read(tokenizer, images)
        codes = tokenizer.embed(tokens)
        rows: dict[str, list[Tensor]] = {}
        for other in noisy:
            their_tokens, their_features = read(tokenizer, other)
            rows.setdefault("token_change", []).append((their_tokens != tokens).double().mean(1))
            rows.setdefault("code_cosine", []).append(cosine(tokenizer.embed(their_tokens), codes))
            if features is not None:
                rows.setdefault("feature_cosine", []).append(cosine(their_features, features))
        self.tokens.append(tokens.cpu())
        for measure, values in rows.items():
            self.rows.setdefault(measure, []).append(torch.stack(values).cpu())

    def values(self, measure: str) -> Tensor:
        """(S, N)."""
        return torch.cat(self.rows[measure], 1)

    def summary(self, tokenizer: Tokenizer, cfg: StabilityConfig) -> dict[str, Any]:
        health = codebook_health(torch.cat(self.tokens), tokenizer.vocab_size)
        about = {"vocab_size": tokenizer.vocab_size, "grid": list(tokenizer.grid), "codebook": health}
        how = {"confidence": cfg.confidence, "seed": cfg.seed % 2**64}
        return about | {
            measure: [mean_interval(values, **how).to_dict() for values in self.values(measure)]
            for measure in MEASURES
            if measure in self.rows
        }

    def minus(self, other: "_Found", cfg: StabilityConfig) -> dict[str, Any]:
        how = {"confidence": cfg.confidence, "seed": cfg.seed % 2**64}
        return {
            measure: [
                difference_interval(a, b, **how).to_dict()
                for a, b in zip(self.values(measure), other.values(measure), strict=True)
            ]
            for measure in MEASURES
            if measure in self.rows and measure in other.rows
        }


def read(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, N) and, where the tokenizer gives them, features (B, N, D); the encoder runs once if it can."""
    if hasattr(tokenizer, "encode_features"):
        return tokenizer.encode_features(images)
    return tokenizer.encode(images), tokenizer.features(images) if hasattr(tokenizer, "features") else None


def cosine(a: Tensor, b: Tensor) -> Tensor:
    # mean_n a_n . b_n / (||a_n|| ||b_n||)
    """Mean cosine (B,) float64 over the positions of (B, N, D); vectors that are equal count as 1, zeros too."""
    similarity = F.cosine_similarity(a.float(), b.float(), dim=2).double()  # (B, N)
    return similarity.masked_fill((a == b).all(2), 1.0).mean(1)


def codebook_health(tokens: Tensor | np.ndarray, vocab_size: int) -> dict[str, float]:
    # H = -sum_k p_k log2 p_k,  perplexity = 2^H
    """How many codes the tokens (any shape) use: usage 0..1, entropy_bits, perplexity, dead_codes, num_tokens.

    Usage grows with the number of tokens: compare only equally many. Raises DigitError for tokens outside 0..K-1.
    """
    flat = torch.as_tensor(tokens).flatten().long().cpu()
    if not len(flat) or flat.min() < 0 or flat.max() >= vocab_size:
        held = f"{int(flat.min())} to {int(flat.max())}" if len(flat) else "no tokens"
        raise DigitError(f"tokens hold {held}, wanted 0 to {vocab_size - 1}: they are of another codebook")
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
