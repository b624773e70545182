"""How fast the studio is over a run, beside `digit sample`, and whether its memory stays flat.

    python bench/studio_speed.py RUN                        # first page, first token map, 16 pictures
    python bench/studio_speed.py RUN --drawings 1000        # resident memory every 100 drawings, of 1 picture each

`digit studio` serves in a process of its own. The first page and the token map are timed in Debian's Chromium where it
and Playwright are installed, else by requests alone, which is said. Drawing and sampling alternate: the page's time is
that from the request to the last picture; `digit sample`'s is that of its sampling, without start, loading and PNGs.
Both draw in batches of 16. The exit status is 1 where a target is missed. Linux only: resident memory is VmRSS.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE_SECONDS, PAGE_BYTES, PAGE_REQUESTS = 1.0, 300_000, 5
MAP_SECONDS = 1.0
PICTURES, RATIO = 16, 1.3
WARM_UP, FLAT = 200, 8.0  # drawings before memory counts; MiB that it may grow by afterwards
FIRST = ("", "style.css", "app.js", "api/about", "api/examples")  # what a browser asks for at the start


@dataclass(frozen=True)
class Served:
    """A studio that runs."""

    address: str
    """http://127.0.0.1:PORT/"""
    process: subprocess.Popen
    start_seconds: float
    """From the command to the address."""

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.address + path, timeout=600) as answer:
            return answer.read()

    def job(self, path: str, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of a job, as they arrive."""
        headers = {"content-type": "application/json", "x-studio-page": "bench"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            kind = ""
            for line in answer:
                if line.startswith(b"event: "):
                    kind = line[7:].decode().strip()
                elif line.startswith(b"data: "):
                    data = json.loads(line[6:])
                    if kind == "error":
                        raise RuntimeError(data["text"])
                    yield kind, data

    @property
    def resident(self) -> float:
        """MiB of memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


@contextmanager
def serve(run: str, *options: str) -> Iterator[Served]:
    """`digit studio RUN` at a free port, until the context ends."""
    words = [sys.executable, "-m", "digit", "studio", run, "--port", "0", *options]
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("studio: "):
                yield Served(line.split()[1], process, time.perf_counter() - began)
                return
        raise RuntimeError("the studio did not start")
    finally:
        process.terminate()
        process.wait(60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="finished run of digit fit")
    parser.add_argument("--rounds", type=int, default=5, help="drawings of 16 and samplings, in turn")
    parser.add_argument("--drawings", type=int, default=0, help="count resident memory over this many drawings instead")
    args = parser.parse_args()
    with serve(args.run) as studio:
        if args.drawings:
            return 0 if memory(studio, args.drawings) else 1
        say(f"start-up: {studio.start_seconds:.1f} s from the command to the address")
        results = [first_page(studio), *browser(studio), first_map(studio), sixteen(studio, args.run, args.rounds)]
    return 0 if all(results) else 1


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def verdict(name: str, text: str, fine: bool) -> bool:
    say(f"{name}: {text}: {'ok' if fine else 'MISSED'}")
    return fine


def first_page(studio: Served) -> bool:
    """Everything that a browser asks for at the start, one request after the other."""
    began = time.perf_counter()
    sizes = [len(studio.get(path)) for path in FIRST]
    seconds = time.perf_counter() - began
    text = f"{seconds:.2f} s, {sum(sizes) / 1000:.0f} kB in {len(FIRST)} requests, by requests alone"
    return verdict("first page", text, seconds <= PAGE_SECONDS and sum(sizes) <= PAGE_BYTES)


def browser(studio: Served) -> Iterator[bool]:
    """The first page and the first token map in Chromium; nothing where it is missing."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        say("in a browser: skipped, playwright is not installed")
        return
    if chromium is None:
        say("in a browser: skipped, no Chromium on this machine")
        return
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, asked = opened.new_page(), []
        page.on("request", lambda r: None if r.url.startswith(("data:", "blob:")) else asked.append(r.url))
        page.goto("about:blank")
        page.goto(studio.address)
        page.wait_for_selector("html[data-ready]", state="attached")
        page.wait_for_load_state("networkidle")
        times = page.evaluate(
            "() => ({ready: document.documentElement.dataset.ready, "
            "sizes: [performance.getEntriesByType('navigation')[0], ...performance.getEntriesByType('resource')]"
            ".filter((e) => e.name.startsWith('http')).map((e) => [e.name, e.encodedBodySize, e.responseEnd])})"
        )
        size, seconds = sum(entry[1] for entry in times["sizes"]), float(times["ready"]) / 1000
        fine = seconds <= PAGE_SECONDS and size <= PAGE_BYTES and len(asked) <= PAGE_REQUESTS
        yield verdict(
            "first page", f"{seconds:.2f} s, {size / 1000:.0f} kB in {len(asked)} requests, in Chromium", fine
        )
        seconds = []
        for _ in range(3):
            page.get_by_role("button", name="Draw", exact=True).click(trial=True)
            seconds.append(page.evaluate(CLICK) / 1000)
            page.wait_for_selector("text=Click a seed to keep it")
        text = f"{', '.join(f'{s:.2f}' for s in seconds)} s from a click in Chromium"
        yield verdict("first token map", text, max(seconds) <= MAP_SECONDS)
        opened.close()


# from a click on Draw to the first canvas of tokens: the new pictures' canvases have one pixel until then
CLICK = """() => new Promise((found) => {
  document.querySelector(".gallery").replaceChildren();
  const began = performance.now();
  [...document.querySelectorAll("button.main")].find((b) => b.textContent === "Draw").click();
  const look = () => {
    const map = document.querySelector(".gallery canvas");
    if (map && map.width > 1) found(performance.now() - began); else requestAnimationFrame(look);
  };
  look();
})"""


def first_map(studio: Served) -> bool:
    """From a request for 4 pictures to the first tokens."""
    times = []
    for seed in range(3):
        began, job = time.perf_counter(), studio.job("api/draw", {"num": 4, "seed": seed})
        times.append(next(time.perf_counter() - began for kind, _ in job if kind == "step"))
        job.close()  # a closed connection ends the job
        time.sleep(0.5)
    text = f"{', '.join(f'{t:.2f}' for t in times)} s from a request"
    return verdict("first token map", text, max(times) <= MAP_SECONDS)


def sixteen(studio: Served, run: str, rounds: int) -> bool:
    """16 pictures of the page and of `digit sample`'s sampler, in turn."""
    from digit.pipeline.pipeline import DigitPipeline
    from digit.runtime.progress import quiet

    quiet()
    pipe, page, own = DigitPipeline.from_pretrained(run), [], []
    for seed in range(rounds + 1):
        began = time.perf_counter()
        count = sum(kind == "picture" for kind, _ in studio.job("api/draw", {"num": PICTURES, "seed": seed}))
        page.append(time.perf_counter() - began)
        began = time.perf_counter()
        made = len(pipe.generate(PICTURES, seed=seed, batch_size=PICTURES))
        own.append(time.perf_counter() - began)
        assert count == made == PICTURES
    page, own = page[1:], own[1:]  # the first of each warms up
    ratio = statistics.median(page) / statistics.median(own)
    each = [
        f"{name} {statistics.median(t):.2f} s ({min(t):.2f} to {max(t):.2f})"
        for name, t in (("page", page), ("digit sample", own))
    ]
    return verdict(
        f"{PICTURES} pictures", f"{', '.join(each)}, ratio {ratio:.2f}, {rounds} rounds in turn", ratio <= RATIO
    )


def memory(studio: Served, drawings: int) -> bool:
    """Resident memory every 100 drawings, of another seed each."""
    found = []
    for seed in range(drawings):
        assert sum(kind == "picture" for kind, _ in studio.job("api/draw", {"num": 1, "seed": seed})) == 1
        if (seed + 1) % min(100, drawings) == 0:
            found.append((seed + 1, studio.resident))
            say(f"{seed + 1:>6} drawings: {studio.resident:.1f} MiB")
    steady = [mib for done, mib in found if done >= min(WARM_UP, drawings)]
    growth = steady[-1] - steady[0]
    return verdict("memory", f"{growth:+.1f} MiB from drawing {min(WARM_UP, drawings)} on", growth <= FLAT)


if __name__ == "__main__":
    sys.exit(main())
