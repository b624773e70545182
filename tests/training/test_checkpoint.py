"""Checkpoints: atomic, damaged ones skipped, those of other runs refused."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_task import run_toy, toy_config

from digit.errors import DigitError, MismatchError
from digit.training import checkpoint, config
from digit.training.log import read_log
from digit.training.loop import TrainState


def content(step: int) -> dict:
    return {"weights": torch.arange(1000.0) + step, "nested": [1, 2.5, "text", {"a": None}, (3, {4: torch.ones(2)})]}


def steps(folder: Path) -> list[int]:
    return [step for step, _ in checkpoint.list_checkpoints(folder)]


def test_round_trip_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, content(step), keep=2)
    assert steps(tmp_path) == [3, 10]
    path = checkpoint.newest(tmp_path)
    assert path.name == "step_00000010"
    loaded = checkpoint.load(path, {})
    assert torch.equal(loaded.pop("weights"), torch.arange(1000.0) + 10)
    *plain, (three, last) = loaded["nested"]
    assert plain == [1, 2.5, "text", {"a": None}] and three == 3
    assert torch.equal(last[4], torch.ones(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000010"]


def test_the_tensors_of_the_template_are_filled(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"model": {"weight": torch.arange(6.0).view(2, 3)}}, keep=1)
    weight = torch.zeros(2, 3)
    loaded = checkpoint.load(path, {"model": {"weight": weight}})
    assert loaded["model"]["weight"].data_ptr() == weight.data_ptr()
    assert weight.flatten().tolist() == list(range(6))
    with pytest.raises(MismatchError, match=r"model/weight in .* has shape \(2, 3\), this run has \(3, 2\)"):
        checkpoint.load(path, {"model": {"weight": torch.zeros(3, 2)}})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0, 4),
        torch.tensor(7),
        torch.tensor([True, False]),
        torch.ones(2, dtype=torch.bfloat16),
        torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        torch.arange(6).view(2, 3).T,
    ],
    ids=str,
)
def test_every_kind_of_tensor_comes_back(tmp_path, tensor):
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, {"x": tensor}, keep=1), {})["x"]
    assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor)


def test_the_best_is_kept_too(tmp_path):
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 4.0], start=1):
        metrics = {"val_nll": loss} if step != 4 else {}
        checkpoint.save(tmp_path, step, content(step), keep=2, metrics=metrics, keep_best=True)
    assert steps(tmp_path) == [2, 4, 5]
    assert checkpoint.best(tmp_path) == (tmp_path / "step_00000002", 1.0)


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [tear, flip_a_bit, empty, Path.unlink])
@pytest.mark.parametrize("which", range(3))
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path, caplog, damage, which):
    caplog.set_level("WARNING")
    for step in (1, 2):
        checkpoint.save(tmp_path, step, content(step), keep=2)
    damage(files(tmp_path / "step_00000002")[which])
    assert checkpoint.newest(tmp_path).name == "step_00000001"
    assert len(caplog.records) == 1
    assert "step_00000002 is damaged" in caplog.text
    checkpoint.save(tmp_path, 1, content(1), keep=1)  # the damaged one does not push out the good one
    assert steps(tmp_path) == [1]


def test_a_damaged_one_is_written_again(tmp_path):
    checkpoint.save(tmp_path, 1, content(1), keep=1)
    empty(files(tmp_path / "step_00000001")[0])
    checkpoint.save(tmp_path, 1, content(1), keep=1)
    assert checkpoint.newest(tmp_path).name == "step_00000001"
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_no_damage_passes_for_a_checkpoint(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"weights": torch.arange(20.0)}, keep=1)
    generator = torch.Generator().manual_seed(0)
    for file in files(path):
        whole = file.read_bytes()
        for at in torch.randint(len(whole) - 2, (100,), generator=generator).tolist():
            flipped = bytearray(whole)
            flipped[at] ^= 1 << at % 8
            for damaged in (whole[:at], bytes(flipped)):
                file.write_bytes(damaged)
                with pytest.raises(checkpoint.DamagedError):
                    checkpoint.verify(path)
        file.write_bytes(whole)
    checkpoint.verify(path)


def test_an_unreadable_file_is_no_damage(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, content(1), keep=2)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "sha256_file", refuse)
    with pytest.raises(DigitError, match="cannot read checkpoint") as raised:
        checkpoint.newest(tmp_path)
    assert not isinstance(raised.value, checkpoint.DamagedError)


def test_nothing_but_damage_is_an_error(tmp_path):
    checkpoint.save(tmp_path, 1, content(1), keep=2)
    tear(files(tmp_path / "step_00000001")[0])
    with pytest.raises(DigitError, match=r"no checkpoint in .* can be read"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_holds_no_code(tmp_path):
    path = checkpoint.save(tmp_path, 1, content(1), keep=1)
    assert {p.suffix for p in files(path)} == {".safetensors", ".json"}
    with pytest.raises(AssertionError, match="nested/0 is Path|nested/0 is Posix"):
        checkpoint.save(tmp_path, 2, {"nested": [Path("x")]}, keep=1)


def test_checkpoints_of_an_older_version_are_named(tmp_path):
    (tmp_path / "step_00000001.pt").touch()
    with pytest.raises(DigitError, match=r"step_00000001.pt was written by an older version"):
        checkpoint.newest(tmp_path)


def test_too_little_room_is_known_before_anything_is_written(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, content(1), keep=2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    with pytest.raises(DigitError, match=r"disk full: a checkpoint takes 3\.8 MiB and .* has 2\.9 MiB free: free some"):
        checkpoint.save(tmp_path, 2, {"weights": torch.zeros(1_000_000)}, keep=2)
    assert checkpoint.newest(tmp_path).name == "step_00000001"


def test_a_disk_that_fills_up_meanwhile_is_one_line(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, content(1), keep=2)
    monkeypatch.setattr(os, "fsync", lambda handle: fail(errno.ENOSPC))
    with pytest.raises(DigitError, match=r"disk full while writing .*step_00000002"):
        checkpoint.save(tmp_path, 2, content(2), keep=2)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).name == "step_00000001"
    checkpoint.save(tmp_path, 2, content(2), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]  # nothing left behind


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_another_config_names_both_values(tmp_path):
    run_toy(tmp_path, num_steps=2)
    with pytest.raises(MismatchError, match=r"train.learning_rate = 0\.01, now asked for 0\.02"):
        run_toy(tmp_path, num_steps=4, learning_rate=0.02)
    with pytest.raises(MismatchError, match="past num_steps 1"):
        run_toy(tmp_path, num_steps=1)
    run_toy(tmp_path, num_steps=4, log_every=1, save_every=1, keep_checkpoints=3, accumulate=2)
    assert steps(tmp_path / "checkpoints") == [2, 3, 4]
    assert checkpoint.read_json(tmp_path / "checkpoints" / "config.json")["train"]["num_steps"] == 4


def test_a_cosine_run_cannot_be_lengthened(tmp_path):
    run_toy(tmp_path, num_steps=2, schedule="cosine")
    with pytest.raises(MismatchError, match=r"train.num_steps = 2, now asked for 4"):
        run_toy(tmp_path, num_steps=4, schedule="cosine")


def test_what_the_run_is_about_is_compared(tmp_path):
    config.save_config(tmp_path, toy_config(), {"codebook": "aa", "sizes": (1, 2)})
    config.check_config(tmp_path, toy_config(), {"codebook": "aa", "sizes": (1, 2)})
    with pytest.raises(MismatchError, match=r"about.codebook = aa, now asked for bb"):
        config.check_config(tmp_path, toy_config(), {"codebook": "bb", "sizes": (1, 2)})


def test_other_objects_or_shapes_are_refused(tmp_path):
    path = TrainState(1, {"model": nn.Linear(2, 2)}).save(tmp_path, keep=1)
    with pytest.raises(MismatchError, match="holds model, this run has ema, model"):
        TrainState(0, {"model": nn.Linear(2, 2), "ema": nn.Linear(2, 2)}).load(path)
    with pytest.raises(MismatchError, match=r"model/weight in .* has shape \(2, 2\), this run has \(2, 3\)"):
        TrainState(0, {"model": nn.Linear(3, 2)}).load(path)
    with pytest.raises(MismatchError, match=r"the model in .* does not fit this run"):
        TrainState(0, {"model": nn.Linear(2, 2, bias=False)}).load(path)


# ---- a checkpoint from a stranger, its hashes in order


def forge(path: Path, state: object = None, **manifest) -> None:
    """Write what a stranger likes into a checkpoint and make the hashes fit."""
    if state is not None:
        (path / checkpoint.STATE).write_text(json.dumps(state))
    known = checkpoint.read_manifest(path)
    for name in known["files"]:
        known["files"][name]["sha256"] = checkpoint.sha256_file(path / name)
    known |= manifest
    (path / checkpoint.MANIFEST).write_text(json.dumps(known | {"digest": checkpoint._digest(known)}))


TENSOR = {"$tensor": "model/weight"}


@pytest.mark.parametrize(
    "state",
    [
        3,
        [],
        {"model": {"weight": {"$tensor": "elsewhere"}}},
        {"model": {"weight": {"$tensor": [1]}}},
        {"model": {"$pairs": 3}},
        {"model": 3, "optimizer": 4},
        {"model": {"weight": TENSOR, "bias": TENSOR}, "optimizer": {"state": {"$pairs": [[99, 1]]}, "param_groups": 3}},
    ],
    ids=str,
)
def test_a_strange_state_is_one_line(tmp_path, state):
    linear = nn.Linear(2, 2)
    objects = {"model": linear, "optimizer": torch.optim.AdamW(linear.parameters())}
    path = TrainState(1, objects).save(tmp_path, keep=1)
    forge(path, state)
    with pytest.raises(DigitError):
        TrainState(0, objects).load(checkpoint.newest(tmp_path))


@pytest.mark.parametrize(
    "manifest", [{"step": "4"}, {"step": -4}, {"files": []}, {"files": {}}, {"metrics": {"val": "x"}}], ids=str
)
def test_a_strange_manifest_is_damage(tmp_path, manifest):
    path = checkpoint.save(tmp_path, 1, content(1), keep=1)
    forge(path, **manifest)
    with pytest.raises(checkpoint.DamagedError, match="manifest.json is malformed"):
        checkpoint.verify(path)


def test_files_that_the_manifest_does_not_name_are_not_read(tmp_path):
    path = checkpoint.save(tmp_path, 1, content(1), keep=1)
    (shard,) = path.glob("*.safetensors")
    shutil.copy(shard, path / "other.safetensors")
    with pytest.raises(checkpoint.DamagedError, match=r"other.safetensors is not in manifest.json"):
        checkpoint.verify(path)


def test_a_best_one_past_the_step_is_not_kept(tmp_path):
    for step, loss in ((2, 2.0), (4, 1.0)):
        checkpoint.save(tmp_path, step, content(step), keep=2, metrics={"val_nll": loss}, keep_best=True)
    checkpoint.save(tmp_path, 3, content(3), keep=2, keep_best=True)  # it fell back from step 4
    assert steps(tmp_path) == [2, 3]


def test_what_a_kill_left_does_not_take_the_room(tmp_path, monkeypatch):
    left = tmp_path / ".step_00000001.partial"
    left.mkdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0 if left.exists() else 10**9))
    checkpoint.save(tmp_path, 2, content(2), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]


def test_another_log_is_no_trouble(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'3\n{"loss": 1}\n{"step": "a"}\n{"step": 2, "loss": 1.5}\n\xff\xfe\n[[[[')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 2, "loss": 1.5}]
