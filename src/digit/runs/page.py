"""HTML of a run's report: one file that needs no network, follows light and dark, and fits a phone."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Literal

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from digit.runtime import plots

Level = Literal["good", "fair", "poor", "info"]
WORDS: dict[Level, str] = {"good": "good", "fair": "fair", "poor": "weak", "info": "note"}
SHOWN_SIDE = 160  # px, of larger pictures
LOSSLESS_SIDE = 96  # px up to which a picture is a PNG
CHART = (440, 230)  # units of a chart's width and height
PAD = (52, 12, 34, 14)  # left, right, bottom, top

STYLE = """
:root { color-scheme: light dark; --Ink: #1c1e21; --Soft: #585f66; --Line: #dcdfe3; --Paper: #fff; --Card: #f4f5f7;
  --Bar: #3b6fb6; --Bar-real: #2e7d4f; --Bar-floor: #8a6d1d; --Bar-other: #8a5bb5; --Good: #1d7a45; --Fair: #9a6400;
  --Poor: #b3261e; --Info: #3b6fb6; }
@media (prefers-color-scheme: dark) { :root { --Ink: #e6e8eb; --Soft: #a3aab2; --Line: #363b41; --Paper: #15171a;
  --Card: #1f2226; --Bar: #74a5e8; --Bar-real: #6cc492; --Bar-floor: #d9b44a; --Bar-other: #c39be8; --Good: #6cc492;
  --Fair: #e8b04a; --Poor: #f28b82; --Info: #74a5e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--Paper); color: var(--Ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
a { color: var(--Info); }
.soft, small, figcaption { color: var(--Soft); }
small { font-size: .8rem; font-weight: 400; }
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
img.small { image-rendering: pixelated; }
figure { margin: 0; background: var(--Card); border-radius: 6px; padding: .35rem; }
figure div { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .25rem; }
figcaption { font-size: .75rem; line-height: 1.3; padding-top: .25rem; }
.scroll { overflow-x: auto; }
.bars { display: grid; grid-template-columns: minmax(6rem, 13rem) 1fr auto; gap: .25rem .75rem; align-items: center;
  font-size: .9rem; margin: .25rem 0 1rem; }
.track { height: .85rem; background: var(--Card); border-radius: 3px; position: relative; }
.bar { position: absolute; inset: 0 auto 0 0; background: var(--Bar); border-radius: 3px; }
.bar.real { background: var(--Bar-real); } .bar.floor { background: var(--Bar-floor); }
.bar.other { background: var(--Bar-other); }
.mark { position: absolute; top: -.1rem; bottom: -.1rem; width: 2px; background: var(--Bar-real); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--Card); padding: .6rem .75rem; border-radius: 6px; white-space: pre-wrap; font-size: .8rem;
  margin: .25rem 0 .75rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
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
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            *body,
            "</body></html>",
        ]
    )


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
    shown = plots.to_pil(image)
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    file, lossless = io.BytesIO(), max(shown.size) <= LOSSLESS_SIDE
    shown.save(file, format="PNG") if lossless else shown.save(file, format="WEBP", quality=90)
    data, kind = base64.b64encode(file.getvalue()).decode(), "png" if lossless else "webp"
    width, height = shown.size
    return (
        f'<img alt="{escape(alt)}" width="{width}" height="{height}"{" class=small" * lossless} '
        f'src="data:image/{kind};base64,{data}">'
    )


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
