"""Every trap in the table of docs/evaluation.md is caught, against images and against saved statistics of them."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from toy_measure import FakeNetwork, pictures, run, save_folder, warned

from digit.evaluation.samples import EvaluateConfig, statistics_npz

ROOT = Path(__file__).parents[2]
NUM, FEW = 200, 40


def load_bench():
    spec = importlib.util.spec_from_file_location("evaluation_traps", ROOT / "bench" / "evaluation_traps.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = load_bench()
TRAPS = {trap.name: trap for trap in bench.traps()}
SOUND = [name for name, trap in TRAPS.items() if not trap.warning]


@pytest.fixture
def cfg(tmp_path):
    return EvaluateConfig(
        cache=str(tmp_path / "cache"), kernel_subset_size=20, kernel_subsets=3, num_directions=5, num_splits=2
    )


@pytest.fixture(scope="module")
def scenes():
    """(samples, reference): many, and few enough for a singular covariance of a quarter of them."""
    return {num: (bench.scenes(22, num), bench.scenes(21, num)) for num in (NUM, FEW)}


def made(trap, scenes, folder):
    few = "quarter" in trap.name or trap.foreign
    samples, reference = trap.make(*scenes[FEW if few else NUM], folder)
    return samples, bench.foreign_statistics(reference, folder, FakeNetwork()) if trap.foreign else reference


@pytest.mark.parametrize("name", [name for name in TRAPS if name not in SOUND])
def test_every_trap_is_caught(cfg, tmp_path, scenes, name):
    trap = TRAPS[name]
    samples, reference = made(trap, scenes, tmp_path / "made")
    cfg = replace(cfg, **trap.changes)
    assert warned(run(samples, reference, cfg), trap.warning)
    if trap.by_statistics and not trap.foreign:
        fitting = bench.SIDE if "wider" in name else cfg.image_size
        statistics_npz(reference, tmp_path / "s.npz", replace(cfg, image_size=fitting), network=FakeNetwork())
        assert warned(run(samples, tmp_path / "s.npz", cfg), trap.warning), "from statistics"


@pytest.mark.parametrize("name", SOUND)
def test_sound_sets_warn_of_their_numbers_alone(cfg, tmp_path, scenes, name):
    warnings = run(*made(TRAPS[name], scenes, tmp_path / "made"), cfg)["warnings"]
    assert all("the same two numbers only" in text or "below 10,000" in text for text in warnings)


def test_the_table_of_the_documentation_has_every_trap():
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = {match[1] for match in re.finditer(r"^\| ([^|]+?) \|", text, re.MULTILINE)}
    assert not [name for name in TRAPS if name not in rows] and len(TRAPS) - len(SOUND) >= 15


# -------------------------------------------------------------------- the looks of pixels


def test_looks_are_told_by_chance_too(cfg):
    """Few images may look different by chance: nothing is said of fewer than ten, and of noise."""
    assert not warned(run(pictures(8, shift=50), pictures(8, seed=1), cfg), "mean red")
    assert warned(run(pictures(60, shift=50), pictures(60, seed=1), cfg), "mean red, green and blue of the samples")
    for seed in range(5):
        warnings = run(pictures(12, seed=seed), pictures(12, seed=seed + 50), cfg)["warnings"]
        assert not [
            text for text in warnings if "numbers" not in text and "below" not in text and "singular" not in text
        ]


def test_other_weights_than_the_released_ones_are_told(cfg):
    class Tuned(FakeNetwork):
        def describe(self):
            return super().describe() | {"weights_released": False}

    assert warned(run(pictures(20), pictures(20, seed=1), cfg, network=Tuned()), "not those of the released file")
    assert not warned(run(pictures(20), pictures(20, seed=1), cfg), "released file")


def test_splits_in_order_matter_only_where_samples_are_sorted(cfg, tmp_path):
    for name in ("a", "b"):
        save_folder(tmp_path / "sorted" / name, pictures(10, seed=ord(name)))
    adm = replace(cfg, protocol="adm")
    assert not warned(run(tmp_path / "sorted", pictures(20, seed=1), cfg), "sorted by class"), "they are shuffled"
    assert warned(run(tmp_path / "sorted", pictures(20, seed=1), adm), "sorted by class")
    assert not warned(run(pictures(20), pictures(20, seed=1), adm), "sorted by class")
