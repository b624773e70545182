"""A folder whose settings change: what they do not touch stays, the rest is made anew and kept aside; longer runs."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny import SHAPES, pixel_recipe, tiny_recipe

from digit.cli import main
from digit.errors import DigitError, Stopped
from digit.runs.changes import (
    FREE_SETTING,
    decides,
    find_change,
    finish_lengthening,
    keep_length,
    lengthens,
    read_recipe,
    touching,
    with_more,
)
from digit.runs.checks import DECIDED_BY
from digit.runs.fit import Run, fit
from digit.runs.recipe import Recipe, with_settings
from digit.runs.roles import ROLES
from digit.runtime.files import load_tensors, read_json, write_json
from digit.runtime.settings import flat
from digit.training.log import read_log


def run_in(out: Path, recipe: Recipe | None = None, **options) -> Run:
    """A run that keeps what other settings do not touch."""
    return Run(recipe or tiny_recipe(), SHAPES, out, reuse_unchanged=True, **options)


def weights(run_folder: Path, model: str) -> dict[str, torch.Tensor]:
    return load_tensors(run_folder / model / "model.safetensors")


def assert_same(first: Path, second: Path, model: str) -> None:
    one, two = weights(first, model), weights(second, model)
    assert one.keys() == two.keys() and all(torch.equal(two[name], value) for name, value in one.items())


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished run, not to be changed."""
    out = tmp_path_factory.mktemp("done") / "run"
    fit(run_in(out))
    return out


@pytest.fixture
def copy(done, tmp_path) -> Path:
    """A copy of the finished run."""
    import shutil

    return Path(shutil.copytree(done, tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))


# -------------------------------------------------------------------- which stages a setting touches


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({"prior.depth": 2}, {"prior"}),
        ({"prior.label_dropout": 0.1}, {"prior", "vq_ar", "vq_masked", "vq_ar_epochs"}),
        ({"renderer.depth": 2}, {"renderer", "renderer_masked", "vq_ar", "vq_masked", "vq_ar_epochs"}),
        ({"prior_training.num_steps": 9}, {"prior", "vq_ar", "vq_masked"}),
        ({"masked_steps": 9}, {"renderer_masked"}),
        ({"vqgan_training.num_steps": 9}, {"vqgan", "tokens", "renderer", "renderer_masked", "renderer_pixels",
                                           "vq_ar", "vq_masked", "vq_ar_epochs"}),
        ({"kmeans.num_clusters": 9}, {"codebook", "tokens", "prior", "renderer", "renderer_masked", "renderer_pixels"}),
        ({"sampling.prior.top_p": 0.5, "prior_training.log_every": 3, "previews": 0.1, "name": "other"}, set()),
        ({"pixels.depth": 1}, {"renderer_pixels"}),
        ({"renderer_kind": "masked"}, set()),
        ({"renderer_kind": "pixels"}, {"tokens"}),
    ],
)  # fmt: skip
def test_the_stages_that_a_setting_touches(settings, stages):
    from digit.runs.changes import STAGES

    before = tiny_recipe()
    wanted = with_settings(before, settings)
    assert {stage for stage in STAGES if touching(stage, before, wanted)} == stages


def test_every_setting_decides_a_stage_or_is_free():
    """A new field of the recipe must not change a run without making anything anew."""
    fields = set().union(*DECIDED_BY.values())
    roles = ROLES.values()
    others = {"renderer_kind", "codebook_probe"}  # which models there are; a measure beside the codebook
    for name in flat(Recipe()):
        deciding = name.partition(".")[0] in fields or any(decides(name, role, labels=role.labels) for role in roles)
        assert deciding or FREE_SETTING.fullmatch(f"recipe.{name}") or name in others, name


def test_the_seed_touches_every_stage(done):
    change = find_change(done, tiny_recipe(), tiny_recipe(seed=1).with_seed())
    assert not change.kept and not change.longer


def test_a_shorter_or_otherwise_changed_training_does_not_go_on():
    constant = with_settings(tiny_recipe(), {"prior_training.schedule": "constant"})
    longer = with_settings(constant, {"prior_training.num_steps": 9})
    assert lengthens("prior", touching("prior", constant, longer), constant, longer, by_more=False)
    assert not lengthens("prior", touching("prior", longer, constant), longer, constant, by_more=True)
    shuffled = [with_settings(recipe, {"prior.random_order": 0.5}) for recipe in (constant, longer)]
    assert not lengthens("prior", touching("prior", *shuffled), *shuffled, by_more=False)  # its orders end later
    assert lengthens("prior", touching("prior", *shuffled), *shuffled, by_more=True)
    deeper = with_settings(longer, {"prior.depth": 2})
    assert not lengthens("prior", touching("prior", constant, deeper), constant, deeper, by_more=True)
    cosine = with_settings(tiny_recipe(), {"prior_training.num_steps": 9})
    touched = touching("prior", tiny_recipe(), cosine)
    assert not lengthens("prior", touched, tiny_recipe(), cosine, by_more=False)
    assert lengthens("prior", touched, tiny_recipe(), cosine, by_more=True)


