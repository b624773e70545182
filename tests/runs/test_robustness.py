"""Noisy inputs and code losses in a run: what is noisy and for how long, what stays in the folders, what is refused."""

from dataclasses import asdict, replace

import pytest
import torch
from tiny import SHAPES, pixel_recipe, tiny_recipe

from digit.errors import DigitError, Stopped
from digit.models.sequence import training_flops
from digit.pipeline.manifest import load_sequence_model
from digit.planning.work import Work
from digit.runs.batches import NoisyInputs
from digit.runs.changes import find_change
from digit.runs.checks import check_recipe, check_robustness, unused_settings, vqgan_config
from digit.runs.fit import Run, near_codes, near_vectors
from digit.runs.recipes import Recipe, with_settings
from digit.runtime.config_json import from_json
from digit.runtime.files import load_tensors, plain, read_json
from digit.runtime.settings import refuse_unused
from digit.training.config import TrainConfig
from digit.training.log import read_log

LOSSES = {"current_code_weight": 1.0, "next_code_weight": 1.0}
ALL = {"input_noise": 0.8, **LOSSES}


def both(settings: dict) -> dict:
    """Settings of both stages' training, by dotted name."""
    return {f"{stage}_training.{name}": value for stage in ("prior", "renderer") for name, value in settings.items()}


def recipe_with(settings: dict, **changes) -> Recipe:
    return with_settings(tiny_recipe(**changes), both(settings))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Run:
    run = Run(tiny_recipe(), SHAPES, tmp_path_factory.mktemp("base") / "run")
    run.write_tokens()
    return run


def beside(base: Run, out, recipe: Recipe) -> Run:
    """A run with the base's codebook, VQGAN and tokens."""
    return Run(recipe, SHAPES, out, reuse={part: base.out / part for part in ("codebook", "vqgan", "tokens")})


@pytest.fixture(autouse=True)
def no_worker_processes(monkeypatch):
    monkeypatch.setattr("digit.data.fresh.default_workers", lambda: 0)


# -------------------------------------------------------------------- noise


@pytest.mark.parametrize("model", ["prior", "renderer", "vq_ar"])
def test_inputs_become_near_codes_ever_less(base, model):
    quiet = base.batches(model, base.training_config(model))
    vectors = base.code_vectors(model)
    near = near_vectors(vectors)
    noisy = NoisyInputs(quiet, near, vectors.shape[1], 0.8, 12, quiet.read.batch_size, 0)
    assert [noisy.share(step) for step in (0, 3, 6, 9, 11)] == pytest.approx([0.8, 0.8 * 2 / 3, 0.8 / 3, 0, 0])
    for step in (0, 5, 9):
        one, two = quiet(step), noisy(step)
        assert torch.equal(one["target"], two["target"]) and two.keys() == one.keys() | {"seen"}
        swapped = two["seen"] != one["target"]
        assert swapped.any() == (step < 9)
        for old, new in zip(one["target"][swapped], two["seen"][swapped], strict=True):
            assert new in near[old]
        assert torch.equal(noisy.part(step, 2, 5)["seen"], two["seen"][2:5])  # as on several processes
        assert torch.equal(noisy(step)["seen"], two["seen"])
    assert not torch.equal(noisy(0)["seen"], noisy(1)["seen"])


class Constant:
    """Batches of one token."""

    def __init__(self, rows: int, length: int) -> None:
        self.target = torch.full((rows, length), 3)

    def part(self, step, start, stop):
        return {"target": self.target[start:stop]}


def test_shares_of_images_are_uniform_up_to_the_largest():
    rows, length, codes = 400, 500, 50
    noisy = NoisyInputs(Constant(rows, length), None, codes, 0.6, 100, rows, 1)
    for step in (0, 30):
        replaced = noisy(step)["seen"] != 3
        shares = replaced.float().mean(1) * codes / (codes - 1)  # one of 50 draws gives the token itself
        largest = 0.6 * (1 - step / 75)
        assert shares.max() < largest + 0.07 and shares.mean() == pytest.approx(largest / 2, abs=0.02)
        assert shares.std() == pytest.approx(largest / 12**0.5, abs=0.02)
    assert set(noisy(0)["seen"].flatten().tolist()) == set(range(codes))
    assert torch.equal(noisy(75)["seen"], noisy.batches.target)


def test_near_codes_of_a_large_codebook_are_found_in_parts(base, monkeypatch):
    whole = near_codes(base.fit_codebook())
    monkeypatch.setattr("digit.runs.fit.COMPARED_TOGETHER", 5)
    assert torch.equal(near_codes(base.fit_codebook()), whole)
    assert torch.equal(whole, near_vectors(base.code_vectors("prior")))


