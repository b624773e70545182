"""The authors' files -> a pipeline folder: encoder, codebook, VQGAN, prior and renderer, each given or carried.

A released prior carries encoder and codebook, a released renderer carries codebook and VQGAN (RELEASED_CODE and the
sizes of the files). Where a part comes from several files they must agree. Parts are written one after the other and
tensors one at a time, out of mapped files, so that converting needs little more memory than the files are large.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from digit.convert.fairseq import FairseqParts, read_fairseq
from digit.convert.reading import listed, read_torch
from digit.convert.vit_checkpoints import FORMATS, convert_vit, guess_family, infer_shape, read_encoder_file
from digit.convert.vqgan import convert_state, find_state
from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError, MismatchError
from digit.files import read_json, sha256_tensors
from digit.models.vit import SIZES, ViTConfig
from digit.pipeline import MANIFEST, PARTS, DigitPipeline, SamplingConfig, StageSampling, write_manifest
from digit.progress import Progress
from digit.tokenizers.discriminative import Codebook
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_vit
from digit.tokenizers.vq import VQTokenizer

ORDER = ("encoder", "codebook", "vqgan", "prior", "renderer")
LARGE_WIDTH = 1536


@dataclass(frozen=True, kw_only=True)
class ReleasedFiles:
    """The files to convert, any subset, and what they cannot say themselves."""

    encoder: str | None = None
    """DINOv2, DINO, iBOT, MAE or MoCo v3 weights, as their authors release them."""
    codebook: str | None = None
    """Centroids (K, D), .npy (km_8k.npy, km_16k.npy)."""
    vqgan: str | None = None
    """VQGAN in MAGE's layout (vqgan_jax_strongaug.ckpt)."""
    prior: str | None = None
    """fairseq checkpoint of stage 1, unconditional or class-conditional."""
    renderer: str | None = None
    """fairseq checkpoint of stage 2 (autoregressive or masked), or of the VQ-only baseline."""
    renderer_kind: Literal["ar", "masked"] | None = None
    """Kind of the renderer; the tensors of both are alike. None goes by the names in the file, and takes ar where it
    says nothing."""
    encoder_family: str | None = None
    """dinov2, dino, ibot, mae or mocov3, where the file does not say."""
    encoder_heads: int | None = None
    """Attention heads of the encoder; None: one for every 64 channels."""
    encoder_layer: int | None = None
    """Block whose features are the tokens'; None: the third-to-last."""
    position_interpolation: Literal["released", "hub"] = "released"
    """How the encoder's position table is resized: as the released tokens need it, or as in the encoder's hub entry."""
    image_size: int = 256
    """Side of the images in pixels."""
    encoder_size: int = 224
    """Side in pixels that the encoder sees."""


@dataclass(frozen=True)
class Found:
    """One part's tensors, and the file that holds them."""

    source: str
    state: Mapping[str, Tensor]


