"""Propositions 2.1 and 2.2 and Figure 6 of the paper: theory.json, fig6.png and propositions.png.

Each statement gets an outcome: "holds", "holds on a condition" (that the paper does not state) or "does not hold".
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from digit.errors import DigitError
from digit.metrics.intervals import difference_interval, mean_interval
from digit.reproduce import propositions as theory
from digit.runtime.files import as_path, plain, write_result
from digit.runtime.plots import panels
from digit.runtime.progress import track

SAME_SPAN = 1.0  # degrees: spans learnt by gradient descent with a smaller angle count as equal
ALIGNED = 5.0  # degrees: the same for directions learnt from noisy batches
NAMES = {"pca": "PCA", "lda": "LDA"}


@dataclass(frozen=True, kw_only=True)
class TheoryConfig:
    """Sizes of the experiments."""

    num_seeds: int = 20
    """Samples of the toy data of Figure 6."""
    num_levels: int = 11
    """Noise levels from 0 to 1."""
    training_seeds: int = 3
    """Contrastive encoders trained per setting."""
    training_steps: int = 400
    """Training steps of each; 256 new pairs per step."""
    shares: tuple[float, ...] = (0, 0.1, 0.25, 0.5, 0.75, 1)
    """Shape of the augmentation, from isotropic (0) to that of the within-class noise (1)."""


SCALES = {
    "tiny": TheoryConfig(num_seeds=5, training_seeds=1, shares=(0, 0.25, 1)),
    "small": TheoryConfig(),
    "paper": TheoryConfig(num_seeds=100, num_levels=21, training_seeds=10),
}


def run_theory(out: str | Path, *, scale: Literal["tiny", "small", "paper"] | TheoryConfig = "small") -> dict[str, Any]:
    """Compute all, write theory.json, fig6.png and propositions.png into `out`; returns what the JSON holds.

    The only input is seeded random numbers. On one core: 5 seconds (tiny), half a minute (small), 2 minutes (paper).
    """
    if isinstance(scale, str) and scale not in SCALES:
        raise DigitError(f"no scale named {scale}: choose one of {', '.join(SCALES)}")
    cfg, out = SCALES[scale] if isinstance(scale, str) else scale, as_path(out)
    levels = np.linspace(0, 1, cfg.num_levels).tolist()
    steps = {
        "proposition_2_1": theory.autoencoder_against_pca,
        "proposition_2_2": lambda: theory.contrastive_against_lda(
            shares=cfg.shares, num_seeds=cfg.training_seeds, num_steps=cfg.training_steps
        ),
        "figure_6": lambda: with_intervals(theory.figure6(levels=levels, num_seeds=cfg.num_seeds)),
    }
    result: dict[str, Any] = {"protocol": asdict(cfg) | {"angles": "degrees", "noise": NOISE}}
    result |= {name: step() for name, step in track(steps.items(), "theory", len(steps))}
    result["statements"] = statements(result)
    result = plain(result)
    write_result(out / "theory.json", result)
    plot_figure6(out / "fig6.png", result["figure_6"])
    plot_propositions(out / "propositions.png", result)
    return result


NOISE = (
    "standard deviation of isotropic Gaussian noise on both features, relative to the root mean square of the "
    "features' standard deviations (both classes together); the paper does not define its unit"
)


def with_intervals(figure: dict[str, Any]) -> dict[str, Any]:
    """Replace accuracies over seeds by intervals for each level; lda_minus_pca is their paired difference."""
    for example in ("paper_like", "along_the_spread"):
        for fitted in ("kept", "refitted"):
            pca, lda = (np.array(figure[example][fitted][name]).T for name in ("pca", "lda"))  # (levels, seeds)
            figure[example][fitted] = {
                "pca": [mean_interval(row).to_dict() for row in pca],
                "lda": [mean_interval(row).to_dict() for row in lda],
                "lda_minus_pca": [difference_interval(a, b).to_dict() for a, b in zip(lda, pca, strict=True)],
            }
    return figure


# -------------------------------------------------------------------- outcomes


def statements(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The paper's statements with their outcome here and the evidence for it."""
    angles, loadings = (result["proposition_2_1"][key] for key in ("subspace_angle", "loading_angle"))
    spans = max(angles["gradient"], angles["normal_equations"])
    same_class, isotropic = (worst_angle(result, "shape", share, "lda") for share in (1, 0))
    same_shape = worst_angle(result, "amount", None, "lda")
    jensen = result["proposition_2_2"]["jensen"]["centred"]
    like, along, levels = (result["figure_6"][name] for name in ("paper_like", "along_the_spread", "levels"))
    return [
        statement(
            "2.1: a linear autoencoder spans the principal subspace", spans < SAME_SPAN, False,
            f"{spans:.1e} degrees apart on centred data, {angles['gradient_uncentred']:.0f} where the mean is left in",
        ),
        statement(
            "2.1: the loading vectors can be read from its weights", loadings["decoder_weight_decay"] < SAME_SPAN,
            loadings["decoder"] > SAME_SPAN,
            f"singular vectors of the decoder are {loadings['decoder']:.0f} degrees off, since any W2 G, G^-1 W1 does "
            f"as well; {loadings['decoder_weight_decay']:.1e} with weight decay; {loadings['reconstruction']:.1e} of "
            "the reconstruction, which takes the variance of the codes too",
        ),
        statement(
            "2.2: a contrastive encoder learns LDA's direction", max(same_class, same_shape) < ALIGNED,
            isotropic > ALIGNED,
            f"at most {same_class:.1f} degrees off where a pair is two samples of one class, {same_shape:.1f} where "
            f"the augmentation has the shape of the within-class noise, whatever its size; {isotropic:.0f} off, and "
            f"{worst_angle(result, 'shape', 0, 'pca'):.0f} from PCA's direction, where the augmentation is isotropic "
            "and the within-class noise is not",
        ),
        statement(
            "A.2, after Eq. 15: the sum of all inner products bounds the largest eigenvalue of their matrix",
            jensen["sum"] >= jensen["largest_eigenvalue"], False,
            f"centred codes have sum {abs(jensen['sum']):.1g}, largest eigenvalue {jensen['largest_eigenvalue']:.0f}: "
            "the bound needs inner products that are not negative, and the sum does not depend on their variance",
        ),
        statement(
            "Figure 6(d): LDA's accuracy consistently surpasses PCA's under noise", surpasses(like["kept"]),
            not surpasses(along["kept"]),
            f"where the classes differ across the main spread, {leader(like['kept'], levels)}; where they differ along "
            f"it, {leader(along['kept'], levels)} if the projection of the clean data is kept, and "
            f"{leader(along['refitted'], levels)} if it is refitted",
        ),
    ]  # fmt: skip


