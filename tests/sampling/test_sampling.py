"""Filters and samplers: what is sampled, what is kept, what is refused."""

import copy

import pytest
import torch
from generate import generate

from digit.errors import DigitError
from digit.models.products import PackedLinear, can_pack, pack_linears
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.sampling.filters import (
    filter_logits,
    guidance_scales,
    guide,
    image_uniforms,
    sample_from_uniform,
)
from digit.sampling.masked import MaskedSampler, halton_rank, num_to_hide
from digit.sampling.next_token import NextTokenSampler

SMALL = dict(depth=2, embed_dim=32, num_heads=2, vocab_size=11, target_len=6)


def make(**changes):
    return SequenceModel(SequenceConfig(**(SMALL | changes))).eval()


def renderer(**changes):
    return make(prefix_vocab_size=7, prefix_len=4, norm="pre", **changes)


PREFIX = torch.arange(20).view(5, 4) % 7
ALIGNED = dict(conditioning="aligned", prefix_rows=2, target_rows=3)
ROTARY = dict(rotary="2d", prefix_rows=2, target_rows=3)


# -------------------------------------------------------------------- filters


def test_top_k_keeps_the_k_largest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[False, True, False, True]]
    assert filter_logits(logits, top_k=0).equal(logits) and filter_logits(logits, top_k=9).equal(logits)


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([[0.1, 0.5, 0.4]]).log()
    for p, kept in ((0.49, [False, True, False]), (0.51, [False, True, True]), (1e-9, [False, True, False])):
        assert filter_logits(logits, top_p=p).isfinite().tolist() == [kept], p
    assert filter_logits(logits, top_p=1.0).equal(logits)


def test_codes_as_likely_as_the_last_one_kept_stay():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, True, False, True]]
    assert filter_logits(torch.zeros(1, 4), top_p=0.3).isfinite().all()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (7, 1.0), (7, 0.6), (1, 1.0), (30, 0.05)])
def test_filters_against_code_by_code(top_k, top_p):
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * 3
    for row, kept in zip(logits, filter_logits(logits, top_k=top_k, top_p=top_p).isfinite(), strict=True):
        order = row.argsort(descending=True)[: top_k or None]
        mass, wanted = 0.0, set()
        for code, share in zip(order.tolist(), row[order].double().softmax(0).tolist(), strict=True):
            if mass < top_p:
                wanted.add(code)
            mass += share
        assert set(kept.nonzero()[:, 0].tolist()) == wanted


def test_temperature_comes_before_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    assert filter_logits(logits, temperature=0.1, top_p=0.9).isfinite().sum() == 1
    assert filter_logits(logits, temperature=10.0, top_p=0.9).isfinite().sum() == 3


def test_inverse_cdf():
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25]).log().expand(5, 4)
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert sample_from_uniform(logits, u).tolist() == [0, 0, 2, 3, 3]


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    u = image_uniforms(range(20000), "x", (1,))[:, 0]
    counts = sample_from_uniform(logits.expand(len(u), 4), u).bincount(minlength=4) / len(u)
    torch.testing.assert_close(counts, logits.exp(), atol=0.015, rtol=0)


def test_uniforms_depend_on_seed_and_stage():
    a = image_uniforms([3, 2**32 + 3, 3], "prior", (4,))
    assert a[0].equal(a[2]) and not a[0].equal(a[1])
    assert not a[0].equal(image_uniforms([3], "renderer", (4,))[0])


def test_guidance_formula():
    c, u = torch.randn(2, 3, 5)
    torch.testing.assert_close(guide(torch.cat([c, u]), torch.tensor(2.5)), u + 2.5 * (c - u))


def test_schedules_of_guidance():
    assert guidance_scales(3.0, "constant", 4).tolist() == [3.0] * 4
    assert guidance_scales(3.0, "linear", 4).tolist() == [1.5, 2.0, 2.5, 3.0]
    torch.testing.assert_close(guidance_scales(3.0, "cosine", 2), torch.tensor([2.0, 3.0]))
    assert guidance_scales(1.0, "cosine", 9).eq(1).all()


@pytest.mark.parametrize("masked", [False, True])
def test_schedules_change_the_tokens(masked):
    model = make(num_classes=3, label_dropout=0.5, masked=masked)
    how = dict(seeds=range(20), labels=torch.arange(20) % 3, cfg_scale=6.0)
    sampled = {name: generate(model, cfg_schedule=name, **how) for name in ("constant", "linear", "cosine")}
    assert not sampled["constant"].equal(sampled["linear"]) and not sampled["linear"].equal(sampled["cosine"])


