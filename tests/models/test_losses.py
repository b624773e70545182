"""Projection and smoothed cross-entropy in one against torch's own, chunk by chunk and in every precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from digit.models import losses as losses_module
from digit.models.losses import linear_cross_entropy


def example(count: int = 37, vocab_size: int = 19, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, width, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=generator).requires_grad_()
    return features, weight, torch.randint(vocab_size, (count,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 5 * 19, 2**19])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_loss_figures_and_gradients_are_torchs(monkeypatch, chunk, eps):
    monkeypatch.setattr(losses_module, "CPU_CHUNK", chunk)
    features, weight, target = example()
    loss, metrics = linear_cross_entropy(features, weight, target, eps)
    logits = features @ weight.t()
    wanted = F.cross_entropy(logits, target, label_smoothing=eps)
    torch.testing.assert_close(loss, wanted)
    nll = F.cross_entropy(logits, target)
    torch.testing.assert_close(metrics["nll"], nll.detach())
    torch.testing.assert_close(metrics["perplexity"], nll.detach().exp())
    assert metrics["accuracy"].item() == pytest.approx((logits.argmax(1) == target).float().mean().item())
    assert not any(value.requires_grad for value in metrics.values())
    gradients = torch.autograd.grad(loss / 4, (features, weight))  # as under accumulation
    for got, own in zip(gradients, torch.autograd.grad(wanted / 4, (features, weight)), strict=True):
        torch.testing.assert_close(got, own)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(features, weight, target, eps)[0], loss)


def test_in_bf16_it_is_as_near_to_float32_as_torchs_chain():
    features, weight, target = example(count=64, vocab_size=200, width=32)
    exact = torch.autograd.grad(F.cross_entropy(features @ weight.t(), target), (features, weight))
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(features, weight, target)[0]
        chain = F.cross_entropy(F.linear(features, weight).float(), target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, chain)
    got_and_own = (torch.autograd.grad(loss, (features, weight)) for loss in (ours, chain))
    for got, own, best in zip(*got_and_own, exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - best).norm() <= 1.1 * (own - best).norm() + 1e-7 and (got - best).norm() < 0.01 * best.norm()


def test_certain_and_hopeless_logits_stay_finite():
    weight = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    features = torch.ones(2, 1, requires_grad=True)
    loss, metrics = linear_cross_entropy(features, weight, torch.tensor([0, 1]))
    assert loss.item() == 200.0 and metrics["accuracy"].item() == 0.5 and math.isinf(metrics["perplexity"].item())
    loss.backward()
    assert torch.equal(weight.grad, torch.tensor([[0.5], [-0.5]]))


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_a_mean_of_some_positions_is_that_of_these_alone(eps):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=generator, requires_grad=True)
    w = torch.randn(16, 8, generator=generator, requires_grad=True)
    target = torch.randint(16, (50,), generator=generator)
    counted = torch.rand(50, generator=generator) < 0.6
    wanted, metrics = linear_cross_entropy(x[counted], w, target[counted], eps)
    gradients = torch.autograd.grad(wanted, (x, w))
    loss, own = linear_cross_entropy(x, w, target, eps, counted)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), gradients)
    for name, value in metrics.items():
        torch.testing.assert_close(own[name], value)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, w, target, eps, counted)[0], wanted)
