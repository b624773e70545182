"""Sentences on a run and the commands that follow: right levels, and commands that exist with their options."""

import io
import re
import shlex
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_recipe

from digit.cli import COMMANDS, main
from digit.metrics.judge import METRIC
from digit.runs.findings import Facts, command, find, next_steps
from digit.runs.judgement import Ways
from digit.runs.report_page import crops_that_may_grow

WAYS = Ways({"prior": {"cfg_scale": 1.5}}, {"prior": {"cfg_scale": 1.0}}, by_default=True)
FACTS = Facts(
    out="runs/my photos",
    data="photos/",
    classes=["cube", "star"],
    fit_command="digit fit photos/ --out 'runs/my photos'",
)


def shares(value: float) -> dict:
    return {name: {"value": value, "low": value, "high": value} for name in ("precision", "recall", "coverage")}


def metrics(**changes) -> dict:
    sets = {
        "samples": {METRIC: 300.0, **shares(0.5)},
        "real": {METRIC: 100.0, **shares(0.9)},
        "reconstructions": {METRIC: 150.0, **shares(0.8)},
    }
    found = {
        METRIC: 310.0, f"{METRIC}_images": [500, 2000], "scale": {"images": 500, "reference": 2000, "sets": sets},
        "recognised": 0.8, "recognised_images": 500, "recognised_by_class": {"cube": 0.7, "star": 0.9},
        "recognised_real": 0.85, "recognised_reconstructions": 0.83, "psnr_db": 24.0,
        "memorising": {"verdict": "none", "text": "No sign."},
        "stability": {"snrs": [30.0], "images": 48, "changed": {"discriminative": [0.1], "vq": [0.4]}},
    }  # fmt: skip
    return found | changes


def told(*args) -> str:
    return "\n".join(f"{level}: {text}" for level, text in find(*args))


def test_a_good_run():
    text = told(metrics(), FACTS)
    assert "good: A classifier takes 80% of 500 samples for their class; of other real pictures 85%" in text
    assert "samples 300, reconstructions 150, other real pictures 100" in text
    assert "VQGAN makes 25% of the gap" in text and "fair: The VQGAN gives pictures back at 24.0 dB" in text
    assert "good: No sign." in text and "4.0 times as stable" in text


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"recognised": 0.6}, "fair: A classifier takes 60%"),
        ({"recognised": 0.2}, "poor: A classifier takes 20%"),
        ({"recognised_real": 0.3}, "info: A classifier takes 80% of 500 .*knows these classes too little"),
        ({"psnr_db": 19.0}, "poor: .*Prints and fine lines are lost"),
        ({"psnr_db": 27.0}, "good: The VQGAN gives pictures back at 27.0 dB"),
        ({"memorising": {"verdict": "copies", "text": "Copies."}}, "poor: Copies."),
    ],
)
def test_levels(change, wanted):
    assert re.search(wanted, told(metrics(**change), FACTS))


def test_the_grade_of_the_distance_is_that_of_the_models():
    found = metrics()
    found["scale"]["sets"]["samples"][METRIC] = 200.0
    assert re.search("good: Distance .*The models come near to what their tokens allow", told(found, FACTS))
    assert "come near" not in told(metrics(), FACTS)


def test_little_variety_is_weak():
    found = metrics()
    found["scale"]["sets"]["samples"] |= shares(0.1)
    assert "poor: Variety: recall 0.10" in told(found, FACTS) and "a higher top_p gives more" in told(found, FACTS)


def test_a_run_without_scale_and_classes():
    bare = {METRIC: 3.0, f"{METRIC}_images": [8, 8], "scale": {}, "memorising": {"verdict": "unknown", "text": "Few."}}
    assert told(bare, Facts(out="a", data="b")) == "info: Few."


def test_the_better_way_is_said():
    found, facts = metrics(recognised_other_way=0.9), Facts(out="a", data="b", ways=WAYS)
    found["scale"]["sets"]["other_way"] = {METRIC: 200.0, **shares(0.6)}
    text = told(found, facts)
    assert "with guidance distance 300, recall 0.50, 80% recognised" in text and "better without guidance" in text
    found["scale"]["sets"]["other_way"][METRIC] = 400.0
    assert "better without" not in told(found, facts)


def test_curves_that_rise_and_fall():
    rising = Facts(out="a", data="b", curves={"prior": {"val_nll": [(100, 3.0), (200, 2.5), (300, 2.9)]}})
    assert "overfits its training pictures: held-out loss rose from 2.50 at step 200" in told(metrics(), rising)
    falling = Facts(out="a", data="b", curves={"renderer": {"val_nll": [(100, 3.0), (200, 2.5), (300, 2.3)]}})
    assert "renderer was still learning" in told(metrics(), falling)


def options(name: str) -> set[str]:
    with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
        main([name, "--help-all"])
    return set(re.findall(r"--[a-z][\w.]*", shown.getvalue()))


def test_every_command_exists_with_its_options():
    facts = [
        FACTS,
        Facts(out="a", data="b", ways=WAYS),
        Facts(out="a", data="b", vqgan_steps=100, fit_command="digit fit b --out a"),
    ]
    lines = {line for f in facts for _, text in next_steps(metrics(), f) for line in text.split("\n")}
    assert len(lines) > 10
    for line in lines:
        program, name, *words = shlex.split(line)
        assert program == "digit" and name in COMMANDS
        assert not {word for word in words if word.startswith("--")} - options(name), line


def test_commands_are_quoted():
    assert (
        command("sample", source="my run", prior__cfg_scale=1.5) == "digit sample --from 'my run' --prior.cfg_scale 1.5"
    )
    text = dict(
        next_steps(
            metrics(psnr_db=20.0), Facts(out="a b", data="c", vqgan_steps=10, fit_command="digit fit c --out 'a b'")
        )
    )
    assert "digit fit c --out 'a b' --vqgan_training.num_steps 20" in text.values()


def test_an_overfitting_run_is_told_what_helps():
    curves = {"prior": {"val_nll": [(100, 3.0), (200, 2.5), (300, 2.9)]}}
    facts = Facts(
        out="a", data="b", curves=curves, crops_per_image=4, fit_command="digit fit b --crops_per_image 4 --out a"
    )
    lines = dict(next_steps(metrics(), facts)).values()
    assert "digit fit b --out a --crops_per_image 8" in lines and not any("--more" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "reuse", "crops"),
    [({"crops_per_image": 2}, {}, 2), ({"training_crops": "fresh"}, {}, 0), ({}, {"tokens": Path("a/tokens")}, 0)],
)
def test_more_crops_are_advised_where_the_run_would_take_them(changes, reuse, crops):
    """`digit fit` refuses more stored crops beside fresh ones, and beside tokens of another run."""
    run = SimpleNamespace(recipe=tiny_recipe(**changes), reuse=reuse)
    assert crops_that_may_grow(run) == crops
    curves = {"prior": {"val_nll": [(100, 3.0), (200, 2.5), (300, 2.9)]}}
    facts = Facts(out="a", data="b", curves=curves, crops_per_image=crops, fit_command="digit fit b --out a")
    advised = "".join(dict(next_steps(metrics(), facts)).values()), told(metrics(), facts)
    assert ["crops_per_image" in advised[0], "more crops" in advised[1]] == [crops > 0] * 2
