"""Training in random orders: who sees what, the loss by its definition, and the one table that is left."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toy_learning import learn, without_gradient
from toy_pixels import model as pixel_renderer

from digit.errors import DigitError
from digit.models.code_heads import CodeHeads
from digit.models.sequence import SequenceConfig, SequenceModel

SIZES = dict(depth=2, embed_dim=32, num_heads=4, dropout=0.0, vocab_size=11, target_len=6, random_order=True)
PREFIX = dict(prefix_vocab_size=7, prefix_len=4, norm="pre")
GRIDS = dict(prefix_rows=2, target_rows=2)
MODELS = {
    "prior": dict(num_classes=3),
    "prefix": PREFIX,
    "aligned": PREFIX | GRIDS | dict(conditioning="aligned"),
    "levels": dict(levels=2, target_len=12),
    "rotary": PREFIX | GRIDS | dict(rotary="2d"),
    "rotary, tied, aligned": PREFIX | GRIDS | dict(conditioning="aligned", rotary="2d", tied_embeddings=True),
}
ORDER = torch.tensor([[2, 0, 5, 1, 4, 3], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]])


def make(**changes) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(SequenceConfig(**(SIZES | changes))).eval()


def batch(model: SequenceModel) -> dict[str, torch.Tensor]:
    cfg, generator = model.cfg, torch.Generator().manual_seed(1)
    rows = {"target": torch.randint(11, (3, cfg.target_len), generator=generator)}
    if cfg.prefix_len:
        rows["prefix"] = torch.randint(7, (3, 4), generator=generator)
    return rows | ({"labels": torch.arange(3)} if cfg.num_classes else {})


def in_order(model: SequenceModel, tokens: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The tokens of each position in another order; those of one position stay together."""
    levels = model.cfg.levels
    return torch.stack([row.view(-1, levels)[places].flatten() for row, places in zip(tokens, order, strict=True)])


