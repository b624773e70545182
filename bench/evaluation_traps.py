"""Measures how each trap of docs/evaluation.md changes the measures, and checks that `digit evaluate` warns of it.

    python bench/evaluation_traps.py            # a table on stdout; about ten minutes on one core
    python bench/evaluation_traps.py darker     # the traps with this word in their names

Reference and samples are two sets of 1,000 rendered scenes of 64 px from one distribution, saved as files where the
format matters, on EfficientNet-Lite2. The first row is the sound comparison. Exits with 1 where a trap is not caught.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from digit.evaluation.image_set import open_images
from digit.evaluation.samples import EvaluateConfig, evaluate, statistics_npz
from digit.metrics.judge import JudgeNetwork

NUM, SIDE = 1000, 64
SHOWN = ("fd", "kd", "cmmd", "is", "precision", "recall", "coverage", "authenticity", "vendi")


@dataclass(frozen=True)
class Scenes:
    """Images (N, 3, H, W) uint8 with the names of their classes."""

    images: Tensor
    names: list[str]

    def take(self, rows: Any) -> "Scenes":
        return Scenes(self.images[rows], [self.names[row] for row in np.arange(len(self.images))[rows]])

    def changed(self, images: Tensor) -> "Scenes":
        return replace(self, images=images)


Make = Callable[[Scenes, Scenes, Path], tuple[Any, Any]]  # (samples, reference, folder) -> what is compared


@dataclass(frozen=True)
class Trap:
    """A fault of an evaluation: how it is made, and what the warning about it says."""

    name: str
    make: Make
    warning: str
    changes: dict[str, Any] = field(default_factory=dict)  # of EvaluateConfig
    by_statistics: bool = True  # whether saved statistics of the reference tell it too
    foreign: bool = False  # whether the reference becomes mu and sigma alone, as pytorch-fid writes them


def main() -> None:
    sound, reference = scenes(22), scenes(21)
    failed = []
    sys.stdout.write("| trap | " + " | ".join(SHOWN) + " |\n" + "|---" * (len(SHOWN) + 1) + "|\n")
    with tempfile.TemporaryDirectory() as folder:
        cfg = EvaluateConfig(kernel_subset_size=NUM // 4, num_directions=100)
        network = cfg.load_network()
        for number, trap in enumerate(traps()):
            if not all(word in trap.name for word in sys.argv[1:]):
                continue
            samples, against = trap.make(sound, reference, Path(folder) / str(number))
            if trap.foreign:
                against = foreign_statistics(against, Path(folder) / str(number), network)
            result = evaluate(samples, against, replace(cfg, **trap.changes), network=network)
            found = {name: result["metrics"].get(network.metric(name)) for name in SHOWN}
            cells = ["–" if entry is None else short(entry["value"]) for entry in found.values()]
            sys.stdout.write(f"| {trap.name} | {' | '.join(cells)} |\n")
            sys.stdout.flush()
            if not any(trap.warning in text for text in result["warnings"]):
                failed.append(trap.name)
    if failed:
        sys.exit(f"not caught: {', '.join(failed)}")


def traps() -> Iterator[Trap]:
    """The sound comparison, and every trap."""
    yield Trap("none", lambda s, r, folder: (s.images, r.images), "")
    yield from traps_of_numbers()
    yield from traps_of_files()
    yield from traps_of_resizing()
    yield from traps_of_pixels()
    yield from traps_of_content()


def traps_of_numbers() -> Iterator[Trap]:
    """Too few images, or other numbers."""
    yield Trap("a quarter of the samples", lambda s, r, folder: (quarter(s).images, r.images), "samples for ")
    yield Trap(
        "a quarter of the reference", lambda s, r, folder: (s.images, quarter(r).images), "reference images for "
    )
    yield Trap("other numbers of images", lambda s, r, folder: (s.images[::2], r.images), "the same two numbers only")
    yield Trap(
        "statistics of few images, number unknown",
        lambda s, r, folder: (s.images, quarter(r).images),
        "has rank",
        foreign=True,
    )


def traps_of_files() -> Iterator[Trap]:
    """What a file format does to an image."""
    yield Trap("JPEG, quality 75", lambda s, r, folder: (save(s, folder, ".jpg", quality=75), r.images), "are JPEG")
    yield Trap("JPEG, quality 95", lambda s, r, folder: (save(s, folder, ".jpg", quality=95), r.images), "are JPEG")
    yield Trap("WebP, quality 80", lambda s, r, folder: (save(s, folder, ".webp", quality=80), r.images), "are WEBP")
    yield Trap(
        "JPEG, quality 75, then saved as PNG",
        lambda s, r, folder: (recompressed(s, folder, 75).images, r.images),
        "8 x 8 blocks of JPEG",
    )
    yield Trap(
        "reference as JPEG, quality 75",
        lambda s, r, folder: (s.images, save(r, folder, ".jpg", quality=75)),
        "reference images are JPEG",
    )
    yield Trap("palette of 256 colours", lambda s, r, folder: (save(s, folder, mode="P"), r.images), "a palette")
    yield Trap("transparent parts", lambda s, r, folder: (save(s, folder, mode="RGBA"), r.images), "an alpha channel")
    yield Trap("CMYK", lambda s, r, folder: (save(s, folder, ".tif", mode="CMYK"), r.images), "CMYK colours")


def traps_of_resizing() -> Iterator[Trap]:
    """Other sizes and filters."""

    def both(**how: Any) -> Make:
        return lambda s, r, folder: (shrink(s.images, **how), shrink(r.images, mode="bicubic", antialias=True))

    half = SIDE // 2
    yield Trap("both half the size, one filter", both(mode="bicubic", antialias=True), "")
    yield Trap("half the size by nearest pixel", both(mode="nearest"), "more fine detail")
    yield Trap("half the size by bilinear, no antialias", both(mode="bilinear"), "more fine detail")
    yield Trap(
        "samples half the size",
        lambda s, r, folder: (shrink(s.images, mode="bicubic", antialias=True), r.images),
        f"samples are {half} px, the reference {SIDE} px",
    )
    yield Trap(
        "samples half the size, enlarged",
        lambda s, r, folder: (shrink(s.images, mode="bicubic", antialias=True), r.images),
        "samples were enlarged",
        {"image_size": SIDE},
    )
    yield Trap(
        "reference wider than high",
        lambda s, r, folder: (s.images, save(r.changed(r.images[:, :, : SIDE * 3 // 4]), folder)),
        f"reference images are {SIDE}x{SIDE * 3 // 4}",
    )
    yield Trap("blur, 3 px", lambda s, r, folder: (blur(s.images), r.images), "less fine detail")
    yield Trap("black bars", lambda s, r, folder: (bars(s.images), r.images), "a frame of one colour")


def traps_of_pixels() -> Iterator[Trap]:
    """Other values of pixels."""
    warm = torch.tensor([1.0, 0.85, 0.6])[:, None, None]

    def tinted(scenes: Scenes) -> Tensor:
        return (scenes.images * warm).round().to(torch.uint8)

    yield Trap("warm light in both sets", lambda s, r, folder: (tinted(s), tinted(r)), "")
    yield Trap("warm light, saved as BGR", lambda s, r, folder: (tinted(s).flip(1), tinted(r)), "exchanged")
    yield Trap("greyscale", lambda s, r, folder: (grey(s.images), r.images), "greyscale")
    yield Trap(
        "-1..1 saved as 0..1",
        lambda s, r, folder: ((2 * s.images.float() - 255).clamp(0, 255).to(torch.uint8), r.images),
        "0 or 255",
    )
    yield Trap("0..1 saved as 0..127", lambda s, r, folder: (s.images // 2, r.images), "contrast")
    yield Trap(
        "linear light for sRGB",
        lambda s, r, folder: ((255 * (s.images / 255) ** 2.2).round().to(torch.uint8), r.images),
        "mean red, green and blue",
    )
    yield Trap("16 levels darker", lambda s, r, folder: ((s.images.int() - 16).clamp(0).byte(), r.images), "mean red")


def traps_of_content() -> Iterator[Trap]:
    """Images that are no new samples of the distribution."""
    yield Trap("one seed twice", lambda s, r, folder: (twice(s.images), r.images), "repeat another one pixel by pixel")
    yield Trap(
        "a tenth of the images ten times, with noise",
        lambda s, r, folder: (noisy(s.images[: len(s.images) // 10].repeat(10, 1, 1, 1)), r.images),
        "nearly repeat another sample",
        by_statistics=False,
    )
    yield Trap(
        "half of the samples from the reference",
        lambda s, r, folder: (torch.cat([r.images[::2], s.images[1::2]]), r.images),
        "are reference images pixel by pixel",
    )
    yield Trap(
        "half of the samples from the reference, 3 levels darker",
        lambda s, r, folder: (torch.cat([(r.images[::2].int() - 3).clamp(0).byte(), s.images[1::2]]), r.images),
        "are nearly a reference image",
        by_statistics=False,
    )
    yield Trap(
        "classes in other shares",
        lambda s, r, folder: (save(unbalanced(s), folder / "s", classes=True), save(r, folder / "r", classes=True)),
        "labels of the samples are unbalanced",
    )
    yield Trap(
        "classes of other names",
        lambda s, r, folder: (
            save(replace(s, names=[f"{name}s" for name in s.names]), folder / "s", classes=True),
            save(r, folder / "r", classes=True),
        ),
        "classes of the samples are none of the reference",
    )
    yield Trap(
        "sorted by class, splits in order",
        lambda s, r, folder: (save(s, folder, classes=True), r.images),
        "sorted by class",
        {"protocol": "adm"},
    )


def scenes(seed: int, num: int = NUM, side: int = SIDE) -> Scenes:
    found = open_images(f"shapes:num={num},size={side},seed={seed}")
    assert found.class_names is not None
    return Scenes(found.pixels(range(num), None), found.class_names)


def save(
    scenes: Scenes, folder: Path, suffix: str = ".png", *, mode: str = "RGB", classes: bool = False, **how: Any
) -> Path:
    """Write a folder of image files, of folders for the classes where wanted."""
    for row, (image, name) in enumerate(zip(scenes.images, scenes.names, strict=True)):
        place = folder / name if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if mode == "RGBA":  # a transparent corner
            alpha = np.full(picture.size[::-1], 255, np.uint8)
            alpha[: len(alpha) // 2, : len(alpha) // 2] = 0
            picture.putalpha(Image.fromarray(alpha))
        picture.convert(mode).save(place / f"{row:05d}{suffix}", **how)
    return folder


def recompressed(scenes: Scenes, folder: Path, quality: int) -> Scenes:
    files = sorted(save(scenes, folder / "jpeg", ".jpg", quality=quality).iterdir())
    arrays = np.stack([np.array(Image.open(path)) for path in files])
    return scenes.changed(torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous())


def foreign_statistics(images: Tensor, folder: Path, network: JudgeNetwork) -> Path:
    """mu and sigma alone, as pytorch-fid writes them."""
    folder.mkdir(parents=True)
    found = statistics_npz(images, folder / "own.npz", network=network)
    np.savez(folder / "foreign.npz", mu=found.mu, sigma=found.sigma)
    return folder / "foreign.npz"


def quarter(scenes: Scenes) -> Scenes:
    return scenes.take(slice(None, len(scenes.images) // 4))


def unbalanced(scenes: Scenes) -> Scenes:
    """Half of the classes lose three quarters of their images."""
    few = set(sorted(set(scenes.names))[::2])
    return scenes.take([row for row, name in enumerate(scenes.names) if name not in few or row % 4 == 0])


def twice(images: Tensor) -> Tensor:
    half = images[: len(images) // 2]
    return torch.cat([half, half])


def shrink(images: Tensor, **how: Any) -> Tensor:
    """Resize to half the side, uint8."""
    return F.interpolate(images.float(), scale_factor=0.5, **how).round().clamp(0, 255).to(torch.uint8)


def blur(images: Tensor) -> Tensor:
    """Mean of 3 x 3 pixels."""
    return F.avg_pool2d(F.pad(images.float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1).round().to(torch.uint8)


def bars(images: Tensor) -> Tensor:
    """Black at the top and at the bottom, an eighth of the height each."""
    images, width = images.clone(), images.shape[2] // 8
    images[:, :, :width], images[:, :, -width:] = 0, 0
    return images


def grey(images: Tensor) -> Tensor:
    return images.float().mean(1, keepdim=True).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def noisy(images: Tensor) -> Tensor:
    """Gaussian noise of half a grey level: most values stay."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) / 2
    return (images.float() + noise).round().clamp(0, 255).to(torch.uint8)


def short(value: float) -> str:
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4}f}"


if __name__ == "__main__":
    main()
