"""DigitPipeline: label or picture -> discriminative tokens -> VQ tokens -> pixels (paper, Figure 2 and section 4.3).

    stage 1   [label or start] -> prior -> discriminative tokens (B, N)
    stage 2   [discriminative tokens | start] -> renderer -> VQ tokens (B, M) -> VQGAN decoder -> pixels

A pipeline without prior is a baseline of the paper: its renderer models VQ tokens alone ("VQ only").
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.data.preprocess import PreprocessConfig, fit_batch
from digit.errors import DigitError
from digit.files import load_tensors, read_json, save_tensors, write_json
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.progress import Progress
from digit.sampling.autoregressive import generate
from digit.sampling.masked import generate_masked
from digit.tokenizers.base import ImageTokenizer
from digit.tokenizers.discriminative import Codebook, DiscriminativeTokenizer
from digit.tokenizers.encoders import FrozenEncoder
from digit.tokenizers.vq import VQTokenizer

FORMAT_VERSION = 1
MANIFEST = "pipeline.json"
PARTS = ("tokenizer", "vq", "prior", "renderer")
CPU_PASS, CPU_PASS_OF_LARGE = 64, 16  # images through a model at a time; a short pass costs as much as a full one
LARGE = 50e6  # parameters: from here on two images should not pay for 64


@dataclass(frozen=True, kw_only=True)
class StageSampling:
    """How one stage draws its tokens."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all (paper, A.3: 200 base, 400 large for the prior)."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this probability (paper, A.3: 0.8 for the renderer)."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 is off, as in the paper. Needs a model trained with label or prefix dropout."""
    num_steps: int = 8
    """Iterations of a masked model (MaskGIT)."""
    choice_temperature: float = 4.5
    """Gumbel noise on the confidence of a masked model, annealed to 0."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How both stages draw, and how many images at a time."""

    prior: StageSampling = field(default_factory=lambda: StageSampling(top_k=200))
    """Stage 1."""
    renderer: StageSampling = field(default_factory=lambda: StageSampling(top_p=0.8))
    """Stage 2."""
    batch_size: int = 64
    """Images drawn together. An image depends on its seed and label, not on its neighbours; another batch_size may
    round differently and so, rarely, change a token."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 (faster; an image may then differ between machines)."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DigitError(f"batch_size is {self.batch_size}: at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise DigitError(f"precision is {self.precision!r}: choose fp32 or bf16")


class DigitPipeline:
    """Tokenizer, prior, renderer and VQGAN of one image space. Parts may be missing; what needs them says so.

    Attributes:
        tokenizer: discriminative tokenizer, `encode((B, 3, H, W) uint8) -> (B, N) int64`; None if VQ-only.
        vq: VQ tokenizer, `encode(images) -> (B, M) int64`, `decode((B, M)) -> (B, 3, H, W) uint8`.
        prior: stage 1, `prior(tokens (B, N), labels=None) -> (B, N, K)` next-token logits; None in a VQ-only baseline.
        renderer: stage 2, `renderer(vq_tokens (B, M), prefix=tokens) -> (B, M, V)`.
        classes: class names; empty where the pipeline is unconditional or the classes have no names.
    """

    def __init__(
        self,
        *,
        tokenizer: DiscriminativeTokenizer | None = None,
        vq: VQTokenizer | None = None,
        prior: SequenceModel | None = None,
        renderer: SequenceModel | None = None,
        preprocess: PreprocessConfig,
        classes: Sequence[str] = (),
        sampling: SamplingConfig | None = None,
        info: dict[str, Any] | None = None,
    ):
        self.tokenizer, self.vq, self.prior, self.renderer = tokenizer, vq, prior, renderer
        self.preprocess, self.classes, self.info = preprocess, list(classes), dict(info or {})
        self.sampling = sampling or SamplingConfig()
        for model in (prior, renderer):
            if model is not None:
                model.eval().requires_grad_(False)
        self._check()

    def _check(self) -> None:
        prior, renderer = self.prior and self.prior.cfg, self.renderer and self.renderer.cfg
        prefix = renderer.prefix_vocab_size if renderer else 0
        codes = self.tokenizer and self.tokenizer.vocab_size
        pairs = [
            ("renderer vocabulary", renderer and renderer.vocab_size, "VQGAN codes", self.vq and self.vq.vocab_size),
            ("prior vocabulary", prior and prior.vocab_size, "codebook entries", codes),
            ("renderer prefix vocabulary", prefix, "codebook entries", codes),
            ("renderer prefix vocabulary", prefix, "prior vocabulary", prior and prior.vocab_size),
        ]
        tokens = self.tokenizer and math.prod(self.tokenizer.grid)
        prefix_len = renderer.prefix_len if renderer else 0
        pairs += [
            ("prior length", prior and prior.target_len, "discriminative tokens an image", tokens),
            ("renderer prefix length", prefix_len, "discriminative tokens an image", tokens),
            ("renderer prefix length", prefix_len, "prior length", prior and prior.target_len),
            ("renderer length", renderer and renderer.target_len, "VQ tokens", self.vq and math.prod(self.vq.grid)),
        ]
        for left, got, right, wanted in pairs:
            if got and wanted and got != wanted:
                raise DigitError(f"{left} is {got}, {right} {wanted}: these parts were not trained together")

    def require(self, *names: str) -> None:
        """Raise DigitError unless the named parts are there (tokenizer, vq, prior, renderer)."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            there = [name for name in PARTS if getattr(self, name) is not None]
            raise DigitError(
                f"this needs {' and '.join(missing)}, and the pipeline holds {', '.join(there) or 'nothing'} alone: "
                "add what is missing (digit convert, digit fit)"
            )

    def _require_drawing(self) -> SequenceModel:
        """Whatever drawing needs; returns the model that draws first."""
        self.require("vq", "renderer")
        if not self.renderer.cfg.prefix_len:
            return self.renderer
        self.require("prior")
        return self.prior

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        for model in (self.renderer, self.prior):
            if model is not None:
                return next(model.parameters()).device
        return self.vq.device if self.vq else self.tokenizer.codebook.centroids.device

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.preprocess.image_size

    @property
    def tokenizers(self) -> dict[str, ImageTokenizer]:
        """Every image tokenizer of the pipeline by name."""
        named = {"discriminative": self.tokenizer, "vq": self.vq}
        return {name: tokenizer for name, tokenizer in named.items() if tokenizer is not None}

    def to(self, device: str | torch.device) -> Self:
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
        return self

    # ---------------------------------------------------------------- drawing

    def generate(
        self, num: int | None = None, labels: Sequence[int] | int | None = None, seed: int = 0, **sampling: Any
    ) -> Tensor:
        """Draw images -> (num, 3, H, W) uint8. Image i depends on `seed + i` and its label alone, whatever the batch.

        Args:
            num: how many; by default one a label.
            labels: class numbers, repeated in turn up to `num`; None draws all classes evenly.
            seed: of the first image.
            sampling: changes to `SamplingConfig`, e.g. `prior={"top_k": 100}, batch_size=16`.

        Raises DigitError for a label out of range, or labels given to an unconditional model.
        """
        return self.decode(self.generate_tokens(num, labels, seed, **sampling)["vq"])

    def generate_tokens(
        self, num: int | None = None, labels: Sequence[int] | int | None = None, seed: int = 0, **sampling: Any
    ) -> dict[str, Tensor]:
        """As `generate`, before pixels: {"disc": (num, N) (with a prior), "vq": (num, M), "labels": (num,)} int64."""
        wanted = self._labels(num, labels)
        seeds = [seed + i for i in range(len(wanted))]
        return self._draw(seeds, wanted, given_disc=None, given_vq=None, cfg=self._sampling(sampling))

    def complete(
        self,
        images: Tensor,
        keep: float = 0.5,
        seed: int = 0,
        labels: Sequence[int] | int | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Keep the first rows of each picture and draw the rest (paper, section 4.5) -> (B, 3, H, W) uint8.

        Args:
            images: (B, 3, H, W) uint8; resized to the short side and centre-cropped where the size differs.
            keep: fraction of the rows kept, in (0, 1]; rounded to whole rows of each token grid.
            seed: of the first image.
            labels: class numbers; None takes for each picture the class under which its tokens are likeliest.

        Note: the kept tokens were computed from the whole picture, as in the paper, so an encoder with a wide field
        of view lets some of the hidden part through.
        """
        if self._require_drawing() is self.prior:
            self.require("tokenizer")
        if not 0 < keep <= 1:
            raise DigitError(f"keep is {keep}: it is a fraction of the rows, above 0 and at most 1")
        images = fit_batch(images, self.image_size)
        num = len(images)
        wanted = self._labels(num, labels) if labels is not None else self.guess_labels(images)
        given = {
            name: tokenizer.encode(images)[:, : kept_tokens(tokenizer.grid, keep)]
            for name, tokenizer in self.tokenizers.items()
        }
        drawn = self._draw(
            [seed + i for i in range(num)],
            wanted,
            given_disc=given.get("discriminative"),
            given_vq=given["vq"],
            cfg=self._sampling(sampling),
        )
        return self.decode(drawn["vq"])

    @torch.inference_mode()
    def guess_labels(self, images: Tensor) -> Tensor:
        """Classes (B,) int64 by the model's own likelihood of the tokens (Bayes, equal priors); -1 without classes.

        A class-conditional model trained without label dropout never saw the plain start symbol, so that completing
        without a class would start from noise.
        """
        first = self._require_drawing()
        if not first.cfg.num_classes:
            return torch.full((len(images),), -1)
        if first.cfg.masked:
            raise DigitError("a masked model gives no likelihood to tell classes by: give labels")
        if first is self.prior:
            self.require("tokenizer")
        tokens = (self.tokenizer if first is self.prior else self.vq).encode(images).to(self.device)  # (B, N)
        scores = torch.empty(len(tokens), first.cfg.num_classes)
        for label in range(first.cfg.num_classes):
            for rows in torch.arange(len(tokens)).split(self.sampling.batch_size):
                logits = first(tokens[rows], labels=torch.full((len(rows),), label, device=self.device))
                nll = F.cross_entropy(logits.transpose(1, 2).float(), tokens[rows], reduction="none")
                scores[rows, label] = -nll.sum(1).cpu()
        return scores.argmax(1)

    def decode(self, vq_tokens: Tensor) -> Tensor:
        """VQ tokens (B, M) -> pixels (B, 3, H, W) uint8."""
        self.require("vq")
        return self.vq.decode(vq_tokens)

    def render(self, tokens: Tensor, seed: int = 0, **sampling: Any) -> Tensor:
        """Stage 2 alone: discriminative tokens (B, N) -> (B, 3, H, W) uint8."""
        return self.decode(self.render_tokens(tokens, seed, **sampling))

    def render_tokens(self, tokens: Tensor, seed: int = 0, **sampling: Any) -> Tensor:
        """As `render`, before pixels: (B, N) -> VQ tokens (B, M) int64."""
        self.require("vq", "renderer")
        if not self.renderer.cfg.prefix_len:
            raise DigitError("this pipeline is VQ-only: its renderer takes no discriminative tokens")
        seeds, labels = [seed + i for i in range(len(tokens))], torch.full((len(tokens),), -1)
        return self._draw(seeds, labels, given_disc=tokens, given_vq=None, cfg=self._sampling(sampling))["vq"]

    def _draw(
        self,
        seeds: list[int],
        labels: Tensor,
        *,
        given_disc: Tensor | None,
        given_vq: Tensor | None,
        cfg: SamplingConfig,
    ) -> dict[str, Tensor]:
        disc, vq = [], [torch.empty(0, self.renderer.cfg.target_len, dtype=torch.int64)]
        with Progress("sample", len(seeds)) as bar:
            for start in range(0, len(seeds), cfg.batch_size):
                chunk = slice(start, start + cfg.batch_size)
                prefix = None
                if self.renderer.cfg.prefix_len and self.prior is None:
                    prefix = given_disc[chunk].to(self.device)
                elif self.renderer.cfg.prefix_len:
                    given = None if given_disc is None else given_disc[chunk]
                    prefix = self._stage(self.prior, seeds[chunk], None, labels[chunk], given, cfg.prior, cfg)
                if prefix is not None:
                    disc.append(prefix.cpu())
                given = None if given_vq is None else given_vq[chunk]
                vq.append(
                    self._stage(self.renderer, seeds[chunk], prefix, labels[chunk], given, cfg.renderer, cfg).cpu()
                )
                bar.update(len(seeds[chunk]))
        return ({"disc": torch.cat(disc)} if disc else {}) | {"vq": torch.cat(vq), "labels": labels}

    def _stage(
        self,
        model: SequenceModel,
        seeds: list[int],
        prefix: Tensor | None,
        labels: Tensor,
        given: Tensor | None,
        how: StageSampling,
        cfg: SamplingConfig,
    ) -> Tensor:
        common: dict[str, Any] = dict(
            seeds=seeds,
            prefix=prefix,
            labels=labels.to(self.device) if model.cfg.num_classes else None,
            given=None if given is None else given.to(self.device),
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            cfg_scale=how.cfg_scale,
            dtype=torch.bfloat16 if cfg.precision == "bf16" else None,
            pass_size=pass_size(model, cfg.batch_size),
        )
        if model.cfg.masked:
            return generate_masked(model, num_steps=how.num_steps, choice_temperature=how.choice_temperature, **common)
        return generate(model, **common)

    def _labels(self, num: int | None, labels: Sequence[int] | int | None) -> Tensor:
        if num is None:
            num = 1 if labels is None or isinstance(labels, int) else len(labels)
        if num < 1:
            raise DigitError(f"num is {num}: at least 1 image")
        known = self._require_drawing().cfg.num_classes
        if labels is None:
            chosen = range(known) if known else [-1]
        else:
            chosen = [labels] if isinstance(labels, int) else list(labels)
            if not known:
                raise DigitError("labels were given, but this model is unconditional: leave them out")
            if not chosen:
                raise DigitError("labels is empty: give at least one class number")
        for label in chosen:
            if known and not 0 <= label < known:
                raise DigitError(f"label {label} is out of range: this model knows classes 0 to {known - 1}")
        return torch.tensor([chosen[i % len(chosen)] for i in range(num)])

    def _sampling(self, changes: dict[str, Any]) -> SamplingConfig:
        changes = dict(changes)
        for stage in ("prior", "renderer"):
            if isinstance(changes.get(stage), dict):
                changes[stage] = replace(getattr(self.sampling, stage), **changes[stage])
        return replace(self.sampling, **changes)

    # ---------------------------------------------------------------- folder

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write JSON and safetensors: pipeline.json, encoder/, codebook/, vqgan/, prior.*, renderer.*."""
        folder, parts = Path(folder), []
        if self.tokenizer is not None:
            self.tokenizer.encoder.save(folder / "encoder")
            self.tokenizer.codebook.save(folder / "codebook")
            parts += ["encoder", "codebook"]
        if self.vq is not None:
            self.vq.save(folder / "vqgan")
            parts.append("vqgan")
        for name, model in (("prior", self.prior), ("renderer", self.renderer)):
            if model is not None:
                save_sequence_model(model, folder, name)
                parts.append(name)
        write_manifest(folder, parts, self.preprocess, self.classes, self.sampling, self.info)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read a pipeline folder, or a run folder of `digit fit`. Raises DigitError where it is missing or damaged."""
        folder = find_pipeline(folder)
        manifest = read_json(folder / MANIFEST)
        try:
            return cls._read(folder, manifest).to(device)
        except (KeyError, TypeError, AttributeError) as error:
            raise DigitError(f"{folder / MANIFEST} is damaged ({error!r}): make the pipeline again") from error

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any]) -> Self:
        if manifest.get("format") != FORMAT_VERSION:
            raise DigitError(
                f"{folder} has format {manifest.get('format')}, this version reads {FORMAT_VERSION}: update digit"
            )
        parts, tokenizer = manifest["parts"], None
        if {"encoder", "codebook"} <= set(parts):
            encoder, codebook = FrozenEncoder.load(folder / "encoder"), Codebook.load(folder / "codebook")
            tokenizer = DiscriminativeTokenizer(encoder, codebook)
        return cls(
            tokenizer=tokenizer,
            vq=VQTokenizer.load(folder / "vqgan") if "vqgan" in parts else None,
            prior=load_sequence_model(folder, "prior") if "prior" in parts else None,
            renderer=load_sequence_model(folder, "renderer") if "renderer" in parts else None,
            preprocess=PreprocessConfig(**manifest["preprocess"]),
            classes=manifest["classes"],
            sampling=read_sampling(manifest["sampling"]),
            info=manifest["info"],
        )


def vq_only_baseline(folder: str | Path, pipe: DigitPipeline) -> DigitPipeline | None:
    """The paper's VQ-only baseline of a run (`digit train vq_ar`), over the VQGAN of its pipeline; None without one."""
    model = Path(folder) / "vq_ar"
    if not (model / "model.json").is_file():
        return None
    renderer = load_sequence_model(model, "model").to(pipe.device)
    return DigitPipeline(vq=pipe.vq, renderer=renderer, preprocess=pipe.preprocess, classes=pipe.classes)


def read_sampling(saved: dict[str, Any]) -> SamplingConfig:
    """The SamplingConfig of a manifest."""
    return SamplingConfig(**saved | {stage: StageSampling(**saved[stage]) for stage in ("prior", "renderer")})


def write_manifest(
    folder: Path,
    parts: Sequence[str],
    preprocess: PreprocessConfig,
    classes: Sequence[str],
    sampling: SamplingConfig,
    info: dict[str, Any],
) -> None:
    """Write pipeline.json, last: a folder with a manifest is whole."""
    content = {"format": FORMAT_VERSION, "parts": list(parts), "preprocess": asdict(preprocess)}
    content |= {"classes": list(classes), "sampling": asdict(sampling), "info": info}
    write_json(folder / MANIFEST, content)


def pass_size(model: SequenceModel, batch_size: int) -> int:
    """Images of a batch that go through `model` at a time: all on a GPU, on a CPU what its cache holds.

    No function of how many are asked for, so that an image stays the same.
    """
    if model.positions.device.type != "cpu":
        return batch_size
    large = sum(p.numel() for p in model.parameters()) > LARGE
    return min(batch_size, CPU_PASS_OF_LARGE if large else CPU_PASS)


def choose_device(name: str | None) -> torch.device:
    """cuda where there is one, or the named device. Raises DigitError where it is not to be had."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DigitError(f"no device named {name!r}: choose cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DigitError("device is cuda, but torch sees no GPU: choose cpu")
    return device


def kept_tokens(grid: tuple[int, int], keep: float) -> int:
    """Tokens in the kept first rows of a (rows, columns) grid: at least one row."""
    return max(1, round(keep * grid[0])) * grid[1]


def find_pipeline(folder: str | Path) -> Path:
    """The pipeline folder at `folder` or in its sub-folder `pipeline`."""
    folder = Path(folder)
    for candidate in (folder, folder / "pipeline"):
        if (candidate / MANIFEST).is_file():
            return candidate
    what = "does not exist" if not folder.exists() else f"holds no {MANIFEST}"
    raise DigitError(f"{folder} {what}: give the --out folder of a finished `digit fit`")


def save_sequence_model(model: SequenceModel, folder: Path, name: str) -> None:
    """Write NAME.safetensors and NAME.json (the SequenceConfig)."""
    save_tensors(folder / f"{name}.safetensors", model.state_dict())
    write_json(folder / f"{name}.json", asdict(model.cfg))


def load_sequence_model(folder: Path, name: str) -> SequenceModel:
    """Read what `save_sequence_model` wrote; weights are mapped, not copied."""
    with torch.device("meta"):
        model = SequenceModel(SequenceConfig(**read_json(folder / f"{name}.json")))
    try:
        model.load_state_dict(load_tensors(folder / f"{name}.safetensors"), strict=True, assign=True)
    except RuntimeError as error:
        raise DigitError(
            f"{folder / name}.safetensors does not fit {name}.json: {' '.join(str(error).split())}"
        ) from error
    return model.eval()
