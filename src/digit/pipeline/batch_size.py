"""Choose how many images to sample together, from the device's best batch size and its free memory.

The estimate adds to the weights of the loaded pipeline: copies of the weights in another precision or layout, the
key-value caches of both stages (they may exist together), and the largest temporary memory (activations and logits of
a stage, or the decoder's maps). KV cache of one image: 2 (keys, values) x depth x width x positions. Measured peaks on
a CPU were 82 to 86% of the estimate for next-token models, 59% for a masked renderer.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import torch

from digit.models.pixels import PixelConfig
from digit.models.sequence import SequenceConfig
from digit.sampling.config import SamplingConfig, StageSampling
from digit.sampling.pixels import RENDERED_TOGETHER, RENDERED_TOGETHER_ON_GPU
from digit.tokenizers.vq import VQTokenizer

CPU_BATCH, GPU_BATCH = 64, 128  # largest batches; a few images take as long as a whole batch
CPU_MICRO_BATCH_OF_LARGE = 16  # images; a short micro-batch takes as long as a full one
LARGE = 50e6  # parameters. Above this size, use the smaller micro-batch.
SHARE = 0.8  # of the free memory; the rest covers what the estimate leaves out
LOGIT_BYTES = 48  # per logit in the filters: logits, sorted logits, their order, float64 probabilities and sums
DECODER_MAPS = 6  # full-resolution maps that a residual block holds at the same time


@runtime_checkable
class SampledModel(Protocol):
    """What an estimate reads of a `SequenceModel`; `digit plan` gives stand-ins without weights."""

    @property
    def cfg(self) -> SequenceConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def parameters(self) -> Callable[[], Iterable[torch.Tensor]]: ...


def micro_batch_size(model: SampledModel, batch_size: int) -> int:
    """Images of a batch that `model` computes together: all on a GPU, as many as the cache holds on a CPU.

    Does not depend on the number of requested images, so that an image stays the same in every request.
    """
    if is_gpu(model):
        return batch_size
    large = sum(p.numel() for p in model.parameters()) > LARGE
    return min(batch_size, CPU_MICRO_BATCH_OF_LARGE if large else CPU_BATCH)


def is_gpu(model: SampledModel) -> bool:
    """Whether a model is on a CUDA device."""
    return model.device.type == "cuda"


def choose_batch_size(
    prior: SampledModel | None, renderer: SampledModel, vq: VQTokenizer | None, cfg: SamplingConfig, free: int
) -> int:
    """The largest power of two, up to 64 on a CPU and 128 on a GPU, that fits into 80% of `free` bytes; at least 1.

    Does not depend on the number of requested images: the first 8 of 50,000 images are those of a call for 8.
    """
    size = GPU_BATCH if is_gpu(renderer) else CPU_BATCH
    while size > 1 and sampling_bytes(prior, renderer, vq, cfg, size) > SHARE * free:
        size //= 2
    return size


def sampling_bytes(
    prior: SampledModel | None, renderer: SampledModel, vq: VQTokenizer | None, cfg: SamplingConfig, batch_size: int
) -> int:
    """Upper estimate of the memory in bytes that a batch takes in addition to the loaded weights.

    `vq` is None for a renderer straight to pixels, which has a decoder of its own.
    """
    stages = [(renderer, cfg.renderer)] + ([(prior, cfg.prior)] if prior is not None else [])
    kept = sum(_kept_bytes(model, stage, cfg, batch_size) for model, stage in stages)
    passing = [_passing_bytes(model, stage, cfg, batch_size) for model, stage in stages]
    if vq is not None:
        net, together = vq.vqgan.cfg, vq.decoded_together
    elif isinstance(renderer.cfg, PixelConfig):
        net, together = renderer.cfg.decoder, RENDERED_TOGETHER_ON_GPU if is_gpu(renderer) else RENDERED_TOGETHER
    else:  # another kind of renderer, of which nothing is known
        return kept + max(passing)
    side = net.resolution
    maps = DECODER_MAPS * together * net.level_channels[0] * side**2 * 4  # float32
    pictures = 2 * batch_size * 3 * side**2  # uint8, as chunks and joined
    return kept + max(*passing, maps + pictures)


def _kept_bytes(model: SampledModel, stage: StageSampling, cfg: SamplingConfig, batch_size: int) -> int:
    """Bytes of a stage's cache, and of a second copy of its weights where they are cast, or packed for a CPU."""
    element, shape = _element(cfg), model.cfg
    copied = element < model.dtype.itemsize or not is_gpu(model)
    weights = sum(p.numel() for p in model.parameters()) * element if copied else 0
    if shape.masked or isinstance(shape, PixelConfig):
        return weights
    positions = shape.num_positions - 1
    return weights + _rows(model, stage, batch_size) * 2 * shape.depth * shape.embed_dim * positions * element


def _passing_bytes(model: SampledModel, stage: StageSampling, cfg: SamplingConfig, batch_size: int) -> int:
    """Bytes of the activations of a pass over the whole sequence, and of the logits in the filters."""
    rows, shape = _rows(model, stage, batch_size), model.cfg
    length = shape.prefix_len if isinstance(shape, PixelConfig) else shape.num_positions
    width = 8 * shape.embed_dim + 2 * shape.mlp_dim  # q, k, v and copies, two of the stream; the MLP before and after
    activations = rows * length * width * _element(cfg)
    return activations + rows * (shape.target_len if shape.masked else 1) * shape.vocab_size * LOGIT_BYTES


def _rows(model: SampledModel, stage: StageSampling, batch_size: int) -> int:
    """Sequences in a forward pass; guidance takes two per image."""
    return micro_batch_size(model, batch_size) * (2 if stage.cfg_scale != 1 else 1)


def _element(cfg: SamplingConfig) -> int:
    return 2 if cfg.precision == "bf16" else 4  # bytes
