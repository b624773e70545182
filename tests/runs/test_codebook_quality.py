"""The entry `quality` of codebook.json: against a plain computation, and where it is shown."""

from dataclasses import replace

import pytest
import torch
from tiny import SHAPES, tiny_recipe
from toy_images import NoiseSource, PatchEncoder

from digit.cli import main
from digit.data.crops import gather_crops
from digit.data.preprocess import PreprocessConfig
from digit.metrics.stability import StabilityConfig, add_noise
from digit.runs.codebook_quality import measure_quality, quality_text
from digit.runs.fit import Run
from digit.runs.report_page import describe
from digit.runtime.files import read_json
from digit.tokenizers.discriminative import DiscriminativeTokenizer
from digit.tokenizers.kmeans.codebook import Codebook, fit_kmeans
from digit.tokenizers.kmeans.config import KMeansConfig

SMALL = PreprocessConfig(image_size=16, encoder_size=16)


def tokenizer_of(cfg: KMeansConfig, source: NoiseSource) -> DiscriminativeTokenizer:
    encoder = PatchEncoder()
    features = encoder.features(gather_crops(source, SMALL)[0]).flatten(0, 1)
    return DiscriminativeTokenizer(encoder, fit_kmeans(cfg, features))


@pytest.mark.parametrize("cfg", [KMeansConfig(num_clusters=6), KMeansConfig(num_clusters=6, pca=2, whiten=True)])
def test_equals_a_plain_computation(cfg):
    source = NoiseSource(80)
    tokenizer = tokenizer_of(cfg, source)
    found = measure_quality(tokenizer, source, SMALL, seed=3, num=70)
    images = gather_crops(source, SMALL, num=70)[0]
    x = tokenizer.features(images).flatten(0, 1).double()
    tokens = tokenizer.encode(images)
    error = (x - tokenizer.embed(tokens).flatten(0, 1)).square().sum() / (x - x.mean(0)).square().sum()
    noisy = tokenizer.encode(add_noise(images, 20, cfg=StabilityConfig(seed=3)))
    assert found["num_images"] == 70 and found["quantization_error"] == pytest.approx(float(error), rel=1e-6)
    assert found["token_change_20db"] == pytest.approx(float((noisy != tokens).double().mean()))
    assert 0 < found["quantization_error"] < 1 and "probe" not in found


def test_more_codes_lower_the_floor():
    source = NoiseSource(40)
    errors = []
    for num in (1, 4, 64):
        tokenizer = tokenizer_of(KMeansConfig(num_clusters=num, max_points_per_centroid=None), source)
        errors.append(measure_quality(tokenizer, source, SMALL)["quantization_error"])
    assert errors[0] == pytest.approx(1, abs=1e-3) and errors[0] > errors[1] > errors[2]


def test_a_constant_encoder_is_the_most_stable_of_all():
    tokenizer = DiscriminativeTokenizer(PatchEncoder(), Codebook(torch.tensor([[0.5, 0.5, 0.5], [9.0, 9.0, 9.0]])))
    assert measure_quality(tokenizer, NoiseSource(), SMALL)["token_change_20db"] == 0


def test_a_probe_needs_classes(caplog):
    source = NoiseSource(60)
    tokenizer = tokenizer_of(KMeansConfig(num_clusters=6), source)
    found = measure_quality(tokenizer, source, SMALL, probe=40)
    assert found["probe_images"] == 40 and 0 <= found["probe"] <= 1 and 0 <= found["probe_features"] <= 1
    assert "linear probe" in quality_text({"quality": found})
    assert not caplog.records
    one = NoiseSource(20)
    one.read = lambda index: (NoiseSource.read(one, index)[0], 0)
    assert "probe" not in measure_quality(tokenizer, one, SMALL, probe=10)
    assert "fewer than two classes" in caplog.text


def test_text_of_what_is_known():
    assert quality_text({}) == quality_text({"quality": []}) == ""
    about = {"quality": {"quantization_error": 0.25, "token_change_20db": 0.125}, "usage": 1.0}
    assert quality_text(about) == (
        "quantization error 0.250 of the features' variance, 12.5% of an image's codes change at 20 dB, "
        "100.0% of the codes in use"
    )


def test_a_run_tells_it(tmp_path, capsys):
    run = Run(replace(tiny_recipe(), codebook_probe=12), SHAPES, tmp_path / "run")
    book = run.fit_codebook()
    about = read_json(run.out / "codebook" / "codebook.json")
    assert book.summary()["quality"] == about["quality"] and about["quality"]["num_images"] == 24
    assert about["quality"]["probe_images"] == 12
    capsys.readouterr()
    assert main(["info", str(run.out)]) == 0
    assert "codebook   done (quantization error 0." in capsys.readouterr().out
    pipe = run.make_pipeline()
    assert "\ncodebook   quantization error 0." in describe(pipe)