def statement(text: str, holds: bool, conditional: bool, evidence: str) -> dict[str, Any]:
    outcome = "does not hold" if not holds else "holds on a condition" if conditional else "holds"
    return {"statement": text, "outcome": outcome, "evidence": evidence}


def worst_angle(result: dict[str, Any], kind: str, share: float | None, target: str) -> float:
    """Largest angle of a trained encoder to `target`, over codes normalised or not; share None takes all shares."""
    entries = [e for e in result["proposition_2_2"][kind] if share is None or e["share"] == share]
    return max(angle for entry in entries for codes in ("linear", "normalised") for angle in entry[codes][target])


def surpasses(fitted: dict[str, Any]) -> bool:
    """Whether the interval of LDA's lead lies above 0 at every noise level."""
    return all(lead["low"] > 0 for lead in fitted["lda_minus_pca"])


def leader(fitted: dict[str, Any], levels: list[float]) -> str:
    """Which of PCA and LDA leads at which noise, as text."""
    if surpasses(fitted):
        return "LDA leads at every noise level"
    behind = [level for level, lead in zip(levels, fitted["lda_minus_pca"], strict=True) if lead["high"] < 0]
    return f"PCA leads from noise {behind[0]:.2g} on" if behind else "neither leads at some levels"


# -------------------------------------------------------------------- plots


