"""What models train on: stored tokens in turn, or fresh crops; by parts, resumable, without the held-out images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import SHAPES, tiny_recipe
from toy_images import NoiseSource

from digit.data.shapes import ShapesSource
from digit.errors import DigitError, Stopped
from digit.runs.batches import Annealed, NoisyPrefix, RandomOrder
from digit.runs.checks import unchanged_parts
from digit.runs.fit import Run, near_codes
from digit.runs.roles import ROLES
from digit.runtime.files import load_tensors, read_json, write_json
from digit.training.log import read_log

SIZE = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Run:
    run = Run(tiny_recipe(), SHAPES, tmp_path_factory.mktemp("base") / "run")
    run.write_tokens()
    return run


def beside(base: Run, out, **changes) -> Run:
    """A run with the base's codebook, VQGAN and tokens."""
    reuse = {part: base.out / part for part in ("codebook", "vqgan", "tokens")}
    return Run(replace(tiny_recipe(), **changes), SHAPES, out, reuse=reuse)


@pytest.fixture(autouse=True)
def no_worker_processes(monkeypatch):
    """They take a second to start; test_fresh.py and test_torchrun.py have them."""
    monkeypatch.setattr("digit.data.fresh.default_workers", lambda: 0)


@pytest.fixture
def fresh(base, tmp_path) -> Run:
    return beside(base, tmp_path / "fresh", training_crops="fresh")


def get_batches(run: Run, model: str):
    return run.batches(model, run.training_config(model))


@pytest.mark.parametrize("model", ["prior", "renderer", "vq_ar"])
def test_the_first_epoch_of_fresh_crops_is_the_store(base, fresh, model):
    """24 images in batches of 8: three steps of the same tokens; from the fourth on other crops."""
    stored, made = get_batches(base, model), get_batches(fresh, model)
    for step in range(3):
        one, two = stored(step), made(step)
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert (value is None and two[name] is None) or torch.equal(value, two[name]), name
        assert np.array_equal(stored.rows(step), made.rows(step))
    later = [torch.cat([batches(step)["target"] for step in range(3, 6)]) for batches in (stored, made)]
    assert not torch.equal(*later)
    made.close()


def test_only_the_tokenizers_of_a_role_are_used(base, fresh, monkeypatch):
    monkeypatch.setattr(type(fresh.train_vqgan()), "encode", None)  # the prior needs no VQ tokens
    made = get_batches(fresh, "prior")
    assert set(made.tokenizers) == {"discriminative"} and made(0)["target"].shape == (8, 4)
    made.close()


def test_parts_make_the_whole(base, fresh):
    for batches in (get_batches(base, "renderer"), get_batches(fresh, "renderer")):
        whole, parts = batches(1), [batches.part(1, start, start + 4) for start in (0, 4)]
        for name in ("target", "prefix"):
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
        batches.close()


