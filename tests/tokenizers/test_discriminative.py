"""Codebook and discriminative tokenizer over a tiny encoder that needs no weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from toy_images import NoiseSource, PatchEncoder

from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError, MismatchError
from digit.models.tokenizer import ImageTokenizer
from digit.runtime.files import read_json, write_json
from digit.tokenizers.discriminative import DiscriminativeTokenizer, choose_images, fit_codebook
from digit.tokenizers.kmeans.codebook import Codebook
from digit.tokenizers.kmeans.config import KMeansConfig

SMALL = PreprocessConfig(image_size=16, encoder_size=16)


@pytest.fixture
def codebook() -> Codebook:
    return fit_codebook(NoiseSource(), SMALL, PatchEncoder(), KMeansConfig(num_clusters=8), subset=0.5)


def test_fit_records_where_it_comes_from(codebook):
    assert codebook.centroids.shape == (8, 3) and len(codebook) == 8 and codebook.dim == 3
    meta = codebook.meta
    assert meta["encoder"]["name"] == "patches" and meta["encoder"]["fingerprint"] == PatchEncoder().fingerprint
    assert meta["layer"] == -3 and meta["preprocessing"]["image_size"] == 16 and meta["kmeans"]["num_clusters"] == 8
    assert (
        meta["num_images"] == 6
        and meta["num_points"] == 96 == sum(meta["counts"])
        and meta["source"]["name"] == "noise"
    )
    assert meta["history"][-1]["inertia"] == meta["inertia"] and meta["dead_codes"] == 0
    assert codebook.summary()["encoder"] == "patches" and codebook.summary()["num_codes"] == 8


def test_fit_is_repeatable(codebook):
    again = fit_codebook(NoiseSource(), SMALL, PatchEncoder(), KMeansConfig(num_clusters=8), subset=0.5, batch_size=5)
    torch.testing.assert_close(codebook.centroids, again.centroids)
    other = fit_codebook(NoiseSource(), SMALL, PatchEncoder(), KMeansConfig(num_clusters=8), subset=0.5, seed=1)
    assert other.fingerprint != codebook.fingerprint


def test_the_same_fit_gives_the_same_files(codebook, tmp_path):
    again = fit_codebook(NoiseSource(), SMALL, PatchEncoder(), KMeansConfig(num_clusters=8), subset=0.5)
    for name, book in (("first", codebook), ("second", again)):
        book.save(tmp_path / name)
    for name in ("codebook.json", "codebook.safetensors"):  # no times, no dates
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_many_dead_codes_are_told(caplog):
    flat = FlatSource()
    fit_codebook(flat, SMALL, PatchEncoder(), KMeansConfig(num_clusters=16), subset=1)
    assert len(caplog.records) == 1 and "13 of 16 codes (81 percent) stand for no patch" in caplog.text
    assert "smaller kmeans.num_clusters" in caplog.text
    caplog.clear()
    fit_codebook(flat, SMALL, PatchEncoder(), KMeansConfig(num_clusters=3), subset=1)
    assert not caplog.records


class FlatSource(NoiseSource):
    """Pictures of one of three colours."""

    def read(self, index: int):
        return Image.new("RGB", (20, 18), (100 * (index % 3), 0, 50)), 0


def test_features_are_computed_once_where_they_fit():
    encoder = PatchEncoder()
    fit_codebook(NoiseSource(), SMALL, encoder, KMeansConfig(num_clusters=4), subset=1, batch_size=12)
    assert encoder.calls == 1


def test_broken_images_are_left_out_and_named():
    source = NoiseSource(broken=(3,))
    codebook = fit_codebook(source, SMALL, PatchEncoder(), KMeansConfig(num_clusters=4), subset=1, max_bad_fraction=0.2)
    assert codebook.meta["num_images"] == 11 and codebook.meta["num_points"] == 11 * 16
    assert codebook.meta["bad"][0][0] == "noise/3.png"
    with pytest.raises(DigitError, match="max_bad_fraction"):
        fit_codebook(source, SMALL, PatchEncoder(), KMeansConfig(num_clusters=4), subset=1)


def test_subset_of_images():
    chosen = choose_images(1000, 256, 8 * 16, subset=0.1, seed=0)
    assert len(chosen) == len(set(chosen)) == 100 and (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, choose_images(1000, 256, 8 * 16, subset=0.1, seed=0))
    assert not np.array_equal(chosen, choose_images(1000, 256, 8 * 16, subset=0.1, seed=1))
    assert len(choose_images(1000, 256, 8 * 8192, subset=0.1, seed=0)) == 256  # 8 * 8192 / 256
    assert len(choose_images(100, 256, 8 * 8192, subset=0.1, seed=0)) == 100  # all there are
    with pytest.raises(DigitError, match="fraction"):
        choose_images(10, 1, 1, subset=0, seed=0)


def test_too_few_patches():
    with pytest.raises(DigitError, match="wants 300 clusters but got 192 points"):
        fit_codebook(NoiseSource(), SMALL, PatchEncoder(), KMeansConfig(num_clusters=300))


def test_tokenizer_is_an_image_tokenizer(codebook):
    tokenizer = DiscriminativeTokenizer(PatchEncoder(), codebook)
    assert isinstance(tokenizer, ImageTokenizer) and tokenizer.vocab_size == 8 and tokenizer.grid == (4, 4)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (5, 16) and tokens.dtype == torch.int64
    features = tokenizer.features(images)
    distance = (features[:, :, None] - codebook.centroids).square().sum(-1)
    assert torch.equal(tokens, distance.argmin(-1))
    assert torch.equal(tokens, torch.cat([tokenizer.encode(one) for one in images.split(1)]))
    assert torch.equal(tokenizer.embed(tokens), codebook.centroids[tokens])
    with pytest.raises(DigitError, match="knows 0 to 7"):
        tokenizer.embed(tokens + 8)
    assert tokenizer.to("cpu") is tokenizer


def test_fingerprint_covers_encoder_and_codebook(codebook):
    bare = Codebook(codebook.centroids)
    prints = {
        DiscriminativeTokenizer(PatchEncoder(), bare).fingerprint,
        DiscriminativeTokenizer(PatchEncoder(name="others"), bare).fingerprint,
        DiscriminativeTokenizer(PatchEncoder(), Codebook(codebook.centroids + 1)).fingerprint,
    }
    assert len(prints) == 3 and DiscriminativeTokenizer(PatchEncoder(), codebook).fingerprint in prints


def test_another_dimension_is_refused():
    book = Codebook(torch.randn(4, 768), {"encoder": {"name": "dinov2_vitb14_reg4"}})
    with pytest.raises(MismatchError) as error:
        DiscriminativeTokenizer(PatchEncoder(dim=1024), book)
    assert str(error.value) == (
        "codebook has 768 features, encoder gives 1024: it was fitted on dinov2_vitb14_reg4; "
        "choose that encoder or refit (digit codebook ...)"
    )


def test_another_encoder_is_refused_with_both_named(codebook):
    with pytest.raises(MismatchError) as error:
        DiscriminativeTokenizer(PatchEncoder(name="others"), codebook)
    text = str(error.value)
    for part in ("patches", "others", PatchEncoder().fingerprint[:12], PatchEncoder(name="others").fingerprint[:12]):
        assert part in text
    assert "\n" not in text


def test_save_and_load_is_the_identity(codebook, tmp_path):
    codebook.save(tmp_path / "book")
    loaded = Codebook.load(tmp_path / "book")
    assert torch.equal(loaded.centroids, codebook.centroids)
    assert loaded.meta == codebook.meta and loaded.fingerprint == codebook.fingerprint
    assert sorted(p.name for p in (tmp_path / "book").iterdir()) == ["codebook.json", "codebook.safetensors"]


def test_damaged_folders_are_refused(codebook, tmp_path):
    with pytest.raises(DigitError, match="no such file"):
        Codebook.load(tmp_path / "nowhere")
    codebook.save(tmp_path)
    meta = read_json(tmp_path / "codebook.json")
    write_json(tmp_path / "codebook.json", meta | {"fingerprint": "0" * 64})
    with pytest.raises(MismatchError, match="000000000000"):
        Codebook.load(tmp_path)
    write_json(tmp_path / "codebook.json", meta | {"format": 99})
    with pytest.raises(DigitError, match="format 1"):
        Codebook.load(tmp_path)
    (tmp_path / "codebook.json").write_text("[1, 2")
    with pytest.raises(DigitError, match="JSON"):
        Codebook.load(tmp_path)


def test_released_array(tmp_path):
    centroids = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    np.save(tmp_path / "km.npy", centroids)
    book = Codebook.from_npy(tmp_path / "km.npy")
    assert np.array_equal(book.centroids.numpy(), centroids)
    assert DiscriminativeTokenizer(PatchEncoder(), book).vocab_size == 8
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "flat.npy", centroids[0])
    (tmp_path / "text.npy").write_text("no array")
    for name in ("pickled", "flat", "text", "missing"):
        with pytest.raises(DigitError, match=f"{name}.npy"):
            Codebook.from_npy(tmp_path / f"{name}.npy")
    with pytest.raises(DigitError, match="NaN"):
        Codebook(torch.full((2, 2), torch.nan))
