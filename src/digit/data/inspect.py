"""Reports on an image source: counts, classes, sizes, pixel types, broken files, and a contact sheet."""

import itertools
import math
import multiprocessing
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

from digit.data.assumptions import NEARLY_BLACK, describe_image, is_nearly_black
from digit.data.listing import CONTACT_SHEET, is_contact_sheet
from digit.data.preprocess import Fit, PreprocessConfig, kept_share, squared
from digit.data.source import ImageSource, readable
from digit.data.synsets import short_name
from digit.errors import BadImageError, DigitError
from digit.runtime.files import atomic_path
from digit.runtime.progress import track

SHORT_SIDES = (32, 64, 128, 256, 512, 1024)  # bin edges of the size histogram, pixels
NUM_THUMBNAILS, THUMBNAIL, CAPTION, GAP = 64, 96, 14, 4  # a count, then sizes in pixels
PALE, FRAME = 0.75, (230, 90, 0)  # of what a crop cuts, towards white; around what it keeps
MUCH_LOST = 0.1  # of the area: less is not spoken of
NUM_SHOWN = 20  # classes and bad files that the text lists
CHUNK = 128  # images decoded at a time
MIN_IMAGES_FOR_PROCESSES = 2000  # fewer are read by threads as fast
FORKS = sys.platform.startswith("linux")


