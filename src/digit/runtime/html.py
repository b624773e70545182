"""HTML of the pages that commands write: one file that needs no network, follows light and dark, and fits a phone."""

import base64
import io
from collections.abc import Iterable
from html import escape

from PIL import Image

LOSSLESS_SIDE = 96  # px up to which a picture is a PNG

STYLE = """
:root { color-scheme: light dark; --Ink: #1c1e21; --Soft: #585f66; --Line: #dcdfe3; --Paper: #fff; --Card: #f4f5f7;
  --Bar: #3b6fb6; }
@media (prefers-color-scheme: dark) { :root { --Ink: #e6e8eb; --Soft: #a3aab2; --Line: #363b41; --Paper: #15171a;
  --Card: #1f2226; --Bar: #74a5e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--Paper); color: var(--Ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.soft, small, figcaption { color: var(--Soft); }
small { font-size: .8rem; font-weight: 400; }
figure { margin: 0; background: var(--Card); border-radius: 6px; padding: .35rem; }
figcaption { font-size: .75rem; line-height: 1.3; padding-top: .25rem; }
img.small { image-rendering: pixelated; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.track { height: .85rem; background: var(--Card); border-radius: 3px; position: relative; }
.bar { position: absolute; inset: 0 auto 0 0; background: var(--Bar); border-radius: 3px; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--Card); padding: .6rem .75rem; border-radius: 6px; white-space: pre-wrap; font-size: .8rem;
  margin: .25rem 0 .75rem; }
"""


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page; `style` are rules beside STYLE."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}{style.lstrip()}</style></head><body>",
            *body,
            "</body></html>",
        ]
    )


def picture(image: Image.Image, alt: str, side: int, *, title: str = "") -> str:
    """A picture inside the page; larger ones are shrunk to `side` pixels."""
    shown = image.copy()
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    file, lossless = io.BytesIO(), max(shown.size) <= LOSSLESS_SIDE
    shown.save(file, format="PNG") if lossless else shown.save(file, format="WEBP", quality=90)
    data, kind = base64.b64encode(file.getvalue()).decode(), "png" if lossless else "webp"
    width, height = shown.size
    titled = f' title="{escape(title)}"' if title else ""
    return (
        f'<img alt="{escape(alt)}"{titled} width="{width}" height="{height}"{" class=small" * lossless} '
        f'src="data:image/{kind};base64,{data}">'
    )
