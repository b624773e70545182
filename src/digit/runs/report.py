"""What a person looks at after a run: samples, reconstructions, token maps, completions, report.html, metrics.json."""

import html
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.data.crops import gather_crops
from digit.data.images import FolderSource, ImageSource, open_source
from digit.data.listing import File, Listing, kind_of
from digit.data.preprocess import PreprocessConfig
from digit.data.shapes import CLASSES, ShapesSource
from digit.errors import DigitError
from digit.metrics.frechet import count_warnings
from digit.metrics.judge import JUDGE_INPUT_SIZE, METRIC, collect_features, fd, fit_linear_classifier
from digit.models.tokenizer import first_level_vectors, levels_of
from digit.pipeline.labels import ClassPositions
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.sample_folder import read_pictures, sample
from digit.runs.codebook_quality import quality_text
from digit.runs.fit import Run
from digit.runs.previews import previews_html
from digit.runs.roles import get_role
from digit.runtime import plots
from digit.runtime.files import as_path, atomic_path, write_result
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_encoder
from digit.training.adversarial import image_psnr
from digit.training.log import read_log

SHOWN_CLASSES, PER_CLASS = 10, 10
FRESH_SEED = 1_000_003  # scenes no run trains on: the recipes render seed 0
JUDGED_SAMPLES = 500
JUDGE_TRAINING_SCENES = 2000
RECONSTRUCTED = 300
NUMBERED = re.compile(r"\d{5,}\.png")
COMPLETIONS = "completions.json"
PIXEL_LOSSES = ("l1", "perceptual", "val_l1")  # of a renderer straight to pixels, in one chart


# -------------------------------------------------------------------- pictures


