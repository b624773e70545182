"""Every setting of a recipe changes something of the run, or is refused; what cannot work is refused at once."""

import dataclasses
import json
import math
import sys
from dataclasses import asdict, replace

import pytest
import yaml
from tiny import SHAPES, pixel_recipe, tiny_recipe

from digit.cli import main
from digit.errors import DigitError
from digit.models.vqgan import VQGANConfig
from digit.runs.checks import (
    check_own_steps,
    check_recipe,
    chosen_settings,
    unchanged_parts,
    unused_settings,
    vqgan_config,
)
from digit.runs.fit import Run, fit
from digit.runs.recipes import RECIPES, Recipe, get_recipe
from digit.runtime.settings import flat, refuse_unused
from digit.tokenizers.quantizers import load_quantizer
from digit.training.vqgan import GANConfig


def change(recipe: Recipe, **changes) -> Recipe:
    """The recipe with other values of settings, by dotted name with __ for the dots."""
    for name, value in changes.items():
        recipe = changed_at(recipe, name.split("__"), value)
    return recipe


def changed_at(cfg, path: list[str], value):
    inner = value if len(path) == 1 else changed_at(getattr(cfg, path[0]), path[1:], value)
    return replace(cfg, **{path[0]: inner})


def check(recipe: Recipe, chosen=(), **changes) -> None:
    request = dict(reuse={}, num_images=10_000, num_classes=10, num_processes=1, gpu=False)
    check_recipe(recipe, chosen=chosen, **request | {"vqgan": vqgan_config(recipe)} | changes)


def unused(recipe: Recipe, reuse=()) -> set[str]:
    """The settings that are refused when they are chosen."""

    def refused(name: str) -> bool:
        try:
            refuse_unused(recipe, [name], unused_settings(recipe, reuse))
        except DigitError:
            return True
        return False

    return {name for name in flat(recipe) if refused(name)}


# -------------------------------------------------------------------- every setting of a run