@torch.no_grad()
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_position_sees_what_comes_before_it_in_its_order(changes):
    model = make(**changes)
    rows = batch(model)
    features = model.features(**rows | {"target": in_order(model, rows["target"], ORDER)}, order=ORDER)
    for place in range(6):
        changed = rows["target"].clone().view(3, 6, -1)
        changed[:, place, 0] = (changed[:, place, 0] + 1) % 11
        other = rows | {"target": in_order(model, changed.flatten(1), ORDER)}
        found = model.features(**other, order=ORDER)
        for row, places in enumerate(ORDER.tolist()):
            turn = places.index(place)  # from the turn after its own on, the token is seen
            assert torch.equal(found[row, : turn + 1], features[row, : turn + 1])
            assert (found[row, turn + 1 :] - features[row, turn + 1 :]).abs().amax(-1).gt(1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_loss_is_the_cross_entropy_of_the_tokens_in_their_order(changes):
    model = make(**changes)
    rows, levels = batch(model), model.cfg.levels
    target = in_order(model, rows["target"], ORDER)
    features = model.features(**rows | {"target": target}, order=ORDER)
    codes = target.view(3, 6, levels)
    logits = torch.stack([model.level_logits(features, codes[..., :level]) for level in range(levels)], 2)
    expected = F.cross_entropy(logits.flatten(0, 2), target.flatten())
    torch.testing.assert_close(model.loss(**rows, order=ORDER)[0], expected)
    raster = torch.arange(6).expand(3, -1)
    torch.testing.assert_close(model.loss(**rows, order=raster)[0], model.loss(**rows)[0])
    assert (model.loss(**rows, order=ORDER)[0] - model.loss(**rows)[0]).abs() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_it_is_told_which_place_comes_next(changes):
    """Two orders that begin alike and go on to different places predict different things."""
    model = make(**changes)
    rows = batch(model)
    swapped = ORDER.clone()
    swapped[:, [3, 4]] = ORDER[:, [4, 3]]
    features = [
        model.features(**rows | {"target": in_order(model, rows["target"], order)}, order=order)
        for order in (ORDER, swapped)
    ]
    assert torch.equal(features[0][:, :3], features[1][:, :3])
    assert (features[0][:, 3] - features[1][:, 3]).abs().amax(-1).gt(1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_trained_model_has_one_table_and_the_same_logits(changes):
    model = make(**changes)
    rows = batch(model)
    expected, tables = model(**rows), copy.deepcopy(model.state_dict())
    token = rows["target"][:, : model.cfg.levels] if model.cfg.levels > 1 else rows["target"][:, 0]
    embedded = [model.embed_token(token, index) for index in (0, torch.tensor([3]))]
    model.end_random_order()
    assert torch.equal(model(**rows), expected)
    for index, one in zip((0, torch.tensor([3])), embedded, strict=True):
        assert torch.equal(model.embed_token(token, index), one)
    assert model.cfg == replace(make(**changes).cfg, random_order=False)
    plain = SequenceModel(model.cfg)
    plain.load_state_dict(model.state_dict())  # nothing is left of it
    assert torch.equal(plain.eval()(**rows), expected)
    assert torch.equal(model.positions[6:], tables["positions"][6:])
    model.end_random_order()
    assert torch.equal(model(**rows), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["prefix", "aligned"])
def test_an_informed_start_is_that_of_raster_order(name):
    models = [make(**MODELS[name], random_order=flag) for flag in (True, False)]
    for model in models:
        torch.manual_seed(3)
        model.start_from_places((2, 3), (2, 2))
    assert models[0].next_positions.abs().sum() > 0
    models[0].end_random_order()
    torch.testing.assert_close(models[0].positions, models[1].positions)


def test_every_parameter_learns_and_the_loss_falls():
    model = make(**MODELS["aligned"]).train()
    rows, generator = batch(model), torch.Generator().manual_seed(0)
    losses = learn(model, lambda: model.loss(**rows, order=torch.rand(3, 6, generator=generator).argsort(1))[0], 40)
    assert losses[-1] < losses[0] / 2
    assert without_gradient(model) == []
    with torch.no_grad():
        assert float(model.loss(**rows)[0]) < losses[0] / 2  # raster order is one of the orders


@torch.no_grad()
@pytest.mark.parametrize("name", ["prefix", "levels"])
def test_noisy_inputs_and_code_heads_follow_the_order(name):
    model = make(**MODELS[name])
    rows, levels = batch(model), model.cfg.levels
    seen = (rows["target"] + torch.tensor([0, 3] * (model.cfg.target_len // 2))) % 11
    layers, weights = {"current": 1, "next": 2}, {"current": 0.5, "next": 1.0}
    model.code_heads = CodeHeads(torch.randn(levels, 11, 5), 32, layers=layers, weights=weights)
    loss, metrics = model.loss(**rows, order=ORDER, seen=seen)
    target, read = (in_order(model, tokens, ORDER) for tokens in (rows["target"], seen))
    hidden = []
    features = model.features(**rows | {"target": read}, order=ORDER, hidden=hidden, whole=False)
    codes = target.view(3, 6, levels)
    logits = torch.stack([model.level_logits(features, codes[..., :level]) for level in range(levels)], 2)
    more, cosines = model.code_heads(hidden, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 2), target.flatten()) + more)
    assert metrics["next_cosine"] == cosines["next_cosine"]


def test_models_that_have_no_order_are_refused():
    with pytest.raises(DigitError, match="random_order is for next-token models, a masked model knows no order"):
        make(masked=True)
    with pytest.raises(DigitError, match="random_order needs position tables: set learned_positions to true"):
        make(rotary="1d", learned_positions=False)
    for changes in (dict(random_order=True), dict(rotary="1d"), dict(tied_embeddings=True)):
        with pytest.raises(DigitError, match="are not of a renderer straight to pixels: leave them out"):
            replace(pixel_renderer().cfg, **changes)
    with pytest.raises(AssertionError, match="has random_order set"):
        make(random_order=False).loss(torch.zeros(3, 6, dtype=torch.int64), order=ORDER)
