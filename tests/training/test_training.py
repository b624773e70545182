"""The loop and the sequence trainer on a toy task."""

import json
import math
import os
import signal
import sys
from dataclasses import replace

import pytest
import torch
from toy_task import CLASSES, LENGTH, VOCAB, ToyModel, run_toy, toy_batches, toy_config

from digit.errors import DigitError, Stopped
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.training import checkpoint, parallel, peak
from digit.training import compile as compile_module
from digit.training.checkpoint import list_checkpoints
from digit.training.config import LoopConfig, TrainConfig
from digit.training.log import RunLog, read_log
from digit.training.loop import TrainState, step_seed, train
from digit.training.sequence import SequenceUpdate, train_sequence_model


class Counter:
    """A stateful object that counts its updates, and an update whose metrics a test chooses."""

    def __init__(self, metrics=lambda step: {"loss": 1.0}):
        self.steps, self.metrics = [], metrics

    def __call__(self, step):
        self.steps.append(step)
        return self.metrics(step)

    def state_dict(self):
        return {"steps": list(self.steps)}

    def load_state_dict(self, state):
        self.steps = list(state["steps"])


def run(update, out, **changes):
    fields = {"num_steps": 10, "batch_size": 4, "log_every": 3, "save_every": 4, "tensorboard": False, **changes}
    return train(update, TrainState(0, {"counter": update}), LoopConfig(**fields), out)


def test_every_step_once_and_a_line_when_due(tmp_path):
    update = Counter(lambda step: {"loss": torch.tensor(float(step)), "lr": step / 10, "data_seconds": 0.0})
    metrics = run(update, tmp_path)
    assert update.steps == list(range(10))
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    assert [line["loss"] for line in lines] == [1.0, 4.0, 7.0, 9.0]  # means since the line before
    assert [line["lr"] for line in lines] == [0.2, 0.5, 0.8, 0.9]  # the last one
    assert all(line["data_wait"] == 0 and line["images_per_second"] > 0 for line in lines)
    assert metrics == lines[-1]
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [8, 10]


def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(tmp_path):
    first = run(Counter(), tmp_path)
    update = Counter()
    assert run(update, tmp_path) == first
    assert update.steps == list(range(10))  # loaded, not run
    run(update, tmp_path, num_steps=12)
    assert update.steps == list(range(12))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_nan_stops_the_run_naming_the_step(tmp_path, bad, as_tensor):
    def metrics(step):
        value = bad if step == 6 else 1.0
        return {"loss": torch.tensor(value) if as_tensor else value, "lr": 0.1}

    with pytest.raises(DigitError, match=rf"step 7 gave loss {bad}, lr 0\.1: lower learning_rate"):
        run(Counter(metrics), tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4]


