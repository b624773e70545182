"""Training with code losses: resumed to the bit, by micro-batches, and a finished model without their networks."""

import pytest
import torch
from toy_task import LENGTH, VOCAB, toy_batches, toy_config

from digit.errors import DigitError, Stopped
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.runtime.files import load_tensors
from digit.training.log import read_log
from digit.training.sequence import code_heads, image_flops, train_sequence_model

CODES = torch.randn(1, VOCAB, 4, generator=torch.Generator().manual_seed(0))
BOTH = {"current_code_weight": 1.0, "next_code_weight": 0.5}
SHAPE = dict(vocab_size=VOCAB, target_len=LENGTH, num_classes=3, depth=2, embed_dim=16, num_heads=2, dropout=0.1)


def make(**changes) -> SequenceModel:
    torch.manual_seed(7)
    return SequenceModel(SequenceConfig(**(SHAPE | changes)))


def run(out, *, stop_at=None, codes=CODES, model=None, **changes) -> SequenceModel:
    """Train into `out`; ends with Stopped before step `stop_at`."""
    read = toy_batches()

    def batches(step: int):
        if step == stop_at:
            raise Stopped("here")
        return read(step)

    return train_sequence_model(model or make(), batches, toy_config(**BOTH | changes), out, codes=codes)[0]


@pytest.mark.parametrize("how", [{"ema_decay": 0.9}, {"optimizer": "muon", "accumulate": 2}], ids=str)
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, how):
    settings = how | {"save_every": 2}
    whole = run(tmp_path / "whole", **settings)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop_at=5, **settings)
    cut = run(tmp_path / "cut", **settings)
    assert all(torch.equal(value, cut.state_dict()[name]) for name, value in whole.state_dict().items())
    one, two = (read_log(tmp_path / name / "log.jsonl")[-1] for name in ("whole", "cut"))
    for name in ("loss", "nll", "current_cosine", "next_cosine", "grad_norm"):
        assert one[name] == two[name], name


def test_checkpoints_hold_the_networks_and_the_model_does_not(tmp_path):
    model = run(tmp_path, ema_decay=0.9)
    assert model.code_heads is None and model.state_dict().keys() == make().state_dict().keys()
    assert not any("code_heads" in name for name, _ in model.named_parameters())
    newest = max((tmp_path / "checkpoints").glob("step*"))
    names = [name for path in newest.rglob("*.safetensors") for name in load_tensors(path)]
    assert any("code_heads" in name for name in names), names[:5]


def test_the_losses_are_learned(tmp_path):
    run(tmp_path, model=make(dropout=0.0), num_steps=60, log_every=20, save_every=60)
    log = read_log(tmp_path / "log.jsonl")
    assert log[-1]["current_cosine"] > log[0]["current_cosine"] + 0.1 and log[-1]["current_cosine"] > 0.8
    assert log[-1]["next_cosine"] > log[0]["next_cosine"] + 0.1


def test_micro_batches_add_up(tmp_path):
    for name, accumulate in (("one", 1), ("parts", 4)):
        run(tmp_path / name, model=make(dropout=0.0), num_steps=2, accumulate=accumulate)
    one, parts = (read_log(tmp_path / name / "log.jsonl")[0] for name in ("one", "parts"))
    for name in ("loss", "current_cosine", "next_cosine", "grad_norm"):
        assert parts[name] == pytest.approx(one[name], rel=1e-4)


def test_without_them_training_is_what_it_was(tmp_path):
    off = dict.fromkeys(BOTH, 0.0)
    plain = run(tmp_path / "plain", codes=None, **off)
    given = run(tmp_path / "given", **off)  # codes that nobody reads
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in plain.state_dict().items())
    assert not any("cosine" in name for name in read_log(tmp_path / "plain" / "log.jsonl")[-1])


def test_their_start_depends_on_the_seed_alone():
    starts = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(before)
        model, state = make(), torch.get_rng_state()
        with code_heads(model, CODES, toy_config(seed=seed, **BOTH)):
            assert torch.equal(torch.get_rng_state(), state)
            starts.append(next(model.code_heads.parameters()).detach().clone())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    "changes, codes, cfg, says",
    [
        ({"masked": True}, CODES, {}, "current_code_weight and next_code_weight: only a next-token model"),
        ({}, None, {}, r"code vectors of the target, codes \(1, 11, C\), and got none"),
        ({}, CODES[:, :5], {}, r"got \(1, 5, 4\)"),
        ({"target_len": 1}, CODES, {}, "predicts one position alone"),
        ({}, CODES, {"next_code_layer": 3}, "next_code_layer is 3: it must be at most 2"),
        ({}, CODES, {"current_code_layer": 9}, "current_code_layer is 9: it must be at most 2"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, changes, codes, cfg, says):
    with pytest.raises(DigitError, match=says):
        run(tmp_path, codes=codes, model=make(**changes), **cfg)


def test_layers_of_the_paper():
    cfg = toy_config(**BOTH)
    assert cfg.code_layers(24) == {"current": 1, "next": 18} and cfg.code_layers(1) == {"current": 1, "next": 1}
    assert toy_config(next_code_weight=1.0, next_code_layer=0).code_layers(4) == {"next": 0}
    assert toy_config().code_layers(4) == {}


def test_flops_have_the_networks():
    cfg = make().cfg
    plain, one, two = (image_flops(cfg, toy_config(**weights), 4) for weights in ({}, {"next_code_weight": 1.0}, BOTH))
    assert plain < one and two - one == one - plain == 6 * LENGTH * (16 * 16 + 16 * 4)


def test_noise_ends_with_the_training():
    assert toy_config().may_grow and toy_config(**BOTH).may_grow and not toy_config(input_noise=0.5).may_grow
