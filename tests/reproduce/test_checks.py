"""Room on the disk: what each step writes, what is there of it, and what passes; what is built and checked once."""

from dataclasses import replace

import numpy as np
import pytest
from reproduced import DATA, micro_scale

from digit import reproduce as package
from digit.cli import main
from digit.data.rows import ArrayFile
from digit.errors import DigitError
from digit.metrics.probe import ProbeConfig
from digit.reproduce import Study, build, checks
from digit.reproduce.checks import FEATURE_BYTES, Plans, allocated, check_disk, disk_bytes, kept_bytes, missing
from digit.reproduce.experiment import Needs, Step

MIB = 2**20
IN_FILES = ProbeConfig(solver="sgd", learning_rates=(0.1, 0.4), num_epochs=2, batch_size=16, memory_budget_bytes=0)


def study_in(tmp_path, **changes) -> Study:
    scale = replace(micro_scale(), large_rows=True, probe=IN_FILES, **changes)
    larger = replace(scale.large, kmeans=replace(scale.recipe.kmeans, num_clusters=14))  # its own codebook and tokens
    return Study(DATA, replace(scale, large=larger), tmp_path / "out", device="cpu")


def steps_of(study, *targets) -> dict[str, Step]:
    return {step.name: step for target in targets for step in build(target, study).steps}


def write(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.random.default_rng(0).bytes(size))


def test_what_a_killed_run_has_allocated_needs_no_further_room(tmp_path):
    study = study_in(tmp_path)
    plans, steps = Plans(study, 1), steps_of(study, "table3")
    parts = steps["parts"]
    needed = plans.of(study.recipe).store_bytes
    assert kept_bytes(parts, plans) == needed == 40 * (2 * (4 + 16) + 4)
    images = 3 * 30 * 32**2
    assert disk_bytes([parts], plans) == needed + images
    (study.out / "runs/base/tokens").mkdir(parents=True)
    ArrayFile(study.out / "runs/base/tokens/vq.partial.npy", (40, 16), "<u2").allocate()
    assert disk_bytes([parts], plans) == images, "a block of the disk is larger than this store"
    write(study.out / "test_images/images.partial.npy", images)
    assert disk_bytes([parts], plans) == 0
    check_disk([parts], plans)


def test_finished_models_samples_and_features_need_no_further_room(tmp_path):
    study = study_in(tmp_path)
    plans, steps = Plans(study, 1), steps_of(study, "table3", "table4")
    for name, folder in (
        ("plain_prior_0", "runs/base/prior/checkpoints/step_00000002"), ("class_prior_0", "runs/class_0/prior"),
        ("large_plain_renderer_0", "runs/large_plain_0/renderer"), ("large_parts", "runs/large/tokens"),
        ("plain_renderer_0_samples", "judged/plain_renderer_0_0123"), ("floor", "judged/floor"),
    ):  # fmt: skip
        step = steps[name]
        needed = kept_bytes(step, plans)
        assert needed > 0 and missing(study.out, needed, step.needs.folders) == needed, name
        write(study.out / folder / "file", int(needed) + 1)
        assert missing(study.out, needed, step.needs.folders) == 0, name
    assert steps["plain_renderer_0_samples"].needs.images * FEATURE_BYTES == 14 * FEATURE_BYTES


def test_the_large_recipe_has_a_store_of_its_own_once(tmp_path):
    study = study_in(tmp_path)
    plans, steps = Plans(study, 1), steps_of(study, "table2", "table3", "fig3a")
    stores = [step.name for step in steps.values() if "tokens" in step.needs.parts]
    assert stores == ["parts", "large_parts"]
    names = list(steps)
    assert names.index("large_parts") < names.index("large_plain_prior_0")
    assert kept_bytes(steps["parts"], plans) == 40 * (2 * (4 + 16) + 4)
    assert kept_bytes(steps["large_parts"], plans) == 40 * (2 * 4 + 4), "its VQ tokens are links"
    reused = study_in(tmp_path)
    reused.reuse = {part: tmp_path for part in ("codebook", "vqgan", "tokens")}
    assert kept_bytes(steps_of(reused, "table1")["parts"], plans) == 0, "tokens that are given take no room"


def test_features_of_a_probe_pass_and_only_the_largest_counts(tmp_path):
    study = study_in(tmp_path)
    plans, steps = Plans(study, 1), steps_of(study, "table2")
    probes = {name: step for name, step in steps.items() if name.endswith("_probe")}
    values, classes, rows = 3 * 48, len(study.train.classes), 40 + 30
    large = probes["large_plain_prior_0_probe"].needs
    state = 2 * 2 * 2 * 4 * values * classes  # old and new, weights and momentum, learning rates, float32
    assert large.passing == 2 * rows * values + state
    assert large.passing > probes["plain_prior_0_probe"].needs.passing > 0
    kept = disk_bytes([step for name, step in steps.items() if name not in probes], plans)
    assert disk_bytes(list(steps.values()), plans) == kept + large.passing
    write(study.out / "probes/large_plain_prior_0/features/training/features.0.rows", 5000)
    on_disk = allocated(study.out / "probes")
    assert missing(study.out, large.passing, large.passing_folders) == max(0, large.passing - on_disk)
    in_memory = study_in(tmp_path, num_samples=15)
    in_memory.scale = replace(in_memory.scale, probe=ProbeConfig())
    assert steps_of(in_memory, "table2")["plain_prior_0_probe"].needs.passing == 0


def test_every_step_of_figures_with_own_codebooks_says_what_it_writes(tmp_path):
    steps = steps_of(study_in(tmp_path, clusters=(6, 12)), "fig3b")
    needs = steps["prior_k6"].needs
    assert needs.parts == ("codebook", "tokens") and needs.folders == ("runs/k6",) and needs.linked
    assert not steps_of(study_in(tmp_path, clusters=(6, 12), seeds=(3,)), "fig3b")["prior_k6"].needs.linked
    assert steps["probe_k6"].needs.passing and not steps["probe_k6"].needs.models
    assert list(steps).index("prior_k6") < list(steps).index("probe_k6")


def test_a_disk_that_is_too_small_is_told(tmp_path, monkeypatch):
    study = study_in(tmp_path)
    huge = Step(name="s", seconds=0.0, make=lambda: None, needs=Needs(passing=10**18))
    with pytest.raises(DigitError, match="disk full: this reproduction takes .* free some space"):
        check_disk([huge], Plans(study, 1))


def test_sparse_files_count_as_far_as_they_are_allocated(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(64 * MIB)
    assert allocated(tmp_path) < MIB
    write(tmp_path / "inner" / "full", 2 * MIB)
    assert 2 * MIB <= allocated(tmp_path) < 3 * MIB and allocated(tmp_path / "nothing") == 0


def test_the_command_builds_and_checks_its_experiments_once(tmp_path, monkeypatch):
    """And it measures the machine once for all checks."""
    counts = dict(build=0, check_everything=0, this_machine=0)

    def count(module, name):
        real = getattr(module, name)

        def call(*args):
            counts[name] += 1
            return real(*args)

        monkeypatch.setattr(module, name, call)

    count(package, "build")
    count(package, "check_everything")
    count(checks, "this_machine")
    words = ["--scale", "tiny", "--data", "shapes:num=3000,size=64", "--out", str(tmp_path / "out")]
    assert main(["reproduce", "table1,table3", *words, "--plan"]) == 0
    assert counts == dict(build=2, check_everything=1, this_machine=1)
