"""Features that linear probes are trained on: of priors, VQ-only models and encoders, batch by batch.

Features of a sequence model are those of the released code: the mean over positions, including the start symbol, of
each layer n; n = 0 is the embedding, n = depth the last block (before a pre-norm model's final norm). The released code
trains heads on n = 0 .. depth - 1; here n = depth is probed too. It takes all 257 positions; models of ours never read
their last token in training, so their mean is over 256 unless `positions` says otherwise.

Shapes: N images, B images of a batch, M tokens, L layers, D features.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from digit.data.loader import CropLoader
from digit.data.preprocess import PreprocessConfig
from digit.data.source import ImageSource
from digit.errors import DigitError
from digit.evaluation.feature_files import LABELS, FeatureCache
from digit.metrics.feature_rows import Features
from digit.metrics.probe import ProbeConfig, check_size
from digit.models.sequence import SequenceModel
from digit.pipeline.batch_size import micro_batch_size
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime import distributed
from digit.runtime.files import sha256_tensors
from digit.runtime.hardware import Precision
from digit.runtime.progress import Progress
from digit.tokenizers.base import Encoder

IN_MEMORY = 2**62  # bytes


# ---------------------------------------------------------------- sequence models


@torch.no_grad()
def prior_features(
    model: SequenceModel,
    tokens: Integer[Tensor, "N M"],
    *,
    batch_size: int = 64,
    precision: Precision = "fp32",
    last_position: bool = False,
) -> Float[Tensor, "N L D"]:
    """Tokens (N, M) of images -> (N, depth + 1, D) float32 on the CPU, the mean over positions of every layer.

    Positions are the start symbol and the tokens. The last token is never a training input in our models, so its
    position embedding is untrained, and it is left out unless `last_position` is set (`reads_last` decides it).
    Released models end in an extra symbol that they were trained on. A conditional model gets the unconditional start
    symbol, since the class would reveal the label (`notes_on` tells if that symbol is untrained).
    Raises DigitError for a model with a prefix and for other lengths.
    """
    if model.cfg.prefix_len:
        raise DigitError("a renderer reads the prefix too: probe the prior, or a VQ-only model")
    if tokens.ndim != 2 or tokens.shape[1] != model.cfg.target_len:
        raise DigitError(f"tokens are {tuple(tokens.shape)}, the model reads (N, {model.cfg.target_len})")
    device, training = model.device, model.training
    model.eval()
    parts = []
    for chunk in tokens.split(micro_batch_size(model, batch_size)):
        hidden: list[Tensor] = []
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            model.features(chunk.long().to(device), hidden=hidden)  # as return_hidden=True, without the logits
        kept = hidden if last_position or model.cfg.masked else [h[:, :-1] for h in hidden]
        parts.append(torch.stack([h.float().mean(1) for h in kept], 1).cpu())  # (B, L, D)
    model.train(training)
    return torch.cat(parts)


def layers_of(model: SequenceModel) -> tuple[int, int]:
    """(L, D) of `prior_features`."""
    return model.cfg.depth + 1, model.cfg.embed_dim


def reads_last(cfg: ProbeConfig, *, released: bool) -> bool:
    """Whether the mean is over all positions, the last token's too: as the settings say, else of released models."""
    return released if cfg.positions == "auto" else cfg.positions == "all"


def notes_on(model: SequenceModel, last_position: bool | None = None) -> list[str]:
    """Caveats about a model's features, for the results; `last_position` as for `prior_features`."""
    notes, num = [], model.cfg.target_len + 1
    if last_position is not None and not model.cfg.masked:
        which = (
            f"all {num} positions, as in the released code"
            if last_position
            else f"{num - 1} of {num} positions: the model never read the last token in training"
        )
        notes.append(f"mean over {which}")
    if model.cfg.num_classes and not model.cfg.label_dropout:
        notes.append("trained with a class on every sequence: the unconditional start symbol used here is untrained")
    return notes


# ---------------------------------------------------------------- encoders


def encoder_features(encoder: Encoder, images: UInt8[Tensor, "N 3 S S"]) -> Float[Tensor, "N 1 D"]:
    """uint8 (N, 3, S, S) -> (N, 1, D) float32 on the CPU: the mean over patches at the layer the tokens are made of."""
    return encoder.features(images).mean(1, keepdim=True).float().cpu()


def training_of(pipe: DigitPipeline) -> str:
    """What the encoder was trained on, if known."""
    assert pipe.tokenizer is not None
    return str(pipe.tokenizer.encoder.describe().get("training", "on what is not recorded"))


# ---------------------------------------------------------------- of images


