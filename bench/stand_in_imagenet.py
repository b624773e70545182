"""Writes a stand-in for ImageNet-1k: its folders, names, label files and kinds of files, with other photographs.

    python bench/stand_in_imagenet.py OUT --photographs FOLDER --per_class 3 --val 2000
    python bench/stand_in_imagenet.py OUT --photographs cifar10/train.parquet --layout kaggle

Layouts: `folders` (train in folders of synsets, val and test flat, the labels of val in the devkit's files), `kaggle`
(ILSVRC/Data/CLS-LOC with LOC_val_solution.csv) and `hub` (Parquet with class names in words). Each image is a cut of a
photograph, enlarged to a short side of 256 to 500 px; a class has three photographs and one order of the colour
channels, so that classes can be learned. About 1 in 70 is grey; one is CMYK and one a PNG that is named JPEG, as in the
true set. The same seed gives the same bytes. Synsets are made up (n01000001, ...) unless --synsets names a file of true
ones (LOC_synset_mapping.txt, synset_words.txt, or one a line).
"""

import argparse
import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from digit.data.images import ImageSource, open_source

SHORT_SIDES, ASPECTS = (256, 500), (0.66, 1.5)  # pixels; width over height
PHOTOGRAPHS, WORKING_SIDE = 600, 400  # photographs that are kept in memory, and their largest short side
PER_CLASS = 3  # photographs that a class is cut from
CHANNELS = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2))  # orders of red, green and blue
GREY_EVERY = 70
TEST_IMAGES = 10
ROWS_PER_FILE = 2000
Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Picture:
    """One image to be made."""

    split: Split
    number: int  # 1-based in its split, of train in its class
    place: int  # of its class, 0-based in the sorted order


class StandIn:
    """The classes and images of a stand-in.

    Args:
        photographs: what the images are cut from; rendered shapes will do.
        synsets: (synset, words) of each class, sorted by synset.
        seed: of everything that is drawn.
    """

    def __init__(self, photographs: ImageSource, synsets: list[tuple[str, str]], seed: int):
        self.synsets, self.seed = synsets, seed
        source = photographs.limit(PHOTOGRAPHS)
        self.photographs = [reduced(source.read(index)[0]) for index in range(len(source))]
        order = list(range(len(synsets)))
        self._draw("ids").shuffle(order)
        self.ilsvrc_id = {place: number for number, place in enumerate(order, 1)}  # which is not the sorted order

    def _draw(self, *what: object) -> random.Random:
        return random.Random("-".join(map(str, (self.seed, *what))))

    def pictures(self, per_class: int, num_val: int) -> Iterator[Picture]:
        """All images of all splits; each class has about as many validation images as another."""
        for place in range(len(self.synsets)):
            for number in range(1, per_class + 1):
                yield Picture("train", number, place)
        places = [number % len(self.synsets) for number in range(num_val)]
        self._draw("val").shuffle(places)
        for number, place in enumerate(places, 1):
            yield Picture("val", number, place)
        for number in range(1, TEST_IMAGES + 1):
            yield Picture("test", number, self._draw("test", number).randrange(len(self.synsets)))

    def encoded(self, picture: Picture) -> bytes:
        """The image as JPEG: a cut of one of its class's photographs, flipped at times, enlarged."""
        draw = self._draw(picture.split, picture.place, picture.number)
        photograph = self.photographs[(picture.place * PER_CLASS + draw.randrange(PER_CLASS)) % len(self.photographs)]
        image = cut(photograph, draw)
        channels = image.split()
        image = Image.merge("RGB", [channels[k] for k in CHANNELS[picture.place % len(CHANNELS)]])
        if draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if picture == Picture("train", 1, 1):
            return saved(image, "PNG")
        if picture == Picture("train", 1, 2 % len(self.synsets)):
            image = image.convert("CMYK")
        elif draw.randrange(GREY_EVERY) == 0:
            image = image.convert("L")
        return saved(image, "JPEG", quality=draw.choice((80, 90, 95)))


def reduced(image: Image.Image) -> Image.Image:
    """The image with a short side of at most WORKING_SIDE px."""
    scale = WORKING_SIDE / min(image.size)
    return image.copy() if scale >= 1 else image.resize([max(1, round(side * scale)) for side in image.size])


