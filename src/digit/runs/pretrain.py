"""Encoders of your own: a small ViT, trained without labels on the images at hand (paper, Figure 4a).

For images that no released encoder knows (medicine, remote sensing), and for comparing what encoders learn when all
else is equal: patch or global loss, discriminative or reconstructive.

OUT/encoder/         the whole ViT: encoder.json, encoder.safetensors; `EncoderConfig(name="folder:OUT/encoder")`
OUT/report/          loss.png, features.png
OUT/log.jsonl, OUT/checkpoints/
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from digit.data.crops import gather_crops
from digit.data.images import ImageSource, as_source
from digit.data.loader import CachedCrops
from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError
from digit.models.transformer import MAX_DEPTH
from digit.models.vit import ViT, ViTConfig
from digit.runtime import plots
from digit.runtime.files import as_path, mark_output
from digit.runtime.hardware import choose_device
from digit.runtime.lock import lock_folder
from digit.runtime.settings import SEED, Rule, check_settings, refuse_unused, within
from digit.tokenizers.encoders import IMAGENET_MEAN, IMAGENET_STD, EncoderConfig, FrozenEncoder, load_encoder
from digit.training.log import read_log
from digit.training.ssl.dino import DINOConfig
from digit.training.ssl.ibot import IBOTConfig
from digit.training.ssl.mae import MAEConfig
from digit.training.ssl.moco import MoCoConfig
from digit.training.ssl.train import METHODS, MethodConfig, MethodName, SSLConfig, train_ssl

SHOWN = 12  # images in features.png


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """An encoder, the method it is trained by, and the training. The defaults suit 64 px on two CPU cores."""

    method: MethodName = "ibot"
    """mae (patch level, reconstructive), moco (global, discriminative), dino (global, discriminative) or ibot (patch
    level, discriminative; the paper's choice among those that can be trained here)."""
    image_size: int = within("[1, 4096]", 64)
    """Side in pixels that the encoder sees; a multiple of patch_size."""
    source_size: int = within("[1, 4096]", 96)
    """Side in pixels of the images that views are cut from; above image_size small crops keep their detail."""
    patch_size: int = within("[1, 4096]", 8)
    """Side of a patch in pixels: the encoder's grid is image_size / patch_size."""
    depth: int = within(f"[1, {MAX_DEPTH}]", 6)
    """Blocks."""
    embed_dim: int = within("[1, inf)", 192)
    """Width, a multiple of 4 and of num_heads."""
    num_heads: int = within("[1, inf)", 3)
    """Attention heads."""
    training: SSLConfig = field(default_factory=SSLConfig)
    """Steps, batch, learning rate."""
    mae: MAEConfig = field(default_factory=MAEConfig)
    """Settings of MAE."""
    moco: MoCoConfig = field(default_factory=MoCoConfig)
    """Settings of MoCo v3."""
    dino: DINOConfig = field(default_factory=DINOConfig)
    """Settings of DINO."""
    ibot: IBOTConfig = field(default_factory=IBOTConfig)
    """Settings of iBOT."""
    max_bad_fraction: float = within("[0, 1]", 0.05)
    """Broken images are skipped and named; past this fraction the run fails."""
    seed: int = within(SEED, 0)
    """Seed of every random choice of the run; it overrules training.seed."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DigitError(f"method is {self.method!r}: choose one of {', '.join(METHODS)}")
        check_settings(self)
        if self.training.num_steps < 1:
            raise DigitError("training.num_steps is 0: an untrained encoder knows nothing")
        if self.image_size % self.patch_size:
            raise DigitError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.embed_dim % 4 or self.embed_dim % self.num_heads:
            raise DigitError(f"embed_dim {self.embed_dim} is no multiple of 4 and of num_heads {self.num_heads}")
        if self.image_size == self.patch_size and self.method in ("mae", "ibot"):
            raise DigitError(f"{self.method} hides patches: image_size {self.image_size} must be several of patch_size")
        if self.source_size < self.image_size:
            raise DigitError(
                f"source_size {self.source_size} is below image_size {self.image_size}: give that or more, "
                f"{self.image_size * 3 // 2} for example"
            )

    @property
    def vit(self) -> ViTConfig:
        """Shape of the encoder; its position table is the grid of image_size."""
        return ViTConfig(
            layer_scale=False,
            table_side=self.image_size // self.patch_size,
            depth=self.depth,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
        )

    @property
    def settings(self) -> MethodConfig:
        """Settings of the chosen method."""
        return getattr(self, self.method)


def unused_settings(cfg: PretrainConfig) -> list[Rule]:
    """Settings that this pretraining ignores: (whether the rule applies, their pattern, why and what to do)."""
    others = [name for name in METHODS if name != cfg.method]
    rules: list[Rule] = [(True, rf"{name}\..*", f"method is {cfg.method}: set method to {name}") for name in others]
    local, views = getattr(cfg.settings, "num_local_views", 1), cfg.settings.views
    colours = r"views\.(brightness|contrast|saturation|hue)"
    return [
        *rules,
        (cfg.training.seed != cfg.seed, r"training\.seed", "set the run's one seed"),
        (True, r"training\.keep_best", "an encoder has no validation: leave it out"),
        (local == 0, rf"{cfg.method}\.local_scale", f"set {cfg.method}.num_local_views above 0"),
        (
            getattr(cfg.settings, "balance", "") == "sinkhorn",
            rf"{cfg.method}\.centre_momentum",
            f"set {cfg.method}.balance to centre",
        ),
        (views.jitter == 0, rf"{cfg.method}\.{colours}", f"set {cfg.method}.views.jitter above 0"),
    ]


def pretrain(
    data: str | Path | ImageSource,
    cfg: PretrainConfig,
    out: str | Path,
    *,
    split: str | None = None,
    device: str | None = None,
    chosen: Sequence[str] = (),
) -> FrozenEncoder:
    """Train an encoder on the images of `data`, without their labels, and write OUT/encoder and OUT/report.

    Run again with the same `out` it goes on where it stopped; a finished run is read. Returns the encoder as
    `load_encoder(EncoderConfig(name="folder:OUT/encoder", input_size=cfg.image_size))` gives it: up to the
    third-to-last block (paper, section 3.2). `chosen` are dotted names of settings that somebody chose.

    Raises DigitError where the data cannot be read or a chosen setting would not be used, MismatchError where `out`
    holds a run with other settings.
    """
    refuse_unused(cfg, chosen, unused_settings(cfg))
    out, place = as_path(out), choose_device(device)
    source = as_source(data, split=split)
    if len(source) < 2:
        raise DigitError(f"{source.name} holds {len(source)} image: pretraining needs at least 2 and wants thousands")
    lock_folder(out)
    mark_output(out)
    training = replace(cfg.training, seed=cfg.seed)

    @cache  # a finished run decodes nothing
    def crops() -> CachedCrops:
        preprocess = PreprocessConfig(image_size=cfg.source_size, flip=False)  # the views flip
        return CachedCrops(source, preprocess, seed=cfg.seed, max_bad_fraction=cfg.max_bad_fraction)

    vit = train_ssl(
        cfg.method,
        ViT(cfg.vit).to(place),
        cfg.settings,
        lambda step: crops().batch(step, training.batch_size)[0],
        training,
        out,
        normalisation=(IMAGENET_MEAN, IMAGENET_STD),
        about={"data": source.fingerprint, "source_size": cfg.source_size},
    )
    save_encoder(vit, cfg, source, out / "encoder")
    encoder = load_encoder(EncoderConfig(name=f"folder:{out / 'encoder'}", input_size=cfg.image_size)).to(place)
    write_encoder_report(encoder, source, out)
    return encoder


def save_encoder(vit: ViT, cfg: PretrainConfig, source: ImageSource, folder: Path) -> None:
    """Write the whole network, so that any layer can be chosen later."""
    seen = f"{len(source)} images of {source.name}, {cfg.training.num_steps} steps of {cfg.training.batch_size}"
    whole = FrozenEncoder(
        vit,
        name=f"{cfg.method}_{cfg.depth}x{cfg.embed_dim}_patch{cfg.patch_size}",
        layer="pooled",
        input_size=cfg.image_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        about={"training": f"self-supervised ({METHODS[cfg.method][1]}, {seen})", "weights": "encoder.safetensors"},
    )
    whole.save(folder)


def write_encoder_report(encoder: FrozenEncoder, source: ImageSource, out: Path) -> None:
    """OUT/report: loss.png; features.png, some images above the colours of their patches (near features, near colours).

    A map that follows the objects says that the encoder has learnt something; one of stripes or of one colour, not.
    """
    lines = [line for line in read_log(out / "log.jsonl") if "loss" in line]
    names = [name for name in ("loss", "class_loss", "patch_loss") if lines and name in lines[-1]]
    steps = [line["step"] for line in lines]
    curves = {name: (steps, [line[name] for line in lines]) for name in names}
    plots.curve_png(out / "report" / "loss.png", curves, xlabel="step", ylabel="loss")
    images, _ = gather_crops(source, PreprocessConfig(image_size=encoder.input_size), num=SHOWN)
    features = encoder.features(images).flatten(0, 1).cpu()  # (B * N, D)
    places = torch.arange(len(features)).view(len(images), -1)
    maps = plots.token_maps(places, encoder.grid, plots.code_colours(features), encoder.input_size)
    scale = max(1, 96 // encoder.input_size)
    sheet = plots.grid(torch.cat([images, maps]), len(images), scale=scale, row_names=("image", "features"))
    plots.save_png(out / "report" / "features.png", sheet)
