"""Figure 5 of the paper: distance and inception score by top-k and top-p of prior (stage 1) and renderer (stage 2).

A sweep varies one filter of one stage; the stage's other filter is off, the other stage draws as the pipeline does. The
joint sweep crosses the prior's top-k with the renderer's top-p, the two that the paper uses (A.3).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from digit.errors import DigitError
from digit.evaluation.cache import pipeline_key, remember, request_key
from digit.evaluation.features import fingerprint
from digit.metrics.frechet import FeatureStats
from digit.metrics.influence import frechet_interval
from digit.metrics.judge import JudgeNetwork, collect_judged
from digit.metrics.scores import inception_score, splits_of
from digit.pipeline.pipeline import DigitPipeline, SamplingConfig, StageSampling
from digit.runtime.files import plain, write_json
from digit.runtime.plots import panels

STAGES = {"prior": "prior (stage 1)", "renderer": "renderer (stage 2)"}
FILTERS = {"top_k": 0, "top_p": 1.0}  # and the value that switches it off
DECODED = 256  # images in memory at a time


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The settings of a sampling sweep."""

    top_k: tuple[int, ...] = (10, 50, 100, 200, 400, 800)
    """Values of top-k, for either stage; those of the whole vocabulary and above are the same as 0, off."""
    top_p: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    """Values of top-p, for either stage; 1 is off."""
    joint: bool = False
    """Cross the prior's top-k with the renderer's top-p too: a heat map, len(top_k) * len(top_p) settings."""

    def __post_init__(self) -> None:
        if not self.top_k or not self.top_p:
            raise DigitError("top_k and top_p need at least one value each: 0 and 1 are off")
        if min(self.top_k) < 0:
            raise DigitError(f"top_k holds {min(self.top_k)}: it is a number of tokens, 0 keeps all")
        if not 0 < min(self.top_p) <= max(self.top_p) <= 1:
            raise DigitError(f"top_p is {list(self.top_p)}: probabilities above 0 and at most 1")

    @property
    def num_settings(self) -> int:
        """Settings drawn at most, the pipeline's own among them."""
        return 1 + 2 * (len(self.top_k) + len(self.top_p)) + self.joint * len(self.top_k) * len(self.top_p)


