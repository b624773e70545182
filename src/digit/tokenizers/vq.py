"""VQ tokenizer: images to a VQGAN's codes and back to pixels (the paper's renderer target, section 3.3).

The networks may be our own, MAGE's, or those of another published tokenizer (`convert/vqgan.py`); all are used alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from digit.data.pictures import Images, as_images
from digit.errors import DigitError, MismatchError
from digit.models.tokens import Integers, as_integers, as_tokens, by_cell, require_range
from digit.models.vq_layout import MAGE, VQLayout
from digit.models.vq_quantizers import ResidualQuantizer
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.runtime.config_json import from_json
from digit.runtime.files import MAKE_AGAIN, as_path, load_tensors, read_json, save_tensors, sha256_tensors, write_json
from digit.runtime.hardware import Precision, choose_device, full_precision

FORMAT = 1
CARRIED_DATA = "rendered shapes, GroceryStoreDataset (MIT) and CIFAR-10"
ASSETS = {"vqgan64": CARRIED_DATA, "vqgan64_shapes": f"{CARRIED_DATA}, then rendered shapes"}  # name: training data
ENCODED_TOGETHER = 16  # images at most
DECODED_TOGETHER, DECODED_TOGETHER_ON_GPU = 8, 32  # images at most, always equally many
MAPS_IN_CACHE = 8 * 2**20  # bytes of one full-resolution map, float32, of the images that go through a CPU together


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a VQ tokenizer's weights come from, as far as it is recorded; `str` says it in one line."""

    name: str = ""
    """What it is: llamagen_vq16, or who made it."""
    licence: str = ""
    """Of its weights."""
    data: str = ""
    """What it was trained on."""

    def __str__(self) -> str:
        licence, data = self.licence and f"licence {self.licence}", self.data and f"trained on {self.data}"
        known = [part for part in (self.name, licence, data) if part]
        return " ".join("; ".join(known or ["its licence and training data are not recorded"]).split())


