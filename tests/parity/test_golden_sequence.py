"""Logits, hidden states and greedy sequences of the authors' released prior, renderers and VQ-only baseline."""

import pytest
import torch
from generate import generate
from safetensors.torch import load_file

from digit.convert.fairseq import read_fairseq

TOLERANCE = dict(rtol=0, atol=1e-4)  # float32; the order of sums differs (one matmul for q, k and v)


@pytest.fixture(scope="module")
def expected(golden):
    return load_file(golden / "expected.safetensors")


@pytest.mark.parametrize("name", ["stage1", "stage1_cond"])
def test_prior_logits_and_every_hidden_state(golden, expected, name):
    model = read_fairseq(golden / f"{name}.pt").model
    labels = expected["cls_ids"] if name == "stage1_cond" else None
    logits, hidden = model(expected["tokens"], labels=labels, return_hidden=True)
    torch.testing.assert_close(logits, expected[f"{name}_logits"][:, :256, 5:], **TOLERANCE)
    assert len(hidden) == model.cfg.depth + 1
    for n, state in enumerate(hidden):
        torch.testing.assert_close(state, expected[f"{name}_hidden_{n}"], **TOLERANCE)
    torch.testing.assert_close(model(expected["tokens"], labels=labels), logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_prior_greedy(golden, expected, use_cache):
    for name, labels in (("stage1", None), ("stage1_cond", expected["cls_ids"])):
        model = read_fairseq(golden / f"{name}.pt", target_len=24).model
        sampled = generate(model, seeds=[0, 1], labels=labels, temperature=0, use_cache=use_cache)
        assert sampled.equal(expected[f"{name}_greedy24"])


def test_autoregressive_renderer(golden, expected):
    parts = read_fairseq(golden / "stage2_ar.pt")
    logits = parts.model(expected["vqgan_indices"], prefix=expected["tokens"])
    torch.testing.assert_close(logits, expected["stage2_ar_logits"][:, :256, 5:], **TOLERANCE)
    assert parts.vqgan["quantize.embedding.weight"].shape[0] == parts.model.cfg.vocab_size
    assert parts.centroids.shape[0] == parts.model.cfg.prefix_vocab_size


def test_renderer_greedy(golden, expected):
    model = read_fairseq(golden / "stage2_ar.pt", target_len=12).model
    sampled = generate(model, seeds=[0, 1], prefix=expected["tokens"], temperature=0)
    assert sampled.equal(expected["stage2_ar_greedy12"])


def test_masked_renderer(golden, expected):
    model = read_fairseq(golden / "stage2_nar.pt", masked=True).model
    target = expected["vqgan_indices"].masked_fill(expected["stage2_nar_mask"], model.cfg.mask_token)
    logits = model(target, prefix=expected["tokens"])  # the start symbol's own output predicts nothing
    torch.testing.assert_close(logits, expected["stage2_nar_logits"][:, 1:, 5:], **TOLERANCE)


def test_vq_only_baseline(golden, expected):
    model = read_fairseq(golden / "vq_ar.pt").model
    assert model.cfg.norm == "pre" and not model.cfg.prefix_len
    logits = model(expected["vqgan_indices"])
    torch.testing.assert_close(logits, expected["vq_ar_logits"][:, :256, 5:], **TOLERANCE)