def traced(cfg, reads: set[str], prefix: str = ""):
    """A copy of a config that adds the dotted name of each setting to `reads` when the run reads it.

    Reads by dataclasses (asdict, replace), by the checks and by the config itself do not count.
    """

    def read(self, name: str):
        frame = sys._getframe(1)
        room = frame.f_globals.get("__name__", "")
        own = frame.f_code.co_name in ("__post_init__", "require") or room in NO_READERS
        if not own and name in names:
            reads.add(prefix + name)
        return object.__getattribute__(self, name)

    names = {field.name for field in dataclasses.fields(cfg)}
    values = {name: getattr(cfg, name) for name in names}
    inner = {
        name: traced(value, reads, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
    }
    copy = type(cfg)(**inner)
    object.__setattr__(copy, "__class__", type(type(cfg).__name__, (type(cfg),), {"__getattribute__": read}))
    return copy


NO_READERS = ("dataclasses", "digit.runtime.settings", "digit.runs.checks", "copy")
# read by asdict, on this device or in several processes alone, or without effect on a run of this size
READ_ELSEWHERE = {"kmeans.init", "kmeans.tolerance", "kmeans.device", "kmeans.precision"}
SEEDS = {"prior_training.seed", "renderer_training.seed", "pixels_training.seed"}
OF_THE_DEVICE = ("deterministic", "parallel", "max_skipped", "keep_best")
VARIANTS = {
    "next token": {},
    "masked renderer": dict(renderer_kind="masked"),
    "muon": dict(renderer_training__optimizer="muon", prior_training__warmup_steps=2),
    "straight to pixels": dict(
        renderer_kind="pixels", pixels=pixel_recipe().pixels, pixels_training=pixel_recipe().pixels_training
    ),
    "no discriminator": dict(vqgan_training__adversarial_weight=0.0),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_setting_that_no_run_reads_is_refused(variant, tmp_path, monkeypatch):
    """Runs everything with a recipe that records its readers: an unread setting must be one of the refused ones."""
    recipe, reads = change(tiny_recipe(), preprocess__encoder_size=40, **VARIANTS[variant]), set()
    monkeypatch.setattr(Recipe, "with_seed", lambda self: self)
    fit(Run(traced(recipe, reads), SHAPES, tmp_path / "run", chosen=()))
    unread = {name for name in flat(recipe) if name not in reads and not name.startswith("sampling.")}
    unread = {name for name in unread - READ_ELSEWHERE if not name.endswith(OF_THE_DEVICE)}
    assert len(reads) > 60, sorted(reads)
    assert unread <= unused(recipe) | SEEDS, sorted(unread - unused(recipe))


@pytest.mark.parametrize("kind", ["ar", "masked", "pixels"])
def test_every_sampling_setting_reaches_its_sampler_or_is_refused(kind):
    from digit.runs.roles import get_role
    from digit.sampling.kinds import get_kind

    recipe = change(tiny_recipe(), renderer_kind=kind)
    refused = unused(recipe)
    for stage, model in zip(("prior", "renderer"), recipe.model_names, strict=True):
        taken = get_kind(get_role(model).kind).settings
        names = {field.name for field in dataclasses.fields(recipe.sampling.prior)}
        # a masked renderer's top-p is masked_top_p: the filter of sampling.renderer belongs to next tokens
        elsewhere = {"top_p"} if (stage, kind) == ("renderer", "masked") else set()
        assert {name for name in names if f"sampling.{stage}.{name}" in refused} == names - set(taken) | elsewhere
    assert ("masked_top_p" in refused) == (kind != "masked")


ONE_STEP = dict(renderer_kind="masked", sampling__renderer__num_steps=1)
KMEANS_PATHS = dict(preprocess__path="released_kmeans", codebook_path="released_kmeans")
UNUSED = [
    ("demo", {}, "vqgan.resolution", 128),
    ("demo", {}, "vqgan.vocab_size", 512),
    ("demo", {}, "vqgan_training.learning_rate", 1e-4),
    ("paper_cifar", {}, "prior_training.muon_learning_rate", 0.1),
    ("demo", {}, "sampling.prior.num_steps", 4),
    ("demo", {}, "sampling.renderer.choice_temperature", 1.0),
    ("demo", {}, "kmeans.seed", 3),
    ("demo", {}, "renderer_training.seed", 3),
    ("demo", {}, "prior.prefix_dropout", 0.1),
    ("demo", {}, "renderer.label_dropout", 0.1),
    ("demo", {}, "encoder.position_interpolation", "hub"),
    ("demo", {}, "prior_training.keep_best", False),
    ("paper_small", {}, "vqgan_training.perceptual_stages", 2),
    ("paper_small", {}, "vqgan_training.keep_best", False),
    ("paper_small", dict(vqgan_training__adversarial_weight=0.0), "vqgan_training.adversarial_start", 3),
    ("paper_small", dict(vqgan_training__adversarial_weight=0.0), "vqgan_training.discriminator_channels", 3),
    ("paper_small", dict(vqgan_training__perceptual="none"), "vqgan_training.perceptual_weight", 2.0),
    ("paper_small", dict(vqgan_training__perceptual="none"), "vqgan_training.perceptual_crop", 8),
    ("paper_small", dict(vqgan_training__restart_below=0.0), "vqgan_training.restart_every", 8),
    ("paper_small", dict(sampling__prior__temperature=0.0), "sampling.prior.top_p", 0.5),
    ("paper_small", ONE_STEP, "sampling.renderer.choice_temperature", 1.0),
    ("paper_small", dict(prior_training__warmup_steps=0), "prior_training.warmup_from", 1e-5),
    ("digit_base", {}, "prior.label_dropout", 0.1),
    ("digit_base", {}, "class_top_k", 100),
    ("digit_base", {}, "masked_steps", 100),
    ("digit_base", {}, "masked_top_p", 0.9),
    ("digit_base", dict(renderer_kind="masked"), "sampling.renderer.top_p", 0.9),
    ("cifar", {}, "pixels.depth", 3),
    ("cifar", {}, "pixels_training.num_steps", 2900),
    ("cifar_pixels", {}, "renderer.depth", 3),
    ("cifar_pixels", {}, "renderer_training.learning_rate", 1e-4),
    ("cifar_pixels", {}, "sampling.renderer.top_p", 0.5),
    ("cifar_pixels", {}, "pixels_training.perceptual_stages", 2),
    ("cifar_pixels", {}, "pixels_training.whole_from", 0.5),
    ("cifar_pixels", dict(pixels__start="scratch", vqgan_start="scratch"), "vqgan_training.num_steps", 700),
    ("digit_base", KMEANS_PATHS, "preprocess.image_size", 96),
    ("digit_base", {}, "prior.random_order_anneal", (0.2, 0.9)),
    ("digit_base", dict(renderer_kind="masked"), "renderer.random_order", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "setting", "value"), UNUSED, ids=[f"{c[0]}:{c[2]}" for c in UNUSED])
def test_a_setting_that_a_run_would_ignore_is_refused(name, changes, setting, value):
    recipe = change(get_recipe(name), **changes)
    refuse_unused(recipe, chosen_settings(recipe), unused_settings(recipe))
    recipe = changed_at(recipe, setting.split("."), value)
    with pytest.raises(DigitError, match=rf"{setting} is .*, which this run would not use: "):
        refuse_unused(recipe, chosen_settings(recipe), unused_settings(recipe))


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("vqgan", "vqgan.channels"),
        ("vqgan", "vqgan_start"),
        ("vqgan", "vqgan_training.num_steps"),
        ("codebook", "kmeans.num_clusters"),
        ("codebook", "codebook_subset"),
        ("codebook", "codebook_path"),
        ("tokens", "crops_per_image"),
    ],
)
def test_a_setting_of_a_reused_part_is_refused_unless_the_part_was_made_with_it(part, setting):
    recipe = tiny_recipe()
    with pytest.raises(
        DigitError, match=rf"{setting} is .*: leave it out, or make a new {part} without --reuse_{part}"
    ):
        check(recipe, [setting], reuse={part: {}})
    check(recipe, [setting], reuse={part: flat(recipe)})


