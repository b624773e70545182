"""report.html of a run: what its numbers mean, its pictures beside real ones, and what to do next."""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.metrics.judge import METRIC
from digit.models.sequence import SequenceConfig
from digit.models.tokenizer import levels_of
from digit.pipeline.card import part_origins
from digit.pipeline.pipeline import DigitPipeline
from digit.runs import page
from digit.runs.codebook_quality import quality_text
from digit.runs.findings import Facts, find, next_steps
from digit.runs.fit import Run
from digit.runs.judgement import Judgement, Pair, Ways
from digit.runs.layout import PAGE
from digit.runs.pictures import real_images
from digit.runs.previews import FOLDER, previews_html
from digit.runs.reading import recorded_reading, with_reading
from digit.runs.status import read_losses
from digit.runtime import lock
from digit.runtime.files import atomic_path
from digit.runtime.progress import Progress, format_duration

PER_CLASS, COMPLETED = 10, 8
PREVIEW = re.compile(f'<img src="{FOLDER}/([^"]+)" alt="([^"]*)">')
MOST_BARS, HARDEST = 24, 20  # classes


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Pictures of the report."""

    names: Sequence[str]
    """Of the rows of samples; empty without classes."""
    samples: Tensor
    """As the pipeline samples, row by row."""
    other_way: Tensor | None
    """The same seeds with or without guidance."""
    real: Tensor
    labels: Tensor
    """Of the real pictures."""
    completed: Tensor
    kept: Tensor


def write_page(run: Run, pipe: DigitPipeline, metrics: dict[str, Any], shown: Shown, judged: Judgement) -> Path:
    """report.html: one file that holds its pictures."""
    facts = gather_facts(run, pipe, judged.ways)
    path, name = run.out / PAGE, run.recipe.name
    with Progress("write report.html", 1) as bar:
        body = [
            f"<h1>{page.escape(name)} on {page.escape(short_name(run.source.name))}</h1>",
            page.paragraph(headline(run, pipe, metrics), soft=True),
            page.findings(find(metrics, facts)),
            *sample_section(shown, metrics, judged.ways),
            *scale_section(metrics, judged.ways),
            *class_section(metrics),
            *neighbour_section(run, pipe, metrics, judged),
            *real_section(run, pipe, shown),
            *growth_section(run),
            *training_section(facts),
            *time_section(metrics),
            "<h2>What to do next</h2>",
            page.commands(next_steps(metrics, facts)),
            "<h2>In Python</h2>",
            f"<pre>{page.escape(python_lines(facts.out))}</pre>",
            "<h2>Parts</h2>",
            f"<pre>{page.escape(describe(pipe))}</pre>",
            "<details><summary>All numbers (metrics.json)</summary>"
            f"<pre>{page.escape(json.dumps(metrics, indent=1, default=str))}</pre></details>",
        ]
        with atomic_path(path) as temporary:
            temporary.write_text(page.document(f"{name}: report", body), encoding="utf-8")
        bar.update()
    return path


def gather_facts(run: Run, pipe: DigitPipeline, ways: Ways | None) -> Facts:
    """What the sentences and commands of the page need to know."""
    typed = with_reading(str(lock.last_writer(run.out).get("command", "")), recorded_reading(run.out))
    words = shlex.split(typed) if typed.startswith("digit fit ") else []
    curves = {
        model: read_losses(run.out / model)
        for model in run.recipe.model_names
        if (run.out / model / "log.jsonl").is_file()
    }
    return Facts(
        out=str(run.out),
        data=words[2] if len(words) > 2 and not words[2].startswith("-") else run.source.name,
        classes=pipe.classes,
        fit_command=typed if words else None,
        curves=curves,
        ways=ways,
        vqgan_steps=run.recipe.vqgan_training.num_steps,
        crops_per_image=crops_that_may_grow(run),
        has_vq=pipe.vq is not None,
        has_renderer_tokens=not pipe.renders_pixels,
    )


def crops_that_may_grow(run: Run) -> int:
    """Crops that are stored of each picture, where the run could train on more of them; else 0.

    It could not where the crops of a picture are all alike, where each update cuts fresh ones, and where the tokens are
    another run's.
    """
    recipe = run.recipe
    more = recipe.preprocess.distinct_crops is None and recipe.training_crops == "stored" and "tokens" not in run.reuse
    return recipe.crops_per_image if more else 0


def short_name(name: str) -> str:
    """The last part of a path."""
    return Path(name).name or name


def headline(run: Run, pipe: DigitPipeline, metrics: dict[str, Any]) -> str:
    """Data, size, models and time in one line."""
    seconds = sum(metrics["stage_seconds"].values())
    threads = metrics["machine"]["threads"]
    classes = f"{len(pipe.classes)} classes" if pipe.classes else "no classes"
    return (
        f"{len(run.source):,} pictures, {classes}, {pipe.image_size} px; made in {format_duration(seconds)} on "
        f"{metrics['machine']['device']} ({threads} thread{'s' * (threads != 1)})"
    )


def sample_section(shown: Shown, metrics: dict[str, Any], ways: Ways | None) -> Iterator[str]:
    """A row for each class; where the run was trained for guidance, a second one the other way, of the same seeds."""
    yield "<h2>Samples</h2>"
    if ways is not None:
        own, other = ways.names
        scales = " and ".join(f"{change['cfg_scale']:g} ({stage})" for stage, change in ways.guided.items())
        yield page.paragraph(
            f"In each pair of rows the first is {own}, as this pipeline samples, the second {other}, of equal seeds. "
            f"Scales of guidance: {scales}."
        )
    shares, others_shares = (metrics.get(f"recognised{way}_by_class", {}) for way in ("", "_other_way"))
    if shown.names and len(shown.names) < len(shares):
        yield page.paragraph(f"{len(shown.names)} of {len(shares)} classes.", soft=True)
    rows = shown.samples.split(PER_CLASS)
    others = [None] * len(rows) if shown.other_way is None else shown.other_way.split(PER_CLASS)
    for place, (row, other) in enumerate(zip(rows, others, strict=True)):
        name = shown.names[place] if place < len(shown.names) else ""
        if name:
            share = f" <small>{shares[name]:.0%} recognised</small>" if name in shares else ""
            yield f"<h3>{page.escape(name)}{share}</h3>"
        yield page.row(row, f"sample {name}".strip())
        if other is not None and ways is not None:
            share = f", {others_shares[name]:.0%} recognised" if name in others_shares else ""
            yield f"<p><small>{ways.names[1]}{share}</small></p>"
            yield page.row(other, f"{ways.names[1]} {name}".strip())
    yield '<p class="soft">The same in one picture: <a href="samples.png">samples.png</a></p>'


def scale_section(metrics: dict[str, Any], ways: Ways | None) -> Iterator[str]:
    """Every measure of samples beside those of real pictures and of reconstructions."""
    found = metrics["scale"]
    yield "<h2>How far from real pictures</h2>"
    if not found:
        yield page.paragraph(f"{METRIC}: {metrics[METRIC]:.1f}. There are too few pictures for a scale.")
        return
    names = {"real": "other real pictures", "reconstructions": "reconstructions", "samples": "samples"}
    kinds = {"real": "real", "reconstructions": "floor", "samples": "", "other_way": "other"}
    if ways is not None:
        names |= {"samples": f"samples {ways.names[0]}", "other_way": f"samples {ways.names[1]}"}
    yield page.paragraph(
        f"All against the same {found['reference']:,} training pictures, {found['images']} pictures each, on features "
        "of EfficientNet-Lite2 (not FID). Reconstructions show what the tokenizer costs; samples of its tokens can "
        "hardly do better."
    )
    measures = (
        (METRIC, "Fréchet distance, lower is better", None),
        ("precision", "Precision: share of pictures that look like training pictures", 1.0),
        ("recall", "Recall: share of training pictures that look like these", 1.0),
        ("coverage", "Coverage: share of training pictures that have one of these nearby", 1.0),
    )
    for measure, title, most in measures:
        entries = []
        for kind, name in names.items():
            value = found["sets"].get(kind, {}).get(measure)
            if value is None:
                continue
            number = value["value"] if isinstance(value, dict) else value
            text = f"{number:.0f}" if measure == METRIC else f"{number:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
            entries.append((name, number, text, kinds[kind]))
        if entries:
            yield f"<h3>{title}</h3>{page.bars(entries, most=most)}"
    warnings = "".join(f" {text}." for text in metrics[f"{METRIC}_warnings"])
    judged = metrics[f"{METRIC}_images"]
    yield page.paragraph(
        f"To compare with reports of earlier versions: {METRIC} of {judged[0]} samples against {judged[1]} training "
        f"pictures is {metrics[METRIC]:.1f}.{warnings}",
        soft=True,
    )


def class_section(metrics: dict[str, Any]) -> Iterator[str]:
    """Recognised samples by class, the worst first; a line marks real pictures."""
    shares = metrics.get("recognised_by_class")
    if not shares:
        return
    yield "<h2>Recognised by class</h2>"
    yield page.paragraph(
        "Share of the samples of a class that a linear classifier takes for it; the line: that of other real pictures. "
        "It is trained on features of the training pictures."
    )
    order = sorted(shares.items(), key=lambda entry: entry[1])
    few = order if len(order) <= MOST_BARS else order[:HARDEST]
    yield page.bars(
        ((name, share, f"{share:.0%}", "") for name, share in few),
        most=1.0,
        marks=metrics.get("recognised_real_by_class"),
    )
    if len(few) < len(order):
        yield page.paragraph(f"The {len(few)} hardest of {len(order)} classes.", soft=True)


def neighbour_section(run: Run, pipe: DigitPipeline, metrics: dict[str, Any], judged: Judgement) -> Iterator[str]:
    """Samples beside their nearest training picture, and what that says about memorising."""
    if not judged.pairs:
        return
    found = metrics["memorising"]
    yield "<h2>Learnt by heart?</h2>"
    yield page.paragraph(found["text"])
    yield page.paragraph(
        f"Each sample (left) beside the nearest of {found['training_pictures']:,} training pictures (right), by the "
        "judge's features. The ratio is their distance over that of the training picture to its own nearest other: "
        "copies are near 0, new pictures about 1.",
        soft=True,
    )
    for kind, title in (("spread", "Any samples"), ("closest", "The closest")):
        yield f"<h3>{title}</h3>"
        yield f'<div class="pairs">{"".join(pair_figure(run, pipe, judged, pair) for pair in judged.pairs[kind])}</div>'


def pair_figure(run: Run, pipe: DigitPipeline, judged: Judgement, pair: Pair) -> str:
    """One sample beside its nearest training picture."""
    near, _ = real_images(run.source, pipe.preprocess, [pair.image])
    own = judged.samples.images[pair.sample]
    return page.figure([(own, "sample"), (near[0], "nearest training picture")], f"ratio {pair.ratio:.2f}")


def real_section(run: Run, pipe: DigitPipeline, shown: Shown) -> Iterator[str]:
    """Reconstructions, token maps and completions of real pictures."""
    eight = shown.real[:COMPLETED]
    yield "<h2>What the tokens keep of real pictures</h2>"
    yield page.paragraph("Pictures of the training set.", soft=True)
    yield page.row(eight, "picture", "strip")
    for title, images in rebuilt(pipe, eight):
        yield page.paragraph(title, soft=True)
        yield page.row(images, title, "strip")
    yield "<h3>Completions: the upper half is kept</h3>"
    yield page.row(torch.where(shown.kept, eight, torch.full_like(eight, 200)), "kept part", "strip")
    yield page.paragraph("The rest is sampled. Kept pixels stay as they are.", soft=True)
    yield page.row(shown.completed, "completion", "strip")
    if (run.out / "token_map.png").is_file():
        yield "<h3>Token maps: near codes have near colours</h3>"
        yield page.sheet(
            "token_map.png", "pictures above the maps of their tokens", (run.out / "token_map.png").read_bytes()
        )


def rebuilt(pipe: DigitPipeline, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What each kind of tokens gives back of some pictures."""
    if pipe.vq is not None:
        yield "The same through their VQ tokens.", pipe.vq.decode(pipe.vq.encode(images))
    if pipe.tokenizer is not None:
        yield "Rendered again from their discriminative tokens alone.", pipe.rerender(images)


