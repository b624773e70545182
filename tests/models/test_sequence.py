"""One model over one layout: sizes, shapes, causality, losses, conditions."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from paper_models import paper_config
from toy_learning import without_gradient

from digit.convert.fairseq import read_fairseq
from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel, cosine_mask, training_flops
from digit.runs.recipes import digit_large

SMALL = dict(depth=2, embed_dim=32, num_heads=2, dropout=0.0)


def make(**changes):
    return SequenceModel(SequenceConfig(**(SMALL | dict(vocab_size=11, target_len=6) | changes))).eval()


def with_prefix(**changes):
    return make(prefix_vocab_size=7, prefix_len=4, norm="pre", **changes)


@pytest.mark.parametrize(
    "cfg, millions",
    [
        (paper_config("prior"), 219),
        (paper_config("prior", digit_large()), 732),
        (paper_config("renderer"), 219),
        (paper_config("renderer_masked"), 219),
    ],
)
def test_parameters_of_the_paper(cfg, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in SequenceModel(cfg).parameters())
    if cfg.prefix_len:  # the paper counts one embedding table fewer; ours is 210M
        assert 0.94 < count / (millions * 1e6) < 1.01
    else:
        assert count / (millions * 1e6) == pytest.approx(1, abs=0.01)


def test_shapes_of_every_model():
    target, prefix = torch.randint(11, (3, 6)), torch.randint(7, (3, 4))
    for masked in (False, True):
        assert make(masked=masked)(target).shape == (3, 6, 11)
        logits, hidden = with_prefix(masked=masked)(target, prefix=prefix, return_hidden=True)
        assert logits.shape == (3, 6, 11) and [h.shape for h in hidden] == [(3, 11, 32)] * 3
    assert make(num_classes=5)(target, labels=torch.tensor([0, 4, -1])).shape == (3, 6, 11)
    assert paper_config("vq_ar").prefix_len == 0


@pytest.mark.parametrize("masked", [False, True])
def test_an_aligned_prefix_is_no_part_of_the_sequence(masked):
    how = dict(conditioning="aligned", prefix_rows=2, target_rows=2, prefix_dropout=0.1, masked=masked, encoder_depth=2)
    model, target, prefix = with_prefix(**how), torch.randint(11, (3, 6)), torch.randint(7, (3, 4))
    logits, hidden = model(target, prefix=prefix, return_hidden=True)
    assert logits.shape == (3, 6, 11) and [h.shape for h in hidden] == [(3, 7, 32)] * 3
    added = model.added(3, prefix)
    assert list(added) == [0, 1] and added[0].shape == (3, 7, 32)
    assert added[0][:, 0 if masked else -1].eq(0).all()  # the place that predicts nothing
    other = prefix.clone()
    other[:, 3] = (other[:, 3] + 1) % 7
    assert (model(target, prefix=other) - logits).abs().amax((0, 2)).min() > 1e-6  # every token sees every prefix token
    torch.testing.assert_close(model(target), model(target, prefix=None))  # the null prefix
    assert not torch.allclose(model(target), logits)


def test_an_aligned_prefix_keeps_next_tokens_causal():
    model = with_prefix(conditioning="aligned", prefix_rows=2, target_rows=2)
    target, prefix = torch.randint(11, (1, 6)), torch.randint(7, (1, 4))
    changed = target.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    a, b = model(target, prefix=prefix), model(changed, prefix=prefix)
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


def test_an_aligned_prefix_lies_where_it_belongs():
    """Without its own attention the encoder says to each place what stands there: the grid is resampled, not mixed."""
    model = with_prefix(conditioning="aligned", prefix_rows=2, target_rows=4, target_len=16)
    for block in model.aligned.transformer.blocks:
        block.attention.out.weight.data.zero_()
        block.attention.out.bias.data.zero_()
    prefix = torch.zeros(1, 4, dtype=torch.int64)
    changed = prefix.clone()
    changed[0, 1] = 3  # top right of 2 x 2
    difference = (model.added(1, changed)[0] - model.added(1, prefix)[0])[0, :16].abs().sum(1).view(4, 4)
    assert difference[0, 3] == difference.max() and difference[3, :2].eq(0).all() and difference[:, 0].eq(0).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(conditioning="aligned", prefix_rows=0, target_rows=2), "prefix_rows is 0"),
        (dict(conditioning="aligned", prefix_rows=2, target_rows=4), "target_rows is 4 for 6"),
        (
            dict(conditioning="aligned", prefix_rows=2, target_rows=2, added_blocks=3),
            "added_blocks is 3: choose 1 to 2",
        ),
        (dict(conditioning="aligned", prefix_rows=2, target_rows=2, encoder_depth=0), "encoder_depth is 0"),
    ],
)
def test_an_aligned_prefix_that_cannot_be(changes, says):
    with pytest.raises(DigitError, match=says):
        with_prefix(**changes)
    with pytest.raises(DigitError, match="has no prefix"):
        make(conditioning="aligned", prefix_rows=1, target_rows=1)


def test_an_aligned_prefix_halves_the_work():
    paper = paper_config("renderer")
    aligned = replace(paper, conditioning="aligned", prefix_rows=16, target_rows=16, encoder_depth=2, added_blocks=3)
    assert training_flops(aligned) / training_flops(paper) == pytest.approx(0.55, abs=0.01)


def test_next_token_logits_see_earlier_tokens_alone():
    model, target = make(), torch.randint(11, (1, 6))
    changed = target.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    a, b = model(target), model(changed)
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


def test_masked_logits_see_both_sides_but_not_a_hidden_token():
    model = with_prefix(masked=True)
    prefix, target = torch.randint(7, (1, 4)), torch.randint(11, (1, 6))
    hidden = target.clone()
    hidden[:, 2] = model.cfg.mask_token
    changed = hidden.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    assert not torch.allclose(model(hidden, prefix=prefix)[:, 2], model(changed, prefix=prefix)[:, 2])


def test_label_and_start_symbol():
    model, target = make(num_classes=5), torch.randint(11, (3, 6))
    plain = model(target)
    torch.testing.assert_close(model(target, labels=torch.full((3,), -1)), plain)
    assert not torch.allclose(model(target, labels=torch.zeros(3, dtype=torch.int64)), plain)


def test_null_prefix():
    model = with_prefix(prefix_dropout=0.5)
    target, prefix = torch.randint(11, (3, 6)), torch.randint(7, (3, 4))
    drop = torch.tensor([True, False, True])
    mixed = model.head(model.features(target, prefix, drop_prefix=drop))
    torch.testing.assert_close(mixed[drop], model(target)[drop])
    torch.testing.assert_close(mixed[~drop], model(target, prefix=prefix)[~drop])
    assert not hasattr(with_prefix(), "null_prefix")


def test_loss_is_the_cross_entropy_of_forward():
    model, target, prefix = with_prefix(), torch.randint(11, (3, 6)), torch.randint(7, (3, 4))
    loss, metrics = model.loss(target, prefix=prefix)
    torch.testing.assert_close(loss, F.cross_entropy(model(target, prefix=prefix).flatten(0, 1), target.flatten()))
    assert set(metrics) == {"nll", "perplexity", "accuracy"} and not metrics["nll"].requires_grad


def test_masked_loss_counts_hidden_tokens_alone():
    model, target, prefix = with_prefix(masked=True), torch.randint(11, (5, 6)), torch.randint(7, (5, 4))
    noise = model.noise({"target": target}, torch.Generator().manual_seed(3))
    loss, _ = model.loss(target, prefix=prefix, **noise)
    hide = cosine_mask(5, 6, generator=torch.Generator().manual_seed(3))
    logits = model(target.masked_fill(hide, model.cfg.mask_token), prefix=prefix)
    torch.testing.assert_close(loss, F.cross_entropy(logits[hide], target[hide]))


def test_cosine_mask_schedule():
    count = cosine_mask(4000, 64).sum(1)
    assert count.min() >= 1 and count.max() <= 64
    # E[floor(M cos(u pi/2)) + 1] is close to 2 M / pi + 1/2
    assert count.float().mean().item() == pytest.approx(64 * 2 / math.pi + 0.5, abs=1.2)


def test_dropped_labels_follow_the_generator_and_the_rate():
    model = make(num_classes=5, label_dropout=0.3)
    batch = {"target": torch.zeros(4000, 6, dtype=torch.int64), "labels": torch.randint(5, (4000,))}
    dropped, again = (model.noise(batch, torch.Generator().manual_seed(0))["drop_labels"] for _ in range(2))
    assert dropped.equal(again)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    labels = batch["labels"].masked_fill(dropped, -1)
    few = slice(0, 8)
    lost, _ = model.loss(batch["target"][few], labels=batch["labels"][few], drop_labels=dropped[few])
    assert torch.equal(lost, model.loss(batch["target"][few], labels=labels[few])[0])


def test_noise_is_what_the_model_samples():
    target, labels = torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    assert make(num_classes=5).noise({"target": target, "labels": labels}, None) == {}
    assert make(num_classes=5, label_dropout=0.3).noise({"target": target, "labels": None}, None) == {}
    masked = with_prefix(masked=True, prefix_dropout=0.5)
    assert masked.noise({"target": target}, None).keys() == {"hide", "drop_prefix"}


def test_every_parameter_learns():
    for masked in (False, True):
        model = with_prefix(masked=masked, num_classes=2, label_dropout=0.5, prefix_dropout=0.5).train()
        batch = {"target": torch.randint(11, (64, 6)), "prefix": torch.randint(7, (64, 4))}
        batch["labels"] = torch.randint(2, (64,))
        loss, _ = model.loss(**batch, **model.noise(batch, None), label_smoothing=0.1)
        loss.backward()
        assert without_gradient(model) == []


def test_it_learns_a_sequence_in_bf16_autocast():
    torch.manual_seed(0)
    model = make(dropout=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    target = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 2, 9, 4, 0, 6]]).repeat(8, 1)
    for _ in range(80):
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = model.loss(target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["accuracy"] > 0.9  # the first token is a coin flip: 11 of 12 at best


def test_initialisation():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SequenceModel(paper_config("prior", vocab_size=500, target_len=64, depth=4, embed_dim=192, num_heads=3))
    width = model.cfg.embed_dim
    assert model.token_embed.weight.std().item() == pytest.approx(width**-0.5, rel=0.02)
    block = model.transformer.blocks[0]
    bound = math.sqrt(6 / (2 * width)) * 2**-0.5
    assert block.attention.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not block.attention.qkv.bias.any() and (block.norm1.weight == 1).all()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: with_prefix()(torch.zeros(1, 6, dtype=torch.int64)), "needs a prefix of 4 tokens"),
        (lambda: make()(torch.zeros(1, 6, dtype=torch.int64), labels=torch.zeros(1).long()), "knows no classes"),
        (lambda: make()(torch.zeros(1, 7, dtype=torch.int64)), "target has 7 tokens, the model was built for 6"),
        (lambda: make(label_dropout=0.1), "the model has no label"),
        (lambda: make(prefix_len=3), "set both, or neither"),
    ],
)
def test_user_errors(build, message):
    with pytest.raises(DigitError, match=message):
        build()


def test_fairseq_converter_accounts_for_every_tensor(golden, tmp_path):
    loaded = torch.load(golden / "vq_ar.pt", weights_only=True)
    for change, message in (
        (lambda s: s.pop("decoder.layers.1.fc1.bias"), r"decoder.layers.1.fc1.bias is missing"),
        (lambda s: s.update({"decoder.extra": torch.zeros(1)}), r"unexpected tensors: decoder.extra"),
        (lambda s: s.update({"other.weight": torch.zeros(1)}), r"unknown parts: other.weight"),
        (lambda s: s.update({"decoder.layer_norm.bias": torch.zeros(3)}), r"final_norm.bias \(3,\) instead of \(64,\)"),
    ):
        state = dict(loaded["model"])
        change(state)
        torch.save({**loaded, "model": state}, tmp_path / "broken.pt")
        with pytest.raises(DigitError, match=message):
            read_fairseq(tmp_path / "broken.pt")


@pytest.mark.parametrize("masked", [False, True])
def test_positions_start_from_places(masked: bool):
    model = with_prefix(target_len=16, masked=masked)
    model.start_from_places((4, 4), (2, 2))
    own, predicted = model.positions[1:], model.positions[0 if not masked else 1 :][:16]
    # prefix cell (0, 0) covers the target cells (0, 0), (0, 1), (1, 0), (1, 1): nearest in the table, too
    for table in (own, predicted):
        nearness = table @ model.prefix_positions.T  # (16, 4)
        assert nearness[[0, 1, 4, 5], 0].min() > nearness[[10, 11, 14, 15], 0].max()
    assert torch.equal(model.positions[0], torch.zeros(32)) == masked
    assert 0.3 < model.prefix_positions.square().mean() < 0.7


def test_a_prefix_of_another_batch_is_refused():
    target, prefix = torch.randint(11, (2, 6)), torch.randint(7, (1, 4))
    with pytest.raises(DigitError, match="prefix has 1 rows, target 2"):
        with_prefix()(target, prefix=prefix)