# -------------------------------------------------------------------- changed settings


def test_another_prior_keeps_the_rest_and_is_that_of_a_fresh_run(copy, tmp_path):
    recipe = with_settings(tiny_recipe(), {"prior.depth": 2})
    before = {stage: times(copy / stage) for stage in ("codebook", "vqgan", "tokens", "renderer")}
    run = run_in(copy, recipe)
    fit(run)
    assert before == {stage: times(copy / stage) for stage in before}
    changed, aside = run.notes
    assert (
        "prior.depth was 1, now 2. Made anew: prior (prior.depth); kept: codebook, vqgan, tokens, renderer" in changed
    )
    assert f"{copy / 'earlier' / '1'}" in aside
    fresh = tmp_path / "fresh"
    fit(run_in(fresh, recipe))
    assert_same(copy, fresh, "prior")
    assert_same(copy, fresh, "renderer")


def test_the_old_settings_bring_the_old_stages_back(copy, done):
    fit(run_in(copy, with_settings(tiny_recipe(), {"prior.depth": 2})))
    run = run_in(copy)
    assert "Brought back, made earlier with these settings" in run.notes[0] and "earlier: prior; kept" in run.notes[0]
    assert "made anew" not in run.notes[0].lower()
    assert run.is_done("prior")
    assert_same(copy, done, "prior")
    again = run_in(copy, with_settings(tiny_recipe(), {"prior.depth": 2}))
    assert again.is_done("prior") and weights(copy, "prior").keys() != weights(done, "prior").keys()


def test_a_missing_stage_is_brought_back_without_a_word_on_settings(copy):
    (copy / "earlier" / "1").mkdir(parents=True)
    (copy / "prior").rename(copy / "earlier" / "1" / "prior")
    write_json(copy / "earlier" / "1" / "config.json", read_json(copy / "config.json"))
    [said] = run_in(copy).notes
    assert said.startswith(f"{copy}: brought back, made earlier with these settings, from {copy / 'earlier'}: prior")


def test_other_sampling_makes_the_report_anew_and_keeps_the_one_of_before(copy):
    (copy / "report.html").write_text("before")
    run = run_in(copy, with_settings(tiny_recipe(), {"sampling.prior.top_p": 0.5}))
    told, aside = run.notes
    assert "sampling.prior.top_p was " in told and ", now 0.5. Made anew: samples and report; kept: codebook" in told
    assert (copy / "earlier" / "1" / "report.html").read_text() == "before" and f"{copy / 'earlier' / '1'}" in aside
    assert all(run.is_done(stage) for stage in ("codebook", "prior", "renderer"))
    assert not run_in(copy, with_settings(tiny_recipe(), {"sampling.prior.top_p": 0.5})).notes


def test_another_codebook_takes_the_vq_tokens_of_the_earlier_one(copy, tmp_path):
    recipe = with_settings(tiny_recipe(), {"kmeans.num_clusters": 9})
    fit(run_in(copy, recipe))
    assert os.path.samefile(copy / "tokens" / "vq.npy", copy / "earlier" / "1" / "tokens" / "vq.npy")
    fit(run_in(tmp_path / "fresh", recipe))
    for model in ("prior", "renderer"):
        assert_same(copy, tmp_path / "fresh", model)


def test_another_vqgan_keeps_the_prior(copy, tmp_path):
    recipe = with_settings(tiny_recipe(), {"vqgan_training.num_steps": 4})
    before = times(copy / "prior")
    fit(run_in(copy, recipe))
    assert before == times(copy / "prior")
    fit(run_in(tmp_path / "fresh", recipe))
    for model in ("prior", "renderer"):
        assert_same(copy, tmp_path / "fresh", model)


def test_what_is_half_trained_goes_aside_too(tmp_path, monkeypatch):
    out, recipe = tmp_path / "run", saved_often("cosine")
    stop_at(monkeypatch, 3, lambda: run_in(out, recipe).train_model("prior"))
    changed = with_settings(recipe, {"prior.embed_dim": 16})
    run_in(out, changed).train_model("prior")
    assert list((out / "earlier" / "1" / "prior" / "checkpoints").glob("step_*"))
    run_in(out, recipe).train_model("prior")  # goes on with the half that was set aside
    fresh = run_in(tmp_path / "fresh", recipe)
    fresh.train_model("prior")
    assert_same(out, fresh.out, "prior")


