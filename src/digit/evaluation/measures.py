"""Which measures `digit evaluate` computes: direction, source and the images that each needs; and their values."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from digit.data.fingerprint import digest
from digit.evaluation.features import Features
from digit.evaluation.npz import Statistics
from digit.evaluation.settings import EvaluateConfig
from digit.metrics.distances import Block, Pairs
from digit.metrics.diversity import vendi_score
from digit.metrics.extrapolation import Half, frechet_infinity, frechet_ratio, real_distance, samples_needed
from digit.metrics.frechet import frechet_distance, square_root
from digit.metrics.influence import frechet_interval, frechet_with_error, interval_of
from digit.metrics.intervals import Interval
from digit.metrics.kernels import GaussianMeans, UnitMoments, cubic_distance, gaussian_distance, gaussian_interval
from digit.metrics.neighbours import Neighbours, compare_at, copying_score
from digit.metrics.scores import inception_score, kernel_distance, kernel_subsets, kernel_within
from digit.metrics.sliced import mind

Direction = Literal["lower", "higher", "near 0", "near 1", "higher is more varied"]
NO_IMAGES = "the reference is statistics alone: give its images"


@dataclass(frozen=True)
class Measure:
    """What a value means, whatever network it is of."""

    better: Direction
    """Which values are better."""
    needs: str
    """How many images it needs."""
    source: str
    """Where it is defined."""
    published: bool = False
    """Whether the paper's tables and ADM's evaluator have it; `--measures published` computes these alone."""


MEASURES = {
    "fd": Measure(
        "lower", "50,000 samples; below 10,000 it is far too high", "FID, Heusel et al. 2017", published=True
    ),
    "fd_infinity": Measure("lower", "4 samples per feature", "FID_infinity, Chong & Forsyth 2020"),
    "fd_ratio": Measure(
        "lower", "any, best thousands", "FD of samples over FD of as many real images, to the other half of these"
    ),
    "is": Measure("higher", "50,000 samples, 5,000 a split", "Salimans et al. 2016", published=True),
    "sfd": Measure("lower", "as fd", "sFID, Nash et al. 2021", published=True),
    "kd": Measure("lower", "any: it has no bias", "KID, Bińkowski et al. 2018", published=True),
    "cmmd": Measure("lower", "5,000 of each", "CMMD, Jayasumana et al. 2024 (on CLIP)"),
    "mind": Measure("lower", "5,000 of each", "MIND, Berthet et al. 2026"),
    "precision": Measure("higher", "10,000 of each, equally many", "Kynkäänniemi et al. 2019", published=True),
    "recall": Measure("higher", "10,000 of each, equally many", "Kynkäänniemi et al. 2019", published=True),
    "density": Measure("near 1", "10,000 of each, equally many", "Naeem et al. 2020"),
    "coverage": Measure("higher", "10,000 of each, equally many", "Naeem et al. 2020"),
    "authenticity": Measure("higher", "the whole training set as reference", "Alaa et al. 2022"),
    "vendi": Measure("higher is more varied", "many times its value", "Friedman & Dieng 2022"),
}


OF_HELD_OUT = {"copying": Measure("near 0", "20 held-out images and samples", "Z_U of copying, Meehan et al. 2020")}


def about_measure(name: str) -> dict[str, str]:
    """{"better", "needs", "source"} of a measure, for a results file."""
    measure = (MEASURES | OF_HELD_OUT)[name]
    return {"better": measure.better, "needs": measure.needs, "source": measure.source}


@dataclass
class Scores:
    """Values of measures, and why others are left out."""

    wanted: set[str]
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    neighbours: Neighbours | None = None

    def add(self, name: str, make: Callable[[], Interval | dict[str, Any]], *, unless: str = "") -> None:
        """Compute a measure if it is wanted; `unless` is a reason to leave it out, or ""."""
        if name not in self.wanted:
            return
        if unless:
            self.left_out[name] = unless
            return
        made = make()
        self.values[name] = made.to_dict() if isinstance(made, Interval) else made


def wanted_measures(measures: str) -> set[str]:
    """Names of the measures of a setting, `all` or `published`."""
    return {name for name, measure in MEASURES.items() if measures == "all" or measure.published}


def compute(
    fake: Features,
    real: Features | None,
    moments: Statistics | None,
    cfg: EvaluateConfig,
    *,
    shuffled_splits: bool,
    wanted: set[str] | None = None,
    held_out: Features | None = None,
) -> Scores:
    """All wanted measures of features against those of a reference, against its statistics, or against both.

    Distances of means and covariances take the statistics, if they are given, and all other measures the features.
    wanted: names of MEASURES; by default those that cfg asks for. held_out: features of real images that were not
    trained on, for OF_HELD_OUT.
    """
    found = Scores(wanted_measures(cfg.measures) if wanted is None else wanted)
    _frechet(found, fake, real, moments, cfg)
    _inception_score(found, fake, cfg, shuffled_splits)
    _spatial(found, fake, real, moments)
    _kernels(found, fake, real, cfg)
    _pairs(found, fake, real, cfg)
    varied = _no_direction(fake)
    found.add("vendi", lambda: vendi_score(fake.pooled, moments=_unit_moments(fake)), unless=varied)
    if held_out is not None:
        _copying(found, fake, real, held_out)
    ordered = [name for name in (*MEASURES, *OF_HELD_OUT) if name in found.values]
    found.values = {name: found.values[name] for name in ordered}
    return found


def _frechet(
    found: Scores, fake: Features, real: Features | None, moments: Statistics | None, cfg: EvaluateConfig
) -> None:
    if not {"fd", "fd_infinity", "fd_ratio"} & found.wanted:
        return
    if moments is not None:
        mean, cov, root = moments.mu, moments.sigma, None
    else:
        assert real is not None  # `evaluate` opens images or statistics
        mean, cov, root = real.stats.mean, real.stats.cov, real.root("pooled")
    num, dim = fake.pooled.shape
    few = f"{num} samples of {dim} features: it needs {samples_needed(dim)}" if num < samples_needed(dim) else ""
    shared: dict[str, Any] = {"root": root}
    if {"fd", "fd_infinity"} <= found.wanted and not few:  # both need the distance's error, an eigenproblem
        shared["root"] = square_root(cov) if root is None else root
        value, error = frechet_with_error(fake.pooled, mean, cov, root=shared["root"])
        found.add("fd", lambda: interval_of(value, error, cov))
        shared["error"] = error
    else:
        found.add("fd", lambda: frechet_interval(fake.pooled, mean, cov, root=root))
    found.add("fd_infinity", lambda: frechet_infinity(fake.pooled, mean, cov, seed=cfg.seed, **shared), unless=few)
    reason = NO_IMAGES if real is None else "it needs 4 reference images" if len(real) < 4 else ""
    found.add("fd_ratio", lambda: _ratio(fake, _held(real), cfg.seed), unless=reason)


def _ratio(fake: Features, real: Features, seed: int) -> Interval:
    """The distance ratio; the half of the reference, and the distance of the other half to it, are cached."""

    def make_half() -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(value) for name, value in vars(Half.of(real.pooled, seed)).items()}

    def make_second() -> dict[str, torch.Tensor]:
        return {"second": torch.tensor(real_distance(real.pooled, num, half, seed), dtype=torch.float64)}

    state = real.remember_matrix(f"half {seed}", make_half)
    half, num = Half(**{name: value.numpy() for name, value in state.items()}), min(len(fake), len(real) // 2)
    distance, error = real.remember(f"half {seed}, {num} images", make_second)["second"].tolist()
    return frechet_ratio(real.pooled, fake.pooled, seed=seed, half=half, second=(distance, error))


def _inception_score(found: Scores, fake: Features, cfg: EvaluateConfig, shuffled: bool) -> None:
    reason = "" if fake.logits.shape[1] else "the network gives no logits"
    if len(fake) < cfg.num_splits:
        reason = reason or f"{len(fake)} samples do not fill {cfg.num_splits} splits"
    missing = "one split has no deviation" if cfg.num_splits == 1 else ""
    seed = cfg.seed if shuffled else None
    found.add("is", lambda: _with_std(inception_score(fake.logits, cfg.num_splits, seed), missing), unless=reason)


def _spatial(found: Scores, fake: Features, real: Features | None, moments: Statistics | None) -> None:
    if "sfd" not in found.wanted:
        return
    if fake.spatial.dim == 0:
        found.add("sfd", dict, unless="the network gives no spatial features")
        return
    if moments is not None:
        mean, cov, root = moments.mu_s, moments.sigma_s, None
    else:
        assert real is not None
        mean, cov, root = real.spatial.mean, real.spatial.cov, real.root("spatial")
    if mean is None or cov is None:  # statistics hold both or neither
        found.add("sfd", dict, unless="the reference statistics hold no mu_s and sigma_s")
        return
    missing = "of spatial features only mean and covariance are kept"
    spatial, known = fake.spatial, {"root2": root, "rank1": len(fake) - 1}
    found.add("sfd", lambda: Interval.without(frechet_distance(spatial.mean, spatial.cov, mean, cov, **known), missing))


def _kernels(found: Scores, fake: Features, real: Features | None, cfg: EvaluateConfig) -> None:
    no_images = NO_IMAGES if real is None else ""
    found.add("kd", lambda: _kernel_distance(fake, _held(real), cfg), unless=no_images)
    directions = {"num_directions": cfg.num_directions, "seed": cfg.seed}
    found.add("mind", lambda: mind(fake.pooled, _held(real).pooled, **directions), unless=no_images)


def _pairs(found: Scores, fake: Features, real: Features | None, cfg: EvaluateConfig) -> None:
    """Measures of nearest neighbours, and CMMD: all from one pass over the pairs of each two sets."""
    ks = {"precision": cfg.num_neighbours, "recall": cfg.num_neighbours, "authenticity": 1}
    ks |= dict.fromkeys(("density", "coverage"), cfg.density_neighbours)
    ks = {name: k for name, k in ks.items() if name in found.wanted}
    if real is None:
        found.left_out |= dict.fromkeys((*ks, *({"cmmd"} & found.wanted)), NO_IMAGES)
        return
    fewest, means = min(len(fake), len(real)), None
    found.left_out |= {name: f"needs more than {k} images of each" for name, k in ks.items() if k >= fewest}
    no_direction = _no_direction(fake) or _no_direction(real)
    gaussian = "cmmd" in found.wanted and not no_direction
    possible = sorted({k for k in ks.values() if k < fewest})
    if len(possible) > 1 and possible[0] not in (ks.get("precision"), ks.get("density")):
        del possible[0]  # authenticity is the same of every k
    if possible:
        real_squares, real_means = real.within(possible[-1], gaussian=gaussian)
        fake_squares, fake_means = fake.within(possible[-1], gaussian=gaussian)
        sums: list[GaussianMeans] = []

        def consumer(pairs: Pairs) -> Callable[[Block], None]:
            sums.append(GaussianMeans(pairs, moments=real.unit_moments))
            return sums[0].add

        found_at = compare_at(
            real.pooled,
            fake.pooled,
            possible,
            real_squares=real_squares,
            fake_squares=fake_squares,
            consumer=consumer if gaussian else None,
        )
        by_k = dict(zip(possible, found_at, strict=True))
        for name, k in ks.items():
            if k < fewest:
                found.add(name, getattr(by_k.get(k, found_at[0]), name))
        found.neighbours = by_k.get(cfg.density_neighbours) or found_at[-1]
        if gaussian:
            assert fake_means is not None and real_means is not None
            means = fake_means, sums[0].result(), float(real_means.mean())
    found.add("cmmd", lambda: _cmmd(fake, real, means), unless=no_direction)


def _cmmd(fake: Features, real: Features, means: tuple[np.ndarray, np.ndarray, float] | None) -> Interval:
    """CMMD from its means, or of features of which no pairs were needed otherwise."""
    return gaussian_distance(fake.pooled, real.pooled) if means is None else gaussian_interval(*means)


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


def by_class(
    fake: Features, fake_names: list[str], real: Features, real_names: list[str], neighbours: Neighbours | None
) -> dict[str, dict[str, Any]]:
    """Measures of each class that both sets have, the class with the largest distance first.

    {class: {"num", "num_reference", "kd", "precision", "coverage"}}: kd is the distance of KID's kernel between the
    images of the class, with all pairs; precision the share of its samples in the real manifold (of all classes),
    coverage the share of its real images whose neighbourhood holds a sample (of any class). A class needs 3 samples.
    """
    own, other = np.array(fake_names), np.array(real_names)
    classes = {}
    for name in sorted(set(fake_names) & set(real_names)):
        mine, theirs = own == name, other == name
        if mine.sum() < 3 or theirs.sum() < 2:
            continue
        rows, reference = fake.pooled[torch.from_numpy(mine)], real.pooled[torch.from_numpy(theirs)]
        entry = {"num": int(mine.sum()), "num_reference": int(theirs.sum())}
        entry |= {"kd": cubic_distance(rows, reference).to_dict()}
        if neighbours is not None:
            entry |= {
                "precision": float((neighbours.num_balls[mine] > 0).mean()),
                "coverage": float(neighbours.covered[theirs].mean()),
            }
        classes[name] = entry
    return dict(sorted(classes.items(), key=lambda item: -item[1]["kd"]["value"]))


def _with_std(pair: tuple[float, float], missing: str) -> dict[str, Any]:
    """A value and its deviation, or why there is none."""
    value, std = pair
    return {"value": value, "std": None, "missing": missing} if missing else {"value": value, "std": std}


def _held(real: Features | None) -> Features:
    assert real is not None
    return real


def _copying(found: Scores, fake: Features, real: Features | None, held_out: Features) -> None:
    """The copying score; it has no interval, as it is a number of standard deviations already."""
    if real is None:
        found.left_out["copying"] = NO_IMAGES
        return
    z, p = copying_score(real.pooled, held_out.pooled, fake.pooled)
    found.values["copying"] = {"value": z, "std": None, "missing": f"p = {p:.2g} of no difference from new images"}


def _unit_moments(features: Features) -> UnitMoments | None:
    """Moments that the Gaussian kernel needs too; None where there are fewer images than features."""
    return features.unit_moments if len(features) >= features.pooled.shape[1] else None


def _no_direction(features: Features) -> str:
    """Why no angles can be taken of features, or ""."""
    zero = int((features.pooled == 0).all(1).sum())
    return f"{zero} images have features of length 0" if zero else ""
