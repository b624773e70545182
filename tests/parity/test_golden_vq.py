"""Published VQ tokenizers against their own code, on the checkpoints and answers in shared/golden/vq."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from digit.convert.vqgan import convert_vqgan, read_vq
from digit.errors import DigitError
from digit.models.vqgan import VQGAN
from digit.released.convert import ReleasedFiles, convert_release
from digit.tokenizers.vq import VQTokenizer

FOLDERS = {
    "llamagen_vq16": "llamagen",
    "llamagen_vq8": "llamagen",
    "taming_vqgan_f16": "taming",
    "taming_gumbel_f8": "taming_gumbel",
    "maskgit_vqgan": "maskgit",
    "diffusers_amused": "diffusers",
    "ibq": "ibq",
    "open_magvit2_lfq": "open_magvit2",
}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(golden, request) -> Path:
    found = golden / "vq" / request.param
    if not found.is_dir():
        pytest.skip(f"no golden vectors of {request.param} beside the repository")
    return found


@pytest.fixture(scope="module")
def meta(folder) -> dict:
    return json.loads((folder / "meta.json").read_text())


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, Tensor]:
    return load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def path(folder, meta) -> Path:
    """The checkpoint as a person would give it; of diffusers the folder."""
    file = folder / meta["checkpoint"]
    return file.parent if file.suffix == ".safetensors" else file


@pytest.fixture(scope="module")
def vqgan(path, meta) -> VQGAN:
    return convert_vqgan(path, meta["image_size"])


def in_unit_range(vqgan: VQGAN, pixels: Tensor) -> Tensor:
    return (pixels + 1) / 2 if vqgan.layout.signed_pixels else pixels


def test_the_file_tells_its_format(folder, path):
    weights = read_vq(path)
    assert weights.format == FOLDERS[folder.name] and not weights.notes


@torch.no_grad()
def test_features_codes_and_pixels(vqgan, expected):
    z, tokens = vqgan.encode(expected["images_uint8"].float() / 255)
    torch.testing.assert_close(z, expected["prequant"], rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected["indices"].flatten(1))
    torch.testing.assert_close(vqgan.quantize.lookup(expected["indices"]), expected["quantized"], rtol=0, atol=1e-6)
    # the order of summation in convolutions and attention differs between memory layouts and builds
    wanted = in_unit_range(vqgan, expected["reconstruction"])
    torch.testing.assert_close(vqgan.decode_tokens(tokens), wanted, rtol=0, atol=1e-4)
    wanted = in_unit_range(vqgan, expected["codes_reconstruction"])
    torch.testing.assert_close(vqgan.decode_tokens(expected["codes"].flatten(1)), wanted, rtol=0, atol=1e-4)


def test_a_converted_folder_answers_the_same(path, meta, expected, tmp_path):
    notes = convert_release(ReleasedFiles(vqgan=str(path), image_size=meta["image_size"]), tmp_path / "out")
    tokenizer = VQTokenizer.load(tmp_path / "out" / "vqgan")
    assert f"of {tokenizer.vocab_size} codes at {meta['image_size']} px" in " ".join(notes)
    tokens = tokenizer.encode(expected["images_uint8"])
    assert torch.equal(tokens, expected["indices"].flatten(1))
    # the release's own rounding; one step where a value lies on the edge of an integer
    assert (tokenizer.decode(tokens).int() - expected["reconstruction_uint8"].int()).abs().max() <= 1
    assert (tokenizer.decode(tokens) != expected["reconstruction_uint8"]).float().mean() < 1e-3
    assert torch.equal(tokenizer.embed(tokens), expected["quantized"].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", ["ibq", "open_magvit2_lfq"])
def test_the_averages_are_taken_and_the_weights_on_request(golden, name, caplog):
    folder = golden / "vq" / name
    if not folder.is_dir():
        pytest.skip(f"no golden vectors of {name} beside the repository")
    meta, expected = json.loads((folder / "meta.json").read_text()), load_file(folder / "expected.safetensors")
    file = folder / meta["checkpoint"]
    convert_vqgan(file, meta["image_size"])
    assert f"took model_ema; to take another, give {file}#state_dict" in caplog.text
    with torch.no_grad():
        raw = convert_vqgan(f"{file}#state_dict", meta["image_size"]).encode(expected["images_uint8"].float() / 255)[1]
    wrong = (raw != expected["indices"].flatten(1)).sum()
    assert wrong == meta["indices_that_differ_with_raw_weights"]


def test_another_format_gives_other_codes_or_is_refused(golden):
    folder = golden / "vq" / "taming_vqgan_f16"
    if not folder.is_dir():
        pytest.skip("no golden vectors of taming-transformers beside the repository")
    expected = load_file(folder / "expected.safetensors")
    as_ibq = convert_vqgan(folder / "last.ckpt", 32, "ibq")
    with torch.no_grad():
        tokens = as_ibq.encode(expected["images_uint8"].float() / 255)[1]
    assert not torch.equal(tokens, expected["indices"].flatten(1)), "the largest product is not the nearest code"
    with pytest.raises(DigitError, match="not in LlamaGen's format, it lacks encoder.conv_blocks"):
        convert_vqgan(folder / "last.ckpt", 32, "llamagen")
