"""The VQGAN model, its converter and the VQ tokenizer."""

from dataclasses import replace

import pytest
import torch

from digit.convert.vqgan import convert_state, convert_vqgan, infer_config
from digit.errors import DigitError, MismatchError
from digit.models.tokenizer import ImageTokenizer
from digit.models.vq_layout import VQLayout
from digit.models.vq_quantizers import nearest_code
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.runtime.files import read_json, write_json
from digit.tokenizers.vq import VQTokenizer, load_asset_vqgan, with_levels

TINY = VQGANConfig(
    resolution=32, channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, num_groups=4, z_channels=6, vocab_size=20
)


@pytest.fixture
def tokenizer():
    vqgan = VQGAN(TINY)
    vqgan.quantize.embedding.weight.data.normal_()
    return VQTokenizer(vqgan)


def pictures(number, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("resolution", "mult"), [(64, (1, 1, 2, 2)), (256, (1, 1, 1, 2, 2))])
def test_reduction_and_shapes(resolution, mult):
    cfg = replace(TINY, resolution=resolution, channels=4, channel_mult=mult, z_channels=5)
    side = resolution // 2 ** (len(mult) - 1)
    assert cfg.grid == (side, side) and cfg.num_tokens == side * side
    with torch.no_grad():
        reconstruction, z, tokens = VQGAN(cfg)(torch.rand(1, 3, resolution, resolution))
    assert z.shape == (1, 5, side, side) and tokens.shape == (1, side * side)
    assert reconstruction.shape == (1, 3, resolution, resolution) and tokens.dtype == torch.int64


def test_the_default_is_the_released_size():
    with torch.device("meta"):
        released = VQGAN(VQGANConfig())
    names = released.state_dict()
    assert names["quantize.embedding.weight"].shape == (1024, 256)
    assert names["encoder.conv_out.weight"].shape == (256, 512, 1, 1)
    assert not [name for name in names if "downsample" in name or "attn" in name or "quant_conv" in name]
    assert VQGANConfig().grid == (16, 16)


def test_config_errors():
    with pytest.raises(DigitError, match="resolution 60"):
        VQGANConfig(resolution=60)
    with pytest.raises(DigitError, match="num_groups 32"):
        VQGANConfig(channels=24)


def test_nearest_code_is_brute_force():
    points, codes = torch.randn(50, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    brute = (points[:, None] - codes).square().sum(2).argmin(1)
    assert torch.equal(nearest_code(points, codes), brute)


def test_straight_through_gradient_reaches_the_encoder():
    vqgan = VQGAN(TINY)
    reconstruction, _, tokens = vqgan(torch.rand(2, 3, 32, 32))
    reconstruction.square().mean().backward()
    assert vqgan.encoder.conv_in.weight.grad.abs().sum() > 0
    torch.testing.assert_close(reconstruction, vqgan.decode_tokens(tokens), rtol=1e-4, atol=1e-5)


def test_tokens_are_in_raster_order(tokenizer):
    vqgan, images = tokenizer.vqgan, pictures(1)
    with torch.no_grad():
        z, tokens = vqgan.encode(images.float() / 255)
    row, column = 3, 5
    distance = (vqgan.quantize.embedding.weight - z[0, :, row, column]).square().sum(1)
    assert tokens[0, row * TINY.grid[1] + column] == distance.argmin()


def test_tokenizer_protocol_and_round_trip(tokenizer):
    assert isinstance(tokenizer, ImageTokenizer)
    tokens = tokenizer.encode(pictures(3))
    assert tokens.shape == (3, 64) and tokens.dtype == torch.int64
    assert tokenizer.decode(tokens).shape == (3, 3, 32, 32) and tokenizer.decode(tokens).dtype == torch.uint8
    assert torch.equal(tokenizer.embed(tokens), tokenizer.vqgan.quantize.embedding.weight[tokens])


def test_the_result_does_not_depend_on_chunks(tokenizer):
    whole, images = tokenizer.encode(pictures(5)), tokenizer.decode(tokenizer.encode(pictures(5)))
    tokenizer.chunk_size = 2
    assert torch.equal(tokenizer.encode(pictures(5)), whole)
    assert (tokenizer.decode(whole).int() - images.int()).abs().max() <= 1


def test_as_many_images_together_as_a_cache_holds(tokenizer):
    """8 MiB of one map: 1 image of 256 px and 32 channels, 8 of 128 px and 16."""
    assert (tokenizer.encoded_together, tokenizer.decoded_together) == (16, 8)  # 32 KiB an image
    tokenizer.chunk_size = 3
    assert (tokenizer.encoded_together, tokenizer.decoded_together) == (3, 8)
    for resolution, channels, images in ((256, 128, 1), (256, 32, 1), (128, 16, 8), (64, 32, 16)):
        with torch.device("meta"):
            vqgan = VQGAN(replace(TINY, resolution=resolution, channels=channels, channel_mult=(1, 1, 1)))
        vqgan.quantize = tokenizer.vqgan.quantize  # on the CPU
        other = VQTokenizer(vqgan)
        assert (other.encoded_together, other.decoded_together) == (images, min(images, 8))


def test_without_gradients_maps_are_overwritten_and_pictures_the_same(tokenizer):
    images = pictures(2).float() / 255
    with_gradients = tokenizer.vqgan(images)
    with torch.no_grad():
        without = tokenizer.vqgan(images)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients, without, strict=True))