def test_nan_is_never_saved(tmp_path):
    update = Counter(lambda step: {"loss": math.nan})
    with pytest.raises(DigitError, match="step 1 gave"):
        run(update, tmp_path, log_every=100, save_every=4)
    assert not list_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_the_step(tmp_path, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopper = Counter(lambda step: (os.kill(os.getpid(), number) if step == 5 else None) or {"loss": 1.0})
    with pytest.raises(Stopped, match=r"train stopped at step 6 of 10, saved in .*step_00000006"):
        run(stopper, tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    update = Counter()
    run(update, tmp_path)
    assert update.steps == list(range(10))
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [3, 6, 9, 10]


def test_a_signal_during_the_last_save_stops_too(tmp_path):
    """Otherwise the next stage would begin, and be killed."""
    cfg = LoopConfig(num_steps=4, batch_size=4, log_every=3, save_every=4, tensorboard=False)
    update, validate = Counter(), lambda step: os.kill(os.getpid(), signal.SIGTERM) or {"val_nll": 1.0}
    with pytest.raises(Stopped, match="stopped at step 4 of 4"):
        train(update, TrainState(0, {"counter": update}), cfg, tmp_path, validate=validate)
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4]


def test_a_second_interrupt_stops_at_once(tmp_path):
    def impatient(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return {"loss": 1.0}

    with pytest.raises(KeyboardInterrupt):
        run(Counter(impatient), tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4]


@pytest.mark.parametrize("stop_after", [1, 2, 4, 5, 7])
def test_a_stop_leaves_no_trace_in_the_log(tmp_path, stop_after):
    """A line covers the steps since the line before it, even where the run was stopped between them."""
    losses = Counter(lambda step: {"loss": float(step**2)})
    run(losses, tmp_path / "whole")
    stopper = Counter(
        lambda step: (
            (os.kill(os.getpid(), signal.SIGTERM) if step + 1 == stop_after else None) or {"loss": float(step**2)}
        )
    )
    with pytest.raises(Stopped):
        run(stopper, tmp_path / "cut")
    run(losses, tmp_path / "cut")
    wanted, got = (
        [(line["step"], line["loss"]) for line in read_log(tmp_path / name / "log.jsonl")] for name in ("whole", "cut")
    )
    assert got == wanted


def test_deterministic_algorithms_within_the_run_alone(tmp_path):
    seen = []
    update = Counter(lambda step: seen.append(torch.are_deterministic_algorithms_enabled()) or {})
    run(update, tmp_path, deterministic=True)
    assert all(seen) and not torch.are_deterministic_algorithms_enabled()


def test_a_resumed_log_has_each_line_once(tmp_path):
    def crash(step):
        if step == 7:
            raise ValueError("power cut")
        return {"loss": float(step)}

    with pytest.raises(ValueError, match="power cut"):
        run(Counter(crash), tmp_path)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 7, "lo')  # torn
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [3, 6]
    run(Counter(lambda step: {"loss": float(step)}), tmp_path)  # from the checkpoint of step 4
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_validation_comes_with_each_save(tmp_path):
    update, seen = Counter(), []
    cfg = LoopConfig(num_steps=10, batch_size=4, log_every=5, save_every=4, tensorboard=False)
    validate = lambda step: seen.append(step) or {"validation_loss": 0.5}  # noqa: E731
    metrics = train(update, TrainState(0, {"counter": update}), cfg, tmp_path, validate=validate)
    assert seen == [4, 8, 10]
    assert metrics["validation_loss"] == 0.5 and metrics["loss"] == 1.0


def test_tensorboard_is_written_or_noted(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    run(Counter(), tmp_path / "with", tensorboard=True)
    assert list((tmp_path / "with" / "tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    run(Counter(), tmp_path / "without", tensorboard=True)
    notes = [line["note"] for line in read_log(tmp_path / "without" / "log.jsonl") if "note" in line]
    assert len(notes) == 1 and "not installed" in notes[0]


def test_metrics_may_come_and_go(tmp_path):
    run(Counter(lambda step: {"loss": 1.0, **({"late": 2.0} if step == 5 else {})}), tmp_path)
    assert [line.get("late") for line in read_log(tmp_path / "log.jsonl")] == [None, 2.0, None, None]


def test_metrics_hold_no_graph(tmp_path):
    with RunLog(tmp_path, 0, 1, tensorboard=False) as log:
        log.add(1, {"loss": torch.ones((), requires_grad=True) * 2})
        assert not log.pending[0][1]["loss"].requires_grad


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size is 6: it must be a multiple of accumulate 4"),
        ({"log_every": 0}, "log_every is 0"),
        ({"compile": "always"}, "compile is 'always': it must be true, false or auto"),
        ({"num_steps": -1}, "num_steps is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_config_refuses_nonsense(change, text, unchecked):
    with pytest.raises(DigitError, match=text):
        TrainConfig(**change)


def test_seeds_differ_by_step_and_micro_batch():
    seeds = {step_seed(seed, step, part) for seed in range(3) for step in range(5) for part in range(4)}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_micro_batches_are_equal_and_in_order():
    batch = {"target": torch.arange(6), "labels": None}
    micro_batches = parallel.split_batch(batch, 3)
    assert [p["target"].tolist() for p in micro_batches] == [[0, 1], [2, 3], [4, 5]]
    assert all(p["labels"] is None for p in micro_batches)


def test_the_toy_is_learnt(tmp_path):
    model = ToyModel(dropout=0.0, mask_rate=0.0, width=32)
    cfg = toy_config(num_steps=150, batch_size=32, schedule="cosine", label_smoothing=0.0, learning_rate=0.03)
    trained, metrics = train_sequence_model(model, toy_batches(32), cfg, tmp_path)
    assert trained is model and not model.training
    assert metrics["accuracy"] > 0.6 and metrics["loss"] < 1.5  # 1 of 6 tokens is a guess
    assert metrics["step"] == 150


def gradients(accumulate: int, **toy) -> list[torch.Tensor]:
    update = SequenceUpdate(ToyModel(**toy), toy_batches(), toy_config(accumulate=accumulate))
    update.forward_backward(update.batches(0), 0)
    return [p.grad for p in update.parameters]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    still = {"dropout": 0.0, "mask_rate": 0.0}
    for whole, accumulated in zip(gradients(1, **still), gradients(4, **still), strict=True):
        torch.testing.assert_close(accumulated, whole)


def test_a_step_depends_on_nothing_but_the_step():
    first = gradients(2)
    torch.randn(17)
    for a, b in zip(first, gradients(2), strict=True):
        assert torch.equal(a, b)


def test_training_leaves_the_callers_random_numbers_alone(tmp_path):
    before = torch.get_rng_state()
    run_toy(tmp_path, num_steps=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rank", [0, 1])
def test_own_rows_get_their_part_of_the_whole_batch_s_random_numbers(monkeypatch, rank):
    update = SequenceUpdate(ToyModel(), toy_batches(), toy_config(accumulate=2))
    monkeypatch.setattr(parallel.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(parallel.distributed, "rank", lambda: rank)
    update.num_micro_batches = 4
    whole = toy_batches()(3)
    own = {name: None if v is None else v.chunk(2)[rank] for name, v in whole.items()}
    (noise, wanted), (own_noise, found) = update.split(whole, 3), update.split(own, 3)
    assert torch.equal(noise["hidden"], own_noise["hidden"]) and len(wanted) == len(found) == 2
    for one, two in zip(wanted, found, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in ("target", "labels", "hidden"))
    with pytest.raises(DigitError, match="batch 3 has 2 rows, batch_size is 8"):
        update.split({name: None if v is None else v[:2] for name, v in whole.items()}, 3)


def test_unlabelled_batches_train(tmp_path):
    model = run_toy(tmp_path, num_steps=2, labelled=False)
    assert torch.equal(model.label.weight, ToyModel().label.weight)  # no gradient, so no decay either


def test_bf16_trains_and_fp16_wants_a_gpu(tmp_path):
    run_toy(tmp_path / "bf16", num_steps=2, precision="bf16")
    with pytest.raises(DigitError, match="fp16 needs a GPU"):
        run_toy(tmp_path / "fp16", num_steps=2, precision="fp16")


def test_a_batch_of_another_size_is_refused(tmp_path):
    with pytest.raises(DigitError, match="batch 0 has 4 rows, batch_size is 8"):
        train_sequence_model(ToyModel(), toy_batches(4), toy_config(), tmp_path)


def test_validation_sees_the_average_in_eval_mode(tmp_path):
    model, seen = ToyModel(), []

    def validate(model):
        seen.append((model.training, model.head.weight.clone()))
        return {"validation_loss": 1.0}

    train_sequence_model(model, toy_batches(), toy_config(num_steps=4, ema_decay=0.9), tmp_path, validate=validate)
    training, weight = seen[-1]
    assert not training
    assert torch.equal(weight, model.head.weight)  # the result is the average too
    last = checkpoint.load(tmp_path / "checkpoints" / "step_00000004", {})
    assert torch.equal(last["ema"]["head.weight"], weight)
    assert not torch.equal(last["model"]["head.weight"], weight)


def test_loss_scaling_skips_an_overflow_and_is_otherwise_without_effect():
    scaled, plain = (SequenceUpdate(ToyModel(), toy_batches(), toy_config()) for _ in range(2))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert scaled.state().objects.keys() == {"model", "optimizer", "scaler", "skipped"}
    metrics = [update(0) for update in (scaled, plain)]
    torch.testing.assert_close(metrics[0]["grad_norm"], metrics[1]["grad_norm"])
    for a, b in zip(scaled.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(a, b)
    before = [p.detach().clone() for p in scaled.parameters]
    metrics = scaled.forward_backward(scaled.batches(1), 1)
    scaled.parameters[0].grad[0, 0] = math.inf
    outcome = scaled.optimizer_step(1, metrics)
    assert outcome["skipped"] == 1 and outcome["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(scaled.parameters, before, strict=True))
    assert scaled.scaler.get_scale() == 2.0**9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16_on_a_gpu_skips_an_overflow(tmp_path):
    cfg = toy_config(num_steps=50, precision="fp16", log_every=1)
    _, metrics = train_sequence_model(ToyModel(dropout=0.0).cuda(), toy_batches(), cfg, tmp_path)
    assert math.isfinite(metrics["loss"]) and "skipped" in metrics


# ---- how the transformer runs

PRIOR = SequenceConfig(vocab_size=VOCAB, target_len=LENGTH, num_classes=CLASSES, depth=2, embed_dim=16, num_heads=2)
MASKED = replace(PRIOR, masked=True, norm="pre", prefix_vocab_size=5, prefix_len=3, prefix_dropout=0.2)


def prior_update(model_cfg: SequenceConfig = PRIOR, **changes) -> SequenceUpdate:
    torch.manual_seed(7)
    model = SequenceModel(model_cfg).train()
    prefix = torch.arange(24).view(8, 3) % 5 if model_cfg.prefix_len else None
    batches = toy_batches()
    return SequenceUpdate(model, lambda step: batches(step) | {"prefix": prefix}, toy_config(**changes))


def one_backward(update: SequenceUpdate) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    loss = update.forward_backward(update.batches(3), 3)["loss"]
    return loss, [p.grad for p in update.parameters]


@pytest.mark.parametrize("model_cfg", [PRIOR, MASKED])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_activations_give_the_same_loss_and_gradients(model_cfg, precision):
    assert model_cfg.dropout > 0
    kept = one_backward(prior_update(model_cfg, precision=precision, accumulate=2))
    update = prior_update(model_cfg, precision=precision, accumulate=2, checkpoint_activations=True)
    calls = []
    for block in update.model.transformer.blocks:
        block.attention.register_forward_hook(lambda *_: calls.append(1))
    loss, gradients = one_backward(update)
    assert len(calls) == 2 * 2 * 2  # blocks, micro-batches, forward and recomputed
    assert torch.equal(loss, kept[0])
    for first, second in zip(gradients, kept[1], strict=True):
        assert (first is None and second is None) or torch.equal(first, second)
    assert all("forward" not in vars(block) for block in update.model.transformer.blocks)  # as it was


def test_activations_of_another_model_cannot_be_checkpointed():
    with pytest.raises(DigitError, match="checkpoint_activations is for transformers, ToyModel is not one"):
        SequenceUpdate(ToyModel(), toy_batches(), toy_config(checkpoint_activations=True))
    with pytest.raises(DigitError, match="compile is for transformers"):
        SequenceUpdate(ToyModel(), toy_batches(), toy_config(compile=True))


@pytest.mark.parametrize(
    ("setting", "device", "num_steps", "triton", "wanted"),
    [
        ("auto", "cpu", 5000, True, False),
        ("auto", "cuda", 5000, True, True),
        ("auto", "cuda", 999, True, False),  # too short
        ("auto", "cuda", 5000, False, False),
        (True, "cpu", 1, False, True),
        (False, "cuda", 5000, True, False),
    ],
)
def test_when_to_compile(monkeypatch, setting, device, num_steps, triton, wanted):
    monkeypatch.setattr(compile_module, "has_triton", lambda: triton)
    cfg = TrainConfig(compile=setting, num_steps=num_steps)
    assert compile_module.compiles(cfg, torch.device(device)) is wanted


def test_the_transformer_alone_is_compiled_and_only_in_training(monkeypatch):
    calls = []

    def compile_stub(function, dynamic):
        return lambda *args, **kwargs: calls.append(function) or function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_stub)
    update = prior_update(compile=True)
    loss, _ = one_backward(update)
    assert calls == [update.model.transformer.forward]
    update.model.loss(update.batches(0)["target"])
    assert len(calls) == 1
    monkeypatch.undo()
    assert torch.equal(loss, one_backward(prior_update())[0])


def test_a_transformer_that_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog):
    from torch._dynamo.exc import TorchDynamoException

    def compile_stub(function, dynamic):
        def fail(*args, **kwargs):
            raise TorchDynamoException("no compiler\nat all")

        return fail

    monkeypatch.setattr(torch, "compile", compile_stub)
    update = prior_update(compile=True)
    update(0), update(1)
    assert [record.getMessage() for record in caplog.records] == [
        "the transformer cannot be compiled (no compiler): it runs uncompiled; silence this with compile=false"
    ]


# ---- share of the hardware's peak


def measure(monkeypatch, *rates: float) -> list[float]:
    """Let measurements of the peak give `rates` in turn, FLOPs per second; returns those that are left."""
    left = list(rates)
    monkeypatch.setattr(peak, "matmul_flops", lambda device: left.pop(0))
    monkeypatch.setattr(peak, "_measured", {})
    return left


def test_mfu_is_logged_where_the_flops_are_known(tmp_path, monkeypatch):
    measure(monkeypatch, 5e12)
    train_sequence_model(ToyModel(), toy_batches(), toy_config(), tmp_path / "with", flops_per_image=1e6)
    for line in read_log(tmp_path / "with" / "log.jsonl"):
        assert line["mfu"] == pytest.approx(line["images_per_second"] * 1e6 / 5e12)
    run_toy(tmp_path / "without", num_steps=2)
    assert "mfu" not in read_log(tmp_path / "without" / "log.jsonl")[-1]


def speed(num_devices: int = 1) -> peak.PeakSpeed:
    """The peak speed of a model with one FLOP per image."""
    return peak.PeakSpeed(device=torch.device("cpu"), flops_per_image=1.0, num_devices=num_devices)


def test_the_progress_line_shows_mfu(tmp_path, monkeypatch):
    measure(monkeypatch, 1e12)
    with RunLog(tmp_path, 0, 1, tensorboard=False, peak=speed()) as log:
        log.add(1, {"loss": 1.0})
        log.write(4)
        assert log.bar.metrics["mfu"] == log.bar.metrics["images_per_second"] / 1e12


def test_peaks_are_published_or_measured_once(monkeypatch):
    assert peak.published_flops("NVIDIA H100 80GB HBM3") == 989e12
    similar = ("H100 PCIe", "H100", "L40S", "L40", "L4")  # names that begin like others
    assert len({peak.published_flops(f"NVIDIA {name}") for name in similar}) == len(similar)
    assert peak.published_flops("Voodoo 2") is None
    left = measure(monkeypatch, 7.0, 8.0)
    assert [peak.peak_flops(torch.device("cpu")) for _ in range(2)] == [7.0, 7.0] and left == [8.0]


@pytest.mark.parametrize(
    ("rates", "reached", "share", "left"),
    [
        ((100.0, 200.0), 50.0, 0.5, [200.0]),
        ((100.0, 200.0), 100.0, 1.0, [200.0]),
        ((100.0, 200.0), 117.0, 0.585, []),  # the first measurement was slowed by other programs
        ((100.0, 110.0), 117.0, None, []),
        ((100.0, 90.0), 101.0, None, []),  # the higher of both measurements stays
    ],
)
def test_a_share_above_one_measures_the_peak_again(monkeypatch, rates, reached, share, left):
    remaining = measure(monkeypatch, *rates)
    assert speed().share(reached) == (None if share is None else pytest.approx(share)) and remaining == left
    assert peak.peak_flops(torch.device("cpu")) == (rates[0] if left else max(rates))


def test_the_peak_of_several_devices_is_theirs_together(monkeypatch):
    measure(monkeypatch, 100.0)
    assert speed(num_devices=4).share(200.0) == 0.5


def test_a_published_peak_is_not_measured(monkeypatch):
    measure(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    on_gpu = peak.PeakSpeed(device=torch.device("cuda"), flops_per_image=1.0)
    assert on_gpu.share(989e12 / 2) == 0.5 and on_gpu.share(1e15) is None


def test_a_run_faster_than_the_peak_logs_no_share_and_says_so_once(tmp_path, monkeypatch):
    measure(monkeypatch, *[1e-3] * 20)
    train_sequence_model(ToyModel(), toy_batches(), toy_config(), tmp_path, flops_per_image=1e6)
    lines = read_log(tmp_path / "log.jsonl")
    assert not any("mfu" in line for line in lines)
    assert [line["note"][:17] for line in lines if "note" in line] == ["mfu is left out: "]


@pytest.mark.parametrize("stop", [1, 3, 5, 7, 9])
def test_steps_of_an_earlier_process_do_not_count_as_speed(tmp_path, monkeypatch, stop):
    """A resumed run has the metrics of steps since the last line, and not their time."""
    clock = iter(float(second) for second in range(10_000))
    monkeypatch.setattr("digit.training.log.time.perf_counter", lambda: next(clock))
    fields = dict(log_every=10, save_every=1)
    run(Counter(), tmp_path, num_steps=10, log_every=20, save_every=10)
    whole = read_log(tmp_path / "log.jsonl")[-1]
    assert whole["images_per_second"] == 40  # 10 steps of 4 images in one tick of the clock
    other = tmp_path / "stopped"

    def interrupted(step):
        if step == stop and not stopped:
            stopped.append(step)
            raise KeyboardInterrupt
        return {"loss": 1.0}

    stopped = []
    with pytest.raises(KeyboardInterrupt):
        run(Counter(interrupted), other, **fields)
    run(Counter(interrupted), other, **fields)
    assert read_log(other / "log.jsonl")[-1]["images_per_second"] == 4 * (10 - stop)


# ---- what is not finite and no training loss


def validated(tmp_path, values, **changes):
    """A run whose validation gives `values` by step."""
    update, fields = Counter(), {"num_steps": 4, "batch_size": 4, "log_every": 1, "save_every": 1, "tensorboard": False}
    cfg = LoopConfig(**fields, keep_checkpoints=1, **changes)
    validate = lambda step: {"val_nll": values[step - 1]}  # noqa: E731
    return train(update, TrainState(0, {"counter": update}), cfg, tmp_path, validate=validate)


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([math.nan, 2.0, 3.0, 4.0], 2),
        ([2.0, math.nan, 3.0, 4.0], 1),
        ([2.0, 3.0, math.nan, math.nan], 1),
        ([-math.inf, 5.0, 4.0, 6.0], 3),
        ([math.inf, math.nan, math.nan, 9.0], 4),
        ([math.nan] * 4, None),
    ],
)
def test_a_validation_that_is_not_finite_is_told_and_never_the_best(tmp_path, caplog, values, best):
    validated(tmp_path, values)
    found = checkpoint.best(tmp_path / "checkpoints")
    assert (found and found[1]) == (None if best is None else values[best - 1])
    odd = [step for step, value in enumerate(values, 1) if not math.isfinite(value)]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(":")[0] for text in warnings] == [f"step {step}" for step in odd]
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines if "validation gave val_nll" in line.get("note", "")] == odd
    assert [line["val_nll"] for line in lines if "val_nll" in line] == [v for v in values if math.isfinite(v)]
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_an_older_checkpoint_with_nan_is_not_the_best(tmp_path):
    for step, loss in enumerate([math.nan, 3.0, math.nan, 2.0, -math.inf], start=1):
        checkpoint.save(tmp_path, step, {"x": 1}, keep=1, metrics={"val_nll": loss}, keep_best=True)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 5]


def scaled_update(scale: float, **changes) -> SequenceUpdate:
    """A step with loss scaling on the CPU, whose gradients overflow whatever the scale."""
    update = SequenceUpdate(ToyModel(), toy_batches(), toy_config(**changes))
    update.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    update.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    return update


@pytest.mark.parametrize("scale", [2.0**16, 2.0**4, 1.0, 2.0**-7, 2.0**-8])
def test_loss_scaling_does_not_skip_for_ever(tmp_path, scale):
    update = scaled_update(scale)
    before = [p.detach().clone() for p in update.parameters]
    with pytest.raises(DigitError, match=r"step \d+ gave .*grad_norm (nan|inf), loss_scale \S+$"):
        for step in range(60):
            update(step)
    assert 24 - 10 <= step + math.log2(2.0**16 / scale) <= 24 + 10
    assert all(torch.equal(a, b) for a, b in zip(update.parameters, before, strict=True))


@pytest.mark.parametrize("allowed", [1, 3])
def test_loss_scaling_skips_no_more_than_max_skipped(tmp_path, caplog, allowed):
    update = scaled_update(2.0**16, max_skipped=allowed)
    with pytest.raises(DigitError, match=f"step {allowed + 1} gave"):
        for step in range(60):
            update(step)
    assert len(caplog.records) == allowed and update.scaler.get_scale() == 2.0 ** (16 - allowed)
