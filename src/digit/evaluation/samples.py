"""FID, IS and similar metrics of one image set against another (Tables 3 and 4), by a named protocol.

    images -> uint8 -> network, once -> pooled, spatial, logits -> distances and scores; and warnings about pitfalls

`digit evaluate SAMPLES REFERENCE`. Metrics of Inception are called fid, kid, ...; those of EfficientNet-Lite2 have
names of their own.
"""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from digit import __version__
from digit.data.fingerprint import digest
from digit.errors import DigitError
from digit.evaluation.features import Features, collect, fingerprint, shards
from digit.evaluation.image_set import Images, ImageSet, open_images
from digit.evaluation.networks import load_judge_network
from digit.evaluation.npz import Statistics, read_npz_names, read_statistics
from digit.evaluation.protocols import PROTOCOLS, ProtocolName
from digit.evaluation.traps import Side, find_traps
from digit.metrics.frechet import frechet_distance
from digit.metrics.influence import frechet_interval
from digit.metrics.intervals import Interval
from digit.metrics.judge import JudgeNetwork
from digit.metrics.neighbours import compare_neighbours
from digit.metrics.scores import inception_score, kernel_distance, kernel_subsets, kernel_within
from digit.runtime import distributed
from digit.runtime.files import as_path, cache_folder, write_json