def test_the_python_interface_refuses_unless_asked(copy):
    with pytest.raises(DigitError, match=r"prior.depth = 1, now asked for 2"):
        Run(with_settings(tiny_recipe(), {"prior.depth": 2}), SHAPES, copy)
    assert not (copy / "earlier").exists()


def test_other_images_are_refused_and_nothing_moves(copy):
    with pytest.raises(DigitError, match=r"was made with other images.* than shapes holds now \(or .*digit info"):
        Run(tiny_recipe(), "shapes:num=25,size=32", copy, reuse_unchanged=True)
    config = read_json(copy / "config.json")
    write_json(copy / "config.json", config | {"data": config["data"] | {"name": "photos"}})
    with pytest.raises(DigitError, match=r"than shapes holds now, from photos \(or "):
        Run(tiny_recipe(), "shapes:num=25,size=32", copy, reuse_unchanged=True)
    assert not (copy / "earlier").exists()


def test_a_kill_between_the_moves_loses_nothing(copy, done, monkeypatch):
    """The second of two moves fails; the old command finds both stages, the new one makes both anew."""
    recipe, real, moved = with_settings(tiny_recipe(), {"kmeans.num_clusters": 9}), os.replace, []

    def replace_once(source, target):
        if Path(target).parent.name == "1" and Path(target).name in ("codebook", "tokens", "prior", "renderer"):
            moved.append(source)
            if len(moved) == 2:
                raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("digit.runs.changes.os.replace", replace_once)
        run_in(copy, recipe)
    assert not (copy / "codebook").exists()
    run = run_in(copy)
    assert all(run.is_done(stage) for stage in ("codebook", "tokens", "prior", "renderer"))
    assert_same(copy, done, "renderer")


# -------------------------------------------------------------------- longer runs


def stop_at(monkeypatch, step: int, work) -> None:
    """Run `work` until a batch of this step is fetched."""
    real = Run.batches

    def stopping(self, name, cfg):
        made = real(self, name, cfg)

        class Stop(type(made)):
            def part(self, at, start, stop):
                if at == step:
                    raise Stopped("here")
                return super().part(at, start, stop)

        return Stop(**vars(made))

    with monkeypatch.context() as patch:
        patch.setattr(Run, "batches", stopping)
        with pytest.raises(Stopped):
            work()


def saved_often(schedule: str) -> Recipe:
    settings = {f"{name}_training.schedule": schedule for name in ("prior", "renderer")}
    return with_settings(tiny_recipe(), settings | {f"{name}_training.save_every": 2 for name in ("prior", "renderer")})


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_a_lengthened_run_is_a_fresh_long_one_where_the_schedule_does_not_see_the_end(tmp_path, monkeypatch, schedule):
    """Typed as a number of updates, without --more; killed on the way."""
    recipe = saved_often(schedule)
    longer = with_settings(recipe, {"prior_training.num_steps": 8, "renderer_training.num_steps": 8})
    fit(run_in(tmp_path / "run", recipe))
    run = run_in(tmp_path / "run", longer)
    assert "Goes on: prior, renderer" in run.notes[0]
    assert run.notes[1].startswith("updates: prior from 4 to 8, renderer from 4 to 8, as in a new run of that length")
    assert not run.is_done("prior") and (tmp_path / "run" / "earlier" / "1" / "prior" / "model.json").is_file()
    stop_at(monkeypatch, 7, lambda: fit(run))
    fit(run_in(tmp_path / "run", longer))
    fit(run_in(tmp_path / "fresh", longer))
    for model in ("prior", "renderer"):
        assert_same(tmp_path / "run", tmp_path / "fresh", model)
        steps = [line["step"] for line in read_log(tmp_path / "run" / model / "log.jsonl") if "loss" in line]
        assert steps == [2, 4, 6, 8]


def lengthen(out: Path, more: str) -> Run:
    longer = with_more(read_recipe(out), out, more)
    return run_in(out, longer.recipe, lengthened=longer.record)


def test_more_goes_on_under_a_cosine_schedule(tmp_path, monkeypatch):
    """Killed or not: the same. A new run of 8 updates is another one, whose first updates had other rates."""
    outs = [tmp_path / "whole", tmp_path / "killed"]
    for out in outs:
        fit(run_in(out, saved_often("cosine")))
    whole, killed = (lengthen(out, "2x") for out in outs)
    assert "From here on the learning rate follows the longer run's cosine" in whole.notes[1]
    fit(whole)
    stop_at(monkeypatch, 7, lambda: fit(killed))
    fit(lengthen(outs[1], "2x"))  # the same command again
    for model in ("prior", "renderer"):
        assert_same(*outs, model)
        rates = [line["lr"] for line in read_log(outs[0] / model / "log.jsonl") if "lr" in line]
        assert len(rates) == 4 and rates[2] > rates[1]  # at updates 2, 4, 6, 8
    fresh = tmp_path / "fresh"
    fit(run_in(fresh, whole.recipe))
    assert any(
        not torch.equal(value, weights(fresh, "prior")[name]) for name, value in weights(outs[0], "prior").items()
    )


