"""Measures how each pitfall of docs/evaluation.md changes the distance, on rendered scenes with EfficientNet-Lite2.

    python bench/evaluation_traps.py            # a table on stdout; two minutes on one core, features are cached

Reference and samples are two sets of 1,000 scenes of 64 px from one distribution; of many more the distance would be 0.
"""

import io
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from digit.evaluation.image_set import open_images
from digit.evaluation.samples import EvaluateConfig, evaluate

NUM, SIDE = 1000, 64


def main() -> None:
    cfg = EvaluateConfig(kernel_subsets=5)
    network = cfg.load_network()
    reference, samples = scenes(21), scenes(22)
    small = shrink(reference, mode="bicubic", antialias=True)
    rows = {
        "1,000 samples": (samples, reference),
        "500 of them": (samples[:500], reference),
        "250 of them": (samples[:250], reference),
        "saved as JPEG, quality 95": (jpeg(samples, 95), reference),
        "saved as JPEG, quality 75": (jpeg(samples, 75), reference),
        "both 32 px, bicubic antialiased": (shrink(samples, mode="bicubic", antialias=True), small),
        "samples bilinear without antialias": (shrink(samples, mode="bilinear"), small),
        "samples nearest pixel": (shrink(samples, mode="nearest"), small),
        "samples 32 px, reference 64 px": (shrink(samples, mode="bicubic", antialias=True), reference),
    }
    for name, pair in rows.items():
        fd = evaluate(*pair, cfg, network=network)["metrics"][network.metric("fd")]
        sys.stdout.write(f"| {name} | {fd['value']:.0f} | {fd['low']:.0f} to {fd['high']:.0f} |\n")
        sys.stdout.flush()


def scenes(seed: int) -> Tensor:
    """uint8 (NUM, 3, SIDE, SIDE)."""
    return open_images(f"shapes:num={NUM},size={SIDE},seed={seed}").pixels(range(NUM), None)


def shrink(images: Tensor, **kwargs: str | bool) -> Tensor:
    """Resizes to half the side, uint8."""
    return F.interpolate(images.float(), size=SIDE // 2, **kwargs).round().clamp(0, 255).to(torch.uint8)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Encodes as JPEG and decodes again."""
    arrays = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        arrays.append(np.array(Image.open(file)))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


if __name__ == "__main__":
    main()
