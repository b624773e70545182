"""What makes a distance mean something else than it seems to: each finding is a sentence, with what to do about it."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from digit.evaluation.features import Features
from digit.evaluation.image_set import ImageSet
from digit.evaluation.npz import Statistics
from digit.evaluation.protocols import Protocol

LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")  # Pillow's names; WEBP and AVIF nearly always are
FEW = 10_000  # images below which the upward bias of a Fréchet distance is far from small (Chong & Forsyth 2020)
MOSTLY_GREY = 0.5
CHANCE = 4.0  # standard deviations that chi-squared may exceed its mean by before the labels count as unbalanced


@dataclass(frozen=True)
class Side:
    """Samples or reference: the images, what was done to them, and what the network said of them."""

    role: str
    """`samples` or `reference`."""
    images: ImageSet | None = None
    """None where statistics alone are at hand."""
    fitted: int | None = None
    """Side in pixels that images were resized and cropped to; None where they were taken as they are."""
    features: Features | None = None
    """Features of the images."""
    statistics: Statistics | None = None
    """Kept statistics; they go before those of the images."""

    @property
    def noun(self) -> str:
        """As sentences call its images."""
        return "samples" if self.role == "samples" else "reference images"

    @property
    def pixels(self) -> int | None:
        """Side of the images as the network gets them."""
        return self.fitted or (self.images and self.images.survey.side)


def find_traps(samples: Side, reference: Side, protocol: Protocol | None = None) -> list[str]:
    """Every reason that is found to distrust the figures, as sentences; [] where there is none.

    protocol: whose published figures these may be compared with; None where the network is that of none.
    """
    found = [*_sizes(samples, reference), *_counts(samples, reference), *_repeats(samples, reference)]
    for side in (samples, reference):
        if side.images is not None:
            found += [*_files(side), *_grey(side), *_labels(side, reference)]
    return found + ([*_published(samples, reference, protocol)] if protocol else [])


def _published(samples: Side, reference: Side, protocol: Protocol) -> Iterator[str]:
    """Where the protocol's published figures are of something else."""
    end = "do not compare with its published figures"
    if protocol.sizes and samples.pixels not in protocol.sizes:
        wanted = ", ".join(map(str, protocol.sizes))
        yield f"samples are {samples.pixels} px, protocol {protocol.name} is of {wanted} px: {end}"
    kind = "images" if reference.statistics is None else "statistics"
    if protocol.reference not in ("any", kind):
        which = "validation images" if protocol.reference == "images" else "statistics of the whole training set"
        yield f"the reference is {kind}, that of protocol {protocol.name} is {which}: {end}"
    rounding = samples.images.rounding
    if rounding and protocol.rounding and rounding != protocol.rounding:
        yield f"samples were made uint8 by {rounding}, those of protocol {protocol.name} by {protocol.rounding}"
    counts = [(samples, protocol.num_samples)]
    counts += [(reference, protocol.num_reference)] if reference.statistics is None else []
    for side, wanted in counts:
        if wanted not in (None, len(side.features)):
            yield f"{len(side.features)} {side.noun}, {wanted:,} in protocol {protocol.name}: {end}"


def _files(side: Side) -> Iterator[str]:
    """Formats that lose detail; those of a reference that is shrunk lose nothing that is left."""
    kinds, total = side.images.survey.kinds, len(side.images)
    lossy = {kind: kinds[kind] for kind in LOSSY if kinds[kind]}
    if lossy and not (side.role == "reference" and side.fitted):
        named = " and ".join(f"{count} of {total} {side.noun} are {kind}" for kind, count in lossy.items())
        yield f"{named}: compression moves the distance; save PNG (a file's name does not tell its format)"


def _sizes(samples: Side, reference: Side) -> Iterator[str]:
    for side in (samples, reference):
        if side.images is not None and side.images.survey.side is None:
            yield (
                f"{side.noun} {_mixture(side)}: the short side was resized to {side.fitted} px (PIL bicubic) and the "
                "centre cut out; other resizing or cropping gives another distance"
            )
    own, other = samples.pixels, reference.pixels
    if own and other and own != other:
        yield (
            f"samples are {own} px, the reference {other} px: the network enlarges both to its own size, and what one "
            "lacks in detail is counted as a difference; resize the reference (--image_size)"
        )


def _mixture(side: Side) -> str:
    sizes = side.images.survey.sizes
    (width, height), _ = sizes.most_common(1)[0]
    return f"come in {len(sizes)} sizes, most often {width}x{height}" if len(sizes) > 1 else f"are {width}x{height}"


def _counts(samples: Side, reference: Side) -> Iterator[str]:
    counted = [side for side in (samples, reference) if side.features and not side.statistics]
    counts = {side.noun: len(side.features) for side in counted}
    for noun, count in counts.items():
        dim = samples.features.pooled.shape[1]
        if count <= dim:
            yield f"{count} {noun} for {dim} features: the covariance is singular and the distance far too high"
        elif count < FEW:
            yield f"{count} {noun}: below {FEW:,} images the distance is too high; compare equal numbers only"
    if len(set(counts.values())) > 1:
        yield (
            " against ".join(f"{count} {noun}" for noun, count in counts.items())
            + ": compare with figures of the same two numbers only"
        )


def _repeats(samples: Side, reference: Side) -> Iterator[str]:
    keys = {side.noun: side.features.pixel_keys() for side in (samples, reference) if side.features}
    for noun, known in keys.items():
        if repeated := len(known) - len(set(known)):
            yield f"{repeated} of {len(known)} {noun} repeat another one pixel by pixel: were they drawn with one seed?"
    held = set(keys.get("reference images", ()))
    if copied := sum(key in held for key in keys["samples"]):
        yield f"{copied} of {len(keys['samples'])} samples are reference images pixel by pixel: they are no samples"


def _grey(side: Side) -> Iterator[str]:
    share = float(side.features.grey.float().mean())
    if share > MOSTLY_GREY:
        yield f"{share:.0%} of the {side.noun} are greyscale: the network was trained on colour photographs"
    deep = sum(count for kind, count in side.images.survey.modes.items() if kind.startswith("I"))
    if deep:
        yield f"{deep} of {len(side.images)} {side.noun} have 16 bits a pixel: 0..65535 was scaled to 0..255"


def _labels(side: Side, reference: Side) -> Iterator[str]:
    """Samples against the shares of the reference where it has the same classes, else against equal shares."""
    names = side.images.class_names
    if names is None:
        return
    counts, shares = Counter(names), None
    known = reference.images and reference.images.class_names
    if side is not reference and known and set(counts) <= set(known):
        shares = Counter(known)
    expected = shares or dict.fromkeys(counts, 1)
    unit = len(names) / sum(expected.values())
    squared = sum((counts[name] - unit * share) ** 2 / (unit * share) for name, share in expected.items())
    freedom = len(expected) - 1
    if freedom and squared > freedom + CHANCE * math.sqrt(2 * freedom):
        least, most = min(expected, key=lambda name: counts[name]), max(expected, key=lambda name: counts[name])
        against = "the shares of the reference" if shares else "equal shares"
        yield (
            f"labels of the {side.noun} are unbalanced against {against}: {counts[least]} of class {least}, "
            f"{counts[most]} of class {most}; draw every class in turn"
        )
