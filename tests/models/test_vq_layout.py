"""Quantisers against brute force, and layouts of VQ tokenizers through the tokenizer."""

from dataclasses import fields, replace

import foreign_vq
import pytest
import torch

from digit.errors import DigitError, MismatchError
from digit.models import vq_quantizers
from digit.models.tokenizer import ImageTokenizer
from digit.models.vq_layout import MAGE, VQLayout
from digit.models.vq_quantizers import QUANTIZERS, SignQuantizer
from digit.models.vqgan import VQGAN
from digit.runtime.files import read_json, write_json
from digit.tokenizers.vq import VQTokenizer

ROWS = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


def quantizer(kind: str):
    made = QUANTIZERS[kind](9, 6)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


BRUTE = {
    "nearest": lambda q, z: (z[:, None] - q.embedding.weight).square().sum(2).argmin(1),
    "cosine": lambda q, z: torch.cosine_similarity(z[:, None], q.embedding.weight, dim=2).argmax(1),
    "dot": lambda q, z: (z[:, None] * q.embedding.weight).sum(2).argmax(1),
    "logits": lambda q, z: q.proj(z).argmax(1),
}


@pytest.mark.parametrize("kind", BRUTE)
@torch.no_grad()
def test_codes_are_those_of_brute_force(kind):
    made = quantizer(kind)
    indices = made.assign(ROWS)
    assert torch.equal(indices, BRUTE[kind](made, ROWS))
    table = made.embedding.weight
    table = table / table.norm(dim=1, keepdim=True) if kind == "cosine" else table
    torch.testing.assert_close(made.codes(indices), table[indices])


@pytest.mark.parametrize("kind", BRUTE)
@torch.no_grad()
def test_many_vectors_are_compared_piece_by_piece(kind, monkeypatch):
    made = quantizer(kind)
    whole = made.assign(ROWS)
    monkeypatch.setattr(vq_quantizers, "MAX_SCORES", 7 * 9)  # seven vectors at a time
    assert torch.equal(made.assign(ROWS), whole) and made.assign(ROWS[:0]).shape == (0,)


def test_signs_are_bits_with_the_first_channel_the_lowest():
    made = SignQuantizer(2**18, 18)
    assert not list(made.parameters()) and not made.state_dict()
    points = torch.full((2, 18), -0.5)
    points[0, 0], points[1, 17] = 1e-9, 3.0
    assert made.assign(points).tolist() == [1, 2**17]
    assert made.assign(torch.zeros(1, 18)).tolist() == [0], "zero counts as negative"
    indices = torch.randint(2**18, (5, 3, 3))
    codes, found = made(made.lookup(indices))
    assert torch.equal(found, indices) and set(codes.unique().tolist()) == {-1.0, 1.0}


def test_only_what_differs_from_mage_is_written():
    assert MAGE.to_dict() == {} and VQLayout(attention_levels=(1,)).to_dict() == {"attention_levels": [1]}
    assert all(foreign_vq.FULL_SIZE[form].layout.to_dict() or form == "maskgit" for form in foreign_vq.FORMATS)
    assert {field.name for field in fields(VQLayout)} >= set(foreign_vq.FULL_SIZE["open_magvit2"].layout.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_levels": (2,)}, "attention_levels holds 2: the levels are 0 to 1"),
        ({"quantizer": "signs"}, "4 signs are 2 \\*\\* 4 codes, not 20"),
        ({"quantizer": "largest"}, "quantizer is 'largest': it must be"),
        ({"mid_blocks": 0}, "mid_blocks is 0"),
        ({"quant_channels": -1}, "quant_channels is -1"),
        ({"extra_decoder_blocks": -1}, "extra_decoder_blocks is -1"),
    ],
)
def test_impossible_layouts_are_refused(unchecked, changes, message):
    with pytest.raises(DigitError, match=message):
        VQGAN(replace(foreign_vq.small("maskgit").cfg, vocab_size=20), VQLayout(**changes))


@pytest.mark.parametrize("form", foreign_vq.FORMATS)
def test_every_layout_is_a_tokenizer_like_our_own(form, tmp_path):
    tokenizer = VQTokenizer(foreign_vq.small(form), chunk_size=2)
    assert isinstance(tokenizer, ImageTokenizer) and tokenizer.grid == (8, 8) and tokenizer.device.type == "cpu"
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    tokens, features = tokenizer.encode_features(images)
    assert tokens.shape == (3, 64) and features.shape == (3, 64, 4) and torch.equal(tokenizer.encode(images), tokens)
    assert tokenizer.embed(tokens).shape == (3, 64, 4) and tokenizer.decode(tokens).shape == (3, 3, 16, 16)
    assert tokenizer.encode(images[:0]).shape == (0, 64) and len(tokenizer.decode(tokens[:0])) == 0
    tokenizer.save(tmp_path / "vqgan")
    again = VQTokenizer.load(tmp_path / "vqgan")
    assert again.fingerprint == tokenizer.fingerprint and again.describe() == tokenizer.describe()
    assert torch.equal(again.encode(images), tokens) and torch.equal(again.decode(tokens), tokenizer.decode(tokens))
    half = VQTokenizer.load(tmp_path / "vqgan", precision="bf16")
    assert half.encode(images).shape == (3, 64) and half.decode(tokens).dtype == torch.uint8


def test_the_layout_is_part_of_the_fingerprint(tmp_path):
    vqgan = foreign_vq.small("taming")
    nearest = VQTokenizer(vqgan)
    other = VQGAN(vqgan.cfg, replace(vqgan.layout, quantizer="dot"))
    other.load_state_dict(vqgan.state_dict())
    assert VQTokenizer(other).fingerprint != nearest.fingerprint
    nearest.save(tmp_path)
    about = read_json(tmp_path / "vqgan.json")
    write_json(tmp_path / "vqgan.json", about | {"layout": about["layout"] | {"quantizer": "dot"}})
    with pytest.raises(MismatchError, match="files are of two models"):
        VQTokenizer.load(tmp_path)
    write_json(tmp_path / "vqgan.json", about | {"layout": {"colour": 1}})
    with pytest.raises(DigitError, match="a setting 'colour'"):
        VQTokenizer.load(tmp_path)


def test_another_layout_is_not_trained():
    from toy_vqgan import QUICK, batches

    from digit.training.vqgan import VQGANTrainer

    with pytest.raises(DigitError, match="layout of another project"):
        VQGANTrainer(foreign_vq.small("llamagen"), batches, QUICK)