def test_features_are_what_the_tokens_stand_for(tokenizer):
    images = pictures(5)
    tokens, features = tokenizer.encode_features(images)
    assert torch.equal(tokens, tokenizer.encode(images)) and torch.equal(features, tokenizer.features(images))
    assert features.shape == (5, 64, TINY.z_channels) and features.dtype == torch.float32
    brute = (features[:, :, None] - tokenizer.vqgan.quantize.embedding.weight).square().sum(3).argmin(2)
    assert (brute == tokens).float().mean() > 0.99, "the nearest code, but for ties of rounding"
    tokenizer.chunk_size = 2
    torch.testing.assert_close(tokenizer.features(images), features)
    tokenizer.bf16 = True
    assert tokenizer.features(images).dtype == torch.float32


def test_no_images(tokenizer):
    assert tokenizer.features(pictures(0)).shape == (0, 64, TINY.z_channels)
    assert tokenizer.encode(pictures(0)).shape == (0, 64)
    assert tokenizer.decode(torch.empty(0, 64, dtype=torch.int64)).shape == (0, 3, 32, 32)


def test_bf16_agrees_on_nearly_all_tokens(tokenizer):
    whole = tokenizer.encode(pictures(4))
    tokenizer.bf16 = True
    assert (tokenizer.encode(pictures(4)) == whole).float().mean() > 0.9


def test_rounding(tokenizer):
    values = torch.tensor([-0.2, 0.6 / 255, 1.2])
    assert tokenizer.to_pixels(values).tolist() == [0, 1, 255]
    assert VQTokenizer(tokenizer.vqgan, rounding="truncate").to_pixels(values).tolist() == [0, 0, 255]
    with pytest.raises(DigitError, match="rounding"):
        VQTokenizer(tokenizer.vqgan, rounding="up")


def test_wrong_images_are_refused(tokenizer):
    with pytest.raises(MismatchError, match=r"takes images of shape \(3, 32, 32\), got \(3, 64, 64\)"):
        tokenizer.encode(pictures(1, size=64))
    with pytest.raises(DigitError, match="grey"):
        tokenizer.encode(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


def test_wrong_tokens_are_refused(tokenizer):
    with pytest.raises(MismatchError, match=r"\(1, 63\), the VQGAN takes \(B, 64\)"):
        tokenizer.decode(torch.zeros(1, 63, dtype=torch.int64))
    with pytest.raises(MismatchError, match="run from 0 to 20, the VQGAN knows 0 to 19"):
        tokenizer.decode(torch.arange(64)[None] % 21)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "vqgan")
    again = VQTokenizer.load(tmp_path / "vqgan", chunk_size=2)
    assert again.fingerprint == tokenizer.fingerprint and again.vqgan.cfg == TINY
    assert torch.equal(again.encode(pictures(3)), tokenizer.encode(pictures(3)))
    about = read_json(tmp_path / "vqgan" / "vqgan.json")
    write_json(tmp_path / "vqgan" / "vqgan.json", about | {"fingerprint": "0" * 64})
    with pytest.raises(MismatchError, match="fingerprint 000000000000"):
        VQTokenizer.load(tmp_path / "vqgan")
    write_json(tmp_path / "vqgan" / "vqgan.json", {})
    with pytest.raises(DigitError, match="describes no VQGAN"):
        VQTokenizer.load(tmp_path / "vqgan")


def released_state():
    cfg = VQGANConfig(resolution=32, channels=32, channel_mult=(1, 2), num_res_blocks=2, z_channels=6)
    return VQGAN(cfg).state_dict()


