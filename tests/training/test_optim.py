"""Schedules, optimizer, clipping and the moving average against their equations."""

import copy
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

from digit.errors import DigitError
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.training import muon, optim
from digit.training.config import ENDING_SCHEDULES, Schedule, TrainConfig
from digit.training.ema import EMA
from digit.training.muon import orthogonal
from digit.training.optim import (
    SCHEDULES,
    build_optimizer,
    clip_gradients,
    constant,
    cosine,
    inverse_sqrt,
    learning_rate_at,
    set_lr,
)


def test_inverse_sqrt_is_fairseqs():
    peak, warm = 3e-4, 6250
    assert inverse_sqrt(0, peak, warm) == 1e-7
    assert inverse_sqrt(3125, peak, warm) == pytest.approx((peak + 1e-7) / 2)
    assert inverse_sqrt(warm, peak, warm) == peak
    assert inverse_sqrt(4 * warm, peak, warm) == pytest.approx(peak / 2)
    # fairseq: decay_factor = lr * warmup ** 0.5; lr = decay_factor * step ** -0.5
    assert inverse_sqrt(125_000, peak, warm) == pytest.approx(peak * warm**0.5 * 125_000**-0.5)


def test_schedules_without_warmup_start_at_the_peak():
    assert inverse_sqrt(0, 1.0) == inverse_sqrt(1, 1.0) == 1.0
    assert inverse_sqrt(4, 1.0) == 0.5
    assert cosine(0, 1.0, num_steps=10) == constant(0, 1.0) == constant(10**6, 1.0) == 1.0


def test_cosine_ends_at_zero():
    assert cosine(10, 1.0, num_steps=110, warmup_steps=10) == 1.0
    assert cosine(60, 1.0, num_steps=110, warmup_steps=10) == pytest.approx(0.5)
    assert cosine(110, 1.0, num_steps=110, warmup_steps=10) == 0.0
    assert cosine(200, 1.0, num_steps=110, warmup_steps=10) == 0.0


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "cosine", "constant"])
def test_learning_rate_follows_the_config(schedule):
    cfg = TrainConfig(num_steps=100, warmup_steps=10, warmup_from=0.0, learning_rate=2.0, schedule=schedule)
    assert optim.learning_rate_at(5, cfg) == 1.0
    assert optim.learning_rate_at(10, cfg) == 2.0
    assert optim.learning_rate_at(99, cfg) <= 2.0


def test_optimizer_is_adamw_on_every_trainable_parameter():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[0].bias.requires_grad_(False)
    cfg = TrainConfig(learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.98))
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, cfg)
    set_lr(optimizer, 0.01)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p.double(), before[name])
            continue
        # first step: w <- w - lr wd w - lr g / (|g| + eps)
        g = p.grad.double()
        wanted = before[name] * (1 - 0.01 * 0.5) - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(p.double(), wanted, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_joint_norm():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    for max_norm, after in ((1.0, 1.0), (10.0, 5.0), (0.0, 5.0)):
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
        assert clip_gradients(parameters, max_norm).item() == pytest.approx(5.0)
        joint = math.sqrt(sum(p.grad.square().sum().item() for p in parameters))
        assert joint == pytest.approx(after, rel=1e-5)


def test_ema_is_the_naive_average():
    model = nn.Linear(2, 1)
    ema = EMA(model, decay=0.5)  # the warm-up of the decay ends at step 8
    naive = model.weight.detach().double().clone()
    for step in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn(1, 2))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        naive = decay * naive + (1 - decay) * model.weight.detach().double()
        torch.testing.assert_close(ema.state_dict()["weight"].double(), naive, rtol=1e-5, atol=1e-6)


def test_ema_swaps_in_and_out_even_on_an_error():
    model = nn.Linear(2, 1)
    ema = EMA(model, decay=0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    own, average = model.weight.detach().clone(), ema.state_dict()["weight"].clone()
    with pytest.raises(ZeroDivisionError), ema.applied():
        assert torch.equal(model.weight, average)
        1 / 0  # noqa: B018
    assert torch.equal(model.weight, own)
    ema.copy_to_model()
    assert torch.equal(model.weight, average)


def test_ema_state_survives_a_round_trip():
    first, second = EMA(nn.Linear(2, 1), 0.9), EMA(nn.Linear(2, 1), 0.9)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.averages, second.averages, strict=True))
    with pytest.raises(RuntimeError, match="bias"):
        second.load_state_dict({"weight": torch.zeros(1, 2)})


