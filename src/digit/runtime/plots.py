"""Image grids, token maps and charts: tensors in, PNG files out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from digit.runtime.files import atomic_path

MARGIN, BACKGROUND, INK = 2, 255, (60, 60, 60)


def grid(images: Tensor, columns: int, *, scale: int = 1, row_names: Sequence[str] = ()) -> Image.Image:
    """(B, 3, H, W) uint8 -> one image, row by row, enlarged `scale` times without smoothing, with row names."""
    num, _, height, width = images.shape
    rows = -(-num // columns)
    names_width = 8 + max((7 * len(n) for n in row_names), default=-8)
    cell_h, cell_w = height * scale + MARGIN, width * scale + MARGIN
    sheet = Image.new("RGB", (names_width + columns * cell_w + MARGIN, rows * cell_h + MARGIN), (BACKGROUND,) * 3)
    canvas = ImageDraw.Draw(sheet)
    for i in range(num):
        tile = to_pil(images[i]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (names_width + MARGIN + i % columns * cell_w, MARGIN + i // columns * cell_h))
    for row, name in enumerate(row_names):
        canvas.text((4, MARGIN + row * cell_h + cell_h // 2 - 6), name, fill=INK)
    return sheet


def write_text(image: Image.Image, place: tuple[int, int], text: str) -> None:
    """Write a short text into a picture, its upper left corner at (x, y)."""
    ImageDraw.Draw(image).text(place, text, fill=INK)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> PIL RGB."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def save_png(path: str | Path, image: Image.Image | Tensor) -> None:
    """Write a PNG, atomically."""
    picture = image if isinstance(image, Image.Image) else to_pil(image)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def code_colours(vectors: Tensor) -> Tensor:
    """Code vectors (K, D) -> colours (K, 3) uint8: their first three principal components, so near codes look alike."""
    centred = (vectors - vectors.mean(0)).float()
    _, _, axes = torch.pca_lowrank(centred, q=min(3, *centred.shape), center=False, niter=4)
    plane = torch.nn.functional.pad(centred @ axes, (0, 3 - axes.shape[1]))
    low, high = plane.quantile(0.02, dim=0), plane.quantile(0.98, dim=0)
    return ((plane - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).mul(255).round().to(torch.uint8)


def token_maps(tokens: Tensor, shape: tuple[int, int], colours: Tensor, size: int) -> Tensor:
    """Tokens (B, N) -> maps (B, 3, size, size) uint8 that show each code in its colour."""
    picture = colours[tokens].reshape(len(tokens), *shape, 3).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(picture.float(), size=(size, size), mode="nearest").to(torch.uint8)


def dim_below(images: Tensor, keep: float) -> Tensor:
    """Grey out the rows below the fraction `keep`: the rest is what a completion was given."""
    shown = images.clone()
    cut = round(images.shape[2] * keep)
    shown[:, :, cut:] = (shown[:, :, cut:].float() * 0.12 + 200).to(torch.uint8)
    return shown


def interleave(*parts: Tensor) -> Tensor:
    """Same-shaped (B, ...) tensors -> (B * len(parts), ...): first of each, second of each, ..."""
    return torch.stack(parts, dim=1).flatten(0, 1)


@contextmanager
def panels(path: str | Path, columns: int, rows: int = 1, *, size: tuple[float, float] = (6, 3.4)) -> Iterator[Any]:
    """Matplotlib axes (rows, columns), `size` inches each; on leaving the context, writes them as a PNG, atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape = (size[0] * columns, size[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=shape, squeeze=False, layout="constrained")
    try:
        yield axes
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    finally:
        plt.close(figure)


def curve_png(
    path: str | Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str
) -> None:
    """Line plot of named (x, y) series."""
    with panels(path, 1) as axes:
        for name, (x, y) in curves.items():
            axes[0, 0].plot(np.asarray(x), np.asarray(y), label=name, linewidth=1.6)
        axes[0, 0].set(xlabel=xlabel, ylabel=ylabel)
        axes[0, 0].grid(alpha=0.3)
        axes[0, 0].legend()


def bars_png(path: str | Path, bars: dict[str, tuple[float, float, float]], *, xlabel: str) -> None:
    """Horizontal bars of named (value, low, high), the ends as whiskers."""
    names, (value, low, high) = list(bars), np.array(list(bars.values())).T
    with panels(path, 1, size=(6, 0.8 + 0.45 * len(names))) as axes:
        plot = axes[0, 0]
        plot.barh(names, value, xerr=[value - low, high - value], color="#7aa6c2", ecolor="#333", capsize=4)
        for row, number in enumerate(value):
            plot.text(0, row, f" {number:.3g}", va="center", fontsize=9)
        plot.invert_yaxis()
        plot.set(xlabel=xlabel)
        plot.grid(axis="x", alpha=0.3)
