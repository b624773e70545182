"""Pictures of fixed seeds whenever a model in training is saved, and how they grew.

OUT/previews/prior_00000400.png    after 400 updates
OUT/previews/prior_growth.png      one row of each such picture, oldest above
"""

import html
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from digit.data.crops import gather_crops
from digit.data.images import ImageSource
from digit.data.preprocess import PreprocessConfig
from digit.data.tokens import TokenStore
from digit.models.sequence import SequenceModel
from digit.models.vqgan import VQGAN
from digit.runs.recipe import Recipe
from digit.runtime import distributed, plots
from digit.runtime.files import mark_output
from digit.runtime.hardware import hardware_precision
from digit.sampling.kinds import make_sampler
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.vq import VQTokenizer

log = logging.getLogger(__name__)
FOLDER, GROWTH = "previews", "growth"
SHOWN = 8  # pictures in a row
MAX_ROWS = 8  # of the strip that shows how they grew
PATCHED = 512  # crops whose patches stand for codes
LEAST_SIDE = 96  # pixels of a shown picture
NUMBERED = re.compile(r"(?P<stage>\w+)_(?P<step>\d{8})\.png")
Rows = Mapping[str, Tensor]  # name of a row -> (SHOWN, 3, S, S) uint8
GROWN = ("sample", "VQ tokens", "its tokens")  # the row whose growth the strip shows: the first of these that is there


class PreviewedRun(Protocol):
    """What previews need of a run."""

    recipe: Recipe
    out: Path
    source: ImageSource
    device: torch.device

    def write_tokens(self) -> TokenStore: ...
    def tokenizer(self) -> DiscriminativeTokenizer: ...
    def train_vqgan(self) -> VQTokenizer: ...
    def train_model(self, name: str) -> SequenceModel: ...
    def crops_of(self, rows: np.ndarray) -> Tensor: ...
    def is_done(self, stage: str) -> bool: ...