def test_codes_of_several_levels_stay_in_theirs():
    near = torch.tensor([[[1], [2], [0]], [[2], [0], [1]]])  # (L, K, n): another permutation in each level
    noisy = NoisyInputs(Constant(64, 8), near, 3, 1.0, 10, 64, 0)
    noisy.batches.target.fill_(1)
    seen = noisy(0)["seen"]
    assert set(seen[:, ::2].flatten().tolist()) == {1, 2} and set(seen[:, 1::2].flatten().tolist()) == {1, 0}


def test_a_run_has_the_noise_that_its_settings_name(base, tmp_path):
    run = beside(base, tmp_path / "one", with_settings(tiny_recipe(), {"renderer_training.input_noise": 0.5}))
    for model, is_noisy in (("prior", False), ("renderer", True), ("vq_ar", True)):
        cfg = run.training_config(model)
        made = run.training_batches(model, cfg)
        assert isinstance(made, NoisyInputs) == is_noisy
        assert not isinstance(run.batches(model, cfg), NoisyInputs)  # validation sees the images' own tokens
        if is_noisy:
            assert made.near is not None and made.rate == 0.5 and made.num_steps == cfg.num_steps
            assert made.near.shape == (16, 8)
    uniform = {"renderer_training.input_noise_codes": "uniform", "renderer_training.input_noise": 1.0}
    run = beside(base, tmp_path / "two", with_settings(tiny_recipe(), uniform))
    made = run.training_batches("renderer", run.training_config("renderer"))
    assert made.near is None and made.vocab_size == 16


# -------------------------------------------------------------------- a trained model