# -------------------------------------------------------------------- order of a masked model


def test_halton_order_covers_the_picture_from_the_first_tokens_on():
    rank = halton_rank((8, 8))
    assert rank.sort().values.tolist() == list(range(64))
    first = (rank < 16).view(8, 8)  # a quarter of the cells, in every quarter of the picture
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8)):
            assert 3 <= int(first[rows, columns].sum()) <= 5
    assert rank[4 * 8 + 2] == 0  # the first point is (1/2, 1/3): row 4, column 2
    assert halton_rank((2, 3)).sort().values.tolist() == list(range(6))


def test_halton_order_decides_the_cells_in_its_order():
    model, decided = make(masked=True, target_len=16), []
    features = model.features

    def watch(target, **condition):
        decided.append((target != model.cfg.mask_token)[0])
        return features(target, **condition)

    sampler = MaskedSampler(model, num_steps=4, order="halton", micro_batch_size=1)
    sampler.model.features = watch
    sampled = sampler([1])
    rank = halton_rank((4, 4))
    assert [int(known.sum()) for known in decided] == [0, 2, 5, 10]
    for known in decided[1:]:
        assert rank[known].max() < rank[~known].min()
    assert sampled.shape == (1, 16) and (sampled < model.cfg.vocab_size).all()


def test_an_order_needs_a_grid():
    with pytest.raises(DigitError, match="12 tokens"):
        MaskedSampler(make(masked=True, target_len=12), order="halton")


# -------------------------------------------------------------------- next token


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        ALIGNED,
        ALIGNED | {"added_blocks": 1, "encoder_depth": 2, "qk_norm": True},
        ROTARY | {"tied_embeddings": True},
        ROTARY | ALIGNED | {"learned_positions": False},
        {"random_order": True, "rotary": "1d"},  # in raster order, as before the end of its training
    ],
    ids=str,
)
def test_cached_equals_uncached(scale, changes):
    model = renderer(prefix_dropout=0.2, **changes)
    how = dict(seeds=range(5), prefix=PREFIX, top_p=0.9, cfg_scale=scale, cfg_schedule="linear")
    assert generate(model, **how).equal(generate(model, use_cache=False, **how))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        ALIGNED | {"target_rows": 1},
        ROTARY | {"target_rows": 1, "tied_embeddings": True},
        {"rotary": "1d", "learned_positions": False},
        {"random_order": True},
    ],
    ids=["prefix", "aligned", "rotary", "rotary alone", "random order"],
)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_steps_of_fixed_shapes_sample_the_same(scale, changes, monkeypatch):
    monkeypatch.setattr("digit.sampling.next_token.SPAN", 4)
    model = renderer(prefix_dropout=0.2, target_len=7, **changes)
    how = dict(micro_batch_size=3, cfg_scale=scale, top_k=9, top_p=0.9, cfg_schedule="cosine")
    fixed, free = (NextTokenSampler(model, fixed_shapes=f, **how) for f in (True, False))
    for given in (None, torch.full((5, 3), 2), torch.full((5, 7), 1)):
        told = []
        sampled = fixed(range(5), prefix=PREFIX, given=given, on_token=told.append)
        assert sampled.equal(free(range(5), prefix=PREFIX, given=given))
        assert sum(told) == 5 * (7 - (0 if given is None else given.shape[1]))


def test_a_sampler_serves_many_batches():
    model = make()
    sampler = NextTokenSampler(model, micro_batch_size=2)
    whole = generate(model, seeds=range(5), micro_batch_size=2)
    assert torch.cat([sampler([i]) for i in range(5)]).equal(whole)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_packed_products_are_the_same_products(dtype, atol):
    model = renderer().to(dtype)
    packed = pack_linears(copy.deepcopy(model), num_rows=5)
    tokens = torch.randint(11, (5, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens, PREFIX), model(tokens, PREFIX), atol=atol, rtol=atol)
    kinds = {type(m) for m in packed.modules()}
    assert (PackedLinear in kinds) == can_pack(model.head) == (torch.nn.Linear not in kinds)
    assert model.head.weight.shape == (11, 32)  # the model itself stays as it was


def test_greedy_takes_the_most_likely():
    model = make()
    sampled = generate(model, seeds=[1, 2], temperature=0)
    assert sampled[0].equal(sampled[1])
    assert model(sampled).argmax(-1).equal(sampled)
    assert generate(model, seeds=[7, 8], top_k=1).equal(sampled)


