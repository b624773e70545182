"""What the numbers of a run mean, in sentences, and what to do next, as commands."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from digit.metrics.judge import METRIC
from digit.runs.judgement import Ways, say_stability
from digit.runs.page import Level

Finding = tuple[Level, str]
Curve = Sequence[tuple[int, float]]
GOOD, FAIR = 0.9, 0.6  # share of what real pictures reach: of recognised samples
VARIED, LESS_VARIED = 0.7, 0.35  # share of the recall of real pictures, or of reconstructions where that is less
SHARP, BLURRED = 25.0, 22.0  # dB of reconstructions; at 22 prints and fine lines are lost
RISE, FALL = 0.02, 0.01  # nats of a validation loss
TELLING = 0.5  # share of real pictures that a classifier has to recognise


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a run, beside what was measured."""

    out: str
    data: str
    """As commands name the pictures."""
    classes: Sequence[str] = ()
    fit_command: str | None = None
    """The command that made the run, where the run folder knows it."""
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    """Losses by model and name, (step, value)."""
    ways: Ways | None = None
    vqgan_steps: int = 0
    crops_per_image: int = 0
    """Crops that are stored of each picture; 0 where the run could not train on more of them."""
    has_vq: bool = True
    has_renderer_tokens: bool = True


def find(metrics: Mapping[str, Any], facts: Facts) -> Iterator[Finding]:
    """The findings, what matters most first."""
    yield from recognised(metrics)
    yield from distance(metrics, facts)
    yield from variety(metrics)
    yield from guidance(metrics, facts)
    yield from sharpness(metrics, facts)
    copies = metrics.get("memorising") or {}
    if copies:
        levels: dict[str, Level] = {"copies": "poor", "none": "good"}
        yield levels.get(copies["verdict"], "info"), copies["text"]
    if text := say_stability(metrics.get("stability") or {}):
        yield "fair" if "not more stable" in text else "info", text
    yield from learning(facts)


