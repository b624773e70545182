"""Warnings about pitfalls that make a distance misleading; each is a sentence with a remedy where there is one."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from digit.evaluation.features import Features
from digit.evaluation.image_set import ImageSet, in_runs
from digit.evaluation.looks import Look, Mean
from digit.evaluation.npz import Statistics
from digit.evaluation.protocols import Protocol
from digit.evaluation.traits import Traits
from digit.metrics.frechet import count_warnings
from digit.metrics.neighbours import Neighbours

LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")  # Pillow's names; WEBP and AVIF nearly always are
MOSTLY_GREY = 0.5
ALTERED = {  # pixel types, by the first letters of Pillow's names, whose colours are changed on reading
    "16 bits per pixel: 0..65535 was scaled to 0..255": ("I",),
    "an alpha channel, which was laid over white: save RGB": ("RGBA", "LA", "La", "PA"),
    "a palette of at most 256 colours, which moves the distance: save RGB": ("P", "1"),
    "CMYK colours, which were converted without a colour profile: save RGB": ("CMYK",),
}
NEAR = 0.2  # fraction of a usual distance between neighbours below which two images count as nearly equal
FEW_NEAR = 0.01  # share of images that may be so by chance
FEWEST = 10  # images whose average look tells anything
ERRORS = 6.0  # standard errors of a difference of looks beyond chance
LEVELS, CONTRAST, EXTREME, DETAIL, BLOCKS, FRAMED = 3.0, 0.1, 0.1, 0.06, 0.1, 0.1  # smallest differences that are told
CHANCE = 4.0  # labels count as unbalanced when chi-squared exceeds its mean by more standard deviations


@dataclass(frozen=True)
class Side:
    """One set of a comparison: the images, their resizing, and their features; or saved statistics."""

    role: str
    """`samples`, `reference` or `held_out`."""
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

    @cached_property
    def traits(self) -> Traits | None:
        """What is known of the images themselves; None for statistics that do not tell."""
        if self.images is None or self.features is None:
            return None if self.statistics is None else self.statistics.traits
        survey, names = self.images.survey, self.images.class_names
        return Traits(
            num=len(self.images),
            sizes=tuple((*size, count) for size, count in survey.sizes.most_common()),
            kinds=tuple(survey.kinds.most_common()),
            modes=tuple(survey.modes.most_common()),
            num_grey=int(self.features.grey.sum()),
            num_repeated=len(self.features) - len(self.pixel_keys),
            fitted=self.fitted,
            classes=None if names is None else tuple(Counter(names).most_common()),
            rounding=self.images.rounding,
            remarks=self.images.remarks or None,
            look=Look.of(self.features.looks),
        )

    @cached_property
    def pixel_keys(self) -> set[bytes]:
        """Content hashes of the pixels that the network received; none for statistics that do not tell."""
        if self.features is not None:
            return set(self.features.pixel_keys())
        digests = None if self.statistics is None else self.statistics.digests
        return set() if digests is None else {row.tobytes() for row in np.ascontiguousarray(digests)}

    @property
    def count(self) -> int | None:
        """Number of images that the distance is computed from; None for statistics that do not tell."""
        if self.statistics is not None:
            return self.statistics.num
        return None if self.features is None else len(self.features)

    @property
    def pixels(self) -> int | None:
        """Side in pixels of the images that the network receives."""
        return self.fitted or (None if self.traits is None else self.traits.pixels)


def find_traps(
    samples: Side,
    reference: Side,
    protocol: Protocol | None = None,
    *,
    neighbours: Neighbours | None = None,
    shuffled_splits: bool = True,
    released_weights: bool = True,
) -> list[str]:
    """All warnings about a comparison, as sentences; [] where there are none.

    They are the same for images and for their statistics as `digit statistics` saves them, except for those of nearly
    equal images, which need features of both sets (`neighbours`).

    Args:
        protocol: the protocol of published metrics to compare with; None where the network is not that of any protocol.
        shuffled_splits: whether the splits of the Inception Score are shuffled.
        released_weights: whether the weights of a published network are those that were published.
    """
    assert samples.features is not None
    warnings = [*_unknown(reference), *_sizes(samples, reference)]
    warnings += count_warnings(samples.count, reference.count, samples.features.pooled.shape[1])
    warnings += [*_rank(reference), *_repeats(samples, reference), *_nearly_equal(neighbours)]
    for side in (samples, reference):
        if side.traits is not None:
            traits = side.traits
            warnings += [*(traits.remarks or ()), *_files(side, traits), *_colours(side, traits)]
    warnings += [*_looks(samples, reference), *_labels(samples.traits, reference.traits)]
    if not shuffled_splits:
        warnings += [*_splits_in_order(samples)]
    if not released_weights:
        warnings.append("the network's weights are not those of the released file: no published metric was made so")
    return warnings + ([*_published(samples, reference, protocol)] if protocol else [])


def _nearly_equal(found: Neighbours | None) -> Iterator[str]:
    """Samples that are nearly reference images, or nearly each other; equal pixels are told by `_repeats`."""
    if found is None:
        return
    num, near = len(found.nearest), NEAR * NEAR
    copied = int(((found.nearest_squares > 0) & (found.nearest_squares < near * found.own_squares)).sum())
    if copied > max(2, FEW_NEAR * num):
        yield (
            f"{copied} of {num} samples are nearly a reference image, at less than {NEAR:g} of its distance to any "
            "other: copies of training images make every distance too low (authenticity shows them)"
        )
    limit = near * float(np.median(found.real_squares))
    repeated, usual = (
        int(((squares > 0) & (squares < limit)).sum()) for squares in (found.fake_squares, found.real_squares)
    )
    if repeated > max(2, (FEW_NEAR + usual / len(found.real_squares)) * num):
        yield (
            f"{repeated} of {num} samples nearly repeat another sample: the model makes few different images, which "
            "precision and density do not show (recall, coverage and Vendi score do)"
        )


def _splits_in_order(samples: Side) -> Iterator[str]:
    """Sorted samples where each split of the Inception Score takes consecutive ones."""
    names = None if samples.images is None else samples.images.class_names
    if names is not None and len(set(names)) > 1 and in_runs(names):
        yield (
            "the samples are sorted by class, and this protocol splits them in their order: each split has few classes "
            "and the Inception Score is too low; shuffle the samples"
        )


def _looks(samples: Side, reference: Side) -> Iterator[str]:
    """Differences of all pixels alike, as saving and resizing make them."""
    own, other = (None if side.traits is None else side.traits for side in (samples, reference))
    if own is None or other is None or min(own.num, other.num) < FEWEST or own.look is None or other.look is None:
        return
    a, b = own.look, other.look
    yield from _looks_of_colours(a, b)
    if _differs(a.extreme, b.extreme, EXTREME):
        yield (
            f"{a.extreme[0]:.0%} of the samples' values are 0 or 255, of the reference's {b.extreme[0]:.0%}: were "
            "values cut off, such as -1..1 saved as 0..1?"
        )
    if samples.pixels == reference.pixels:
        yield from _looks_of_detail(a, b, resized=bool(own.fitted or other.fitted))
    if _differs(a.framed, b.framed, FRAMED):
        yield (
            f"{a.framed[0]:.0%} of the samples have a frame of one colour, of the reference images {b.framed[0]:.0%}: "
            "cut it off"
        )


def _looks_of_colours(a: Look, b: Look) -> Iterator[str]:
    """Exchanged channels, another brightness, another contrast."""
    colours, others = (a.red, a.green, a.blue), (b.red, b.green, b.blue)
    straight, exchanged = (_distance((a.red, a.blue), pair) for pair in ((b.red, b.blue), (b.blue, b.red)))
    if straight > 2 * ERRORS**2 and exchanged < straight / 4:
        yield "red and blue of the samples look exchanged: were they saved as BGR?"
        return
    shown = " against ".join(", ".join(f"{mean:.0f}" for mean, _ in side) for side in (colours, others))
    if any(_differs(mean, of, LEVELS) for mean, of in zip(colours, others, strict=True)):
        yield (
            f"mean red, green and blue of the samples and the reference are {shown}: was another range of values, "
            "gamma or colour profile saved? Small shifts move no measure"
        )
    if _differs(a.contrast, b.contrast, CONTRAST * b.contrast[0]):
        yield (
            f"the samples' contrast is {a.contrast[0]:.0f} grey levels, the reference's {b.contrast[0]:.0f}: was "
            "another range of values or gamma saved?"
        )


def _looks_of_detail(a: Look, b: Look, *, resized: bool) -> Iterator[str]:
    """Other resizing or blur, and compression that the file format does not tell; resizing here hides the latter."""
    if _differs(a.detail, b.detail, DETAIL * b.detail[0]):
        less = a.detail[0] < b.detail[0]
        yield (
            f"samples have {'less' if less else 'more'} fine detail than the reference (the squared difference of "
            f"neighbouring pixels is {a.detail[0]:.2f} of that of pixels two apart, {b.detail[0]:.2f} in the "
            f"reference): they are {'blurred' if less else 'noisy'}, or were resized by another filter"
        )
    if not resized and _differs(a.blocks, b.blocks, BLOCKS):
        side = "samples" if a.blocks[0] > b.blocks[0] else "reference images"
        yield (
            f"{side} show the 8 x 8 blocks of JPEG, whatever their files are now: compression moves the distance; save "
            "PNG from the start"
        )


def _distance(first: tuple[Mean, ...], second: tuple[Mean, ...]) -> float:
    """sum (a - b)² / (error_a² + error_b²)."""
    pairs = zip(first, second, strict=True)
    return sum((a - b) ** 2 / max(e * e + f * f, 1e-12) for (a, e), (b, f) in pairs)


def _differs(first: Mean, second: Mean, least: float) -> bool:
    """Whether two means differ by more than `least`, and by more than chance."""
    difference = abs(first[0] - second[0])
    return difference > least and difference > ERRORS * math.hypot(first[1], second[1])


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
    rounding = None if samples.traits is None else samples.traits.rounding
    if rounding and protocol.rounding and rounding != protocol.rounding:
        yield f"samples were rounded to uint8 by {rounding}, those of protocol {protocol.name} by {protocol.rounding}"
    for side, wanted in ((samples, protocol.num_samples), (reference, protocol.num_reference)):
        if side.count is not None and wanted not in (None, side.count):
            yield f"{side.count} {side.noun}, {wanted:,} in protocol {protocol.name}: {end}"


def _unknown(reference: Side) -> Iterator[str]:
    """What saved statistics do not tell, so that nothing can be said about it."""
    if reference.statistics is None or (reference.traits is not None and reference.count is not None):
        return
    number = [] if reference.count is not None else ["the number"]
    other = [] if reference.traits is not None else ["sizes", "formats", "colours", "classes", "repeats"]
    *first, last = number + other
    yield (
        f"the reference statistics do not tell {' and '.join(filter(None, (', '.join(first), last)))} of their images, "
        "so there is no warning about these: give the images, or statistics of them by `digit statistics`"
    )


def _files(side: Side, traits: Traits) -> Iterator[str]:
    """Lossy formats; not for a reference that is resized, whose compression errors mostly disappear."""
    lossy = [(kind, count) for kind, count in traits.kinds if kind in LOSSY]
    if lossy and not (side.role == "reference" and traits.fitted):
        named = " and ".join(f"{count} of {traits.num} {side.noun} are {kind}" for kind, count in lossy)
        yield f"{named}: compression moves the distance; save PNG (the file name does not decide the format)"


def _sizes(samples: Side, reference: Side) -> Iterator[str]:
    for side in (samples, reference):
        if side.traits is None:
            continue
        smallest = min(min(width, height) for width, height, _ in side.traits.sizes)
        if side.traits.side is None:
            yield (
                f"{side.noun} {_mixture(side.traits)}: the short side was resized to {side.pixels} px (PIL bicubic) "
                "and the centre cropped; other resizing or cropping gives another distance"
            )
        if side.traits.fitted and side.traits.fitted > smallest:
            yield (
                f"{side.noun} were enlarged to {side.traits.fitted} px, the smallest from {smallest} px: a lack of "
                f"detail counts as a difference; resize both sets to at most {smallest} px (--image_size)"
            )
    own, other = samples.pixels, reference.pixels
    if own and other and own != other:
        yield (
            f"samples are {own} px, the reference {other} px: the network resizes both to its own size, and a lack of "
            f"detail counts as a difference; resize both sets to {min(own, other)} px (--image_size)"
        )


def _mixture(traits: Traits) -> str:
    (width, height, _), *others = traits.sizes
    return f"come in {1 + len(others)} sizes, most often {width}x{height}" if others else f"are {width}x{height}"


def _rank(reference: Side) -> Iterator[str]:
    """Too few images behind statistics that do not tell their number."""
    if reference.statistics is None or reference.statistics.num is not None:
        return
    sigma = reference.statistics.sigma
    rank = int(np.linalg.matrix_rank(sigma, hermitian=True))
    if rank < len(sigma):
        yield (
            f"the covariance of the reference statistics has rank {rank} of {len(sigma)}, as that of {rank + 1} images "
            "has: it is singular and the distance far too high"
        )


def _repeats(samples: Side, reference: Side) -> Iterator[str]:
    for side in (samples, reference):
        if side.traits is not None and (repeated := side.traits.num_repeated):
            yield (
                f"{repeated} of {side.traits.num} {side.noun} repeat another one pixel by pixel: were they sampled "
                "with one seed?"
            )
    assert samples.features is not None
    if copied := sum(key in reference.pixel_keys for key in samples.features.pixel_keys()):
        yield f"{copied} of {len(samples.features)} samples are reference images pixel by pixel, not new samples"


def _colours(side: Side, traits: Traits) -> Iterator[str]:
    if traits.num_grey > MOSTLY_GREY * traits.num:
        share = traits.num_grey / traits.num
        yield f"{share:.0%} of the {side.noun} are greyscale: the network was trained on colour photographs"
    for what, kinds in ALTERED.items():
        if altered := sum(count for mode, count in traits.modes if mode in kinds or mode.partition(";")[0] in kinds):
            yield f"{altered} of {traits.num} {side.noun} have {what}"


def _labels(samples: Traits | None, reference: Traits | None) -> Iterator[str]:
    """Compare the samples' class shares with the reference's; where one side has no classes, with equal shares."""
    own = dict(samples.classes) if samples is not None and samples.classes else None
    other = dict(reference.classes) if reference is not None and reference.classes else None
    if own is None and other is not None and (parts := _unbalanced(other, dict.fromkeys(other, 1))):
        yield f"labels of the reference images are unbalanced: {parts}; the samples need the same shares of classes"
    if own is None:
        return
    if other is not None and (foreign := [name for name in own if name not in other]):
        yield (
            f"{len(foreign)} of {len(own)} classes of the samples are none of the reference, such as {foreign[0]}: "
            "images of other classes raise the distance; give both sets the same names of classes"
        )
    elif other is not None and (parts := _unbalanced(own, other)):
        yield (
            f"labels of the samples are unbalanced against the shares of the reference: {parts}; sample the classes in "
            "the shares of the reference"
        )
    elif other is None and (parts := _unbalanced(own, dict.fromkeys(own, 1))):
        yield f"labels of the samples are unbalanced against equal shares: {parts}; sample every class in turn"


def _unbalanced(counts: dict[str, int], expected: dict[str, int]) -> str:
    """The least and the most frequent class where counts differ from the expected shares by more than chance, or ""."""
    unit = sum(counts.values()) / sum(expected.values())
    shares = {name: unit * share for name, share in expected.items()}
    chi_squared = sum((counts.get(name, 0) - share) ** 2 / share for name, share in shares.items())
    freedom = len(expected) - 1
    if not freedom or chi_squared <= freedom + CHANCE * math.sqrt(2 * freedom):
        return ""
    ratio = {name: counts.get(name, 0) / share for name, share in shares.items()}
    least, most = min(ratio, key=ratio.__getitem__), max(ratio, key=ratio.__getitem__)
    return f"{counts.get(least, 0)} of class {least}, {counts.get(most, 0)} of class {most}"
