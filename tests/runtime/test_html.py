"""The frame of the pages that commands write, and the pictures in them."""

import base64
import io
import re

from PIL import Image

from digit.runtime.html import LOSSLESS_SIDE, document, picture
from digit.runtime.spread import spread


def test_a_page_has_the_shared_style_and_its_own():
    page = document("a < b", ["<p>text</p>"], "\n.own { color: red; }\n")
    assert page.startswith("<!doctype html>") and "<title>a &lt; b</title>" in page and "<p>text</p>" in page
    assert page.count("<style>") == 1 and ".own { color: red; }" in page and "prefers-color-scheme: dark" in page
    assert "http" not in page, "it needs no network"


def test_small_pictures_are_exact_and_large_ones_are_shrunk():
    small = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    text = picture(small, 'a "cat"', 160)
    data = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", text)[1])
    assert Image.open(io.BytesIO(data)).tobytes() == small.tobytes()
    assert 'alt="a &quot;cat&quot;" width="40" height="30" class=small' in text and "title" not in text
    large = picture(small.resize((400, 300)), "b", 160, title="b.png")
    assert 'title="b.png" width="160" height="120" ' in large and "image/webp" in large and LOSSLESS_SIDE < 160


def test_spread_covers_the_set_and_its_ends():
    assert spread(5, 10) == [0, 1, 2, 3, 4] and spread(100, 4) == [0, 33, 66, 99]
    assert spread(0, 4) == [] and spread(7, 1) == [0]
