"""Sampling of several codes a position: equal tokens with and without cache, in fixed shapes, and from given ones."""

import pytest
import torch
from generate import generate

from digit.models.sequence import SequenceConfig, SequenceModel
from digit.sampling.filters import image_uniforms, sample_from_uniform
from digit.sampling.next_token import NextTokenSampler

SIZES = dict(depth=2, embed_dim=32, num_heads=2, vocab_size=7, target_len=12, levels=3, num_classes=3)
LABELS = torch.arange(5) % 3


def make(**changes) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(SequenceConfig(**(SIZES | changes))).eval()


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("changes", [{}, {"norm": "pre", "qk_norm": True}, {"levels": 12}, {"levels": 1}], ids=str)
def test_cached_equals_uncached(scale, changes):
    model = make(label_dropout=0.2, **changes)
    how = dict(seeds=range(5), labels=LABELS, top_p=0.9, cfg_scale=scale, cfg_schedule="linear")
    sampled = generate(model, **how)
    assert sampled.shape == (5, 12) and sampled.max() < 7
    assert sampled.equal(generate(model, use_cache=False, **how))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_steps_of_fixed_shapes_sample_the_same(scale, monkeypatch):
    monkeypatch.setattr("digit.sampling.next_token.SPAN", 2)
    model = make(label_dropout=0.2)
    how = dict(micro_batch_size=3, cfg_scale=scale, top_k=5, top_p=0.9, cfg_schedule="cosine")
    fixed, free = (NextTokenSampler(model, fixed_shapes=f, **how) for f in (True, False))
    for known in (0, 1, 3, 5, 11, 12):  # also in the middle of a position
        told, given = [], torch.full((5, known), 2)
        sampled = fixed(range(5), labels=LABELS, given=given, on_token=told.append)
        assert sampled.equal(free(range(5), labels=LABELS, given=given))
        assert sum(told) == 5 * (12 - known) and sampled[:, :known].eq(2).all()


def test_given_tokens_continue_the_same_way():
    model = make()
    whole = generate(model, seeds=[0, 1, 2], labels=LABELS[:3])
    for known in range(13):
        assert generate(model, seeds=[0, 1, 2], labels=LABELS[:3], given=whole[:, :known]).equal(whole)


def test_tokens_follow_the_models_probabilities():
    model, labels = make(target_len=6), torch.zeros(4, dtype=torch.int64)
    tokens = generate(model, seeds=range(4), labels=labels)
    u = image_uniforms(range(4), "prior", (6,))
    with torch.no_grad():
        logits = model(tokens, labels=labels)
    assert sample_from_uniform(logits, u).equal(tokens)  # each by its own number, given those before it
    greedy = generate(model, seeds=[1, 2], temperature=0)
    assert model(greedy).argmax(-1).equal(greedy)


def test_a_renderer_of_one_level_reads_a_prefix_of_several():
    model = make(
        levels=1, num_classes=0, target_len=6, prefix_vocab_size=7, prefix_len=12, prefix_levels=3, norm="pre",
        conditioning="aligned", prefix_rows=2, target_rows=2, prefix_dropout=0.2,
    )  # fmt: skip
    prefix = torch.randint(7, (5, 12), generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 2.0):
        how = dict(seeds=range(5), prefix=prefix, cfg_scale=scale)
        sampled = generate(model, **how)
        assert sampled.equal(generate(model, use_cache=False, **how))
        assert sampled.equal(generate(model, fixed_shapes=True, **how))
        assert not sampled.equal(generate(model, **how | {"prefix": prefix.flip(0)}))