def train_whole_and_cut(base, tmp_path, monkeypatch, name: str, settings) -> list[Run]:
    """A model trained without a stop, and one that is stopped at step 5 and begun again: equal weights and logs."""
    whole = beside(base, tmp_path / "whole", **settings)
    whole.train_model(name)
    cut = beside(base, tmp_path / "cut", **settings)
    real = Run.batches

    def stopping(self, name, cfg):
        made = real(self, name, cfg)

        class Stop(type(made)):
            def part(self, step, start, stop):
                if step == 5:
                    raise Stopped("here")
                return super().part(step, start, stop)

        return Stop(**vars(made))

    with monkeypatch.context() as patch:
        patch.setattr(Run, "batches", stopping)
        with pytest.raises(Stopped):
            cut.train_model(name)
    beside(base, tmp_path / "cut", **settings).train_model(name)
    first, second = (load_tensors(run.out / name / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(second[key], value) for key, value in first.items())
    logs = [[line.get("val_nll") for line in read_log(run.out / name / "log.jsonl")] for run in (whole, cut)]
    assert logs[0] == logs[1] and any(logs[0])
    return [whole, cut]


def test_fresh_training_resumes_bit_for_bit(base, tmp_path, monkeypatch):
    """Stopped in its second epoch and begun again: the weights and the log of a run that was not."""
    training = replace(tiny_recipe().prior_training, num_steps=8, batch_size=8, save_every=2)
    settings = dict(training_crops="fresh", prior_training=training, validation_fraction=0.25)
    train_whole_and_cut(base, tmp_path, monkeypatch, "prior", settings)


def test_held_out_images_are_in_no_batch(base, tmp_path):
    held = [0, 4, 8, 12, 16, 20]
    for crops in ("stored", "fresh"):
        run = beside(base, tmp_path / crops, training_crops=crops, validation_fraction=0.25)
        batches = get_batches(run, "prior")
        seen = np.unique([batches.rows(step) for step in range(9)])
        assert seen.tolist() == [image for image in range(24) if image not in held]
        assert np.flatnonzero(run.held_out_rows()).tolist() == held
        batches.close()


def test_crops_behind_tokens_are_found_past_broken_images_and_other_seeds(tmp_path):
    """Pixels of stored rows come of the image and the seed that the store was made with."""
    settings = dict(crops_per_image=2, max_bad_fraction=0.5, class_conditional=False)
    kmeans = replace(tiny_recipe().kmeans, num_clusters=4)
    source = NoiseSource(17, broken=(0, 3))
    first = Run(tiny_recipe(**settings, kmeans=kmeans), source, tmp_path / "first")
    store = first.write_tokens()
    assert store.num_images == 15 and first.stored_images.tolist() == [1, 2, *range(4, 17)]
    reuse = {part: first.out / part for part in ("codebook", "vqgan", "tokens")}
    other = Run(tiny_recipe(**settings, kmeans=kmeans, seed=9), source, tmp_path / "other", reuse=reuse)
    rows = np.array([0, 5, 29, 4])
    tokens = other.tokenizer().encode(other.crops_of(rows))
    assert np.array_equal(tokens, store.discriminative[rows])


def test_pixels_of_fresh_crops_come_along(base, fresh, monkeypatch):
    tiny_config = fresh.sequence_config("renderer")
    role = replace(ROLES["renderer"], name="renderer_pixels", target="pixels")
    monkeypatch.setitem(ROLES, role.name, role)
    monkeypatch.setattr(Run, "sequence_config", lambda self, name: tiny_config)
    made = fresh.batches("renderer_pixels", fresh.training_config("prior"))
    batch = made(4)
    assert batch["target"].shape == (8, 3, SIZE, SIZE) and batch["target"].dtype == torch.uint8
    assert torch.equal(fresh.tokenizer().encode(batch["target"]), batch["prefix"])
    made.close()


def test_fresh_crops_need_crops_that_differ(tmp_path):
    still = replace(tiny_recipe().preprocess, random_crop=False, flip=False)
    with pytest.raises(DigitError, match="training_crops is fresh, but all crops of an image would be the same"):
        Run(tiny_recipe(training_crops="fresh", preprocess=still), ShapesSource(24), tmp_path)


def test_other_training_crops_keep_tokenizers_and_tokens():
    assert unchanged_parts(["recipe.training_crops"]) == ["codebook", "vqgan", "tokens"]


def test_a_noisy_prefix_swaps_near_codes_ever_less(base):
    quiet = get_batches(base, "renderer")
    near = near_codes(base.fit_codebook())
    vectors = base.fit_codebook().embed(torch.arange(len(near)))
    assert torch.equal(near[:, 0], torch.cdist(vectors, vectors).fill_diagonal_(torch.inf).argmin(1))
    noisy = NoisyPrefix(quiet, near, 0.5, 10, quiet.read.batch_size, 0)
    shares = []
    for step in (0, 5, 10):
        one, two = quiet(step), noisy(step)
        swapped = one["prefix"] != two["prefix"]
        shares.append(float(swapped.float().mean()))
        assert torch.equal(one["target"], two["target"])
        for old, new in zip(one["prefix"][swapped], two["prefix"][swapped], strict=True):
            assert new in near[old]
        assert torch.equal(noisy.part(step, 2, 5)["prefix"], two["prefix"][2:5])  # as on several processes
        assert torch.equal(noisy(step)["prefix"], two["prefix"])
    assert shares[0] > 0.4 and 0.1 < shares[1] < 0.4 and shares[2] == 0


def test_a_run_trains_with_a_noisy_prefix(base, tmp_path):
    recipe = tiny_recipe()
    noisy = beside(base, tmp_path / "noisy", renderer=replace(recipe.renderer, prefix_noise=0.4))
    config = noisy.training_config("renderer")
    assert isinstance(noisy.training_batches("renderer", config), NoisyPrefix)
    assert not isinstance(noisy.training_batches("prior", config), NoisyPrefix)
    assert not isinstance(noisy.batches("renderer", config), NoisyPrefix)  # validation sees the images' own tokens


# -------------------------------------------------------------------- random orders


def test_a_rate_falls_in_a_straight_line():
    rate = Annealed(0.8, 4, 8)
    assert [rate(step) for step in (0, 3, 4, 6, 8, 20)] == [0.8, 0.8, 0.8, 0.4, 0.0, 0.0]
    assert [Annealed(1.0, 5, 5)(step) for step in (4, 5, 6)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("model", ["prior", "renderer", "vq_ar"])
def test_some_sequences_get_an_order_ever_fewer(base, model):
    quiet = get_batches(base, model)
    num = base.sequence_config(model).target_places
    orders = RandomOrder(quiet, Annealed(0.9, 4, 8), num, quiet.read.batch_size, 0)
    raster, shares = torch.arange(num), []
    for step in range(8):
        batch = orders(step)
        assert torch.equal(batch["target"], quiet(step)["target"])
        order = batch["order"]
        assert order.shape == (8, num) and torch.equal(order.sort(1).values, raster.expand(8, -1))
        shares.append(float((order != raster).any(1).float().mean()))
        assert torch.equal(orders.part(step, 2, 5)["order"], order[2:5])  # as on several processes
        assert torch.equal(orders(step)["order"], order)
    assert np.mean(shares[:4]) > 0.6 and np.mean(shares[:4]) > np.mean(shares[5:])
    assert "order" not in orders(8) and not torch.equal(orders(0)["order"], orders(1)["order"])


def test_training_in_random_orders_resumes_bit_for_bit_and_ends_in_raster_order(base, tmp_path, monkeypatch):
    recipe = tiny_recipe()
    size = replace(recipe.renderer, random_order=1.0, random_order_anneal=(0.25, 1.0), prefix_noise=0.3)
    size = replace(size, rotary="2d", tied_embeddings=True)
    training = replace(recipe.renderer_training, num_steps=8, batch_size=8, save_every=2)
    settings = dict(renderer=size, renderer_training=training, validation_fraction=0.25, informed_start=True)
    whole, _ = train_whole_and_cut(base, tmp_path, monkeypatch, "renderer", settings)
    batches = whole.training_batches("renderer", whole.training_config("renderer"))
    assert isinstance(batches, RandomOrder) and isinstance(batches.batches, NoisyPrefix)
    assert batches.rate == Annealed(1.0, 2, 8)
    assert not isinstance(whole.training_batches("prior", whole.training_config("prior")), RandomOrder)
    saved, state = (
        read_json(whole.out / "renderer" / "model.json"),
        load_tensors(whole.out / "renderer" / "model.safetensors"),
    )
    assert saved["random_order"] is False and "next_positions" not in state and "head.weight" not in state
    assert saved["rotary"] == "2d" and (saved["prefix_rows"], saved["target_rows"]) == (2, 4)
    assert whole.sequence_config("renderer").random_order and not whole.sequence_config("renderer_masked").random_order
    reuse = {part: base.out / part for part in ("codebook", "vqgan", "tokens")} | {"renderer": whole.out / "renderer"}
    taken = Run(replace(recipe, **settings), SHAPES, tmp_path / "taken", reuse=reuse).train_model("renderer")
    assert all(torch.equal(value, state[name]) for name, value in taken.state_dict().items())


def test_a_folder_from_before_a_setting_goes_on_and_is_reused(base, tmp_path, monkeypatch):
    """config.json and model.json of an older version lack younger settings: they had the defaults."""
    younger = ("rotary", "learned_positions", "tied_embeddings", "random_order")
    real = write_json

    def older(path, value):
        if path.name == "model.json":
            value = {name: entry for name, entry in value.items() if name not in younger}
        if path.parent.name == "checkpoints":
            value = value | {"about": {n: entry for n, entry in value["about"].items() if n not in younger}}
        real(path, value)

    training = replace(tiny_recipe().prior_training, num_steps=8, batch_size=8, save_every=2)
    settings = dict(prior_training=training, validation_fraction=0.25)
    monkeypatch.setattr("digit.pipeline.manifest.write_json", older)
    monkeypatch.setattr("digit.training.config.write_json", older)
    whole, _ = train_whole_and_cut(base, tmp_path, monkeypatch, "prior", settings)
    assert "rotary" not in read_json(whole.out / "prior" / "model.json")
    reuse = {part: base.out / part for part in ("codebook", "vqgan", "tokens")} | {"prior": whole.out / "prior"}
    Run(replace(tiny_recipe(), **settings), SHAPES, tmp_path / "next", reuse=reuse).train_model("prior")