KINDS = {
    "prior": {},
    "renderer": {},
    "aligned": {"renderer.conditioning": "aligned", "renderer.prefix_noise": 0.3},
    "vq_ar": {},
    "levels": {"quantizer": "residual_kmeans", "residual_kmeans.num_levels": 2, "residual_kmeans.num_clusters": 6},
    "fresh": {"training_crops": "fresh"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_finished_folder_has_no_networks_and_a_resumed_run_is_the_same(base, tmp_path, monkeypatch, kind):
    model = {"aligned": "renderer", "levels": "prior", "fresh": "renderer"}.get(kind, kind)
    recipe = with_settings(recipe_with(ALL | {"num_steps": 4, "save_every": 2, "ema_decay": 0.9}), KINDS[kind])

    def make(out) -> Run:
        if kind != "levels":
            return beside(base, out, recipe)
        return Run(recipe, SHAPES, out, reuse={"vqgan": base.out / "vqgan", "vq_tokens": base.out / "tokens"})

    run = make(tmp_path / "whole")
    trained = run.train_model(model)
    folder = run.out / model
    about, tensors = read_json(folder / "model.json"), load_tensors(folder / "model.safetensors")
    assert about == plain(run.sequence_config(model).to_dict())
    assert not [name for name in tensors if "code_heads" in name]
    line = read_log(folder / "log.jsonl")[-1]
    assert {"current_cosine", "next_cosine", "nll"} <= line.keys()

    loaded = load_sequence_model(folder, "model")
    batch = run.batches(model, run.training_config(model))(0)
    inputs = {name: value for name, value in batch.items() if name != "target"}
    assert torch.equal(loaded(batch["target"], **inputs), trained(batch["target"], **inputs))

    cut, real = make(tmp_path / "cut"), Run.training_batches

    def stopping(self, name, cfg):
        made = real(self, name, cfg)

        class Stop(type(made)):
            def part(self, step, start, stop):
                if step == 3:
                    raise Stopped("here")
                return super().part(step, start, stop)

        return Stop(**vars(made))

    with monkeypatch.context() as patch:
        patch.setattr(Run, "training_batches", stopping)
        with pytest.raises(Stopped):
            cut.train_model(model)
    again = make(tmp_path / "cut")
    again.train_model(model)
    second = load_tensors(again.out / model / "model.safetensors")
    assert second.keys() == tensors.keys() and all(torch.equal(second[name], tensors[name]) for name in tensors)


def test_each_setting_changes_the_training_and_none_leaves_it(base, tmp_path):
    weights = {}
    for name, settings in (
        ("plain", {}),
        ("zero", dict.fromkeys(ALL, 0.0)),
        ("noise", {"input_noise": 0.8}),
        ("uniform", {"input_noise": 0.8, "input_noise_codes": "uniform"}),
        ("current", {"current_code_weight": 1.0}),
        ("next", {"next_code_weight": 1.0}),
    ):
        run = beside(
            base, tmp_path / name, with_settings(tiny_recipe(), {f"prior_training.{k}": v for k, v in settings.items()})
        )
        run.train_model("prior")
        tensors = load_tensors(run.out / "prior" / "model.safetensors")
        weights[name] = torch.cat([value.flatten() for value in tensors.values()])
    assert torch.equal(weights.pop("zero"), weights["plain"])
    names = list(weights)
    assert not [(a, b) for i, a in enumerate(names) for b in names[:i] if torch.equal(weights[a], weights[b])]


def test_flops_count_the_networks_in_plan_and_run(base, tmp_path):
    run = beside(base, tmp_path / "run", recipe_with(LOSSES))
    work = Work(run.recipe, run.num_classes)
    for model in ("prior", "renderer", "vq_ar"):
        plain = training_flops(run.sequence_config(model))
        assert run.flops_per_image(model) == work.training_flops(model) > plain
        assert base.flops_per_image(model) == plain
    spent = [sum(r._training_flops(m) for m in ("prior", "renderer")) for r in (run, base)]
    assert spent[0] > spent[1]
    cfg = run.training_config("vq_ar")  # as many FLOPs as prior and renderer, networks and all
    assert cfg.num_steps == round(spent[0] / (run.flops_per_image("vq_ar") * cfg.batch_size))


# -------------------------------------------------------------------- what is refused, what is made again


def check(recipe: Recipe) -> None:
    check_recipe(
        recipe, chosen=(), reuse={}, vqgan=vqgan_config(recipe), num_images=10_000, num_classes=10,
        num_processes=1, gpu=False,
    )  # fmt: skip


@pytest.mark.parametrize("setting", ["input_noise", "current_code_weight", "next_code_weight"])
def test_masked_models_cannot_have_them(setting):
    recipe = with_settings(tiny_recipe(renderer_kind="masked"), {f"renderer_training.{setting}": 0.5})
    says = rf"renderer_training\.{setting} is 0.5, but renderer_masked is a masked model, and only next-token models"
    with pytest.raises(DigitError, match=says):
        check(recipe)
    with pytest.raises(DigitError, match=rf"renderer_training\.{setting}.*only next-token models have it"):
        refuse_unused(recipe, [f"renderer_training.{setting}"], unused_settings(recipe))
    ar = replace(recipe, renderer_kind="ar")
    check(ar)
    with pytest.raises(DigitError, match="vq_masked is a masked model"):
        check_robustness(ar, "vq_masked")


def test_a_masked_baseline_is_refused_before_it_trains(base, tmp_path):
    run = beside(base, tmp_path / "run", recipe_with({"input_noise": 0.5}))
    with pytest.raises(DigitError, match=r"input_noise is 0.5, but renderer_masked is a masked model"):
        run.train_model("renderer_masked")


def test_layers_that_a_model_lacks_and_settings_that_nothing_reads_are_refused():
    recipe = with_settings(tiny_recipe(), {"prior_training.next_code_weight": 1.0, "prior_training.next_code_layer": 2})
    with pytest.raises(DigitError, match=r"prior_training\.next_code_layer is 2: it must be at most 1, the blocks"):
        check(recipe)
    for name, says in (
        ("input_noise_codes", "set renderer_training.input_noise above 0"),
        ("current_code_layer", "set renderer_training.current_code_weight above 0"),
        ("next_code_layer", "set renderer_training.next_code_weight above 0"),
    ):
        with pytest.raises(DigitError, match=says):
            refuse_unused(recipe, [f"renderer_training.{name}"], unused_settings(recipe))
    refuse_unused(recipe, ["prior_training.next_code_layer"], unused_settings(recipe))
    pixels = pixel_recipe()
    with pytest.raises(DigitError, match="renderer_kind is pixels: set pixels_training instead"):
        refuse_unused(pixels, ["renderer_training.input_noise"], unused_settings(pixels))


def test_which_stages_they_decide(tmp_path):
    for stage in ("prior", "renderer"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "log.jsonl").touch()
    before = recipe_with({"schedule": "constant"})
    noisy = with_settings(before, {"renderer_training.input_noise": 0.5})
    assert find_change(tmp_path, before, noisy).remade == {"renderer": ["renderer_training.input_noise"]}
    aligned = with_settings(before, {"prior_training.next_code_weight": 0.5})
    assert find_change(tmp_path, before, aligned).remade == {"prior": ["prior_training.next_code_weight"]}
    longer = {"renderer_training.num_steps": 8}
    assert find_change(tmp_path, before, with_settings(before, longer)).longer == ["renderer"]
    assert find_change(tmp_path, noisy, with_settings(noisy, longer)).remade == {"renderer": [*longer]}  # noise sees it
    assert find_change(tmp_path, noisy, with_settings(noisy, longer), by_more=True).longer == ["renderer"]
    losses = with_settings(before, both(LOSSES))
    assert find_change(tmp_path, losses, with_settings(losses, longer)).longer == ["renderer"]


def test_settings_of_older_runs_load():
    saved = plain(asdict(TrainConfig()))
    for name in ("input_noise", "input_noise_codes", *LOSSES, "current_code_layer", "next_code_layer"):
        del saved[name]
    assert from_json(TrainConfig, plain(asdict(TrainConfig())) | saved, "x") == TrainConfig()