def test_conversion_reads_sizes_off_shapes():
    cfg = infer_config(released_state(), 32)
    assert (cfg.channels, cfg.channel_mult, cfg.num_res_blocks) == (32, (1, 2), 2)
    assert (cfg.z_channels, cfg.vocab_size, cfg.num_groups) == (6, 1024, 32)


def test_conversion_accounts_for_every_key(tmp_path):
    state = released_state()
    with pytest.raises(DigitError, match=r"unexpected .*quant_conv\.weight"):
        convert_state(state | {"quant_conv.weight": torch.zeros(1)}, 32)
    state.pop("decoder.norm_out.bias")
    with pytest.raises(DigitError, match=r"missing .*decoder\.norm_out\.bias"):
        convert_state(state, 32)
    with pytest.raises(DigitError, match="no VQGAN in MAGE's layout"):
        convert_state({"weight": torch.zeros(1)})


def test_conversion_of_files(tmp_path):
    path = tmp_path / "vqgan.ckpt"
    torch.save({"state_dict": {f"vqgan.{name}": tensor.half() for name, tensor in released_state().items()}}, path)
    assert convert_vqgan(path, 32).quantize.embedding.weight.dtype == torch.float32
    torch.save([1, 2], path)
    with pytest.raises(DigitError):
        convert_vqgan(path)


def test_the_carried_vqgan_reconstructs_a_scene():
    """Held-out scenes (seed 1) at about the PSNR that assets/vqgan64.json states, 24.8 dB."""
    from digit.data.shapes import render_scene

    images = torch.stack([torch.from_numpy(render_scene(1, n, 64)[0]).permute(2, 0, 1) for n in range(6)])
    tokenizer = load_asset_vqgan()
    assert tokenizer.grid == (8, 8) and tokenizer.vocab_size == 1024
    error = (tokenizer.decode(tokenizer.encode(images)).float() - images).square().mean((1, 2, 3)) / 255**2
    assert (-10 * error.log10()).mean() > 24  # dB


def test_residual_codes_are_those_of_each_level_in_turn():
    cfg = replace(TINY, num_levels=3)
    vqgan = VQGAN(cfg)
    vqgan.quantize.embedding.weight.data.normal_()
    tokenizer, images = VQTokenizer(vqgan), pictures(2)
    tokens, z = tokenizer.encode(images), tokenizer.features(images)
    assert tokens.shape == (2, 64 * 3) and cfg.num_tokens == 64 * 3 and tokens.max() < 20
    assert "8 x 8 tokens of 20 codes on 3 levels" in repr(tokenizer)
    rest = z.reshape(-1, 6)
    for level, codes in enumerate(tokenizer.level_vectors):  # against the definition
        chosen = torch.cdist(rest, codes).argmin(1)
        assert torch.equal(tokens.view(-1, 3)[:, level], chosen)
        rest = rest - codes[chosen]
    summed = tokenizer.embed(tokens)
    torch.testing.assert_close(summed, z - rest.view_as(z))
    with torch.no_grad():
        expected = vqgan.decode(summed.transpose(1, 2).reshape(2, 6, 8, 8))
    assert torch.equal(tokenizer.decode(tokens), tokenizer.to_pixels(expected))
    with pytest.raises(MismatchError, match="each cell has 3"):
        tokenizer.embed(tokens[:, :4])
    with pytest.raises(MismatchError, match="takes .B, 192."):
        tokenizer.decode(tokens[:, ::3])


def test_levels_are_saved_and_added(tokenizer, tmp_path):
    more = VQTokenizer(with_levels(tokenizer.vqgan, 2))
    assert torch.equal(more.level_vectors[0], tokenizer.level_vectors[0]) and not more.level_vectors[1].any()
    images = pictures(2)
    assert torch.equal(more.decode(more.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    more.save(tmp_path / "two")
    again = VQTokenizer.load(tmp_path / "two")
    assert again.num_levels == 2 and torch.equal(again.encode(images), more.encode(images))
    assert again.fingerprint == more.fingerprint != tokenizer.fingerprint
    tokenizer.save(tmp_path / "one")
    assert "num_levels" not in read_json(tmp_path / "one" / "vqgan.json")["config"]
    assert with_levels(tokenizer.vqgan, 1) is tokenizer.vqgan
    with pytest.raises(DigitError, match="num_levels is 2, and a quantiser cosine has one"):
        VQGAN(replace(TINY, num_levels=2), VQLayout(quantizer="cosine"))