def growth_section(run: Run) -> Iterator[str]:
    """Pictures of fixed seeds that training left, inside the page."""
    yield PREVIEW.sub(
        lambda found: page.sheet(found[1], found[2], (run.out / FOLDER / found[1]).read_bytes()), previews_html(run.out)
    )


def training_section(facts: Facts) -> Iterator[str]:
    """A chart of each model's losses."""
    charts = []
    for model, curves in facts.curves.items():
        chosen = {
            "training": curves.get("nll") or curves.get("loss") or [],
            "held-out pictures": curves.get("val_nll", []),
        }
        known = {name: curve for name, curve in chosen.items() if curve}
        unit = "nats per token" if "nll" in curves else "loss"
        charts.append(page.chart(known, model, unit))
    if any(charts):
        yield "<h2>Training</h2>"
        yield f'<div class="wide">{"".join(charts)}</div>'


def time_section(metrics: dict[str, Any]) -> Iterator[str]:
    """How long each stage took."""
    times = metrics["stage_seconds"]
    yield "<h2>Time</h2>"
    yield page.bars((name, seconds, format_duration(seconds), "") for name, seconds in times.items())
    if {"codebook", "tokens"} & set(times):
        yield page.paragraph(
            "Training by its logs; codebook and tokens by the times of their files, pauses included.", soft=True
        )


