"""bench/guidance.py: which of its figures are made again, and which runs are refused before anything is sampled."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from digit.errors import DigitError


@pytest.fixture
def curves(monkeypatch, tmp_path):
    """`curves(num, classes)` makes the figures of one run at two scales, and returns how many images each took."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    guidance = importlib.import_module("guidance")
    drawn: list[int] = []

    def generate(num: int, labels: None, **settings) -> torch.Tensor:
        drawn.append(num)
        return torch.zeros(num, 3, 8, 8, dtype=torch.uint8)

    def judge(*_: object) -> SimpleNamespace:
        return SimpleNamespace(figures=lambda *_: {"fd": 9.0, "recall": 0.5, "recognised": 0.8})

    def run(num: int, classes: tuple[str, ...] = ("cat", "dog")) -> list[int]:
        pipe = SimpleNamespace(guided_stages=["prior"], preprocess=None, classes=classes, generate=generate)
        monkeypatch.setattr(guidance, "DigitPipeline", SimpleNamespace(from_pretrained=lambda folder: pipe))
        monkeypatch.setattr(guidance, "CifarJudge", judge)
        words = ["DATA", "--run", "one=folder", "--out", str(tmp_path), "--scales", "1,2", "--num", str(num)]
        monkeypatch.setattr(sys, "argv", ["guidance.py", *words])
        drawn.clear()
        guidance.main()
        return list(drawn)

    return run


def test_figures_of_another_number_of_samples_are_made_again(curves, tmp_path):
    assert curves(4) == [4, 4] and curves(4) == []
    assert curves(6) == [6, 6]
    points = json.loads((tmp_path / "guidance.json").read_text())["one, prior"]
    assert {scale: figures["num"] for scale, figures in points.items()} == {"1": 6, "2": 6}
    assert (tmp_path / "guidance.png").is_file()


def test_a_run_without_classes_is_refused_before_anything_is_sampled(curves, tmp_path):
    with pytest.raises(DigitError, match="--run one has no classes that its samples could be recognised as"):
        curves(4, classes=())
    assert not (tmp_path / "guidance.json").exists()
