"""A run on another project's VQ tokenizer, converted: tokens, models that start from its codes, samples."""

from dataclasses import replace

import foreign_vq
import pytest
import torch
from tiny import SHAPES, tiny_recipe

from digit.errors import DigitError
from digit.models.vqgan import VQGAN
from digit.pipeline.pipeline import DigitPipeline
from digit.runs.fit import Run
from digit.tokenizers.vq import VQTokenizer


def folder_of(form: str, out):
    """A converted tokenizer for 32 px: 16 x 16 tokens of 16 codes."""
    vqgan = foreign_vq.small(form)
    larger = VQGAN(replace(vqgan.cfg, resolution=32), vqgan.layout)
    larger.load_state_dict(vqgan.state_dict())
    VQTokenizer(larger).save(out)
    return out


@pytest.mark.parametrize("form", ["llamagen", "open_magvit2"])
def test_a_run_reuses_a_converted_tokenizer(form, tmp_path):
    folder = folder_of(form, tmp_path / "vqgan")
    recipe = tiny_recipe(informed_start=True)
    run = Run(recipe, SHAPES, tmp_path / "run", reuse={"vqgan": folder})
    store = run.write_tokens()
    vq = VQTokenizer.load(folder)
    assert store.vq.shape[1] == 256 and int(store.vq[:].max()) < 16
    assert store.manifest["vqgan_hash"] == vq.fingerprint
    run.train_model("prior")
    run.train_model("renderer")
    run.make_pipeline("prior", "renderer").save_pretrained(tmp_path / "pipeline")
    pipe = DigitPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.vq.fingerprint == vq.fingerprint and pipe.vq.vqgan.layout == vq.vqgan.layout
    assert pipe.generate(2, batch_size=2).shape == (2, 3, 32, 32)
    assert pipe.generate(2, batch_size=2).dtype == torch.uint8


def test_more_codes_than_a_store_holds_are_refused_at_once(tmp_path):
    vqgan = foreign_vq.small("open_magvit2")
    large = VQGAN(replace(vqgan.cfg, resolution=32, z_channels=18, vocab_size=2**18), vqgan.layout)
    VQTokenizer(large).save(tmp_path / "vqgan")
    with pytest.raises(DigitError, match="has 262144 codes, and models are trained on at most 65536: reuse another"):
        Run(tiny_recipe(), SHAPES, tmp_path / "run", reuse={"vqgan": tmp_path / "vqgan"})
    vq = VQTokenizer.load(tmp_path / "vqgan")
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert vq.decode(vq.encode(images)).shape == images.shape, "encoding and decoding do work"
