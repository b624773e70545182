"""What a run refuses before any work: settings that it would not use, and settings that cannot work together.

`digit fit` and `digit plan` call `check_recipe`, so that no plan is made for a run that would be refused.
"""

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from digit.data.tokens import MAX_VOCAB
from digit.errors import DigitError
from digit.models.vqgan import VQGANConfig
from digit.runs.recipes import OWN_STEPS, RECIPES, Recipe, TokenSpace
from digit.runs.roles import ROLES, get_role
from digit.runtime.settings import Rule, changed, flat, refuse_unused
from digit.sampling.kinds import get_kind
from digit.tokenizers.encoders import blank_net, resizes_positions
from digit.tokenizers.quantizers import QUANTIZERS
from digit.tokenizers.vq import asset_config
from digit.training.adversarial import AdversarialConfig
from digit.training.config import TrainConfig

log = logging.getLogger(__name__)
MIN_IMAGES = 2
MODELS = ("prior", "renderer")
ROBUSTNESS = ("input_noise", "current_code", "next_code")  # how the settings of one training begin
NEXT_TOKEN_ONLY = "only next-token models have it: leave it out"
# the fields of the recipe that decide a part, beside the data: where one of them changes, the part is made again
CODEBOOK, VQGAN = (
    ("encoder", "quantizer", *QUANTIZERS, "codebook_subset", "codebook_path"),
    ("vqgan", "vqgan_start", "vqgan_training"),
)
SHARED = ("preprocess", "seed")
DECIDED_BY = {
    "codebook": (*SHARED, *CODEBOOK),
    "vqgan": (*SHARED, *VQGAN),
    "tokens": (*SHARED, *CODEBOOK, *VQGAN, "crops_per_image"),
    "vq_tokens": (*SHARED, *VQGAN, "crops_per_image"),
}
# the fields that a run does not read where it reuses the part; it still reads the others, such as the encoder
MADE_BY = {"codebook": (*CODEBOOK[1:], "codebook_probe"), "vqgan": VQGAN, "tokens": ("crops_per_image",)}


def check_recipe(
    recipe: Recipe,
    *,
    chosen: Iterable[str],
    reuse: Mapping[str, Mapping[str, Any]],
    vqgan: VQGANConfig,
    num_images: int,
    num_classes: int,
    num_processes: int,
    gpu: bool,
    warn: bool = True,
) -> None:
    """Raise DigitError for a recipe whose run would fail later, or would not use one of the settings chosen for it.

    Args:
        chosen: dotted names of the settings that somebody chose; the others may be a recipe's unused defaults.
        reuse: for each part of another run that this one reuses, the settings that it was made with, by dotted name, as
            far as they are known.
        vqgan: sizes of the VQGAN that the run trains, takes or reuses.
        num_classes: classes of the data that the models are conditioned on; 0 is none.
        num_processes: processes that share the work.
        gpu: whether it runs on GPUs.
        warn: whether to warn of what is allowed and seldom meant.
    """
    known = {name: value for settings in reuse.values() for name, value in settings.items()}
    values, parts = flat(recipe), set(reuse)
    chosen = [name for name in chosen if name not in known or known[name] != values.get(name)]
    refuse_unused(recipe, chosen, unused_settings(recipe, parts))
    if num_images < MIN_IMAGES:
        raise DigitError(f"the data holds {num_images} image: training needs at least {MIN_IMAGES}")
    check_sizes(recipe, vqgan, num_classes)
    check_crops(recipe, parts)
    check_training(recipe, parts, num_processes, gpu)
    check_windows(recipe, parts)
    for name in recipe.model_names:
        check_robustness(recipe, name)
    check_warmup(recipe, chosen, warn=warn)
    check_sampling(recipe, num_classes, chosen)
    if "codebook" not in parts:
        check_codebook(recipe, num_images)


