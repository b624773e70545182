"""A run that meets NaN or Inf stops, names the batch and writes a crash dump; losses that jump are logged."""

import json
import math

import pytest
import torch
from toy_task import ToyModel, toy_batches, toy_config

from digit.errors import DigitError
from digit.runtime.files import load_tensors
from digit.training import checkpoint
from digit.training.faults import SpikeDetector
from digit.training.log import read_log
from digit.training.sequence import train_sequence_model

BAD = 6  # the step, counted from 1


class Poisoned:
    """Batches of the toy task; at one step the model's embedding is poisoned, as a flipped bit would do it."""

    def __init__(self, model: ToyModel, bad_steps=(BAD,), value: float = math.nan):
        self.model, self.bad, self.value, self.read = model, {step - 1 for step in bad_steps}, value, toy_batches()
        self.own = model.norm.bias.detach().clone()

    def __call__(self, step):
        with torch.no_grad():
            if step in self.bad:
                self.own.copy_(self.model.norm.bias)
                self.model.norm.bias.fill_(self.value)
            elif step - 1 in self.bad:
                self.model.norm.bias.copy_(self.own)
        return self.read(step)

    def rows(self, step):
        return torch.arange(8).numpy() + 100 * step


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_stops_and_says_where_to_look(tmp_path, value):
    model = ToyModel()
    with pytest.raises(DigitError) as raised:
        train_sequence_model(model, Poisoned(model, value=value), toy_config(num_steps=10, log_every=5), tmp_path)
    text, crash = str(raised.value), tmp_path / "crash" / "step_00000006"
    assert text.startswith("step 6 gave ") and "grad_norm nan" in text and "\n" not in text
    assert "batch rows 500, 501" in text and "lower learning_rate" in text
    assert f"the last good checkpoint is {tmp_path}/checkpoints/step_00000004" in text and str(crash) in text
    report = json.loads((crash / "report.json").read_text())
    assert report["step"] == 6 and report["rows"] == list(range(500, 508)) and report["settings"]["train"]["seed"] == 0
    batch = load_tensors(crash / "batch.safetensors")
    assert torch.equal(batch["target"], toy_batches()(5)["target"])
    (state,) = (crash / "state").iterdir()
    saved = checkpoint.load(state, {})["model"]
    assert torch.equal(saved["head.weight"], model.head.weight)  # as before the step: nothing has moved


def test_the_dump_repeats_the_failure(tmp_path):
    """State and batch of the dump give the same loss again, in one step."""
    model = ToyModel()
    with pytest.raises(DigitError):
        train_sequence_model(model, Poisoned(model), toy_config(num_steps=10), tmp_path)
    crash = tmp_path / "crash" / "step_00000006"
    again = ToyModel()
    (state,) = (crash / "state").iterdir()
    again.load_state_dict(checkpoint.load(state, {})["model"])
    batch = load_tensors(crash / "batch.safetensors")
    assert again.loss(batch["target"], labels=batch["labels"])[0].isnan()


def test_some_steps_may_be_skipped(tmp_path, caplog):
    caplog.set_level("WARNING")
    model = ToyModel()
    cfg = toy_config(num_steps=12, max_skipped=2, log_every=1)
    _, metrics = train_sequence_model(model, Poisoned(model, (3, 6)), cfg, tmp_path)
    assert math.isfinite(metrics["loss"]) and metrics["step"] == 12
    skipped = {line["step"]: line["skipped"] for line in read_log(tmp_path / "log.jsonl")}
    assert skipped == {step: float(step in (3, 6)) for step in range(1, 13)}
    assert [r.getMessage() for r in caplog.records] == [
        "step 3 gave a loss or gradient that is not finite: skipped, 1 of at most 2",
        "step 6 gave a loss or gradient that is not finite: skipped, 2 of at most 2",
    ]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_not_more_than_that(tmp_path):
    """The count goes over an interruption: it is part of the checkpoint."""
    model = ToyModel()
    train_sequence_model(model, Poisoned(model, (3,)), toy_config(num_steps=5, max_skipped=1), tmp_path)
    model = ToyModel()
    with pytest.raises(DigitError, match="step 7 gave"):
        train_sequence_model(model, Poisoned(model, (3, 7)), toy_config(num_steps=10, max_skipped=1), tmp_path)


def test_a_full_disk_does_not_hide_what_happened(tmp_path):
    (tmp_path / "crash").write_text("in the way")
    model = ToyModel()
    with pytest.raises(DigitError, match=r"step 6 gave .* no dump could be written \(cannot write"):
        train_sequence_model(model, Poisoned(model), toy_config(num_steps=10), tmp_path)


def test_a_spike_is_told_from_noise():
    spikes = SpikeDetector()
    generator = torch.Generator().manual_seed(0)
    noise = (3 + 0.05 * torch.randn(100, generator=generator)).tolist()
    assert [spikes.check(loss) for loss in noise] == [None] * 100
    assert "loss 6.2 jumped above the usual 2.998" in spikes.check(6.2)
    assert spikes.check(2.0) is None  # down is fine
    falling = SpikeDetector()
    assert not any(falling.check(9 * 0.97**n) for n in range(200))
    assert SpikeDetector([1.0] * 5).check(50.0) is None  # too early to tell


def test_a_spike_is_logged_once(tmp_path, caplog):
    from training.test_training import Counter, run

    caplog.set_level("WARNING")
    metrics = lambda step: {"loss": 9.0 if step == 30 else 1.0}  # noqa: E731
    run(Counter(metrics), tmp_path, num_steps=40, log_every=1, save_every=35)
    run(Counter(metrics), tmp_path, num_steps=45, log_every=1)
    notes = [line for line in read_log(tmp_path / "log.jsonl") if "note" in line]
    assert [(line["step"], line["note"]) for line in notes] == [
        (31, "loss 9 jumped above the usual 1: a lower learning_rate is safer")
    ]
    assert len(caplog.records) == 1