def write_completions(folder: Path, images: Tensor, done: Tensor, keep: float) -> None:
    """Write one PNG a completion, grid.png with original, kept part, completion, and completions.json.

    The images of earlier completions there are removed. `require_free` tells if the folder may be written to.
    """
    for earlier in folder.glob("*.png"):
        if NUMBERED.fullmatch(earlier.name):
            earlier.unlink()
    for i, image in enumerate(done):
        plots.save_png(folder / f"{i:05d}.png", image)
    sheet = plots.interleave(images, plots.dim_below(images, keep), done)
    plots.save_png(
        folder / "grid.png", plots.grid(sheet, 9 if len(images) > 2 else 3, scale=max(1, 128 // images.shape[-1]))
    )
    write_result(folder / COMPLETIONS, {"num": len(done), "keep": keep})


def require_free(folder: Path) -> None:
    """Raise DigitError where `write_completions` would replace images that are no completions."""
    images = sorted(path.name for path in folder.glob("*.png")) if folder.is_dir() else []
    if images and not (folder / COMPLETIONS).is_file():
        raise DigitError(f"{folder} holds {images[0]} but no {COMPLETIONS}: choose another --out")


def open_images(spec: str, pixel_max: int | None = None) -> ImageSource:
    """Opens what `open_source` takes, or one image file, which is then the only image of its source."""
    path = as_path(spec)
    if not path.is_file() or kind_of(path.name) != "images":
        return open_source(spec, pixel_max=pixel_max)
    status = path.stat()
    source = FolderSource(path.parent, Listing([File(path.name, status.st_size, status.st_mtime_ns)]))
    source.find_pixel_range(pixel_max)
    return source


def load_images(source: ImageSource, preprocess: PreprocessConfig, num: int) -> Tensor:
    """The first `num` images of a source, centre-cropped -> (B, 3, S, S) uint8. A single image must be whole."""
    if len(source) == 1:
        source.read(0)  # names what is wrong with it
    return real_images(source, preprocess, range(num))[0]


def real_images(source: ImageSource, preprocess: PreprocessConfig, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Centre crops of some images -> ((B, 3, S, S) uint8, labels (B,)); broken files are left out."""
    return gather_crops(source.subset([i for i in indices if i < len(source)]), preprocess)


def spread(total: int, num: int) -> list[int]:
    """At most `num` of 0 .. total - 1, evenly apart, the ends among them."""
    return np.unique(np.linspace(0, total - 1, min(num, total)).astype(int)).tolist() if total else []


def describe(pipe: DigitPipeline) -> str:
    """A pipeline in a few lines."""

    def count(model: torch.nn.Module) -> str:
        return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"

    lines = [f"images     {pipe.image_size} x {pipe.image_size}, {pipe.info}"]
    if pipe.tokenizer is not None:
        about = pipe.tokenizer.encoder.describe()
        levels = f" of {n} levels" if (n := pipe.tokenizer.num_levels) > 1 else ""
        lines.append(f"tokenizer  {pipe.tokenizer.vocab_size} codes{levels} on {pipe.tokenizer.grid}: {about}")
        if text := quality_text(pipe.tokenizer.codebook.meta):
            lines.append(f"codebook   {text}")
    for name, model in (("prior", pipe.prior), ("renderer", pipe.renderer)):
        if model is not None:
            lines.append(f"{name:<11}{count(model)}, {model.cfg}")
    if pipe.vq is not None:
        lines.append(f"vqgan      {count(pipe.vq.vqgan)}, {pipe.vq.vocab_size} codes on {pipe.vq.grid}")
    lines.append(
        f"classes    {len(pipe.classes)}: {', '.join(pipe.classes[:12])}{' ...' if len(pipe.classes) > 12 else ''}"
    )
    return "\n".join(lines)


# -------------------------------------------------------------------- report


def num_shown(num_classes: int) -> int:
    """Samples in the report's pictures: a row for each of some classes, or as many without labels."""
    return min(num_classes or SHOWN_CLASSES, SHOWN_CLASSES) * PER_CLASS


def num_judged(num_images: int) -> int:
    """Samples that the report's distance is measured on, for a run on `num_images` images."""
    return min(JUDGED_SAMPLES, max(64, num_images))


def write_report(run: Run, pipe: DigitPipeline) -> Path:
    """Pictures, metrics.json and report.html of a finished run; returns the page's path."""
    out, metrics = run.out, {}
    shown = spread(len(pipe.classes), SHOWN_CLASSES) or None
    labels = ClassPositions([k for k in shown for _ in range(PER_CLASS)]) if shown else None
    num = num_shown(len(pipe.classes)) if labels is None else None
    images = read_pictures(sample(pipe, out / "samples", num, labels, run.recipe.seed, overwrite=True))
    names = [pipe.classes[k] for k in shown] if shown else ()
    scale = max(1, 96 // pipe.image_size)
    plots.save_png(out / "samples.png", plots.grid(images, PER_CLASS, scale=scale, row_names=names))

    real, truth = real_images(run.source, pipe.preprocess, spread(len(run.source), 16))
    write_reconstructions(pipe, real, out, scale)
    write_token_map(pipe, real[:8], out, scale)
    known = ClassPositions(truth[:8].tolist()) if pipe.classes and bool((truth[:8] >= 0).all()) else None
    done = pipe.complete(real[:8], keep=0.5, seed=run.recipe.seed, labels=known)
    write_completions(out / "completions", real[:8], done, 0.5)
    write_loss_curves(run)

    metrics |= reconstruction_metrics(pipe, run)
    metrics |= judge_metrics(run, pipe)
    metrics["training"] = {p.parent.name: json.loads(p.read_text()) for p in sorted(out.glob("*/metrics.json"))}
    metrics["codebook"] = run.fit_codebook().summary()
    metrics["machine"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(run.device),
    }
    write_result(out / "metrics.json", metrics)
    return write_page(run, pipe, metrics)


def write_reconstructions(pipe: DigitPipeline, real: Tensor, out: Path, scale: int) -> None:
    """reconstructions.png: picture, VQGAN reconstruction, the same picture rendered from its discriminative tokens."""
    rows, names = [real], ["picture"]
    if pipe.vq is not None:
        rows, names = [*rows, pipe.vq.decode(pipe.vq.encode(real))], [*names, "VQ tokens"]
    if pipe.tokenizer is not None:
        rows, names = [*rows, pipe.render(pipe.tokenizer.encode(real))], [*names, "discriminative tokens"]
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


def reconstruction_metrics(pipe: DigitPipeline, run: Run, num: int = 256) -> dict[str, Any]:
    """PSNR of the VQGAN, or of a renderer straight to pixels, and usage of the codebooks on training images."""
    real, _ = real_images(run.source, pipe.preprocess, spread(len(run.source), num))
    metrics: dict[str, Any] = {"psnr_db": float(image_psnr(reconstructed(pipe, real) / 255, real / 255).mean())}
    if pipe.vq is not None:
        metrics["vq_usage"] = len(pipe.vq.encode(real).unique()) / pipe.vq.vocab_size
    if pipe.tokenizer is not None:
        metrics["discriminative_usage"] = len(pipe.tokenizer.encode(real).unique()) / pipe.tokenizer.vocab_size
    return metrics


def reconstructed(pipe: DigitPipeline, images: Tensor) -> Tensor:
    """Images (B, 3, S, S) uint8 through the VQ tokens, or through the tokens of a renderer straight to pixels."""
    if pipe.renders_pixels:
        assert pipe.tokenizer is not None, "a run's pipeline has one"
        return pipe.render(pipe.tokenizer.encode(images))
    assert pipe.vq is not None
    return pipe.vq.decode(pipe.vq.encode(images))


# -------------------------------------------------------------------- judge


def load_judge() -> FrozenEncoder:
    """EfficientNet-Lite2: another network than the tokens' encoder, so that it does not judge its own features."""
    return load_encoder(EncoderConfig(name="efficientnet_lite2", layer="pooled", input_size=JUDGE_INPUT_SIZE))


def judge_metrics(run: Run, pipe: DigitPipeline) -> dict[str, Any]:
    """Frechet distance of samples to the run's images, and for shapes the recognised fraction of samples."""
    judge = load_judge().to(run.device)
    num = num_judged(len(run.source))
    seed = run.recipe.seed + 10_000
    if pipe.renders_pixels:
        samples = pipe.generate(num, None, seed)
    else:
        samples = pipe.decode(pipe.generate_tokens(num, None, seed)["vq"])
    sampled = collect_features(samples.split(64), judge.pooled)
    real, _ = real_images(run.source, pipe.preprocess, spread(len(run.source), 2000))
    truth = collect_features(real.split(64), judge.pooled)
    numbers = [len(sampled), len(truth)]
    metrics: dict[str, Any] = {METRIC: fd(sampled, truth), f"{METRIC}_images": numbers}
    metrics[f"{METRIC}_warnings"] = count_warnings(*numbers, dim=truth.shape[1])
    if list(pipe.classes) == list(CLASSES):
        metrics |= recognised(judge, sampled, pipe.labels(num), pipe)
    return metrics


def recognised(judge: FrozenEncoder, sampled: Tensor, labels: Tensor, pipe: DigitPipeline) -> dict[str, Any]:
    """Fraction of samples that a linear classifier, trained on freshly rendered scenes, takes for their class.

    The same for reconstructions of held-out scenes: samples made of the same tokens can hardly do better.
    """
    size = pipe.image_size
    fresh = ShapesSource(num=JUDGE_TRAINING_SCENES, size=size, seed=FRESH_SEED)
    cfg = PreprocessConfig(image_size=size, encoder_size=size, random_crop=False, flip=False)
    images, truth = real_images(fresh, cfg, range(len(fresh)))
    features = collect_features(images.split(64), judge.pooled)
    cut = len(features) * 3 // 4
    classifier = fit_linear_classifier(features[:cut], truth[:cut])
    right = classifier.predict(sampled) == labels
    held_out = images[cut:][:RECONSTRUCTED]
    decoded = collect_features(reconstructed(pipe, held_out).split(64), judge.pooled)
    return {
        "recognised": float(right.float().mean()),
        "recognised_by_class": {name: float(right[labels == k].float().mean()) for k, name in enumerate(CLASSES)},
        "recognised_reconstructions": classifier.accuracy(decoded, truth[cut:][:RECONSTRUCTED]),
        "classifier_accuracy_on_fresh_scenes": classifier.accuracy(features[cut:], truth[cut:]),
        "recognised_images": len(sampled),
    }


# -------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; }
img { max-width: 100%; image-rendering: pixelated; border-radius: 4px; }
table { border-collapse: collapse; } td { padding: .15rem 1rem .15rem 0; vertical-align: top; }
td + td { font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; padding: .6rem; border-radius: 4px;
  background: color-mix(in srgb, currentColor 8%, transparent); }
p.note { opacity: .75; margin-top: .2rem; }
"""


def write_page(run: Run, pipe: DigitPipeline, metrics: dict[str, Any]) -> Path:
    """report.html: self-contained but for the pictures beside it."""

    def picture(name: str, title: str, note: str) -> str:
        if not (run.out / name).exists():
            return ""
        return f'<h2>{title}</h2><p class="note">{note}</p><img src="{name}" alt="{title}">'

    warnings = "".join(f" Warning: {html.escape(text)}." for text in metrics[f"{METRIC}_warnings"])
    scalars = {k: v for k, v in metrics.items() if isinstance(v, int | float | str)}
    rows = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{v:.4g}</td></tr>"
        if isinstance(v, float)
        else f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>"
        for k, v in scalars.items()
    )
    body = [
        f"<h1>DiGIT: {html.escape(run.recipe.name)}</h1>",
        f"<p class='note'>{html.escape(run.source.name)}, {len(run.source)} images</p>",
        picture(
            "samples.png",
            "Samples",
            "Sampled from the prior, rendered "
            + ("straight to pixels." if pipe.renders_pixels else "by the renderer, decoded by the VQGAN.")
            + (" One row per class." if pipe.classes else ""),
        ),
        f"<h2>Metrics</h2><table>{rows}</table>",
        f"<p class='note'>{METRIC} is a Frechet distance on EfficientNet-Lite2 features; it is not FID.{warnings}</p>",
        picture(
            "reconstructions.png",
            "Reconstructions",
            ("Picture; " if pipe.vq is None else "Picture; through its VQ tokens; ")
            + "rendered again from its discriminative tokens alone.",
        ),
        picture("token_map.png", "Tokens", "Near codes have near colours."),
        picture("completions/grid.png", "Completions", "Original, the kept upper half, the completion."),
        previews_html(run.out),
        picture("loss.png", "Training", "Negative log-likelihood per token, also on held-out images if there are any."),
        picture("pixel_losses.png", "Training of the renderer", "Losses of the images, each before its weight."),
        f"<h2>Parts</h2><pre>{html.escape(describe(pipe))}</pre>",
        f"<h2>Use it</h2><pre>digit sample --from {html.escape(str(run.out))} --num 64 --out samples\n\n"
        "from digit import DigitPipeline\n"
        f"pipe = DigitPipeline.from_pretrained({html.escape(repr(str(run.out)))})\n"
        "images = pipe.generate(num=16, seed=0)</pre>",
    ]
    path = run.out / "report.html"
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>DiGIT</title><style>{STYLE}</style>"
    text = f"{head}<body>{''.join(body)}</body></html>"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