def python_lines(out: str) -> str:
    """How to use the run in a program."""
    return (
        "from digit import DigitPipeline\n"
        f"pipe = DigitPipeline.from_pretrained({out!r})\n"
        "images = pipe.generate(num=16, seed=0)                # (16, 3, H, W) uint8\n"
        'completed = pipe.complete(images, keep="left")        # own pixels on the left, sampled on the right\n'
        'pipe.push_to_hub("user/name")                         # with a model card'
    )


def across(grid: tuple[int, ...]) -> str:
    """'8 x 8'."""
    return " x ".join(map(str, grid))


def of_levels(tokenizer: object) -> str:
    """' of 2 levels' for a codebook that has several."""
    levels = levels_of(tokenizer)
    return f" of {levels} levels" if levels > 1 else ""


def model_text(cfg: SequenceConfig) -> str:
    """Kind and size of a model, and the settings that differ from their defaults."""
    kinds = {"next_token": "next-token model", "masked": "masked model", "pixels": "decoder straight to pixels"}
    size = f"{kinds.get(cfg.kind, cfg.kind)} of {cfg.depth} blocks, width {cfg.embed_dim}, {cfg.num_heads} heads"
    said = {"depth", "embed_dim", "num_heads"}
    rest = [
        f"{f.name} {getattr(cfg, f.name)}"
        for f in fields(cfg)
        if f.name not in said and getattr(cfg, f.name) != (None if f.default is MISSING else f.default)
    ]
    return ", ".join([size, *rest])


