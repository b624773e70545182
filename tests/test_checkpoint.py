"""Checkpoints: whole or not there, damaged ones passed over, other runs refused."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from digit.errors import DigitError, MismatchError
from digit.training import checkpoint
from digit.training.loop import TrainState
from toy_task import run_toy, toy_config


def content(step: int) -> dict:
    return {"step": step, "objects": {"weights": torch.arange(1000.0) + step, "nested": [1, 2.5, "text", {"a": None}]}}


def steps(folder: Path) -> list[int]:
    return [step for step, _ in checkpoint.list_checkpoints(folder)]


def test_round_trip_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, content(step), keep=2)
    assert steps(tmp_path) == [3, 10]
    path, loaded = checkpoint.newest(tmp_path)
    assert path.name == "step_00000010.pt"
    assert torch.equal(loaded["objects"].pop("weights"), torch.arange(1000.0) + 10)
    assert loaded["objects"]["nested"] == content(10)["objects"]["nested"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003.pt", "step_00000010.pt"]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.find(torch.arange(1000.0)[500:510].add(2).numpy().tobytes())] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [tear, flip_a_bit, empty])
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path, caplog, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, content(step), keep=2)
    damage(tmp_path / "step_00000002.pt")
    assert checkpoint.newest(tmp_path)[1]["step"] == 1
    assert len(caplog.records) == 1
    assert "step_00000002.pt is damaged" in caplog.text
    checkpoint.save(tmp_path, 1, content(1), keep=1)  # the damaged one does not push out the good one
    assert steps(tmp_path) == [1]


def test_no_damage_passes_for_a_checkpoint(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"weights": torch.arange(20.0)}, keep=1)
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for at in torch.randint(len(whole), (300,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        for damaged in (whole[:at], bytes(flipped)):
            path.write_bytes(damaged)
            try:
                loaded = checkpoint.load(path)  # padding and unread header fields may change
            except checkpoint.DamagedError:
                continue
            assert torch.equal(loaded["weights"], torch.arange(20.0))


def test_an_unreadable_folder_is_no_damage(tmp_path):
    (tmp_path / "step_00000001.pt").mkdir()
    with pytest.raises(DigitError, match="cannot read checkpoint") as raised:
        checkpoint.newest(tmp_path)
    assert not isinstance(raised.value, checkpoint.DamagedError)


def test_nothing_but_damage_is_an_error(tmp_path):
    checkpoint.save(tmp_path, 1, content(1), keep=2)
    tear(tmp_path / "step_00000001.pt")
    with pytest.raises(DigitError, match=r"no checkpoint in .* can be read"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"step": 1, "objects": Hostile()}, tmp_path / "step_00000001.pt")
    with pytest.raises(DigitError, match="damaged"):
        checkpoint.load(tmp_path / "step_00000001.pt")
    (tmp_path / "step_00000002.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DigitError, match="damaged"):
        checkpoint.load(tmp_path / "step_00000002.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path, monkeypatch, size):
    checkpoint.save(tmp_path, 1, content(1), keep=2)
    monkeypatch.setattr(checkpoint, "open", lambda path, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
    with pytest.raises(DigitError, match=r"disk full while writing .*step_00000002.pt"):
        checkpoint.save(tmp_path, 2, {"weights": torch.zeros(size)}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001.pt"]
    assert checkpoint.newest(tmp_path)[1]["step"] == 1


def test_another_config_names_both_values(tmp_path):
    run_toy(tmp_path, num_steps=2)
    with pytest.raises(MismatchError, match=r"learning_rate was 0\.01 .* is 0\.02 now"):
        run_toy(tmp_path, num_steps=4, learning_rate=0.02)
    with pytest.raises(MismatchError, match="past num_steps 1"):
        run_toy(tmp_path, num_steps=1)
    run_toy(tmp_path, num_steps=4, log_every=1, save_every=1, keep_checkpoints=3, accumulate=2)
    assert steps(tmp_path / "checkpoints") == [2, 3, 4]
    assert checkpoint.read_json(tmp_path / "checkpoints" / "config.json")["train"]["num_steps"] == 4


def test_a_cosine_run_cannot_be_lengthened(tmp_path):
    run_toy(tmp_path, num_steps=2, schedule="cosine")
    with pytest.raises(MismatchError, match=r"num_steps was 2 .* is 4 now"):
        run_toy(tmp_path, num_steps=4, schedule="cosine")


def test_what_the_run_is_about_is_compared(tmp_path):
    checkpoint.save_config(tmp_path, toy_config(), {"codebook": "aa", "sizes": (1, 2)})
    checkpoint.check_config(tmp_path, toy_config(), {"codebook": "aa", "sizes": (1, 2)})
    with pytest.raises(MismatchError, match=r"codebook was 'aa' .* is 'bb' now"):
        checkpoint.check_config(tmp_path, toy_config(), {"codebook": "bb", "sizes": (1, 2)})


def test_other_objects_or_shapes_are_refused(tmp_path):
    TrainState(1, {"model": nn.Linear(2, 2)}).save(tmp_path, keep=1)
    saved = checkpoint.newest(tmp_path)
    with pytest.raises(MismatchError, match="holds model, this run has ema, model"):
        TrainState(0, {"model": nn.Linear(2, 2), "ema": nn.Linear(2, 2)}).load(*saved)
    with pytest.raises(MismatchError, match=r"the model in .* is another one"):
        TrainState(0, {"model": nn.Linear(3, 2)}).load(*saved)
