"""Takes the pictures of docs/studio.md from the page itself, as a person sees it, and makes them small.

    python bench/studio_pictures.py runs/demo --out docs/pictures     # needs Playwright and Chromium

Draw is taken while the pictures grow. `--runs` is the folder that Runs shows; its two latest are compared.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from studio_speed import Served, say, serve

WIDTH, HEIGHT = 1280, 1120
GROWN = 0.55  # of the second stage, when the picture of Draw is taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="finished run of digit fit")
    parser.add_argument("--runs", default=None, help="folder of runs for the part Runs (default: RUN's folder)")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture drawn")
    parser.add_argument("--parts", default="draw,complete,tokens,stability,judge,runs", help="which pictures")
    args = parser.parse_args()
    options = ["--runs", args.runs] if args.runs else []
    with serve(args.run, *options) as studio:
        take(studio, args.parts.split(","), args.seed, args.out)
    return 0


def take(studio: Served, parts: list[str], seed: int, out: Path) -> None:
    """Drive the page and keep a picture of each part."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, reduced_motion="reduce")
        page = context.new_page()
        page.set_default_timeout(180_000)
        page.goto(studio.address)
        page.wait_for_selector("html[data-ready]", state="attached")
        for part in parts:
            page.locator(f"#tabs a[href='#{part}']").click()
            page.wait_for_selector(f"#tabs a[href='#{part}'][aria-current]")
            SCENES[part](page, seed)
            page.mouse.move(0, 0)
            keep(page, out / f"studio_{part}.png", whole=part not in ("draw", "runs"))
        browser.close()


def draw(page: Any, seed: int) -> None:
    """36 pictures: the first 16 are there, the next 16 are in the middle of their second stage, the last wait."""
    begin(page, seed, 36)
    page.wait_for_function(
        f"""() => {{
            const bar = document.querySelector(".above [role=progressbar]");
            const growing = bar?.getAttribute("aria-label").startsWith("2") && bar.ariaValueNow >= {100 * GROWN};
            return growing && document.querySelectorAll(".tile img").length === 16;
        }}""",
        polling=20,
    )


def begin(page: Any, seed: int, num: int) -> None:
    """Press Draw."""
    page.wait_for_selector(".classes .thumb[style]")
    page.get_by_label("Seed of the first picture").fill(str(seed))
    page.get_by_role("button", name=str(num), exact=True).click()
    page.get_by_role("button", name="Draw", exact=True).click()


def complete(page: Any, seed: int) -> None:
    page.get_by_role("button", name="From the training data").click()
    page.locator(".strip button").nth(3).click()
    page.get_by_role("button", name="Border").click()
    page.get_by_role("button", name="Complete", exact=True).click()
    page.wait_for_selector(".tile:nth-child(4) img")
    page.wait_for_selector("text=The model took it for")


def tokens(page: Any, seed: int) -> None:
    page.wait_for_selector(".patches .thumb")
    page.wait_for_selector("text=Rendered from the discriminative tokens")
    page.locator(".codes button").first.click()
    page.wait_for_selector("text=1 token changed")


def stability(page: Any, seed: int) -> None:
    page.wait_for_selector("svg.chart polyline")
    page.wait_for_selector(".cells i.changed")


def judge(page: Any, seed: int) -> None:
    page.locator("#tabs a[href='#draw']").click()
    begin(page, seed, 9)
    page.wait_for_selector("text=9 pictures in")
    page.locator("#tabs a[href='#judge']").click()
    page.get_by_role("button", name="Judge the 9 pictures drawn").click()
    page.wait_for_selector(".judged article:nth-child(9)")


def runs(page: Any, seed: int) -> None:
    page.wait_for_selector(".run-card")
    boxes = page.get_by_label("compare", exact=True)
    for place in range(min(2, boxes.count())):
        boxes.nth(place).check()
    time.sleep(1)


SCENES = {"draw": draw, "complete": complete, "tokens": tokens, "stability": stability, "judge": judge, "runs": runs}


def keep(page: Any, path: Path, *, whole: bool) -> None:
    """The whole page, or what a window shows of it, as a PNG of 64 levels a channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, full_page=whole)
    with Image.open(path) as image:
        small = image.convert("RGB").point(lambda value: min(255, (value + 2) // 4 * 4))
    small.save(path, optimize=True)
    say(f"{path}: {small.width} x {small.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
