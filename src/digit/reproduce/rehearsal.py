"""A rehearsal of a scale: the same targets, structure of models, tokens, K and code, few steps and narrow models.

`rehearsed` cuts by rules over the kinds of configs, so that whatever a scale holds is cut, and says each cut. All that
is not in the list is the scale's own. The pictures, the weights and their widths are those that are given
(bench/stand_in_imagenet.py, bench/stand_in_weights.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

from digit.evaluation.sweep import SweepConfig
from digit.metrics.probe import ProbeConfig
from digit.reproduce.scales import Scale
from digit.runs.recipes import ModelSpec, Recipe
from digit.runtime import distributed
from digit.sampling.config import SamplingConfig
from digit.tokenizers.encoders import EncoderConfig
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.training.config import LoopConfig

WIDTH = 64  # of a rehearsed model, about
COUNTS = {  # fields of a scale: images of a rehearsal
    "num_test": 64, "num_samples": 16, "num_stability": 16, "num_completed": 8, "num_swept": 8,
}  # fmt: skip
MOST_IMAGES = 4000  # to train on: enough features for the paper's larger codebook, and some of each class
MOST_STEPS = 4  # updates of a model
MOST_CROPS = 2  # of an image: they take turns all the same
KEPT_VALUES = 2  # of a list of settings that are each measured


class Cut(NamedTuple):
    """One setting that a rehearsal cuts."""

    setting: str
    """Dotted name."""
    paper: Any
    """The scale's value."""
    rehearsal: Any
    """The rehearsal's."""


def rehearsed(scale: Scale) -> tuple[Scale, list[Cut]]:
    """The scale with few steps, images and channels, and the list of what was cut."""
    cut = cut_config(scale)
    counts = {name: min(getattr(scale, name), most) for name, most in COUNTS.items()}
    if scale.num_train is None or scale.num_train > MOST_IMAGES:
        counts["num_train"] = MOST_IMAGES
    encoders = tuple((name, cut_config(encoder)) for name, encoder in scale.encoders)
    short = replace(cut, **counts, prefixes=ends(scale.prefixes), encoders=encoders)
    return short, list(differing(scale, short))


def cut_config(cfg: Any) -> Any:
    """A config with the rules applied to it and to all configs inside."""
    if not is_dataclass(cfg) or isinstance(cfg, type):
        return cfg
    inner = {field.name: cut_config(getattr(cfg, field.name)) for field in fields(cfg)}
    changes = {name: value for name, value in inner.items() if value is not getattr(cfg, name)}
    changed = replace(cfg, **changes) if changes else cfg
    for kind, rule in RULES:
        if isinstance(changed, kind):
            changed = rule(changed)
    return changed


def cut_recipe(cfg: Any) -> Any:
    """Stored crops of an image, and numbers of updates that stand in the recipe itself."""
    counts = {name: MOST_STEPS for name in ("masked_steps", "vq_only_steps") if getattr(cfg, name)}
    return replace(cfg, **counts, crops_per_image=min(cfg.crops_per_image, MOST_CROPS))


def cut_encoder(cfg: Any) -> Any:
    """A weights file may be a stand-in of another width and depth."""
    return replace(cfg, sizes="file") if cfg.weights else cfg


def cut_training(cfg: Any) -> Any:
    """A few updates of small batches, with a checkpoint on the way; micro-batches stay."""
    accumulate = getattr(cfg, "accumulate", 1)
    steps = min(cfg.num_steps, MOST_STEPS)
    pieces = max(4, distributed.launched_size()) * accumulate  # one image or more in each
    changes: dict[str, Any] = {"num_steps": steps, "batch_size": min(cfg.batch_size, pieces)}
    changes |= {"save_every": min(cfg.save_every, 2), "log_every": 1}
    if hasattr(cfg, "warmup_steps"):
        changes["warmup_steps"] = min(cfg.warmup_steps, 2)
    for start in ("adversarial_start", "codebook_start"):  # of a VQGAN; below num_steps
        if hasattr(cfg, start):
            changes[start] = min(getattr(cfg, start), steps // 2)
    return replace(cfg, **changes)


def cut_model(cfg: Any) -> Any:
    """Narrow blocks; their number, and that of the heads, stay."""
    per_head = max(2, WIDTH // cfg.num_heads // 2 * 2)
    return replace(cfg, embed_dim=min(cfg.embed_dim, per_head * cfg.num_heads))


def cut_sampling(cfg: Any) -> Any:
    """Small batches, so that the ranks have several."""
    return replace(cfg, batch_size=min(cfg.batch_size or 4, 4))


def cut_probe(cfg: Any) -> Any:
    """Few passes, and two values of each setting."""
    values = {name: ends(getattr(cfg, name)) for name in ("l2", "learning_rates", "weight_decays")}
    return replace(cfg, num_epochs=min(cfg.num_epochs, 2), **values)


def cut_kmeans(cfg: Any) -> Any:
    """Few iterations; K stays."""
    return replace(cfg, num_iterations=min(cfg.num_iterations, 2))


def cut_sweep(cfg: Any) -> Any:
    """Two values of each filter."""
    return replace(cfg, top_k=ends(cfg.top_k), top_p=ends(cfg.top_p))


def ends(values: tuple) -> tuple:
    """The first and the last of some values."""
    return values if len(values) <= KEPT_VALUES else (values[0], values[-1])


RULES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (Recipe, cut_recipe),
    (EncoderConfig, cut_encoder),
    (LoopConfig, cut_training),
    (ModelSpec, cut_model),
    (SamplingConfig, cut_sampling),
    (ProbeConfig, cut_probe),
    (KMeansConfig, cut_kmeans),
    (SweepConfig, cut_sweep),
)


def differing(before: Any, after: Any, name: str = "") -> Iterator[Cut]:
    """The settings in which two configs of one class differ."""
    if is_dataclass(before) and type(before) is type(after):
        for field in fields(before):
            inner = f"{name}.{field.name}" if name else field.name
            yield from differing(getattr(before, field.name), getattr(after, field.name), inner)
    elif before != after and name == "encoders" and isinstance(before, tuple):
        for (label, old), (_, new) in zip(before, after, strict=True):
            yield from differing(old, new, f"encoders.{label}")
    elif before != after:
        yield Cut(name, before, after)


def listed(cuts: list[Cut]) -> str:
    """The cuts as text, one a line."""
    lines = [f"  {cut.setting}: {cut.paper} -> {cut.rehearsal}" for cut in cuts]
    return "\n".join(["REHEARSAL: the numbers mean nothing. Cut, setting by setting:", *lines])
