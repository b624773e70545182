"""The reservoir of k-means: the rows with the smallest keys, in the slots where one exchange a batch puts them."""

import time

import numpy as np
import pytest
import torch

from digit.tokenizers.kmeans import reservoir
from digit.tokenizers.kmeans.reservoir import Reservoir


def one_exchange_a_batch(capacity, batches):
    """Slot by slot: rows fill up; then those that leave, in the order of slots, give way to those that come."""
    kept = []  # (key, row)
    for part, keys in batches:
        new = list(zip(keys.tolist(), part[:, 0].tolist(), strict=True))
        room = capacity - len(kept)
        kept, new = kept + new[:room], new[room:]
        smallest = set(sorted(kept + new)[:capacity])
        come = iter(pair for pair in new if pair in smallest)
        kept = [pair if pair in smallest else next(come) for pair in kept]
    return [key for key, _ in kept], [row for _, row in kept]


@pytest.mark.parametrize(
    ("capacity", "size", "largest"), [(50, 7, 4), (50, 120, 8), (64, 64, 1), (10, 1, 3), (300, 9, 2**16)]
)
def test_it_holds_the_smallest_keys_where_a_plain_exchange_puts_them(monkeypatch, capacity, size, largest):
    monkeypatch.setattr(reservoir, "LARGEST", largest)
    rng, kept, batches = np.random.default_rng(0), Reservoir(capacity, 2, like=torch.zeros(1)), []
    for start in range(0, 900, size):
        part = torch.arange(start, start + size, dtype=torch.float32)[:, None].expand(-1, 2)
        batches.append((part, rng.random(size)))
        kept.offer(*batches[-1])
    keys, rows = one_exchange_a_batch(capacity, batches)
    assert kept.keys.tolist() == keys and kept.rows[:, 0].tolist() == rows == kept.rows[:, 1].tolist()


def test_fewer_rows_than_its_capacity_are_all_kept():
    kept = Reservoir(10, 1, like=torch.zeros(1))
    kept.offer(torch.tensor([[3.0], [4.0]]), np.array([0.9, 0.1]))
    assert kept.rows.tolist() == [[3.0], [4.0]] and kept.keys.tolist() == [0.9, 0.1]


def test_a_batch_costs_no_pass_over_the_sample():
    """At the paper's count a batch took seconds; 100 batches against 2.1 M keys now take about one."""
    kept, rng = Reservoir(8192 * 256, 1, like=torch.zeros(1)), np.random.default_rng(0)
    kept.offer(torch.zeros(8192 * 256, 1), rng.random(8192 * 256))
    part, began = torch.zeros(16384, 1), time.perf_counter()
    for _ in range(100):
        kept.offer(part, rng.random(16384))
    assert time.perf_counter() - began < 20
