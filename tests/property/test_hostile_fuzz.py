"""A few hundred damaged inputs through each loader (python -m fuzz runs 10,000), and the judge itself."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from digit.errors import DigitError
from fuzz import worker
from fuzz.loaders import LOADERS
from fuzz.loaders.released import self_test
from fuzz.worker import build_input, judge, judge_all

NUMBERS = {
    "images": 300,
    "parquet": 300,
    "tar": 300,
    "zip": 300,
    "folder": 300,
    "config": 20,
    "safetensors": 50,
    "tokens": 300,
    "released": 80,
}


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_inputs_are_read_or_refused_in_one_line(name):
    verdicts = list(judge_all(LOADERS[name], range(NUMBERS[name])))
    assert [verdict for verdict in verdicts if verdict.is_finding] == []
    kinds = Counter(verdict.kind for verdict in verdicts)
    assert kinds["accepted"] and kinds["refused"], "damage that always, or never, shows tests nothing"


@pytest.mark.parametrize("name", LOADERS)
def test_an_input_is_a_function_of_its_number(name, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            (place := tmp_path / folder / str(number)).mkdir()
            build_input(LOADERS[name], place, number)
    a, b = (
        {p.relative_to(tmp_path / f): p.read_bytes() for p in (tmp_path / f).rglob("*") if p.is_file()} for f in "ab"
    )
    assert a == b and a


def test_the_released_seeds_convert():
    self_test()


class Misbehaving:
    """Does what a broken loader does, by the number of the input."""

    name = "misbehaving"
    deeds = ("raise", "lines", "die", "freeze", "flood", "refuse", "accept")

    def build(self, folder: Path, rng) -> None:
        self.deed = self.deeds[min(self.asked, len(self.deeds) - 1)]
        self.asked += 1

    def __init__(self) -> None:
        self.asked = 0

    def load(self, folder: Path) -> None:
        if self.deed == "raise":
            raise KeyError("x")
        if self.deed == "lines":
            raise DigitError("")
        if self.deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.deed == "freeze":
            time.sleep(60)
        if self.deed == "flood":
            self.kept = b"x" * (2 * worker.MEMORY_BYTES)
        if self.deed == "refuse":
            raise DigitError("no")


def test_the_judge_sees_every_kind_of_failure(monkeypatch):
    monkeypatch.setattr(worker, "WALL_SECONDS", 3.0)  # a busy machine takes its time to start a worker
    monkeypatch.setattr(worker, "MEMORY_BYTES", 2**27)  # past what freed blocks of this process can serve
    kinds = {}
    for place, deed in enumerate(Misbehaving.deeds):
        loader = Misbehaving()
        loader.asked = place
        (verdict,) = judge_all(loader, [place])
        kinds[deed] = verdict.kind
    wanted = ("exception", "not one line", "killed", "hang", "memory", "refused", "accepted")
    assert kinds == dict(zip(Misbehaving.deeds, wanted, strict=True))


def test_a_worker_that_dies_is_replaced(monkeypatch):
    loader = Misbehaving()
    loader.asked = Misbehaving.deeds.index("die")
    assert [verdict.kind for verdict in judge_all(loader, range(3))] == ["killed"] * 3  # each new worker forks anew


def test_a_refused_allocation_counts_as_memory(tmp_path):
    def load(folder: Path) -> None:
        try:
            raise MemoryError("no room")
        except MemoryError as error:
            raise DigitError("refused") from error

    assert judge(load, tmp_path)[0] == "memory"