def plot_figure6(path: Path, figure: dict[str, Any]) -> None:
    """Plot the paper's four panels: points, histograms of PCA's and LDA's codes, accuracy against noise."""
    data = theory.PAPER_LIKE
    x, labels = data.sample(figure["points_per_class"], np.random.default_rng(6))
    directions = {"pca": theory.principal_components(x, 1)[0][0], "lda": theory.fisher_directions(x, labels)[0]}
    directions = {name: w * np.sign(w @ np.array(data.offset)) for name, w in directions.items()}
    with panels(path, 2, 2, size=(4.6, 3.4)) as axes:
        points, *histograms, curves = axes.flat
        for k in (0, 1):
            points.scatter(*x[labels == k].T, s=6, alpha=0.5, color=f"C{k}", label=f"class {k + 1}")
        for name, line in (("pca", "-"), ("lda", "--")):
            points.axline(x.mean(0), x.mean(0) + directions[name], color="0.2", linestyle=line, label=NAMES[name])
        points.set(title="(a) data and the two directions", xlabel="feature 1", ylabel="feature 2", aspect="equal")
        for plot, (letter, name) in zip(histograms, (("b", "pca"), ("c", "lda")), strict=True):
            codes = (x - x.mean(0)) @ directions[name]
            for k in (0, 1):
                plot.hist(codes[labels == k], bins=np.linspace(codes.min(), codes.max(), 31), alpha=0.6, color=f"C{k}")
            plot.set(title=f"({letter}) projected by {NAMES[name]}", xlabel="code", ylabel="points")
        plot_accuracy(curves, figure, "paper_like", "kept")
        curves.set(title="(d) linear classifier on the codes")
        points.legend(fontsize=7, loc="lower right")


def plot_accuracy(plot: Any, figure: dict[str, Any], example: str, fitted: str, line: str = "-") -> None:
    """Plot both accuracies of one example against the noise level, with shaded intervals."""
    for colour, name in enumerate(NAMES, start=2):
        ends = {end: [i[end] for i in figure[example][fitted][name]] for end in ("value", "low", "high")}
        label = NAMES[name] + (", refitted" if fitted == "refitted" else "")
        plot.plot(figure["levels"], ends["value"], line, color=f"C{colour}", marker=".", label=label)
        plot.fill_between(figure["levels"], ends["low"], ends["high"], color=f"C{colour}", alpha=0.2, linewidth=0)
    plot.set(xlabel="noise level", ylabel="accuracy")
    plot.grid(alpha=0.3)
    plot.legend(fontsize=8)


def plot_propositions(path: Path, result: dict[str, Any]) -> None:
    """Plot angles during training (2.1), direction by shape of the augmentation (2.2), Figure 6's counterexample."""
    with panels(path, 3, size=(4.8, 3.6)) as axes:
        training, alignment, noise = axes[0]
        for name, (steps, angles) in result["proposition_2_1"]["curves"].items():
            training.plot(np.add(steps, 1), np.maximum(angles, 1e-13), label=name.replace("_", " "))
        training.set(xscale="log", yscale="log", xlabel="step", ylabel="degrees to the principal subspace")
        training.set(title="2.1: linear autoencoder and PCA")
        plot_alignment(alignment, result["proposition_2_2"])
        plot_accuracy(noise, result["figure_6"], "along_the_spread", "kept")
        plot_accuracy(noise, result["figure_6"], "along_the_spread", "refitted", line=":")
        noise.set(title="Figure 6(d), classes along the main spread")
        for plot in axes[0]:
            plot.grid(alpha=0.3)
            plot.legend(fontsize=8)


def plot_alignment(plot: Any, proposition: dict[str, Any]) -> None:
    """Plot angles to LDA's and PCA's direction: closed form as lines, trained encoders as marks."""
    entries = proposition["shape"]
    shares = [entry["share"] for entry in entries]
    dense = np.linspace(0, 1, 101)
    for colour, target in ((3, "lda"), (2, "pca")):
        views = [theory.two_views(share) for share in dense]
        exact = [theory.principal_angles(v.contrastive, getattr(v, target))[0] for v in views]
        plot.plot(dense, exact, color=f"C{colour}", label=f"to {NAMES[target]}, closed form")
        for marker, codes in (("o", "linear"), ("x", "normalised")):
            means = [np.mean(entry[codes][target]) for entry in entries]
            plot.plot(shares, means, marker, color=f"C{colour}", markersize=5, label=f"trained, codes {codes}")
    plot.set(xlabel="augmentation: isotropic (0) to all within-class noise (1)", ylabel="degrees")
    plot.set(title="2.2: contrastive direction", ylim=(-3, 93))
