"""Samplers kept from call to call: made once, not shared, and gone with their pipeline without garbage collection."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from toy_pipeline import toy_pipeline

from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.transformer import KVCache
from digit.sampling.config import StageSampling
from digit.sampling.kept import KeptSamplers
from digit.sampling.next_token import NextTokenSampler, RecordedSteps
from digit.sampling.sampler import Sampler

PLAIN = StageSampling()
HOW = dict(precision="fp32", micro_batch_size=2)


@pytest.fixture
def recording(monkeypatch):
    """Samplers take steps of fixed shapes, as on a GPU."""
    init = NextTokenSampler.__init__
    monkeypatch.setattr(
        NextTokenSampler, "__init__", lambda self, model, **how: init(self, model, fixed_shapes=True, **how)
    )


@pytest.fixture
def alive(monkeypatch):
    """Counts the samplers and caches that exist, without the garbage collector's help."""
    made = []
    for kind in (Sampler, KVCache, RecordedSteps):

        def noting(self, *args, init=kind.__init__, **how):
            made.append(weakref.ref(self))
            init(self, *args, **how)

        monkeypatch.setattr(kind, "__init__", noting)
    gc.collect()
    gc.disable()
    yield lambda: [type(x()).__name__ for x in made if x() is not None]
    gc.enable()


def prior(**changes):
    return SequenceModel(SequenceConfig(vocab_size=7, target_len=4, depth=1, embed_dim=16, num_heads=2, **changes))


def use(kept, model, cfg=PLAIN, **changes):
    with kept.lend("prior", model, cfg, **(HOW | changes)) as sampler:
        sampler([1, 2, 3])
        return id(sampler), weakref.ref(sampler)


@pytest.mark.parametrize("kind", [{}, {"prior": False}, {"masked": True}])
def test_samplers_and_caches_die_with_the_call(alive, kind):
    pipeline = toy_pipeline(**kind)
    pipeline.generate(num=3, seed=1, batch_size=2)
    assert alive() == []
    if "prior" in kind:  # the others need an encoder
        pipeline.complete(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), batch_size=2)
        assert alive() == []
    stream = pipeline.stream(num=4, batch_size=2)
    next(stream)
    assert alive()
    del stream  # not at its end
    assert alive() == []


@pytest.mark.parametrize("kind", [{}, {"prior": False}])
def test_recording_samplers_die_with_their_pipeline(alive, recording, kind):
    pipeline = toy_pipeline(**kind)
    first = pipeline.generate(num=3, seed=1, batch_size=2)
    kept = alive()
    assert kept.count("NextTokenSampler") == kept.count("KVCache") == (1 if kind else 2)
    assert pipeline.generate(num=3, seed=1, batch_size=2).equal(first)
    assert alive() == kept  # the same ones served
    if "prior" in kind:
        pipeline.complete(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), batch_size=2)
        assert alive() == kept
    pipeline.generate(num=3, seed=1, batch_size=2, renderer={"top_k": 3})
    assert len(alive()) == len(kept)  # the renderer's was replaced
    del pipeline
    assert alive() == []


def test_recording_samplers_sample_the_same(recording):
    wanted = toy_pipeline().generate(num=5, seed=3, batch_size=2)
    pipeline = toy_pipeline()
    assert all(pipeline.generate(num=5, seed=3, batch_size=2).equal(wanted) for _ in range(2))


def test_an_open_stream_keeps_its_sampler_to_itself(recording):
    pipeline, wanted = toy_pipeline(), toy_pipeline().generate(num=4, seed=3, batch_size=2)
    for _ in range(2):  # with samplers that are new, and with kept ones
        streams = [pipeline.stream(num=4, seed=3, batch_size=2) for _ in range(2)]
        for first, second in zip(*streams, strict=True):
            assert first.images.equal(second.images)
    assert pipeline.generate(num=4, seed=3, batch_size=2).equal(wanted)


def test_a_sampler_is_made_again_when_it_would_sample_something_else(recording):
    kept, model = KeptSamplers(), prior()
    first, _ = use(kept, model)
    assert use(kept, model)[0] == first
    for settings in ({"cfg": StageSampling(top_k=2)}, {"micro_batch_size": 3}, {"precision": "bf16"}):
        _, sampler = use(kept, model, **settings)
        assert sampler() is not None and use(kept, model, **settings)[1]() is sampler()
    for change in (
        lambda: model.head.weight.detach().mul_(2),
        lambda: model.load_state_dict(prior().state_dict()),
        lambda: setattr(model, "head", torch.nn.Linear(16, 7, bias=False)),
        lambda: model.double(),
    ):
        before = use(kept, model)[1]()
        change()
        assert use(kept, model)[1]() is not before
    before = use(kept, model)[1]()
    assert use(kept, copy.deepcopy(model))[1]() is not before


def test_after_an_error_the_sampler_is_not_kept(recording):
    kept, model = KeptSamplers(), prior()
    with pytest.raises(KeyboardInterrupt), kept.lend("prior", model, StageSampling(), **HOW):
        raise KeyboardInterrupt
    assert kept.held_bytes == 0 and not kept._kept


def test_what_is_held_is_counted_and_not_copied(recording):
    kept, model = KeptSamplers(), prior()
    assert kept.held_bytes == 0
    use(kept, model)
    cache = 2 * 2 * 16 * 4 * 4  # keys and values x rows x width x positions x bytes
    assert kept.held_bytes == cache
    use(kept, model, precision="bf16")
    weights = sum(p.numel() for p in model.parameters()) * 2
    assert cache // 2 <= kept.held_bytes <= cache // 2 + weights
    assert copy.deepcopy(kept).held_bytes == pickle.loads(pickle.dumps(kept)).held_bytes == 0
