"""What an unstable latent space costs: distance of images decoded from the tokens of noisy pictures.

    picture ──noise──▶ tokens ──▶ image          distance of these images to the pictures without noise

The same noise as in `stability.py`. Without noise the distance is that of reconstruction; its growth is what the tokens
add, since noise that no token follows leaves the image as it is.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.frechet import FeatureStats
from digit.metrics.influence import frechet_interval
from digit.metrics.judge import JudgeNetwork, collect_judged
from digit.metrics.kernels import cubic_distance
from digit.metrics.stability import StabilityConfig, add_noise
from digit.pipeline.pipeline import DigitPipeline

Decode = Callable[[Tensor], Tensor]  # uint8 (B, 3, S, S) -> images of their tokens, uint8 (B, 3, S, S)
CLEAN = "none"  # in place of an SNR


def token_decoders(pipe: DigitPipeline) -> dict[str, Decode]:
    """For each tokenizer of a pipeline, pictures to the images of their tokens; rendering takes one seed.

    Raises DigitError for a pipeline without VQGAN.
    """
    vq = pipe.vq
    if vq is None:
        raise DigitError("this pipeline has no VQGAN, so that its tokens become no images: give one with a renderer")
    decoders: dict[str, Decode] = {"vq": lambda images: vq.decode(vq.encode(images))}
    if pipe.tokenizer is not None and pipe.renderer is not None:
        decoders["discriminative"] = pipe.rerender
    return decoders


def perturbed_distances(
    decoders: Mapping[str, Decode],
    images: UInt8[Tensor, "N 3 S S"],
    network: JudgeNetwork,
    cfg: StabilityConfig | None = None,
    *,
    batch_size: int = 32,
) -> dict[str, Any]:
    """{"network", "num_images", "distances": {tokenizer: [{"snr", "fd", "kd"}, ...]}}, without noise first.

    fd is the Fréchet distance of the decoded images to `images`, kd the unbiased distance of KID's kernel over all
    pairs (`cubic_distance`), both with intervals and with the network's names. Equally many images stand behind all
    of them. Raises DigitError for fewer than 3 images.
    """
    cfg = cfg or StabilityConfig()
    if len(images) < 3:
        raise DigitError(f"{len(images)} images: a distance with its interval needs at least 3")
    clean = collect_judged(images.split(batch_size), network, len(images)).pooled
    stats, distances = FeatureStats.of(clean), {}
    for name, decode in decoders.items():
        rows = distances[name] = []
        for snr in (None, *cfg.snrs):
            batches = _decoded(images, partial(_noisy, snr=snr, cfg=cfg), decode, batch_size)
            pooled = collect_judged(
                batches, network, len(images), f"{name}, SNR {CLEAN if snr is None else snr}"
            ).pooled
            rows.append(
                {
                    "snr": snr,
                    network.metric("fd"): frechet_interval(pooled, stats.mean, stats.cov).to_dict(),
                    network.metric("kd"): cubic_distance(pooled, clean).to_dict(),
                }
            )
    return {"network": network.describe(), "num_images": len(images), "distances": distances}


def _noisy(images: Tensor, first: int, *, snr: float | None, cfg: StabilityConfig) -> Tensor:
    return images if snr is None else add_noise(images, snr, cfg=cfg, first=first)


def _decoded(
    images: Tensor, change: Callable[[Tensor, int], Tensor], decode: Decode, batch_size: int
) -> Iterable[Tensor]:
    for first in range(0, len(images), batch_size):
        yield decode(change(images[first : first + batch_size], first)).cpu()


def to_lines(found: Mapping[str, Any], metric: str) -> str:
    """One metric by SNR as Markdown."""
    lines = []
    for name, rows in found["distances"].items():
        snrs = [CLEAN if row["snr"] is None else f"{row['snr']:g}" for row in rows]
        if not lines:
            lines = [f"| {metric} of decoded images, SNR | {' | '.join(snrs)} |", "|---" * (len(snrs) + 1) + "|"]
        values = " | ".join(f"{row[metric]['value']:.4g}" for row in rows)
        lines.append(f"| {name} ↓ | {values} |")
    return "\n".join(lines)
