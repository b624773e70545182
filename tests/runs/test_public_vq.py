"""A run on another project's VQ tokenizer, converted: tokens, models that start from its codes, samples."""

from dataclasses import replace
from types import SimpleNamespace

import foreign_vq
import pytest
import torch
from tiny import SHAPES, tiny_recipe

from digit.cli import main
from digit.data.tokens import TokenStore
from digit.errors import DigitError
from digit.models.vqgan import VQGANConfig
from digit.pipeline.pipeline import DigitPipeline
from digit.released.vq_tokenizers import FoundVQ
from digit.runs.fit import Run
from digit.runs.recipes import RECIPES
from digit.tokenizers.vq import Origin, VQTokenizer, load_asset_vqgan
from digit.training.vqgan import GANConfig


def tokenizer_of(form: str, **changes) -> VQTokenizer:
    """A tokenizer for 32 px: 8 x 8 tokens of 16 codes."""
    return VQTokenizer(foreign_vq.small(form, resolution=32, channel_mult=(1, 1, 1), **changes))


def test_a_run_reuses_a_converted_tokenizer(tmp_path):
    vq = tokenizer_of("llamagen")
    vq.save(tmp_path / "vqgan")
    run = Run(tiny_recipe(informed_start=True), SHAPES, tmp_path / "run", reuse={"vqgan": tmp_path / "vqgan"})
    store = run.write_tokens()
    assert store.vq.shape[1] == 64 and store.manifest["vqgan_hash"] == vq.fingerprint
    assert store.manifest["vq"] == {"grid": [8, 8], "length": 64, "vocab_size": 16}
    run.make_pipeline().save_pretrained(tmp_path / "pipeline")
    pipe = DigitPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.vq.fingerprint == vq.fingerprint and pipe.vq.vqgan.layout == vq.vqgan.layout
    images = pipe.generate(2, batch_size=2)
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8


def test_licence_and_data_of_a_reused_tokenizer_go_with_it(tmp_path, capsys):
    """From the folder that is reused into the pipeline, its card and `digit info`."""
    vq = tokenizer_of("llamagen")
    vq.origin = Origin(name="llamagen_vq16", licence="MIT", data="ImageNet-1k")
    vq.save(tmp_path / "vqgan")
    run = Run(tiny_recipe(), SHAPES, tmp_path / "run", reuse={"vqgan": tmp_path / "vqgan"})
    pipe = run.make_pipeline()
    folder = pipe.save_pretrained(run.out / "pipeline")
    assert VQTokenizer.load(folder / "vqgan").origin == vq.origin
    card = pipe.write_card(folder, samples=torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).read_text()
    origin = "VQ tokenizer: llamagen_vq16; licence MIT; trained on ImageNet-1k"
    assert f"- {origin}" in card
    assert "- Encoder of the discriminative tokens: efficientnet_lite0: EfficientNet-Lite" in card
    assert main(["info", str(run.out)]) == 0
    text = capsys.readouterr().out
    assert f"licence    {origin}" in text and "licence    encoder of the discriminative tokens: efficientnet" in text


def test_a_tokenizer_of_the_run_says_what_it_was_trained_on(tmp_path):
    own = Run(tiny_recipe(), SHAPES, tmp_path / "own").train_vqgan()
    assert str(own.origin) == "trained by digit fit; trained on shapes"
    start, source = Origin(name="vqgan64", licence="MIT", data="groceries"), SimpleNamespace(name="/home/me/photos")
    for num_steps, name, data in (
        (0, "vqgan64", "groceries"),
        (3, "vqgan64, trained further by digit fit", "groceries, then photos"),
    ):
        training = replace(tiny_recipe().vqgan_training, num_steps=num_steps)
        run = SimpleNamespace(recipe=tiny_recipe(vqgan_training=training), source=source)
        assert Run._vqgan_origin(run, start) == Origin(name=name, licence="MIT", data=data)
    assert load_asset_vqgan().origin.licence == "MIT" and str(Origin()).endswith("not recorded")


def test_codes_without_a_table_start_models_too(tmp_path):
    tokenizer_of("open_magvit2").save(tmp_path / "vqgan")
    run = Run(tiny_recipe(informed_start=True), SHAPES, tmp_path / "run", reuse={"vqgan": tmp_path / "vqgan"})
    assert run.train_model("renderer").cfg.vocab_size == 16


def test_more_codes_than_a_store_holds_are_refused_at_once(tmp_path):
    tokenizer_of("open_magvit2", z_channels=18, vocab_size=2**18).save(tmp_path / "vqgan")
    with pytest.raises(DigitError, match="has 262144 codes, and models are trained on at most 65536: reuse another"):
        Run(tiny_recipe(), SHAPES, tmp_path / "run", reuse={"vqgan": tmp_path / "vqgan"})
    vq = VQTokenizer.load(tmp_path / "vqgan")
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert vq.decode(vq.encode(images)).shape == images.shape, "encoding and decoding do work"


def test_a_recipe_s_published_tokenizer_is_fetched_and_converted_once(tmp_path, monkeypatch, capsys):
    """`digit train` with vqgan_start llamagen_vq16; the stand-in has 8 x 8 tokens of 16 codes."""
    file = foreign_vq.write("llamagen", tmp_path, tokenizer_of("llamagen").vqgan)
    fetched = []
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("digit.released.convert.find_vq", lambda given: fetched.append(given) or FoundVQ(str(file)))
    sizes = VQGANConfig(resolution=32, channels=32, channel_mult=(1, 1, 1), z_channels=4, vocab_size=16)
    recipe = tiny_recipe(vqgan_start="llamagen_vq16", vqgan_training=GANConfig(num_steps=0), vqgan=sizes)
    monkeypatch.setitem(RECIPES, "tiny256", lambda: recipe)
    words = ["train", "renderer", SHAPES, "--recipe", "tiny256", "--out"]
    assert main([*words, str(tmp_path / "run")]) == 0
    assert "VQ tokenizer of LlamaGen: 8 x 8 tokens of 16 codes at 32 px" in capsys.readouterr().err
    assert TokenStore.open(tmp_path / "run" / "tokens").vq.shape[1] == 64 and not (tmp_path / "run" / "vqgan").exists()
    assert main([*words, str(tmp_path / "again")]) == 0 and fetched == ["llamagen_vq16"]
    assert main(["plan", "tiny256", "--images", "24", "--gpus", "1"]) == 0
