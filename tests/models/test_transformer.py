"""Backbone: attention against its definition, cache, dropout, norms."""

import math
import sys

import pytest
import torch

from digit.errors import DigitError
from digit.models import decoding
from digit.models.decoding import check_step_kernel, step_kernel
from digit.models.transformer import Dropout, KeysValues, KVCache, Transformer, TransformerConfig, attend

CFG = dict(depth=3, embed_dim=32, num_heads=4, dropout=0.0)


def naive_attention(q, k, v, causal):
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        n, t = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(n, t).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_its_definition(dtype, causal):
    q, k, v = torch.randn(3, 2, 4, 9, 8).to(dtype)
    got = attend(q, KeysValues(k, v), causal=causal).double()
    tolerance = dict(rtol=1.6e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, naive_attention(q, k, v, causal), **tolerance)


def test_half_precision_attention_has_the_gradient_of_the_fused_kernel():
    x = torch.randn(3, 2, 4, 9, 8)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x.clone().requires_grad_()
        attend(leaf[0].to(dtype), KeysValues(*leaf[1:].to(dtype)), causal=True).float().square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=5e-2, atol=5e-2)  # 8 bits of mantissa, several steps


def test_one_query_sees_the_first_keys_alone():
    k, v = torch.randn(2, 2, 4, 16, 8)
    q, mask = torch.randn(2, 4, 1, 8), torch.zeros(1, 16)
    mask[:, 5:] = -math.inf
    wanted = naive_attention(q, k[:, :, :5], v[:, :, :5], False)
    for seen in (KeysValues(k[:, :, :5], v[:, :, :5]), KeysValues(k, v, mask)):
        torch.testing.assert_close(attend(q, seen).double(), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_cached_steps_equal_one_causal_pass(norm):
    cfg = TransformerConfig(norm=norm, **CFG)
    model, x = Transformer(cfg).eval(), torch.randn(2, 7, 32)
    whole = model(x, causal=True)
    cache = KVCache(cfg, 2, 7, like=x)
    parts = [model(x[:, :3], causal=True, cache=cache)]
    parts += [model(x[:, t : t + 1], causal=True, cache=cache) for t in range(3, 7)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_skipped_outputs_change_nothing(norm, causal):
    model, x = Transformer(TransformerConfig(norm=norm, **CFG)).eval(), torch.randn(2, 7, 32)
    hidden = []
    whole = model(x, causal=causal)
    torch.testing.assert_close(model(x, causal=causal, first=4), whole[:, 4:])
    torch.testing.assert_close(model(x, causal=causal, first=4, hidden=hidden), whole[:, 4:])
    assert [h.shape for h in hidden] == [x.shape] * 3 + [(2, 3, 32)]  # the last block's skipped places are not there


def test_causal_model_does_not_look_ahead():
    model, x = Transformer(TransformerConfig(**CFG)).eval(), torch.randn(1, 6, 32)
    changed = torch.cat([x[:, :4], torch.randn(1, 2, 32)], 1)
    torch.testing.assert_close(model(changed, causal=True)[:, :4], model(x, causal=True)[:, :4])
    assert not torch.allclose(model(changed, causal=False)[:, :4], model(x, causal=False)[:, :4])


def test_dropout_rate_scale_and_reproducibility():
    dropout, x = Dropout(0.1), torch.ones(1001, 101, requires_grad=True)
    torch.manual_seed(1)
    y = dropout(x)
    y.sum().backward()
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert y.max().item() == pytest.approx(1 / 0.9, rel=1e-4)
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(1)
    assert torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x


def test_settings_that_cannot_be():
    with pytest.raises(DigitError, match="embed_dim 30 is not divisible by num_heads 4"):
        TransformerConfig(embed_dim=30, num_heads=4)


def test_without_a_working_kernel_decoding_uses_torch(monkeypatch, caplog):
    where = dict(dtype=torch.float32, head_dim=8)
    assert step_kernel(torch.device("cpu"), **where) is None
    monkeypatch.setattr(decoding, "find_spec", lambda name: None)
    assert step_kernel(torch.device("cuda", 7), **where) is None and not caplog.records
    monkeypatch.setattr(decoding, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "digit.models.step_kernel", None)  # stands for a Triton that cannot start
    assert step_kernel(torch.device("cuda", 8), **where) is None
    assert "decoding uses torch's" in caplog.text


def test_the_trial_of_a_kernel_accepts_torchs_attention_alone():
    def plain(q, k, v, keys, values, position):
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        end = int(position) + 1
        return attend(q, KeysValues(keys[:, :, :end], values[:, :, :end]))

    def misses_the_newest(q, k, v, keys, values, position):
        plain(q, k, v, keys, values, position)
        end = max(1, int(position))
        return attend(q, KeysValues(keys[:, :, :end], values[:, :, :end]))

    def stores_nothing(q, k, v, keys, values, position):
        return plain(q, k, v, keys.clone(), values.clone(), position)

    where = torch.device("cpu"), torch.float32, 8
    check_step_kernel(plain, *where)
    for wrong in (misses_the_newest, stores_nothing):
        with pytest.raises(AssertionError):
            check_step_kernel(wrong, *where)