def recognised(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    """How many samples a classifier takes for their class."""
    if "recognised" not in metrics:
        return
    own, real = metrics["recognised"], metrics.get("recognised_real")
    text = f"A classifier takes {own:.0%} of {metrics['recognised_images']} samples for their class"
    if real is None:
        yield "info", f"{text}; there are too few pictures to say how many real ones."
        return
    rebuilt = metrics.get("recognised_reconstructions")
    text += f"; of other real pictures {real:.0%}" + (
        "" if rebuilt is None else f", of their reconstructions {rebuilt:.0%}"
    )
    if real < TELLING:
        yield "info", f"{text}. So the classifier knows these classes too little for the share to say much."
        return
    level: Level = "good" if own >= GOOD * real else "fair" if own >= FAIR * real else "poor"
    worst = sorted(metrics["recognised_by_class"].items(), key=lambda entry: entry[1])[:2]
    hard = "" if level == "good" else f" Hardest: {' and '.join(f'{name} ({share:.0%})' for name, share in worst)}."
    yield level, f"{text}.{hard}"


def distance(metrics: Mapping[str, Any], facts: Facts) -> Iterator[Finding]:
    """The Fréchet distance on its scale, and whether tokenizer or models make the gap."""
    found = metrics.get("scale") or {}
    if not found:
        return
    own, real, floor = (found["sets"][name][METRIC] for name in ("samples", "real", "reconstructions"))
    text = (
        f"Distance to {found['reference']:,} training pictures, {found['images']} pictures each: samples {own:.0f}, "
        f"reconstructions {floor:.0f}, other real pictures {real:.0f} (lower is better)."
    )
    if own <= floor:
        yield "good", f"{text} The models sample as well as their tokens allow."
        return
    share = min(1.0, max(0.0, (floor - real) / max(own - real, 1e-9)))
    who = "VQGAN" if facts.has_vq else "decoder"
    cause = (
        f"{share:.0%} of the gap to real pictures is there in the reconstructions already: a better {who} helps most."
        if share > 0.5
        else f"The {who} makes {share:.0%} of the gap to real pictures, the models the rest: longer training of prior "
        "and renderer helps most."
    )
    gap = (own - floor) / max(floor, 1e-9)
    near = "The models come near to what their tokens allow. " if gap < 0.5 else ""
    yield "good" if gap < 0.5 else "fair" if gap < 1.5 else "poor", f"{text} {near}{cause}"


def variety(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    """Recall and coverage beside those of real pictures."""
    sets = (metrics.get("scale") or {}).get("sets") or {}
    if "recall" not in sets.get("samples", {}) or "recall" not in sets.get("real", {}):
        return
    own, floor, real = (
        {name: sets[kind][name]["value"] for name in ("recall", "coverage")}
        for kind in ("samples", "reconstructions", "real")
    )
    text = (
        f"Variety: recall {own['recall']:.2f} and coverage {own['coverage']:.2f}; other real pictures have "
        f"{real['recall']:.2f} and {real['coverage']:.2f}, their reconstructions {floor['recall']:.2f} and "
        f"{floor['coverage']:.2f}."
    )
    best = min(floor["recall"], real["recall"])
    share = own["recall"] / best if best else 1.0
    if share < LESS_VARIED:
        text += " Few kinds of training pictures are sampled: a higher top_p gives more."
    yield "good" if share >= VARIED else "fair" if share >= LESS_VARIED else "poor", text


def guidance(metrics: Mapping[str, Any], facts: Facts) -> Iterator[Finding]:
    """What guidance does to this run, where it was trained for it."""
    ways = facts.ways
    if ways is None:
        return
    sets = (metrics.get("scale") or {}).get("sets") or {}
    if "other_way" not in sets:
        return
    rows = []
    for name, kind, key in (
        (ways.names[0], "samples", "recognised"),
        (ways.names[1], "other_way", "recognised_other_way"),
    ):
        parts = [f"distance {sets[kind][METRIC]:.0f}"]
        if "recall" in sets[kind]:
            parts.append(f"recall {sets[kind]['recall']['value']:.2f}")
        if key in metrics:
            parts.append(f"{metrics[key]:.0%} recognised")
        rows.append(f"{name} {', '.join(parts)}")
    better = sets["other_way"][METRIC] < sets["samples"][METRIC] and metrics.get(
        "recognised_other_way", 1.0
    ) >= metrics.get("recognised", 0.0)
    advice = f" This run is better {ways.names[1]}: see the command below." if better else ""
    scales = ", ".join(f"{stage} {change['cfg_scale']:g}" for stage, change in ways.guided.items())
    yield "fair" if better else "info", f"Guidance (scales: {scales}): {'; '.join(rows)}.{advice}"


def sharpness(metrics: Mapping[str, Any], facts: Facts) -> Iterator[Finding]:
    """PSNR of the reconstructions."""
    value = metrics.get("psnr_db")
    if value is None:
        return
    what = "The VQGAN gives pictures back" if facts.has_vq else "The decoder gives pictures back from their tokens"
    text = f"{what} at {value:.1f} dB."
    if value >= SHARP or not facts.has_vq:
        yield "good" if value >= SHARP else "info", text
        return
    lost = "Prints and fine lines are lost" if value < BLURRED else "Fine detail is lost"
    yield "poor" if value < BLURRED else "fair", f"{text} {lost}, whatever the models learn: samples cannot be sharper."


def learning(facts: Facts) -> Iterator[Finding]:
    """Whether a model overfits its pictures, or has not finished learning."""
    for model, curves in facts.curves.items():
        held = curves.get("val_nll", ())
        if len(held) < 3:
            continue
        step, best = min(held, key=lambda point: point[1])
        last_step, last = held[-1]
        if last > best + RISE:
            helps = "More pictures or more crops help" if facts.crops_per_image else "More pictures help"
            yield (
                "fair",
                f"The {model} overfits its training pictures: held-out loss rose from {best:.2f} at step {step:,} to "
                f"{last:.2f} at step {last_step:,}. {helps}; longer training does not.",
            )
        elif held[-2][1] - last > FALL:
            yield "info", f"The {model} was still learning when it ended (held-out loss {last:.2f}): train it longer."


# -------------------------------------------------------------------- next steps


def command(name: str, *words: str, **options: Any) -> str:
    """`digit NAME WORDS --option value ...`, quoted for a shell; `source` is --from."""
    line = ["digit", name, *words]
    for option, value in options.items():
        line += [f"--{'from' if option == 'source' else option.replace('__', '.')}", str(value)]
    return shlex.join(line)


def next_steps(metrics: Mapping[str, Any], facts: Facts) -> Iterator[tuple[str, str]]:
    """(what it does, the command), what this run needs most first."""
    yield from longer(metrics, facts)
    out, data = facts.out, facts.data
    yield "More pictures:", command("sample", source=out, num=64, out="samples")
    if facts.classes:
        labels = ",".join(facts.classes[:2])
        yield "Pictures of some classes:", command("sample", source=out, num=16, labels=labels, out="samples-some")
    if facts.ways is not None:
        changes = {f"{stage}__{name}": value for stage, c in facts.ways.other.items() for name, value in c.items()}
        where = f"samples-{facts.ways.names[1].replace(' ', '-')}"
        yield f"The same pictures {facts.ways.names[1]}:", command("sample", source=out, num=64, **changes, out=where)
    yield "Find the best sampling settings of this run:", command("sweep", data, source=out, num=200, out="sweep")
    yield (
        "Keep a part of pictures, and sample the rest:",
        command("complete", data, source=out, keep="upper", out="completed"),
    )
    yield "Pictures that are like given ones:", command("vary", data, source=out, each=4, out="varied")
    yield "Draw, complete and compare in the browser:", command("studio", out)
    yield (
        "Measure samples with every metric, and find traps:",
        command("sample", source=out, num=2000, out="samples-2000")
        + "\n"
        + command("evaluate", "samples-2000", data, report="evaluated"),
    )
    yield "Give it to other programs:", command("export", out, out="exported")


def without(words: Sequence[str], option: str) -> list[str]:
    """A command line without an option and its value."""
    place = words.index(option) if option in words else len(words)
    return [*words[:place], *words[place + 2 :]]


def longer(metrics: Mapping[str, Any], facts: Facts) -> Iterator[tuple[str, str]]:
    """The run again, in the same folder, with what it lacks; what a change does not touch is kept."""
    if facts.fit_command is None:
        return
    words = without(shlex.split(facts.fit_command), "--more")
    if "--out" not in words:
        return

    def again(**options: Any) -> str:
        changed, kept = {f"--{name.replace('__', '.')}": str(value) for name, value in options.items()}, words
        for option in changed:
            kept = without(kept, option)
        return shlex.join([*kept, *(word for pair in changed.items() for word in pair)])

    overfits = any("overfits" in text for _, text in learning(facts))
    if not overfits:
        yield "Go on with the training, for twice the updates:", shlex.join([*words, "--more", "2x"])
    elif facts.crops_per_image:
        yield (
            "Twice as many crops of each picture, against overfitting (tokens and models are made anew):",
            again(crops_per_image=2 * facts.crops_per_image),
        )
    if facts.has_vq and facts.vqgan_steps and metrics.get("psnr_db", SHARP) < SHARP:
        yield (
            "Sharper reconstructions (the VQGAN is trained twice as long, then the renderer; the prior stays):",
            again(vqgan_training__num_steps=2 * facts.vqgan_steps),
        )
    if facts.ways is None and facts.classes and facts.has_renderer_tokens:
        yield (
            "The same run, trained for guidance, which makes samples clearer:",
            again(
                prior__label_dropout=0.1, renderer__prefix_dropout=0.1,
                sampling__prior__cfg_scale=1.5, sampling__renderer__cfg_scale=2.0,
            ),
        )  # fmt: skip
