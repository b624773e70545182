"""FID, IS and their kin of one image set against another (Tables 3 and 4), by a protocol that the result names.

    images -> uint8 -> network, once -> pooled, spatial, logits -> distances and scores; and every trap that was found

`digit evaluate SAMPLES REFERENCE`. Inception's figures carry FID's names; EfficientNet-Lite2's carry its own.
"""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from digit import __version__
from digit.data.source import digest
from digit.errors import DigitError
from digit.evaluation.features import Features, collect, fingerprint, shards
from digit.evaluation.image_set import Images, ImageSet, open_images
from digit.evaluation.networks import load_judge_network
from digit.evaluation.npz import Statistics, read_npz_names, read_statistics
from digit.evaluation.protocols import PROTOCOLS, ProtocolName
from digit.evaluation.traps import Side, find_traps
from digit.metrics.frechet import FeatureStats, frechet_distance
from digit.metrics.influence import frechet_interval
from digit.metrics.intervals import proportion_interval
from digit.metrics.judge import JudgeNetwork
from digit.metrics.scores import inception_score, kernel_distance, precision_recall
from digit.runtime import distributed
from digit.runtime.files import cache_folder, write_json

NO_CACHE = "none"
INCEPTION = "inception"  # the network of every published figure
STAND_IN = "another network in Inception's place: its figures compare with each other alone, never with published ones"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How samples are compared with a reference."""

    protocol: ProtocolName = "released"
    """released (torch-fidelity's network and resize, against 50,000 validation PNGs of 256 px), adm (statistics .npz of
    the training set, precision and recall against its images) or clean (clean-fid's resize)"""
    inception: str | None = None
    """Weights of FID's InceptionV3 (pt_inception-2015-12-05-6726825d.pth); without them EfficientNet-Lite2 judges, and
    its figures are no FID."""
    num: int | None = None
    """Use the first NUM samples; all by default."""
    num_reference: int | None = None
    """Use so many reference images: the first, or spread evenly where they are sorted by class; all by default."""
    image_size: int | None = None
    """Resize the short side of both sets to so many pixels (PIL bicubic) and cut out the centre. By default sets of one
    square size stay as they are and others are brought to the samples' size."""
    num_splits: int = 10
    """Splits of the Inception Score."""
    num_neighbours: int = 3
    """k of precision and recall."""
    kernel_subsets: int = 100
    """Random subsets of the kernel distance (KID)."""
    kernel_subset_size: int = 1000
    """Images in each of them; fewer where there are fewer."""
    seed: int = 0
    """Of the splits and the subsets."""
    batch_size: int = 64
    """Images that go through the network at a time."""
    cache: str | None = None
    """Folder for features, by content: 11 to 20 MB per 1,000 images. Default: features in DIGIT_CACHE or in the user's
    cache folder for digit; none to keep nothing."""

    def __post_init__(self) -> None:
        if self.protocol not in get_args(ProtocolName):
            raise DigitError(f"protocol is {self.protocol!r}: choose one of {', '.join(get_args(ProtocolName))}")
        for name in ("num_splits", "num_neighbours", "kernel_subsets", "batch_size"):
            if getattr(self, name) < 1:
                raise DigitError(f"{name} is {getattr(self, name)}: at least 1")
        if self.kernel_subset_size < 2:
            raise DigitError(f"kernel_subset_size is {self.kernel_subset_size}: at least 2")
        if self.image_size is not None and not 8 <= self.image_size <= 4096:
            raise DigitError(f"image_size is {self.image_size}: wanted 8 to 4096 pixels")

    @property
    def cache_folder(self) -> Path | None:
        """Where features are kept; None for nowhere."""
        if self.cache == NO_CACHE:
            return None
        return Path(self.cache).expanduser() if self.cache else cache_folder() / "features"

    def load_network(self, device: str | torch.device | None = None) -> JudgeNetwork:
        """The network of the protocol. Raises DigitError for missing or foreign weights."""
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
    """Compare two image sets: figures with intervals, what could not be computed and why, and every trap found.

    Args:
        samples: folder of images, .npz with arr_0 uint8 (N, H, W, 3), uint8 tensor (N, 3, H, W), or any source.
        reference: the same, or an .npz of statistics (mu, sigma[, mu_s, sigma_s]), with or without images.
        cfg: the protocol and its numbers.
        out: JSON file for what is returned.
        device: cpu or cuda; None takes cuda where there is one.
        network: judges instead of the one that cfg names.

    Several ranks call it together and judge a share each; every one gets the result, rank 0 writes it.

    Returns {"protocol", "samples", "reference", "figures", "left_out", "warnings", "versions"}.
    Raises DigitError for images that cannot be read and for statistics of another network.
    """
    cfg = cfg or EvaluateConfig()
    drawn = open_images(samples, cfg.num)
    truth, statistics = open_reference(reference, cfg.num_reference)
    sizes = fitted_sizes(drawn, truth, cfg)
    network = network or cfg.load_network(device)
    sides = [
        Side(role, images, size, images and _features(images, size, network, cfg, role), kept)
        for role, images, size, kept in (
            ("samples", drawn, sizes[0], None),
            ("reference", truth, sizes[1], statistics),
        )
    ]
    return distributed.on_main(lambda: _compare(*sides, network, cfg, out))


def _compare(
    samples: Side, reference: Side, network: JudgeNetwork, cfg: EvaluateConfig, out: str | Path | None
) -> dict[str, Any]:
    """What `evaluate` returns, once the features are there."""
    sides = (samples, reference)
    if reference.statistics is not None:
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


def open_reference(spec: Images, num: int | None) -> tuple[ImageSet | None, Statistics | None]:
    """Images, statistics, or both (ADM's reference batches): whatever is there. Raises DigitError for neither."""
    if not isinstance(spec, str | Path) or Path(spec).suffix.lower() != ".npz":
        return open_images(spec, num), None
    statistics = read_statistics(spec)
    if statistics is not None and "arr_0" not in read_npz_names(spec):
        return None, statistics
    return open_images(spec, num), statistics


def fitted_sizes(samples: ImageSet, reference: ImageSet | None, cfg: EvaluateConfig) -> tuple[int | None, int | None]:
    """Side to which each set is resized and cropped; None for a set that is taken as it is."""
    own, other = (images and images.survey.side for images in (samples, reference))
    wanted = cfg.image_size or own or other or PROTOCOLS[cfg.protocol].fallback_size
    asked = cfg.image_size is not None
    return tuple(wanted if side is None or (asked and side != wanted) else None for side in (own, other))


def _features(
    images: ImageSet, size: int | None, network: JudgeNetwork, cfg: EvaluateConfig, role: str
) -> Features | None:
    parts = list(shards(images, size))
    return collect(parts, network, batch_size=cfg.batch_size, cache=cfg.cache_folder, description=f"judge {role}")


def scores(
    samples: Side, reference: Side, network: JudgeNetwork, cfg: EvaluateConfig
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """({figure: {"value", and its interval or deviation}}, {figure: why it is left out}), by the network's names."""
    drawn, truth, kept = samples.features, reference.features, reference.statistics
    metrics, left_out = {}, {}
    stats = FeatureStats.of(truth.pooled) if kept is None else None
    mean, cov = (stats.mean, stats.cov) if stats else (kept.mu, kept.sigma)
    metrics["fd"] = frechet_interval(drawn.pooled, mean, cov).to_dict()
    seed = cfg.seed if PROTOCOLS[cfg.protocol].shuffled_splits else None
    if len(drawn) < cfg.num_splits:
        left_out["is"] = f"{len(drawn)} samples do not fill {cfg.num_splits} splits"
    else:
        metrics["is"] = _with_std(inception_score(drawn.logits, cfg.num_splits, seed))
    mean, cov = (truth.spatial.mean, truth.spatial.cov) if kept is None else (kept.mu_s, kept.sigma_s)
    if mean is None:
        left_out["sfd"] = "the reference statistics hold no mu_s and sigma_s"
    else:
        metrics["sfd"] = {"value": frechet_distance(drawn.spatial.mean, drawn.spatial.cov, mean, cov)}
    if truth is None:
        left_out |= dict.fromkeys(("kd", "precision", "recall"), "the reference is statistics alone: give its images")
    else:
        subsets = {"num_subsets": cfg.kernel_subsets, "subset_size": cfg.kernel_subset_size, "seed": cfg.seed}
        metrics["kd"] = _with_std(kernel_distance(drawn.pooled, truth.pooled, **subsets))
        if min(len(drawn), len(truth)) <= cfg.num_neighbours:
            left_out |= dict.fromkeys(("precision", "recall"), f"they need more than {cfg.num_neighbours} images")
        else:
            shares = precision_recall(truth.pooled, drawn.pooled, cfg.num_neighbours)
            for name, share, total in zip(("precision", "recall"), shares, (len(drawn), len(truth)), strict=True):
                metrics[name] = proportion_interval(round(share * total), total).to_dict()
    return tuple({network.metric(name): entry for name, entry in part.items()} for part in (metrics, left_out))


def _with_std(pair: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("value", "std"), pair, strict=True))


def describe_protocol(network: JudgeNetwork, cfg: EvaluateConfig) -> dict[str, Any]:
    """Everything a reader must know to compare a figure, or to know that it cannot be compared."""
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
            "frechet distance": "95%, another draw of the samples, reference kept: infinitesimal jackknife "
            "(evaluation/influence.py); without the upward bias of few images",
            "inception score": "std over splits",
            "kernel distance": "std over subsets",
            "precision, recall": "95%, Wilson",
        },
    }