def collect(
    pipe: DigitPipeline, source: ImageSource, *, num: int | None = None, batch_size: int = 64,
    precision: Precision = "fp32", description: str = "features", cfg: ProbeConfig | None = None,
    folder: Path | None = None,
) -> tuple[dict[str, Features], Tensor]:  # fmt: skip
    """Features of each model of a pipeline that can be probed, from centre crops of the labelled images of a source.

    Returns ({"prior", "vq_only", "encoder": (N, L, D)}, those that the pipeline has, and labels (N,) int64). The
    encoder runs once for its own features and for the tokens. vq_only is a renderer without prefix. Each rank takes a
    share; rank 0 gets all features and labels, the others none. Features are float32 tensors, or float16 in files of
    `folder` where they exceed `cfg.memory_budget_bytes`; without a folder they stay in memory.
    Raises DigitError if the source has no labels or the pipeline holds nothing to probe.
    """
    cfg = cfg or ProbeConfig()
    vq_only = pipe.renderer if pipe.renderer is not None and not pipe.renderer.cfg.prefix_len else None
    if pipe.tokenizer is None and vq_only is None:
        raise DigitError("nothing to probe: the pipeline holds neither a discriminative tokenizer nor a VQ-only model")
    chosen = source.limit(num)
    settings: dict[str, Any] = dict(batch_size=batch_size, precision=precision, last_position=last_position(pipe, cfg))

    def of(images: Tensor) -> dict[str, Tensor]:
        found = {}
        if pipe.tokenizer is not None:
            tokens, features = pipe.tokenizer.encode_features(images)
            found["encoder"] = features.mean(1, keepdim=True)
            if pipe.prior is not None:
                found["prior"] = prior_features(pipe.prior, tokens, **settings)
        if vq_only is not None and pipe.vq is not None:
            found["vq_only"] = prior_features(vq_only, pipe.vq.encode(images), **settings)
        return found

    def request() -> dict[str, Any]:
        return settings | {"pipeline": parts_of(pipe), "images": chosen.fingerprint, "crops": asdict(pipe.preprocess)}

    sizes = {}
    if pipe.tokenizer is not None:
        sizes["encoder"] = (1, pipe.tokenizer.encoder.dim)
        if pipe.prior is not None:
            sizes["prior"] = layers_of(pipe.prior)
    if vq_only is not None:
        sizes["vq_only"] = layers_of(vq_only)
    check_size(cfg, len(chosen), max(dim for _, dim in sizes.values()))
    cache = FeatureCache(folder or Path(), request, IN_MEMORY if folder is None else cfg.memory_budget_bytes)
    return collect_features(cache, of, sizes, source, chosen, pipe.preprocess, batch_size, description)


def collect_features(
    cache: FeatureCache, of: Callable[[Tensor], Mapping[str, Tensor]], sizes: Mapping[str, tuple[int, int]],
    source: ImageSource, chosen: ImageSource, preprocess: PreprocessConfig, batch_size: int, description: str,
) -> tuple[dict[str, Features], Tensor]:  # fmt: skip
    """Features of the centre crops of the labelled images among `chosen` of `source`, and their labels (N,) int64.

    of: uint8 (B, 3, S, S) -> features (B, L, D) by name, of the sizes (L, D). All ranks share the images; rank 0 gets
    the result, the others nothing. Raises DigitError without images or labels.
    """
    num_read = 0

    def batches() -> Iterator[dict[str, Tensor]]:
        nonlocal num_read
        with Progress(description, len(distributed.share(len(chosen), batch_size))) as bar:
            for images, labels in shared_crops(chosen, preprocess, batch_size):
                num_read += len(images)
                bar.update(len(images))
                images, labels = images[labels >= 0], labels[labels >= 0]
                if len(images):
                    yield {LABELS: labels} | dict(of(images))

    features = cache.collect(batches, sizes, len(chosen))
    if not distributed.any_rank(LABELS in features):
        if not sum(distributed.gather(num_read)):
            raise DigitError(f"{source.name} holds no image that can be read")
        classes = f" of the classes {', '.join(source.classes[:5])}" if source.classes else ""
        raise DigitError(f"{source.name} has no labels{classes}: a linear probe needs a class for each image")
    labels = features.pop(LABELS, torch.zeros(0, dtype=torch.int64))
    assert isinstance(labels, Tensor)
    return features, labels


def last_position(pipe: DigitPipeline, cfg: ProbeConfig) -> bool:
    """Whether the last token's position is part of the mean, for the models of a pipeline."""
    return reads_last(cfg, released=pipe.info.get("recipe") == "released")


def parts_of(pipe: DigitPipeline) -> dict[str, str]:
    """Hashes of the parts of a pipeline that decide its features."""
    parts = {name: part.fingerprint for name in ("tokenizer", "vq") if (part := getattr(pipe, name)) is not None}
    models = {name: model for name in ("prior", "renderer") if (model := getattr(pipe, name)) is not None}
    return parts | {name: sha256_tensors(model.state_dict()) for name, model in models.items()}


def shared_crops(source: ImageSource, cfg: PreprocessConfig, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the batches of `centre_crops`; batch boundaries are the same for any number of ranks."""
    share = distributed.share(len(source), batch_size)
    loader = CropLoader(
        source, replace(cfg, random_crop=False, flip=False),
        batch_size=batch_size, max_bad_fraction=1.0, start_row=share.start,
    )  # fmt: skip
    for batch in islice(loader, -(-len(share) // batch_size)):
        yield batch.images[batch.ok], batch.labels[batch.ok]
