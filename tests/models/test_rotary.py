"""Rotary positions in the models: decoding, batches, places of prefix and target, settings that cannot be."""

import pytest
import torch
from toy_learning import learn, without_gradient

from digit.errors import DigitError
from digit.models.decoding import StepTransformer
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.transformer import SteppedCache

SIZES = dict(depth=2, embed_dim=32, num_heads=4, dropout=0.0, vocab_size=11, target_len=6)
GRIDS = dict(rotary="2d", prefix_rows=2, target_rows=2)
ROTARY = {
    "1d": dict(rotary="1d"),
    "2d": GRIDS,
    "alone": dict(GRIDS, learned_positions=False, qk_norm=True, norm="post"),
    "aligned": dict(GRIDS, learned_positions=False, conditioning="aligned"),
}
TARGET = torch.arange(18).view(3, 6) * 7 % 11
PREFIX = torch.arange(12).view(3, 4) % 7


def renderer(**changes) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(
        SequenceConfig(**(SIZES | dict(prefix_vocab_size=7, prefix_len=4, norm="pre") | changes))
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("changes", ROTARY.values(), ids=ROTARY)
@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_cached_logits_are_those_of_one_pass(changes, fixed_shapes):
    model = renderer(**changes)
    cfg, expected = model.cfg, model(TARGET, prefix=PREFIX)  # (B, M, V)
    step, cache, added = StepTransformer(model.transformer, 3), model.new_cache(3), model.added(3, PREFIX)
    x, start = model.embed(TARGET[:, :0], PREFIX), cfg.start_position + 1
    y = model.transformer(x, causal=True, cache=cache, added={n: more[:, :start] for n, more in added.items()})
    logits = [model.head(y[:, -1])]
    cache.reserve(cache.max_len)
    for index in range(5):
        here = cache
        if fixed_shapes:
            here = SteppedCache(cache, torch.tensor([start + index]), cache.max_len)
        parts = {n: more[:, index + 1] for n, more in added.items()}
        logits.append(model.head(step(model.embed_token(TARGET[:, index], index), here, parts)))
    torch.testing.assert_close(torch.stack(logits, 1), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(TARGET[1:2], prefix=PREFIX[1:2]), expected[1:2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", ROTARY.values(), ids=ROTARY)
def test_a_next_token_model_sees_earlier_tokens_alone(changes):
    model, changed = renderer(**changes), TARGET.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    a, b = model(TARGET, prefix=PREFIX), model(changed, prefix=PREFIX)
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_without_learned_positions_rotary_ones_tell_the_places_apart(masked):
    model = renderer(**GRIDS, learned_positions=False, masked=masked)
    assert not [name for name, _ in model.named_parameters() if "positions" in name]
    same = torch.full((1, 6), 3)
    logits = model(same, prefix=torch.tensor([[0, 1, 2, 3]]))[0]
    assert torch.pdist(logits).min() > 1e-4


def test_prefix_and_target_have_the_places_that_they_cover():
    cfg = renderer(**(GRIDS | dict(target_rows=4, target_len=16))).cfg
    places = cfg.places(21, torch.device("cpu"))
    assert places[:4].tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]] and places[4].tolist() == [-1, -1]
    assert places[5].tolist() == [0, 0] and places[-1].tolist() == [3, 3] and len(places) == 21
    assert renderer(rotary="1d").cfg.places(5, torch.device("cpu"))[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_they_add_no_parameter_and_without_them_nothing_changes():
    names = [[name for name, _ in renderer(**changes).named_parameters()] for changes in ({}, {"rotary": "1d"}, GRIDS)]
    assert names[0] == names[1] == names[2]
    plain, turned = renderer(), renderer(**GRIDS)
    turned.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(TARGET, prefix=PREFIX), turned(TARGET, prefix=PREFIX))
    assert plain.transformer.rotations(5, plain.device) is None and plain.new_cache(2).rotation(1) is None


@pytest.mark.parametrize("changes", [ROTARY["1d"], ROTARY["alone"], ROTARY["aligned"]], ids=["1d", "alone", "aligned"])
def test_every_parameter_learns_and_the_loss_falls(changes):
    model = renderer(**changes).train()
    losses = learn(model, lambda: model.loss(TARGET, prefix=PREFIX)[0], 25)
    assert losses[-1] < losses[0] / 2
    assert without_gradient(model) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(rotary="2d"), "target_rows is 0 for 6"),
        (dict(rotary="2d", target_rows=2), "prefix_rows is 0 for 4"),
        (dict(rotary="1d", num_heads=32), "rotary 1d needs heads of a width that 2 divides, .* is 1"),
        (dict(GRIDS, num_heads=16), "needs heads of a width that 4 divides, .* is 2"),
        (dict(learned_positions=False), "set rotary to 1d or 2d"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(DigitError, match=says):
        renderer(**changes)