@dataclass(kw_only=True)
class InspectReport:
    """Result of `inspect_source`, as text (`to_text`), JSON (`to_dict`) and a picture (`save_contact_sheet`)."""

    name: str
    fingerprint: str
    num_images: int
    classes: list[str]
    class_counts: list[int]  # images per class, broken ones included
    num_unlabelled: int
    widths: np.ndarray  # int64 (good images,)
    heights: np.ndarray  # int64 (good images,)
    kinds: Counter[str] = field(default_factory=Counter)  # 'JPEG RGB' -> images; as stored, before conversion
    notes: tuple[str, ...] = ()  # what was assumed and what is not used
    pixel_range: str = ""  # white in images of more than 8 bits, and how it is known; "" where none is assumed
    assumed: Counter[str] = field(default_factory=Counter)  # what decoding assumes, drops or ignores -> images
    bad: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)
    thumbnails: list[tuple[str, Image.Image | None]] = field(default_factory=list)  # (caption, None if broken)

    @property
    def num_good(self) -> int:
        """Number of readable images."""
        return self.num_images - len(self.bad)

    def size_histogram(self) -> dict[str, int]:
        """Counts images by the length of their short side: {'32..63 px': 12, ...}."""
        short = np.minimum(self.widths, self.heights)
        edges = (0, *SHORT_SIDES, None)
        names = [f"under {high} px" if not low else f"{low}..{high - 1} px" if high else f"{low} px and more"
                 for low, high in pairwise(edges)]  # fmt: skip
        found = Counter(np.searchsorted(SHORT_SIDES, short, side="right").tolist())
        return {name: found[bin_] for bin_, name in enumerate(names) if found[bin_]}

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the thumbnails as JSON."""
        return {
            "name": self.name, "fingerprint": self.fingerprint, "num_images": self.num_images,
            "num_good": self.num_good, "num_classes": len(self.classes), "num_unlabelled": self.num_unlabelled,
            "classes": dict(zip(self.classes, self.class_counts, strict=True)), "width": _spread(self.widths),
            "height": _spread(self.heights), "short_side": self.size_histogram(), "kinds": dict(self.kinds),
            "notes": list(self.notes),
            "pixel_range": self.pixel_range, "assumed": dict(self.assumed),
            "bad": [{"key": key, "reason": reason} for key, reason in self.bad],
        }  # fmt: skip

    def to_text(self) -> str:
        """Formats the report for a terminal."""
        left_out = " (training leaves them out)" if self.bad and self.num_good else ""
        lines = [self.name, f"  images       {self.num_images}, of which {len(self.bad)} broken{left_out}"]
        lines += [*self._class_lines()]
        lines += [line for note in self.notes for line in _wrapped("note", note)]
        if self.num_good:
            for side, values in (("width", self.widths), ("height", self.heights)):
                spread = _spread(values)
                lines.append(f"  {side:<12} {spread['min']} to {spread['max']} px, median {spread['median']:g}")
            lines.append(f"  short side   {_listing(self.size_histogram().items())}")
            lines.append(f"  stored as    {_listing(self.kinds.most_common())}")
            lines += [f"  white        {self.pixel_range}"] if self.pixel_range else []
            lines += [f"  assumed      {count} with {what}" for what, count in self.assumed.most_common()]
        lines += [f"  broken       {reason}" for _, reason in self.bad[:NUM_SHOWN]]
        if len(self.bad) > NUM_SHOWN:
            lines.append(f"               and {len(self.bad) - NUM_SHOWN} more")
        return "\n".join([*lines, f"  fingerprint  {self.fingerprint[:16]}"])

    def _class_lines(self) -> Iterator[str]:
        if not self.classes:
            yield "  classes      none (unlabelled)"
            return
        low, high = min(self.class_counts), max(self.class_counts)
        yield f"  classes      {len(self.classes)}, of {low} to {high} images; {self.num_unlabelled} images unlabelled"
        for name, count in list(zip(self.classes, self.class_counts, strict=True))[:NUM_SHOWN]:
            yield f"      {count:>7}  {name}"
        if len(self.classes) > NUM_SHOWN:
            yield f"               and {len(self.classes) - NUM_SHOWN} more"

    def kept_shares(self, fit: Fit = "crop") -> np.ndarray:
        """float64 (good images,): the share of each image's area that training sees."""
        return np.array(
            [kept_share(w, h, fit) for w, h in zip(self.widths.tolist(), self.heights.tolist(), strict=True)]
        )

    def advise_fit(self, fit: Fit = "crop") -> str:
        """What a square costs these images, in one sentence that names the option; "" where it is little.

        Of `crop` it says how much is cut; of `squeeze` and `pad` how far the images are from square.
        """
        if not self.num_good or (lost := 1 - float(self.kept_shares().mean())) < MUCH_LOST:
            return ""
        portrait, landscape = int((self.heights > self.widths).sum()), int((self.widths > self.heights).sum())
        shapes = f"{portrait} of {self.num_good} images are portrait, {landscape} landscape"
        if fit == "crop":
            least = float(self.kept_shares().min())
            return (
                f"{shapes}: crop cuts {lost:.0%} of their area away (at most {1 - least:.0%}); --preprocess.fit pad "
                "keeps all of it between bars, squeeze keeps all of it out of shape"
            )
        what = f"{lost:.0%} of each square are bars" if fit == "pad" else "each is pulled out of shape"
        return f"{shapes}: with preprocess.fit {fit} {what}; --preprocess.fit crop cuts {lost:.0%} of their area away"

    def save_contact_sheet(self, path: str | Path, fit: Fit = "crop") -> None:
        """Writes a PNG of up to 64 images spread over the source, with class names; broken images are red.

        A frame shows what training sees with `fit`; what a centre crop cuts is pale.
        """
        columns = max(1, math.ceil(math.sqrt(len(self.thumbnails))))
        rows = max(1, math.ceil(len(self.thumbnails) / columns))
        width, height = THUMBNAIL + GAP, THUMBNAIL + CAPTION + GAP
        sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
        canvas = ImageDraw.Draw(sheet)
        for number, (caption, picture) in enumerate(self.thumbnails):
            left, top = GAP + number % columns * width, GAP + number // columns * height
            tile = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "darkred") if picture is None else as_fitted(picture, fit)
            sheet.paste(tile, (left, top))
            if picture is None:
                canvas.text((left + THUMBNAIL // 2, top + THUMBNAIL // 2), "broken", fill="white", anchor="mm")
            canvas.text((left, top + THUMBNAIL), fit_caption(canvas, caption), fill="black")
        with atomic_path(path) as temporary:
            about = PngInfo()
            about.add_text("Software", "DiGIT inspect")  # as `listing.is_contact_sheet` finds it
            about.add_text("Source", self.name)
            sheet.save(temporary, format="PNG", pnginfo=about)


def as_fitted(picture: Image.Image, fit: Fit) -> Image.Image:
    """A square thumbnail of a picture in a frame around what training sees of it; what a centre crop cuts is pale."""
    if fit != "crop":
        square = squared(picture.convert("RGB"), PreprocessConfig(image_size=THUMBNAIL, fit=fit))
        ImageDraw.Draw(square).rectangle((0, 0, THUMBNAIL - 1, THUMBNAIL - 1), outline=FRAME)
        return square
    whole = ImageOps.contain(picture.convert("RGB"), (THUMBNAIL, THUMBNAIL))
    pale = Image.blend(whole, Image.new("RGB", whole.size, "white"), PALE)
    side = min(whole.size)
    box = ((whole.width - side) // 2, (whole.height - side) // 2)
    pale.paste(whole.crop((*box, box[0] + side, box[1] + side)), box)
    ImageDraw.Draw(pale).rectangle((*box, box[0] + side - 1, box[1] + side - 1), outline=FRAME)
    return ImageOps.pad(pale, (THUMBNAIL, THUMBNAIL), color="whitesmoke")


def glance(source: ImageSource) -> InspectReport:
    """As `inspect_source`, of the images that the contact sheet shows alone."""
    labels = source.labels()
    labels = np.full(len(source), -1, dtype=np.int64) if labels is None else labels
    return inspect_source(source.subset(_choose(labels, NUM_THUMBNAILS)))


def choose_sheet(path: str, source: str, *, named: bool) -> Path:
    """Where to write the contact sheet of `source` so that it replaces nothing else and is no image of the data.

    Args:
        path: the file asked for, or the default.
        named: whether a person named it; else a number is added to the name if another file has it.

    Raises DigitError for a name that is taken or that would make the sheet one of the images.
    """
    sheet, root = Path(path).expanduser(), Path(source).expanduser()
    if named:
        if sheet.is_file() and not is_contact_sheet(sheet):
            raise DigitError(f"--sheet {path} exists and is no contact sheet: choose another name")
        inside = root.is_dir() and root.resolve() in sheet.resolve().parents
        if inside and not CONTACT_SHEET.fullmatch(sheet.name):
            raise DigitError(f"--sheet {path} would be one of the images of {source}: choose a file outside")
        return sheet
    names = itertools.chain([sheet], (sheet.with_stem(f"{sheet.stem}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists() or _sheet_of(name) == readable(root))


def _sheet_of(path: Path) -> str | None:
    """The name of the source that a contact sheet shows; None for other files."""
    if not is_contact_sheet(path):
        return None
    with Image.open(path) as sheet:
        return sheet.info.get("Source")


def inspect_source(source: ImageSource, *, num_workers: int = 2) -> InspectReport:
    """Reads every image once and reports on them; broken images are listed, not raised."""
    labels = source.labels()
    labels = np.full(len(source), -1, dtype=np.int64) if labels is None else labels
    counts = np.bincount(labels[labels >= 0], minlength=len(source.classes)).tolist()
    report = InspectReport(
        name=source.name, fingerprint=source.fingerprint, num_images=len(source), classes=source.classes,
        class_counts=counts, num_unlabelled=int((labels < 0).sum()), widths=np.empty(0), heights=np.empty(0),
        notes=source.notes,
    )  # fmt: skip
    if source.pixel_range and source.pixel_range.white:
        report.pixel_range = str(source.pixel_range)
    shown = frozenset(_choose(labels, NUM_THUMBNAILS))
    sizes = []
    for index, seen in track(_look_at_all(source, shown, num_workers), "read images", len(source)):
        if seen.size is None:
            report.bad.append((source.key(index), seen.reason))
        else:
            sizes.append(seen.size)
            report.kinds[seen.kind] += 1
            report.assumed.update(seen.assumed)
        if index in shown:
            caption = short_name(source.classes[labels[index]]) if labels[index] >= 0 else Path(source.key(index)).name
            report.thumbnails.append((caption, seen.thumbnail))
    report.widths, report.heights = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    return report


@dataclass(frozen=True)
class Seen:
    """What a look at one image found."""

    kind: str = ""  # format and mode as stored
    assumed: tuple[str, ...] = ()  # what decoding assumes
    size: tuple[int, int] | None = None  # (width, height); None if the image cannot be read
    reason: str = ""  # why it cannot
    thumbnail: Image.Image | None = None


def _look_at(source: ImageSource, index: int, shown: bool) -> Seen:
    try:
        image, _ = source.read(index)
        kind, assumed = _describe(source, index)
    except BadImageError as error:
        return Seen(reason=str(error))
    dark = (NEARLY_BLACK,) if is_nearly_black(image) else ()
    return Seen(kind, (*assumed, *dark), image.size, "", _thumbnail(image) if shown else None)


def _look_at_all(source: ImageSource, shown: Collection[int], num_workers: int) -> Iterator[tuple[int, Seen]]:
    """Yields (index, what was found) in order: with threads, or with processes where there are many images."""
    if len(source) < MIN_IMAGES_FOR_PROCESSES or not FORKS or num_workers < 2:
        with ThreadPoolExecutor(max(1, num_workers)) as threads:
            for start in range(0, len(source), CHUNK):
                part = range(start, min(start + CHUNK, len(source)))
                yield from zip(part, threads.map(lambda i: _look_at(source, i, i in shown), part), strict=True)
        return
    processes = multiprocessing.get_context("fork").Pool(num_workers, _start_process, (source, shown))
    with processes:
        yield from enumerate(processes.imap(_look, range(len(source)), chunksize=CHUNK))


_work: dict[str, Any] = {}  # of a process of the pool


def _start_process(source: ImageSource, shown: Collection[int]) -> None:
    """The parent handles Ctrl-C, and ends its processes by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _work.update(source=source, shown=shown)


def _look(index: int) -> Seen:
    return _look_at(_work["source"], index, index in _work["shown"])


def _describe(source: ImageSource, index: int) -> tuple[str, list[str]]:
    """('JPEG RGB' as stored, what decoding assumes); 'rendered RGB' for sources without files."""
    data = source.raw(index)
    return ("rendered RGB", []) if data is None else describe_image(data)


def _choose(labels: np.ndarray, num: int) -> list[int]:
    """Chooses up to `num` indices, cycling through the classes, evenly spread within each."""
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if len(groups) > num:
        groups = [groups[place] for place in np.arange(num) * len(groups) // num]
    each = math.ceil(num / len(groups))
    picks = [group[np.arange(min(each, len(group))) * len(group) // min(each, len(group))] for group in groups]
    rounds = [pick[turn] for turn in range(each) for pick in picks if turn < len(pick)]
    return [int(index) for index in rounds[:num]]


def _thumbnail(image: Image.Image) -> Image.Image:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def fit_caption(canvas: ImageDraw.ImageDraw, text: str) -> str:
    """A caption no wider than a thumbnail; one that is cut ends in two dots."""
    text = text.encode("latin-1", "replace").decode("latin-1")  # the characters of every built-in font
    if canvas.textlength(text) <= THUMBNAIL:
        return text
    while text and canvas.textlength(f"{text}..") > THUMBNAIL:
        text = text[:-1]
    return f"{text}.."


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def _wrapped(heading: str, text: str) -> list[str]:
    """Lines of a sentence beside its heading, at most 100 characters long."""
    lines = textwrap.wrap(text, 85, break_on_hyphens=False, break_long_words=False) or [""]
    return [f"  {heading:<12} {lines[0]}", *(f"{'':15}{line}" for line in lines[1:])]


def _listing(pairs: Any) -> str:
    return ", ".join(f"{name}: {count}" for name, count in pairs)
