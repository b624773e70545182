"""The carried VQGANs: loadable, small, described; 8-bit storage loses little."""

import pytest
import torch

import digit
from digit.data.shapes import render_batch
from digit.errors import DigitError
from digit.tokenizers.vq import ASSETS, load_asset_vqgan, pack_int8, unpack_int8
from digit.training.vqgan import evaluate_vqgan


@pytest.mark.parametrize(("name", "psnr"), [("vqgan64", 24.0), ("vqgan64_shapes", 25.0)])
def test_carried_vqgans_reconstruct_scenes(name, psnr):
    vq = load_asset_vqgan(name)
    scenes = torch.from_numpy(render_batch(77, range(32), 64)[0]).permute(0, 3, 1, 2)
    assert vq.grid == (8, 8) and vq.vocab_size == 1024 and vq.resolution == 64
    assert evaluate_vqgan(vq.vqgan, [scenes])["psnr"] > psnr


def test_the_package_carries_at_most_ten_megabytes():
    from pathlib import Path

    folder = Path(digit.__file__).parent / "assets"
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 10e6
    assert {p.stem for p in folder.iterdir()} == set(ASSETS)


def test_other_names_are_refused():
    with pytest.raises(DigitError, match="no carried VQGAN named big"):
        load_asset_vqgan("big")


def test_int8_storage_keeps_each_channel_to_half_a_step():
    weights = {
        "conv.weight": torch.randn(5, 4, 3, 3) * torch.logspace(-3, 1, 5)[:, None, None, None],
        "norm.weight": torch.randn(7),
    }
    again = unpack_int8(pack_int8(weights))
    assert again.keys() == weights.keys()
    step = weights["conv.weight"].flatten(1).abs().amax(1) / 127
    error = (again["conv.weight"] - weights["conv.weight"]).flatten(1).abs().amax(1)
    assert (error <= 0.51 * step * 1.05).all()
    assert torch.equal(again["norm.weight"], weights["norm.weight"].half().float())
