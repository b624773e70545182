"""FID, IS and similar metrics of one image set against another (Tables 3 and 4), by a named protocol.

    images -> uint8 -> network, once -> pooled, spatial, logits -> distances and scores; and warnings about pitfalls

`digit evaluate SAMPLES REFERENCE`, or `digit.evaluate(samples, reference)`. Metrics of Inception are called fid, kid,
...; those of other networks have names of their own. `measures` computes them.
"""

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from digit.data.fingerprint import digest
from digit.errors import DigitError
from digit.evaluation.examples import choose_examples
from digit.evaluation.features import Features, collect, fingerprint, shards
from digit.evaluation.image_set import Images, ImageSet, open_images
from digit.evaluation.measures import Scores, about_measure, by_class, compute, wanted_measures
from digit.evaluation.networks import AnyNetwork
from digit.evaluation.npz import TORCH_SUFFIXES, Statistics, read_npz_names, read_statistics
from digit.evaluation.page import write_page
from digit.evaluation.protocols import PROTOCOLS
from digit.evaluation.settings import EvaluateConfig
from digit.evaluation.traps import Side, find_traps
from digit.metrics.judge import JudgeNetwork
from digit.runtime import distributed
from digit.runtime.files import write_json
from digit.runtime.version import __version__

INCEPTION = "inception"  # the network of all published metrics
STAND_IN = "not the Inception network: its metrics compare with each other alone, never with published ones"