def cut(image: Image.Image, draw: random.Random) -> Image.Image:
    """A random part of the image, of 70% or more of its short side, with a random aspect and size."""
    aspect, short = draw.uniform(*ASPECTS), draw.randint(*SHORT_SIDES)
    part = draw.uniform(0.7, 1.0) * min(image.size) / max(1, aspect, 1 / aspect)
    width, height = max(1, part * max(1, aspect)), max(1, part * max(1, 1 / aspect))
    left, top = draw.uniform(0, max(0, image.width - width)), draw.uniform(0, max(0, image.height - height))
    size = (round(short * max(1, aspect)), round(short * max(1, 1 / aspect)))
    return image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def saved(image: Image.Image, kind: str, **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


# ---------------------------------------------------------------- layouts


def val_name(number: int, split: str = "val") -> str:
    return f"ILSVRC2012_{split}_{number:08}"


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def write_images(root: Path, made: StandIn, pictures: list[Picture]) -> None:
    """root/train/SYNSET/SYNSET_1.JPEG, and root/val and root/test flat."""
    for picture in pictures:
        synset = made.synsets[picture.place][0]
        train = f"train/{synset}/{synset}_{picture.number}.JPEG"
        flat = f"{picture.split}/{val_name(picture.number, picture.split)}.JPEG"
        write(root / (train if picture.split == "train" else flat), made.encoded(picture))


def write_folders(root: Path, made: StandIn, pictures: list[Picture]) -> None:
    """Train in folders, val flat, and the devkit's ground truth with ILSVRC's ids and their synsets."""
    write_images(root, made, pictures)
    places = [picture.place for picture in pictures if picture.split == "val"]
    data = root / "ILSVRC2012_devkit_t12/data"
    write(data / "ILSVRC2012_validation_ground_truth.txt", lines(made.ilsvrc_id[place] for place in places))
    ids = sorted((number, place) for place, number in made.ilsvrc_id.items())
    rows = (f"{made.synsets[place][0]} {number} {first_word(made.synsets[place][1])}" for number, place in ids)
    write(data / "map_clsloc.txt", lines(rows))


def first_word(words: str) -> str:
    return words.partition(",")[0].strip().replace(" ", "_")


def lines(rows: Iterator[object]) -> str:
    return "".join(f"{row}\n" for row in rows)


def write_kaggle(root: Path, made: StandIn, pictures: list[Picture]) -> None:
    """ILSVRC/Data/CLS-LOC, a list that counts the images, LOC_val_solution.csv and LOC_synset_mapping.txt."""
    write_images(root / "ILSVRC/Data/CLS-LOC", made, pictures)
    val = [picture for picture in pictures if picture.split == "val"]
    counted = (f"{val_name(picture.number)} {picture.number}" for picture in val)
    write(root / "ILSVRC/ImageSets/CLS-LOC/val.txt", lines(counted))
    shuffled = random.Random(made.seed).sample(val, len(val))  # as the true file, not in the order of the names
    solution = (f"{val_name(picture.number)},{made.synsets[picture.place][0]} 10 20 200 220 " for picture in shuffled)
    write(root / "LOC_val_solution.csv", "ImageId,PredictionString\n" + lines(solution))
    write(root / "LOC_synset_mapping.txt", lines(f"{synset} {words}" for synset, words in made.synsets))


def write_hub(root: Path, made: StandIn, pictures: list[Picture]) -> None:
    """data/train-00000-of-00002.parquet and so on; label -1 in the test split, as on the Hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    feature = {"names": [words for _, words in made.synsets], "_type": "ClassLabel"}
    about = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": feature}}})
    (root / "data").mkdir(parents=True, exist_ok=True)
    for split, theirs in (("train", "train"), ("val", "validation"), ("test", "test")):
        rows = [picture for picture in pictures if picture.split == split]
        random.Random(made.seed).shuffle(rows)
        parts = [rows[start : start + ROWS_PER_FILE] for start in range(0, len(rows), ROWS_PER_FILE)]
        for number, part in enumerate(parts):
            images = [{"bytes": made.encoded(picture), "path": None} for picture in part]
            labels = [-1 if split == "test" else picture.place for picture in part]
            table = pa.table({"image": images, "label": labels}).replace_schema_metadata({"huggingface": about})
            name = f"{theirs}-{number:05}-of-{len(parts):05}.parquet"
            pq.write_table(table, root / "data" / name, row_group_size=100)


LAYOUTS: dict[str, Callable[[Path, StandIn, list[Picture]], None]] = {
    "folders": write_folders,
    "kaggle": write_kaggle,
    "hub": write_hub,
}


def read_synsets(path: str | None, num: int) -> list[tuple[str, str]]:
    """(synset, words) of `num` classes, sorted; made up without a file."""
    if path is None:
        return [(f"n{1_000_001 + 13 * place:08}", f"stand-in {place}, no {place}") for place in range(num)]
    rows = [line.split(None, 1) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    found = sorted((row[0], row[1].strip() if len(row) > 1 else row[0]) for row in rows)
    if len(found) < num:
        sys.exit(f"{path} names {len(found)} synsets, wanted {num}")
    return found[:num]


def make(out: Path, made: StandIn, layout: str, per_class: int, num_val: int) -> int:
    """Writes the stand-in and returns its number of images."""
    pictures = list(made.pictures(per_class, num_val))
    LAYOUTS[layout](out, made, pictures)
    return len(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--photographs", default="shapes:num=600,size=256", help="what the images are cut from")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="folders")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--per_class", type=int, default=3, help="training images of each class")
    parser.add_argument("--val", type=int, default=2000, help="validation images")
    parser.add_argument("--synsets", default=None, help="file of true synsets (default: made-up ones)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if Path(args.out).exists():
        sys.exit(f"{args.out} exists: give a new folder")
    made = StandIn(open_source(args.photographs), read_synsets(args.synsets, args.classes), args.seed)
    num = make(Path(args.out), made, args.layout, args.per_class, args.val)
    sys.stdout.write(f"{num} images of {args.classes} classes in {args.out}\n")


if __name__ == "__main__":
    main()
