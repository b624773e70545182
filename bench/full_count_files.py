"""Time and peak memory of the parts that touch every file of ImageNet-1k, at its full count.

    python bench/full_count_files.py tree --folder big         # 1,281,167 + 50,000 empty files in ImageNet's folders
    python bench/full_count_files.py listing --folder big      # list, label and open both splits
    python bench/full_count_files.py fingerprint --folder big  # by the times of last change
    python bench/full_count_files.py crops --photographs imagenet/val

Run each in a process of its own: the peak is the resident set's of this process. The files of `tree` are empty: they
cost inodes (1.33 million) and no space. docs/performance.md, "At full count", has the results.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

TRAIN, VAL, CLASSES = 1_281_167, 50_000, 1000


def tell(what: str, began: float, note: str = "") -> float:
    """Prints one row and returns the time at its end."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    now, cpu = time.perf_counter(), time.process_time()
    sys.stdout.write(f"{what:<40} {now - began:7.1f} s   CPU so far {cpu:6.1f} s   peak {peak:5.2f} GiB   {note}\n")
    return time.perf_counter()


def tree(args: argparse.Namespace) -> None:
    """Makes the files: train in folders of synsets, val flat with the devkit's labels."""
    began, root = time.perf_counter(), Path(args.folder)
    wnids = [f"n{1_000_001 + 13 * place:08}" for place in range(CLASSES)]
    for place, wnid in enumerate(wnids):
        (root / "train" / wnid).mkdir(parents=True)
        for number in range(TRAIN // CLASSES + (place < TRAIN % CLASSES)):
            (root / "train" / wnid / f"{wnid}_{number}.JPEG").touch()
    (root / "val").mkdir()
    for number in range(1, VAL + 1):
        (root / "val" / f"ILSVRC2012_val_{number:08}.JPEG").touch()
    data = root / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    labels = np.random.default_rng(0).permutation(VAL) % CLASSES + 1
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{label}\n" for label in labels))
    rows = (f"{wnid} {number} class_{number}\n" for number, wnid in enumerate(reversed(wnids), 1))
    (data / "map_clsloc.txt").write_text("".join(rows))
    tell("make the files", began)


def listing(args: argparse.Namespace) -> None:
    """Lists the tree, then opens both splits as a reproduction does."""
    from digit.data.listing import list_folder
    from digit.evaluation.splits import probe_splits

    began = time.perf_counter()
    found = list_folder(Path(args.folder))
    began = tell(f"list {len(found.files)} files", began)
    del found
    train, test, _ = probe_splits(args.folder)
    tell("open both splits", began, f"{len(train)} and {len(test)} images of {len(train.classes)} classes")


def fingerprint(args: argparse.Namespace) -> None:
    """The fingerprint of the training images, by the times of last change."""
    from digit.data.images import open_source

    began = time.perf_counter()
    source = open_source(args.folder, split="train")
    began = tell(f"open {len(source)} training images", began)
    tell("fingerprint", began, source.fingerprint[:12])


def crops(args: argparse.Namespace) -> None:
    """Decodes images and cuts the paper's random crops, in one thread."""
    from digit.data.images import open_source
    from digit.data.preprocess import PreprocessConfig, crop_image

    source, cfg = open_source(args.photographs).limit(args.num), PreprocessConfig(random_crop=True, flip=True)
    began, cpu = time.perf_counter(), time.process_time()
    for index in range(len(source)):
        crop_image(source.read(index)[0], cfg, seed=0, index=index, crop=0)
    rate = len(source) / (time.process_time() - cpu)  # of one core, whatever else runs
    note = f"{rate:.0f} images/s a core, {TRAIN / rate / 3600:.2f} core hours for train"
    tell(f"decode and crop {len(source)} images", began, note)


PARTS = {part.__name__: part for part in (tree, listing, fingerprint, crops)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--folder", default="big", help="the tree of empty files")
    parser.add_argument("--photographs", default="shapes:num=100,size=256", help="images to decode")
    parser.add_argument("--num", type=int, default=500, help="images that are decoded")
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