def test_settings_that_the_run_does_use_are_accepted():
    masked = change(get_recipe("paper_small"), renderer_kind="masked", sampling__renderer__num_steps=4, seed=7)
    check(masked, chosen_settings(masked))
    scratch = change(
        get_recipe("demo"), vqgan_start="scratch", vqgan=VQGANConfig(resolution=64), vqgan_training=GANConfig()
    )
    check(scratch, ["vqgan.resolution", "vqgan_training.learning_rate"])
    check(
        change(get_recipe("demo"), renderer_training__muon_learning_rate=0.1), ["renderer_training.muon_learning_rate"]
    )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_registered_recipe_is_accepted(name):
    recipe = get_recipe(name).with_seed()
    known = {"vqgan": flat(recipe)} if recipe.published_vqgan else {}  # fetched before the run
    classes = 10 if recipe.class_conditional else 0
    check(recipe, chosen_settings(recipe), num_images=1_000_000, num_classes=classes, reuse=known)


# -------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    ("changes", "request_", "text"),
    [
        ({}, dict(num_images=30), "30 images give 480 patches .16 each., fewer than the 1024 codes of the codebook"),
        ({}, dict(num_images=63), "give more images, or kmeans.num_clusters 126 or less"),
        ({}, dict(num_images=1), "the data holds 1 image: training needs at least 2"),
        ({}, dict(vqgan=VQGANConfig(resolution=256)), "crops are 64 px, the VQGAN takes 256: set "),
        ({}, dict(num_processes=3), "prior_training.batch_size 32 does not split into 3 equal micro-batches"),
        (dict(kmeans__num_clusters=70_000), {}, "kmeans: codes 70000: the token store holds at most 65536"),
        (dict(preprocess__random_crop=False, preprocess__flip=False), {}, "crops_per_image is 8, but all crops"),
        (dict(training_crops="fresh"), {}, "but 8 crops of each image would be tokenized first"),
        (dict(training_crops="fresh"), {}, "set crops_per_image to 1, .*, or training_crops to stored"),
        (dict(prior_training__num_steps=0), {}, "prior_training.num_steps is 0: an untrained prior makes noise"),
        (dict(renderer_training__precision="fp16"), {}, "renderer_training.precision is fp16, which needs a GPU"),
        (dict(sampling__prior__cfg_scale=2.0), {}, "cfg_scale is 2.0, but guidance needs prior.label_dropout"),
        (dict(sampling__renderer__cfg_scale=2.0), {}, "guidance needs renderer.prefix_dropout above 0"),
        (
            dict(prior__label_dropout=0.1), dict(num_classes=0, chosen=["prior.label_dropout"]),
            "prior.label_dropout is set, but the models get no labels",
        ),
        (dict(encoder__name="dino_vits16", encoder__input_size=65), {}, "input_size 65 is no multiple of patch 16"),
        (dict(encoder__layer=99), {}, "has no layer 99"),
        (dict(renderer__learned_positions=False), {}, "learned_positions is false, .* set rotary to 1d or 2d"),
        (dict(prior__rotary="2d", prior__embed_dim=6, prior__num_heads=3), {}, "width that 4 divides, .* is 2"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(changes, request_, text):
    recipe = change(get_recipe("paper_small"), **changes)
    with pytest.raises(DigitError, match=text):
        check(recipe, **request_)


def test_fresh_crops_with_one_stored_crop_or_with_tokens_that_are_there():
    check(change(get_recipe("paper_small"), training_crops="fresh", crops_per_image=1))
    recipe = change(get_recipe("paper_small"), training_crops="fresh")
    check(recipe, reuse={part: flat(recipe) for part in ("codebook", "vqgan", "tokens")})


def test_updates_of_a_renderer_that_others_of_the_comparison_would_not_take():
    recipe, setting = change(get_recipe("digit_base"), renderer_training__num_steps=500), "renderer_training.num_steps"
    check_own_steps(recipe, [])
    with pytest.raises(DigitError, match="num_steps is 500, but renderer_masked would .* masked_steps, 125000"):
        check_own_steps(recipe, [setting])
    with pytest.raises(DigitError, match="vq_ar_epochs would still train for vq_only_steps, 125000 .* to null"):
        check_own_steps(recipe, [setting, "masked_steps"])
    check_own_steps(recipe, [setting, "masked_steps", "vq_only_steps"])
    check_own_steps(recipe, [setting], ["renderer"])
    check_own_steps(change(recipe, masked_steps=None, vq_only_steps=None), [setting])
    check_own_steps(change(get_recipe("paper_small"), renderer_training__num_steps=500), [setting])


def test_guidance_of_a_model_that_is_trained_for_it():
    check(change(get_recipe("paper_small"), sampling__prior__cfg_scale=2.0, prior__label_dropout=0.1))
    check(change(get_recipe("paper_small"), sampling__renderer__cfg_scale=2.0, renderer__prefix_dropout=0.1))


def test_a_warmup_longer_than_the_training_is_refused_where_it_was_chosen_and_said_where_not(caplog):
    recipe = change(get_recipe("demo"), prior_training__num_steps=80)
    check(recipe)
    assert "prior_training.warmup_steps is 90, longer than the training of 80 steps" in caplog.text
    assert "--prior_training.warmup_steps 8 lets it" in caplog.text
    with pytest.raises(DigitError, match="never reach its peak"):
        check(recipe, ["prior_training.warmup_steps"])


def test_no_more_crops_are_stored_than_differ(tmp_path):
    """A recipe's own number is lowered, a chosen one refused."""
    recipe = change(tiny_recipe(), preprocess__fit="pad", crops_per_image=8)
    assert recipe.without_equal_crops().crops_per_image == 2
    assert change(recipe, preprocess__flip=False).without_equal_crops().crops_per_image == 1
    assert change(recipe, preprocess__fit="crop").without_equal_crops().crops_per_image == 8
    with pytest.raises(DigitError, match="an image has 2 different crops at most"):
        check(recipe, ["crops_per_image"])
    assert Run(recipe, "shapes:num=24,size=32", tmp_path).recipe.crops_per_image == 2


def test_a_published_tokenizer_is_fetched_first():
    recipe = get_recipe("photos256")
    with pytest.raises(DigitError, match="digit convert --vqgan llamagen_vq16 --out llamagen_vq16 fetches it"):
        check(recipe)


@pytest.mark.parametrize(("size", "resolution"), [(64, 64), (128, 128), (256, 256), (100, 64), (32, 64)])
def test_a_carried_vqgan_takes_larger_crops_of_whole_tokens(size, resolution):
    recipe = change(get_recipe("paper_small"), preprocess__image_size=size)
    assert vqgan_config(recipe).resolution == resolution


@pytest.mark.parametrize(
    ("changed_settings", "kept"),
    [
        (["recipe.prior.depth"], ["codebook", "vqgan", "tokens"]),
        (["recipe.renderer_training.num_steps", "recipe.class_conditional"], ["codebook", "vqgan", "tokens"]),
        (["recipe.crops_per_image"], ["codebook", "vqgan"]),
        (["recipe.kmeans.num_clusters"], ["vqgan", "vq_tokens"]),
        (["recipe.vqgan_training.num_steps"], ["codebook"]),
        (["recipe.seed"], []),
        (["recipe.preprocess.flip"], []),
        (["recipe.prior.depth", "data.fingerprint"], []),
    ],
)
def test_the_parts_that_a_changed_setting_leaves(changed_settings, kept):
    assert unchanged_parts(changed_settings) == kept


# -------------------------------------------------------------------- on the command line


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(tiny_recipe())))))
    return str(path)


