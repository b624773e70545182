"""The command line and the Python lines that give what the page shows."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any


def changed(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each stage that differ from the recipe's, {"prior": {"top_k": 100}}."""
    found = {}
    for stage in ("prior", "renderer"):
        own, recipe = settings.get(stage) or {}, defaults.get(stage) or {}
        if differing := {name: value for name, value in own.items() if value != recipe.get(name)}:
            found[stage] = differing
    return found


def options(changes: Mapping[str, Mapping[str, Any]], batch_size: int) -> list[str]:
    """The changes as words of a command line."""
    words = ["--batch_size", str(batch_size)]
    for stage, values in changes.items():
        for name, value in values.items():
            words += [f"--{stage}.{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def keywords(changes: Mapping[str, Mapping[str, Any]], batch_size: int) -> str:
    """The changes as keywords of a Python call, after the other arguments."""
    return "".join(f", {stage}={dict(values)!r}" for stage, values in changes.items()) + f", batch_size={batch_size}"


def quoted_labels(labels: Sequence[str]) -> str:
    """Names of classes between commas, as --labels takes them."""
    return ",".join(labels)


def opening(run: str) -> str:
    """The Python lines that open the pipeline."""
    return f"from digit import DigitPipeline\npipe = DigitPipeline.from_pretrained({run!r})\n"


def draw(
    run: str, *, num: int, seed: int, labels: Sequence[str], changes: Mapping[str, Any], batch_size: int
) -> dict[str, str]:
    """The same pictures by `digit sample` and `DigitPipeline.generate`."""
    words = ["digit", "sample", "--from", run, "--num", str(num), "--seed", str(seed)]
    words += ["--labels", quoted_labels(labels)] if labels else []
    given = f", labels={list(labels)!r}" if labels else ""
    python = f"images = pipe.generate({num}{given}, seed={seed}{keywords(changes, batch_size)})"
    return {
        "shell": shlex.join([*words, *options(changes, batch_size), "--out", "samples"]),
        "python": f"{opening(run)}{python}  # ({num}, 3, H, W) uint8",
    }


def complete(
    run: str, *, keep: Sequence[Sequence[bool]], num: int, seed: int, label: str | None, changes: Mapping[str, Any],
    batch_size: int,
) -> dict[str, str]:  # fmt: skip
    """The same proposals in Python; the command line where whole first rows are kept."""
    rows = [[int(cell) for cell in row] for row in keep]
    given = f", label={label!r}" if label else ""
    python = (
        f"{opening(run)}import torch\nfrom PIL import Image\nfrom digit.pipeline.cells import fill_cells\n"
        f"keep = torch.tensor({rows}).bool()\n"
        f'done = fill_cells(pipe, Image.open("picture.png"), keep, num={num}, seed={seed}{given}'
        f"{keywords(changes, batch_size)})\ndone.blended  # ({num}, 3, H, W) uint8"
    )
    found = {"python": python}
    whole = [all(row) for row in keep]
    kept = sum(whole)
    if 0 < kept < len(keep) and all(whole[:kept]) and not any(map(any, keep[kept:])):
        words = ["digit", "complete", "picture.png", "--from", run, "--keep", f"{kept / len(keep):g}"]
        words += ["--seed", str(seed)] + (["--labels", label] if label else [])
        found["shell"] = shlex.join([*words, *options(changes, batch_size), "--out", "completed"])
    return found


def tokens(run: str, tokenizers: Sequence[str]) -> dict[str, str]:
    """The tokens of a picture by each of these tokenizers, in Python."""
    calls = {
        "discriminative": "pipe.tokenizer.encode(image)  # (1, N) discriminative tokens",
        "vq": "pipe.vq.encode(image)  # (1, M) VQ tokens",
    }
    python = (
        f"{opening(run)}from PIL import Image\nfrom digit.data.preprocess import fit_batch\n"
        'image = fit_batch([Image.open("picture.png")], pipe.image_size, pipe.preprocess.fit)\n'
    )
    return {"python": python + "\n".join(calls[name] for name in tokenizers)}


def render(run: str, *, seed: int, label: str | None, changes: Mapping[str, Any], batch_size: int) -> dict[str, str]:
    """A picture from discriminative tokens, in Python; of a class where the renderer sees it."""
    of_class = "" if label is None else f", labels={label!r}"
    given = f"seed={seed}{of_class}{keywords(changes, batch_size)}"
    return {"python": f"{opening(run)}image = pipe.render(tokens, {given})  # tokens: (1, N) integers"}


def vary(run: str, *, num: int, seed: int, changes: Mapping[str, Any], batch_size: int) -> dict[str, str]:
    """Variations of a picture, by `digit vary` and in Python."""
    given = f"num={num}, seed={seed}{keywords(changes, batch_size)}"
    python = (
        f"{opening(run)}from PIL import Image\nfrom digit.pipeline.variations import vary\n"
        f'images = vary(pipe, [Image.open("picture.png")], {given})  # ({num}, 3, H, W) uint8'
    )
    words = ["digit", "vary", "picture.png", "--from", run, "--each", str(num), "--seed", str(seed)]
    return {"shell": shlex.join([*words, *options(changes, batch_size), "--out", "varied"]), "python": python}


def stability(run: str, data: str, snr: float, seed: int, tokenizers: Sequence[str]) -> dict[str, str]:
    """The whole curve by `digit stability`, and one strength of noise in Python."""
    name = "tokenizer" if "discriminative" in tokenizers else "vq"
    python = (
        f"{opening(run)}from digit.metrics.stability import StabilityConfig, add_noise\n"
        f"noisy = add_noise(image, {snr:g}, cfg=StabilityConfig(seed={seed}))  # image: (1, 3, H, W) uint8\n"
        f"changed = pipe.{name}.encode(noisy) != pipe.{name}.encode(image)"
    )
    words = ["digit", "stability", data, "--from", run, "--num", "1000", "--out", f"{run}/stability"]
    return {"shell": shlex.join(words), "python": python}
