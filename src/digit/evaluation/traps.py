"""Warnings about pitfalls that make a distance misleading; each is a sentence with a remedy where there is one."""

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
CHANCE = 4.0  # labels count as unbalanced when chi-squared exceeds its mean by more standard deviations


@dataclass(frozen=True)
class Side:
    """Samples or reference: the images, their resizing, and their features."""

    role: str
    """`samples` or `reference`."""
    images: ImageSet | None = None
    """None where only statistics are given."""
    fitted: int | None = None
    """Side in pixels to which images were resized and cropped; None where they were unchanged."""
    features: Features | None = None
    """Features of the images."""
    statistics: Statistics | None = None
    """Statistics from a file; they take precedence over those of the images."""

    @property
    def noun(self) -> str:
        """Name of its images in the warnings."""
        return "samples" if self.role == "samples" else "reference images"

    @property
    def pixels(self) -> int | None:
        """Side in pixels of the images that the network receives."""
        return self.fitted or (None if self.images is None else self.images.survey.side)


def find_traps(samples: Side, reference: Side, protocol: Protocol | None = None) -> list[str]:
    """All warnings about a comparison, as sentences; [] where there are none.

    protocol: the protocol of published metrics to compare with; None where the network is not that of any protocol.
    """
    warnings = [*_sizes(samples, reference), *_counts(samples, reference), *_repeats(samples, reference)]
    for side in (samples, reference):
        if side.images is not None:
            warnings += [*_files(side), *_grey(side), *_labels(side, reference)]
    return warnings + ([*_published(samples, reference, protocol)] if protocol else [])


def _published(samples: Side, reference: Side, protocol: Protocol) -> Iterator[str]:
    """Where the protocol's published metrics were computed differently."""
    end = "do not compare with its published metrics"
    if protocol.sizes and samples.pixels not in protocol.sizes:
        wanted = ", ".join(map(str, protocol.sizes))
        yield f"samples are {samples.pixels} px, those of protocol {protocol.name} {wanted} px: {end}"
    kind = "images" if reference.statistics is None else "statistics"
    if protocol.reference not in ("any", kind):
        which = "validation images" if protocol.reference == "images" else "statistics of the whole training set"
        yield f"the reference is {kind}, that of protocol {protocol.name} is {which}: {end}"
    assert samples.images is not None
    rounding = samples.images.rounding
    if rounding and protocol.rounding and rounding != protocol.rounding:
        yield f"samples were rounded to uint8 by {rounding}, those of protocol {protocol.name} by {protocol.rounding}"
    counts = [(samples, protocol.num_samples)]
    counts += [(reference, protocol.num_reference)] if reference.statistics is None else []
    for side, wanted in counts:
        assert side.features is not None
        if wanted not in (None, len(side.features)):
            yield f"{len(side.features)} {side.noun}, {wanted:,} in protocol {protocol.name}: {end}"


def _files(side: Side) -> Iterator[str]:
    """Lossy formats; not for a reference that is resized, whose compression errors mostly disappear."""
    assert side.images is not None
    kinds, total = side.images.survey.kinds, len(side.images)
    lossy = {kind: kinds[kind] for kind in LOSSY if kinds[kind]}
    if lossy and not (side.role == "reference" and side.fitted):
        named = " and ".join(f"{count} of {total} {side.noun} are {kind}" for kind, count in lossy.items())
        yield f"{named}: compression moves the distance; save PNG (the file name does not decide the format)"


def _sizes(samples: Side, reference: Side) -> Iterator[str]:
    for side in (samples, reference):
        if side.images is not None and side.images.survey.side is None:
            yield (
                f"{side.noun} {_mixture(side)}: the short side was resized to {side.fitted} px (PIL bicubic) and the "
                "centre cropped; other resizing or cropping gives another distance"
            )
    own, other = samples.pixels, reference.pixels
    if own and other and own != other:
        yield (
            f"samples are {own} px, the reference {other} px: the network resizes both to its own size, and a lack of "
            "detail counts as a difference; resize the reference (--image_size)"
        )


def _mixture(side: Side) -> str:
    assert side.images is not None
    sizes = side.images.survey.sizes
    (width, height), _ = sizes.most_common(1)[0]
    return f"come in {len(sizes)} sizes, most often {width}x{height}" if len(sizes) > 1 else f"are {width}x{height}"


def _counts(samples: Side, reference: Side) -> Iterator[str]:
    assert samples.features is not None
    sides = [side for side in (samples, reference) if not side.statistics]
    counts = {side.noun: len(side.features) for side in sides if side.features}
    for noun, count in counts.items():
        dim = samples.features.pooled.shape[1]
        if count <= dim:
            yield f"{count} {noun} for {dim} features: the covariance is singular and the distance far too high"
        elif count < FEW:
            yield f"{count} {noun}: below {FEW:,} images the distance is too high; compare equal numbers only"
    if len(set(counts.values())) > 1:
        yield (
            " against ".join(f"{count} {noun}" for noun, count in counts.items())
            + ": compare with metrics of the same two numbers only"
        )


def _repeats(samples: Side, reference: Side) -> Iterator[str]:
    keys = {side.noun: side.features.pixel_keys() for side in (samples, reference) if side.features}
    for noun, own in keys.items():
        if repeated := len(own) - len(set(own)):
            yield f"{repeated} of {len(own)} {noun} repeat another one pixel by pixel: were they sampled with one seed?"
    reference_keys = set(keys.get("reference images", ()))
    if copied := sum(key in reference_keys for key in keys["samples"]):
        yield f"{copied} of {len(keys['samples'])} samples are reference images pixel by pixel, not new samples"


def _grey(side: Side) -> Iterator[str]:
    assert side.images is not None and side.features is not None
    share = float(side.features.grey.float().mean())
    if share > MOSTLY_GREY:
        yield f"{share:.0%} of the {side.noun} are greyscale: the network was trained on colour photographs"
    deep = sum(count for kind, count in side.images.survey.modes.items() if kind.startswith("I"))
    if deep:
        yield f"{deep} of {len(side.images)} {side.noun} have 16 bits per pixel: 0..65535 was scaled to 0..255"


def _labels(side: Side, reference: Side) -> Iterator[str]:
    """Compare class shares with the reference's if its classes include the samples', else with equal shares."""
    assert side.images is not None
    names = side.images.class_names
    if names is None:
        return
    counts, shares = Counter(names), None
    reference_names = None if reference.images is None else reference.images.class_names
    if side is not reference and reference_names and set(counts) <= set(reference_names):
        shares = Counter(reference_names)
    expected = shares or dict.fromkeys(counts, 1)
    unit = len(names) / sum(expected.values())
    chi_squared = sum((counts[name] - unit * share) ** 2 / (unit * share) for name, share in expected.items())
    freedom = len(expected) - 1
    if freedom and chi_squared > freedom + CHANCE * math.sqrt(2 * freedom):
        least, most = min(expected, key=lambda name: counts[name]), max(expected, key=lambda name: counts[name])
        against = "the shares of the reference" if shares else "equal shares"
        yield (
            f"labels of the {side.noun} are unbalanced against {against}: {counts[least]} of class {least}, "
            f"{counts[most]} of class {most}; sample every class in turn"
        )