def test_more_of_a_renderer_straight_to_pixels(tmp_path):
    out = tmp_path / "run"
    fit(run_in(out, pixel_recipe()))
    run = lengthen(out, "6")
    fit(run)
    assert run.recipe.pixels_training.num_steps == 10 and run.recipe.prior_training.num_steps == 10
    assert max(line["step"] for line in read_log(out / "renderer_pixels" / "log.jsonl")) == 10


def test_the_shorter_run_comes_back_and_can_be_lengthened_again(tmp_path):
    out, recipe = tmp_path / "run", saved_often("cosine")
    fit(run_in(out, recipe))
    short = weights(out, "prior")
    fit(lengthen(out, "2x"))
    run = run_in(out, recipe)
    assert run.is_done("prior") and all(
        torch.equal(value, short[name]) for name, value in weights(out, "prior").items()
    )
    (out / "lengthened.json").unlink()
    fit(lengthen(out, "1.5x"))
    assert max(line["step"] for line in read_log(out / "prior" / "log.jsonl")) == 6


def test_what_more_counts_from(tmp_path):
    out, recipe = tmp_path, tiny_recipe()
    with pytest.raises(DigitError, match="holds no run that could go on"):
        with_more(recipe, out, "2x")
    (out / "config.json").write_text("{}")
    steps = lambda longer: longer.recipe.prior_training.num_steps  # noqa: E731
    first = with_more(recipe, out, "2x")
    assert steps(first) == 8 and first.recipe.renderer_training.num_steps == 8
    (out / "lengthened.json").write_text(json.dumps(first.record))
    assert steps(with_more(first.recipe, out, "2x")) == 8  # the same command again, after a kill
    assert steps(with_more(first.recipe, out, "3x")) == 12  # another one before it is finished
    finish_lengthening(out)
    second = with_more(first.recipe, out, "100")
    assert steps(second) == 108 and second.record["first"]["prior_training.num_steps"] == 4
    for more, message in (
        ("1x", "more than 1x"),
        ("0", "more than 1x"),
        ("twice", "a factor such as"),
        ("-3", "such as"),
    ):
        with pytest.raises(DigitError, match=message):
            with_more(recipe, out, more)


def test_a_recipe_that_is_typed_again_keeps_the_length(tmp_path):
    recipe = tiny_recipe()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "lengthened.json").write_text(json.dumps(with_more(recipe, tmp_path, "2x").record))
    assert keep_length(recipe, tmp_path, []).prior_training.num_steps == 8
    assert keep_length(recipe, tmp_path, ["prior_training.num_steps"]).prior_training.num_steps == 4
    assert (
        keep_length(replace(recipe, prior_training=replace(recipe.prior_training, num_steps=5)), tmp_path, []) != recipe
    )


def test_masked_steps_are_lengthened(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    recipe = tiny_recipe(renderer_kind="masked", masked_steps=6)
    longer = with_more(recipe, tmp_path, "2x").recipe
    assert longer.masked_steps == 12 and longer.renderer_training.num_steps == 4


# -------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(tiny_recipe())))))
    return str(path)


def test_a_second_command_says_what_it_keeps_and_needs_no_old_options(few_scenes, tmp_path, settings, capsys):
    out = tmp_path / "run"
    assert main(["fit", SHAPES, "--recipe", "demo", "--config", settings, "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["fit", SHAPES, "--out", str(out), "--prior.depth", "2"]) == 0
    said = capsys.readouterr().err
    assert "note: " in said and "prior.depth was 1, now 2" in said and "kept: codebook, vqgan, tokens, renderer" in said
    assert read_recipe(out).prior.depth == 2 and read_recipe(out).kmeans.num_clusters == 12
    assert (out / "earlier" / "1" / "report.html").is_file()
    assert main(["fit", SHAPES, "--out", str(out), "--more", "2x"]) == 0
    said = capsys.readouterr().err
    assert (
        "updates: prior from 4 to 8, renderer from 4 to 8" in said
        and read_json(out / "lengthened.json")["done"] is True
    )
    assert main(["fit", SHAPES, "--out", str(out)]) == 0
    assert "note: " not in capsys.readouterr().err
    assert main(["fit", SHAPES, "--out", str(out), "--more", "fast"]) == 2
    assert "--more is fast: give a factor such as 2x" in capsys.readouterr().err
