"""The whole pipeline on a few rendered scenes: fit, resume, save, load, draw, complete."""

from dataclasses import replace

import pytest
import torch
from tiny import SHAPES, tiny_recipe

from digit.errors import DigitError, MismatchError
from digit.models.sequence import training_flops
from digit.pipeline.pipeline import DigitPipeline, kept_tokens
from digit.runs.fit import Run, fit
from digit.runs.roles import ROLES
from digit.runtime.files import differences


@pytest.fixture(scope="module")
def pipe(run) -> DigitPipeline:
    return DigitPipeline.from_pretrained(run.out)


def test_shapes_and_types_of_the_python_interface(pipe):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens, vq_tokens = pipe.tokenizer.encode(images), pipe.vq.encode(images)
    assert tokens.shape == (3, 4) and vq_tokens.shape == (3, 16) and tokens.dtype == vq_tokens.dtype == torch.int64
    assert pipe.vq.decode(vq_tokens).shape == (3, 3, 32, 32) and pipe.vq.decode(vq_tokens).dtype == torch.uint8
    assert pipe.prior(tokens, labels=None).shape == (3, 4, 12)
    assert pipe.renderer(vq_tokens, prefix=tokens).shape == (3, 16, 16)
    assert pipe.generate(num=5, seed=0).shape == (5, 3, 32, 32)


def test_an_image_depends_on_its_seed_and_label_alone(pipe):
    together = pipe.generate(num=6, labels=[1, 2, 3], seed=10, batch_size=6)
    alone = torch.cat([pipe.generate(num=1, labels=[1, 2, 3][i % 3], seed=10 + i) for i in range(6)])
    split = pipe.generate(num=6, labels=[1, 2, 3], seed=10, batch_size=4)
    assert torch.equal(together, alone) and torch.equal(together, split)


def test_save_and_load_give_the_same_pictures(pipe, tmp_path):
    again = DigitPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "copy"))
    assert torch.equal(again.generate(num=3, seed=1), pipe.generate(num=3, seed=1))
    assert again.classes == pipe.classes and again.sampling == pipe.sampling and again.preprocess == pipe.preprocess


@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_completion_keeps_the_first_rows(pipe, keep):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    done = pipe.complete(images, keep=keep, seed=0, pixels="decoded")
    kept = kept_tokens(pipe.vq.grid, keep)
    assert done.shape == images.shape
    if keep == 1.0:  # nothing is left to draw: the reconstruction
        assert torch.equal(done, pipe.vq.decode(pipe.vq.encode(images)))
    assert kept == {0.25: 4, 0.5: 8, 1.0: 16}[keep]
    rows = round(32 * keep)
    assert torch.equal(pipe.complete(images, keep=keep, seed=0)[:, :, :rows], images[:, :, :rows])


def test_completion_resizes_other_pictures(pipe):
    assert pipe.complete(torch.zeros(1, 3, 40, 56, dtype=torch.uint8), keep=0.5).shape == (1, 3, 32, 32)


def test_a_second_fit_makes_nothing_again(run):
    before = {p: p.stat().st_mtime_ns for p in run.out.rglob("*") if p.is_file() and "pipeline" not in p.parts}
    fit(Run(tiny_recipe(), SHAPES, run.out))
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_another_configuration_is_refused_with_both_values(run):
    with pytest.raises(MismatchError, match=r"kmeans.num_clusters = 12, now asked for 13"):
        Run(tiny_recipe(kmeans=replace(tiny_recipe().kmeans, num_clusters=13)), SHAPES, run.out)


def test_tokens_of_another_codebook_are_refused(run, tmp_path):
    other = Run(tiny_recipe(seed=1), SHAPES, tmp_path / "other")
    other.fit_codebook()
    mixed = Run(
        tiny_recipe(),
        SHAPES,
        tmp_path / "mixed",
        reuse={"codebook": other.out / "codebook", "vqgan": run.out / "vqgan", "tokens": run.out / "tokens"},
    )
    with pytest.raises(MismatchError, match="tokens in .* were made with codebook"):
        mixed.write_tokens()


@pytest.mark.parametrize("renderer", ["renderer_masked", "vq_ar", "vq_ar_epochs", "vq_masked"])
def test_masked_renderer_and_baselines_train_and_draw(run, renderer):
    prior = "prior" if renderer == "renderer_masked" else None
    pipe = run.make_pipeline(prior, renderer)
    assert pipe.generate(num=2, labels=[0, 1], seed=3).shape == (2, 3, 32, 32)
    labels = [3] if renderer == "vq_masked" else None
    assert pipe.complete(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), keep=0.5, labels=labels).shape == (1, 3, 32, 32)
    if prior is None:
        assert pipe.tokenizer is None


def test_baselines_get_the_compute_of_both_stages(run):
    def cost(name: str) -> float:
        cfg = run.training_config(name)
        return training_flops(run.sequence_config(name)) * cfg.num_steps * cfg.batch_size

    both = cost("prior") + cost("renderer")
    step = training_flops(run.sequence_config("vq_ar")) * run.training_config("vq_ar").batch_size
    assert abs(cost("vq_ar") - both) <= step / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.generate(num=1, labels=10), "label 10 is out of range: this model knows classes 0 to 9"),
        (lambda p: p.generate(num=1, labels=-1), "a label stands for no class"),
        (lambda p: p.generate(num=0), "num is 0"),
        (lambda p: p.complete(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), keep=0), "keep is 0"),
        (lambda p: p.generate(num=1, prior={"cfg_scale": 3.0}), "cfg_scale is 3.0"),
    ],
)
def test_bad_requests_say_what_is_wrong(pipe, call, message):
    with pytest.raises(DigitError, match=message):
        call(pipe)


