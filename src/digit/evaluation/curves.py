"""Line plots of metrics with their intervals, side by side, together with the paper's values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from digit.runtime.plots import panels


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A named series, optionally with the ends of its interval."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0
    """Index in the colour cycle; related curves have one colour in all panels."""
    line: str = "-"
    """matplotlib's line style."""
    reference: bool = False
    """Plotted thin and dashed: a value for comparison that was not computed here."""

    @classmethod
    def of(cls, intervals: Sequence[Mapping[str, Any]], x: Sequence[float], *, factor: float = 1, **style) -> Self:
        """The curve of {"value", "low", "high"} at each x, multiplied by `factor` (100 for percent).

        Where there is no interval, low and high are None, and none is plotted.
        """
        y, low, high = ([factor * plotted(interval[end]) for interval in intervals] for end in ("value", "low", "high"))
        return cls(x=x, y=y, low=low, high=high, **style)


def plotted(value: float | None) -> float:
    """The value; for a missing one NaN, which matplotlib leaves out."""
    return math.nan if value is None else value


def curves_png(
    path: str | Path,
    curves_by_ylabel: Mapping[str, Sequence[Curve]],
    *,
    xlabel: str,
    falling: bool = False,
    logarithmic: bool = False,
) -> None:
    """Save one panel for each y label, with shaded intervals and one legend below.

    Args:
        falling: whether x runs from large to small.
        logarithmic: whether x has a logarithmic scale.
    """
    with panels(path, len(curves_by_ylabel), size=(5.2, 4)) as axes:
        for panel, (ylabel, curves) in zip(axes[0], curves_by_ylabel.items(), strict=True):
            for curve in curves:
                own = dict(linewidth=1.8, linestyle=curve.line, marker=".")
                style = dict(linewidth=0.9, linestyle="--") if curve.reference else own
                panel.plot(curve.x, curve.y, label=curve.name, color=f"C{curve.colour}", **style)
                if curve.low is not None:
                    panel.fill_between(curve.x, curve.low, curve.high, color=f"C{curve.colour}", alpha=0.2, linewidth=0)
            panel.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if logarithmic else "linear")
            if not logarithmic:
                panel.locator_params(axis="x", integer=True)
            panel.grid(alpha=0.3)
            if falling:
                panel.invert_xaxis()
        lines = {line.get_label(): line for panel in axes[0] for line in panel.get_lines()}
        columns = min(len(lines), 2 * len(curves_by_ylabel))
        axes[0, 0].figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns)