def evaluate(
    samples: Images,
    reference: Images,
    cfg: EvaluateConfig | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    *,
    network: AnyNetwork | None = None,
    report: str | Path | None = None,
    held_out: Images | None = None,
) -> dict[str, Any]:
    """Compare two image sets: metrics with intervals, which metrics were left out and why, and warnings.

        result = digit.evaluate(images, "photos/val")                    # uint8 (N, 3, H, W), a folder, ...
        result["metrics"]["fd_efficientnet_lite2"]                       # {"value", "low", "high"}
        digit.evaluate(images, "photos/val", network=my_encoder)         # any images (B, 3, H, W) -> (B, D)

    Args:
        samples: folder of images, .npz with arr_0 uint8 (N, H, W, 3), uint8 tensor (N, 3, H, W), or any source.
        reference: the same, or statistics: an .npz with mu, sigma[, mu_s, sigma_s], with or without images, an .npz of
            features by dgm-eval, or a .pt of statistics or features from torch-fidelity's cache.
        cfg: the protocol and its settings.
        out: JSON file for the result.
        device: cpu or cuda; None uses cuda if available. Ignored with a network that is no name.
        network: replaces the network that cfg names: a name of an encoder, a `JudgeNetwork`, or a callable, such as a
            torch module, that takes uint8 (B, 3, H, W) and returns features (B, D). Callables have neither Inception
            Score nor sFID. A module gets images on its own device, runs in evaluation mode and is as it was afterwards.
            Its features are cached under a hash of its weights, buffers, layers and class, those of other callables not
            at all.
        report: folder for report.html, a page with every measure, warning, class and the pictures that show them, and
            for result.json.
        held_out: real images that were not trained on, where the reference is the training set. Adds the copying score:
            whether samples lie nearer to training images than new images do.

    All ranks call it together and judge a share each; each gets the result, and rank 0 writes it. To call it on one
    rank of a training job: `with digit.runtime.distributed.alone():`.

    Returns {"protocol", "samples", "reference", "metrics", "measures", "classes", "examples", "left_out", "warnings",
    "versions"}: metrics by their full names; measures says which direction is better, how many images each needs and
    where it is defined; classes, where both sets have the same classes, has those with the largest distance first;
    examples are rows of both sets that show what the measures say (`choose_examples`).
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
    network = cfg.choose_network(network, device)
    sides = [
        Side(role, images, size, None if images is None else _features(images, size, network, cfg, role), moments)
        for role, images, size, moments in (
            ("samples", sample_images, sizes[0], None),
            ("reference", real_images, sizes[1], statistics),
        )
    ]
    if held_out is not None:
        images = open_images(held_out, None, cfg.pixel_max)
        shown = sizes[1] or (side if real_images is None else real_images.survey.side)  # side of the reference
        size = None if images.survey.side == shown else shown
        sides.append(Side("held_out", images, size, _features(images, size, network, cfg, "held-out images")))
    return distributed.on_main(lambda: _compare(sides, network, cfg, out, report))


def _compare(
    given: list[Side], network: JudgeNetwork, cfg: EvaluateConfig, out: str | Path | None, report: str | Path | None
) -> dict[str, Any]:
    """Compute and write the result of `evaluate` from features of samples, reference and perhaps held-out images."""
    samples, reference, *new = given
    assert samples.features is not None
    sides = (samples, reference)
    if reference.statistics is not None:
        reference.statistics.check(fingerprint(network), samples.features.pooled.shape[1])
    found = _compute(*sides, cfg, new[0].features if new else None)
    metrics, left_out = _named(found, network)
    result = {
        "protocol": describe_protocol(network, cfg),
        **{side.role: describe_side(side) for side in given},
        "metrics": metrics,
        "measures": {network.metric(name): about_measure(name) for name in (*found.values, *found.left_out)},
        "classes": _by_class(*sides, found),
        "examples": choose_examples(len(samples.features), found.neighbours),
        "left_out": left_out,
        "warnings": find_traps(
            *sides,
            PROTOCOLS[cfg.protocol] if network.name == INCEPTION else None,
            neighbours=found.neighbours,
            shuffled_splits=PROTOCOLS[cfg.protocol].shuffled_splits,
            released_weights=network.describe().get("weights_released", True),
        ),
        "versions": versions(),
    }
    if out is not None:
        write_json(out, result)
    if report is not None:
        write_page(report, result, samples, reference)
    return result


def open_reference(
    spec: Images, num: int | None, pixel_max: int | None = None
) -> tuple[ImageSet | None, Statistics | None]:
    """Open images, statistics, or both (ADM's reference batches). Raises DigitError for neither."""
    if not isinstance(spec, str | Path) or Path(spec).suffix.lower() not in (".npz", *TORCH_SUFFIXES):
        return open_images(spec, num, pixel_max), None
    statistics = read_statistics(spec)
    if statistics is not None and (Path(spec).suffix.lower() != ".npz" or "arr_0" not in read_npz_names(spec)):
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
    cache = cfg.cache_folder if getattr(network, "is_reproducible", True) else None
    return collect(parts, network, batch_size=cfg.batch_size, cache=cache, description=f"judge {role}")


def scores(
    samples: Side, reference: Side, network: JudgeNetwork, cfg: EvaluateConfig
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """({metric: {"value", and its interval or deviation}}, {metric: why it is left out}), by the network's names.

    An interval or deviation that cannot be had is None, and "missing" says why.
    """
    return _named(_compute(samples, reference, cfg), network)


def _compute(samples: Side, reference: Side, cfg: EvaluateConfig, held_out: Features | None = None) -> Scores:
    assert samples.features is not None
    shuffled, statistics = PROTOCOLS[cfg.protocol].shuffled_splits, reference.statistics
    real = reference.features
    if real is None and statistics is not None and statistics.features is not None:
        real = Features.of_file(torch.from_numpy(statistics.features), cfg.cache_folder)
    return compute(samples.features, real, statistics, cfg, shuffled_splits=shuffled, held_out=held_out)


def _named(found: Scores, network: JudgeNetwork) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    values = {network.metric(name): entry for name, entry in found.values.items()}
    return values, {network.metric(name): reason for name, reason in found.left_out.items()}


def _by_class(samples: Side, reference: Side, found: Scores) -> dict[str, dict[str, Any]]:
    """`by_class` of two sets of images with classes, {} for others."""
    if found.wanted == wanted_measures("published") or samples.images is None or reference.images is None:
        return {}
    names, other = samples.images.class_names, reference.images.class_names
    if names is None or other is None:
        return {}
    assert samples.features is not None and reference.features is not None
    return by_class(samples.features, names, reference.features, other, found.neighbours)


def describe_protocol(network: JudgeNetwork, cfg: EvaluateConfig) -> dict[str, Any]:
    """Everything that decides whether two metrics can be compared."""
    return {
        "name": cfg.protocol,
        "about": PROTOCOLS[cfg.protocol].about if network.name == INCEPTION else STAND_IN,
        "network": network.describe() | {"fingerprint": fingerprint(network)},
        "num_splits": cfg.num_splits,
        "splits": "shuffled" if PROTOCOLS[cfg.protocol].shuffled_splits else "in order",
        "num_neighbours": cfg.num_neighbours,
        "density_neighbours": cfg.density_neighbours,
        "num_directions": cfg.num_directions,
        "kernel_subsets": [cfg.kernel_subsets, cfg.kernel_subset_size],
        "seed": cfg.seed,
        "intervals": {
            "frechet distance": "95%, over the choice of samples, reference fixed: infinitesimal jackknife "
            "(metrics/influence.py); without the upward bias of few images",
            "inception score": "std over splits",
            "kernel distance": "std over subsets",
            "precision, recall, coverage, authenticity": "95%, Wilson",
            "density": "95%, bootstrap over samples",
            "distance at infinity": "95%, infinitesimal jackknife and error of the fit",
            "distance ratio": "95%, infinitesimal jackknife of both distances, half of the reference fixed",
            "cmmd, mind, vendi": "95%, influence of each sample, reference fixed",
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
    network: AnyNetwork | None = None,
) -> Statistics:
    """Save a reference: write mu, sigma, mu_s, sigma_s (float64), num and the network's fingerprint as .npz.

    It also holds what the warnings of `evaluate` need to know of the images: `Traits`, and a hash of each image's
    pixels. The file can then be the REFERENCE of `evaluate` (without kernel distance, precision and recall, which need
    images) and of other programs that read mu and sigma. cfg is as for `evaluate`, with `num_reference` as the number
    of images. All ranks call it together.
    """
    cfg = cfg or EvaluateConfig()
    chosen = open_images(images, cfg.num_reference, cfg.pixel_max)
    network = cfg.choose_network(network, device)
    size = fitted_sizes(chosen, None, cfg)[0]
    features = _features(chosen, size, network, cfg, "reference")

    def save() -> Statistics:
        assert features is not None  # on rank 0
        pooled, spatial = features.stats, features.spatial
        inner = (spatial.mean, spatial.cov) if spatial.dim else (None, None)
        moments = Statistics(
            pooled.mean, pooled.cov, *inner, len(features), fingerprint(network),
            Side("reference", chosen, size, features).traits, features.digests.numpy(),
        )  # fmt: skip
        moments.save(path)
        return moments

    return distributed.on_main(save)
