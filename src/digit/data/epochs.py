"""Which image comes when in endless training, and which of its crops: pure functions of seed and position.

An epoch is one pass over the images, in an order of its own. Nothing here grows with the number of crops.
"""

import numpy as np

MAX_PERMUTED = 2**24  # images whose whole permutation is made in RAM, 8 bytes each, in a second or two
ROUNDS = 6  # of the Feistel network
MASK_64 = 2**64 - 1


class AllBut:
    """The numbers 0 .. total - 1 without 0, every, 2 every, ...: an array that takes no memory. `every` is at least 2;
    0 leaves nothing out."""

    def __init__(self, total: int, every: int = 0):
        self.total, self.every = total, every

    def __len__(self) -> int:
        return self.total - (-(-self.total // self.every) if self.every else 0)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """(n,) int64 places, 0 .. len - 1, to (n,) int64 numbers."""
        return places + places // (self.every - 1) + 1 if self.every else places


class EpochOrder:
    """An endless sequence of permutations of 0 .. num - 1; epoch e's depends on (seed, e) alone."""

    def __init__(self, num: int, seed: int):
        self.num, self.seed = num, seed & MASK_64
        self._made: dict[int, np.ndarray] = {}

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Entries start .. start + count - 1 of the sequence: (numbers (count,), their epochs (count,)), int64."""
        parts, epochs = [], []
        while count > 0:
            epoch, place = divmod(start, self.num)
            size = min(count, self.num - place)
            parts.append(self._part(epoch, place, size))
            epochs.append(np.full(size, epoch, dtype=np.int64))
            start, count = start + size, count - size
        return np.concatenate(parts), np.concatenate(epochs)

    def _part(self, epoch: int, place: int, size: int) -> np.ndarray:
        if self.num > MAX_PERMUTED:
            return permuted(np.arange(place, place + size, dtype=np.int64), self.num, [self.seed, epoch])
        if epoch not in self._made:
            kept = {old: order for old, order in self._made.items() if abs(old - epoch) == 1}
            self._made = kept | {epoch: np.random.default_rng([self.seed, epoch]).permutation(self.num)}
        return self._made[epoch][place : place + size]


def crop_numbers(images: np.ndarray, epochs: np.ndarray, num_crops: int, seed: int) -> np.ndarray:
    """Which of its `num_crops` crops each image gives in its epoch, (n,) int64.

    The crops take turns, beginning with one that depends on (seed, image): any `num_crops` epochs in a row use each
    crop of each image once.
    """
    if num_crops == 1:
        return np.zeros_like(images)
    key = mixed(np.array([seed & MASK_64], dtype=np.uint64))
    first = mixed(images.astype(np.uint64) ^ key) % np.uint64(num_crops)
    return (first.astype(np.int64) + epochs) % num_crops


def mixed(values: np.ndarray) -> np.ndarray:
    """(n,) uint64 to uint64: a bijection that looks random, SplitMix64's finaliser (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permuted(places: np.ndarray, num: int, key: list[int]) -> np.ndarray:
    """Where a permutation of 0 .. num - 1 sends `places`, (n,) int64, without making the whole of it.

    A Feistel network on 2 h bits, 2^(2h) >= num; what falls outside goes through it again (Black and Rogaway 2002).
    """
    half = np.uint64(max(1, ((num - 1).bit_length() + 1) // 2))
    mask, keys = (np.uint64(1) << half) - np.uint64(1), np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def once(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for round_key in keys:
            left, right = right, left ^ (mixed(right ^ round_key) & mask)
        return (left << half) | right

    values = once(places.astype(np.uint64))
    while (outside := values >= num).any():
        values[outside] = once(values[outside])
    return values.astype(np.int64)
