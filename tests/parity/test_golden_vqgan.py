"""The VQGAN against the authors' released code, on the checkpoints and answers in shared/golden."""

import pytest
import torch
from safetensors.torch import load_file

from digit.convert.vqgan import convert_vqgan
from digit.tokenizers.vq import VQTokenizer


@pytest.fixture(scope="module")
def expected(golden):
    return load_file(golden / "expected.safetensors")


@pytest.mark.parametrize("name", ["vqgan.ckpt", "stage2_ar.pt"])
def test_released_vqgan(golden, expected, name):
    vqgan = convert_vqgan(golden / name)
    with torch.no_grad():
        z, tokens = vqgan.encode(expected["images_uint8"].float() / 255)
        reconstruction = vqgan.decode_tokens(tokens)
    torch.testing.assert_close(z, expected["vqgan_prequant"], rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected["vqgan_indices"])
    # 1e-4 of values up to 6: the order of summation in the convolutions differs between memory layouts and builds
    torch.testing.assert_close(reconstruction, expected["vqgan_reconstruction"], rtol=0, atol=1e-4)


def test_tokenizer_and_the_released_truncation(golden, expected):
    tokenizer = VQTokenizer(convert_vqgan(golden / "vqgan.ckpt"), rounding="truncate", chunk_size=1)
    tokens = tokenizer.encode(expected["images_uint8"])
    assert torch.equal(tokens, expected["vqgan_indices"])
    released = (expected["vqgan_reconstruction"].clamp(0, 1) * 255).to(torch.uint8)
    assert (tokenizer.decode(tokens).int() - released.int()).abs().max() <= 1  # a value on the edge of an integer