def run_sweep(
    pipe: DigitPipeline,
    reference: Tensor | FeatureStats,
    network: JudgeNetwork,
    cfg: SweepConfig,
    out: str | Path,
    *,
    num: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw and score every setting; write sweep.json, sweep.png and, of a joint sweep, joint.png into `out`.

    Args:
        pipe: with a prior, or VQ-only (its renderer alone is swept).
        reference: pooled features (M, D) of real images from `network`, or their statistics.
        network: gives features and logits; without logits (no columns) there is no inception score.
        cfg: the settings.
        out: folder; OUT/cache holds each setting's tokens and features, and what is there is not drawn again.
        num: images a setting, of all classes evenly.
        seed: of the first image; every setting draws with the same seeds.

    Returns what the JSON holds; a setting's figures are under the metrics' full names, as protocol.metrics maps them.
    """
    out, reference = Path(out), reference if isinstance(reference, FeatureStats) else FeatureStats.of(reference)
    if num < 2:
        raise DigitError(f"num is {num}: a distance needs at least 2 images a setting")
    sweep = Sweep(pipe, reference, network, out / "cache", num, seed)
    stages = [stage for stage in STAGES if getattr(pipe, stage) is not None]
    result: dict[str, Any] = {
        "protocol": protocol(sweep),
        "default": sweep.measure(pipe.sampling),
        "sweeps": {
            stage: {
                name: [{name: value} | sweep.measure(varied(pipe, stage, name, value)) for value in getattr(cfg, name)]
                for name in FILTERS
            }
            for stage in stages
        },
        "joint": joint(sweep, cfg) if cfg.joint and "prior" in stages else None,
    }
    result["best"] = best(result)
    result = plain(result)
    write_json(out / "sweep.json", result)
    plot_sweeps(out / "sweep.png", result, sweep.vocab_sizes)
    if result["joint"]:
        plot_joint(out / "joint.png", result)
    return result


def varied(pipe: DigitPipeline, stage: str, name: str, value: float) -> SamplingConfig:
    """The pipeline's sampling with one filter of one stage, and that stage's other filter off."""
    how = replace(getattr(pipe.sampling, stage), **FILTERS | {name: value})
    return replace(pipe.sampling, **{stage: how})


def joint(sweep: "Sweep", cfg: SweepConfig) -> dict[str, Any]:
    """Figures of every pair, a list of rows: rows are the prior's top-k, columns the renderer's top-p."""
    rows = []
    for k in cfg.top_k:
        prior = varied(sweep.pipe, "prior", "top_k", k).prior
        pairs = [replace(varied(sweep.pipe, "renderer", "top_p", p), prior=prior) for p in cfg.top_p]
        rows.append([sweep.measure(pair) for pair in pairs])
    return {"prior_top_k": cfg.top_k, "renderer_top_p": cfg.top_p, "rows": rows}


class Sweep:
    """Draws and scores settings, each once; discriminative tokens are shared by settings with the same prior."""

    def __init__(
        self, pipe: DigitPipeline, reference: FeatureStats, network: JudgeNetwork, cache: Path, num: int, seed: int
    ):
        pipe.require("vq", "renderer")
        self.pipe, self.reference, self.network = pipe, reference, network
        self.cache, self.num, self.seed = cache, num, seed
        self.request = {"pipe": pipeline_key(pipe), "num": num, "seed": seed, "precision": pipe.sampling.precision}
        self.vocab_sizes = {stage: getattr(pipe, stage).cfg.vocab_size for stage in STAGES if getattr(pipe, stage)}
        self.metrics = {name: network.metric(name) for name in ("fd", "is")}
        self._measured: dict[str, dict[str, Any]] = {}

    def measure(self, how: SamplingConfig) -> dict[str, Any]:
        """{"sampling": both stages, metric name: {"value", ...}} of one setting."""
        stages = self.stages(how)
        key = request_key(**self.request, **stages)
        if key not in self._measured:
            self._measured[key] = {"sampling": stages} | self._score(self._features(key, how))
        return self._measured[key]

    def stages(self, how: SamplingConfig) -> dict[str, dict[str, Any]]:
        """What decides the tokens, by stage; a top-k that keeps the whole vocabulary is 0."""
        chosen = {stage: asdict(getattr(how, stage)) for stage in self.vocab_sizes}
        for stage, size in self.vocab_sizes.items():
            if chosen[stage]["top_k"] >= size:
                chosen[stage]["top_k"] = 0
        return chosen

    def tokens(self, how: SamplingConfig) -> Tensor:
        """VQ tokens (num, M) int64 of a setting; both kinds are kept as int32."""
        sampling = {stage: StageSampling(**values) for stage, values in self.stages(how).items()}
        path = self.cache / f"vq-{request_key(**self.request, **self.stages(how))}.safetensors"
        return remember(path, lambda: {"vq": self._draw(sampling).int()})["vq"].long()

    def _draw(self, sampling: Mapping[str, StageSampling]) -> Tensor:
        if "prior" not in sampling:
            return self.pipe.generate_tokens(self.num, None, self.seed, **sampling)["vq"]
        drawn: dict[str, Tensor] = {}

        def both() -> dict[str, Tensor]:
            drawn.update(self.pipe.generate_tokens(self.num, None, self.seed, **sampling))
            return {"discriminative": drawn["discriminative"].int()}

        key = request_key(**self.request, prior=asdict(sampling["prior"]))
        discriminative = remember(self.cache / f"discriminative-{key}.safetensors", both)["discriminative"].long()
        if "vq" in drawn:
            return drawn["vq"]
        return self.pipe.render_tokens(discriminative, self.seed, renderer=sampling["renderer"])

    def _features(self, key: str, how: SamplingConfig) -> Mapping[str, Tensor]:
        def make() -> dict[str, Tensor]:
            batches = (self.pipe.decode(part) for part in self.tokens(how).split(DECODED))
            judged = collect_judged(batches, self.network, self.num)
            return {"pooled": judged.pooled, "logits": judged.logits}

        return remember(self.cache / f"judged-{request_key(key=key, by=fingerprint(self.network))}.safetensors", make)

    def _score(self, judged: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        pooled, logits = judged["pooled"], judged["logits"]
        distance = frechet_interval(pooled, self.reference.mean, self.reference.cov)
        scores = {self.metrics["fd"]: distance.to_dict()}
        if logits.shape[1]:
            mean, std = inception_score(logits, self.num_splits)
            scores[self.metrics["is"]] = {"value": mean, "std": std}
        return scores

    @property
    def num_splits(self) -> int:
        """Splits of the inception score."""
        return splits_of(self.num)


def protocol(sweep: Sweep) -> dict[str, Any]:
    """What a reader must know to compare the figures."""
    return {
        "num_images": sweep.num,
        "seed": sweep.seed,
        "reference_images": sweep.reference.count,
        "network": sweep.network.describe(),
        "metrics": sweep.metrics,
        "inception_score_splits": sweep.num_splits,
        "pipeline": sweep.request["pipe"],
        "vocab_sizes": sweep.vocab_sizes,
        "note": "one filter of one stage varies, its other filter is off, the other stage draws as the pipeline does",
    }


def best(result: Mapping[str, Any]) -> dict[str, Any]:
    """By metric, the setting with the lowest distance or the highest score, and whether it clearly beats the default.

    Chosen among many on the images that score it: its figure is flattered, the more the nearer the settings lie.
    """
    settings, found = list(_settings(result)), {}
    for short, sign in (("fd", 1), ("is", -1)):
        name = result["protocol"]["metrics"][short]
        if name in result["default"]:
            setting = min(settings, key=lambda s: sign * s[name]["value"])
            found[name] = {"sampling": setting["sampling"]} | setting[name]
    distance = result["protocol"]["metrics"]["fd"]
    found[distance]["intervals_apart"] = found[distance]["high"] < result["default"][distance]["low"]
    return found


def _settings(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield result["default"]
    for stage in result["sweeps"].values():
        for values in stage.values():
            yield from values
    for row in (result["joint"] or {"rows": []})["rows"]:
        yield from row


# -------------------------------------------------------------------- pictures


def plot_sweeps(path: Path, result: dict[str, Any], vocab_sizes: Mapping[str, int]) -> None:
    """Figure 5: a column a filter, a row a metric, a line a stage; dashed, the pipeline's own setting."""
    names = [name for name in result["protocol"]["metrics"].values() if name in result["default"]]
    with panels(path, 2, len(names), size=(5.2, 3.4)) as axes:
        for row, metric in zip(axes, names, strict=True):
            for panel, name in zip(row, ("top_p", "top_k"), strict=True):
                for colour, (stage, sweeps) in enumerate(result["sweeps"].items()):
                    points = sorted((entry[name] or vocab_sizes[stage], entry[metric]) for entry in sweeps[name])
                    _line(panel, points, label=STAGES[stage], color=f"C{colour}")
                own = result["default"][metric]["value"]
                panel.axhline(own, color="0.4", linestyle="--", linewidth=1, label="the pipeline's own")
                panel.set(xlabel=name.replace("_", "-"), ylabel=metric, xscale="log" if name == "top_k" else "linear")
                ticks = sorted({x for line in panel.get_lines()[:-1] for x in line.get_xdata()})
                panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                panel.minorticks_off()
                panel.grid(alpha=0.3)
        axes[0, 0].legend(fontsize=8)


def _line(panel: Any, points: Sequence[tuple[float, Mapping[str, float]]], **look: Any) -> None:
    x, points = zip(*points, strict=True)
    panel.plot(x, [figure["value"] for figure in points], marker=".", linewidth=1.8, **look)
    if "low" in points[0]:
        low, high = ([figure[end] for figure in points] for end in ("low", "high"))
        panel.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)