class Conversion:
    """Reads the files, checks that they belong together, and writes the folder."""

    def __init__(self, files: ReleasedFiles):
        self.files, self.notes = files, []
        if not any(getattr(files, name) for name in ORDER):
            raise DigitError(f"nothing to convert: give one or more of {', '.join(f'--{name}' for name in ORDER)}")
        # the encoder decides how many tokens an image has, so the sequence models are read for good afterwards
        self.prior = self.renderer = None
        first = {name: read_fairseq(path) for name in ("prior", "renderer") if (path := getattr(files, name))}
        self.encoder = self._encoder([parts for parts in first.values() if parts.encoder])
        self.codebook = self._codebook([parts for parts in first.values() if parts.centroids is not None])
        self.vqgan = self._vqgan([parts for parts in first.values() if parts.vqgan])
        lengths = self._lengths()
        masked = None if files.renderer_kind is None else files.renderer_kind == "masked"
        if files.prior:
            self.prior = self._check_prior(read_fairseq(files.prior, masked=False, target_len=lengths["disc"]))
        if files.renderer:
            self.renderer = self._check_renderer(
                read_fairseq(files.renderer, masked=masked, target_len=lengths["vq"], prefix_len=lengths["disc"])
            )

    # ---------------------------------------------------------------- parts

    def _encoder(self, carriers: list[FairseqParts]) -> FrozenEncoder | None:
        found, files = [], self.files
        if files.encoder:
            loaded = read_encoder_file(files.encoder)
            family = files.encoder_family or (guess_family(loaded) if isinstance(loaded, Mapping) else None)
            if family is None:
                choice = f"give --encoder_family, one of {', '.join(FORMATS)}"
                raise DigitError(f"{files.encoder} does not say of which kind it is: {choice}")
            if family not in FORMATS:
                raise DigitError(f"no encoder family {family}: choose one of {', '.join(FORMATS)}")
            found.append(Found(files.encoder, convert_vit(loaded, FORMATS[family], files.encoder)))
        else:
            family = files.encoder_family or "dinov2"  # what the released priors carry
        for parts in carriers:
            found.append(Found(parts.source, convert_vit(parts.encoder, FORMATS[family], parts.source)))
        if not found:
            return None
        self._agree("encoder", found)
        source, state = found[0].source, found[0].state
        shape = infer_shape(state, source, files.encoder_heads)
        config = EncoderConfig(
            name=encoder_name(family, shape),
            layer=files.encoder_layer,
            input_size=files.encoder_size,
            weights=source,
            position_interpolation=files.position_interpolation,
        )
        return load_vit(config, shape, loaded=dict(state))

    def _codebook(self, carriers: list[FairseqParts]) -> Codebook | None:
        books = [Codebook.from_npy(self.files.codebook)] if self.files.codebook else []
        books += [Codebook(parts.centroids, {"released_file": Path(parts.source).name}) for parts in carriers]
        if not books:
            return None
        sources = ([self.files.codebook] if self.files.codebook else []) + [parts.source for parts in carriers]
        pairs = zip(sources, books, strict=True)
        self._agree("codebook", [Found(source, {"centroids": book.centroids}) for source, book in pairs])
        if self.encoder is not None:
            books[0].meta |= {"encoder": self.encoder.describe(), "layer": self.encoder.layer}
        return books[0]

    def _vqgan(self, carriers: list[FairseqParts]) -> VQTokenizer | None:
        found = [Found(parts.source, parts.vqgan) for parts in carriers]
        if path := self.files.vqgan:
            found.insert(0, Found(path, find_state(read_torch(path), path)))
        if not found:
            return None
        self._agree("VQGAN", found)
        vqgan = convert_state(found[0].state, self.files.image_size, found[0].source)
        return VQTokenizer(vqgan, rounding="truncate")  # the released code cuts pixels to 8 bits, it does not round

    def _agree(self, part: str, found: list[Found]) -> None:
        """Raise MismatchError that names two files and their hashes where a part is not the same in all."""
        first, *others = found
        for other in others:
            shared = sorted(first.state.keys() & other.state.keys())
            here, there = fingerprints(first.state, other.state, shared)
            if here != there or len(shared) < min(len(first.state), len(other.state)):
                raise MismatchError(
                    f"the {part} in {first.source} ({here[:12]}) is another one than in {other.source} ({there[:12]}): "
                    "these files do not belong together"
                )

    def _lengths(self) -> dict[str, int]:
        return {
            "disc": math.prod(self.encoder.grid) if self.encoder else 256,
            "vq": math.prod(self.vqgan.grid) if self.vqgan else 256,
        }

    def _check_prior(self, parts: FairseqParts) -> FairseqParts:
        if parts.cfg.prefix_len:
            raise DigitError(f"{parts.source} is a renderer (stage 2): give it as --renderer")
        if parts.cfg.norm == "pre":
            raise DigitError(f"{parts.source} is a VQ-only baseline: give it as --renderer, without --prior")
        return parts

    def _check_renderer(self, parts: FairseqParts) -> FairseqParts:
        if parts.cfg.norm == "post":
            raise DigitError(f"{parts.source} is a prior (stage 1): give it as --prior")
        if not parts.cfg.prefix_len and self.prior:
            raise DigitError(f"{parts.source} is a VQ-only baseline, which needs no prior: leave --prior out")
        if not parts.kind_is_said:
            self.notes.append(
                f"{parts.source} does not say whether it is autoregressive or masked: taken as autoregressive "
                "(--renderer_kind masked otherwise)"
            )
        return parts

    # ---------------------------------------------------------------- folder

    @property
    def parts(self) -> list[str]:
        """Names of what was found, in the order of writing."""
        return [name for name in ORDER if getattr(self, name) is not None]

    def sampling(self) -> SamplingConfig:
        """As the released scripts draw: top-k 200 (base), 400 (large), 300 (class-conditional); top-p 0.8."""
        cfg = self.prior and self.prior.cfg
        top_k = 200 if cfg is None else 300 if cfg.num_classes else 400 if cfg.embed_dim >= LARGE_WIDTH else 200
        return SamplingConfig(prior=StageSampling(top_k=top_k), renderer=StageSampling(top_p=0.8))

    def write(self, out: str | Path) -> None:
        """Write the parts into `out`, beside those that are there already, then the manifest."""
        out, there = Path(out), []
        if (out / MANIFEST).exists():
            there = list(read_json(out / MANIFEST).get("parts", []))
        with Progress("convert", len(self.parts)) as bar:
            for name in self.parts:
                part = getattr(self, name)
                if isinstance(part, FairseqParts):
                    part.save_model(out, name)
                else:
                    part.save(out / name)
                bar.update()
        preprocess = PreprocessConfig(image_size=self.files.image_size, encoder_size=self.files.encoder_size)
        info = {"recipe": "released", "files": {n: Path(p).name for n in ORDER if (p := getattr(self.files, n))}}
        parts = [name for name in ORDER if name in {*there, *self.parts}]
        write_manifest(out, parts, preprocess, (), self.sampling(), info)


def convert_release(files: ReleasedFiles, out: str | Path) -> list[str]:
    """Convert released files into the pipeline folder `out`; returns notes for the user.

    Raises DigitError for unreadable or unfit files, MismatchError where they do not belong together.
    """
    conversion = Conversion(files)
    conversion.write(out)
    notes = [f"{out}: {listed(conversion.parts)}", *conversion.notes]
    del conversion  # and with it the mapped files
    pipe = DigitPipeline.from_pretrained(out)  # maps the weights; refuses parts that do not fit each other
    missing = [name for name in PARTS if getattr(pipe, name) is None]
    if missing and not (pipe.renderer and not pipe.renderer.cfg.prefix_len):
        notes.append(f"not in it yet: {', '.join(missing)} (run again with the same --out to add them)")
    return notes


def encoder_name(family: str, shape: ViTConfig) -> str:
    """The name of the released size that `shape` is, else FAMILY_custom."""
    plain = replace(shape, position_offset=0.1, position_antialias=False)
    matches = [name for name, size in SIZES.items() if size == plain and name.split("_")[0] == family]
    return matches[0] if matches else f"{family}_custom"


def fingerprints(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: list[str]) -> tuple[str, str]:
    """SHA-256 of the named tensors of both, as float32; where one file is in half precision, both rounded to it."""

    def common(name: str) -> torch.dtype:
        return min((a[name].dtype, b[name].dtype), key=lambda dtype: torch.finfo(dtype).bits)

    def digest(state: Mapping[str, Tensor]) -> str:
        return sha256_tensors({name: state[name].to(common(name)) for name in names})

    return digest(a), digest(b)
