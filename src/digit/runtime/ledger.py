"""Records which units of a long task are done, so that a killed task continues, on any number of ranks.

    journal.json      rank 0: the request, the finished units, those of them that were dropped, notes
    journal.3.json    rank 3: the same for its own units; so for every other rank

Units are numbers 0 .. total - 1 (rows, images). Every rank writes its own file, atomically; `collect` merges the files
when the task starts again.
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

from digit.errors import DigitError
from digit.runtime import distributed
from digit.runtime.files import read_json, write_json

log = logging.getLogger(__name__)


class Spans:
    """A set of integers, stored as sorted disjoint intervals [start, stop); compact where units finish in sequence."""

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self.spans: list[tuple[int, int]] = []
        for start, stop in spans:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Add start .. stop - 1."""
        if start >= stop:
            return
        first = bisect_left(self.spans, start, key=itemgetter(1))  # earlier intervals end before `start`
        last = bisect_right(self.spans, stop, key=itemgetter(0))  # later intervals begin after `stop`
        if first < last:
            start, stop = min(start, self.spans[first][0]), max(stop, self.spans[last - 1][1])
        self.spans[first:last] = [(start, stop)]

    def covers(self, start: int, stop: int) -> bool:
        """Whether the set has all of start .. stop - 1."""
        place = bisect_right(self.spans, start, key=itemgetter(0)) - 1
        return start >= stop or (place >= 0 and self.spans[place][1] >= stop)

    def missing_blocks(self, total: int, size: int) -> list[int]:
        """Starts of the blocks of `size` in 0 .. total - 1 of which any number is missing, in order."""
        return [start for start in range(0, total, size) if not self.covers(start, min(start + size, total))]

    def __iter__(self) -> Iterator[int]:
        return (number for start, stop in self.spans for number in range(start, stop))

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spans) and self.spans == other.spans

    def __repr__(self) -> str:
        return f"Spans({self.spans})"


@dataclass
class Ledger:
    """The state of one task, as far as this rank knows it.

    Attributes:
        request: the settings that decide the result, as JSON gives them back.
        total: number of units.
        done: units whose results are on the disk.
        dropped: finished units without a result, such as unreadable images.
        notes: remarks by name; where two ranks note the same name, the smaller value stays.
    """

    request: dict[str, Any]
    total: int
    done: Spans = field(default_factory=Spans)
    dropped: Spans = field(default_factory=Spans)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every unit is done."""
        return self.done.covers(0, self.total)

    def join(self, other: "Ledger") -> None:
        """Add what another rank has done."""
        for own, others in ((self.done, other.done), (self.dropped, other.dropped)):
            for start, stop in others.spans:
                own.add(start, stop)
        for name, note in other.notes.items():
            self.notes[name] = min(note, self.notes.get(name, note))

    def save(self, journal: Path) -> None:
        """Write this rank's file; `journal` is rank 0's. The results of finished units must be on the disk already."""
        state = {"done": self.done.spans, "dropped": self.dropped.spans, "notes": self.notes}
        write_json(of_rank(journal, distributed.rank()), {"request": self.request} | state)

    @classmethod
    def load(cls, path: Path, total: int) -> Self:
        """Read one rank's file. Raises DigitError where it is unreadable, ValueError or TypeError for other content."""
        state = read_json(path)
        if not isinstance(state, dict) or not isinstance(state.get("request"), dict):
            raise TypeError("request")
        done, dropped = (_spans(state.get(name), total, name) for name in ("done", "dropped"))
        if not isinstance(notes := state.get("notes"), dict):
            raise TypeError("notes")
        return cls(state["request"], total, done, dropped, notes)


def _spans(value: Any, total: int, name: str) -> Spans:
    if not isinstance(value, list):
        raise TypeError(name)
    for span in value:
        whole = isinstance(span, list) and len(span) == 2 and all(type(number) is int for number in span)
        if not whole or not 0 <= span[0] < span[1] <= total:
            raise ValueError(f"{name} names {span!r}, wanted whole numbers in 0 .. {total}")
    return Spans(map(tuple, value))


def of_rank(journal: Path, rank: int) -> Path:
    """A rank's file: journal.json, journal.1.json, ..."""
    return journal if rank == 0 else journal.with_name(f"{journal.stem}.{rank}{journal.suffix}")


def of_others(journal: Path) -> list[Path]:
    """The existing files of ranks 1, 2, ..."""
    found = journal.parent.glob(f"{journal.stem}.*{journal.suffix}")
    return sorted(path for path in found if path.name.split(".")[-2].isdigit())


def collect(journal: Path, total: int) -> Ledger | None:
    """Merge the files that an earlier run left into rank 0's; None where rank 0 left none. Only rank 0 calls this.

    Raises as `Ledger.load` for rank 0's file. If another rank's file is damaged, that rank's units are done again.
    """
    if not journal.exists():
        discard(journal)
        return None
    whole = Ledger.load(journal, total)
    for path in of_others(journal):
        try:
            part = Ledger.load(path, total)
        except (DigitError, TypeError, ValueError) as error:
            log.warning("%s is damaged (%s): its units are done again", path, error)
            continue
        if part.request == whole.request:
            whole.join(part)
    if of_others(journal):
        whole.save(journal)  # before the other files are removed
        discard(journal, others_only=True)
    return whole


def discard(journal: Path, others_only: bool = False) -> None:
    """Remove the files of all ranks."""
    for path in of_others(journal) + [journal] * (not others_only):
        path.unlink(missing_ok=True)


def progress(journal: Path) -> int:
    """Number of finished units by all ranks' files; any process may call this while the task runs."""
    whole = Ledger({}, 0)
    for path in [journal, *of_others(journal)]:
        with suppress(DigitError, TypeError, ValueError):  # damaged, or removed meanwhile
            whole.join(Ledger.load(path, 2**62))
    return len(whole.done)