def chosen_settings(recipe: Recipe, base: Recipe | None = None) -> list[str]:
    """Settings with a value of somebody's own: neither the default nor that of `base` or of the recipe of its name.

    Of a recipe without `base` and with a name that is not registered, none is known. preprocess.encoder_size is left
    out: recipes and files give it beside encoder.input_size, and stay valid where that alone is changed.
    """
    named = RECIPES.get(recipe.name)
    bases = [*([base] if base else []), *([named()] if named else [])]
    own = [set(changed(recipe, other)) for other in (*bases, Recipe())]
    names = [name for name in flat(recipe) if name != "preprocess.encoder_size"]
    return [name for name in names if all(name in other for other in own)] if bases else []


def unused_settings(recipe: Recipe, reuse: Iterable[str] = ()) -> list[Rule]:
    """The settings that a run of this recipe ignores: (whether the rule applies, their pattern, why and what to do)."""
    rules = [
        (True, group(MADE_BY[part]), f"leave it out, or make a new {part} without --reuse_{part}") for part in reuse
    ]
    return [
        *rules,
        *unused_by_tokenizers(recipe),
        *unused_by_vqgan_training(recipe),
        *unused_by_pixels(recipe),
        *unused_by_models(recipe),
    ]


def unused_by_tokenizers(recipe: Recipe) -> list[Rule]:
    """Unused settings of preprocessing, encoder, codebook and VQGAN."""
    paths = {recipe.preprocess.path, recipe.codebook_path}
    encoder, start = recipe.encoder.name, recipe.vqgan_start
    differs = recipe.preprocess.encoder_size != recipe.encoder.input_size
    cut = "crops are cut at preprocess.image_size: set encoder.input_size, or a path released_kmeans"
    one_way, sizes = (
        f"encoder {encoder} knows one way: leave it out",
        "has sizes of its own: leave it out, or set vqgan_start to scratch",
    )
    return [
        (paths == {"released"} and differs, r"preprocess\.encoder_size", cut),
        (paths == {"released_kmeans"}, r"preprocess\.image_size", "crops are cut at preprocess.encoder_size: set that"),
        (
            recipe.preprocess.fit != "crop",
            r"preprocess\.random_crop",
            f"with preprocess.fit {recipe.preprocess.fit} nothing is cut: leave it out",
        ),
        (not resizes_positions(encoder), r"encoder\.position_interpolation", one_way),
        (recipe.encoder.layers is not None, r"encoder\.layer", "encoder.layers is set: leave one of both out"),
        (recipe.encoder.layers is None, r"encoder\.combine", "it is of several layers: set encoder.layers"),
        (start != "scratch", r"vqgan\.(?!num_levels$).*", f"{start} {sizes}"),
        (recipe.published_vqgan is not None, r"vqgan\.num_levels", f"{start} {sizes}"),
        (recipe.published_vqgan is not None, r"vqgan_training\.(?!seed).*", f"{start} is taken as it is: leave it out"),
        (recipe.seed != recipe.quantizer_cfg.seed, rf"{recipe.quantizer}\.seed", "set the run's one seed"),
        *(
            (True, rf"{other}\..*", f"quantizer is {recipe.quantizer}: set that to {other}")
            for other in QUANTIZERS
            if other != recipe.quantizer
        ),
        (
            not recipe.quantizer_cfg.pca, rf"{recipe.quantizer}\.whiten",
            f"{recipe.quantizer}.pca is 0: set it to a number of components",
        ),
    ]  # fmt: skip


def unused_by_vqgan_training(recipe: Recipe) -> list[Rule]:
    """Unused settings of vqgan_training."""
    cfg, taken = recipe.vqgan_training, "the VQGAN is taken as it is: set vqgan_training.num_steps above 0"
    rules = [
        (cfg.num_steps == 0, r"(?!num_steps|seed).*", taken),
        (True, "keep_best", "the VQGAN has no validation: leave it out"),
        (cfg.restart_below == 0, "restart_every", "restart_below is 0: set it above 0"),
        *unused_by_losses(cfg, recipe.seed),
    ]  # fmt: skip
    return [(applies, rf"vqgan_training\.{pattern}", why) for applies, pattern, why in rules]


