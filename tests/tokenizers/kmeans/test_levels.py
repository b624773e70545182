"""Residual and product K-means: what they compute, streams, ranks, fits that are cut short, and their folder."""

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_images import NoiseSource, PatchEncoder
from toy_kmeans import blobs, budget, pieces
from toy_levels import across_ranks, level_config

from digit.data.preprocess import PreprocessConfig
from digit.data.token_writer import write_tokens
from digit.data.tokens import TokenStore
from digit.errors import DigitError, MismatchError
from digit.runtime.files import read_json, write_json
from digit.tokenizers.base import Quantizer
from digit.tokenizers.discriminative import DiscriminativeTokenizer, fit_codebook
from digit.tokenizers.kmeans import unfinished
from digit.tokenizers.kmeans.codebook import fit_kmeans
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.kmeans.levels import LevelCodebook, columns_of
from digit.tokenizers.quantizers import load_quantizer, quantizer_of

KINDS = ("residual_kmeans", "product_kmeans")
SMALL = PreprocessConfig(image_size=16, encoder_size=16)


def fitted(kind: str, features, **changes) -> LevelCodebook:
    cfg = level_config(kind, **changes)
    return quantizer_of(cfg).fit(cfg, features)


def test_residual_levels_are_k_means_of_what_is_left():
    x = blobs(spread=1.0)
    book = fitted("residual_kmeans", x, num_levels=3)
    single, rest = KMeansConfig(num_clusters=6), x
    for level in range(3):
        alone = fit_kmeans(single, rest)
        assert torch.equal(book.centroids[level], alone.centroids)
        assert torch.equal(book.predict(x)[:, level], alone.predict(rest))
        rest = rest - alone.embed(alone.predict(rest))
    torch.testing.assert_close(book.embed(book.predict(x)), x - rest)
    errors = [level["inertia"] for level in book.meta["levels"]]
    assert errors[0] > errors[1] > errors[2]


def test_product_parts_are_k_means_of_their_columns():
    x = blobs(spread=1.0)
    book = fitted("product_kmeans", x, num_levels=2)
    parts = [slice(0, 2), slice(2, 5)]
    assert [book.columns(level) for level in range(2)] == parts
    for level, part in enumerate(parts):
        alone = fit_kmeans(KMeansConfig(num_clusters=6), x[:, part].contiguous())
        assert torch.equal(book.centroids[level][:, part], alone.centroids)
        assert torch.equal(book.predict(x)[:, level], alone.predict(x[:, part]))
    outside = book.centroids.clone()
    outside[0, :, :2] = outside[1, :, 2:] = 0
    assert not outside.any()
    whole = torch.cat([book.centroids[0][book.predict(x)[:, 0], :2], book.centroids[1][book.predict(x)[:, 1], 2:]], 1)
    assert torch.equal(book.embed(book.predict(x)), whole)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 12), st.booleans())
def test_predict_is_greedy_and_does_not_depend_on_the_batch(seed, kind, levels, size, pca):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 6, generator=generator)
    book = fitted(kind, x, num_levels=levels, num_clusters=5, pca=4 if pca else 0, whiten=pca, seed=seed % 7)
    codes = book.predict(x)
    assert codes.shape == (60, levels) and torch.equal(codes, torch.cat([book.predict(p) for p in x.split(size)]))
    again = fitted(kind, x, num_levels=levels, num_clusters=5, pca=4 if pca else 0, whiten=pca, seed=seed % 7)
    assert again.fingerprint == book.fingerprint
    seen = book.pca.project(x) if pca else x
    for level in range(levels):
        part = book.columns(level)
        distance = (seen[:, None, part].double() - book.centroids[level][None, :, part]).square().sum(-1)
        chosen = distance.gather(1, codes[:, level, None])[:, 0]
        torch.testing.assert_close(chosen, distance.amin(1), rtol=1e-9, atol=1e-9)
        seen = seen - book.centroids[level][codes[:, level]] if kind == "residual_kmeans" else seen
    total = torch.stack([book.level_vectors[level][codes[:, level]] for level in range(levels)]).sum(0)
    mean = book.pca.mean if pca else 0
    torch.testing.assert_close(book.embed(codes), total + mean, atol=1e-4, rtol=1e-4)


def test_columns_cover_every_number_once():
    for num, levels in ((7, 3), (8, 2), (5, 5)):
        covered = [i for level in range(levels) for i in range(num)[columns_of("product_kmeans", level, levels, num)]]
        assert covered == list(range(num))


@pytest.mark.parametrize("kind", KINDS)
def test_one_level_is_k_means(kind):
    x = blobs()
    book, alone = fitted(kind, x, num_levels=1), fit_kmeans(KMeansConfig(num_clusters=6), x)
    assert torch.equal(book.centroids[0], alone.centroids) and torch.equal(book.predict(x)[:, 0], alone.predict(x))
    assert alone.num_levels == 1 and torch.equal(alone.level_vectors[0], alone.vectors)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_beyond_the_budget(kind):
    x = blobs(spread=1.0, num=2000, dim=6)
    whole = level_config(kind, max_points_per_centroid=None, precision="fp32", num_iterations=3, tolerance=0)
    small = replace(whole, memory_budget_bytes=budget(whole, 6, 100))
    stream = pieces(x, 70)
    book = quantizer_of(small).fit(small, stream)
    assert all(level["streamed"] for level in book.meta["levels"])
    assert stream.passes == 2 * (1 + 3 + 1)
    torch.testing.assert_close(book.centroids, quantizer_of(whole).fit(whole, pieces(x, 300)).centroids)