def plot_joint(path: Path, result: dict[str, Any]) -> None:
    """Heat maps of the joint sweep, a panel a metric, values written in; a frame marks the best."""
    grid = result["joint"]
    names = [name for name in result["protocol"]["metrics"].values() if name in result["default"]]
    with panels(path, len(names), size=(5.4, 4.2)) as axes:
        for panel, metric in zip(axes[0], names, strict=True):
            values = np.array([[entry[metric]["value"] for entry in row] for row in grid["rows"]])
            falling = metric == result["protocol"]["metrics"]["fd"]
            picture = panel.imshow(values, cmap="viridis_r" if falling else "viridis", aspect="auto")
            spread = (values - values.min()) / max(np.ptp(values), 1e-9)
            for row, entries in enumerate(values.tolist()):
                for column, value in enumerate(entries):
                    dark = spread[row, column] > 0.5 if falling else spread[row, column] < 0.5
                    text, ink = f"{value:.0f}" if value >= 100 else f"{value:.3g}", "w" if dark else "k"
                    panel.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
            row, column = divmod(int(values.argmin() if falling else values.argmax()), values.shape[1])
            frame = dict(fill=False, edgecolor="C3", linewidth=2.5, clip_on=False)
            panel.add_patch(type(panel.patch)((column - 0.5, row - 0.5), 1, 1, **frame))
            panel.set(xlabel="renderer top-p", ylabel="prior top-k", title=metric)
            panel.set_xticks(range(len(grid["renderer_top_p"])), [f"{p:g}" for p in grid["renderer_top_p"]])
            panel.set_yticks(range(len(grid["prior_top_k"])), [str(k or "all") for k in grid["prior_top_k"]])
            panel.figure.colorbar(picture, ax=panel)
