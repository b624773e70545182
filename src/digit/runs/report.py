"""What a person looks at after a run: report.html, samples, reconstructions, token maps, completions, metrics.json."""

import json
import platform
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from digit.models.tokenizer import ImageTokenizer, first_level_vectors, levels_of
from digit.pipeline.labels import ClassPositions
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.sample_folder import read_pictures, sample
from digit.runs.fit import Run
from digit.runs.judgement import find_ways, judge_run, load_judge, reconstruct
from digit.runs.layout import PAGE
from digit.runs.pictures import real_images, write_completions
from digit.runs.report_page import COMPLETED, PER_CLASS, Shown, describe, write_page
from digit.runs.roles import ROLES, get_role
from digit.runtime import plots
from digit.runtime.files import write_result
from digit.runtime.spread import spread
from digit.training.adversarial import image_psnr
from digit.training.log import read_log

__all__ = ["describe", "load_judge", "real_images", "spread", "write_report"]

SHOWN_CLASSES = 10
JUDGED_SAMPLES = 500
SHOWN_REAL = 16
CARD_COLUMNS = 8  # of each class, on the model card
REBUILT = 256  # training pictures whose reconstructions are measured
PIXEL_LOSSES = ("l1", "perceptual", "val_l1")  # of a renderer straight to pixels, in one chart


def num_shown(num_classes: int) -> int:
    """Samples in the report's pictures: a row for each of some classes, or as many without labels."""
    return min(num_classes or SHOWN_CLASSES, SHOWN_CLASSES) * PER_CLASS


def num_judged(num_images: int) -> int:
    """Samples that the report judges, for a run on `num_images` images."""
    return min(JUDGED_SAMPLES, max(64, num_images))