def unused_by_losses(cfg: AdversarialConfig, seed: int) -> list[Rule]:
    """Unused settings of a training with perceptual and adversarial loss, without the name of the training."""
    perceptual = "perceptual(_stages|_crop)?" if cfg.perceptual_weight == 0 else "perceptual_(weight|stages|crop)"
    adversarial = "adversarial_weight is 0: set it above 0"
    return [
        (cfg.seed != seed, "seed", "set the run's one seed"),
        (cfg.window == 0, "whole_from", "window is 0, so every step sees whole images: set window"),
        (cfg.window > 0 and cfg.whole_from == 0, "window", "whole_from is 0, so no step sees a window: set it above 0"),
        (cfg.perceptual == "none" or cfg.perceptual_weight == 0, perceptual, "it has no perceptual loss: set one"),
        (cfg.perceptual == "encoder", "perceptual_stages", "perceptual encoder has no stages: set vgg"),
        (cfg.adversarial_weight == 0, "(adversarial_(start|ramp)|discriminator_.*)", adversarial),
    ]  # fmt: skip


def unused_by_pixels(recipe: Recipe) -> list[Rule]:
    """Unused settings of a renderer straight to pixels, and those that a run with one ignores."""
    if recipe.renderer_kind != "pixels":
        why = "it is of a renderer straight to pixels: set renderer_kind to pixels"
        return [(True, r"pixels(_training)?\..*", why)]
    one_pass = "renderer_kind is pixels, one pass in which nothing is chosen: leave it out"
    losses = [
        *unused_by_losses(recipe.pixels_training, recipe.seed),
        (not recipe.validation_fraction, "keep_best", "set validation_fraction above 0"),
    ]
    no_codes = "it is of VQ tokens, and renderer_kind is pixels: leave it out"
    return [
        *((applies, rf"pixels_training\.{pattern}", why) for applies, pattern, why in losses),
        (True, r"renderer\..*", "renderer_kind is pixels: set pixels instead"),
        (True, r"renderer_training\..*", "renderer_kind is pixels: set pixels_training instead"),
        (True, r"sampling\.renderer\..*", one_pass),
        (True, "(masked|vq_only)_steps", "it is of models of VQ tokens, and renderer_kind is pixels: leave it out"),
        (not recipe.has_vqgan, r"vqgan_training\..*", "pixels.start is scratch, so there is no VQGAN: leave it out"),
        (True, r"vqgan\.num_levels", no_codes),
        (not recipe.has_vqgan, r"vqgan\.vocab_size", no_codes),
    ]