class Previews:
    """`preview(model, step)` writes the pictures of a stage (vqgan or one of ROLES) and returns their files by name.

    A picture that would take more than the share `recipe.previews` of the time so far waits for a later save; the first
    and the last, after `num_steps` updates, never wait. Random numbers of the training are not touched. An error ends
    the previews, not the training. Only rank 0 makes any.
    """

    def __init__(self, run: PreviewedRun, stage: str, num_steps: int) -> None:
        self.run, self.stage, self.num_steps = run, stage, num_steps
        self.folder, self.share = run.out / FOLDER, run.recipe.previews
        self.started, self.spent, self.last = time.monotonic(), 0.0, 0.0
        self.made: dict[str, Any] = {}  # what stays the same from step to step

    def __call__(self, network: nn.Module, step: int) -> dict[str, Path]:
        """The pictures after `step` updates, {name in TensorBoard: file}; nothing where they would take too long."""
        if not distributed.is_main() or not self.share or self.waits(step):
            return {}
        began = time.monotonic()
        flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
        devices = [self.run.device] if self.run.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), distributed.alone():
                path = self.write(ROWS.get(self.stage, renderer_rows)(self, network.eval()), step)
        except Exception as error:  # a picture must not end hours of training
            log.warning("no more previews of %s: %s", self.stage, distributed.first_line(error))
            self.share = 0.0
            return {}
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            self.last = time.monotonic() - began
            self.spent += self.last
        return {f"previews/{self.stage}": path}

    def waits(self, step: int) -> bool:
        """Whether another picture would take more than its share of the time so far."""
        first_or_last = not self.last or step >= self.num_steps
        return not first_or_last and self.spent + self.last > self.share * (time.monotonic() - self.started)

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returned the first time."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def write(self, rows: Rows, step: int) -> Path:
        """Write one grid, and the strip of all."""
        path = self.folder / f"{self.stage}_{step:08d}.png"
        size = next(iter(rows.values())).shape[-1]
        scale = max(1, -(-LEAST_SIDE // size))
        grid = plots.grid(torch.cat([part.cpu() for part in rows.values()]), SHOWN, scale=scale, row_names=list(rows))
        plots.save_png(path, grid)
        mark_output(self.folder)
        write_growth(self.folder, self.stage, list(rows))
        return path

    # ---------------------------------------------------------------- what is shown

    @property
    def pictures(self) -> Tensor:
        """(SHOWN, 3, S, S) uint8: centre crops of pictures spread over the data."""
        return self.keep("pictures", lambda: first_crops(self.run.source, self.run.recipe.preprocess))[0]

    @property
    def picture_labels(self) -> Tensor:
        """(SHOWN,) their classes, -1 for none."""
        _ = self.pictures
        return self.made["pictures"][1]

    def labels(self, model: SequenceModel) -> Tensor:
        """(SHOWN,) classes spread over all."""
        return torch.linspace(0, max(0, model.cfg.num_classes - 1), SHOWN).round().long()

    @property
    def seeds(self) -> list[int]:
        """One for each picture, the same at every step."""
        return [self.run.recipe.seed + place for place in range(SHOWN)]

    def sampled(self, model: SequenceModel) -> Tensor:
        """(SHOWN, N) discriminative tokens of a prior."""
        settings = self.run.recipe.sampling_of(self.run.recipe.model_names[1], labelled=bool(model.cfg.num_classes))
        precision = hardware_precision(settings.precision, model.device)
        sampler = make_sampler(model, settings.prior, precision=precision, micro_batch_size=SHOWN)
        return sampler(self.seeds, labels=self.labels(model) if model.cfg.num_classes else None)

    def rendered(self, model: SequenceModel, prefix: Tensor | None, name: str, labels: Tensor) -> Tensor:
        """(SHOWN, 3, S, S) uint8 of a renderer, or of a VQ-only model; of these classes if it sees labels."""
        settings = self.run.recipe.sampling_of(name, labelled=bool(model.cfg.num_classes))
        precision = hardware_precision(settings.precision, model.device)
        sampler = make_sampler(model, settings.renderer, precision=precision, micro_batch_size=SHOWN)
        found = sampler(self.seeds, prefix=prefix, labels=labels if model.cfg.num_classes else None)
        return found if sampler.output == "images" else self.run.train_vqgan().decode(found)

    @property
    def patches(self) -> Tensor:
        """(K, 3, h, w) float: the mean patch of each code."""
        return self.keep("patches", lambda: mean_patches(self.run))


def vqgan_rows(previews: Previews, network: nn.Module) -> Rows:
    """Pictures, and what the VQGAN makes of them."""
    assert isinstance(network, VQGAN)
    vq, pictures = VQTokenizer(network), previews.pictures
    return {"picture": pictures, "VQ tokens": vq.decode(vq.encode(pictures))}


def prior_rows(previews: Previews, network: nn.Module) -> Rows:
    """Sampled tokens, each shown as the mean of the patches that have it: there is no renderer yet.

    Of several levels, the tokens of the first.
    """
    assert isinstance(network, SequenceModel)
    levels = network.cfg.levels
    grid, patches = previews.run.tokenizer().grid, previews.patches
    pictures = previews.pictures
    own = previews.keep("own", lambda: previews.run.tokenizer().encode(pictures).cpu())
    rows = {"sample": previews.sampled(network).cpu(), "picture's tokens": own}
    shown = {name: mosaic(tokens[:, ::levels], grid, patches, pictures.shape[-1]) for name, tokens in rows.items()}
    return {"sample": shown["sample"], "picture": pictures, "its tokens": shown["picture's tokens"]}


def renderer_rows(previews: Previews, network: nn.Module) -> Rows:
    """Samples from the prior's tokens, and pictures rendered again from their own; samples alone of a VQ-only model."""
    assert isinstance(network, SequenceModel)
    if not network.cfg.prefix_len:
        return {"sample": previews.rendered(network, None, previews.stage, previews.labels(network))}
    run, pictures = previews.run, previews.pictures
    own = previews.keep("own", lambda: run.tokenizer().encode(pictures).to(run.device))
    again = previews.rendered(network, own, previews.stage, previews.picture_labels)
    rows = {"picture": pictures, "its tokens": again}
    if run.is_done("prior"):
        prior = previews.keep("prior", lambda: previews.sampled(run.train_model("prior")))
        sampled = previews.rendered(network, prior, previews.stage, previews.labels(network))
        rows = {"sample": sampled} | rows
    return rows


ROWS: dict[str, Callable[[Previews, nn.Module], Rows]] = {"vqgan": vqgan_rows, "prior": prior_rows}


def first_crops(source: ImageSource, cfg: PreprocessConfig) -> tuple[Tensor, Tensor]:
    """(SHOWN, 3, S, S) uint8, centre crops of pictures spread over a source, and their labels (SHOWN,); the last is
    repeated if it has fewer."""
    images, labels = gather_crops(source, cfg, num=SHOWN)
    rows = torch.arange(SHOWN).clamp(max=len(images) - 1)
    return images[rows], labels[rows]


def mean_patches(run: PreviewedRun) -> Tensor:
    """(K, 3, h, w) float: the mean patch of each code (of several levels, of the first) over some crops; of a code that
    none has, the mean of all."""
    store, tokenizer = run.write_tokens(), run.tokenizer()
    rows = np.unique(np.linspace(0, len(store) - 1, min(PATCHED, len(store))).astype(np.int64))
    crops, tokens = run.crops_of(rows), store.batch(rows)["discriminative"][:, :: tokenizer.num_levels].flatten()
    height, width = (max(1, crops.shape[-1] // side) for side in tokenizer.grid)
    size = (tokenizer.grid[0] * height, tokenizer.grid[1] * width)
    scaled = nn.functional.interpolate(crops.float(), size=size, mode="area")
    cells = scaled.unflatten(2, (-1, height)).unflatten(4, (-1, width))  # (B, 3, rows, h, columns, w)
    patches = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # (B * N, 3, h, w)
    total = torch.zeros(tokenizer.vocab_size, 3, height, width).index_add_(0, tokens, patches)
    count = torch.bincount(tokens, minlength=tokenizer.vocab_size).view(-1, 1, 1, 1)
    return torch.where(count > 0, total / count.clamp_min(1), patches.mean(0))


def mosaic(tokens: Tensor, grid: tuple[int, int], patches: Tensor, size: int) -> Tensor:
    """Tokens (B, N) as pictures (B, 3, size, size) uint8, one patch a token."""
    cells = patches[tokens].unflatten(1, grid)  # (B, rows, columns, 3, h, w)
    whole = cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return nn.functional.interpolate(whole, size=(size, size), mode="nearest").round().clamp(0, 255).to(torch.uint8)


# -------------------------------------------------------------------- how they grew


def write_growth(folder: Path, stage: str, names: Sequence[str]) -> None:
    """One row of each of a stage's grids, the oldest above, with its number of updates.

    `names` are the rows of a grid. Below reconstructions stand the pictures that they are of.
    """
    found = spread_over(grids_of(folder, stage), MAX_ROWS)
    name = next(name for name in GROWN if name in names)
    strips = [(str(step), cut_row(path, names.index(name), len(names))) for step, path in found]
    if name != "sample":
        strips.append(("picture", cut_row(found[-1][1], names.index("picture"), len(names))))
    strips = [(title, strip) for title, strip in strips if strip.size == strips[-1][1].size]  # of one size of picture
    width, height = strips[-1][1].size
    whole = Image.new("RGB", (LABEL + width, plots.MARGIN + height * len(strips)), (plots.BACKGROUND,) * 3)
    for place, (title, strip) in enumerate(strips):
        whole.paste(strip, (LABEL, plots.MARGIN + place * height))
        plots.write_text(whole, (4, plots.MARGIN + place * height + height // 2 - 6), title)
    plots.save_png(folder / f"{stage}_{GROWTH}.png", whole)


def cut_row(path: Path, row: int, num_rows: int) -> Image.Image:
    """One row of pictures out of a grid, without its name."""
    with Image.open(path) as picture:
        sheet = picture.convert("RGB")
    cell = (sheet.height - plots.MARGIN) // num_rows
    columns = SHOWN * cell  # the pictures are square, and stand at the right
    left, top = sheet.width - plots.MARGIN - columns, plots.MARGIN + row * cell
    return sheet.crop((left, top, left + columns, top + cell))


LABEL = 56  # pixels of the column with the number of updates


def grids_of(folder: Path, stage: str) -> list[tuple[int, Path]]:
    """(updates, file) of a stage's grids, oldest first."""
    matches = [(NUMBERED.fullmatch(path.name), path) for path in folder.glob(f"{stage}_*.png")]
    return sorted((int(match["step"]), path) for match, path in matches if match and match["stage"] == stage)


def spread_over(found: Sequence[tuple[int, Path]], num: int) -> list[tuple[int, Path]]:
    """At most `num` of them, evenly apart, the first and the last among them."""
    places = np.unique(np.linspace(0, len(found) - 1, min(num, len(found))).round().astype(int)) if found else []
    return [found[int(place)] for place in places]


NOTES = {
    "vqgan": "Pictures through the VQGAN's tokens and back.",
    "prior": "Samples of the prior, each token shown as the mean of the patches that have it.",
}
RENDERER_NOTE = "Samples of fixed seeds."


def previews_html(out: Path) -> str:
    """A section of the report: how each model's pictures grew over its updates; nothing without previews."""
    figures = []
    for path in sorted((out / FOLDER).glob(f"*_{GROWTH}.png"), key=lambda path: path.stat().st_mtime):
        stage = path.name.removesuffix(f"_{GROWTH}.png")
        last = max((name for _, name in grids_of(out / FOLDER, stage)), default=path)
        title = html.escape(f"{stage.replace('_', ' ')}: a row for each save, with its number of updates")
        note = NOTES.get(stage, RENDERER_NOTE)
        figures.append(
            f'<p class="note">{title}. {note} <a href="{FOLDER}/{last.name}">All pictures of the last save</a></p>'
            f'<img src="{FOLDER}/{path.name}" alt="{title}">'
        )
    return f"<h2>How it grew</h2>{''.join(figures)}" if figures else ""