def test_missing_pipeline_says_where(tmp_path):
    with pytest.raises(DigitError, match="does not exist"):
        DigitPipeline.from_pretrained(tmp_path / "nowhere")


def test_one_image_is_not_enough(tmp_path):
    with pytest.raises(DigitError, match="holds 1 image"):
        Run(tiny_recipe(), "shapes:num=1,size=32", tmp_path)


def test_differences_names_the_leaves():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == [("a.c", 2, 3)]
    renderers = {"renderer", "renderer_masked", "renderer_pixels"}
    assert set(ROLES) == {"prior", *renderers, "vq_ar", "vq_ar_epochs", "vq_masked"}


def test_completion_without_labels_takes_the_likeliest_class(pipe):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    labels = pipe.guess_labels(images)
    tokens = pipe.tokenizer.encode(images)
    nll = torch.stack(
        [
            torch.nn.functional.cross_entropy(
                pipe.prior(tokens, labels=torch.full((2,), k)).transpose(1, 2), tokens, reduction="none"
            ).sum(1)
            for k in range(10)
        ]
    )  # (10, 2)
    assert torch.equal(labels, nll.argmin(0))
    assert torch.equal(pipe.complete(images, seed=4), pipe.complete(images, seed=4, labels=labels.tolist()))


def test_a_model_of_other_tokens_is_refused(run, tmp_path):
    import shutil

    shutil.copytree(run.out, tmp_path / "run")
    other = Run(tiny_recipe(seed=2), SHAPES, tmp_path / "other")
    other.fit_codebook()
    shutil.rmtree(tmp_path / "run" / "codebook")
    shutil.rmtree(tmp_path / "run" / "tokens")
    shutil.copytree(other.out / "codebook", tmp_path / "run" / "codebook")
    with pytest.raises(MismatchError, match="was made with tokenizer = "):
        Run(tiny_recipe(), SHAPES, tmp_path / "run").train_model("prior")


def test_settings_that_change_no_result_may_change(run):
    Run(
        tiny_recipe(max_bad_fraction=0.2, prior_training=replace(tiny_recipe().prior_training, log_every=1)),
        SHAPES,
        run.out,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vqgan=replace(tiny_recipe().vqgan, resolution=64)), "crops are 32 px, the VQGAN takes 64"),
        (dict(vqgan_start="vqgan64"), "crops are 32 px, the VQGAN takes 64"),
        (dict(vqgan_training=replace(tiny_recipe().vqgan_training, num_steps=0)), "untrained VQGAN"),
        (dict(prior=replace(tiny_recipe().prior, num_heads=3)), "num_heads"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(changes, message, tmp_path):
    with pytest.raises(DigitError, match=message):
        Run(tiny_recipe(**changes), SHAPES, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reused_part_must_be_there(tmp_path):
    with pytest.raises(DigitError, match=r"holds no codebook.json: give the codebook folder of a run"):
        Run(tiny_recipe(), SHAPES, tmp_path / "run", reuse={"codebook": tmp_path})


def test_unknown_and_missing_devices():
    from digit.runtime.hardware import choose_device

    with pytest.raises(DigitError, match="no device named 'foo'"):
        choose_device("foo")
    assert choose_device("cpu").type == "cpu"


def test_data_without_labels_makes_an_unconditional_pipeline(tmp_path):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        picture = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray(picture.numpy()).save(tmp_path / "flat" / f"{i}.png")
    recipe = tiny_recipe(kmeans=replace(tiny_recipe().kmeans, num_clusters=8))
    pipe = fit(Run(recipe, str(tmp_path / "flat"), tmp_path / "run"))
    assert pipe.classes == [] and pipe.prior.cfg.num_classes == 0
    assert pipe.generate(num=3).shape == (3, 3, 32, 32)
    assert pipe.complete(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 3, 32, 32)
    with pytest.raises(DigitError, match="unconditional"):
        pipe.generate(num=1, labels=0)


def test_the_released_kmeans_path_is_a_choice_for_the_codebook(tmp_path):
    run = Run(tiny_recipe(codebook_path="released_kmeans"), SHAPES, tmp_path / "run")
    assert run.fit_codebook().meta["preprocessing"]["path"] == "released_kmeans"


def test_held_out_images_are_not_trained_on_and_are_scored(tmp_path):
    recipe = tiny_recipe(validation_fraction=0.25, crops_per_image=2)
    run = Run(recipe, SHAPES, tmp_path / "run")
    run.train_model("prior")
    held = run.held_out_rows()
    assert held.reshape(-1, 2).all(1).sum() == held.sum() / 2 == 6  # whole images, every fourth
    assert "val_nll" in (run.out / "prior" / "log.jsonl").read_text()


def test_settings_younger_than_a_run_are_its_defaults(run, tmp_path):
    import json
    import shutil

    shutil.copytree(run.out, tmp_path / "run")
    cfg = json.loads((tmp_path / "run" / "config.json").read_text())
    del cfg["recipe"]["validation_fraction"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(cfg))
    Run(tiny_recipe(), SHAPES, tmp_path / "run")
    with pytest.raises(MismatchError, match="validation_fraction = 0.0, now asked for 0.5"):
        Run(tiny_recipe(validation_fraction=0.5), SHAPES, tmp_path / "run")


def test_a_vqgan_is_tuned_in_encoder_features(tmp_path):
    training = replace(tiny_recipe().vqgan_training, perceptual="encoder", perceptual_crop=0)
    run = Run(tiny_recipe(vqgan_training=training), SHAPES, tmp_path / "run")
    assert run.train_vqgan().vocab_size == 16
    assert "perceptual" in (run.out / "vqgan" / "log.jsonl").read_text()