NO_CACHE = "none"
INCEPTION = "inception"  # the network of all published metrics
STAND_IN = "not the Inception network: its metrics compare with each other alone, never with published ones"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How samples are compared with a reference."""

    protocol: ProtocolName = "released"
    """released (torch-fidelity's network and resize, against 50,000 validation PNGs of 256 px), adm (statistics .npz of
    the training set, precision and recall against its images) or clean (clean-fid's resize)"""
    inception: str | None = None
    """Weights of FID's InceptionV3 (pt_inception-2015-12-05-6726825d.pth); without them EfficientNet-Lite2 is used,
    and the metrics are no FID."""
    num: int | None = None
    """Use the first NUM samples; all by default."""
    num_reference: int | None = None
    """Use NUM_REFERENCE reference images: the first, or spread evenly if sorted by class; all by default."""
    image_size: int | None = None
    """Resize the short side of both sets to IMAGE_SIZE pixels (PIL bicubic) and crop the centre. By default sets of one
    square size stay unchanged and others are resized to the samples' size."""
    pixel_max: int | None = None
    """Value of white in images of more than 8 bits per channel, such as 4095 for 12 bits; by default as the file
    states, or as the largest values of some images show."""
    num_splits: int = 10
    """Number of splits of the Inception Score: 10, as of published scores. `digit sweep` and `digit reproduce` take
    fewer where a split would hold less than 500 samples."""
    num_neighbours: int = 3
    """Neighbours k of precision and recall."""
    kernel_subsets: int = 100
    """Random subsets of the kernel distance (KID)."""
    kernel_subset_size: int = 1000
    """Images in each subset; at most as many as there are."""
    seed: int = 0
    """Seed of the splits and the subsets."""
    batch_size: int = 64
    """Images that go through the network at a time."""
    cache: str | None = None
    """Folder that caches features by content: 11 to 20 MB per 1,000 images. Default: features in DIGIT_CACHE or in the
    user's cache folder for digit; none to cache nothing."""

    def __post_init__(self) -> None:
        if self.protocol not in get_args(ProtocolName):
            raise DigitError(f"protocol is {self.protocol!r}: choose one of {', '.join(get_args(ProtocolName))}")
        for name in ("num_splits", "num_neighbours", "kernel_subsets", "batch_size"):
            if getattr(self, name) < 1:
                raise DigitError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.kernel_subset_size < 2:
            raise DigitError(f"kernel_subset_size is {self.kernel_subset_size}: give at least 2")
        if self.image_size is not None and not 8 <= self.image_size <= 4096:
            raise DigitError(f"image_size is {self.image_size}: give 8 to 4096 pixels")

    @property
    def cache_folder(self) -> Path | None:
        """Folder that caches features; None for no cache."""
        if self.cache == NO_CACHE:
            return None
        return as_path(self.cache) if self.cache else cache_folder() / "features"

    def load_network(self, device: str | torch.device | None = None) -> JudgeNetwork:
        """Load the network of the protocol. Raises DigitError for missing or wrong weights."""
        return load_judge_network(self.inception, resize=PROTOCOLS[self.protocol].resize, device=device)


def evaluate(
    samples: Images,
    reference: Images,
    cfg: EvaluateConfig | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    *,
    network: JudgeNetwork | None = None,
) -> dict[str, Any]:
    """Compare two image sets: metrics with intervals, which metrics were left out and why, and warnings.

    Args:
        samples: folder of images, .npz with arr_0 uint8 (N, H, W, 3), uint8 tensor (N, 3, H, W), or any source.
        reference: the same, or an .npz of statistics (mu, sigma[, mu_s, sigma_s]), with or without images.
        cfg: the protocol and its settings.
        out: JSON file for the result.
        device: cpu or cuda; None uses cuda if available.
        network: replaces the network that cfg names.

    All ranks call it together and judge a share each; each gets the result, and rank 0 writes it.

    Returns {"protocol", "samples", "reference", "metrics", "left_out", "warnings", "versions"}.
    Raises DigitError for images that cannot be read and for statistics of another network.
    """
    cfg = cfg or EvaluateConfig()
    sample_images = open_images(samples, cfg.num, cfg.pixel_max)
    real_images, statistics = open_reference(reference, cfg.num_reference, cfg.pixel_max)
    if real_images is None and cfg.num_reference is not None:
        raise DigitError(
            f"num_reference is {cfg.num_reference}, and the reference is statistics of images that are not here: leave "
            "out --num_reference, or give the images"
        )
    side = statistics.traits.pixels if real_images is None and statistics and statistics.traits else None
    sizes = fitted_sizes(sample_images, real_images, cfg, side)
    network = network or cfg.load_network(device)
    sides = [
        Side(role, images, size, None if images is None else _features(images, size, network, cfg, role), moments)
        for role, images, size, moments in (
            ("samples", sample_images, sizes[0], None),
            ("reference", real_images, sizes[1], statistics),
        )
    ]
    return distributed.on_main(lambda: _compare(sides[0], sides[1], network, cfg, out))


def _compare(
    samples: Side, reference: Side, network: JudgeNetwork, cfg: EvaluateConfig, out: str | Path | None
) -> dict[str, Any]:
    """Compute and write the result of `evaluate` from features."""
    sides = (samples, reference)
    if reference.statistics is not None:
        assert samples.features is not None
        reference.statistics.check(fingerprint(network), samples.features.pooled.shape[1])
    metrics, left_out = scores(*sides, network, cfg)
    result = {
        "protocol": describe_protocol(network, cfg),
        **{side.role: describe_side(side) for side in sides},
        "metrics": metrics,
        "left_out": left_out,
        "warnings": find_traps(*sides, PROTOCOLS[cfg.protocol] if network.name == INCEPTION else None),
        "versions": versions(),
    }
    if out is not None:
        write_json(out, result)
    return result


def open_reference(
    spec: Images, num: int | None, pixel_max: int | None = None
) -> tuple[ImageSet | None, Statistics | None]:
    """Open images, statistics, or both (ADM's reference batches). Raises DigitError for neither."""
    if not isinstance(spec, str | Path) or Path(spec).suffix.lower() != ".npz":
        return open_images(spec, num, pixel_max), None
    statistics = read_statistics(spec)
    if statistics is not None and "arr_0" not in read_npz_names(spec):
        return None, statistics
    return open_images(spec, num, pixel_max), statistics


def fitted_sizes(
    samples: ImageSet, reference: ImageSet | None, cfg: EvaluateConfig, reference_side: int | None = None
) -> tuple[int | None, int | None]:
    """Side to which each set is resized and cropped; None for a set that stays unchanged.

    reference_side: that of images behind statistics, in pixels.
    """
    own, other = samples.survey.side, reference_side if reference is None else reference.survey.side
    target = cfg.image_size or own or other or PROTOCOLS[cfg.protocol].fallback_size
    requested = cfg.image_size is not None
    first, second = (target if side is None or (requested and side != target) else None for side in (own, other))
    return first, second


def _features(
    images: ImageSet, size: int | None, network: JudgeNetwork, cfg: EvaluateConfig, role: str
) -> Features | None:
    parts = list(shards(images, size))
    return collect(parts, network, batch_size=cfg.batch_size, cache=cfg.cache_folder, description=f"judge {role}")


def scores(
    samples: Side, reference: Side, network: JudgeNetwork, cfg: EvaluateConfig
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """({metric: {"value", and its interval or deviation}}, {metric: why it is left out}), by the network's names.

    An interval or deviation that cannot be had is None, and "missing" says why.
    """
    fake, real, moments = samples.features, reference.features, reference.statistics
    metrics: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    assert fake is not None and not (real is None and moments is None)  # `evaluate` opens images or statistics
    if moments is not None:
        mean, cov, root = moments.mu, moments.sigma, None
    else:
        assert real is not None
        mean, cov, root = real.stats.mean, real.stats.cov, real.root("pooled")
    metrics["fd"] = frechet_interval(fake.pooled, mean, cov, root=root).to_dict()
    seed = cfg.seed if PROTOCOLS[cfg.protocol].shuffled_splits else None
    if len(fake) < cfg.num_splits:
        left_out["is"] = f"{len(fake)} samples do not fill {cfg.num_splits} splits"
    else:
        reason = "one split has no deviation" if cfg.num_splits == 1 else ""
        metrics["is"] = _with_std(inception_score(fake.logits, cfg.num_splits, seed), reason)
    if moments is not None:
        mean, cov, root = moments.mu_s, moments.sigma_s, None
    else:
        assert real is not None
        mean, cov, root = real.spatial.mean, real.spatial.cov, real.root("spatial")
    if mean is None:
        left_out["sfd"] = "the reference statistics hold no mu_s and sigma_s"
    else:
        assert cov is not None  # statistics hold mu_s and sigma_s together
        value = frechet_distance(fake.spatial.mean, fake.spatial.cov, mean, cov, root2=root)
        metrics["sfd"] = Interval.without(value, "of spatial features only mean and covariance are kept").to_dict()
    if real is None:
        left_out |= dict.fromkeys(("kd", "precision", "recall"), "the reference is statistics alone: give its images")
    else:
        metrics["kd"] = _kernel_distance(fake, real, cfg)
        if min(len(fake), len(real)) <= cfg.num_neighbours:
            left_out |= dict.fromkeys(("precision", "recall"), f"they need more than {cfg.num_neighbours} images")
        else:
            k = cfg.num_neighbours
            own = {"real_squares": real.nearest_others(k), "fake_squares": fake.nearest_others(k)}
            found = compare_neighbours(real.pooled, fake.pooled, k, **own)
            metrics |= {"precision": found.precision().to_dict(), "recall": found.recall().to_dict()}
    named = {network.metric(name): entry for name, entry in metrics.items()}
    return named, {network.metric(name): reason for name, reason in left_out.items()}


def _kernel_distance(fake: Features, real: Features, cfg: EvaluateConfig) -> dict[str, Any]:
    """Kernel distance with its deviation; the sums within the reference are cached, since they take the longest."""
    size = min(cfg.kernel_subset_size, len(fake), len(real))
    whole = size == len(fake) == len(real)
    reason = "every subset is the whole set" if whole else "one subset" if cfg.kernel_subsets == 1 else ""
    chosen = kernel_subsets(len(fake), len(real), cfg.kernel_subsets, size, cfg.seed)[1]
    what = f"kernel sums of {digest([chosen.numpy().tobytes()])}"
    within = real.remember(what, lambda: {"sums": kernel_within(real.pooled, chosen)})["sums"]
    subsets = {"num_subsets": cfg.kernel_subsets, "subset_size": size, "seed": cfg.seed, "within_second": within}
    return _with_std(kernel_distance(fake.pooled, real.pooled, **subsets), reason)


def _with_std(pair: tuple[float, float], missing: str) -> dict[str, Any]:
    """A value and its deviation, or why there is none."""
    value, std = pair
    return {"value": value, "std": None, "missing": missing} if missing else {"value": value, "std": std}


def describe_protocol(network: JudgeNetwork, cfg: EvaluateConfig) -> dict[str, Any]:
    """Everything that decides whether two metrics can be compared."""
    return {
        "name": cfg.protocol,
        "about": PROTOCOLS[cfg.protocol].about if network.name == INCEPTION else STAND_IN,
        "network": network.describe() | {"fingerprint": fingerprint(network)},
        "num_splits": cfg.num_splits,
        "splits": "shuffled" if PROTOCOLS[cfg.protocol].shuffled_splits else "in order",
        "num_neighbours": cfg.num_neighbours,
        "kernel_subsets": [cfg.kernel_subsets, cfg.kernel_subset_size],
        "seed": cfg.seed,
        "intervals": {
            "frechet distance": "95%, over the choice of samples, reference fixed: infinitesimal jackknife "
            "(metrics/influence.py); without the upward bias of few images",
            "inception score": "std over splits",
            "kernel distance": "std over subsets",
            "precision, recall": "95%, Wilson",
        },
    }


def describe_side(side: Side) -> dict[str, Any]:
    """Which images, how many, how they were resized, and hashes that identify them."""
    about: dict[str, Any] = {}
    if side.images is not None:
        survey = side.images.survey
        about = {
            "name": side.images.name,
            "num": len(side.images),
            "image_size": side.pixels,
            "resized": f"short side to {side.fitted} px, PIL bicubic, centre cut out" if side.fitted else "no",
            "formats": dict(survey.kinds),
            "rounding": side.images.rounding or "not known",
            "sha256": digest(survey.digests),
        }
        if (range_ := side.images.source.pixel_range) and range_.white:
            about["pixel_range"] = str(range_)
    if side.statistics is not None:
        moments = side.statistics
        sha256 = digest([moments.mu.tobytes()])
        about["statistics"] = {"num": moments.num, "features": len(moments.mu), "sha256": sha256}
        if side.images is None and moments.traits is not None:
            about["statistics"] |= {"image_size": side.pixels, "formats": dict(moments.traits.kinds)}
    return about


def versions() -> dict[str, str]:
    """Versions of the software that computed a result."""
    return {
        "digit": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def statistics_npz(
    images: Images,
    path: str | Path,
    cfg: EvaluateConfig | None = None,
    device: str | torch.device | None = None,
    *,
    network: JudgeNetwork | None = None,
) -> Statistics:
    """Save a reference: write mu, sigma, mu_s, sigma_s (float64), num and the network's fingerprint as .npz.

    It also holds what the warnings of `evaluate` need to know of the images: `Traits`, and a hash of each image's
    pixels. The file can then be the REFERENCE of `evaluate` (without kernel distance, precision and recall, which need
    images) and of other programs that read mu and sigma. cfg is as for `evaluate`, with `num_reference` as the number
    of images. All ranks call it together.
    """
    cfg = cfg or EvaluateConfig()
    chosen = open_images(images, cfg.num_reference, cfg.pixel_max)
    network = network or cfg.load_network(device)
    size = fitted_sizes(chosen, None, cfg)[0]
    features = _features(chosen, size, network, cfg, "reference")

    def save() -> Statistics:
        assert features is not None  # on rank 0
        pooled, spatial = features.stats, features.spatial
        moments = Statistics(
            pooled.mean, pooled.cov, spatial.mean, spatial.cov, len(features), fingerprint(network),
            Side("reference", chosen, size, features).traits, features.digests.numpy(),
        )  # fmt: skip
        moments.save(path)
        return moments

    return distributed.on_main(save)


def to_table(result: dict[str, Any]) -> str:
    """A result of `evaluate` as Markdown for a terminal: metrics, what is left out, and the warnings."""
    protocol, samples, reference = result["protocol"], result["samples"], result["reference"]
    has_statistics = bool(reference.get("statistics"))
    against = f"{reference['num']} images of {reference['name']}" if "name" in reference else ""
    against += f"{' and ' if against and has_statistics else ''}{_saved(reference) if has_statistics else ''}"
    lines = [
        f"protocol {protocol['name']}, network {protocol['network']['network']}; "
        f"{samples['num']} samples of {samples['name']} against {against}",
        *(f"{side['name']}: {side['pixel_range']}" for side in (samples, reference) if "pixel_range" in side),
        "",
        "| metric | value | 95% interval or deviation |",
        "|---|---|---|",
    ]
    for name, metric in result["metrics"].items():
        lines.append(f"| {name} | {_short(metric['value'])} | {_spread(metric)} |")
    lines += [f"| {name} | – | {reason} |" for name, reason in result["left_out"].items()]
    return "\n".join([*lines, *(f"\nwarning: {text}" for text in result["warnings"])])


def _saved(reference: dict[str, Any]) -> str:
    num = reference["statistics"]["num"]
    return f"saved statistics of {'an unknown number of' if num is None else num} images"


def _spread(metric: dict[str, Any]) -> str:
    if "missing" in metric:
        return f"– ({metric['missing']})"
    return f"{_short(metric['low'])} to {_short(metric['high'])}" if "low" in metric else f"± {_short(metric['std'])}"


def _short(value: float) -> str:
    """About four digits, never in exponent notation."""
    return f"{value:.{2 if abs(value) >= 10 else 4 if abs(value) >= 0.01 else 6}f}"
