"""One table as embedding and output projection: logits, gradients, copies, files, packed layers."""

import copy

import pytest
import torch

from digit.models.products import PackedLinear, can_pack, pack_linears
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.pipeline.manifest import load_sequence_model, save_sequence_model

SIZES = dict(depth=1, embed_dim=32, num_heads=2, dropout=0.0, vocab_size=11, target_len=6, tied_embeddings=True)
KINDS = [{}, {"masked": True}, {"levels": 3, "norm": "pre"}]
TARGET = torch.arange(24).view(4, 6) * 5 % 11


def make(**changes) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(SequenceConfig(**(SIZES | changes))).eval()


@torch.no_grad()
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_logits_are_products_with_the_embeddings(changes):
    model = make(**changes)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) and not any("head" in name for name in names)
    assert not any("head" in name for name in model.state_dict())
    features = torch.randn(5, 32)
    for level, head in enumerate(model.heads):
        torch.testing.assert_close(head(features), features @ model.token_embed.weight[11 * level : 11 * (level + 1)].T)
    untied = make(**changes, tied_embeddings=False)
    untied.load_state_dict(model.state_dict(), strict=False)
    for level, head in enumerate(untied.heads):
        head.weight.copy_(model.heads[level].weight)
    torch.testing.assert_close(model(TARGET), untied(TARGET))


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_the_gradient_is_the_sum_of_both_uses(changes):
    tied, untied = make(**changes), make(**changes, tied_embeddings=False)
    untied.load_state_dict(tied.state_dict(), strict=False)
    hide = {"hide": torch.tensor([[True, False] * 3] * 4)} if tied.cfg.masked else {}
    with torch.no_grad():
        for own, head in zip(tied.heads, untied.heads, strict=True):
            head.weight.copy_(own.weight)
    for model in (tied, untied):
        model.loss(TARGET, label_smoothing=0.1, **hide)[0].backward()
    expected = untied.token_embed.weight.grad.clone()
    for level, head in enumerate(untied.heads):
        expected[11 * level : 11 * (level + 1)] += head.weight.grad
    torch.testing.assert_close(tied.token_embed.weight.grad, expected)


def test_the_loss_falls():
    model = make(num_classes=2).train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(25):
        loss, _ = model.loss(TARGET, labels=torch.tensor([0, 1, 0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@torch.no_grad()
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_copies_files_and_packed_layers_stay_tied(changes, tmp_path):
    model = make(**changes)
    expected = model(TARGET)
    twin = copy.deepcopy(model)
    twin.token_embed.weight.mul_(2)
    for level, head in enumerate(twin.heads):
        assert torch.equal(head.weight, twin.token_embed.weight[11 * level : 11 * (level + 1)])
    assert torch.equal(model(TARGET), expected)
    save_sequence_model(model, tmp_path, "model")
    assert torch.equal(load_sequence_model(tmp_path, "model")(TARGET), expected)
    packed = pack_linears(copy.deepcopy(model), num_rows=4)
    assert isinstance(packed.head, PackedLinear) == can_pack(model.head)
    torch.testing.assert_close(packed(TARGET), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tables_start_from_codes():
    model, codes = make(levels=3), torch.randn(33, 9)
    model.start_from_codes(codes)
    assert torch.equal(torch.cat([head.weight for head in model.heads]), model.token_embed.weight)
