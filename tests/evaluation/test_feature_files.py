"""Features in files: the rows that were written, read in any order, whole or not at all, and made once."""

import os
from functools import partial

import numpy as np
import pytest
import torch

from digit.errors import DigitError
from digit.evaluation.feature_files import COMMIT, FeatureCache, FeatureFiles, discard, identity
from digit.metrics.feature_rows import FeatureRows, HeldRows, as_rows, batches, near

SIZES = {"prior": (3, 4), "encoder": (1, 5)}


def features(num=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(num, *size, generator=generator).half().float() for name, size in SIZES.items()}


def cache(folder, budget=0, **request):
    return FeatureCache(folder, partial(dict, **request), budget)


def parts(num=100, size=7, log=None):
    made = features(num) | {"labels": torch.arange(num)}
    for start in range(0, num, size):
        if log is not None:
            log.append(start)
        yield {name: rows[start : start + size] for name, rows in made.items()}


def test_rows_come_back_in_any_order_as_float16(tmp_path):
    found, made = cache(tmp_path).collect(parts, SIZES, 100), features()
    assert torch.equal(found["labels"], torch.arange(100))
    for name in SIZES:
        rows = found[name]
        assert isinstance(rows, FeatureRows) and rows.shape == tuple(made[name].shape)
        for wanted in (torch.randperm(100), torch.arange(20, 90), torch.tensor([5, 5, 6, 99, 0]), torch.arange(0)):
            taken = rows.take(wanted)
            assert taken.dtype == torch.float16 and torch.equal(taken.float(), made[name][wanted])
        with pytest.raises(IndexError):
            rows.take(torch.tensor([100]))


def test_few_features_stay_in_memory_in_full_precision(tmp_path):
    found = cache(tmp_path / "f", budget=4 * 100 * 17).collect(parts, SIZES, 100)
    assert torch.equal(found["prior"], features()["prior"]) and not (tmp_path / "f").exists()
    assert isinstance(cache(tmp_path / "f", budget=4 * 100 * 17 - 1).collect(parts, SIZES, 100)["prior"], FeatureFiles)


def test_whole_files_of_the_same_request_are_not_made_again(tmp_path):
    log = []
    again = partial(cache(tmp_path, seed=1).collect, partial(parts, log=log), SIZES, 100)
    again()
    num = len(log)
    assert torch.equal(again()["prior"].take(torch.arange(100)).float(), features()["prior"]) and len(log) == num
    cache(tmp_path, seed=2).collect(partial(parts, log=log), SIZES, 100)
    assert len(log) == 2 * num, "another request"
    os.truncate(tmp_path / "prior.0.rows", 50)
    cache(tmp_path, seed=2).collect(partial(parts, log=log), SIZES, 100)
    assert len(log) == 3 * num, "a damaged file"
    discard(tmp_path)
    assert not tmp_path.exists()


def test_files_that_are_made_again_are_other_features(tmp_path):
    """A GPU may give other last bits: what was trained on the old files must not go on with the new ones."""
    made = cache(tmp_path).collect(parts, SIZES, 100)["prior"]
    assert identity(made) == identity(cache(tmp_path).collect(parts, SIZES, 100)["prior"]) != ""
    discard(tmp_path)
    assert identity(made) != identity(again := cache(tmp_path).collect(parts, SIZES, 100)["prior"])
    whole = features()["prior"]
    assert identity(whole) == identity(HeldRows(whole.clone())) not in (identity(again), identity(whole + 1))


def test_a_run_that_was_cut_short_leaves_nothing_that_counts(tmp_path):
    def broken():
        yield from parts(num=10)
        raise DigitError("stopped")

    with pytest.raises(DigitError, match="stopped"):
        cache(tmp_path).collect(broken, SIZES, 100)
    assert not (tmp_path / COMMIT).exists() and not list(tmp_path.glob("*.rows"))
    (tmp_path / ".prior.0.rows.abcdefgh.aside.rows").write_bytes(b"left by a killed run")
    cache(tmp_path).collect(parts, SIZES, 100)
    assert not list(tmp_path.glob(".*aside*"))


def test_what_float16_cannot_hold_and_a_full_disk_are_told(tmp_path, monkeypatch):
    for value, shown in ((1e6, "1e.06"), (float("nan"), "nan")):
        bad = [{"prior": torch.full((2, 3, 4), value), "labels": torch.arange(2)}]
        with pytest.raises(DigitError, match=f"prior features hold {shown}"):
            cache(tmp_path).collect(lambda bad=bad: iter(bad), {"prior": (3, 4)}, 2)
    with pytest.raises(DigitError, match="disk full: the probe's features"):
        cache(tmp_path).collect(parts, SIZES, 10**15)


def test_several_files_read_as_one(tmp_path):
    made = torch.arange(60, dtype=torch.float16).view(10, 3, 2)
    paths, counts = [tmp_path / f"p.{n}.rows" for n in range(3)], [4, 1, 5]
    for path, part in zip(paths, made.split(counts), strict=True):
        path.write_bytes(part.numpy().tobytes())
    rows = FeatureFiles(paths, counts, 3, 2)
    for wanted in (np.arange(10), np.array([9, 3, 4, 5, 0]), np.array([3, 4])):
        assert torch.equal(rows.take(torch.from_numpy(wanted)), made[wanted])
    rows.close()
    with pytest.raises(DigitError, match="holds"):
        FeatureFiles(paths, [4, 2, 4], 3, 2)


def test_batches_are_read_ahead_in_order_and_errors_come_through(tmp_path):
    rows = cache(tmp_path).collect(parts, SIZES, 100)["prior"]
    order = torch.randperm(100)
    found = list(batches(rows, order.split(9), torch.device("cpu")))
    assert torch.equal(torch.cat([numbers for numbers, _ in found]), order)
    assert torch.equal(torch.cat([part for _, part in found]), rows.take(order))
    with pytest.raises(IndexError):
        list(batches(rows, [torch.arange(3), torch.tensor([1000])], torch.device("cpu")))


def test_features_move_to_a_device_with_room_for_them(tmp_path):
    rows = cache(tmp_path).collect(parts, SIZES, 100)["prior"]
    size = 100 * 3 * 4 * 2
    held = near(rows, torch.device("cpu"), free=2 * size)
    assert isinstance(held, HeldRows) and torch.equal(held.tensor, rows.take(torch.arange(100)))
    assert near(rows, torch.device("cpu"), free=size) is rows and near(rows, torch.device("cpu")) is rows
    tensor = as_rows(torch.zeros(2, 1, 1))
    assert near(tensor, torch.device("cpu"), free=10) is tensor