def unused_by_models(recipe: Recipe) -> list[Rule]:
    """Unused settings of the prior's and the renderer's size, training and sampling."""
    rules: list[Rule] = [
        (True, r"prior\.prefix_dropout", "the prior has no prefix: leave it out"),
        (
            True,
            r"prior\.(prefix_noise|conditioning|encoder_depth|added_blocks)",
            "the prior has no prefix: leave it out",
        ),
        (True, r"prior\.labels", "the prior always sees the labels of a class-conditional run: leave it out"),
        (not recipe.class_conditional, r"(renderer|pixels)\.labels", "class_conditional is false: leave it out"),
        (
            recipe.renderer.conditioning == "prefix" and recipe.renderer_kind != "pixels",
            r"renderer\.(encoder_depth|added_blocks)",
            "renderer.conditioning is prefix: leave it out, or set that to aligned",
        ),
        (True, r"renderer\.label_dropout", "prior.label_dropout holds for all models that see labels: set that"),
        (not recipe.class_conditional, r"prior\.label_dropout", "class_conditional is false: leave it out"),
    ]
    for name, model in zip(MODELS, recipe.model_names, strict=True):
        if get_role(model).settings == "pixels":
            continue  # `unused_by_pixels`
        cfg, kind, sampling = getattr(recipe, f"{name}_training"), get_role(model).kind, getattr(recipe.sampling, name)
        takes = get_kind(kind).settings
        foreign = "".join(rf"(?!{setting}$)" for setting in takes)
        masked = "for a masked renderer set renderer_kind to masked" if name == "renderer" else "leave it out"
        size = getattr(recipe, name)
        greedy, training = "temperature 0 takes the likeliest token: set it above 0", f"{name}_training"
        rules += [
            (cfg.optimizer != "muon", rf"{training}\.muon_learning_rate", f"set {training}.optimizer to muon"),
            (cfg.warmup_steps == 0, rf"{training}\.warmup_from", f"set {training}.warmup_steps above 0"),
            (cfg.seed != recipe.seed, rf"{training}\.seed", "set the run's one seed"),
            (not recipe.validation_fraction, rf"{training}\.keep_best", "set validation_fraction above 0"),
            (kind == "masked", rf"{training}\.({'|'.join(ROBUSTNESS)})(_.*)?", NEXT_TOKEN_ONLY),
            (cfg.input_noise == 0, rf"{training}\.input_noise_codes", f"set {training}.input_noise above 0"),
            *(
                (weight == 0, rf"{training}\.{token}_code_layer", f"set {training}.{token}_code_weight above 0")
                for token, weight in (("current", cfg.current_code_weight), ("next", cfg.next_code_weight))
            ),
            (True, rf"sampling\.{name}\.{foreign}.*", f"the {name} is sampled token by token: {masked}"),
            (sampling.temperature == 0, rf"sampling\.{name}\.top_[kp]", greedy),
            (sampling.num_steps == 1, rf"sampling\.{name}\.choice_temperature", "num_steps is 1: set it above 1"),
            (kind == "masked", rf"{name}\.random_order(_anneal)?", "a masked model knows no order: leave it out"),
            (size.random_order == 0, rf"{name}\.random_order_anneal", f"{name}.random_order is 0: set it above 0"),
        ]  # fmt: skip
    masked = recipe.renderer_kind == "masked"
    rules += [
        (masked, r"sampling\.renderer\.top_p", "a masked renderer has a top-p of its own: set masked_top_p"),
        (not masked, "masked_(steps|top_p)", "it is of a masked renderer: set renderer_kind to masked"),
        (not recipe.class_conditional, "class_top_k", "class_conditional is false: leave it out"),
        (
            recipe.class_conditional and recipe.class_top_k > 0, r"sampling\.prior\.top_k",
            "a class-conditional prior takes class_top_k: set that",
        ),
        (
            masked and recipe.masked_steps is not None, r"renderer_training\.num_steps",
            "a masked renderer takes masked_steps: set that",
        ),
    ]  # fmt: skip
    return rules


def group(fields: Iterable[str]) -> str:
    """The pattern of the settings in some fields of the recipe."""
    return rf"({'|'.join(map(re.escape, fields))})(\..*)?"


def unchanged_parts(names: Iterable[str]) -> list[str]:
    """Parts of a run that none of the changed settings decides; names as config.json has them, recipe.prior.depth.

    The VQ tokens are named where they are all that can be kept of the tokens.
    """
    fields = {name.removeprefix("recipe.").partition(".")[0] for name in names if name.startswith("recipe.")}
    if any(not name.startswith("recipe.") for name in names):  # other data
        return []
    parts = [part for part, deciding in DECIDED_BY.items() if fields.isdisjoint(deciding)]
    return [part for part in parts if part != "vq_tokens" or "tokens" not in parts]


# -------------------------------------------------------------------- what cannot work


def vqgan_config(recipe: Recipe) -> VQGANConfig:
    """Sizes of the VQGAN that the recipe trains or takes.

    An included one has the size of the crops where these are larger than its own and of whole tokens: it is
    convolutional, and its training goes on at that size. It gets the recipe's levels, and training fills them.
    """
    if recipe.vqgan_start == "scratch" or recipe.published_vqgan:
        return recipe.vqgan
    cfg = replace(asset_config(recipe.vqgan_start), num_levels=recipe.vqgan.num_levels)
    size = recipe.preprocess.crop_size
    return replace(cfg, resolution=size) if size > cfg.resolution and size % cfg.reduction == 0 else cfg


def check_reuse(recipe: Recipe, reuse: Iterable[str]) -> None:
    """Raise DigitError for reused parts that a run with a renderer straight to pixels does not have."""
    needless = {} if recipe.has_vq_tokens else {"vq_tokens": "no VQ tokens"}
    needless |= {} if recipe.has_vqgan else {"vqgan": "no VQGAN, since pixels.start is scratch"}
    for part in reuse:
        if part in needless:
            raise DigitError(f"renderer_kind is pixels, so the run has {needless[part]}: leave out --reuse_{part}")


