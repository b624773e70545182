"""The losses towards code vectors, by a plain re-computation; what training reads in place of the target."""

import pytest
import torch
import torch.nn.functional as F

from digit.models.code_heads import CodeHeads, code_head_flops
from digit.models.losses import linear_cross_entropy
from digit.models.sequence import SequenceConfig, SequenceModel

V, M, C = 11, 6, 5
SMALL = dict(vocab_size=V, target_len=M, depth=3, embed_dim=32, num_heads=2, dropout=0.0, norm="pre")
PREFIX = dict(prefix_vocab_size=7, prefix_len=4, prefix_dropout=0.2)
ALIGNED = PREFIX | dict(conditioning="aligned", prefix_rows=2, target_rows=2)
LAYERS, WEIGHTS = {"current": 1, "next": 3}, {"current": 0.5, "next": 2.0}


def make(**changes) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(SequenceConfig(**(SMALL | changes))).eval()


def heads_of(model: SequenceModel, codes: torch.Tensor, layers=LAYERS) -> CodeHeads:
    weights = {name: WEIGHTS[name] for name in layers}
    return CodeHeads(codes, model.cfg.embed_dim, layers=layers, weights=weights)


def batch_of(model: SequenceModel) -> dict[str, torch.Tensor]:
    batch = {"target": torch.randint(V, (3, M))}
    if model.cfg.prefix_len:
        batch["prefix"] = torch.randint(7, (3, 4))
        batch["drop_prefix"] = torch.tensor([False, False, True])
    return batch


@pytest.mark.parametrize("changes", [{"norm": "post"}, PREFIX, ALIGNED, {"levels": 2}], ids=str)
@pytest.mark.parametrize("layers", [LAYERS, {"current": 0}, {"next": 2}], ids=str)
def test_losses_are_those_of_the_equation(changes, layers):
    model = make(**changes)
    levels, places = model.cfg.levels, model.cfg.target_places
    codes, batch = torch.randn(levels, V, C) + 3, batch_of(model)
    plain, before = model.loss(**batch, label_smoothing=0.1)
    model.code_heads = heads = heads_of(model, codes, layers)
    loss, metrics = model.loss(**batch, label_smoothing=0.1)

    hidden = []
    named = {name: batch[name] for name in batch if name != "target"}
    model.features(batch["target"], **named, hidden=hidden)  # all positions, the last token's too
    start = model.cfg.start_position
    assert [h.shape[1] for h in hidden] == [start + 1 + places] * 4
    wanted = plain
    for name, layer in layers.items():
        cosines = []
        for row in range(3):
            for place in range(places - 1 if name == "current" else places):
                position = start + place + (name == "current")  # token 0 stands after the start symbol
                tokens = batch["target"][row, place * levels : (place + 1) * levels]
                vector = sum(codes[level, token] - codes[level].mean(0) for level, token in enumerate(tokens))
                read = heads.heads[name](hidden[layer][row, position])
                cosines.append(read @ vector / read.norm() / vector.norm())
        mean = torch.stack(cosines).mean()
        torch.testing.assert_close(metrics[f"{name}_cosine"], mean.detach(), rtol=1e-4, atol=1e-5)
        wanted = wanted + WEIGHTS[name] * (1 - mean)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    assert metrics.keys() == before.keys() | {f"{name}_cosine" for name in layers}
    torch.testing.assert_close(metrics["nll"], before["nll"])


def test_every_parameter_but_no_code_vector_learns():
    for changes in ({}, PREFIX, ALIGNED):
        model = make(**changes).train()
        codes = torch.randn(1, V, C, requires_grad=True)
        model.code_heads = heads_of(model, codes.detach())
        model.loss(**batch_of(model))[0].backward()
        assert all(p.grad is not None and p.grad.any() for p in model.code_heads.parameters())
        assert codes.grad is None and not model.code_heads.codes.requires_grad
        assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is None} == set()


def test_a_shallow_loss_trains_the_blocks_below_it_alone():
    model = make()
    heads = heads_of(model, torch.randn(1, V, C), {"current": 1})
    hidden, target = [], torch.randint(V, (2, M))
    model.features(target, hidden=hidden, whole=False)
    heads(hidden, target)[0].backward()
    learns = [any(p.grad is not None for p in block.parameters()) for block in model.transformer.blocks]
    assert learns == [True, False, False] and model.head.weight.grad is None


def test_hidden_features_of_training_are_those_of_the_whole_sequence():
    for changes in ({}, PREFIX, ALIGNED):
        model = make(**changes)
        batch = batch_of(model)
        whole, trained = [], []
        one = model.features(**batch, hidden=whole)
        two = model.features(**batch, hidden=trained, whole=False)
        torch.testing.assert_close(one, two)
        for a, b in zip(whole, trained, strict=True):
            torch.testing.assert_close(a[:, :-1][:, -M:], b[:, -M:])  # without the last token
        assert trained[-1].shape[1] == M


def test_seen_tokens_are_read_and_the_target_is_predicted():
    for changes in ({}, PREFIX, ALIGNED):
        model = make(**changes)
        batch = batch_of(model)
        batch.pop("drop_prefix", None)
        seen = (batch["target"] + torch.randint(2, (3, M))) % V
        loss, _ = model.loss(**batch, seen=seen)
        logits = model(seen, prefix=batch.get("prefix"))
        torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), batch["target"].flatten()))
        assert torch.equal(model.loss(**batch, seen=batch["target"])[0], model.loss(**batch)[0])
        assert not torch.equal(loss, model.loss(**batch)[0])


def test_a_position_s_own_lower_codes_stay_as_they_are():
    model = make(levels=2)
    target, seen = torch.randint(V, (3, M)), torch.randint(V, (3, M))
    features = model.features(seen).flatten(0, 1)
    codes = target.view(-1, 2)
    parts = [
        linear_cross_entropy(model.level_features(features, codes[:, :level]), head.weight, codes[:, level])[0]
        for level, head in enumerate(model.heads)
    ]
    torch.testing.assert_close(model.loss(target, seen=seen)[0], torch.stack(parts).mean())


def test_the_masked_model_reads_no_other_tokens():
    model = make(masked=True)
    target = torch.randint(V, (2, M))
    with pytest.raises(AssertionError, match="masked"):
        model.loss(target, seen=target, **model.noise({"target": target}, None))


def test_flops_of_a_head():
    """Multiply-adds of the two matrices, twice, forward and backward."""
    head = CodeHeads(torch.randn(1, V, C), 32, layers={"next": 1}, weights={"next": 1.0}).heads["next"]
    matrices = sum(p.numel() for p in head.parameters() if p.ndim == 2)
    assert code_head_flops(10, 32, C) == 3 * 2 * 10 * matrices