def fails(capsys, *argv: str) -> str:
    """Run, expect exit code 2 and one line on stderr; returns it."""
    assert main(list(argv)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--vqgan.resolution", "128"],
            "--vqgan.resolution is 128, which this run would not use: vqgan64_shapes has sizes",
        ),
        (["--vqgan.resolution=256"], "--vqgan.resolution is 256, which this run would not use"),  # the default, typed
        (["--sampling.renderer.num_steps", "4"], "the renderer is sampled token by token: for a masked renderer set"),
        (["--prior_training.learning_rate", "nan"], "--prior_training.learning_rate is"),
        (["--kmeans.num_clusters", "100000"], "kmeans: codes 100000"),
        (["--preprocess.encoder_size", "96"], "--preprocess.encoder_size is 96, which this run would not use"),
        (["--encoder.name", "efficientnet_lite"], "did you mean efficientnet_lite2"),
        (["--reuse_vqgan", "runs/nothing"], "runs/nothing does not exist"),
    ],
)
def test_fit_and_plan_refuse_the_same(capsys, tmp_path, words, text):
    assert text in fails(capsys, "fit", SHAPES, "--recipe", "demo", "--out", str(tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()
    if "--reuse_vqgan" not in words:
        assert text in fails(capsys, "plan", "demo", "--gpus", "1", *words)


def test_tokens_need_the_parts_that_they_were_made_with(capsys, settings, run, tmp_path):
    words = [
        "fit",
        SHAPES,
        "--recipe",
        "demo",
        "--config",
        settings,
        "--out",
        str(tmp_path / "run"),
        "--reuse_tokens",
        str(run.out / "tokens"),
    ]
    assert f"add --reuse_codebook {run.out / 'codebook'}" in fails(capsys, *words)


def test_another_setting_keeps_the_parts_that_it_does_not_decide(capsys, settings, tmp_path):
    out = tmp_path / "run"
    first = ["tokenize", SHAPES, "--recipe", "demo", "--config", settings, "--out", str(out)]
    assert main(first) == 0
    before = {
        path: path.stat().st_mtime_ns for part in ("codebook", "vqgan", "tokens") for path in (out / part).iterdir()
    }
    capsys.readouterr()
    assert main(["train", "prior", *first[1:], "--prior.depth", "2", "--renderer.depth=2"]) == 0
    said = capsys.readouterr().err
    assert "prior.depth was 1, now 2; renderer.depth was 1, now 2. Kept: codebook, vqgan, tokens" in said
    assert json.loads((out / "prior" / "model.json").read_text())["depth"] == 2
    assert before == {path: path.stat().st_mtime_ns for path in before} and not (out / "earlier").exists()


def test_a_part_that_the_setting_decides_is_made_again(capsys, settings, tmp_path):
    out = tmp_path / "run"
    first = ["codebook", SHAPES, "--recipe", "demo", "--config", settings, "--out", str(out)]
    assert main(first) == 0
    capsys.readouterr()
    assert main([*first, "--kmeans.num_clusters", "11"]) == 0
    said = capsys.readouterr().err
    assert "kmeans.num_clusters was 12, now 11. Made anew: codebook (kmeans.num_clusters)" in said
    sizes = [load_quantizer(folder / "codebook").vocab_size for folder in (out, out / "earlier" / "1")]
    assert sizes == [11, 12] and math.prod(tiny_recipe().vqgan.grid) == 16


@pytest.mark.parametrize(("window", "training"), [(64, "pixels"), (36, "pixels"), (96, "vqgan")])
def test_windows_that_are_no_part_of_the_images(window, training):
    recipe = change(get_recipe("small" if training == "pixels" else "paper_small"))
    with pytest.raises(DigitError, match=rf"{training}_training.window is {window}: it must be below the 64 px"):
        check(change(recipe, **{f"{training}_training__window": window}))
    check(change(recipe, **{f"{training}_training__window": 32}))


@pytest.mark.parametrize("training", ["pixels", "vqgan"])
def test_windows_that_no_step_sees(training):
    recipe = pixel_recipe() if training == "pixels" else tiny_recipe()
    recipe = change(recipe, **{f"{training}_training__window": 16, f"{training}_training__whole_from": 0.0})
    with pytest.raises(DigitError, match=f"{training}_training.window is 16, .* whole_from is 0, so no step sees a"):
        check(recipe, [f"{training}_training.window"])
