"""Renderers that see labels beside the discriminative tokens (`renderer.labels`)."""

from dataclasses import replace

import pytest
import torch
from tiny import SHAPES, pixel_recipe, tiny_recipe
from toy_judge import ToyJudge

from digit.data.images import open_source
from digit.errors import DigitError
from digit.evaluation.sweep import Sweep
from digit.metrics.frechet import FeatureStats
from digit.models.pixels import PixelRenderer
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.pipeline.export import export_pipeline
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.variations import interpolate, vary
from digit.runs.changes import touching
from digit.runs.checks import check_sampling, unused_settings
from digit.runs.fit import Run, fit
from digit.runs.recipes import with_settings
from digit.runs.report import write_report
from digit.runtime.files import read_json
from digit.runtime.settings import refuse_unused

DROPPED = {"prior.label_dropout": 0.2, "renderer.prefix_dropout": 0.2}


def labelled(**changes):
    return with_settings(tiny_recipe(), {"renderer.labels": True, **DROPPED, **changes})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    run = Run(labelled(), open_source(SHAPES), tmp_path_factory.mktemp("labelled"))
    return run, fit(run)


def test_the_renderer_is_given_the_label(fitted, tmp_path):
    run, pipe = fitted
    cfg = pipe.renderer.cfg
    assert cfg.num_classes == pipe.num_classes > 1 and (cfg.label_dropout, cfg.prefix_dropout) == (0.2, 0.2)
    assert pipe.renderer_sees_labels
    # more training would show the difference in tokens; the logits show it at once
    tokens = run.write_tokens().batch(range(3))
    logits = [pipe.renderer(tokens["vq"], tokens["discriminative"], torch.full((3,), label)) for label in (-1, 0, 1)]
    assert all(not torch.equal(logits[0], other) for other in logits[1:]) and not torch.equal(*logits[1:])
    images = pipe.generate(4, seed=2)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(DigitPipeline.from_pretrained(tmp_path / "saved").generate(4, seed=2), images)


def test_rendering_takes_labels(fitted):
    _, pipe = fitted
    drawn = pipe.generate_tokens(4, seed=3)
    names = [pipe.classes[label] for label in drawn["labels"]]
    assert torch.equal(pipe.render_tokens(drawn["discriminative"], seed=3, labels=names), drawn["vq"])
    assert torch.equal(pipe.render(drawn["discriminative"], seed=3, labels=names), pipe.generate(4, seed=3))
    assert pipe.render(drawn["discriminative"]).shape == (4, 3, 32, 32)
    with pytest.raises(DigitError, match="2 labels for 4 images"):
        pipe.render(drawn["discriminative"], labels=names[:2])


def test_variations_take_the_likeliest_class_or_the_given_one(fitted):
    _, pipe = fitted
    images = pipe.generate(2, seed=4)
    guessed = [pipe.classes[label] for label in pipe.guess_labels(images)]
    assert torch.equal(vary(pipe, images, num=2, seed=1), vary(pipe, images, num=2, seed=1, labels=guessed))


