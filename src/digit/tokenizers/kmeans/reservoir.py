"""The rows of a stream with the smallest random keys: a uniform sample whose size is fixed in advance.

Legend: s rows of the full sample, n rows of one batch, m of them accepted, D features.
"""

import numpy as np
import torch
from torch import Tensor

LARGEST = 2**16  # of the kept keys that are looked at first


class Reservoir:
    """A sample of at most `capacity` rows; the rows are chosen by their keys alone, however the stream is cut.

    A full reservoir first drops the new rows whose keys exceed all kept ones. The m that remain push out the m largest
    keys, which are among the largest kept ones. Those are known until they are used up, so that a batch costs O(n) and
    not O(s).
    """

    def __init__(self, capacity: int, dim: int, like: Tensor):
        self.sample = like.new_empty(capacity, dim)  # pages are taken as they are written
        self._keys = np.empty(capacity)
        self.num = 0
        self._top = np.zeros(0, dtype=np.int64)  # slots of the largest kept keys, all those of at least _floor
        self._floor = np.inf

    @property
    def keys(self) -> np.ndarray:
        """(rows,) float64, the keys of the sample's rows."""
        return self._keys[: self.num]

    @property
    def rows(self) -> Tensor:
        """(rows, D), a view."""
        return self.sample[: self.num]

    def offer(self, part: Tensor, keys: np.ndarray) -> None:
        """Take those rows of `part` (n, D) whose keys (n,) are small enough."""
        room = min(len(self.sample) - self.num, len(part))
        self.sample[self.num : self.num + room] = part[:room]
        self._keys[self.num : self.num + room] = keys[:room]
        self.num += room
        if room < len(part):
            self._exchange(part[room:], keys[room:])

    def _exchange(self, part: Tensor, keys: np.ndarray) -> None:
        """Swap the largest kept keys for smaller new ones, in a full reservoir."""
        if not len(self._top):
            self._look_up(len(keys))
        largest = self._keys[self._top].max() if len(self._top) else -np.inf
        accepted = np.flatnonzero(keys < largest)
        if not len(accepted):
            return
        if len(accepted) > len(self._top):
            self._look_up(len(accepted))
        held = len(self._top)
        both = np.concatenate([self._keys[self._top], keys[accepted]])
        leaving = np.argpartition(both, held - 1)[held:]  # the m largest of the top and the new ones
        gone = np.sort(self._top[leaving[leaving < held]])
        come = np.delete(accepted, leaving[leaving >= held] - held)  # in the order of the batch
        self.sample[torch.from_numpy(gone).to(self.sample.device)] = part[torch.from_numpy(come).to(part.device)]
        self._keys[gone] = keys[come]
        stay = np.delete(self._top, leaving[leaving < held])
        self._top = np.concatenate([stay, gone[keys[come] >= self._floor]])

    def _look_up(self, least: int) -> None:
        """Find the slots of at least the `least` largest keys."""
        count = min(self.num, max(LARGEST, 2 * least))
        order = np.argpartition(self.keys, self.num - count)[self.num - count :] if count else self._top
        self._top, self._floor = order, self._keys[order].min() if count else np.inf
