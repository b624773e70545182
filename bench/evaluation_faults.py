"""Which measure of `digit evaluate` sees which fault: generated sets of known faults, with EfficientNet-Lite2.

    python bench/evaluation_faults.py docs/pictures/evaluation_faults.png    # a table on stdout, and a picture

Reference and sound samples are two sets of 1,000 rendered scenes of 64 px from one distribution. Each faulty set has
1,000 scenes too. A value is bold where it is worse than that of the sound samples by 4 standard errors of both. About
four minutes on one core; features are cached.
"""

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.evaluation.image_set import open_images
from digit.evaluation.measures import MEASURES
from digit.evaluation.samples import EvaluateConfig, evaluate
from digit.runtime import plots

NUM, SIDE = 1000, 64
SEEN = 4.0  # standard errors
Z = 1.96  # of a 95% interval's half width
SHOWN = 12.0  # standard errors at the end of the colours


def main() -> None:
    cfg = EvaluateConfig(image_size=SIDE, kernel_subset_size=NUM // 2)
    network = cfg.load_network()
    reference, sound = scenes(21, 1), scenes(22, 1)
    spare, classes = scenes(23, 3), open_images(spec(23, 3)).class_names
    assert classes is not None
    half = set(sorted(set(classes))[: len(set(classes)) // 2])
    kept = [row for row, name in enumerate(classes) if name in half][:NUM]
    noise = torch.Generator().manual_seed(0)
    sets = {
        "sound": sound,
        "half of the classes": spare[kept],
        "100 images ten times, each 0 to 9 levels darker": darker(sound[:100].repeat(10, 1, 1, 1)),
        "copies of the reference, 0 to 9 levels darker": darker(reference),
        "blur, 3 px": blur(sound),
        "half the size": resize(resize(sound, SIDE // 2), SIDE),
        "noise of 8 levels": noisy(sound, 8, noise),
        "noise of 2 levels": noisy(sound, 2, noise),
        "0 to 9 levels darker": darker(sound),
    }
    results = {name: evaluate(images, reference, cfg, network=network)["metrics"] for name, images in sets.items()}
    names = [name for name in MEASURES if has_spread(results["sound"].get(network.metric(name), {}))]
    rows = {fault: [found[network.metric(name)] for name in names] for fault, found in results.items()}
    scores = {
        fault: [worse(name, entry, sound) for name, entry, sound in zip(names, row, rows["sound"], strict=True)]
        for fault, row in rows.items()
    }
    lines = ["| samples | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for fault, row in rows.items():
        cells = [bold(short(entry["value"]), score > SEEN) for entry, score in zip(row, scores[fault], strict=True)]
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")
    if len(sys.argv) > 1:
        heat_map(sys.argv[1], names, {fault: row for fault, row in scores.items() if fault != "sound"})


def spec(seed: int, times: int) -> str:
    return f"shapes:num={times * NUM},size={SIDE},seed={seed}"


def scenes(seed: int, times: int) -> Tensor:
    """uint8 (times * NUM, 3, SIDE, SIDE)."""
    return open_images(spec(seed, times)).pixels(range(times * NUM), None)


def darker(images: Tensor) -> Tensor:
    """Darkens each block of 100 images by another 0 to 9 grey levels, so that copies have other pixels."""
    levels = torch.arange(len(images)) // 100
    return (images.int() - levels.int()[:, None, None, None]).clamp(min=0).to(torch.uint8)


def noisy(images: Tensor, levels: float, generator: torch.Generator) -> Tensor:
    """Adds Gaussian noise with this standard deviation in grey levels."""
    noise = torch.randn(images.shape, generator=generator) * levels
    return (images.float() + noise).round().clamp(0, 255).to(torch.uint8)


def blur(images: Tensor) -> Tensor:
    """Mean of 3 x 3 pixels."""
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(padded, 3, stride=1).round().to(torch.uint8)


def resize(images: Tensor, side: int) -> Tensor:
    """Bicubic with antialiasing."""
    resized = F.interpolate(images.float(), size=side, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def has_spread(entry: dict[str, Any]) -> bool:
    return entry.get("low") is not None or entry.get("std") is not None


def error(entry: dict[str, Any]) -> float:
    """Standard error of a value, or NaN."""
    if not has_spread(entry):
        return math.nan
    return (entry["high"] - entry["low"]) / (2 * Z) if "low" in entry else entry["std"]


def worse(name: str, entry: dict[str, Any], sound: dict[str, Any]) -> float:
    """By how many standard errors a value is worse than that of sound samples; below 0 where it is better."""
    value, other, better = entry["value"], sound["value"], MEASURES[name].better
    if better == "near 1":
        difference = abs(value - 1) - abs(other - 1)
    else:
        difference = value - other if better == "lower" else other - value
    errors = [e for e in (error(entry), error(sound)) if not math.isnan(e)]
    return difference / math.hypot(*errors) if any(errors) else 0.0


def bold(text: str, on: bool) -> str:
    return f"**{text}**" if on else text


def short(value: float) -> str:
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4}f}"


def heat_map(path: str, names: list[str], scores: dict[str, list[float]]) -> None:
    """Red where a measure sees a fault, blue where it finds the faulty set better."""
    with plots.panels(path, 1, size=(9, 3.6)) as axes:
        axis = axes[0, 0]
        grid = [[max(-SHOWN, min(SHOWN, score)) for score in row] for row in scores.values()]
        axis.imshow(grid, cmap="RdBu_r", vmin=-SHOWN, vmax=SHOWN, aspect="auto")
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right")
        axis.set_yticks(range(len(scores)), list(scores))
        for y, row in enumerate(scores.values()):
            for x, score in enumerate(row):
                colour = "white" if abs(score) > SHOWN / 2 else "black"
                axis.text(x, y, f"{round(score)}", ha="center", va="center", fontsize=8, color=colour)


if __name__ == "__main__":
    main()