def check_sizes(recipe: Recipe, vqgan: VQGANConfig, num_classes: int) -> None:
    """Raise DigitError where the crops do not fit the VQGAN, or a model's sizes do not fit each other."""
    if recipe.preprocess.crop_size != (resolution := vqgan.resolution):
        size = "image_size" if recipe.preprocess.path == "released" else "encoder_size"
        raise DigitError(
            f"crops are {recipe.preprocess.crop_size} px, the VQGAN takes {resolution}: "
            f"set preprocess.{size} to {resolution}, or choose another VQGAN"
        )
    sizes = {f"{recipe.quantizer}: codes": recipe.quantizer_cfg.vocab_size}
    sizes |= {"vqgan: codes": vqgan.vocab_size} if recipe.has_vq_tokens else {}
    for name, number in sizes.items():
        if number > MAX_VOCAB:
            raise DigitError(f"{name} {number}: the token store holds at most {MAX_VOCAB}")
    levels = recipe.quantizer_cfg.num_levels
    unknown = TokenSpace(recipe.quantizer_cfg.vocab_size, levels, levels=levels)
    for name in recipe.model_names:
        check_levels(name, vqgan)
    for name, role in ROLES.items():  # heads, dropouts, vocabularies
        if role.settings != "pixels" or name in recipe.model_names:
            of_cell = 1 if role.kind == "masked" else vqgan.num_levels
            spaces = {"discriminative": unknown, "vq": TokenSpace(1, of_cell, levels=of_cell)}
            recipe.sequence_config(name, spaces, num_classes=num_classes, vqgan=vqgan)


def check_levels(name: str, vqgan: VQGANConfig) -> None:
    """Raise DigitError where a masked model, by its name in ROLES, would predict several codes a cell."""
    role = get_role(name)
    if role.kind == "masked" and role.target == "vq" and vqgan.num_levels > 1:
        raise DigitError(
            f"the VQGAN has {vqgan.num_levels} codes a cell (vqgan.num_levels), and the masked model {name} predicts "
            "one: take a VQGAN with one, or a next-token model (renderer_kind ar, or vq_ar)"
        )


def check_crops(recipe: Recipe, reuse: Iterable[str]) -> None:
    """Raise DigitError for several crops of an image that would be equal, or that no model would be trained on."""
    cfg, most = recipe.preprocess, recipe.preprocess.distinct_crops
    if cfg.fit != "crop" and most is not None and most > 1 and recipe.crops_per_image > most:
        raise DigitError(
            f"crops_per_image is {recipe.crops_per_image}, but with preprocess.fit {cfg.fit} an image has {most} "
            f"different crops at most, as it is and mirrored: set it to {most}"
        )
    if recipe.crops_per_image > 1 and recipe.preprocess.deterministic:
        raise DigitError(
            f"crops_per_image is {recipe.crops_per_image}, but all crops of an image would be the same: set it to 1, "
            "or preprocess.random_crop or preprocess.flip to true"
        )
    fresh = recipe.training_crops == "fresh"
    if fresh and recipe.preprocess.deterministic:
        raise DigitError(
            "training_crops is fresh, but all crops of an image would be the same: set it to stored, or "
            "preprocess.random_crop or preprocess.flip to true"
        )
    if fresh and recipe.crops_per_image > 1 and "tokens" not in reuse:
        raise DigitError(
            f"training_crops is fresh, but {recipe.crops_per_image} crops of each image would be tokenized first and "
            "none of them trained on: set crops_per_image to 1, which is enough for validation and probes, or "
            "training_crops to stored"
        )


