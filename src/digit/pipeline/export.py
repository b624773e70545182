"""Exports the networks of a pipeline with torch.export, so that other programs run them without this package.

    decoder.pt2          VQ tokens (B, M) int64 -> pixels (B, 3, S, S) float32, nominally 0..1
    NAME_first.pt2       labels (B,), prefix (B, P) -> logits (B, V) of token 0, and the cache
    NAME_step.pt2        token (B,), its number (1,), the cache -> logits (B, V) of the next token, and the cache
    NAME_pass.pt2        of a masked model: tokens (B, M), labels (B,), prefix (B, P) -> logits (B, M, V)
    NAME_render.pt2      of a renderer straight to pixels: prefix (B, P), noise and labels where it takes them -> pixels
    export.json          inputs and outputs of each, sizes, and how far each is from the pipeline's own result

NAME is prior or renderer. Labels are -1 where a model knows no classes; a model without prefix lacks that input. The
cache is `keys` and `values`, (depth, B, H, T, d) float32 with room for all T positions, and of an aligned prefix
`added`, (blocks, B, 1 + M, D), which steps only read. `torch.export.load` reads a file where torch alone is installed.
Filters and random numbers are not exported: they belong to the program that samples.

Shapes: B images, P prefix tokens, M target tokens, V codes, S pixels.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.pixels import PixelRenderer
from digit.models.sequence import SequenceModel
from digit.models.transformer import SteppedCache
from digit.models.vqgan import VQGAN
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime.files import as_path, atomic_path, write_result
from digit.runtime.progress import track
from digit.runtime.version import __version__

RECORD = "export.json"
TOLERANCE = 1e-4  # of an exported network against the pipeline's own, in float32
EXAMPLE, COMPARED = 2, 3  # images: of the export, and of the comparison, so that the number is not baked in
COMPARED_STEPS = 8  # tokens that are decoded for the comparison


# -------------------------------------------------------------------- what is exported


class Decoder(nn.Module):
    """VQ tokens to pixels."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__()
        self.vqgan = copy.copy(vqgan)  # without its encoder, which would fill half of the file
        self.vqgan._modules = {name: part for name, part in vqgan._modules.items() if name != "encoder"}

    def forward(self, tokens: Tensor) -> Tensor:
        return self.vqgan.decode_tokens(tokens)


class First(nn.Module):
    """The first pass of a next-token model: its conditions to the logits of token 0, and a cache with room for all."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, ...]:
        model, cfg = self.model, self.model.cfg
        x = model.embed(labels[:, None][:, :0], prefix, labels if cfg.num_classes else None)
        added, length = model.added(labels.shape[0], prefix), cfg.start_position + 1
        cache = model.new_cache(labels.shape[0])  # len() would bake the number of images in
        cache.reserve(cache.max_len)
        parts = {block: more[:, :length] for block, more in added.items()}
        y = model.transformer(x, causal=True, first=length - 1, cache=cache, added=parts)
        result = (model.head(y[:, 0]), cache.keys, cache.values)
        return (*result, torch.stack(list(added.values()))) if added else result


class Step(nn.Module):
    """One decoding step of a next-token model: a token and the cache to the logits of the next token, and the cache."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, token: Tensor, index: Tensor, keys: Tensor, values: Tensor, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        model, cfg = self.model, self.model.cfg
        x = model.embed_token(token, index)[:, None]  # (B, 1, D)
        rotations = model.transformer.rotations(keys.shape[3], keys.device)
        stored: Any = SimpleNamespace(keys=keys.clone(), values=values.clone(), rotations=rotations)
        cache = SteppedCache(stored, index + (cfg.start_position + 1), keys.shape[3])
        parts = {}
        if added is not None:
            parts = {block: added[n].index_select(1, index + 1) for n, block in enumerate(model.aligned.blocks)}
        y = model.transformer(x, causal=True, cache=cache, added=parts)
        return model.head(y[:, 0]), cache.keys, cache.values


