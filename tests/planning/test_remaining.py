"""The time that `digit fit` still needs, in its progress."""

from dataclasses import replace

import torch
from tiny import SHAPES, tiny_recipe

from digit.planning import remaining
from digit.planning.remaining import REPORT, share_left, stages_of
from digit.planning.stages import Order, Planner
from digit.runs.fit import Run

NAMES = ["codebook", "vqgan", "tokens", "prior", "renderer", REPORT]


def test_every_stage_that_is_not_done_takes_time(tmp_path):
    before = torch.get_rng_state()
    stages = stages_of(Run(tiny_recipe(), SHAPES, tmp_path))
    assert stages.names == list(stages.seconds) == NAMES and all(seconds > 0 for seconds in stages.seconds.values())
    assert torch.equal(before, torch.get_rng_state())


def test_the_report_takes_as_long_as_in_the_plan(tmp_path, monkeypatch):
    """With guidance, which is compared with none: the report samples twice."""
    recipe = tiny_recipe(prior=replace(tiny_recipe().prior, label_dropout=0.1))
    machine = replace(remaining.this_machine(torch.device("cpu")), free=1.0)
    monkeypatch.setattr(remaining, "this_machine", lambda device: machine)
    run = Run(recipe, SHAPES, tmp_path)
    planner = Planner(recipe, machine, Order(images=len(run.source), num_classes=run.num_classes))
    assert "of them also with guidance" in planner.sampling().what
    alone = planner.sampling().seconds + planner.report().seconds
    assert stages_of(run).seconds[REPORT] == alone
    monkeypatch.setattr(remaining, "this_machine", lambda device: replace(machine, free=0.5))
    assert stages_of(run).seconds[REPORT] == 2 * alone, "beside other programs"


def test_a_stage_that_is_done_or_carried_takes_none(run, tmp_path):
    assert stages_of(run).seconds == {}  # nothing is left to estimate
    recipe = replace(tiny_recipe(), prior_training=replace(tiny_recipe().prior_training, num_steps=100))
    again = Run(recipe, SHAPES, tmp_path, reuse={part: run.out / part for part in ("codebook", "vqgan", "tokens")})
    seconds = stages_of(again).seconds
    assert [name for name in NAMES if not seconds[name]] == ["codebook", "vqgan", "tokens"]


def test_a_plan_that_fails_is_no_estimate(tmp_path, monkeypatch):
    monkeypatch.setattr(remaining, "this_machine", lambda device: 1 / 0)
    assert stages_of(Run(tiny_recipe(), SHAPES, tmp_path)).seconds == {}


def test_a_training_that_goes_on_takes_what_is_left_of_it(run, tmp_path):
    recipe = replace(tiny_recipe(), prior_training=replace(tiny_recipe().prior_training, num_steps=8))
    reuse = {part: run.out / part for part in ("codebook", "vqgan", "tokens")}
    longer = Run(recipe, SHAPES, tmp_path, reuse=reuse)
    assert share_left(longer, "prior") == 1 and share_left(longer, "tokens") == 1
    (tmp_path / "prior" / "checkpoints" / "step_00000006").mkdir(parents=True)
    assert share_left(longer, "prior") == 0.25
