"""How many images are drawn together: as many as pay, and as fit into free memory.

The estimate counts what is there beside the weights of the loaded pipeline: copies of them in another precision or
layout, the key-value caches of both stages, which may be there together, and the largest of what comes and goes
(activations and logits of a stage, the decoder's maps). KV cache of one image: 2 (keys, values) x depth x width x
positions. Peaks measured on a CPU were 82 to 86% of it (next-token models), 59% for a masked renderer.
"""

import os
from pathlib import Path

import torch

from digit.models.sequence import SequenceModel
from digit.runtime import distributed
from digit.sampling.config import SamplingConfig, StageSampling
from digit.tokenizers.vq import VQTokenizer

CPU_BATCH, GPU_BATCH = 64, 128  # the most; few images cost as much as a whole batch
CPU_MICRO_BATCH_OF_LARGE = 16  # images through a large model at a time; a short pass costs as much as a full one
LARGE = 50e6  # parameters: from here on two images should not pay for 64
SHARE = 0.8  # of the free memory; the rest is for what an estimate leaves out
LOGIT_BYTES = 48  # an element through the filters: logits, sorted, their order, probabilities and sums in float64
DECODER_MAPS = 6  # full-resolution maps that a residual block holds at once


def micro_batch_size(model: SequenceModel, batch_size: int) -> int:
    """Images of a batch that go through `model` at a time: all on a GPU, on a CPU what its cache holds.

    No function of how many are asked for, so that an image stays the same.
    """
    if is_gpu(model):
        return batch_size
    large = sum(p.numel() for p in model.parameters()) > LARGE
    return min(batch_size, CPU_MICRO_BATCH_OF_LARGE if large else CPU_BATCH)


def is_gpu(model: SequenceModel) -> bool:
    """Whether a model lies on a CUDA device."""
    return model.device.type == "cuda"


def choose_batch_size(
    prior: SequenceModel | None, renderer: SequenceModel, vq: VQTokenizer, cfg: SamplingConfig, free: int
) -> int:
    """The largest power of two, up to 64 on a CPU and 128 on a GPU, that fits into 80% of `free` bytes; at least 1.

    No function of how many are asked for either: the first of 50,000 images are those of a call for 8.
    """
    size = GPU_BATCH if is_gpu(renderer) else CPU_BATCH
    while size > 1 and sampling_bytes(prior, renderer, vq, cfg, size) > SHARE * free:
        size //= 2
    return size


def sampling_bytes(
    prior: SequenceModel | None, renderer: SequenceModel, vq: VQTokenizer, cfg: SamplingConfig, batch_size: int
) -> int:
    """Memory in bytes that a batch takes beside the loaded weights, an estimate from above."""
    stages = [(renderer, cfg.renderer)] + ([(prior, cfg.prior)] if prior is not None else [])
    kept = sum(_kept_bytes(model, how, cfg, batch_size) for model, how in stages)
    passing = [_passing_bytes(model, how, cfg, batch_size) for model, how in stages]
    net, side = vq.vqgan.cfg, vq.resolution
    maps = DECODER_MAPS * vq.decoded_together * net.level_channels[0] * side**2 * 4  # float32
    pictures = 2 * batch_size * 3 * side**2  # uint8, in parts and whole
    return kept + max(*passing, maps + pictures)


def _kept_bytes(model: SequenceModel, how: StageSampling, cfg: SamplingConfig, batch_size: int) -> int:
    """The cache of a stage, and its weights once more where they are cast, or packed for a CPU."""
    element, shape = _element(cfg), model.cfg
    copied = element < model.dtype.itemsize or not is_gpu(model)
    weights = sum(p.numel() for p in model.parameters()) * element if copied else 0
    if shape.masked:
        return weights
    positions = shape.prefix_len + shape.target_len
    return weights + _rows(model, how, batch_size) * 2 * shape.depth * shape.embed_dim * positions * element


def _passing_bytes(model: SequenceModel, how: StageSampling, cfg: SamplingConfig, batch_size: int) -> int:
    """Activations of a pass over the whole sequence, and logits on their way through the filters."""
    rows, shape = _rows(model, how, batch_size), model.cfg
    length = shape.prefix_len + 1 + shape.target_len
    width = 8 * shape.embed_dim + 2 * shape.mlp_dim  # q, k, v and copies, two of the stream; the MLP before and after
    activations = rows * length * width * _element(cfg)
    return activations + rows * (shape.target_len if shape.masked else 1) * shape.vocab_size * LOGIT_BYTES


def _rows(model: SequenceModel, how: StageSampling, batch_size: int) -> int:
    """Sequences in a pass; guidance takes two an image."""
    return micro_batch_size(model, batch_size) * (2 if how.cfg_scale != 1 else 1)


def _element(cfg: SamplingConfig) -> int:
    return 2 if cfg.precision == "bf16" else 4  # bytes


def free_bytes(device: torch.device) -> int:
    """Free memory of a device in bytes; on a GPU with what torch holds unused, on a CPU this process's share."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))  # kB
        return free // distributed.local_size()
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 2**32