class VQTokenizer:
    """A VQGAN as an `ImageTokenizer` that can also decode. Tokens are in raster order.

    Args:
        vqgan: the networks.
        precision: fp32 or bf16. bf16 is about twice as fast on CPU; 3% of the carried model's tokens differ.
        chunk_size: images that go through the encoder at a time; changes results by rounding alone. By default 16,
            or on a CPU as many as its cache holds.
        rounding: "nearest" rounds decoded pixels to 8 bits; "truncate" cuts them, as the released code does.
        origin: where the weights come from, kept beside them; None where nobody knows.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        *,
        precision: Precision = "fp32",
        chunk_size: int | None = None,
        rounding: str = "nearest",
        origin: Origin | None = None,
    ) -> None:
        if rounding not in ("nearest", "truncate"):
            raise DigitError(f"rounding is {rounding!r}: it must be nearest or truncate")
        self.vqgan = vqgan.eval()
        self.precision, self.chunk_size, self.rounding = precision, chunk_size, rounding
        self.origin = origin or Origin()
        self._fingerprint: str | None = None

    def __repr__(self) -> str:
        rows, columns = self.grid
        size = f"{self.resolution} x {self.resolution} images"
        levels = f" on {self.num_levels} levels" if self.num_levels > 1 else ""
        return f"VQTokenizer({size}, {rows} x {columns} tokens of {self.vocab_size} codes{levels})"

    @property
    def vocab_size(self) -> int:
        """Number of codes; tokens lie in 0..vocab_size-1."""
        return self.vqgan.cfg.vocab_size

    @property
    def num_levels(self) -> int:
        """Codes of each cell of the grid (`VQGANConfig.num_levels`)."""
        return self.vqgan.cfg.num_levels

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens; of several levels, of the cells."""
        return self.vqgan.cfg.grid

    @property
    def resolution(self) -> int:
        """Side in pixels of the images it takes and gives."""
        return self.vqgan.cfg.resolution

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        # the first that is there: a quantiser without a table has no parameters
        return next(chain(self.vqgan.quantize.parameters(), self.vqgan.parameters())).device

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights and layout, 64 hex digits; unchanged by save and load, whatever the device."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self.vqgan.state_dict(), self.vqgan.layout)
        return self._fingerprint

    def to(self, device: str | torch.device) -> Self:
        """Move the network; returns self. Raises DigitError where the device does not exist."""
        self.vqgan.to(choose_device(device))
        return self

    def autocast(self, precision: Precision | None = None) -> AbstractContextManager:
        """The context of the networks' products; None takes the tokenizer's own precision."""
        half = (precision or self.precision) == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if half else full_precision(self.device)

    @property
    def decoded_together(self) -> int:
        """Images that go through the decoder at a time."""
        return min(DECODED_TOGETHER, self.fit_in_cache) if self.device.type == "cpu" else DECODED_TOGETHER_ON_GPU

    @property
    def encoded_together(self) -> int:
        """Images that go through the encoder at a time."""
        if self.chunk_size is not None:
            return self.chunk_size
        return min(ENCODED_TOGETHER, self.fit_in_cache) if self.device.type == "cpu" else ENCODED_TOGETHER

    @property
    def fit_in_cache(self) -> int:
        """Images whose maps a CPU's cache holds; norms and sums of more of them wait for memory."""
        map_bytes = 4 * self.vqgan.cfg.level_channels[0] * self.resolution**2
        return max(1, MAPS_IN_CACHE // map_bytes)

    def chunks(self, tensor: Tensor) -> Iterator[Tensor]:
        return (part.to(self.device) for part in tensor.split(self.encoded_together))

    def encode(self, images: Images) -> Int64[Tensor, "B M"]:
        """RGB images (B, 3, S, S) uint8, or what else `as_images` takes, to tokens (B, M), on the images' device.

        Raises MismatchError at another size, DigitError for anything but images.
        """
        images = as_images(images)
        with self.autocast():
            tokens = [tokens for _, tokens in self.encoded(images)]
        return torch.cat(tokens).to(images.device)

    def features(self, images: Images) -> Float[Tensor, "B N C"]:
        """The encoder's output before quantisation, float32; otherwise as `encode`."""
        return self.encode_features(images)[1]

    def encode_features(self, images: Images) -> tuple[Int64[Tensor, "B M"], Float[Tensor, "B N C"]]:
        """Tokens and the features that they stand for, from one pass of the encoder."""
        images = as_images(images)
        with self.autocast():
            features, tokens = zip(*self.encoded(images), strict=True)
        vectors = torch.cat([z.flatten(2).transpose(1, 2).float() for z in features])  # (B, N, C)
        return torch.cat(tokens).to(images.device), vectors.to(images.device)

    @torch.no_grad()
    def encoded(self, images: UInt8[Tensor, "B 3 H W"]) -> Iterator[tuple[Tensor, Tensor]]:
        """(z (b, C, h, h), tokens (b, M)) of each chunk, on the network's device; one empty chunk for no images."""
        if images.shape[2:] != (self.resolution, self.resolution):
            raise MismatchError(
                f"the VQGAN takes images of shape (3, {self.resolution}, {self.resolution}), got "
                f"{tuple(images.shape[1:])}: choose preprocess.image_size {self.resolution} or another VQGAN"
            )
        cfg = self.vqgan.cfg
        if not len(images):
            yield torch.empty(0, cfg.z_channels, *cfg.grid), torch.empty(0, cfg.num_tokens, dtype=torch.int64)
            return
        for part in self.chunks(images):
            yield self.vqgan.encode(part.float() / 255)

    @torch.no_grad()
    def decode(self, tokens: Integers, precision: Precision | None = None) -> UInt8[Tensor, "B 3 S S"]:
        """Tokens (B, M), of any integer type, to RGB images in 0..255, on the tokens' device.

        `precision` overrules the tokenizer's own. Raises DigitError for anything but integers, MismatchError at wrong
        lengths or codes.
        """
        tokens = as_tokens(tokens, vocab_size=self.vocab_size, num_tokens=self.vqgan.cfg.num_tokens, owner="the VQGAN")
        if not len(tokens):
            return torch.empty(0, 3, self.resolution, self.resolution, dtype=torch.uint8, device=tokens.device)
        images, size = [], self.decoded_together
        with self.autocast(precision):
            for part in tokens.to(self.device).split(size):
                images.append(self.to_pixels(self.vqgan.decode_tokens(filled(part, size)))[: len(part)])
        return torch.cat(images).to(tokens.device)

    def to_pixels(self, images: Tensor) -> Tensor:
        images = images.float().clamp(0, 1) * 255
        return (images.round() if self.rounding == "nearest" else images).to(torch.uint8)

    @torch.no_grad()
    def embed(self, tokens: Integers) -> Float[Tensor, "... C"]:
        """The code vector of each token, float32; of several levels, of each cell (..., H H L) -> (..., H H, C).

        Raises MismatchError for tokens outside 0..vocab_size-1.
        """
        tokens = as_integers("tokens", tokens)
        require_range("tokens", tokens, 0, self.vocab_size - 1, "the VQGAN")
        if (levels := self.num_levels) > 1:
            tokens = by_cell(tokens, levels)
        return self.vqgan.quantize.codes(tokens.to(self.device)).to(tokens.device)

    @property
    @torch.no_grad()
    def level_vectors(self) -> Float[Tensor, "L K C"]:
        """The code vectors of each level, float32."""
        if isinstance(self.vqgan.quantize, ResidualQuantizer):
            return torch.stack(self.vqgan.quantize.levels).float()
        codes = torch.arange(self.vocab_size, device=self.device)
        return self.vqgan.quantize.codes(codes).float()[None]

    def describe(self) -> dict[str, Any]:
        """Sizes, layout where it is not MAGE's, and fingerprint, for manifests."""
        return {**self.vqgan.cfg.to_dict(), **layout_entry(self.vqgan.layout), "fingerprint": self.fingerprint}

    def save(self, folder: str | Path) -> None:
        """Write vqgan.safetensors (float32) and, last, vqgan.json into `folder`."""
        folder = as_path(folder)
        self._fingerprint = None  # the network may have been trained since
        save_tensors(folder / "vqgan.safetensors", self.vqgan.state_dict())
        about = {"format": FORMAT, "fingerprint": self.fingerprint, "config": self.vqgan.cfg.to_dict()}
        about |= layout_entry(self.vqgan.layout) | {"rounding": self.rounding}
        origin = {"origin": asdict(self.origin)} if self.origin != Origin() else {}
        write_json(folder / "vqgan.json", about | origin)

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> Self:
        """Read what `save` wrote; `options` as for the constructor.

        Raises DigitError on unreadable files, MismatchError where weights and description are of two models.
        """
        folder = as_path(folder)
        vqgan = load_vqgan(folder / "vqgan.json", folder / "vqgan.safetensors")
        about = read_json(folder / "vqgan.json")
        origin = from_json(Origin, about.get("origin", {}), f"{folder / 'vqgan.json'}: origin")
        recorded: dict[str, Any] = {"rounding": about.get("rounding", "nearest"), "origin": origin}
        return cls(vqgan, **recorded | options)


def filled(part: Tensor, size: int) -> Tensor:
    """The last row repeated up to `size` rows: kernels round by the number of rows, pictures must not."""
    return torch.cat([part, part[-1:].expand(size - len(part), -1)])


def fingerprint_of(weights: Mapping[str, Tensor], layout: VQLayout) -> str:
    """SHA-256 of the weights, and of the layout where it is not MAGE's: it decides about the tokens, too."""
    digest = sha256_tensors(weights)
    if layout == MAGE:
        return digest
    return hashlib.sha256(f"{digest}|{json.dumps(layout.to_dict(), sort_keys=True)}".encode()).hexdigest()


def layout_entry(layout: VQLayout) -> dict[str, Any]:
    """What a description says of the layout: nothing of MAGE's, so that descriptions of older versions stay valid."""
    return {} if layout == MAGE else {"layout": layout.to_dict()}


def read_vqgan(about_path: Path) -> tuple[VQGANConfig, dict[str, Any]]:
    """The sizes of a VQGAN, and everything else that its JSON description says."""
    about = read_json(about_path)
    if not isinstance(about, dict) or "config" not in about:
        raise DigitError(f"{about_path} describes no VQGAN: {MAKE_AGAIN}")
    return from_json(VQGANConfig, about["config"], f"{about_path}: config"), about


def load_vqgan(about_path: Path, weights_path: Path) -> VQGAN:
    """A VQGAN, float32, from its JSON description and its safetensors weights (any float type)."""
    cfg, about = read_vqgan(about_path)
    layout = from_json(VQLayout, about["layout"], f"{about_path}: layout") if "layout" in about else MAGE
    try:
        weights = unpack_int8(load_tensors(weights_path))
    except (KeyError, RuntimeError) as error:  # a matrix in 8 bits without its scale, or with another's
        raise MismatchError(f"{weights_path} is damaged ({error}): {MAKE_AGAIN}") from error
    if about.get("fingerprint") != (found := fingerprint_of(weights, layout)):
        raise MismatchError(
            f"{about_path} says fingerprint {str(about.get('fingerprint'))[:12]}, the weights give {found[:12]}, "
            f"so the files are of two models: {MAKE_AGAIN}"
        )
    try:
        with torch.device("meta"):
            vqgan = VQGAN(cfg, layout)
        vqgan.load_state_dict(weights, assign=True)
    except (RuntimeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MismatchError(f"{weights_path} does not fit {about_path} ({reason}): {MAKE_AGAIN}") from error
    return vqgan.eval()


def with_levels(vqgan: VQGAN, num_levels: int) -> VQGAN:
    """The same networks with a codebook of so many levels; the codes of the added ones are zero until training."""
    if num_levels == vqgan.cfg.num_levels:
        return vqgan
    cfg = replace(vqgan.cfg, num_levels=num_levels)
    with torch.device("meta"):
        found = VQGAN(cfg, vqgan.layout)
    weights, name = vqgan.state_dict(), "quantize.embedding.weight"
    table = weights[name].new_zeros(num_levels * cfg.vocab_size, cfg.z_channels)
    table[: len(weights[name])] = weights[name]
    found.load_state_dict({**weights, name: table}, assign=True)
    return found.eval()


def load_asset_vqgan(name: str = "vqgan64", **options: Any) -> VQTokenizer:
    """A carried VQGAN, 64 px, 8 x 8 tokens of 1024 codes, in float32; `options` as for VQTokenizer.

    vqgan64 saw rendered shapes, groceries and CIFAR-10; vqgan64_shapes is tuned to rendered shapes. assets/NAME.json
    says what each was trained on and by which program. Raises DigitError on another name.
    """
    about = find_asset(name)
    options.setdefault("origin", Origin(name=f"{name} of the package digit", licence="MIT", data=ASSETS[name]))
    return VQTokenizer(load_vqgan(about, about.with_suffix(".safetensors")), **options)


def asset_config(name: str) -> VQGANConfig:
    """The sizes of a carried VQGAN. Raises DigitError on another name."""
    return read_vqgan(find_asset(name))[0]


def find_asset(name: str) -> Path:
    """The JSON description of a carried VQGAN; its weights are beside it. Raises DigitError on another name."""
    if name not in ASSETS:
        raise DigitError(f"no carried VQGAN named {name}: choose one of {', '.join(ASSETS)}")
    return Path(str(files("digit") / "assets")) / f"{name}.json"


def save_asset(vqgan: VQGAN, stem: str | Path, about: dict[str, Any]) -> None:
    """Write STEM.safetensors with 8-bit weights and STEM.json, as `load_asset_vqgan` reads them."""
    stem = as_path(stem)
    packed = pack_int8(vqgan.state_dict())
    fingerprint = sha256_tensors(unpack_int8(packed))
    save_tensors(stem.with_name(stem.name + ".safetensors"), packed)
    head = {"format": FORMAT, "fingerprint": fingerprint, "config": vqgan.cfg.to_dict()}
    write_json(stem.with_name(stem.name + ".json"), head | about)


def pack_int8(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels as int8 with a float16 scale per output channel (NAME.scale), the rest as float16."""
    packed = {}
    for name, tensor in weights.items():
        if tensor.ndim < 2:
            packed[name] = tensor.detach().half()
            continue
        scale = (tensor.detach().flatten(1).abs().amax(1) / 127).clamp_min(1e-8).half()  # (out,)
        steps = tensor / scale.float().view(-1, *[1] * (tensor.ndim - 1))
        packed[name] = steps.round().clamp(-127, 127).to(torch.int8)
        packed[f"{name}.scale"] = scale
    return packed


def unpack_int8(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 weights from what `pack_int8` or a plain half-precision file holds."""
    weights = {}
    for name, tensor in packed.items():
        if tensor.dtype == torch.int8:
            scale = packed[f"{name}.scale"].float()
            weights[name] = tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
        elif not name.endswith(".scale"):
            weights[name] = tensor.float()
    return weights