def test_muon_steps_are_orthogonal_and_the_rest_is_adamws():
    torch.manual_seed(0)
    cfg = TrainConfig(optimizer="muon", learning_rate=0.01, muon_learning_rate=0.5, weight_decay=0.0)
    model = SequenceModel(SequenceConfig(vocab_size=9, target_len=4, depth=1, embed_dim=32, num_heads=2))
    twin = copy.deepcopy(model)
    for net, setting in ((model, cfg), (twin, replace(cfg, optimizer="adamw"))):
        optimizer = build_optimizer(net, setting)
        assert set_lr(optimizer, 0.01) == 0.01
        net.eval().loss(torch.arange(4)[None])[0].backward()
        optimizer.step()
    matrices = {name for name, p in model.named_parameters() if any(p is q for q, _ in model.hidden_matrices())}
    assert {name.split(".", 3)[3] for name in matrices} == {
        "attention.qkv.weight", "attention.out.weight", "mlp.fc1.weight", "mlp.fc2.weight"
    }  # fmt: skip
    torch.manual_seed(0)
    start = dict(SequenceModel(model.cfg).named_parameters())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name not in matrices:
            torch.testing.assert_close(p, q)
            continue
        pieces = 3 if "qkv" in name else 1
        for step in (p - start[name]).detach().chunk(pieces):
            size = 0.5 * max(1.0, step.shape[0] / step.shape[1]) ** 0.5  # the learning rate of the matrices
            assert 0.5 * size < torch.linalg.matrix_norm(step, 2) < 1.3 * size


def test_orthogonal_keeps_the_singular_vectors():
    x = torch.randn(2, 12, 30, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    for matrix, left, right in ((x, u, v), (x.transpose(1, 2), v.transpose(1, 2), u.transpose(1, 2))):
        values = left.transpose(1, 2) @ orthogonal(matrix) @ right.transpose(1, 2)
        assert values.diagonal(dim1=1, dim2=2).min() > 0.3 and values.diagonal(dim1=1, dim2=2).max() < 1.4
        assert (values - values.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 0.05


def test_muon_goes_on_from_its_state():
    cfg = TrainConfig(optimizer="muon", learning_rate=0.01)
    shape = SequenceConfig(vocab_size=9, target_len=4, depth=1, embed_dim=32, num_heads=2, dropout=0.0)
    whole = SequenceModel(shape)
    parted = copy.deepcopy(whole)

    def steps(model, optimizer, count):
        for _ in range(count):
            model.loss(torch.arange(4)[None])[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    steps(whole, build_optimizer(whole, cfg), 4)
    first = steps(parted, build_optimizer(parted, cfg), 2)
    second = build_optimizer(parted, cfg)
    second.load_state_dict(first.state_dict())
    steps(parted, second, 2)
    for p, q in zip(whole.parameters(), parted.parameters(), strict=True):
        assert torch.equal(p, q)


def test_muon_wants_a_transformer():
    with pytest.raises(DigitError, match="choose adamw"):
        build_optimizer(nn.Linear(2, 2), TrainConfig(optimizer="muon"))


def test_muon_is_torchs_on_single_matrices(monkeypatch):
    """torch.optim.Muon (torch 2.9 and later) computes in bfloat16 and knows no stacked matrices."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: True)
    torch.manual_seed(0)
    own = [nn.Parameter(torch.randn(shape)) for shape in ((16, 16), (8, 24), (24, 8))]
    reference = [nn.Parameter(p.detach().clone()) for p in own]
    settings = dict(lr=0.02, weight_decay=0.1)
    first = muon.Muon([(p, 1) for p in own], [nn.Parameter(torch.zeros(1))], 0.02, **settings)
    second = torch.optim.Muon(reference, momentum=muon.MOMENTUM, ns_steps=muon.ITERATIONS, **settings)
    for _ in range(3):
        for p, q in zip(own, reference, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        first.step()
        second.step()
    for p, q in zip(own, reference, strict=True):
        torch.testing.assert_close(p, q, rtol=1.6e-2, atol=1e-3)  # bfloat16, summed in another order


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_schedule_is_in_the_table_and_warms_up(schedule):
    """Also those that end: at num_steps they reach 0, and their runs cannot be lengthened."""
    cfg = TrainConfig(num_steps=100, warmup_steps=10, schedule=schedule, learning_rate=1.0)
    assert set(SCHEDULES) == set(get_args(Schedule))
    assert learning_rate_at(10, cfg) == 1.0 and learning_rate_at(5, cfg) < 0.51
    assert (learning_rate_at(100, cfg) < 1e-9) == (schedule in ENDING_SCHEDULES) == (not cfg.may_grow)
