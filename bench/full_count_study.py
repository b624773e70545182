"""Host memory and time of what a reproduction keeps of its images, at full count, without networks.

    python bench/full_count_study.py --images 50000 --side 256 --folder /scratch

Crops of generated images go to one memory-mapped file, a judge without a network reads them part by part, and two
sets of features (Inception's sizes: 2048 + 2023 + 1008) give a distance. `own` is the largest resident memory that
belongs to this process alone; the map's pages (`mapped`) are the system's cache, shared by a machine's processes.
"""

import argparse
import tempfile
import threading
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from digit.data.mapped_crops import mapped_crops
from digit.data.preprocess import PreprocessConfig
from digit.data.source import ImageSource
from digit.evaluation.cache import remember_parts
from digit.metrics.judge import Judged, fd

SIZES = {"pooled": 2048, "spatial": 2023, "logits": 1008}
PART = 250


class Generated(ImageSource):
    """Images of one colour each: decoding is not what is measured."""

    name = "generated"

    def __init__(self, num: int, side: int):
        self.num, self.side = num, side

    def __len__(self) -> int:
        return self.num

    def key(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (self.side, self.side), (index % 256, index // 256 % 256, 0)), index % 1000

    @cached_property
    def fingerprint(self) -> str:
        return f"{self.num} {self.side}"


class Peak(threading.Thread):
    """The largest RssAnon and RssFile of this process, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = self.mapped = 0

    def run(self) -> None:
        while True:
            found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.own = max(self.own, int(found["RssAnon"].split()[0]) * 1024)
            self.mapped = max(self.mapped, int(found["RssFile"].split()[0]) * 1024)
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--folder", default=None, help="where the files are written (default: the temporary folder)")
    args = parser.parse_args()
    peak = Peak()
    peak.start()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(Path(folder), args.images, args.side, peak)


def measure(folder: Path, num: int, side: int, peak: Peak) -> None:
    began = time.perf_counter()

    def tell(what: str) -> None:
        nonlocal began
        seconds, began = time.perf_counter() - began, time.perf_counter()
        own, mapped = peak.own / 2**30, peak.mapped / 2**30
        print(f"{what:<32} {seconds:8.1f} s   own {own:5.2f} GiB   mapped {mapped:5.2f} GiB", flush=True)

    images, _ = mapped_crops(folder / "test_images", Generated(num, side), PreprocessConfig(image_size=side))
    tell(f"cut {num} crops of {side} px")
    starts = range(0, num, PART)
    rows = [min(PART, num - start) for start in starts]

    def judge(part: int) -> dict[str, torch.Tensor]:
        batch = images[starts[part] : starts[part] + rows[part]]
        seed = np.random.default_rng(int(batch[0, 0, 0, 0]) + part)
        made = {name: seed.standard_normal((len(batch), size), dtype=np.float32) for name, size in SIZES.items()}
        return {name: torch.from_numpy(values) + batch.sum() / batch.numel() for name, values in made.items()}

    sets = []
    for name in ("reference", "samples"):
        parts = remember_parts([folder / name / f"{start:07d}.safetensors" for start in starts], judge, rows)
        sets.append(Judged.cat([Judged(**part) for part in parts]))
        tell(f"judge {name} without a network")
    fd(sets[0].pooled, sets[1].pooled)
    tell("distance")


if __name__ == "__main__":
    main()