def check_training(recipe: Recipe, reuse: Iterable[str], num_processes: int, gpu: bool) -> None:
    """Raise DigitError for an untrained network, and a batch that the processes cannot share."""
    trained = {role.settings: recipe.training(role) for role in map(get_role, recipe.model_names)}
    for name, cfg in trained.items():
        if not cfg.num_steps:
            what = "renderer" if name == "pixels" else name
            raise DigitError(f"{name}_training.num_steps is 0: an untrained {what} makes noise, give at least 1")
        if cfg.precision == "fp16" and not gpu:
            raise DigitError(f"{name}_training.precision is fp16, which needs a GPU: choose auto, fp32 or bf16")
    pieces = {
        name: (cfg.batch_size, num_processes * (cfg.accumulate if isinstance(cfg, TrainConfig) else 1))
        for name, cfg in trained.items()
    }
    if "vqgan" not in reuse and recipe.has_vqgan:
        if recipe.published_vqgan:
            raise DigitError(
                f"vqgan_start is {recipe.vqgan_start}, a published tokenizer that is no part of this package: digit "
                f"convert --vqgan {recipe.vqgan_start} --out {recipe.vqgan_start} fetches it, then give its folder, "
                f"--reuse_vqgan {recipe.vqgan_start}/vqgan (digit fit does both)"
            )
        if recipe.vqgan_training.num_steps:
            pieces["vqgan"] = recipe.vqgan_training.batch_size, num_processes
        elif recipe.vqgan_start == "scratch":
            raise DigitError(
                "vqgan_start is scratch and vqgan_training.num_steps 0: an untrained VQGAN renders nothing"
            )
        elif recipe.vqgan.num_levels > 1:
            raise DigitError(
                f"vqgan.num_levels is {recipe.vqgan.num_levels} and vqgan_training.num_steps 0: the carried VQGAN has "
                "one level, and training gives codes to the others; give at least 1"
            )
    for name, (batch_size, number) in pieces.items():
        if batch_size % number:
            raise DigitError(
                f"{name}_training.batch_size {batch_size} does not split into {number} equal micro-batches "
                f"({num_processes} processes x accumulate): give a multiple"
            )


def check_windows(recipe: Recipe, reuse: Iterable[str]) -> None:
    """Raise DigitError where a training decodes windows that are no part of its images, or cut through their cells."""
    vqgan = vqgan_config(recipe)
    trained = {"pixels": recipe.pixels_training} if recipe.renderer_kind == "pixels" else {}
    trained |= {"vqgan": recipe.vqgan_training} if recipe.has_vqgan and "vqgan" not in reuse else {}
    for name, cfg in trained.items():
        if cfg.num_steps and cfg.window and (cfg.window >= vqgan.resolution or cfg.window % vqgan.reduction):
            raise DigitError(
                f"{name}_training.window is {cfg.window}: it must be below the {vqgan.resolution} px of the images and "
                f"a multiple of {vqgan.reduction}, the pixels per token; 0 decodes whole images"
            )


def check_robustness(recipe: Recipe, name: str) -> None:
    """Raise DigitError for noisy inputs and code losses that one of ROLES cannot have: a masked model, and layers that
    the model lacks."""
    role = get_role(name)
    cfg, training = recipe.training(role), f"{role.settings}_training"
    if not isinstance(cfg, TrainConfig):
        return
    weights = {f"{token}_code_weight": weight for token, weight in cfg.code_weights.items()}
    weights |= {"input_noise": cfg.input_noise} if cfg.input_noise else {}
    if role.kind == "masked" and weights:
        setting, value = next(iter(weights.items()))
        raise DigitError(f"{training}.{setting} is {value}, but {name} is a masked model, and {NEXT_TOKEN_ONLY}")
    try:
        cfg.code_layers(recipe.size(role).depth)
    except DigitError as error:
        raise DigitError(f"{training}.{error}") from None