def describe_side(side: Side) -> dict[str, Any]:
    """Which images, how many, what was done to them, and hashes by which to know them again."""
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
    if side.statistics is not None:
        kept = side.statistics
        about["statistics"] = {"num": kept.num, "features": len(kept.mu), "sha256": digest([kept.mu.tobytes()])}
    return about


def versions() -> dict[str, str]:
    """What computed it."""
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
    """Keep a reference: write mu, sigma, mu_s, sigma_s (float64), num and the network's fingerprint as .npz.

    The file can then be the REFERENCE of `evaluate` (without kernel distance, precision and recall, which need images)
    and of other programs that read mu and sigma. cfg as for `evaluate`; of its numbers `num_reference` counts.
    Several ranks call it together, as they do `evaluate`.
    """
    cfg = cfg or EvaluateConfig()
    chosen = open_images(images, cfg.num_reference)
    network = network or cfg.load_network(device)
    size = fitted_sizes(chosen, None, cfg)[0]
    features = _features(chosen, size, network, cfg, "reference")

    def keep() -> Statistics:
        pooled, spatial = FeatureStats.of(features.pooled), features.spatial
        kept = Statistics(pooled.mean, pooled.cov, spatial.mean, spatial.cov, len(features), fingerprint(network))
        kept.save(path)
        return kept

    return distributed.on_main(keep)


