"""The batch that fits: a function of the models and of the memory that is free."""

from dataclasses import replace

import pytest
import torch
from toy_pipeline import toy_pipeline

from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.pipeline import batch_size as module
from digit.pipeline.batch_size import (
    CPU_BATCH,
    GPU_BATCH,
    SHARE,
    choose_batch_size,
    micro_batch_size,
    sampling_bytes,
)
from digit.sampling.config import SamplingConfig, StageSampling
from digit.tokenizers.vq import VQTokenizer

CFG, GB = SamplingConfig(), 10**9


def paper_parts(size: dict[str, int], vocab_size: int, masked: bool = False):
    """Prior, renderer and VQGAN of the released sizes, without weights."""
    with torch.device("meta"):
        prior = SequenceModel(SequenceConfig(vocab_size=vocab_size, target_len=256, **size))
        prefix = dict(prefix_vocab_size=vocab_size, prefix_len=256)
        renderer = SequenceModel(SequenceConfig(vocab_size=1024, target_len=256, masked=masked, **prefix, **size))
        return prior, renderer, VQTokenizer(VQGAN(VQGANConfig()))


BASE, LARGE = dict(depth=16, embed_dim=1024, num_heads=16), dict(depth=24, embed_dim=1536, num_heads=16)


@pytest.fixture
def on_gpu(monkeypatch):
    """Meta tensors count as a GPU's."""
    monkeypatch.setattr(module, "is_gpu", lambda model: True)


def test_a_gpu_is_filled_to_its_share(on_gpu):
    parts = paper_parts(BASE, 8192)
    for cfg in (CFG, replace(CFG, precision="bf16"), replace(CFG, renderer=StageSampling(cfg_scale=2.0))):
        for free in (1 * GB, 4 * GB, 16 * GB, 40 * GB, 75 * GB):
            size = choose_batch_size(*parts, cfg, free)
            assert size & (size - 1) == 0 and 1 <= size <= GPU_BATCH
            assert size == 1 or sampling_bytes(*parts, cfg, size) <= SHARE * free
            assert size == GPU_BATCH or sampling_bytes(*parts, cfg, 2 * size) > SHARE * free


def test_sizes_of_the_released_models(on_gpu):
    """The full batch on a free 80 GB card, less on one of 24."""
    bf16 = replace(CFG, precision="bf16")
    for parts in (paper_parts(BASE, 8192), paper_parts(BASE, 8192, masked=True), paper_parts(LARGE, 16384)):
        assert choose_batch_size(*parts, CFG, 80 * GB) == choose_batch_size(*parts, bf16, 80 * GB) == GPU_BATCH
    assert choose_batch_size(*paper_parts(BASE, 8192), CFG, 24 * GB) == GPU_BATCH // 2
    assert choose_batch_size(*paper_parts(LARGE, 16384), CFG, 24 * GB) < GPU_BATCH // 2


def test_the_cache_is_counted_to_the_byte(on_gpu):
    """Beyond what passes, a batch of one more costs both caches: 2 x depth x width x positions x bytes."""
    prior, renderer, vq = paper_parts(BASE, 8192)
    grown = sampling_bytes(prior, renderer, vq, CFG, 2) - sampling_bytes(prior, renderer, vq, CFG, 1)
    caches = 2 * 16 * 1024 * (256 + 512) * 4
    assert caches <= grown <= 2 * caches
    alone = sampling_bytes(None, renderer, vq, CFG, 2) - sampling_bytes(None, renderer, vq, CFG, 1)
    assert grown - alone == 2 * 16 * 1024 * 256 * 4  # the prior's


def test_more_of_anything_takes_more():
    pipe = toy_pipeline()
    parts = pipe.prior, pipe.renderer, pipe.vq
    least = sampling_bytes(*parts, CFG, 8)
    guided = replace(CFG, prior=StageSampling(cfg_scale=2.0), renderer=StageSampling(cfg_scale=2.0))
    assert sampling_bytes(*parts, CFG, 16) > least < sampling_bytes(*parts, guided, 8)
    assert sampling_bytes(None, *parts[1:], CFG, 8) < least


def test_a_cpu_takes_its_own_size_unless_memory_is_short():
    pipe = toy_pipeline()
    parts = pipe.prior, pipe.renderer, pipe.vq
    needed = sampling_bytes(*parts, CFG, CPU_BATCH)
    assert choose_batch_size(*parts, CFG, 10 * needed) == CPU_BATCH
    assert choose_batch_size(*parts, CFG, needed) == CPU_BATCH // 2 and choose_batch_size(*parts, CFG, 0) == 1
    assert pipe.sized(CFG).batch_size == CPU_BATCH and pipe.sized(replace(CFG, batch_size=5)).batch_size == 5


def test_a_batch_is_sized_for_the_precision_that_it_is_sampled_in(monkeypatch):
    pipe, half = toy_pipeline(), replace(CFG, precision="bf16")
    needed = sampling_bytes(pipe.prior, pipe.renderer, pipe.vq, half, CPU_BATCH)
    monkeypatch.setattr("digit.pipeline.pipeline.free_memory", lambda device: int(needed / SHARE) + 1)
    for in_hardware, precision, size in ((True, "bf16", CPU_BATCH), (False, "fp32", CPU_BATCH // 2)):
        monkeypatch.setattr("digit.runtime.hardware.multiplies_bf16", lambda device, answer=in_hardware: answer)
        sized = pipe.sized(half)
        assert (sized.precision, sized.batch_size) == (precision, size)


def test_what_goes_through_a_model_at_a_time(monkeypatch):
    model = toy_pipeline().prior
    assert micro_batch_size(model, 5) == 5 and micro_batch_size(model, 500) == CPU_BATCH
    monkeypatch.setattr(module, "LARGE", 10)
    assert micro_batch_size(model, 500) == module.CPU_MICRO_BATCH_OF_LARGE
    monkeypatch.setattr(module, "is_gpu", lambda model: True)
    assert micro_batch_size(model, 500) == 500
