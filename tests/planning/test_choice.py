"""The recipe for photographs that suits a machine."""

from dataclasses import replace

import pytest

from digit.cli import main
from digit.planning import choice
from digit.planning.choice import CPU_SECONDS, choose_photos, planned_seconds
from digit.planning.machines import GPUS, Machine
from digit.runs.recipes import get_recipe


def cpu(flops: float, cores: int = 2) -> Machine:
    return Machine(
        name="a CPU", memory=8 * 2**30, peaks={"bf16": flops}, bandwidth=30e9, price=0.0, cores=cores, gpu=False
    )


SLOW = cpu(4e11)  # two cores, as `CPU_SHARES` was measured on


@pytest.fixture(autouse=True)
def transformers(monkeypatch):
    monkeypatch.setattr(choice, "lacking", lambda online: "" if online else "photos256 fetches weights")


def test_two_slow_cores_get_128_px_within_an_hour():
    found = choose_photos(SLOW)
    assert found.recipe.name == "photos128" and found.seconds <= CPU_SECONDS
    assert found.recipe == get_recipe("photos128")
    said = str(found)
    assert (
        "recipe photos128 for this machine, a CPU: 128 px, 3,000 updates of the prior and 2,400 of the renderer, about"
        in said
    )
    assert "--recipe photos64" in said and "--more 2x" in said and "\n" not in said


def test_a_machine_that_is_busy_now_gets_the_same_recipe_and_is_told(capsys, monkeypatch):
    busy = choose_photos(replace(SLOW, free=0.25))
    assert busy.recipe == choose_photos(SLOW).recipe and busy.seconds == choose_photos(SLOW).seconds
    told = "other programs take 75% of its cores now: while they do, everything takes about 4.0 times as long"
    assert told in str(busy) and "other programs" not in str(choose_photos(SLOW))
    monkeypatch.setattr("digit.planning.machines.this_machine", lambda device: replace(SLOW, free=0.25))
    assert main(["plan", "demo", "--images", "3000"]) == 0 and told in capsys.readouterr().out


def test_slower_ones_get_64_px_and_faster_ones_more_updates():
    assert choose_photos(cpu(1e11)).recipe.name == "photos64"
    fast = choose_photos(cpu(4e12, cores=16)).recipe
    assert fast.name == "photos128" and fast.prior_training.num_steps == 4 * 3000
    assert fast.renderer_training.num_steps == 4 * 2400


def test_a_gpu_of_24_gb_gets_256_px():
    for name in ("rtx4090", "l4", "h100"):
        assert choose_photos(GPUS[name]).recipe.name == "photos256"
    small = choose_photos(replace(GPUS["rtx4090"], memory=12 * 2**30))
    assert small.recipe.name == "photos128" and "photos256 takes a GPU of 24 GB" in str(small)
    offline = choose_photos(GPUS["rtx4090"], online=False)
    assert offline.recipe.name == "photos128" and "photos256 fetches weights" in str(offline)


def test_the_recipe_of_a_gpu_of_24_gb_fits(capsys):
    for name in ("rtx4090", "l4"):
        assert main(["plan", "photos256", "--gpu", name, "--images", "3000", "--classes", "10"]) == 0
        assert "does not fit" not in capsys.readouterr().out


def test_photos64_is_shorter():
    assert sum(planned_seconds(get_recipe("photos64"), SLOW)) < 0.6 * sum(
        planned_seconds(get_recipe("photos128"), SLOW)
    )


def test_plan_photos_says_what_it_chose(capsys):
    assert main(["plan", "photos", "--gpu", "rtx4090", "--images", "3000"]) == 0
    out, err = capsys.readouterr()
    assert "note: recipe photos256 for this machine" in err and "renderer" in out


def test_a_new_run_takes_the_choice_and_keeps_it(tmp_path, monkeypatch):
    """The machine is looked at once: a busier moment must not change a run."""
    from digit.cli.runs import choose_base
    from digit.runs.fit import Run

    monkeypatch.setattr("digit.planning.machines.this_machine", lambda device: SLOW)
    words = ["shapes:num=2000,size=16", "--out", str(tmp_path / "run")]
    base = choose_base(words)
    assert base.recipe.name == "photos128" and base.said.startswith("recipe photos128 for this machine")
    Run(base.recipe, words[0], tmp_path / "run")
    monkeypatch.setattr("digit.planning.machines.this_machine", lambda device: cpu(1e11))
    for again in (words, [*words, "--recipe", "photos"]):
        assert choose_base(again).recipe.preprocess.image_size == 128 and not choose_base(again).said
    assert choose_base([*words, "--recipe", "photos64"]).recipe.preprocess.image_size == 64
