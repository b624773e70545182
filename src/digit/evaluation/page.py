"""report.html of `digit evaluate`: one file with every measure, warning, class and picture; and result.json beside it.

The page needs no network, follows the reader's light or dark theme, and fits a phone (`runtime/html.py`).
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from digit.evaluation.table import short, spread_of
from digit.evaluation.traps import Side
from digit.runtime import html, plots
from digit.runtime.files import as_path, atomic_path, write_json

PAGE, RESULT = "report.html", "result.json"
SHOWN_SIDE = 192  # px, of larger images
SHOWN_CLASSES, BEST_CLASSES = 20, 5

STYLE = """
:root { --Warn: #b26a00; --Warn-paper: #fff6e5; }
@media (prefers-color-scheme: dark) { :root { --Warn: #f0b457; --Warn-paper: #2b2416; } }
.warnings { list-style: none; margin: 1rem 0; padding: 0; }
.warnings li { background: var(--Warn-paper); border-left: 4px solid var(--Warn); margin: .4rem 0;
  padding: .5rem .75rem; border-radius: 0 6px 6px 0; }
table { width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45rem .75rem .45rem 0; border-bottom: 1px solid var(--Line); }
thead th { color: var(--Soft); font-weight: 500; font-size: .85rem; }
td.value { font-weight: 600; white-space: nowrap; }
.grid { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); }
.grid.pairs { grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
figure div { display: flex; gap: .25rem; }
figure img { display: block; flex: 1; min-width: 0; width: 100%; height: auto; border-radius: 3px; }
.classes { display: grid; grid-template-columns: minmax(5rem, 14rem) 1fr auto; gap: .3rem .75rem; align-items: center;
  font-size: .9rem; }
.whisker { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: var(--Ink); }
@media (max-width: 40rem) {
  thead { display: none; }
  tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--Line); }
  th, td { display: block; border: 0; padding: .1rem 0; }
  td[data-name]::before { content: attr(data-name) ": "; color: var(--Soft); font-weight: 400; }
  .grid.pairs { grid-template-columns: repeat(2, 1fr); }
  .grid { grid-template-columns: repeat(4, 1fr); }
  .classes { grid-template-columns: 6rem 1fr auto; }
}
"""

TITLES = {
    "spread": (
        "Samples beside their nearest reference image",
        "Evenly spread over the samples. Left the sample, right the reference image whose features are nearest. The "
        "ratio is their distance over that of the reference image to its own nearest other.",
    ),
    "closest": (
        "Samples that are closest to a reference image",
        "The smallest ratios. Copies of reference images have a ratio near 0, new images about 1.",
    ),
    "densest": (
        "Highest density",
        "Samples that lie in the most neighbourhoods of reference images: what the measures find most typical.",
    ),
    "sparsest": (
        "Lowest density",
        "Samples in the fewest neighbourhoods of reference images: what the measures find farthest from real images.",
    ),
    "missed": (
        "What the samples lack",
        "Reference images whose neighbourhood holds no sample, evenly spread over these: they lower coverage.",
    ),
}


def write_page(folder: str | Path, result: dict[str, Any], samples: Side, reference: Side) -> Path:
    """Write FOLDER/report.html and FOLDER/result.json of a result of `evaluate`; returns the page's path."""
    folder = as_path(folder)
    write_json(folder / RESULT, result)
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_text(page(result, samples, reference), encoding="utf-8")
    return folder / PAGE


def page(result: dict[str, Any], samples: Side, reference: Side) -> str:
    """The page as HTML. The images are read again, resized and cropped as the network received them."""
    name = result["reference"].get("name", "saved statistics")
    protocol, network = result["protocol"], result["protocol"]["network"]
    body = [
        f"<h1>{escape(result['samples']['name'])} against {escape(name)}</h1>",
        f'<p class="soft">{_counts(result)} · network {escape(network["network"])} · protocol '
        f"{escape(protocol['name'])}: {escape(protocol['about'])}</p>",
        *_warnings(result["warnings"]),
        "<h2>Measures</h2>",
        *_measures(result),
        *_pictures(result["examples"], samples, reference),
        *_classes(result["classes"]),
        "<h2>Protocol</h2>",
        f"<p>Two values can be compared where all of this is equal. The same and more is in {RESULT}.</p>",
        f"<details><summary>Settings, hashes and versions</summary><pre>{_details(result)}</pre></details>",
    ]
    return html.document(f"{result['samples']['name']} evaluated", body, STYLE)


def _counts(result: dict[str, Any]) -> str:
    samples, reference = result["samples"], result["reference"]
    num = reference["num"] if "num" in reference else reference["statistics"]["num"]
    return f"{samples['num']:,} samples, {'an unknown number of' if num is None else f'{num:,}'} reference images"


def _warnings(warnings: Sequence[str]) -> list[str]:
    if not warnings:
        return ["<h2>Traps</h2><p>None found.</p>"]
    items = "".join(f"<li>{escape(text[:1].upper() + text[1:])}.</li>" for text in warnings)
    return [f'<h2>Traps found: {len(warnings)}</h2><ul class="warnings">{items}</ul>']


def _measures(result: dict[str, Any]) -> list[str]:
    """A table of all measures, those that are left out at its end."""
    rows = []
    for name, entry in result["metrics"].items():
        about = result["measures"][name]
        cells = [
            ("value", "value", short(entry["value"])),
            ("interval", "", spread_of(entry)),
            ("better", "", about["better"]),
            ("images needed", "", about["needs"]),
        ]
        columns = "".join(f'<td data-name="{key}" class="{kind}">{escape(text)}</td>' for key, kind, text in cells)
        rows.append(f"<tr><th>{escape(name)}<br><small>{escape(about['source'])}</small></th>{columns}</tr>")
    for name, reason in result["left_out"].items():
        rows.append(f'<tr class="soft"><th>{escape(name)}</th><td colspan="4">left out: {escape(reason)}</td></tr>')
    head = (
        "<tr><th>measure</th><th>value</th><th>95% interval or deviation</th><th>better</th><th>images needed</th></tr>"
    )
    return [f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"]


def _pictures(examples: dict[str, list[dict[str, Any]]], samples: Side, reference: Side) -> list[str]:
    lines = ["<h2>Pictures</h2>"]
    for kind, entries in examples.items():
        if not entries:
            continue
        title, text = TITLES[kind]
        paired = kind in ("spread", "closest") and "reference" in entries[0] and reference.images is not None
        if "reference" not in entries[0]:
            title, text = "Samples", "Evenly spread over the samples."
        figures = [_figure(kind, entry, samples, reference, paired=paired) for entry in entries]
        if any(figures):
            lines += [f"<h3>{title}</h3><p>{text}</p>", f'<div class="grid{" pairs" * paired}">', *figures, "</div>"]
    return lines


def _figure(kind: str, entry: dict[str, Any], samples: Side, reference: Side, *, paired: bool) -> str:
    """One picture, or a sample beside its nearest reference image; "" where the image is not at hand."""
    shown = [(reference, entry["reference"])] if kind == "missed" else [(samples, entry["sample"])]
    if paired:
        shown.append((reference, entry["reference"]))
    if any(side.images is None for side, _ in shown):
        return ""
    ratio = "" if "ratio" not in entry else "repeated" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
    caption = f"ratio {ratio}" if paired else f"density {entry['density']:.1f}" if "density" in entry else ""
    images = "".join(_image(side, row) for side, row in shown)
    return f"<figure><div>{images}</div>{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"


def _image(side: Side, row: int) -> str:
    assert side.images is not None
    key = side.images.source.key(row)
    return html.picture(plots.to_pil(side.images.pixels([row], side.fitted)[0]), key, SHOWN_SIDE, title=key)


def _classes(classes: dict[str, dict[str, Any]]) -> list[str]:
    """Bars of the distance of each class with its interval; the worst and the best of many."""
    if not classes:
        return []
    entries = list(classes.items())
    chosen = (
        entries if len(entries) <= SHOWN_CLASSES + BEST_CLASSES else entries[:SHOWN_CLASSES] + entries[-BEST_CLASSES:]
    )
    ends = [end for _, entry in chosen for end in (entry["kd"]["low"], entry["kd"]["high"], 0.0)]
    least, most = min(ends), max(max(ends), min(ends) + 1e-12)

    def place(value: float) -> float:
        return 100 * (value - least) / (most - least)

    def band(kind: str, low: float, high: float) -> str:
        return f'<span class="{kind}" style="left:{place(low):.2f}%;width:{place(high) - place(low):.2f}%"></span>'

    rows = []
    for name, entry in chosen:
        kd = entry["kd"]
        bars = band("bar", min(0.0, kd["value"]), max(0.0, kd["value"])) + band("whisker", kd["low"], kd["high"])
        shares = [f"{share} {entry[share]:.2f}" for share in ("precision", "coverage") if share in entry]
        rows.append(
            f'<span>{escape(name)} <small>{entry["num"]}</small></span><span class="track">{bars}</span>'
            f'<span class="number">{short(kd["value"])} <small>{" · ".join(shares)}</small></span>'
        )
    left_out = len(entries) - len(chosen)
    about = f"The {SHOWN_CLASSES} worst and the {BEST_CLASSES} best of {len(entries)}. " if left_out else ""
    return [
        "<h2>Classes</h2>",
        f"<p>{about}Distance of KID's kernel between samples and reference images of the class, with its 95% interval; "
        "lower is better. The number beside a name counts its samples. Precision and coverage are shares of the "
        "class's samples and reference images.</p>",
        f'<div class="classes">{"".join(rows)}</div>',
    ]


def _details(result: dict[str, Any]) -> str:
    kept = {name: result[name] for name in ("protocol", "samples", "reference", "versions")}
    return escape(json.dumps(kept, indent=2, ensure_ascii=False))
