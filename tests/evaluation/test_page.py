"""report.html of `digit evaluate`: the examples that it shows, and a page that needs nothing else."""

import json
import re

import numpy as np
import pytest
import torch
from toy_measure import pictures, run, save_folder

from digit.evaluation.examples import choose_examples
from digit.evaluation.samples import EvaluateConfig, statistics_npz
from digit.metrics.neighbours import compare_neighbours


@pytest.fixture
def cfg(tmp_path):
    return EvaluateConfig(cache=str(tmp_path / "cache"), kernel_subset_size=10, kernel_subsets=5)


def classes_folder(folder, seed, names=("cat", "<b>dog")):
    for i, name in enumerate(names):
        save_folder(folder / name, pictures(15, seed=seed + i))
    return folder


def test_examples_are_those_that_the_measures_are_about():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(60, 4, generator=generator), torch.randn(40, 4, generator=generator)
    fake[7], fake[9] = real[21], 50.0  # a copy, and something far from all
    real[30:37] -= 30.0  # which no sample comes near
    found = compare_neighbours(real, fake, 5)
    shown = choose_examples(40, found)
    assert shown["closest"][0] == {
        "sample": 7, "reference": 21, "ratio": 0.0, "density": float(found.densities[7])
    }  # fmt: skip
    ratios = [entry["ratio"] for entry in shown["closest"]]
    assert ratios == sorted(ratios)
    assert shown["sparsest"][0]["sample"] == 9
    densities = [entry["density"] for entry in shown["densest"]]
    assert densities == sorted(densities, reverse=True) and densities[0] == found.densities.max()
    assert {"reference": 33} in shown["missed"]
    assert all(not found.covered[entry["reference"]] for entry in shown["missed"])
    for entry in shown["spread"]:
        distances = (real - fake[entry["sample"]]).norm(dim=1)
        assert entry["reference"] == int(distances.argmin())
        own = (real - real[entry["reference"]]).norm(dim=1).sort().values[1]
        assert entry["ratio"] == pytest.approx(float(distances.min() / own), rel=1e-5)


def test_repeated_reference_images_have_no_ratio():
    real = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    real[1] = real[0]
    fake = torch.cat([real[:1] + 0.01, real[5:20]])
    entry = choose_examples(16, compare_neighbours(real, fake, 3))["spread"][0]
    assert entry["reference"] in (0, 1) and entry["ratio"] is None


def test_the_page_has_everything_and_needs_nothing(cfg, tmp_path):
    samples = classes_folder(tmp_path / "a&b", 0)
    reference = classes_folder(tmp_path / "real", 5)
    result = run(samples, reference, cfg, report=tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "report" / "result.json").read_text()) == json.loads(json.dumps(result))
    for name in result["metrics"]:
        about = result["measures"][name]
        row = re.search(f"<tr><th>{name}<.*?</tr>", page)
        assert row and f">{about['better']}<" in row[0] and f">{about['needs']}<" in row[0], name
    for name, reason in result["left_out"].items():
        assert re.search(f"{name}</th>.*?left out: {re.escape(reason)}", page)
    assert result["warnings"] and f"Traps found: {len(result['warnings'])}" in page
    assert page.count("<li>") == len(result["warnings"])
    paired = sum(len(result["examples"][kind]) for kind in ("spread", "closest"))
    single = sum(len(result["examples"][kind]) for kind in ("densest", "sparsest", "missed"))
    assert page.count("data:image/png;base64,") == 2 * paired + single
    assert "&lt;b&gt;dog" in page and "<b>" not in page and "a&amp;b" in page  # names are no HTML
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page and "<script" not in page
    assert page.count('class="bar"') == 2 and "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_many_classes_are_cut_to_the_worst_and_the_best(cfg, tmp_path):
    names = [f"kind{i:02d}" for i in range(40)]
    for side, seed in (("s", 0), ("r", 100)):
        for i, name in enumerate(names):
            save_folder(tmp_path / side / name, pictures(3, seed=seed + i))
    result = run(tmp_path / "s", tmp_path / "r", cfg, report=tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert len(result["classes"]) == 40 and page.count('class="bar"') == 25
    ordered = list(result["classes"])
    assert ordered[0] + " " in page and ordered[-1] + " " in page and ordered[22] + " " not in page
    assert "The 20 worst and the 5 best of 40." in page


def test_statistics_alone_show_the_samples(cfg, tmp_path):
    from toy_measure import FakeNetwork

    statistics_npz(pictures(30, seed=1), tmp_path / "s.npz", cfg, network=FakeNetwork())
    result = run(pictures(30), tmp_path / "s.npz", cfg, report=tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert list(result["examples"]) == ["spread"] and page.count("data:image") == 24 and ">ratio " not in page
    np.savez(tmp_path / "reps.npz", reps=FakeNetwork().judge(pictures(30, seed=1)).pooled.numpy())
    run(pictures(30), tmp_path / "reps.npz", cfg, report=tmp_path / "report")  # features: neighbours without pictures
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image") == 12 + 12 + 15 + 15 and "What the samples lack" not in page


def test_large_pictures_are_shown_small(cfg, tmp_path):
    run(pictures(12, size=256), pictures(12, seed=1, size=256), cfg, report=tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "data:image/webp" in page and 'width="192" height="192"' in page and "data:image/png" not in page
