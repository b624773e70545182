"""What of a long piece of work is done, on one rank or many, in a form that survives a kill at any moment.

    journal.json      rank 0: the request, the units that are done, those of them that failed, notes
    journal.3.json    rank 3, and so on: the same from its side, while several ranks work

Units are numbers 0 .. total - 1 (rows, images). Every rank writes a file of its own; `collect` joins them when the work
begins again, on however many ranks.
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
    """A set of whole numbers as disjoint intervals [start, stop) in order; small for work that is done in stretches."""

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self.spans: list[tuple[int, int]] = []
        for start, stop in spans:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Put in start .. stop - 1."""
        if start >= stop:
            return
        first = bisect_left(self.spans, start, key=itemgetter(1))  # those before end before `start`
        last = bisect_right(self.spans, stop, key=itemgetter(0))  # those from here on begin after `stop`
        if first < last:
            start, stop = min(start, self.spans[first][0]), max(stop, self.spans[last - 1][1])
        self.spans[first:last] = [(start, stop)]

    def covers(self, start: int, stop: int) -> bool:
        """Whether all of start .. stop - 1 are in."""
        place = bisect_right(self.spans, start, key=itemgetter(0)) - 1
        return start >= stop or (place >= 0 and self.spans[place][1] >= stop)

    def missing_blocks(self, total: int, size: int) -> list[int]:
        """First numbers of the blocks of `size` (the last one cut at `total`) that are not in as a whole, in order."""
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
    """The state of one piece of work, as far as this rank knows it.

    Attributes:
        request: what decides the result, as JSON has it.
        total: number of units.
        done: units whose results are on the disk.
        dropped: those of them that came to nothing.
        notes: by a name that is the same wherever the same is noted; of two the lesser stays.
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
        """Take in what another rank did."""
        for mine, theirs in ((self.done, other.done), (self.dropped, other.dropped)):
            for start, stop in theirs.spans:
                mine.add(start, stop)
        for name, note in other.notes.items():
            self.notes[name] = min(note, self.notes.get(name, note))

    def save(self, journal: Path) -> None:
        """Write this rank's file; `journal` is rank 0's. What it calls done has to be on the disk before."""
        state = {"done": self.done.spans, "dropped": self.dropped.spans, "notes": self.notes}
        write_json(of_rank(journal, distributed.rank()), {"request": self.request} | state)

    @classmethod
    def load(cls, path: Path, total: int) -> Self:
        """Read one file. Raises DigitError where it is unreadable, ValueError or TypeError where it is no ledger."""
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
    """The file of a rank: journal.json, journal.1.json, ..."""
    return journal if rank == 0 else journal.with_name(f"{journal.stem}.{rank}{journal.suffix}")


def of_others(journal: Path) -> list[Path]:
    """The files of the ranks beside rank 0, as far as they are there."""
    found = journal.parent.glob(f"{journal.stem}.*{journal.suffix}")
    return sorted(path for path in found if path.name.split(".")[-2].isdigit())


def collect(journal: Path, total: int) -> Ledger | None:
    """Join what the ranks of an earlier run left into rank 0's file; None where there is none. For rank 0 alone.

    Raises as `Ledger.load` does for rank 0's own file; a damaged one of another rank only costs what that rank did.
    """
    if not journal.exists():
        discard(journal)
        return None
    whole = Ledger.load(journal, total)
    for path in of_others(journal):
        try:
            part = Ledger.load(path, total)
        except (DigitError, TypeError, ValueError) as error:
            log.warning("%s is damaged (%s): what it names is done again", path, error)
            continue
        if part.request == whole.request:
            whole.join(part)
    if of_others(journal):
        whole.save(journal)  # before the parts go
        discard(journal, others_only=True)
    return whole


def discard(journal: Path, others_only: bool = False) -> None:
    """Remove the files of all ranks."""
    for path in of_others(journal) + [journal] * (not others_only):
        path.unlink(missing_ok=True)


def progress(journal: Path) -> int:
    """Units that are done by what every rank's file says; for a look from outside, while the work may go on."""
    whole = Ledger({}, 0)
    for path in [journal, *of_others(journal)]:
        with suppress(DigitError, TypeError, ValueError):  # damaged, or gone by now
            whole.join(Ledger.load(path, 2**62))
    return len(whole.done)
