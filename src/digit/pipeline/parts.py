"""The parts of a pipeline: whether they belong together, what they are, and how they lie in its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError
from digit.models.sequence import SequenceModel
from digit.models.tokenizer import tokens_of
from digit.pipeline.manifest import load_sequence_model, save_sequence_model
from digit.sampling.kinds import get_kind
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.encoders import FrozenEncoder
from digit.tokenizers.quantizers import load_quantizer
from digit.tokenizers.vq import VQTokenizer

PARTS = ("tokenizer", "vq", "prior", "renderer")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The four parts of a pipeline, each of which may be missing."""

    tokenizer: DiscriminativeTokenizer | None = None
    vq: VQTokenizer | None = None
    prior: SequenceModel | None = None
    renderer: SequenceModel | None = None

    @property
    def renders_pixels(self) -> bool:
        """Whether the renderer gives images, not VQ tokens."""
        return self.renderer is not None and get_kind(self.renderer.cfg.kind).sampler.output == "images"

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        for model in (self.renderer, self.prior):
            if model is not None:
                return next(model.parameters()).device
        if self.vq is not None:
            return self.vq.device
        assert self.tokenizer is not None, "a pipeline has at least one part"
        return self.tokenizer.codebook.device

    def to(self, device: torch.device) -> None:
        """Move every part to a device."""
        for part in (
            self.tokenizer and self.tokenizer.encoder,
            self.tokenizer and self.tokenizer.codebook,
            self.vq and self.vq.vqgan,
            self.prior,
            self.renderer,
        ):
            if part is not None:
                part.to(device)

    def check(self, preprocess: PreprocessConfig) -> None:
        """Raise DigitError for parts that were not trained together, or on other crops."""
        prior, renderer = self.prior and self.prior.cfg, self.renderer and self.renderer.cfg
        prefix = renderer.prefix_vocab_size if renderer else 0
        codes = self.tokenizer and self.tokenizer.vocab_size
        vq = None if self.renders_pixels else self.vq
        pairs = [
            ("renderer vocabulary", renderer and renderer.vocab_size, "VQGAN codes", vq and vq.vocab_size),
            ("prior vocabulary", prior and prior.vocab_size, "codebook entries", codes),
            ("renderer prefix vocabulary", prefix, "codebook entries", codes),
            ("renderer prefix vocabulary", prefix, "prior vocabulary", prior and prior.vocab_size),
        ]
        tokens = self.tokenizer and tokens_of(self.tokenizer)
        levels = self.tokenizer and self.tokenizer.num_levels
        prefix_len = renderer.prefix_len if renderer else 0
        pairs += [
            ("prior length", prior and prior.target_len, "discriminative tokens an image", tokens),
            ("renderer prefix length", prefix_len, "discriminative tokens an image", tokens),
            ("renderer prefix length", prefix_len, "prior length", prior and prior.target_len),
            ("classes of the prior", prior and prior.num_classes, "of the renderer", renderer and renderer.num_classes),
            ("prior levels", prior and prior.levels, "codebook levels", levels),
            ("renderer prefix levels", prefix_len and renderer and renderer.prefix_levels, "codebook levels", levels),
            ("renderer length", renderer and renderer.target_len, "VQ tokens", vq and tokens_of(vq)),
            ("renderer levels", vq and renderer and renderer.levels, "VQ levels", vq and vq.num_levels),
            ("pixels of the VQGAN", vq and vq.resolution, "of the crops", preprocess.crop_size),
            ("pixels of the renderer", getattr(renderer, "image_size", 0), "of the crops", preprocess.crop_size),
        ]
        if prior and renderer and renderer.num_classes and not prior.num_classes:
            raise DigitError(
                f"the renderer sees {renderer.num_classes} classes, the prior none: they were not trained together"
            )
        for left, first, right, second in pairs:
            if first and second and first != second:
                raise DigitError(f"{left} is {first}, {right} {second}: these parts were not trained together")

    def require(self, *names: str) -> None:
        """Raise DigitError unless the named parts are there."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            there = [name for name in PARTS if getattr(self, name) is not None]
            raise DigitError(
                f"this needs {' and '.join(missing)}, and the pipeline holds {', '.join(there) or 'nothing'} alone: "
                "add what is missing (digit convert, digit fit)"
            )

    def refuse_ignored(self, stage: str, names: Sequence[str]) -> None:
        """Raise DigitError for settings of a stage that is missing, or whose kind of model has no such setting."""
        model: SequenceModel | None = getattr(self, stage)
        if names and model is None:
            raise DigitError(f"{stage}.{names[0]} is given, but this pipeline has no {stage}: leave it out")
        taken = get_kind(model.cfg.kind).settings if model is not None else ()
        for name in names:
            if model is not None and name not in taken:
                has = f"this {stage} is {model.cfg.kind} and takes {', '.join(taken) or 'no settings'}"
                raise DigitError(f"{stage}.{name} is given, but {has}: leave it out")

    def described(self) -> list[tuple[str, str]]:
        """(name, what it is) of each part that is there."""
        found = [(name, repr(part)) for name, part in (("tokenizer", self.tokenizer), ("vq", self.vq)) if part]
        for name, model in (("prior", self.prior), ("renderer", self.renderer)):
            if model is not None:
                count = sum(p.numel() for p in model.parameters()) / 1e6
                found.append((name, f"{type(model).__name__}({model.cfg.kind}, {count:.1f} M parameters)"))
        return found

    def save(self, folder: Path) -> list[str]:
        """Write encoder/, codebook/, vqgan/, prior.* and renderer.*; returns the names of those that are there."""
        names = []
        if self.tokenizer is not None:
            self.tokenizer.encoder.save(folder / "encoder")
            self.tokenizer.codebook.save(folder / "codebook")
            names += ["encoder", "codebook"]
        if self.vq is not None:
            self.vq.save(folder / "vqgan")
            names.append("vqgan")
        for name, model in (("prior", self.prior), ("renderer", self.renderer)):
            if model is not None:
                save_sequence_model(model, folder, name)
                names.append(name)
        return names

    @classmethod
    def read(cls, folder: Path, names: Sequence[str]) -> Self:
        """Read what `save` wrote. Raises DigitError for damaged parts."""
        tokenizer = None
        if {"encoder", "codebook"} <= set(names):
            encoder, codebook = FrozenEncoder.load(folder / "encoder"), load_quantizer(folder / "codebook")
            tokenizer = DiscriminativeTokenizer(encoder, codebook)
        return cls(
            tokenizer=tokenizer,
            vq=VQTokenizer.load(folder / "vqgan") if "vqgan" in names else None,
            prior=load_sequence_model(folder, "prior") if "prior" in names else None,
            renderer=load_sequence_model(folder, "renderer") if "renderer" in names else None,
        )