def test_an_image_without_prefix_has_no_label_either():
    cfg = SequenceConfig(
        vocab_size=7, target_len=4, prefix_vocab_size=5, prefix_len=3, num_classes=2, label_dropout=0.3,
        prefix_dropout=0.3, depth=1, embed_dim=8, num_heads=2,
    )  # fmt: skip
    batch = {"target": torch.zeros(500, 4, dtype=torch.int64), "labels": torch.zeros(500, dtype=torch.int64)}
    noise = SequenceModel(cfg).noise(batch, torch.Generator().manual_seed(0))
    both, label = noise["drop_prefix"], noise["drop_labels"]
    assert not (both & ~label).any()
    assert 0.2 < both.float().mean() < 0.4 and 0.15 < (label & ~both).float().mean() < 0.3
    without = SequenceModel(replace(cfg, label_dropout=0.0)).noise(batch, torch.Generator().manual_seed(0))
    assert set(without) == {"drop_prefix"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    recipe = with_settings(pixel_recipe(), {"pixels.labels": True, "prior.label_dropout": 0.2})
    recipe = replace(recipe, pixels=replace(recipe.pixels, noise_channels=2), validation_fraction=0.2)
    run = Run(recipe, open_source(SHAPES), tmp_path_factory.mktemp("straight"))
    return run, fit(run)


def test_a_renderer_straight_to_pixels_is_given_the_label(straight, tmp_path, unchecked):
    run, pipe = straight
    assert isinstance(pipe.renderer, PixelRenderer) and pipe.renderer.cfg.num_classes == pipe.num_classes > 1
    tokens = pipe.generate_tokens(3, seed=1)["discriminative"]
    noise = torch.zeros(3, *pipe.renderer.cfg.noise_shape)
    images = [pipe.renderer(tokens, noise, labels) for labels in (None, torch.tensor([0] * 3), torch.tensor([1] * 3))]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
    assert torch.equal(images[0], pipe.renderer(tokens, noise, torch.tensor([-1] * 3)))
    with pytest.raises(DigitError, match="labels run from 99"):
        pipe.renderer(tokens, noise, torch.tensor([99] * 3))
    drawn, names = pipe.generate(3, seed=1), [pipe.classes[label] for label in pipe.labels(3)]
    assert torch.equal(DigitPipeline.from_pretrained(run.out).generate(3, seed=1), drawn)
    assert torch.equal(pipe.render(tokens, seed=1, labels=names), drawn)
    assert max(export_pipeline(pipe, tmp_path / "exported").values()) < 1e-4


def test_labels_of_a_pixel_renderer_are_hidden_alike_in_every_process(straight):
    renderer = straight[1].renderer
    labels = {"prefix": torch.zeros(400, 0), "labels": torch.zeros(3, dtype=torch.int64)}  # of the rows of one process
    hidden = renderer.noise(labels, torch.Generator().manual_seed(1))["drop_labels"]
    assert hidden.shape == (400,) and 0.1 < hidden.float().mean() < 0.3
    assert "drop_labels" not in renderer.noise(labels | {"labels": None}, torch.Generator())


def test_stages_that_labels_decide():
    before = labelled()
    assert touching("renderer", before, with_settings(before, {"class_conditional": False})) == ["class_conditional"]
    assert touching("renderer", before, with_settings(before, {"prior.label_dropout": 0.1})) == ["prior.label_dropout"]
    assert touching("renderer", before, with_settings(before, {"renderer.labels": False})) == ["renderer.labels"]
    assert touching("prior", before, with_settings(before, {"renderer.labels": False})) == []
    plain = with_settings(before, {"renderer.labels": False})
    assert touching("renderer", plain, with_settings(plain, {"prior.label_dropout": 0.1})) == []


def test_guidance_by_the_label_alone():
    recipe = labelled(**{"renderer.prefix_dropout": 0.0, "sampling.renderer.cfg_scale": 2.0})
    check_sampling(recipe, num_classes=2, chosen=())
    assert recipe.sampling_of("renderer", labelled=True).renderer.cfg_scale == 2
    assert recipe.sampling_of("renderer", labelled=False).renderer.cfg_scale == 1
    with pytest.raises(DigitError, match="guidance needs renderer.prefix_dropout above 0"):
        check_sampling(recipe, num_classes=0, chosen=())


def test_what_cannot_work_is_refused():
    with pytest.raises(DigitError, match="renderer.labels is true and prior.label_dropout 0"):
        check_sampling(labelled(**{"prior.label_dropout": 0.0}), num_classes=2, chosen=())
    for settings, message in (
        ({"prior.labels": True}, "the prior always sees the labels"),
        ({"class_conditional": False, "renderer.labels": True}, "class_conditional is false"),
        ({"renderer_kind": "pixels", "renderer.labels": True}, "set pixels instead"),
    ):
        recipe = with_settings(tiny_recipe(), settings)
        with pytest.raises(DigitError, match=message):
            refuse_unused(recipe, settings, unused_settings(recipe))


def test_the_report_of_a_labelled_renderer_straight_to_pixels(straight):
    run, pipe = straight
    assert pipe.guided_stages == ["prior"]  # one pass has nothing to guide
    assert write_report(run, pipe).is_file()
    assert read_json(run.out / "metrics.json")["guidance"]["scales"].keys() == {"prior"}


def test_a_sweep_renders_with_labels_from_kept_tokens_too(fitted, tmp_path):
    _, pipe = fitted
    for _ in range(2):
        sweep = Sweep(pipe, FeatureStats(), ToyJudge(), tmp_path, num=6, seed=3)
        assert torch.equal(sweep.tokens(pipe.sampling), pipe.generate_tokens(6, seed=3)["vq"])
        for file in tmp_path.glob("vq-*"):
            file.unlink()  # the discriminative tokens stay


def test_pictures_are_rendered_again_under_their_likeliest_class(fitted):
    _, pipe = fitted
    images = pipe.generate(2, seed=4)
    guessed = [pipe.classes[label] for label in pipe.guess_labels(images)]
    assert torch.equal(pipe.rerender(images, seed=1), pipe.rerender(images, seed=1, labels=guessed))


def test_rendering_needs_no_prior(fitted):
    _, pipe = fitted
    tokens = pipe.generate_tokens(2, seed=1)
    names = [pipe.classes[label] for label in tokens["labels"]]
    parts = dict(tokenizer=pipe.tokenizer, vq=pipe.vq, preprocess=pipe.preprocess, classes=pipe.classes)
    alone = DigitPipeline(renderer=pipe.renderer, **parts)
    assert torch.equal(alone.render_tokens(tokens["discriminative"], 1, labels=names), tokens["vq"])
    assert vary(alone, alone.render(tokens["discriminative"]), num=2).shape == (4, 3, 32, 32)
    other = SequenceModel(replace(pipe.prior.cfg, num_classes=0, label_dropout=0.0))
    with pytest.raises(DigitError, match="classes, the prior none"):
        DigitPipeline(renderer=pipe.renderer, prior=other, **parts)


def test_between_two_pictures_a_class_may_be_given(fitted):
    _, pipe = fitted
    one, two = pipe.generate(2, seed=1).split(1)
    plain = interpolate(pipe, one, two, steps=3)
    named = interpolate(pipe, one, two, steps=3, labels=pipe.classes[1])
    assert torch.equal(plain.tokens, named.tokens)
    blind = SequenceModel(replace(pipe.renderer.cfg, num_classes=0, label_dropout=0.0))
    parts = dict(tokenizer=pipe.tokenizer, vq=pipe.vq, prior=pipe.prior, preprocess=pipe.preprocess)
    with pytest.raises(DigitError, match="this renderer sees none"):
        interpolate(DigitPipeline(renderer=blind, classes=pipe.classes, **parts), one, two, labels=pipe.classes[1])
