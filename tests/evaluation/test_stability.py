"""Noise has the requested strength; its effect on tokens; the evaluation on toy images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_images import NoiseSource, PatchEncoder

from digit.data.crops import centre_crops, gather_crops
from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError
from digit.evaluation.stability import TABLE1, run_stability, to_table
from digit.metrics.stability import StabilityConfig, add_noise, codebook_health, cosine, measure_stability
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.runtime.files import read_json
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.kmeans.codebook import Codebook
from digit.tokenizers.vq import VQTokenizer

GREY = torch.randint(96, 160, (6, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
SMALL = PreprocessConfig(image_size=16, encoder_size=16)


class Threshold:
    """One token per pixel of the red channel: dark or bright. No features."""

    vocab_size, grid = 2, (48, 48)

    def encode(self, images):
        return (images[:, 0] > 127).flatten(1).long()

    def embed(self, tokens):
        return torch.nn.functional.one_hot(tokens, 2).float()


def patches(dim=3, codes=8) -> DiscriminativeTokenizer:
    return DiscriminativeTokenizer(PatchEncoder(dim), Codebook(torch.rand(codes, dim, generator=seeded(1))))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("unit", ["db", "ratio"])
@pytest.mark.parametrize("power", ["mean_square", "variance"])
def test_noise_has_the_requested_power(unit, power):
    cfg = StabilityConfig(unit=unit, power=power)
    snr = {"db": 20.0, "ratio": 100.0}[unit]  # the same strength: a tenth of the signal's amplitude, hardly clipped
    noise = (add_noise(GREY, snr, cfg=cfg).double() - GREY.double()) / 255
    x = GREY.double() / 255
    signal = x.square().mean((1, 2, 3)) if power == "mean_square" else x.flatten(1).var(1, unbiased=False)
    rounding = 1 / 12 / 255**2  # variance of rounding to 8 bits
    measured = noise.square().mean((1, 2, 3)) - rounding
    # a sample variance of n normal numbers errs by sqrt(2 / n) = 1.7 %
    torch.testing.assert_close(measured, signal / 100, rtol=4 * (2 / 6912) ** 0.5, atol=0)


def test_noise_falls_on_images_of_any_form_alike():
    cfg = StabilityConfig()
    expected = add_noise(GREY, 20.0, cfg=cfg)
    for brought in (GREY.numpy(), GREY.permute(0, 2, 3, 1).numpy(), GREY.float() / 255, list(GREY)):
        assert torch.equal(add_noise(brought, 20.0, cfg=cfg), expected)
    for wrong in (GREY.long(), GREY.float(), GREY[0], GREY > 9):
        with pytest.raises(DigitError, match="images are"):
            add_noise(wrong, 20.0, cfg=cfg)


def test_every_snr_scales_the_same_noise():
    cfg = StabilityConfig()
    weak, strong = (add_noise(GREY, snr, cfg=cfg).float() - GREY for snr in (30.0, 20.0))
    assert torch.corrcoef(torch.stack([weak.flatten(), strong.flatten()]))[0, 1] > 0.99
    assert (strong - 10**0.5 * weak).abs().max() <= 0.5 + 0.5 * 10**0.5 + 1e-3, "rounding apart"


def test_noise_of_an_image_depends_on_its_number_and_the_seed_alone():
    cfg = StabilityConfig(seed=3)
    whole = add_noise(GREY, 10.0, cfg=cfg)
    parts = [add_noise(GREY[2:], 10.0, cfg=cfg, first=2), add_noise(GREY[:2], 10.0, cfg=cfg)]
    assert torch.equal(torch.cat(parts[::-1]), whole) and whole.dtype == torch.uint8
    assert not torch.equal(add_noise(GREY, 10.0, cfg=replace(cfg, seed=4)), whole)
    twice = add_noise(GREY[:1].repeat(2, 1, 1, 1), 10.0, cfg=cfg)
    assert not torch.equal(twice[0], twice[1])
    assert add_noise(GREY, 10.0, cfg=replace(cfg, seed=-1)).shape == GREY.shape


def test_noise_stays_within_8_bits_and_spares_black():
    assert torch.equal(add_noise(torch.zeros_like(GREY), 0.01, cfg=StabilityConfig()), torch.zeros_like(GREY))
    flat = torch.full_like(GREY, 90)
    assert torch.equal(add_noise(flat, 1.0, cfg=StabilityConfig(power="variance")), flat)
    noisy = add_noise(GREY, 0.01, cfg=StabilityConfig())
    assert noisy.min() == 0 and noisy.max() == 255


def test_misuse_says_what_to_do(unchecked):
    with pytest.raises(DigitError, match="choose db or ratio"):
        StabilityConfig(unit="dB")
    with pytest.raises(DigitError, match="ratio is above 0"):
        StabilityConfig(unit="ratio", snrs=(1, 0))
    with pytest.raises(DigitError, match="at least one"):
        StabilityConfig(snrs=())
    with pytest.raises(DigitError, match="uint8"):
        add_noise(GREY.float(), 1.0, cfg=StabilityConfig())
    with pytest.raises(DigitError, match="at least 2"):
        measure_stability({"a": Threshold()}, [GREY[:1]], StabilityConfig())
    with pytest.raises(DigitError, match="no tokenizer"):
        measure_stability({}, [GREY], StabilityConfig())


# ---------------------------------------------------------------- metrics


def test_without_noise_nothing_changes():
    images = gather_crops(NoiseSource(), SMALL)[0]
    cfg = StabilityConfig(snrs=(200.0,))
    result = measure_stability({"patches": patches()}, [images], cfg)
    found = result["tokenizers"]["patches"]
    assert found["token_change"] == [{"value": 0, "low": 0, "high": 0}]
    assert found["code_cosine"] == [{"value": 1, "low": 1, "high": 1}] == found["feature_cosine"]
    assert result["snr_as_fed_db"] == [None]


def test_metrics_equal_a_loop_over_images():
    images, cfg = gather_crops(NoiseSource(), SMALL)[0], StabilityConfig(snrs=(10, 1))
    tokenizer = patches()
    found = measure_stability({"patches": tokenizer}, [images], cfg)["tokenizers"]["patches"]
    for column, snr in enumerate(cfg.snrs):
        change, features, codes = [], [], []
        for i in range(len(images)):
            clean, noisy = images[i : i + 1], add_noise(images[i : i + 1], snr, cfg=cfg, first=i)
            a, b = tokenizer.encode(clean)[0], tokenizer.encode(noisy)[0]
            change.append(np.mean([x != y for x, y in zip(a.tolist(), b.tolist(), strict=True)]))
            for rows, u, v in (
                (features, tokenizer.features(clean)[0], tokenizer.features(noisy)[0]),
                (codes, tokenizer.codebook.centroids[a], tokenizer.codebook.centroids[b]),
            ):
                rows.append(float(((u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))).mean()))
        for metric, values in (("token_change", change), ("feature_cosine", features), ("code_cosine", codes)):
            assert found[metric][column]["value"] == pytest.approx(np.mean(values), rel=1e-5)
            assert found[metric][column]["low"] <= np.mean(values) <= found[metric][column]["high"]


def test_batches_do_not_matter_and_the_seed_does(unchecked):
    tokenizers = {"threshold": Threshold(), "again": Threshold()}
    cfg = StabilityConfig(snrs=(15.0, 5.0))
    whole = measure_stability(tokenizers, [GREY], cfg)
    assert measure_stability(tokenizers, GREY.split(4), cfg, total=6) == whole
    assert measure_stability(tokenizers, [GREY], replace(cfg, seed=1)) != whole


def test_pairs_are_compared_image_by_image(unchecked):
    class Steady(Threshold):
        """Never changes."""

        def encode(self, images):
            return torch.zeros(len(images), 48 * 48, dtype=torch.int64)

    cfg = StabilityConfig(snrs=(20.0, 5.0))
    result = measure_stability({"steady": Steady(), "threshold": Threshold()}, [GREY], cfg)
    (pair,) = result["differences"]
    assert (pair["first"], pair["second"]) == ("steady", "threshold") and "feature_cosine" not in pair
    changes = result["tokenizers"]["threshold"]["token_change"]
    assert 0 < changes[0]["value"] < changes[1]["value"]
    for difference, change in zip(pair["token_change"], changes, strict=True):
        assert difference["value"] == pytest.approx(-change["value"]) and difference["high"] < 0
    assert result["tokenizers"]["steady"]["codebook"]["dead_codes"] == 1


def test_the_encoder_runs_once_an_image_where_it_can():
    images = gather_crops(NoiseSource(num=4), SMALL)[0]
    tokenizer = patches()
    measure_stability({"patches": tokenizer}, [images], StabilityConfig(snrs=(10.0, 5.0)))
    assert tokenizer.encoder.calls == 3, "clean and two noisy"
    tokens, features = tokenizer.encode_features(images)
    assert torch.equal(tokens, tokenizer.encode(images)) and torch.equal(features, tokenizer.features(images))


def test_cosine_of_equal_vectors_is_one_even_where_they_vanish():
    a = torch.zeros(1, 2, 3)
    assert cosine(a, a).item() == 1
    b = torch.tensor([[[1.0, 0, 0], [0, 2, 0]]])
    assert cosine(a, b).item() == 0 and cosine(b, -b).item() == pytest.approx(-1)


def test_codebook_health():
    assert codebook_health(torch.arange(8).repeat(2, 1), 8) == pytest.approx(
        {"usage": 1, "entropy_bits": 3, "perplexity": 8, "dead_codes": 0, "num_tokens": 16}
    )
    one = codebook_health(np.zeros((3, 4), dtype=np.int32), 10)
    assert one == pytest.approx({"usage": 0.1, "entropy_bits": 0, "perplexity": 1, "dead_codes": 9, "num_tokens": 12})
    counts = np.array([5, 3, 2])
    p = counts / 10
    health = codebook_health(np.repeat(np.arange(3), counts), 4)
    assert health["entropy_bits"] == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-12)
    with pytest.raises(DigitError, match="another codebook"):
        codebook_health(torch.tensor([8]), 8)


# ---------------------------------------------------------------- on a source


def test_centre_crops_leave_broken_images_out_and_are_spread():
    source = NoiseSource(num=12, broken=(3,))
    batches = list(centre_crops(source, replace(SMALL, random_crop=True), batch_size=5))
    assert [len(images) for images, _ in batches] == [4, 5, 2]
    images, labels = gather_crops(source, SMALL, num=4)  # 0, 3, 6, 9
    assert labels.tolist() == [0, 0, 1] and images.shape == (3, 3, 16, 16)
    assert torch.equal(images[0], batches[0][0][0]), "the centre, whatever the training crops"


def test_run_writes_json_picture_and_table(tmp_path):
    vqgan = VQGAN(VQGANConfig(resolution=16, channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, num_groups=4,
                              z_channels=6, vocab_size=20))  # fmt: skip
    vqgan.quantize.embedding.weight.data.normal_()
    tokenizers = {"discriminative": patches(), "vq": VQTokenizer(vqgan)}
    result = run_stability(tokenizers, NoiseSource(num=12), SMALL, num=6, out=tmp_path, batch_size=4)
    assert read_json(tmp_path / "stability.json") == result
    assert result["protocol"]["num_images"] == 6 and result["protocol"]["images"] == "noise"
    assert (tmp_path / "stability.png").stat().st_size > 5000
    images = gather_crops(NoiseSource(num=12), SMALL, num=6)[0]
    again = run_stability(tokenizers, images, SMALL, out=tmp_path / "again", batch_size=6)
    assert again["differences"] == result["differences"]
    table = to_table(result)
    assert "| 0.114 | 0.178 |" in table and "| 0.972 | 0.949 |" in table and "6 images (noise)" in table
    value = result["tokenizers"]["vq"]["token_change"][0]["value"]
    row = next(line for line in table.splitlines() if line.startswith("| vq token change"))
    assert row.startswith(f"| vq token change ↓ | {value:.3f} ±") and row.count("|") == 10


def test_the_paper_stands_beside_equal_definitions_only(tmp_path):
    images = gather_crops(NoiseSource(num=4), SMALL)[0]
    cfg = StabilityConfig(unit="ratio", snrs=(30, 1))
    result = run_stability({"vq": patches()}, images, SMALL, cfg, out=tmp_path)
    assert "paper:" not in to_table(result) and "SNR (ratio)" in to_table(result)
    shifted = run_stability({"vq": patches()}, images, SMALL, StabilityConfig(snrs=(30, 12)), out=tmp_path)
    row = next(line for line in to_table(shifted).splitlines() if "paper: vq token" in line)
    assert row.endswith(f"| {TABLE1['vq']['token_change'][0]} | – |")