def test_two_ranks_fit_what_one_does(tmp_path):
    torch.multiprocessing.spawn(across_ranks, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for kind in KINDS:
        cfg = level_config(kind, pca=3, whiten=True)
        alone = quantizer_of(cfg).fit(cfg, blobs(spread=1.5))
        assert torch.equal(first[kind], second[kind])
        torch.testing.assert_close(first[kind], alone.centroids, atol=1e-4, rtol=1e-4)


class Kill(Exception):
    """The end of a process that nothing was prepared for."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_pass", [1, 2, 3, 6, 8])
def test_a_killed_fit_goes_on_to_the_same_codebook(tmp_path, monkeypatch, kind, in_pass):
    monkeypatch.setattr(unfinished, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(unfinished, "SAVING_SHARE", float("inf"))
    x = blobs(spread=1.0, num=1000)
    cfg = level_config(kind, pca=4, max_points_per_centroid=None, num_iterations=3, tolerance=0)
    cfg = replace(cfg, memory_budget_bytes=budget(cfg, 4, 60))
    fit, stream = quantizer_of(cfg).fit, pieces(x, 70)
    whole = fit(cfg, pieces(x, 70))
    assert whole.meta["levels"][0]["streamed"]

    def breaking():
        for number, part in enumerate(stream()):
            if stream.passes == in_pass and number == 5:
                raise Kill
            yield part

    with pytest.raises(Kill):
        fit(cfg, breaking, folder=tmp_path, request={"data": 1})
    again = pieces(x, 70)
    book = fit(cfg, again, folder=tmp_path, request={"data": 1})
    assert again.passes <= 11 - in_pass + 2  # a pass of PCA, two levels of five: no finished part is made again
    assert book.fingerprint == whole.fingerprint and book.meta == whole.meta
    book.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codebook.json", "codebook.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_levels(kind, tmp_path):
    source, encoder = NoiseSource(), PatchEncoder()
    cfg = level_config(kind, num_levels=3)
    book = fit_codebook(source, SMALL, encoder, cfg, subset=1)
    assert isinstance(book, Quantizer) and book.meta[kind] == asdict(cfg)
    book.save(tmp_path / "book")
    loaded = load_quantizer(tmp_path / "book")
    assert loaded.meta == book.meta and loaded.fingerprint == book.fingerprint
    assert read_json(tmp_path / "book" / "codebook.json")["quantizer"] == kind
    summary = loaded.summary()
    assert summary["num_levels"] == 3 and summary["num_codes"] == 6 and 0 < summary["usage"] <= 1
    tokenizer = DiscriminativeTokenizer(encoder, loaded)
    assert "4 x 4 tokens of 6 codes on 3 levels" in repr(tokenizer) and tokenizer.grid == (4, 4)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (5, 48) and torch.equal(tokens.view(5, 16, 3), book.predict(encoder.features(images)))
    assert torch.equal(tokenizer.encode_features(images)[0], tokens)
    assert torch.equal(tokenizer.embed(tokens), book.embed(tokens.view(5, 16, 3)))
    with pytest.raises(MismatchError, match="each cell has 3"):
        tokenizer.embed(tokens[:, :4])
    store = write_tokens(tmp_path / "tokens", source, SMALL, tokenizer, None)
    assert store.discriminative.shape == (12, 48)
    assert store.manifest["discriminative"] == {"grid": [4, 4], "length": 48, "vocab_size": 6, "levels": 3}
    assert len(TokenStore.open(tmp_path / "tokens")) == 12


def test_damaged_folders_are_refused(tmp_path):
    book = fitted("residual_kmeans", blobs())
    book.save(tmp_path)
    meta = read_json(tmp_path / "codebook.json")
    write_json(tmp_path / "codebook.json", meta | {"quantizer": "product_kmeans"})  # the kind decides the tokens
    with pytest.raises(MismatchError, match="two fits"):
        load_quantizer(tmp_path)
    write_json(tmp_path / "codebook.json", meta | {"format": 99})
    with pytest.raises(DigitError, match="format 1"):
        load_quantizer(tmp_path)
    write_json(tmp_path / "codebook.json", meta | {"quantizer": "other"})
    with pytest.raises(DigitError, match="knows kmeans, residual_kmeans, product_kmeans"):
        load_quantizer(tmp_path)


def test_mistakes_say_what_to_do():
    x = blobs()
    with pytest.raises(DigitError, match="num_levels is 6, features are 5 numbers: set it lower"):
        fitted("product_kmeans", x, num_levels=6)
    with pytest.raises(DigitError, match="num_levels"):
        level_config("residual_kmeans", num_levels=17)
    book = fitted("residual_kmeans", x)
    with pytest.raises(MismatchError, match=r"takes \(\.\.\., 2\)"):
        book.embed(torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(MismatchError, match="knows 0 to 5"):
        book.embed(torch.full((3, 2), 6))
    with pytest.raises(MismatchError, match="have 5 features, the input has 4"):
        book.predict(x[:, :4])
    with pytest.raises(DigitError, match="NaN or Inf"):
        book.predict(torch.full((2, 5), torch.nan))
    with pytest.raises(DigitError, match="NaN"):
        LevelCodebook("residual_kmeans", torch.full((2, 2, 2), torch.nan))
    with pytest.raises(DigitError, match="levels, codes, features"):
        LevelCodebook("residual_kmeans", torch.randn(2, 2))


def test_costs_of_levels():
    base = KMeansConfig(num_clusters=8).cost(1000, 12)
    residual, product = (level_config(kind, num_clusters=8, num_levels=3).cost(1000, 12) for kind in KINDS)
    assert residual.num_passes == product.num_passes == 3 * base.num_passes
    assert residual.flops == 3 * base.flops and product.flops == base.flops
    with_pca = level_config("residual_kmeans", num_clusters=8, num_levels=3, pca=4).cost(1000, 12)
    assert with_pca.num_passes == 4
