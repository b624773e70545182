"""Figure 5 of the paper: distance and inception score by top-k and top-p of prior (stage 1) and renderer (stage 2).

A sweep varies one filter of one stage; the stage's other filter is off, and the other stage keeps the pipeline's
setting. The joint sweep crosses the prior's top-k with the renderer's top-p, the two that the paper uses (A.3). The
scale of guidance, which the paper does not use, varies in each stage that was trained for it; the filters then stay.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from digit.errors import DigitError
from digit.evaluation.cache import pipeline_key, remember_rows, request_key
from digit.evaluation.curves import plotted
from digit.evaluation.features import fingerprint
from digit.metrics.frechet import FeatureStats, count_warnings
from digit.metrics.influence import frechet_interval
from digit.metrics.judge import JudgeNetwork
from digit.metrics.scores import inception_score, splits_of
from digit.pipeline.labels import ClassPositions
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime import distributed
from digit.runtime.files import as_path, plain, write_result
from digit.runtime.hardware import Precision
from digit.runtime.plots import panels
from digit.sampling.config import SamplingConfig, StageSampling

STAGES = {"prior": "prior (stage 1)", "renderer": "renderer (stage 2)"}
FILTERS = {"top_k": 0, "top_p": 1.0}  # filter -> value that switches it off
GUIDANCE = "cfg_scale"
LABELS = {"top_p": "top-p", "top_k": "top-k", GUIDANCE: "scale of guidance"}
JOINT = {"joint": ("top_k", "top_p"), "joint_guidance": (GUIDANCE, GUIDANCE)}  # prior's setting x renderer's setting
NUM_SAMPLES = 1000  # per setting by default, also of `digit sweep`
ONE_SPLIT = "one split has no deviation"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The settings of a sampling sweep."""

    top_k: tuple[int, ...] = (10, 50, 100, 200, 400, 800)
    """Values of top-k, for both stages; 0 and values of at least the vocabulary size are off."""
    top_p: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    """Values of top-p, for both stages; 1 is off."""
    cfg_scale: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    """Scales of guidance, for the stages that were trained with label_dropout or prefix_dropout; 1 is none."""
    joint: bool = False
    """Also cross the prior's top-k with the renderer's top-p: a heat map of len(top_k) * len(top_p) settings."""
    joint_guidance: bool = False
    """Also cross the scales of both stages: a heat map of len(cfg_scale)^2 settings."""

    def __post_init__(self) -> None:
        if not self.top_k or not self.top_p or not self.cfg_scale:
            raise DigitError("top_k, top_p and cfg_scale need at least one value each: 0, 1 and 1 are off")
        if min(self.top_k) < 0:
            raise DigitError(f"top_k holds {min(self.top_k)}: it is a number of tokens, 0 keeps all")
        if not 0 < min(self.top_p) <= max(self.top_p) <= 1:
            raise DigitError(f"top_p is {list(self.top_p)}: give probabilities above 0 and at most 1")
        for scale in self.cfg_scale:
            StageSampling(cfg_scale=scale)  # checks it

    @property
    def num_settings(self) -> int:
        """Maximum number of settings to sample, including the pipeline's own."""
        values = {name: len(getattr(self, name)) for name in (*FILTERS, GUIDANCE)}
        joint = sum(getattr(self, name) * values[rows] * values[columns] for name, (rows, columns) in JOINT.items())
        return 1 + 2 * sum(values.values()) + joint