class Pass(nn.Module):
    """One pass of a masked model."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor, prefix: Tensor | None = None) -> Tensor:
        model, cfg = self.model, self.model.cfg
        x = model.embed(tokens, prefix, labels if cfg.num_classes else None)
        added = model.added(tokens.shape[0], prefix)
        return model.head(model.transformer(x, causal=False, first=cfg.start_position + 1, added=added))


class Render(nn.Module):
    """A renderer straight to pixels."""

    def __init__(self, model: PixelRenderer) -> None:
        super().__init__()
        self.model = model

    def forward(self, prefix: Tensor, noise: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.model.render(prefix, noise, labels)


@dataclass(frozen=True)
class Exported:
    """One network to export, with inputs by name."""

    file: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    batched: dict[str, int]
    """Which axis of each input counts the images."""


# -------------------------------------------------------------------- export


@torch.no_grad()
def export_pipeline(pipe: DigitPipeline, folder: str | Path) -> dict[str, float]:
    """Write the files that this module's text lists; returns {file: largest difference from the pipeline's result}.

    Each file is read again and compared on another number of images. Raises DigitError where torch cannot export a
    network, and where a file differs by more than TOLERANCE.
    """
    folder, found, about = as_path(folder), {}, {}
    entries = list(networks(pipe))
    if not entries:
        pipe.require("vq")
    folder.mkdir(parents=True, exist_ok=True)
    for entry in track(entries, "export"):
        save(entry, folder / entry.file)
        about[entry.file] = {
            "inputs": {name: shape(x, entry.batched.get(name)) for name, x in entry.inputs.items()},
            "outputs": list(entry.outputs),
        }
    for file, difference in compare(pipe, folder):
        found[file] = max(found.get(file, 0.0), difference)
        about[file]["largest_difference"] = found[file]
        if not found[file] <= TOLERANCE:  # NaN too
            raise DigitError(
                f"{folder / file} differs from the pipeline by {difference:.2g}: this torch exports it wrongly"
            )
    sizes = {
        name: {"prefix_len": m.cfg.prefix_len, "target_len": m.cfg.target_len, "vocab_size": m.cfg.vocab_size}
        | {"num_classes": m.cfg.num_classes, "masked": m.cfg.masked}
        for name, m in (("prior", pipe.prior), ("renderer", pipe.renderer))
        if m is not None
    }
    record = {"version": __version__, "torch": torch.__version__, "device": str(pipe.device), "files": about}
    write_result(
        folder / RECORD, record | {"models": sizes, "classes": list(pipe.classes), "image_size": pipe.image_size}
    )
    return found


def networks(pipe: DigitPipeline, num: int = EXAMPLE) -> Iterator[Exported]:
    """What there is to export, with examples of `num` images."""
    device = pipe.device
    if pipe.vq is not None:
        vqgan = pipe.vq.vqgan
        tokens = numbers((num, vqgan.cfg.num_tokens), vqgan.cfg.vocab_size, device)
        yield Exported("decoder.pt2", Decoder(vqgan), {"tokens": tokens}, ("pixels",), {"tokens": 0})
    for name, model in (("prior", pipe.prior), ("renderer", pipe.renderer)):
        if model is None:
            continue
        cfg, conditions = model.cfg, conditions_of(model, num)
        if cfg.levels > 1:
            raise DigitError(f"the {name} predicts {cfg.levels} codes at each position, which are not exported yet")
        if isinstance(model, PixelRenderer):
            inputs = {"prefix": conditions["prefix"]}
            if model.cfg.noise_channels:
                inputs["noise"] = torch.randn(num, *model.cfg.noise_shape, device=device)
            if cfg.num_classes:
                inputs["labels"] = conditions["labels"]
            yield Exported(f"{name}_render.pt2", Render(model), inputs, ("pixels",), dict.fromkeys(inputs, 0))
        elif cfg.masked:
            inputs = {"tokens": numbers((num, cfg.target_len), cfg.vocab_size + 1, device)} | conditions
            yield Exported(f"{name}_pass.pt2", Pass(model), inputs, ("logits",), dict.fromkeys(inputs, 0))
        else:
            first, kept = First(model), ("keys", "values", *(("added",) if cfg.aligned else ()))
            yield Exported(f"{name}_first.pt2", first, conditions, ("logits", *kept), dict.fromkeys(conditions, 0))
            cache = dict(zip(kept, first(**conditions)[1:], strict=True))
            index = torch.zeros(1, dtype=torch.int64, device=device)
            inputs = {"token": numbers((num,), cfg.vocab_size, device), "index": index} | cache
            batched = {"token": 0} | dict.fromkeys(kept, 1)
            yield Exported(f"{name}_step.pt2", Step(model), inputs, ("logits", "keys", "values"), batched)


def conditions_of(model: SequenceModel, num: int) -> dict[str, Tensor]:
    """Labels, and where the model has one a prefix, for `num` images."""
    cfg = model.cfg
    labels = numbers((num,), cfg.num_classes, model.device) if cfg.num_classes else torch.full((num,), -1)
    found = {"labels": labels.to(model.device)}
    if cfg.prefix_len:
        found["prefix"] = numbers((num, cfg.prefix_len), cfg.prefix_vocab_size, model.device)
    return found


def numbers(shape: tuple[int, ...], below: int, device: torch.device) -> Tensor:
    """Integers 0 .. below - 1, always the same."""
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(len(shape))).to(device)


def shape(x: Tensor, axis: int | None) -> list[Any]:
    """Shape and type of an input, "B" where it counts the images."""
    return [
        *("B" if place == axis else size for place, size in enumerate(x.shape)),
        str(x.dtype).removeprefix("torch."),
    ]


def save(entry: Exported, path: Path) -> None:
    """Export one network and write it. Raises DigitError where torch cannot."""
    images = torch.export.Dim("images", min=1, max=2**16)
    shapes = {name: {axis: images} if (axis := entry.batched.get(name)) is not None else None for name in entry.inputs}
    try:
        program = torch.export.export(entry.module.eval(), (), entry.inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises its own, of many kinds
        reason = " ".join(str(error).split())[:200]
        raise DigitError(f"torch {torch.__version__} cannot export {entry.file} ({reason})") from error
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.export.save(program, file)


# -------------------------------------------------------------------- comparison


def compare(pipe: DigitPipeline, folder: Path) -> Iterator[tuple[str, float]]:
    """(file, largest difference from the pipeline's own network) of every file."""
    for entry in networks(pipe, COMPARED):
        if entry.file.endswith(("_first.pt2", "_step.pt2")):
            continue
        yield entry.file, difference(load(folder / entry.file)(**entry.inputs), entry.module(**entry.inputs))
    for name, model in (("prior", pipe.prior), ("renderer", pipe.renderer)):
        if model is not None and not model.cfg.masked and not isinstance(model, PixelRenderer):
            yield from compare_steps(model, folder, name)


def compare_steps(model: SequenceModel, folder: Path, name: str) -> Iterator[tuple[str, float]]:
    """Decoding by the two files against the model's pass over the whole sequence."""
    cfg, conditions = model.cfg, conditions_of(model, COMPARED)
    target = numbers((COMPARED, cfg.target_len), cfg.vocab_size, model.device)
    known = {"labels": conditions["labels"]} if cfg.num_classes else {}
    expected = model(target, conditions.get("prefix"), **known)  # (B, M, V)
    first, step = load(folder / f"{name}_first.pt2"), load(folder / f"{name}_step.pt2")
    logits, keys, values, *added = first(**conditions)
    yield f"{name}_first.pt2", difference(logits, expected[:, 0])
    worst = 0.0
    for index in range(min(COMPARED_STEPS, cfg.target_len - 1)):
        more = {"added": added[0]} if added else {}
        place = torch.tensor([index], device=model.device)
        logits, keys, values = step(token=target[:, index], index=place, keys=keys, values=values, **more)
        worst = max(worst, difference(logits, expected[:, index + 1]))
    yield f"{name}_step.pt2", worst


def load(path: Path) -> Any:
    """A file as a module."""
    return torch.export.load(str(path)).module()


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference."""
    return float((found - expected).abs().max())