def to_table(result: dict[str, Any]) -> str:
    """A result of `evaluate` as Markdown for a terminal: figures, what is left out, and the warnings."""
    protocol, samples, reference = result["protocol"], result["samples"], result["reference"]
    kept = reference.get("statistics")
    against = f"{reference['num']} images of {reference['name']}" if "name" in reference else ""
    against += f"{' and ' if against and kept else ''}{'kept statistics' if kept else ''}"
    lines = [
        f"protocol {protocol['name']}, network {protocol['network']['network']}; "
        f"{samples['num']} samples of {samples['name']} against {against}",
        "",
        "| figure | value | 95% interval or deviation |",
        "|---|---|---|",
    ]
    for name, figure in result["metrics"].items():
        lines.append(f"| {name} | {_short(figure['value'])} | {_spread(figure)} |")
    lines += [f"| {name} | – | {reason} |" for name, reason in result["left_out"].items()]
    return "\n".join([*lines, *(f"\nwarning: {text}" for text in result["warnings"])])


def _spread(figure: dict[str, float]) -> str:
    if "low" in figure:
        return f"{_short(figure['low'])} to {_short(figure['high'])}"
    return f"± {_short(figure['std'])}" if "std" in figure else ""


def _short(value: float) -> str:
    """Four digits or so, never in powers of ten that a reader must count."""
    return f"{value:.{2 if abs(value) >= 10 else 4 if abs(value) >= 0.01 else 6}f}"
