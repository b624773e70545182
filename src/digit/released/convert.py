"""The authors' files -> a pipeline folder: encoder, codebook, VQGAN, prior and renderer, each given or carried.

A released prior carries encoder and codebook, a released renderer those and the VQGAN (RELEASED_CODE, and the sizes of
the files). Where a part comes from several files they must agree. Parts are written one after the other and tensors one
at a time, out of mapped files, so that converting needs little more memory than the files are large. Everything is made
and checked in a folder beside the wanted one and moved there in the end: a failure leaves what was there.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from digit.convert.fairseq import FairseqParts, LoadedFairseq, load_fairseq
from digit.convert.reading import check_tensors, listed, read_torch, unfit
from digit.convert.vit_checkpoints import FORMATS, convert_vit, guess_family, infer_shape, read_encoder_file
from digit.convert.vqgan import convert_state, find_state
from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError, MismatchError
from digit.models.vit import SIZES, ViTConfig
from digit.pipeline.manifest import MANIFEST, read_manifest, read_sampling, write_manifest
from digit.pipeline.pipeline import PARTS, DigitPipeline, SamplingConfig, StageSampling
from digit.runtime.files import disk_errors, sha256_tensors
from digit.runtime.progress import Progress
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_vit
from digit.tokenizers.kmeans.codebook import Codebook
from digit.tokenizers.vq import VQTokenizer

ORDER = ("encoder", "codebook", "vqgan", "prior", "renderer")
LARGE_WIDTH = 1536
IMAGE_SIZE, ENCODER_SIZE = 256, 224  # px, of everything released
TOKENS = 256  # of either kind, where no encoder or VQGAN says otherwise


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
    """Attention heads of the encoder, where its size is none of the released ones."""
    encoder_layer: int | None = None
    """Block whose features are the tokens'; None: the third-to-last."""
    position_interpolation: Literal["released", "hub"] = "released"
    """How the encoder's position table is resized: as the released tokens need it, or as in the encoder's hub entry."""
    image_size: int | None = None
    """Side of the images in pixels; None: as the folder has it, else 256."""
    encoder_size: int | None = None
    """Side in pixels that the encoder sees; None: as the folder has it, else 224."""

    def __post_init__(self) -> None:
        for name in ORDER:
            if getattr(self, name) == "":
                raise DigitError(f"--{name} is empty: give a file, or leave it out")
        if self.encoder_family is not None and self.encoder_family not in FORMATS:
            raise DigitError(f"no encoder family {self.encoder_family}: choose one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Found:
    """One part's tensors, and the file that holds them."""

    source: str
    state: Mapping[str, Tensor]


class Folder:
    """What a pipeline folder holds before the conversion; nothing where there is none."""

    def __init__(self, out: Path):
        if (out / "config.json").exists() or (out / "pipeline").exists():
            raise DigitError(f"{out} is the folder of a `digit fit` run: choose another --out")
        self.out, self.manifest = out, {}
        if (out / MANIFEST).exists():
            self.manifest = read_manifest(out)
        self.parts: list[str] = self.manifest.get("parts", [])
        if not set(self.parts) <= set(ORDER):
            raise DigitError(f"{out / MANIFEST} is damaged: delete it, or choose another --out")

    def read(self, name: str) -> Any:
        """Encoder, codebook or VQGAN of the folder, or None."""
        kinds = {"encoder": FrozenEncoder, "codebook": Codebook, "vqgan": VQTokenizer}
        return kinds[name].load(self.out / name) if name in self.parts else None

    def preprocess(self) -> PreprocessConfig:
        """As the manifest has it, else the released one."""
        default = PreprocessConfig(image_size=IMAGE_SIZE, encoder_size=ENCODER_SIZE)
        return PreprocessConfig(**(asdict(default) | self.manifest.get("preprocess", {})))

    def sampling(self) -> SamplingConfig:
        """As the manifest has it, else the released scripts' for the base model."""
        if (there := self.manifest.get("sampling")) is None:
            return SamplingConfig(prior=StageSampling(top_k=200), renderer=StageSampling(top_p=0.8))
        return read_sampling(there)


class Conversion:
    """Reads the files, checks that they belong together and to what is in the folder, and writes."""

    def __init__(self, files: ReleasedFiles, out: Path):
        if not any(getattr(files, name) for name in ORDER):
            raise DigitError(f"nothing to convert: give one or more of {', '.join(f'--{name}' for name in ORDER)}")
        self.files, self.folder, self.notes = files, Folder(out), []
        with unfit(str(out / MANIFEST)):
            there = self.folder.preprocess()
            self.preprocess = replace(
                there,
                image_size=files.image_size or there.image_size,
                encoder_size=files.encoder_size or there.encoder_size,
            )
        loaded = {name: load_fairseq(path) for name in ("prior", "renderer") if (path := getattr(files, name))}
        carriers = list(loaded.values())
        self.new: dict[str, Any] = {}  # parts to write
        encoder, vqgan = self._encoder(carriers), self._vqgan(carriers)
        self._codebook(carriers, encoder)
        lengths = {
            "target_len": math.prod(encoder.grid) if encoder else TOKENS,
            "vq_len": math.prod(vqgan.grid) if vqgan else TOKENS,
        }
        for name, file in loaded.items():
            self.new[name] = self._sequence_model(name, file, **lengths)

    # ---------------------------------------------------------------- parts

    def _encoder(self, carriers: list[LoadedFairseq]) -> FrozenEncoder | None:
        files, found, family = self.files, [], self.files.encoder_family or "dinov2"  # what released priors carry
        if files.encoder:
            content = read_encoder_file(files.encoder)
            family = self._family(content)
            found = [Found(files.encoder, convert_vit(content, FORMATS[family], files.encoder))]
            check_tensors(found[0].state, files.encoder)  # carried ones have been looked at
        there = None if files.encoder else self.folder.read("encoder")
        if there is not None:
            found = [Found(str(self.folder.out), there.net.state_dict())]
        for file in carriers:
            if file.encoder:
                found.append(Found(file.source, convert_vit(file.encoder, FORMATS[family], file.source)))
        if not found:
            return None
        self._agree("encoder", found)
        if there is not None:
            return there
        source, state = found[0].source, found[0].state
        with unfit(source):
            shape = infer_shape(state, source, files.encoder_heads or known_heads(family, state))
            cfg = EncoderConfig(
                name=encoder_name(family, shape),
                layer=files.encoder_layer,
                input_size=self.preprocess.encoder_size,
                weights=source,
                position_interpolation=files.position_interpolation,
            )
            self.new["encoder"] = load_vit(cfg, shape, loaded=dict(state))
        return self.new["encoder"]

    def _family(self, content: Any) -> str:
        """The release format of --encoder: what its names tell, which must not be what the user denies."""
        path, asked = self.files.encoder, self.files.encoder_family
        seen = guess_family(content) if isinstance(content, Mapping) else None
        if asked is None and seen is None:
            choice = f"give --encoder_family, one of {', '.join(FORMATS)}"
            raise DigitError(f"{path} does not say of which kind it is: {choice}")
        if asked and seen and asked != seen:
            raise DigitError(f"{path} holds {seen} weights, --encoder_family says {asked}: leave that out")
        return asked or seen

    def _codebook(self, carriers: list[LoadedFairseq], encoder: FrozenEncoder | None) -> None:
        books: list[tuple[str, Codebook]] = []
        there = None if self.files.codebook else self.folder.read("codebook")
        if self.files.codebook:
            books.append((self.files.codebook, Codebook.from_npy(self.files.codebook)))
        elif there is not None:
            books.append((str(self.folder.out), there))
        for file in carriers:
            if file.centroids is not None:
                name = {"released_file": Path(file.source).name}
                with unfit(file.source):
                    books.append((file.source, Codebook(file.centroids, name)))
        self._agree("codebook", [Found(source, {"centroids": book.centroids}) for source, book in books])
        if not books or there is not None:
            return
        book = self.new["codebook"] = books[0][1]
        if encoder is not None:
            book.meta |= {"encoder": encoder.describe(), "layer": encoder.layer}

    def _vqgan(self, carriers: list[LoadedFairseq]) -> VQTokenizer | None:
        found, there = [], None if self.files.vqgan else self.folder.read("vqgan")
        if path := self.files.vqgan:
            found.append(Found(path, find_state(read_torch(path), path)))
        elif there is not None:
            found.append(Found(str(self.folder.out), there.vqgan.state_dict()))
        found += [Found(file.source, file.vqgan) for file in carriers if file.vqgan]
        if not found:
            return None
        self._agree("VQGAN", found)
        if there is not None:
            return there
        with unfit(found[0].source):
            vqgan = convert_state(found[0].state, self.preprocess.image_size, found[0].source)
        # the released code cuts pixels to 8 bits, it does not round
        self.new["vqgan"] = VQTokenizer(vqgan, rounding="truncate")
        return self.new["vqgan"]

    def _agree(self, part: str, found: list[Found]) -> None:
        """Raise MismatchError that names two files and their hashes where a part is not the same in all."""
        for other in found[1:]:
            first = found[0]
            shared = sorted(first.state.keys() & other.state.keys())
            here, there = fingerprints(first.state, other.state, shared)
            if here != there or len(shared) < min(len(first.state), len(other.state)):
                raise MismatchError(
                    f"the {part} in {first.source} ({here[:12]}) is another one than in {other.source} ({there[:12]}): "
                    "these files do not belong together"
                )

    def _sequence_model(self, name: str, file: LoadedFairseq, *, target_len: int, vq_len: int) -> FairseqParts:
        kind = self.files.renderer_kind
        if name == "prior":
            parts = file.interpret(masked=False, target_len=target_len)
            if parts.cfg.prefix_len:
                raise DigitError(f"{parts.source} is a renderer (stage 2): give it as --renderer")
            if parts.cfg.norm == "pre":
                raise DigitError(f"{parts.source} is a VQ-only baseline: give it as --renderer, without --prior")
            return parts
        masked = None if kind is None else kind == "masked"
        parts = file.interpret(masked=masked, target_len=vq_len, prefix_len=target_len)
        if parts.cfg.norm == "post":
            raise DigitError(f"{parts.source} is a prior (stage 1): give it as --prior")
        if not parts.cfg.prefix_len and (self.files.prior or "prior" in self.folder.parts):
            raise DigitError(f"{parts.source} is a VQ-only baseline, which needs no prior: leave --prior out")
        if not parts.kind_is_said:
            self.notes.append(
                f"{parts.source} does not say whether it is autoregressive or masked: taken as autoregressive "
                "(--renderer_kind masked otherwise)"
            )
        return parts

    # ---------------------------------------------------------------- folder

    def sampling(self) -> SamplingConfig:
        """As the released scripts draw: top-k 200 (base), 400 (large), 300 (class-conditional); top-p 0.8."""
        sampling = self.folder.sampling()
        if prior := self.new.get("prior"):
            top_k = 300 if prior.cfg.num_classes else 400 if prior.cfg.embed_dim >= LARGE_WIDTH else 200
            sampling = replace(sampling, prior=StageSampling(top_k=top_k))
        if "renderer" in self.new:
            sampling = replace(sampling, renderer=StageSampling(top_p=0.8))
        return sampling

    def write(self, staging: Path) -> None:
        """A whole pipeline folder at `staging`: the parts that are kept as links, the new ones, the manifest."""
        out, manifest = self.folder.out, self.folder.manifest
        for name in self.folder.parts:
            if name not in self.new:
                for path in files_of(out, name):
                    link(path, staging / path.relative_to(out))
        with Progress("convert", len(self.new)) as bar:
            for name, part in self.new.items():
                if isinstance(part, FairseqParts):
                    part.save_model(staging, name)
                else:
                    part.save(staging / name)
                bar.update()
        given = {
            f.name: Path(p).name for f in fields(self.files) if f.name in ORDER and (p := getattr(self.files, f.name))
        }
        info = {"recipe": "released"} | manifest.get("info", {})
        info["files"] = info.get("files", {}) | given
        parts = [name for name in ORDER if name in {*self.folder.parts, *self.new}]
        write_manifest(staging, parts, self.preprocess, manifest.get("classes", ()), self.sampling(), info)


def convert_release(files: ReleasedFiles, out: str | Path) -> list[str]:
    """Convert released files into the pipeline folder `out`; returns notes for the user.

    Parts that are in the folder already stay, and are held against what the new files carry. Raises DigitError for
    unreadable or unfit files, MismatchError where they do not belong together; `out` is then as it was.
    """
    out = Path(out)
    conversion = Conversion(files, out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        conversion.write(staging)
        new, notes = list(conversion.new), list(conversion.notes)
        del conversion  # and with it the mapped files
        pipe = DigitPipeline.from_pretrained(staging)  # maps the weights; refuses parts that do not fit each other
        with disk_errors(out):
            for path in sorted(staging.rglob("*"), key=lambda path: path.name == MANIFEST):  # the manifest last
                if path.is_file():
                    target = out / path.relative_to(staging)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    missing = [name for name in PARTS if getattr(pipe, name) is None]
    if missing and not (pipe.renderer and not pipe.renderer.cfg.prefix_len):
        notes.append(f"not in it yet: {', '.join(missing)} (run again with the same --out to add them)")
    return [f"{out}: {listed(new)}", *notes]


def files_of(folder: Path, name: str) -> list[Path]:
    """The files of one part in a pipeline folder."""
    inside = folder / name
    return sorted(inside.iterdir()) if inside.is_dir() else [folder / f"{name}.safetensors", folder / f"{name}.json"]


def link(path: Path, target: Path) -> None:
    """The same file in two places, by a hard link where the file system has them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(target):
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)


def known_heads(family: str, state: Mapping[str, Tensor]) -> int | None:
    """Attention heads of the released size that a state dict is of; None where it is none of them."""
    shape = infer_shape(state, family, 1)
    alike = [size for name, size in SIZES.items() if name.startswith(f"{family}_") and sized(size) == sized(shape)]
    return alike[0].num_heads if alike else None


def sized(shape: ViTConfig) -> ViTConfig:
    """All of a shape that a state dict shows."""
    return replace(shape, num_heads=1, position_offset=0.1, position_antialias=False)


def encoder_name(family: str, shape: ViTConfig) -> str:
    """The name of the released size that `shape` is, else FAMILY_custom."""
    matches = [
        name
        for name, size in SIZES.items()
        if name.startswith(f"{family}_") and sized(size) == sized(shape) and size.num_heads == shape.num_heads
    ]
    return matches[0] if matches else f"{family}_custom"


def fingerprints(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: list[str]) -> tuple[str, str]:
    """SHA-256 of the named tensors of both; where one file is in half precision, both rounded to it."""

    def common(name: str) -> torch.dtype:
        return min((a[name].dtype, b[name].dtype), key=lambda dtype: dtype.itemsize)

    def digest(state: Mapping[str, Tensor]) -> str:
        return sha256_tensors({name: state[name].to(common(name)) for name in names})

    return digest(a), digest(b)
