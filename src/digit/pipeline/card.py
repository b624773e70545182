"""The model card of a pipeline: README.md in its folder, with samples, settings, licence and data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from digit.runtime import plots
from digit.runtime.files import atomic_path
from digit.runtime.version import __version__
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.vq import Origin, VQTokenizer

CARD, SAMPLES = "README.md", "samples.png"
PAPER = "https://arxiv.org/abs/2410.12490"
SHOWN_CLASSES = 40
PART_NAMES = {"vq": "VQ tokenizer"}
ENCODER_NOTES = {  # by the first letters of its name
    "efficientnet_lite": "EfficientNet-Lite, trained with ImageNet labels by its authors (Apache-2.0)",
    "dinov2": "DINOv2 (Apache-2.0)",
    "hf:facebook/dinov2": "DINOv2 (Apache-2.0)",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says."""

    title: str
    image_size: int
    classes: Sequence[str]
    num_classes: int
    parts: Sequence[tuple[str, str]]
    """(part, what it is)."""
    sampling: Mapping[str, Any]
    info: Mapping[str, Any]
    """Recipe and data, as the pipeline's manifest has them."""
    origins: Sequence[tuple[str, str]] = ()
    """(part that was trained elsewhere or before, its licence and data), see `part_origins`."""
    metrics: Mapping[str, Any] | None = None
    """Of the run's report."""
    licence: str | None = None
    """Of this model, as the Hub names licences (mit, cc-by-4.0); None leaves it open."""
    data: str | None = None
    """What it was trained on, and under which licence; None takes the name of the data."""
    samples_note: str = ""

    def to_markdown(self, name: str | None = None) -> str:
        """The text of README.md; `name` is OWNER/NAME on the Hub."""
        place = name or "OWNER/NAME"
        lines = [*self._front_matter(), f"# {name or self.title}", ""]
        lines += [
            f"A [DiGIT]({PAPER}) model: {self._what()}. Made with the package digit {__version__}.",
            "",
            f"![Samples]({SAMPLES})",
            "",
            *([self.samples_note, ""] if self.samples_note else []),
            "## Use",
            "",
            "```python",
            "from digit import DigitPipeline",
            f'pipe = DigitPipeline.from_pretrained("{place}")',
            f"images = pipe.generate(num=16, seed=0)          # (16, 3, {self.image_size}, {self.image_size}) uint8",
            'completed = pipe.complete(images, keep="left")  # keeps the left half, samples the right',
            "```",
            "",
            f"    digit sample --from {place} --num 64 --out samples",
            "",
            *self._classes(),
            "## Parts",
            "",
            "| part | what |",
            "|---|---|",
            *(f"| {PART_NAMES.get(part, part)} | {what} |" for part, what in self.parts),
            "",
            "## Settings",
            "",
            "Sampling, unless another setting is given:",
            "",
            "```json",
            json.dumps(self.sampling, indent=1),
            "```",
            "",
            *self._numbers(),
            "## Data and licence",
            "",
            *self._licences(),
        ]
        return "\n".join(lines).rstrip() + "\n"

    def _front_matter(self) -> list[str]:
        task = "image-to-image" if not self.sampling else "unconditional-image-generation"
        licence = [f"license: {self.licence}"] if self.licence else []
        return [
            "---",
            "library_name: digit",
            f"pipeline_tag: {task}",
            "tags:",
            "- digit",
            "- image-generation",
            *licence,
            "---",
            "",
        ]

    def _what(self) -> str:
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        return f"pictures of {self.image_size} x {self.image_size} pixels, {classes}"

    def _classes(self) -> list[str]:
        if not self.classes:
            return []
        more = f" and {len(self.classes) - SHOWN_CLASSES} more" if len(self.classes) > SHOWN_CLASSES else ""
        return [f"Classes: {', '.join(self.classes[:SHOWN_CLASSES])}{more}.", ""]

    def _numbers(self) -> list[str]:
        known = self.metrics or {}
        rows = []
        if (distance := known.get("fd_efficientnet_lite2")) is not None:
            samples, reference = known["fd_efficientnet_lite2_images"]
            rows.append(
                f"- Fréchet distance on EfficientNet-Lite2 (not FID): {distance:.0f}, {samples} samples against "
                f"{reference} training pictures"
            )
        if "recognised" in known:
            real = known.get("recognised_real")
            beside = "" if real is None else f"; of other real pictures {real:.0%}"
            rows.append(f"- Samples that a classifier takes for their class: {known['recognised']:.0%}{beside}")
        if "psnr_db" in known:
            rows.append(f"- Reconstructions: {known['psnr_db']:.1f} dB")
        if text := (known.get("memorising") or {}).get("text"):
            rows.append(f"- {text}")
        return ["## Measured", "", *rows, ""] if rows else []

    def _licences(self) -> list[str]:
        data = self.data or Path(str(self.info.get("data") or "")).name or "not stated"
        recipe = self.info.get("recipe")
        lines = [f"- Trained on: {data}" + (f" (recipe `{recipe}`)" if recipe else "")]
        lines.append(f"- Licence of these weights: {self.licence or 'not stated by their maker'}")
        lines += [f"- {part[0].upper()}{part[1:]}: {origin}" for part, origin in self.origins]
        return [*lines, "- Pictures that look like training pictures may be subject to the rights in those."]


def part_origins(
    tokenizer: DiscriminativeTokenizer | None, vq: VQTokenizer | None, info: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Licence and training data, as far as they are known, of the encoder and the VQ tokenizer: (part, text).

    `info` is the manifest's: pipelines that were converted by older versions have the VQ tokenizer's there.
    """
    found = []
    if tokenizer is not None:
        name = str(tokenizer.encoder.describe().get("name", ""))
        note = next((text for start, text in ENCODER_NOTES.items() if name.startswith(start)), "licence not recorded")
        found.append(("encoder of the discriminative tokens", f"{name}: {note}"))
    if vq is not None:
        origin, noted = vq.origin, info.get("vqgan")
        if origin == Origin() and isinstance(noted, Mapping):
            origin = Origin(**{name: str(noted.get(name, "")) for name in ("name", "licence", "data")})
        found.append(("VQ tokenizer", str(origin)))
    return found


def write_card(folder: Path, card: Card, samples: Image.Image | None, name: str | None = None) -> Path:
    """Write README.md and samples.png into a pipeline folder; returns the former's path."""
    if samples is not None:
        plots.save_png(folder / SAMPLES, samples)
    with atomic_path(folder / CARD) as temporary:
        temporary.write_text(card.to_markdown(name), encoding="utf-8")
    return folder / CARD
