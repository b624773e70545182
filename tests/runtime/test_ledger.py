"""What is done of a long piece of work: intervals against sets, files of several ranks joined, damaged ones."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from digit.runtime.ledger import Ledger, Spans, collect, discard, of_rank

TOTAL = 40
spans = st.lists(st.tuples(st.integers(0, TOTAL), st.integers(0, TOTAL)), max_size=12)


@given(spans, st.integers(0, TOTAL), st.integers(0, TOTAL), st.integers(1, 9))
def test_spans_are_a_set(given_spans, start, stop, size):
    wanted = {number for first, last in given_spans for number in range(first, last)}
    found = Spans(given_spans)
    assert list(found) == sorted(wanted) and len(found) == len(wanted)
    assert all(a < b for a, b in found.spans)
    assert all(a[1] < b[0] for a, b in zip(found.spans, found.spans[1:], strict=False))  # as few as can be
    assert found.covers(start, stop) == wanted.issuperset(range(start, stop))
    blocks = [range(first, min(first + size, TOTAL)) for first in range(0, TOTAL, size)]
    assert found.missing_blocks(TOTAL, size) == [block.start for block in blocks if not wanted.issuperset(block)]


def ledger(*done: tuple[int, int], dropped=(), notes=None, request=None) -> Ledger:
    return Ledger(request or {"seed": 1}, TOTAL, Spans(done), Spans(dropped), notes or {})


def leave(folder, *parts: Ledger):
    """The files of ranks 0, 1, ...; returns that of rank 0."""
    journal = folder / "journal.json"
    for rank, part in enumerate(parts):
        part.save(journal)
        if rank:
            journal.rename(of_rank(journal, rank))
    if len(parts) > 1:
        parts[0].save(journal)
    return journal


def test_files_of_several_ranks_are_joined(tmp_path):
    parts = ledger((0, 10), notes={"3": [3, "a"], "7": [9, "b"]}), ledger((20, 30), dropped=[(21, 22)])
    journal = leave(tmp_path, *parts, ledger((8, 12), notes={"7": [8, "b"]}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.1.json", "journal.2.json", "journal.json"]
    whole = ledger((0, 12), (20, 30), dropped=[(21, 22)], notes={"3": [3, "a"], "7": [8, "b"]})
    assert collect(journal, TOTAL) == whole and not whole.complete
    assert [path.name for path in tmp_path.iterdir()] == ["journal.json"]
    assert collect(journal, TOTAL) == whole
    discard(journal)
    assert not list(tmp_path.iterdir()) and collect(journal, TOTAL) is None


def test_parts_without_rank_0_or_of_another_request_do_not_count(tmp_path):
    journal = leave(tmp_path, ledger((0, 10)), ledger((20, 30), request={"seed": 2}))
    assert collect(journal, TOTAL) == ledger((0, 10))
    leave(tmp_path, ledger((0, 10)), ledger((20, 30)))
    journal.unlink()
    assert collect(journal, TOTAL) is None and not list(tmp_path.iterdir())


DAMAGED = ["", "[]", '{"request": 3}', '{"request": {}, "done": 12, "dropped": [], "notes": {}}'] + [
    json.dumps({"request": {"seed": 1}, "done": [span], "dropped": [], "notes": {}})
    for span in ([0, TOTAL + 1], [-1, 3], [5, 5], [0, 2.5], [0], "ab", [True, 3], None)
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damage_costs_only_what_that_rank_did(tmp_path, text, caplog):
    journal = leave(tmp_path, ledger((0, 10)), ledger((20, 30)), ledger((30, 40)))
    of_rank(journal, 1).write_text(text)
    assert collect(journal, TOTAL) == ledger((0, 10), (30, 40))
    assert len(caplog.records) == 1 and "journal.1.json is damaged" in caplog.text