def write_report(run: Run, pipe: DigitPipeline) -> Path:
    """Pictures, metrics.json and report.html of a finished run; returns the page's path.

    Takes the time of about 600 samples (twice that where guidance is compared) and of 3,000 passes of the judge.
    """
    began, out = perf_counter(), run.out
    (out / PAGE).unlink(missing_ok=True)  # without it `digit info` knows that the report is not finished
    shown = draw_pictures(run, pipe)
    scale = max(1, 96 // pipe.image_size)
    write_reconstructions(pipe, shown.real, out, scale)
    write_token_map(pipe, shown.real[:COMPLETED], out, scale)
    write_loss_curves(run)
    judged = judge_run(
        pipe,
        run.source,
        num=num_judged(len(run.source)),
        seed=run.recipe.seed + 10_000,
        held_out=[int(place) for place in run.stored_images[:: run.held_out_every]] if run.held_out_every else [],
        store=run.write_tokens(),
    )
    metrics = reconstruction_metrics(pipe, run) | judged.metrics
    metrics["training"] = {p.parent.name: json.loads(p.read_text()) for p in sorted(out.glob("*/metrics.json"))}
    metrics["codebook"] = run.fit_codebook().summary()
    metrics["machine"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(run.device),
    }
    metrics["stage_seconds"] = stage_seconds(run) | {"report": perf_counter() - began}
    write_result(out / "metrics.json", metrics)
    if (out / "pipeline").is_dir():
        rows = [row[:CARD_COLUMNS] for row in shown.samples.split(PER_CLASS)]
        pipe.write_card(out / "pipeline", metrics=metrics, samples=torch.cat(rows))
    return write_page(run, pipe, metrics, shown, judged)


def draw_pictures(run: Run, pipe: DigitPipeline) -> Shown:
    """Samples of some classes, by the pipeline's settings and the other way, and completions of real pictures."""
    out, seed = run.out, run.recipe.seed
    places = spread(len(pipe.classes), SHOWN_CLASSES)
    labels = ClassPositions([k for k in places for _ in range(PER_CLASS)]) if places else None
    num = None if places else num_shown(0)
    samples = read_pictures(sample(pipe, out / "samples", num, labels, seed, overwrite=True))
    names, scale = [pipe.classes[k] for k in places], max(1, 96 // pipe.image_size)
    plots.save_png(out / "samples.png", plots.grid(samples, PER_CLASS, scale=scale, row_names=names))
    ways, other = find_ways(pipe), None
    if ways is not None:
        other = pipe.generate(num, labels, seed, **ways.other)
        file = f"samples_{ways.names[1].replace(' ', '_')}.png"
        plots.save_png(out / file, plots.grid(other, PER_CLASS, scale=scale, row_names=names))

    real, truth = real_images(run.source, pipe.preprocess, spread(len(run.source), SHOWN_REAL))
    first, own = real[:COMPLETED], truth[:COMPLETED]
    known = ClassPositions(own.tolist()) if pipe.classes and bool((own >= 0).all()) else None
    done, kept = pipe.complete(first, keep=0.5, seed=seed, labels=known), pipe.kept_pixels(0.5)
    write_completions(out / "completions", first, done, kept, {"keep": 0.5, "seed": seed})
    return Shown(names=names, samples=samples, other_way=other, real=real, labels=truth, completed=done, kept=kept)


def write_reconstructions(pipe: DigitPipeline, real: Tensor, out: Path, scale: int) -> None:
    """reconstructions.png: picture, VQGAN reconstruction, the same picture rendered from its discriminative tokens."""
    rows, names = [real], ["picture"]
    if pipe.vq is not None:
        rows, names = [*rows, pipe.vq.decode(pipe.vq.encode(real))], [*names, "VQ tokens"]
    if pipe.tokenizer is not None:
        rows, names = [*rows, pipe.rerender(real)], [*names, "discriminative tokens"]
    plots.save_png(out / "reconstructions.png", plots.grid(torch.cat(rows), len(real), scale=scale, row_names=names))


def write_token_map(pipe: DigitPipeline, real: Tensor, out: Path, scale: int) -> None:
    """token_map.png: pictures beside the maps of their tokens; near codes have near colours."""
    rows, names = [real], ["picture"]
    for name, tokenizer in pipe.tokenizers.items():
        colours, tokens = plots.code_colours(first_level_vectors(tokenizer).cpu()), tokenizer.encode(real).cpu()
        rows.append(plots.token_maps(tokens[:, :: levels_of(tokenizer)], tokenizer.grid, colours, real.shape[-1]))
        names.append(f"{name}")
    plots.save_png(out / "token_map.png", plots.grid(torch.cat(rows), len(real), scale=scale, row_names=names))


def write_loss_curves(run: Run) -> None:
    """loss.png from every log.jsonl of the run."""
    curves: dict[str, Any] = {}
    pixels = {}
    for log in sorted(run.out.glob("*/log.jsonl")):
        for key, suffix in (("nll", ""), ("val_nll", " (held-out images)")):
            lines = [line for line in read_log(log) if key in line]
            if lines:
                curves[log.parent.name + suffix] = ([r["step"] for r in lines], [r[key] for r in lines])
        if get_role(run.recipe.model_names[1]).target == "pixels" and log.parent.name == run.recipe.model_names[1]:
            for key in PIXEL_LOSSES:
                lines = [line for line in read_log(log) if key in line]
                if lines:
                    pixels[key] = ([r["step"] for r in lines], [r[key] for r in lines])
    if curves:
        plots.curve_png(run.out / "loss.png", curves, xlabel="step", ylabel="nats per token")
    if pixels:
        plots.curve_png(run.out / "pixel_losses.png", pixels, xlabel="step", ylabel="loss of the renderer")


def reconstruction_metrics(pipe: DigitPipeline, run: Run) -> dict[str, Any]:
    """PSNR of the VQGAN, or of a renderer straight to pixels, and usage of the codebooks on training images."""
    real, _ = real_images(run.source, pipe.preprocess, spread(len(run.source), REBUILT))
    metrics: dict[str, Any] = {"psnr_db": float(image_psnr(reconstruct(pipe, real) / 255, real / 255).mean())}
    if pipe.vq is not None:
        metrics["vq_usage"] = usage(pipe.vq, real)
    if pipe.tokenizer is not None:
        metrics["discriminative_usage"] = usage(pipe.tokenizer, real)
    return metrics


def usage(tokenizer: ImageTokenizer, images: UInt8[Tensor, "B 3 S S"]) -> float:
    """Share of a tokenizer's codes, of all levels, that the images use."""
    levels = levels_of(tokenizer)
    tokens = tokenizer.encode(images).cpu().unflatten(1, (-1, levels))
    return sum(len(tokens[..., level].unique()) for level in range(levels)) / (tokenizer.vocab_size * levels)


def stage_seconds(run: Run) -> dict[str, float]:
    """Seconds of the stages that this run made: of training by its logs, of codebook and tokens by their files' times.

    The latter count pauses too, where the run was stopped in them. Stages that were reused are left out.
    """
    found: dict[str, float] = {}
    before = (run.out / "config.json").stat().st_mtime
    for stage, file in (("codebook", "codebook.json"), ("vqgan", "vqgan.json"), ("tokens", "manifest.json")):
        made = run.out / stage / file
        if stage in run.reuse or not made.is_file():
            continue
        if (seconds := made.stat().st_mtime - before) > 0:
            found[stage], before = seconds, made.stat().st_mtime
    for model in ("vqgan", *ROLES):
        log = run.out / model / "log.jsonl"
        times = [line["seconds"] for line in (read_log(log) if log.is_file() else []) if "seconds" in line]
        if times:
            found[model] = float(times[-1])
    return found
