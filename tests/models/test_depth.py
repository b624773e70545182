"""Several codes at a position: embedded as their sum, predicted one level after another, and what that costs."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toy_learning import without_gradient

from digit.errors import DigitError
from digit.models.depth import embed_codes
from digit.models.pixels import PixelConfig, PixelRenderer
from digit.models.sequence import SequenceConfig, SequenceModel, training_flops

LEVELS = dict(depth=2, embed_dim=32, num_heads=2, vocab_size=7, target_len=12, levels=3)  # four positions
READER = dict(depth=2, embed_dim=32, num_heads=2, vocab_size=11, target_len=6, prefix_vocab_size=7, prefix_len=12)
READER |= dict(prefix_levels=3, norm="pre", prefix_dropout=0.3)
ALIGNED = dict(conditioning="aligned", prefix_rows=2, target_rows=2)


def make(**changes) -> SequenceModel:
    return SequenceModel(SequenceConfig(**(LEVELS | changes))).eval()


def codes(rows: int, length: int = 12, most: int = 7) -> torch.Tensor:
    return torch.randint(most, (rows, length), generator=torch.Generator().manual_seed(rows))


def test_shapes():
    model = make(num_classes=2)
    assert model.positions.shape == (5, 32) and model.token_embed.weight.shape == (21, 32)
    assert model.cfg.num_positions == 5 and len(model.heads) == 3
    tokens = codes(5)
    assert model(tokens).shape == (5, 12, 7) and model.features(tokens).shape == (5, 4, 32)
    logits, hidden = model(tokens, return_hidden=True)
    assert logits.shape == (5, 12, 7) and hidden[-1].shape == (5, 5, 32)
    assert not hasattr(SequenceModel(SequenceConfig(**LEVELS | {"levels": 1})), "depth")


def test_a_position_is_the_sum_of_its_codes():
    model, tokens = make(), codes(5)
    table = model.token_embed.weight.view(3, 7, 32)
    wanted = sum(table[level][tokens[:, level::3]] for level in range(3))
    torch.testing.assert_close(embed_codes(model.token_embed, tokens, 3), wanted)
    embedded = model.embed(tokens)
    torch.testing.assert_close(embedded[:, 1:], math.sqrt(32) * wanted + model.positions[1:])
    for index in range(4):
        own = model.embed_token(tokens[:, 3 * index : 3 * index + 3], index)
        torch.testing.assert_close(own, embedded[:, 1 + index])


def test_logits_see_earlier_codes_alone():
    model, tokens = make(), codes(5)
    before = model(tokens)
    for place in range(12):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 7
        differs = (model(changed) - before).abs().amax((0, 2)) > 1e-6
        assert not differs[: place + 1].any()
        assert differs[place + 1 :].all()  # the lower levels of a position decide its higher ones


def test_loss_is_the_cross_entropy_of_forward():
    model, tokens = make(num_classes=2), codes(5)
    labels = torch.arange(5) % 2
    loss, metrics = model.loss(tokens, labels=labels, label_smoothing=0.1)
    logits = model(tokens, labels=labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=0.1))
    torch.testing.assert_close(metrics["nll"], F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
    for level in range(3):
        nll = F.cross_entropy(logits[:, level::3].flatten(0, 1), tokens[:, level::3].flatten())
        torch.testing.assert_close(metrics[f"nll_{level}"], nll)
    assert float(metrics["accuracy"]) == pytest.approx(float((logits.argmax(-1) == tokens).float().mean()), abs=1e-6)


def test_every_parameter_learns():
    models = [make(num_classes=2, label_dropout=0.5), SequenceModel(SequenceConfig(**READER))]
    models += [SequenceModel(SequenceConfig(**READER | ALIGNED))]
    for model in models:
        batch = {"target": codes(64, model.cfg.target_len), "labels": None}
        if model.cfg.prefix_len:
            batch["prefix"] = codes(64)
        else:
            batch["labels"] = torch.randint(2, (64,))
        loss, _ = model.train().loss(**batch, **model.noise(batch, None))
        loss.backward()
        assert without_gradient(model) == []


def test_it_learns_which_codes_belong_together():
    torch.manual_seed(0)
    model = make(dropout=0.0, depth=1, target_len=6, norm="pre").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = torch.randint(7, (512, 2))
    tokens = torch.stack([first, (first + 2) % 7, (3 * first + 1) % 7], 2).flatten(1)  # level 0 decides the others
    for step in range(150):
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = model.loss(tokens[step * 32 % 512 :][:32])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["nll_1"] < 0.3 and metrics["nll_2"] < 0.3 and metrics["nll_0"] > 1.5


@pytest.mark.parametrize("changes", [{}, ALIGNED], ids=["prefix", "aligned"])
def test_a_renderer_reads_the_sum_of_a_cells_codes(changes):
    model = SequenceModel(SequenceConfig(**READER | changes)).eval()
    prefix, target = codes(5), codes(5, 6, 11)
    assert model.prefix_positions.shape == (4, 32) and model.cfg.start_position == (0 if changes else 4)
    before = model(target, prefix)
    assert before.shape == (5, 6, 11)
    with torch.no_grad():  # the codes of a cell may be swapped along with their embeddings
        table = model.prefix_embed.weight.view(3, 7, 32)
        table.copy_(table[[1, 0, 2]])
    swapped = prefix.view(5, 4, 3)[:, :, [1, 0, 2]].flatten(1)
    torch.testing.assert_close(model(target, swapped), before)
    assert not torch.allclose(model(target, prefix), before)


def test_a_renderer_to_pixels_reads_the_sum():
    cfg = PixelConfig(
        image_size=16, prefix_vocab_size=7, prefix_len=12, prefix_levels=3, prefix_rows=2, norm="pre", dropout=0.0,
        depth=1, embed_dim=32, num_heads=2, noise_channels=2, channels=8, channel_mult=(1, 1, 1), z_channels=4,
    )  # fmt: skip
    model, prefix = PixelRenderer(cfg).eval(), codes(3)
    assert cfg.grid == (2, 2) and cfg.noise_shape == (4, 2)
    noise = torch.randn(3, 4, 2)
    images = model.render(prefix, noise)
    assert images.shape == (3, 3, 16, 16)
    changed = prefix.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 7
    assert not torch.allclose(model.render(changed, noise), images)
    model.start_from_codes(None, torch.randn(21, 9))
    loss, _ = model.loss(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), prefix, noise=noise)
    loss.backward()
    assert model.prefix_embed.weight.grad.any()


def test_informed_start_gives_each_head_its_level():
    model = make()
    vectors = torch.randn(3, 7, 5)
    vectors -= vectors.mean(1, keepdim=True)
    model.start_from_codes(vectors.flatten(0, 1))
    table = model.token_embed.weight.view(3, 7, 32)
    for level, head in enumerate(model.heads):
        assert torch.equal(head.weight, table[level])
    near, far = (torch.pdist(rows.flatten(0, 1)) for rows in (vectors, table))  # within and across levels
    torch.testing.assert_close(far / far.mean(), near / near.mean(), atol=1e-4, rtol=1e-4)


def test_levels_cost_a_fraction_of_positions_of_their_own():
    cfg = SequenceConfig(depth=4, embed_dim=192, num_heads=3, vocab_size=1024, target_len=192, levels=3, norm="pre")
    flat = replace(cfg, levels=1)
    one = replace(cfg, levels=1, target_len=64)
    assert training_flops(one) < training_flops(cfg) < 0.55 * training_flops(flat)
    model = SequenceModel(cfg)
    hidden = sum(p.numel() for p, _ in model.hidden_matrices())
    assert hidden == 4 * 12 * 192**2 + 2 * 4 * 192**2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"levels": 5}, "levels is 5 for 12 tokens"),
        ({"levels": 0}, "levels is 0"),
        ({"levels": 24, "target_len": 24}, "1 to 16"),
        ({"levels": 3, "masked": True}, "masked model predicts one code a position"),
        ({"prefix_levels": 2, "prefix_len": 5, "prefix_vocab_size": 3}, "prefix_levels is 2 for 5 tokens"),
    ],
)
def test_mistakes_say_what_to_do(changes, says):
    with pytest.raises(DigitError, match=says):
        SequenceConfig(**(LEVELS | changes))
    with pytest.raises(DigitError, match="12, 3 for each position"):
        make()(codes(2, 4))