def test_given_tokens_are_kept_and_continue_the_same_way():
    model = make()
    whole = generate(model, seeds=[0, 1, 2])
    for known in (0, 1, 4, 6):
        assert generate(model, seeds=[0, 1, 2], given=whole[:, :known]).equal(whole)


def test_guidance_by_label_moves_the_sample():
    model = make(num_classes=3, label_dropout=0.1)
    how = dict(seeds=range(20), labels=torch.full((20,), 2))
    assert not generate(model, cfg_scale=5.0, **how).equal(generate(model, **how))
    no_label = dict(seeds=range(20), labels=torch.full((20,), -1))
    assert generate(model, cfg_scale=5.0, **no_label).equal(generate(model, **no_label))


def test_model_is_left_as_it_was():
    model = make().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    a, b = (generate(model, seeds=[0], dtype=d) for d in (None, torch.bfloat16))
    assert model.training and a.shape == b.shape == (1, 6)
    assert all(t.equal(before[n]) and t.dtype == torch.float32 for n, t in model.state_dict().items())
    assert a.equal(generate(model, seeds=[0]))  # no dropout while sampling


def test_on_token_counts_what_is_sampled():
    told = []
    generate(
        make(), seeds=range(5), given=torch.zeros(5, 2, dtype=torch.int64), micro_batch_size=3, on_token=told.append
    )
    assert told == [3] * 4 + [2] * 4
    told.clear()
    generate(renderer(masked=True), seeds=range(5), prefix=PREFIX, micro_batch_size=3, on_token=told.append)
    assert sum(told) == 30 and len(told) == 16


# -------------------------------------------------------------------- masked


def test_masked_samples_codes_only_and_keeps_what_is_given():
    model = renderer(masked=True)
    given = torch.full((5, 6), model.cfg.mask_token)
    given[:, :2], given[0] = 3, torch.arange(6)
    for num_steps in (1, 3, 8, 20):
        sampled = generate(model, seeds=range(5), prefix=PREFIX, given=given, num_steps=num_steps)
        assert sampled.max() < 11 and sampled[:, :2][1:].eq(3).all() and sampled[0].equal(given[0])
    first_rows = generate(model, seeds=range(5), prefix=PREFIX, given=given[:, :2])
    assert first_rows.shape == (5, 6) and first_rows[:, :2].equal(given[:, :2])


def test_released_schedule():
    # 256 tokens, 8 steps: floor(256 cos(pi/2 (step + 1) / 8))
    hidden, counts = torch.ones(1, 256, dtype=torch.bool), []
    for step in range(7):
        count = num_to_hide(torch.tensor([256]), hidden, (step + 1) / 8)
        hidden = torch.arange(256)[None] < count
        counts.append(int(count))
    assert counts == [251, 236, 212, 181, 142, 97, 49]
    assert num_to_hide(torch.tensor([6]), torch.zeros(1, 6, dtype=torch.bool), 0.5).tolist() == [0]


def test_masked_guidance():
    model = renderer(masked=True, prefix_dropout=0.1)
    how = dict(seeds=range(5), prefix=PREFIX)
    assert generate(model, cfg_scale=1.0, **how).equal(generate(model, **how))
    assert not generate(model, cfg_scale=20.0, **how).equal(generate(model, **how))


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(temperature=-1), "temperature is -1"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(cfg_scale=2.0), "trained without label_dropout or prefix_dropout"),
        (dict(labels=torch.tensor([0, 3])), "label 3 is out of range: this model knows -1 to 2"),
        (dict(labels=torch.tensor([0])), "labels has 1 rows for 2 seeds"),
        (dict(given=torch.full((2, 1), 11)), "given token 11 is out of range"),
        (dict(given=torch.zeros(2, 7, dtype=torch.int64)), "7 tokens are given, an image has 6"),
        (dict(micro_batch_size=0), "micro_batch_size is 0"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(DigitError, match=message):
        generate(make(num_classes=3), seeds=[0, 1], **settings)


def test_a_renderer_needs_its_prefix():
    with pytest.raises(DigitError, match="needs a prefix of 4 tokens"):
        generate(renderer(), seeds=[0])
    with pytest.raises(DigitError, match="prefix token 7 is out of range"):
        generate(renderer(), seeds=[0], prefix=torch.full((1, 4), 7))