def run_sweep(
    pipe: DigitPipeline,
    reference: Tensor | FeatureStats,
    network: JudgeNetwork,
    cfg: SweepConfig,
    out: str | Path,
    *,
    num: int = NUM_SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Sample and score every setting; write sweep.json, sweep.png and, for joint sweeps, joint*.png into `out`.

    Args:
        pipe: with a prior, or VQ-only (its renderer alone is swept). Where the renderer goes straight to pixels, the
            prior alone is swept.
        reference: pooled features (M, D) of real images from `network`, or their statistics.
        network: gives features and logits; without logits (no columns) it computes no inception score.
        cfg: the settings.
        out: folder; OUT/cache keeps the tokens and features of each setting, and cached settings are not sampled again.
        num: images per setting, spread evenly over the classes.
        seed: of the first image; every setting uses the same seeds.

    Returns what the JSON holds; the metrics of a setting have their full names, which protocol.metrics maps. All ranks
    call it together: they share the samples of each setting, and rank 0 scores them.
    """
    out, reference = as_path(out), reference if isinstance(reference, FeatureStats) else FeatureStats.of(reference)
    if num < 2:
        raise DigitError(f"num is {num}: a distance needs at least 2 images per setting")
    sweep = Sweep(pipe, reference, network, out / "cache", num, seed)
    stages = list(sweep.vocab_sizes)
    result: dict[str, Any] = {
        "protocol": protocol(sweep),
        "default": sweep.measure(pipe.sampling),
        "sweeps": {
            stage: {
                name: [{name: value} | sweep.measure(varied(pipe, stage, name, value)) for value in getattr(cfg, name)]
                for name in (*FILTERS, *([GUIDANCE] if stage in sweep.guided else []))
            }
            for stage in stages
        },
    }
    for name, settings in JOINT.items():
        both = stages == list(STAGES) and (name == "joint" or sweep.guided == stages)
        result[name] = cross(sweep, cfg, *settings) if getattr(cfg, name) and both else None
    result["best"] = best(result)
    result["warnings"] = count_warnings(num, reference.count, reference.dim)
    return distributed.on_main(lambda: write(plain(result), out, sweep.vocab_sizes))


def write(result: dict[str, Any], out: Path, vocab_sizes: Mapping[str, int]) -> dict[str, Any]:
    """Write sweep.json and the plots; returns the result."""
    write_result(out / "sweep.json", result)
    plot_sweeps(out / "sweep.png", result, vocab_sizes)
    for name in JOINT:
        if result[name]:
            plot_joint(out / f"{name}.png", result, name)
    return result


def varied(pipe: DigitPipeline, stage: str, name: str, value: float) -> SamplingConfig:
    """The pipeline's sampling with one setting of one stage changed; of a filter, that stage's other filter is off."""
    changed = replace(getattr(pipe.sampling, stage), **(FILTERS if name in FILTERS else {}) | {name: value})
    return replace(pipe.sampling, **{stage: changed})


def cross(sweep: "Sweep", cfg: SweepConfig, of_prior: str, of_renderer: str) -> dict[str, Any]:
    """Metrics of every pair as a list of rows: rows are values of the prior's setting, columns of the renderer's."""
    rows = []
    for value in getattr(cfg, of_prior):
        prior = varied(sweep.pipe, "prior", of_prior, value).prior
        pairs = [varied(sweep.pipe, "renderer", of_renderer, other) for other in getattr(cfg, of_renderer)]
        rows.append([sweep.measure(replace(pair, prior=prior)) for pair in pairs])
    prior, renderer = getattr(cfg, of_prior), getattr(cfg, of_renderer)
    return {f"prior_{of_prior}": prior, f"renderer_{of_renderer}": renderer, "metrics": rows}


class Sweep:
    """Samples and scores each setting once; settings with the same prior share its discriminative tokens."""

    def __init__(
        self, pipe: DigitPipeline, reference: FeatureStats, network: JudgeNetwork, cache: Path, num: int, seed: int
    ):
        pipe.require(*(["renderer"] if pipe.renders_pixels else ["vq", "renderer"]))
        self.pipe, self.reference, self.network = pipe, reference, network
        self.cache, self.num, self.seed = cache, num, seed
        sized = distributed.on_main(lambda: pipe.sized(pipe.sampling))
        self.precision: Precision = sized.precision
        self.batch_size = sized.batch_size or 1
        self.request = {"pipe": pipeline_key(pipe), "num": num, "seed": seed, "precision": self.precision}
        self.labels = pipe.labels(num)
        stages = [stage for stage in STAGES if getattr(pipe, stage)]
        stages = [stage for stage in stages if not (stage == "renderer" and pipe.renders_pixels)]  # it has no filters
        models = {stage: getattr(pipe, stage).cfg for stage in stages}
        self.vocab_sizes = {stage: model.vocab_size for stage, model in models.items()}
        self.guided = [stage for stage in pipe.guided_stages if stage in stages]
        self.metrics = {name: network.metric(name) for name in ("fd", "is")}
        self._results: dict[str, dict[str, Any]] = {}

    def measure(self, sampling: SamplingConfig) -> dict[str, Any]:
        """{"sampling": both stages, metric name: {"value", ...}} of one setting."""
        stages = self.stages(sampling)
        key = request_key(**self.request, **stages)
        if key not in self._results:
            judged = self._features(key, sampling)
            self._results[key] = {"sampling": stages} | distributed.on_main(lambda: self._score(judged))
        return self._results[key]

    def stages(self, sampling: SamplingConfig) -> dict[str, dict[str, Any]]:
        """Sampling settings by stage; a top-k of at least the vocabulary size becomes 0."""
        settings = {stage: asdict(getattr(sampling, stage)) for stage in self.vocab_sizes}
        for stage, size in self.vocab_sizes.items():
            if settings[stage]["top_k"] >= size:
                settings[stage]["top_k"] = 0
        return settings

    def tokens(self, sampling: SamplingConfig) -> Tensor:
        """VQ tokens (num, M) int64 of a setting; the cache keeps both kinds as int32."""
        stages = {stage: StageSampling(**values) for stage, values in self.stages(sampling).items()}
        path = self.cache / f"vq-{request_key(**self.request, **self.stages(sampling))}.safetensors"
        known: dict[int, Tensor] = {}
        prefix = self._prefix(stages, known) if "prior" in stages else None

        def make(start: int, stop: int) -> dict[str, Tensor]:
            if start in known:
                return {"vq": known[start]}
            if prefix is None:
                return {"vq": self._generate(start, stop, stages)["vq"].int()}
            rows, sampling = prefix[start:stop].long(), {"renderer": stages["renderer"], "batch_size": self.batch_size}
            labels = self._labels(start, stop)
            return {"vq": self.pipe.render_tokens(rows, self.seed + start, labels=labels, **sampling).int()}

        return remember_rows(path, self.num, self.batch_size, make)["vq"].long()

    def _prefix(self, stages: Mapping[str, StageSampling], vq: dict[int, Tensor]) -> Tensor:
        """Discriminative tokens (num, N) int32 of a prior's setting; new ones leave their VQ tokens in `vq`."""

        def both(start: int, stop: int) -> dict[str, Tensor]:
            tokens = self._generate(start, stop, stages)
            if "vq" in tokens:
                vq[start] = tokens["vq"].int()
            return {"discriminative": tokens["discriminative"].int()}

        path = self.cache / f"discriminative-{request_key(**self.request, prior=asdict(stages['prior']))}.safetensors"
        return remember_rows(path, self.num, self.batch_size, both)["discriminative"]

    def _generate(self, start: int, stop: int, stages: Mapping[str, StageSampling]) -> dict[str, Tensor]:
        """Both kinds of tokens of images `start` .. `stop - 1`."""
        sampling = {**stages, "batch_size": self.batch_size}
        return self.pipe.generate_tokens(stop - start, self._labels(start, stop), self.seed + start, **sampling)

    def _labels(self, start: int, stop: int) -> ClassPositions | None:
        """Classes of images `start` .. `stop - 1`; None without classes."""
        return ClassPositions(self.labels[start:stop].tolist()) if self.pipe.num_classes else None

    def _features(self, key: str, sampling: SamplingConfig) -> Mapping[str, Tensor]:
        images = self._straight(sampling) if self.pipe.renders_pixels else self._decoded(sampling)

        def make(start: int, stop: int) -> dict[str, Tensor]:
            judged = self.network.judge(images(start, stop))
            return {"pooled": judged.pooled, "logits": judged.logits}

        by = {"key": key, "by": fingerprint(self.network)} | ({"decoded": "bf16"} if self.precision == "bf16" else {})
        path = self.cache / f"judged-{request_key(**by)}.safetensors"
        return remember_rows(path, self.num, self.batch_size, make)

    def _decoded(self, sampling: SamplingConfig) -> Callable[[int, int], Tensor]:
        """Images `start` .. `stop - 1` of a setting through its VQ tokens."""
        tokens = self.tokens(sampling)
        return lambda start, stop: self.pipe.decode(tokens[start:stop], self.precision)

    def _straight(self, sampling: SamplingConfig) -> Callable[[int, int], Tensor]:
        """The same by a renderer that goes straight to pixels."""
        stages = {stage: StageSampling(**values) for stage, values in self.stages(sampling).items()}
        prefix, size = self._prefix(stages, {}), self.batch_size

        def images(start: int, stop: int) -> Tensor:
            labels = self._labels(start, stop)
            return self.pipe.render(prefix[start:stop].long(), self.seed + start, labels=labels, batch_size=size)

        return images

    def _score(self, judged: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        pooled, logits = judged["pooled"], judged["logits"]
        distance = frechet_interval(pooled, self.reference.mean, self.reference.cov)
        scores = {self.metrics["fd"]: distance.to_dict()}
        if logits.shape[1]:
            scores[self.metrics["is"]] = score_entry(*inception_score(logits, self.num_splits), self.num_splits)
        return scores

    @property
    def num_splits(self) -> int:
        """Number of splits of the inception score."""
        return splits_of(self.num)


def score_entry(value: float, std: float, num_splits: int) -> dict[str, Any]:
    """An Inception Score and its deviation over splits; of one split there is none, and "missing" says so."""
    return {"value": value, "std": std} if num_splits > 1 else {"value": value, "std": None, "missing": ONE_SPLIT}


def protocol(sweep: Sweep) -> dict[str, Any]:
    """Everything that decides whether the metrics of two sweeps can be compared."""
    return {
        "num_images": sweep.num,
        "seed": sweep.seed,
        "reference_images": sweep.reference.count,
        "network": sweep.network.describe(),
        "metrics": sweep.metrics,
        "inception_score_splits": sweep.num_splits,
        "pipeline": sweep.request["pipe"],
        "vocab_sizes": sweep.vocab_sizes,
        "note": "one filter of one stage varies, its other filter is off, the other stage keeps the pipeline's "
        "setting; where the scale of guidance varies, all filters are the pipeline's",
    }


def best(result: Mapping[str, Any]) -> dict[str, Any]:
    """For each metric, the setting with the lowest distance or highest score, and whether it clearly beats the default.

    The setting is chosen on the samples that score it, so its metrics are biased, the more the closer the settings are.
    """
    settings, chosen = list(_settings(result)), {}
    for short, sign in (("fd", 1), ("is", -1)):
        name = result["protocol"]["metrics"][short]
        if name in result["default"]:
            setting = min(settings, key=lambda s: sign * s[name]["value"])
            chosen[name] = {"sampling": setting["sampling"]} | setting[name]
    distance = result["protocol"]["metrics"]["fd"]
    ends = chosen[distance]["high"], result["default"][distance]["low"]
    chosen[distance]["intervals_apart"] = None if None in ends else ends[0] < ends[1]
    return chosen


def _settings(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield result["default"]
    for stage in result["sweeps"].values():
        for values in stage.values():
            yield from values
    for name in JOINT:
        for row in (result[name] or {"metrics": []})["metrics"]:
            yield from row


# -------------------------------------------------------------------- plots


def plot_sweeps(path: Path, result: dict[str, Any], vocab_sizes: Mapping[str, int]) -> None:
    """Plot Figure 5: one column per setting, row per metric, line per stage; dashed, the pipeline's own setting."""
    names = [name for name in result["protocol"]["metrics"].values() if name in result["default"]]
    columns = [
        "top_p",
        "top_k",
        *([GUIDANCE] if any(GUIDANCE in sweeps for sweeps in result["sweeps"].values()) else []),
    ]
    with panels(path, len(columns), len(names), size=(5.2, 3.4)) as axes:
        for row, metric in zip(axes, names, strict=True):
            for panel, name in zip(row, columns, strict=True):
                for colour, (stage, sweeps) in enumerate(result["sweeps"].items()):
                    if name not in sweeps:
                        continue
                    entries = ((entry[name] or vocab_sizes[stage], entry[metric]) for entry in sweeps[name])
                    points = sorted(entries, key=itemgetter(0))
                    _line(panel, points, label=STAGES[stage], color=f"C{colour}")
                own = result["default"][metric]["value"]
                panel.axhline(own, color="0.4", linestyle="--", linewidth=1, label="the pipeline's own")
                panel.set(xlabel=LABELS[name], ylabel=metric, xscale="log" if name == "top_k" else "linear")
                ticks = sorted({x for line in panel.get_lines()[:-1] for x in line.get_xdata()})
                panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                panel.minorticks_off()
                panel.grid(alpha=0.3)
        axes[0, 0].legend(fontsize=8)


def _line(panel: Any, points: Sequence[tuple[float, Mapping[str, float]]], **style: Any) -> None:
    x, points = zip(*points, strict=True)
    panel.plot(x, [point["value"] for point in points], marker=".", linewidth=1.8, **style)
    if "low" in points[0]:
        low, high = ([plotted(point[end]) for point in points] for end in ("low", "high"))
        panel.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def plot_joint(path: Path, result: dict[str, Any], joint: str) -> None:
    """Plot heat maps of the joint sweep, one panel per metric, with the values; a frame marks the best."""
    grid = result[joint]
    names = [name for name in result["protocol"]["metrics"].values() if name in result["default"]]
    with panels(path, len(names), size=(5.4, 4.2)) as axes:
        for panel, metric in zip(axes[0], names, strict=True):
            values = np.array([[entry[metric]["value"] for entry in row] for row in grid["metrics"]])
            falling = metric == result["protocol"]["metrics"]["fd"]
            heat_map = panel.imshow(values, cmap="viridis_r" if falling else "viridis", aspect="auto")
            relative = (values - values.min()) / max(np.ptp(values), 1e-9)
            for row, entries in enumerate(values.tolist()):
                for column, value in enumerate(entries):
                    dark = relative[row, column] > 0.5 if falling else relative[row, column] < 0.5
                    text, colour = f"{value:.0f}" if value >= 100 else f"{value:.3g}", "w" if dark else "k"
                    panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
            row, column = divmod(int(values.argmin() if falling else values.argmax()), values.shape[1])
            frame = dict(fill=False, edgecolor="C3", linewidth=2.5, clip_on=False)
            panel.add_patch(type(panel.patch)((column - 0.5, row - 0.5), 1, 1, **frame))
            of_prior, of_renderer = JOINT[joint]
            panel.set(xlabel=f"renderer's {LABELS[of_renderer]}", ylabel=f"prior's {LABELS[of_prior]}", title=metric)
            columns, rows = grid[f"renderer_{of_renderer}"], grid[f"prior_{of_prior}"]
            panel.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
            panel.set_yticks(range(len(rows)), [f"{value:g}" if value else "all" for value in rows])
            panel.figure.colorbar(heat_map, ax=panel)
