"""A seed decides its image, whatever the rest of the batch; cached = uncached decoding; properties of filters."""

import torch
from generate import generate
from hypothesis import given, settings
from hypothesis import strategies as st

from digit.models.sequence import SequenceConfig, SequenceModel
from digit.sampling.filters import filter_logits, sample_from_uniform

torch.manual_seed(0)
SIZES = dict(depth=2, embed_dim=64, num_heads=2, vocab_size=33, target_len=9, prefix_vocab_size=17, prefix_len=5)
CONDITIONS = dict(num_classes=4, label_dropout=0.1, prefix_dropout=0.1, norm="pre")
CONFIG = SIZES | CONDITIONS
MODELS = {masked: SequenceModel(SequenceConfig(**CONFIG, masked=masked)).eval() for masked in (False, True)}
POOL = 12
PREFIX, LABELS = torch.randint(17, (POOL, 5)), torch.randint(-1, 4, (POOL,))


def random_rows(masked, rows, **how):
    return generate(MODELS[masked], seeds=[100 + r for r in rows], prefix=PREFIX[rows], labels=LABELS[rows], **how)


@settings(max_examples=30, deadline=None)
@given(
    masked=st.booleans(),
    rows=st.lists(st.integers(0, POOL - 1), min_size=1, max_size=20),
    scale=st.sampled_from([1.0, 1.5]),
    dtype=st.sampled_from([None, torch.bfloat16]),
    micro_batch_size=st.sampled_from([4, 16]),
)
def test_an_image_does_not_depend_on_its_batch(masked, rows, scale, dtype, micro_batch_size):
    how = dict(cfg_scale=scale, dtype=dtype, micro_batch_size=micro_batch_size, top_p=0.95)
    reference = random_rows(masked, list(range(POOL)), **how)
    assert random_rows(masked, rows, **how).equal(reference[rows])


@settings(max_examples=15, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**63), min_size=1, max_size=6), known=st.integers(0, 9), top_k=st.integers(0, 40))
def test_cached_equals_uncached(seeds, known, top_k):
    size = len(seeds)
    how = dict(seeds=seeds, prefix=PREFIX[:size], top_k=top_k, micro_batch_size=8, given=torch.full((size, known), 3))
    assert generate(MODELS[False], **how).equal(generate(MODELS[False], use_cache=False, **how))


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30),
    top_k=st.integers(1, 30),
    top_p=st.floats(0.01, 1.0),
    u=st.floats(0, 1, exclude_max=True),
)
def test_filters_keep_the_likeliest(values, top_k, top_p, u):
    logits = torch.tensor([values])
    for kept in (filter_logits(logits, top_k=top_k), filter_logits(logits, top_p=top_p)):
        inside, outside = logits[kept.isfinite()], logits[~kept.isfinite()]
        assert len(inside) and (not len(outside) or inside.min() >= outside.max())
        code = sample_from_uniform(kept, torch.tensor([u], dtype=torch.float64))
        assert kept[0, code].isfinite().all()
    assert filter_logits(logits, top_k=top_k).isfinite().sum() >= min(top_k, len(values))
    probability = logits.softmax(-1, dtype=torch.float64)
    assert probability[filter_logits(logits, top_p=top_p).isfinite()].sum() >= top_p - 1e-9