def describe(pipe: DigitPipeline) -> str:
    """A pipeline in a few lines."""

    def count(model: torch.nn.Module) -> str:
        return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"

    known = {"recipe": "recipe ", "data": "trained on "}
    made = "".join(f", {words}{pipe.info[name]}" for name, words in known.items() if pipe.info.get(name))
    lines = [f"images     {pipe.image_size} x {pipe.image_size}{made}"]
    if missing := pipe.info.get("num_unlabelled"):
        lines.append(f"labels     {missing} training images had none")
    if pipe.tokenizer is not None:
        about = pipe.tokenizer.encoder.describe()
        codes = f"{pipe.tokenizer.vocab_size} codes{of_levels(pipe.tokenizer)}"
        lines.append(f"tokenizer  {codes} on {across(pipe.tokenizer.grid)} cells")
        lines.append(
            f"encoder    {about['name']}, layer {about['layer']}, {about['dim']} features of images of "
            f"{about['input_size']} px"
        )
        if text := quality_text(pipe.tokenizer.codebook.meta):
            lines.append(f"codebook   {text}")
    for name, model in (("prior", pipe.prior), ("renderer", pipe.renderer)):
        if model is not None:
            lines.append(f"{name:<11}{count(model)}, {model_text(model.cfg)}")
    if pipe.vq is not None:
        codes = f"{pipe.vq.vocab_size} codes{of_levels(pipe.vq)} on {across(pipe.vq.grid)} cells"
        lines.append(f"vqgan      {count(pipe.vq.vqgan)}, {codes}")
    lines += [f"licence    {part}: {text}" for part, text in part_origins(pipe.tokenizer, pipe.vq, pipe.info)]
    lines.append(
        f"classes    {len(pipe.classes)}: {', '.join(pipe.classes[:12])}{' ...' if len(pipe.classes) > 12 else ''}"
    )
    return "\n".join(lines)