def check_warmup(recipe: Recipe, chosen: Iterable[str], *, warn: bool = True) -> None:
    """Raise DigitError for a warm-up that somebody chose longer than the training; say so of a recipe's own."""
    for role in map(get_role, recipe.model_names):
        name, cfg = role.settings, recipe.training(role)
        if cfg.warmup_steps > cfg.num_steps:
            setting = f"{name}_training.warmup_steps"
            text = f"{setting} is {cfg.warmup_steps}, longer than the training of {cfg.num_steps} steps"
            if setting in chosen:
                raise DigitError(f"{text}: the learning rate would never reach its peak, give fewer")
            fewer = max(1, cfg.num_steps // 10)
            if warn:
                log.warning("%s: the learning rate will not reach its peak; --%s %d lets it", text, setting, fewer)


def check_own_steps(recipe: Recipe, chosen: Iterable[str], models: Iterable[str] = tuple(OWN_STEPS)) -> None:
    """Raise DigitError where somebody chose other updates of renderers, and the recipe has a number for some of them.

    models: those that are trained; by default all, as where they are compared.
    """
    chosen, setting = set(chosen), "renderer_training.num_steps"
    for model, name in OWN_STEPS.items():
        steps = getattr(recipe, name)
        if model in models and setting in chosen and name not in chosen and steps is not None:
            raise DigitError(
                f"{setting} is {recipe.renderer_training.num_steps}, but {model} would still train for {name}, {steps} "
                f"updates: set {name} too, to null for as many as the renderer, or to {steps} to leave it"
            )


def check_sampling(recipe: Recipe, num_classes: int, chosen: Collection[str]) -> None:
    """Raise DigitError for guidance of a model that is trained without what guides it.

    Without labels, the scale that a recipe has for the prior is not used (`Recipe.sampling_of`); a chosen one is
    refused.
    """
    unlabelled = not num_classes and "sampling.prior.cfg_scale" in chosen
    if not num_classes and "prior.label_dropout" in chosen and recipe.prior.label_dropout:
        raise DigitError("prior.label_dropout is set, but the models get no labels: leave it out, or give labels")
    shown = "pixels.labels" if recipe.renderer_kind == "pixels" else "renderer.labels"
    if not num_classes and shown in chosen and getattr(recipe, shown.partition(".")[0]).labels:
        raise DigitError(f"{shown} is true, but the data has no labels: leave it out, or give labels")
    if num_classes and getattr(recipe, shown.partition(".")[0]).labels and not recipe.prior.label_dropout:
        raise DigitError(
            f"{shown} is true and prior.label_dropout 0, so that hardly a training image shows the renderer how "
            f"pictures without a class look: set prior.label_dropout, to 0.1 for example, or {shown} to false"
        )
    guides = {"prior": ("label_dropout", not unlabelled), "renderer": ("prefix_dropout", True)}
    if recipe.renderer_kind == "pixels" or (recipe.renderer.labels and num_classes):
        del guides["renderer"]  # it takes no settings of sampling; it is guided by labels too
    for name, (dropout, known) in guides.items():
        scale = getattr(recipe.sampling, name).cfg_scale
        if scale != 1 and not (known and getattr(getattr(recipe, name), dropout)):
            labels = "" if known else " on data with labels, class_conditional true"
            raise DigitError(
                f"sampling.{name}.cfg_scale is {scale}, but guidance needs {name}.{dropout} above 0{labels}: set that, "
                "or cfg_scale to 1"
            )


def check_codebook(recipe: Recipe, num_images: int) -> None:
    """Raise DigitError where the codebook has more codes than all images together give patches, or the PCA in front of
    it more components than a patch has features."""
    net, cfg = blank_net(recipe.encoder), recipe.quantizer_cfg
    if cfg.pca > net.dim:
        raise DigitError(
            f"{recipe.quantizer}.pca is {cfg.pca}, the encoder gives {net.dim} features: set it to {net.dim} or less"
        )
    if recipe.quantizer == "product_kmeans" and cfg.num_levels > (seen := cfg.pca or net.dim):
        raise DigitError(
            f"product_kmeans.num_levels is {cfg.num_levels}, and there are {seen} numbers to cut: set it lower"
        )
    tokens = math.prod(net.grid(recipe.encoder.input_size))
    patches, codes = num_images * tokens, cfg.vocab_size
    if patches < codes:
        fewer = max(1, patches * codes // cfg.min_points)
        raise DigitError(
            f"{num_images} images give {patches} patches ({tokens} each), fewer than the {codes} codes of the "
            f"codebook: give more images, or {recipe.quantizer}.num_clusters {fewer} or less"
        )
