"""The order of images and crops: permutations that need no memory, and numbers that hold at a billion rows."""

import numpy as np
import pytest

from digit.data import epochs
from digit.data.epochs import AllBut, EpochOrder, crop_numbers, permuted


@pytest.mark.parametrize("num", [1, 2, 3, 17, 1000, 4097])
def test_a_network_permutes(num):
    places = np.arange(num)
    first, second = permuted(places, num, [1, 0]), permuted(places, num, [1, 1])
    assert np.array_equal(np.sort(first), places) and np.array_equal(np.sort(second), places)
    assert num < 10 or (not np.array_equal(first, second) and not np.array_equal(first, places))


def test_large_orders_are_permutations_too(monkeypatch):
    monkeypatch.setattr(epochs, "MAX_PERMUTED", 10)
    order = EpochOrder(1000, seed=5)
    numbers, of_epoch = order.take(500, 2000)
    assert np.array_equal(np.bincount(of_epoch), [500, 1000, 500])
    assert np.array_equal(np.sort(numbers[500:1500]), np.arange(1000))
    assert np.array_equal(EpochOrder(1000, seed=5).take(1234, 5)[0], numbers[734:739])
    neighbours = np.abs(np.diff(numbers[500:1500]))
    assert 250 < neighbours.mean() < 420  # a random order: a third of 1000


@pytest.mark.parametrize(("num", "crops"), [(1_281_167, 100), (1_000_000_000, 1), (10_000_000, 100)])
def test_numbers_hold_at_a_billion_rows(num, crops):
    images, order = AllBut(num, 20), EpochOrder(len(AllBut(num, 20)), seed=2**64 - 1)
    places, of_epoch = order.take(150_000 * 2048, 2048)
    rows = images[places] * crops + crop_numbers(images[places], of_epoch, crops, 2**64 - 1)
    assert rows.dtype == np.int64 and sum(map(len, order._made.values())) < epochs.MAX_PERMUTED  # 128 MiB
    assert rows.min() >= 0 and num * crops * 0.9 < rows.max() < num * crops
    assert (images[places] % 20 != 0).all()


def test_all_but_is_what_a_mask_gives():
    for total, every in ((1, 0), (10, 0), (10, 2), (11, 2), (23, 5), (2, 2)):
        mask = np.arange(total) % every != 0 if every else np.ones(total, dtype=bool)
        numbers = AllBut(total, every)
        assert np.array_equal(numbers[np.arange(len(numbers))], np.flatnonzero(mask))


def test_crops_take_turns_from_a_start_of_each_image():
    images = np.arange(1000)
    first = crop_numbers(images, np.zeros_like(images), 8, 0)
    assert np.bincount(first, minlength=8).min() > 80  # 125 of each expected
    turns = np.stack([crop_numbers(images, np.full_like(images, epoch), 8, 0) for epoch in range(3, 11)])
    assert np.array_equal(np.sort(turns, axis=0), np.tile(np.arange(8)[:, None], 1000))
    assert not np.array_equal(first, crop_numbers(images, np.zeros_like(images), 8, 1))
    assert not crop_numbers(images, images, 1, 0).any()
