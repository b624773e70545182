"""HTML of a run's report, on `runtime/html.py`: findings, pictures, bars, charts."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Literal

from jaxtyping import UInt8
from torch import Tensor

from digit.runtime import html, plots

Level = Literal["good", "fair", "poor", "info"]
WORDS: dict[Level, str] = {"good": "good", "fair": "fair", "poor": "weak", "info": "note"}
SHOWN_SIDE = 160  # px, of larger pictures
CHART = (440, 230)  # units of a chart's width and height
PAD = (52, 12, 34, 14)  # left, right, bottom, top

STYLE = """
:root { --Bar-real: #2e7d4f; --Bar-floor: #8a6d1d; --Bar-other: #8a5bb5; --Good: #1d7a45; --Fair: #9a6400;
  --Poor: #b3261e; --Info: #3b6fb6; }
@media (prefers-color-scheme: dark) { :root { --Bar-real: #6cc492; --Bar-floor: #d9b44a; --Bar-other: #c39be8;
  --Good: #6cc492; --Fair: #e8b04a; --Poor: #f28b82; --Info: #74a5e8; } }
a { color: var(--Info); }
.findings { list-style: none; margin: 1rem 0; padding: 0; display: grid; gap: .45rem; }
.findings li { background: var(--Card); border-left: 4px solid var(--Info); padding: .5rem .75rem;
  border-radius: 0 6px 6px 0; }
.findings b { font-size: .75rem; text-transform: uppercase; letter-spacing: .04em; color: var(--Info);
  margin-right: .4rem; }
.findings .good { border-color: var(--Good); } .findings .good b { color: var(--Good); }
.findings .fair { border-color: var(--Fair); } .findings .fair b { color: var(--Fair); }
.findings .poor { border-color: var(--Poor); } .findings .poor b { color: var(--Poor); }
.row { display: grid; gap: .3rem; grid-template-columns: repeat(10, 1fr); }
.strip { display: grid; gap: .3rem; grid-template-columns: repeat(8, 1fr); }
.pairs { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
.wide { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
img { display: block; width: 100%; height: auto; border-radius: 3px; }
figure div { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .25rem; }
.scroll { overflow-x: auto; }
.bars { display: grid; grid-template-columns: minmax(6rem, 13rem) 1fr auto; gap: .25rem .75rem; align-items: center;
  font-size: .9rem; margin: .25rem 0 1rem; }
.bar.real { background: var(--Bar-real); } .bar.floor { background: var(--Bar-floor); }
.bar.other { background: var(--Bar-other); }
.mark { position: absolute; top: -.1rem; bottom: -.1rem; width: 2px; background: var(--Bar-real); }
td { padding: .2rem 1rem .2rem 0; vertical-align: top; border-bottom: 1px solid var(--Line); }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--Soft); font: 12px system-ui, sans-serif; }
svg .axis { stroke: var(--Line); } svg path { fill: none; stroke: var(--Bar); stroke-width: 1.8; }
svg path.held { stroke: var(--Fair); } svg .key-held { fill: var(--Fair); } svg .key { fill: var(--Bar); }
summary { cursor: pointer; margin: .75rem 0; }
@media (max-width: 40rem) {
  .row { grid-template-columns: repeat(5, 1fr); } .strip { grid-template-columns: repeat(4, 1fr); }
  .pairs { grid-template-columns: repeat(2, 1fr); }
  .bars { grid-template-columns: 1fr auto; gap: 0 .6rem; } .bars > :nth-child(3n + 1) { grid-column: 1 / -1; }
}
"""


def document(title: str, body: Iterable[str]) -> str:
    """A whole page."""
    return html.document(title, body, STYLE)


def findings(entries: Iterable[tuple[Level, str]]) -> str:
    """Sentences, each with how good what it says is."""
    items = [f'<li class="{level}"><b>{WORDS[level]}</b>{escape(text)}</li>' for level, text in entries]
    return f'<ul class="findings">{"".join(items)}</ul>'


def paragraph(text: str, *, soft: bool = False) -> str:
    """A paragraph; nothing for no text."""
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>" if text else ""


# -------------------------------------------------------------------- pictures


def picture(image: UInt8[Tensor, "3 H W"], alt: str) -> str:
    """A picture inside the page; larger ones are shrunk to SHOWN_SIDE."""
    return html.picture(plots.to_pil(image), alt, SHOWN_SIDE)


def row(images: Iterable[UInt8[Tensor, "3 H W"]], alt: str, kind: str = "row") -> str:
    """Pictures of equal size beside each other, in lines of ten (kind row) or eight (strip); fewer on a phone."""
    return f'<div class="{kind}">{"".join(picture(image, f"{alt} {n + 1}") for n, image in enumerate(images))}</div>'


def figure(images: Sequence[tuple[UInt8[Tensor, "3 H W"], str]], caption: str) -> str:
    """Pictures that belong together, (picture, what it is), with a caption."""
    inner = "".join(picture(image, alt) for image, alt in images)
    return f"<figure><div>{inner}</div><figcaption>{escape(caption)}</figcaption></figure>"


def sheet(file: str, alt: str, data: bytes) -> str:
    """A PNG that is too wide for a phone, which scrolls sideways there; inside the page."""
    return (
        f'<div class="scroll"><img alt="{escape(alt)}" style="min-width:36rem" title="{escape(file)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></div>'
    )


# -------------------------------------------------------------------- numbers


def bars(
    entries: Iterable[tuple[str, float, str, str]],
    *,
    most: float | None = None,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Bars of (name, value, text, kind) from 0 to `most`; `marks` are values of other pictures, by name of a bar."""
    entries = list(entries)
    end = most or max([value for _, value, *_ in entries] or [1.0]) or 1.0
    lines = []
    for name, value, text, kind in entries:
        mark = (marks or {}).get(name)
        line = "" if mark is None else f'<span class="mark" style="left:{place(mark, end):.2f}%"></span>'
        lines.append(
            f"<span>{escape(name)}</span>"
            f'<span class="track"><span class="bar {kind}" style="width:{place(value, end):.2f}%"></span>{line}</span>'
            f'<span class="number">{escape(text)}</span>'
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def place(value: float, end: float) -> float:
    """Percent of the way from 0 to `end`."""
    return 100 * min(max(value / end, 0.0), 1.0)


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns: what, and its value."""
    return (
        f"<table>{''.join(f'<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>' for name, value in rows)}</table>"
    )


def commands(entries: Iterable[tuple[str, str]]) -> str:
    """What a command does, and the command to copy."""
    return "".join(f"{paragraph(text)}<pre>{escape(line)}</pre>" for text, line in entries)


# -------------------------------------------------------------------- charts


def chart(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, ylabel: str) -> str:
    """A line chart of (step, value); the second curve is that of held-out pictures."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    (left, right, bottom, top), (width, height) = PAD, CHART
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    values = sorted(y for _, y in points)
    low_y, high_y = values[0], values[min(len(values) - 1, int(0.98 * len(values)))]  # a first peak is cut off
    span_x, span_y = max(high_x - low_x, 1), max(high_y - low_y, 1e-9)

    def at(x: float, y: float) -> tuple[float, float]:
        fraction = min(max((y - low_y) / span_y, 0.0), 1.0)
        return left + (x - low_x) / span_x * (width - left - right), height - bottom - fraction * (
            height - bottom - top
        )

    lines = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for share in (0.0, 0.5, 1.0):
        y = low_y + share * span_y
        _, height_of = at(low_x, y)
        lines.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height_of:.1f}" y2="{height_of:.1f}"/>')
        lines.append(f'<text x="{left - 6}" y="{height_of + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for x, anchor in ((low_x, "start"), (high_x, "end")):
        lines.append(f'<text x="{at(x, low_y)[0]:.1f}" y="{height - 12}" text-anchor="{anchor}">{x:,}</text>')
    lines.append(f'<text x="{(left + width - right) / 2}" y="{height - 12}" text-anchor="middle">step</text>')
    for number, (name, curve) in enumerate(curves.items()):
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in curve))
        lines.append(f'<path{" class=held" * bool(number)} d="{path}"/>')
        key = f'x="{width - right}" y="{top + 12 + 16 * number}" text-anchor="end"'
        lines.append(f'<text class="key{"-held" * bool(number)}" {key}>{escape(name)}</text>')
    return f"<figure>{''.join(lines)}</svg><figcaption>{escape(title)}: {escape(ylabel)}</figcaption></figure>"
