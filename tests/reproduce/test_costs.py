"""Estimated times are of the work that a step does: one crop, the models that sample, what a rehearsal leaves."""

from dataclasses import replace

import pytest
import torch
from reproduced import DATA, micro_scale
from tiny import tiny_recipe

from digit.metrics.probe import ProbeConfig
from digit.models.vqgan import VQGANConfig
from digit.planning.machines import Machine
from digit.reproduce import Study, build, probes
from digit.reproduce.costs import Costs
from digit.reproduce.rehearsal import rehearsed

CPU = Machine(
    name="a CPU", memory=2.0**34, peaks={"bf16": 4e11}, bandwidth=3e10, price=0.0, cores=2, gpu=False
)  # fmt: skip
SGD = ProbeConfig(solver="sgd")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr("digit.reproduce.costs.this_machine", lambda device: CPU)


def costs(**changes) -> Costs:
    return Costs(replace(tiny_recipe(), class_conditional=False, **changes), torch.device("cpu"))


def seconds_of(tmp_path, target, scale) -> dict[str, float]:
    study = Study(DATA, scale, tmp_path / "out", device="cpu")
    return {step.name: step.seconds for step in build(target, study).steps}


def test_a_probe_reads_one_of_many_crops(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "MAX_ROWS", 40)  # of ImageNet's 1,281,167 images 2 million rows are one crop each
    one, many = (
        replace(micro_scale(), recipe=replace(micro_scale().recipe, crops_per_image=crops), probe=SGD)
        for crops in (1, 100)
    )
    for target in ("table2", "fig3b"):
        few, more = (seconds_of(tmp_path, target, scale) for scale in (one, many))
        for name in (name for name in few if "probe" in name):
            assert more[name] == few[name] > 0, name
        assert more["parts"] > 2 * few["parts"]


def test_the_cuts_of_a_rehearsal_are_in_its_estimates(tmp_path):
    scale = replace(micro_scale(), probe=SGD, num_samples=5000, large_rows=True)
    whole = seconds_of(tmp_path, "table2", scale) | seconds_of(tmp_path, "table3", scale)
    scale, _ = rehearsed(scale)
    cut = seconds_of(tmp_path, "table2", scale) | seconds_of(tmp_path, "table3", scale)
    assert cut["plain_renderer_0_samples"] < whole["plain_renderer_0_samples"] / 10, "16 of 5000 samples"
    assert cut["plain_prior_0_probe"] < whole["plain_prior_0_probe"] / 15, "2 of 80 epochs, 2 of 5 learning rates"


def test_what_is_given_costs_nothing_and_a_given_vqgan_what_it_is():
    found = costs()
    assert found.parts(1000, ()) == 0 < found.parts(1000, ("tokens",)) < found.parts(1000, ("codebook", "tokens"))
    assert found.parts(1000) > found.parts(1000, ("codebook", "tokens"))
    recipe, larger = found.recipe, replace(found.recipe.vqgan, channels=64, num_groups=32)
    assert isinstance(larger, VQGANConfig)
    given = Costs(recipe, torch.device("cpu"), larger)
    assert given.reconstruction(100) > found.reconstruction(100) and given.sampling(100) > found.sampling(100)


def test_sampling_counts_the_models_that_sample():
    found = costs()
    assert found.sampling(100, ("vq_ar",)) < found.sampling(100) < found.sampling(200)
    larger = replace(found.recipe, prior=replace(found.recipe.prior, depth=8))
    assert found.sampling(100, recipe=larger) > found.sampling(100)


def test_ranks_share_all_but_the_classifiers(monkeypatch):
    def seconds() -> list[float]:
        found = costs()
        return [found.model("prior"), found.images("judge", 100), found.classifiers(SGD, 1000, 64, 10)]

    alone = seconds()
    monkeypatch.setattr("digit.runtime.distributed.world_size", lambda: 4)
    assert seconds() == pytest.approx([alone[0] / 4, alone[1] / 4, alone[2]])
