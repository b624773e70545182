"""The renderer straight to pixels: how tokens reach the decoder's grid, its start from a VQGAN, what it refuses."""

from dataclasses import replace

import pytest
import torch
from toy_pixels import TINY, model

from digit.errors import DigitError, MismatchError
from digit.models.pixels import PixelConfig
from digit.models.vqgan import VQGAN
from digit.runtime.config_json import from_json


def test_images_of_tokens():
    images = model()([[0, 1, 2, 3], [3, 2, 1, 0]])
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32


GRIDS = [(4, 2, (2, 2)), (16, 4, (1, 1)), (64, 8, (1, 1)), (8, 4, (1, 2))]  # tokens, rows, cells that one fills


@pytest.mark.parametrize(("length", "rows", "spread"), GRIDS)
def test_every_grid_of_tokens_reaches_the_decoders_grid(length, rows, spread):
    renderer = model(prefix_len=length, prefix_rows=rows)
    assert renderer.spread == spread
    assert renderer.latent(torch.zeros(1, length, dtype=torch.int64)).shape == (1, 4, 4, 4)


def test_a_token_fills_its_own_cells():
    renderer = model()
    with torch.no_grad():  # without the Transformer: its blocks add nothing
        for name, parameter in renderer.transformer.named_parameters():
            if name.endswith(("out.weight", "fc2.weight")):
                parameter.zero_()
    first, other = renderer.latent(torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]]))
    changed = (first - other).abs().sum(0) > 1e-6  # (4, 4)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, 2:] = True  # token 1 is the upper right quarter
    assert torch.equal(changed, expected)


def test_the_start_from_a_vqgan():
    vqgan = VQGAN(replace(TINY.decoder, vocab_size=64))
    torch.nn.init.normal_(vqgan.quantize.embedding.weight, mean=0.5, std=3.0)
    renderer = model(embed_dim=64)
    renderer.start_from_vqgan(vqgan)
    z = torch.randn(2, 4, 4, 4)
    assert torch.equal(renderer.decoder(z), vqgan.decoder(z))
    latent = renderer.latent(torch.randint(4, (64, 4)))
    codes = vqgan.quantize.embedding.weight
    torch.testing.assert_close(latent.std((0, 2, 3)), codes.std(0), rtol=0.5, atol=0)  # 16 random rows of weights
    with pytest.raises(DigitError, match="another shape"):
        model(channels=16).start_from_vqgan(vqgan)


def test_a_new_decoder_has_torchs_initialisation():
    torch.manual_seed(0)
    renderer = model()
    weight = renderer.decoder.conv_in.weight  # uniform in +- 1 / sqrt(inputs)
    assert weight.abs().max() <= (weight[0].numel()) ** -0.5
    assert renderer.decoder.norm_out.weight.eq(1).all()


def test_noise_changes_the_image():
    renderer = model(noise_channels=3)
    noise = renderer.noise({"prefix": torch.zeros(2, 4, dtype=torch.int64)}, torch.Generator().manual_seed(0))
    images = renderer.render(torch.zeros(2, 4, dtype=torch.int64), **noise)
    assert not torch.allclose(images[0], images[1])
    assert model().noise({"prefix": torch.zeros(2, 4)}, None) == {}


def test_the_configuration_survives_json():
    saved = TINY.to_dict()
    assert saved.pop("kind") == "pixels"
    assert from_json(PixelConfig, saved | {"channel_mult": [1, 2, 2]}, "test") == TINY


def test_what_it_refuses():
    for changes in ({"dropout": 0.1}, {"prefix_dropout": 0.1}, {"masked": True}):
        with pytest.raises(DigitError, match="no masks, guidance and dropout"):
            replace(TINY, **changes)
    with pytest.raises(DigitError, match="label_dropout"):
        replace(TINY, label_dropout=0.1)
    with pytest.raises(DigitError, match="knows no classes"):
        model()(torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(DigitError, match="prefix_rows is 3"):
        replace(TINY, prefix_rows=3)
    with pytest.raises(DigitError, match="resolution 18 is not a multiple of 4"):
        replace(TINY, image_size=18)
    with pytest.raises(DigitError, match="noise_channels is -1"):
        replace(TINY, noise_channels=-1)
    with pytest.raises(MismatchError):
        model()([[0, 1, 2, 4]])
