"""Networks of diffusers' VQModel against diffusers itself: with attention, without, and as aMUSEd has them."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the optional library diffusers is not installed")

from digit.convert.vqgan import convert_vqgan  # noqa: E402  (after the skip)

PLAIN = {
    "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 6, "num_vq_embeddings": 40,
    "norm_num_groups": 16, "vq_embed_dim": 4, "lookup_from_codebook": True, "mid_block_add_attention": False,
}  # fmt: skip
MODELS = {
    "plain": {},
    "attention in the middle": {"mid_block_add_attention": True},
    "attention in the deepest level": {
        "mid_block_add_attention": True,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
    "two blocks, three levels": {
        "block_out_channels": (32, 64, 96), "layers_per_block": 2, "vq_embed_dim": None,
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_and_pixels_are_those_of_diffusers(name, tmp_path):
    model = diffusers.VQModel(**(PLAIN | MODELS[name])).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path / "vqvae")
    images = torch.randint(0, 256, (2, 3, 32, 32)) / 255
    z = model.encode(images).latents
    tokens = model.quantize(z)[2][2].view(2, -1)
    side = z.shape[-1]
    pixels = model.decode(
        tokens.flatten(), force_not_quantize=True, shape=(2, side, side, model.quantize.vq_embed_dim)
    ).sample
    for given in (tmp_path, tmp_path / "vqvae", tmp_path / "vqvae" / "diffusion_pytorch_model.safetensors"):
        vqgan = convert_vqgan(given, 32)
        ours, found = vqgan.encode(images)
        torch.testing.assert_close(ours, z, rtol=1e-4, atol=1e-4)
        assert torch.equal(found, tokens)
        torch.testing.assert_close(vqgan.decode_tokens(tokens), pixels, rtol=1e-4, atol=1e-4)
