"""PCA of features in one pass: against scikit-learn, however the stream is cut or shared, kept, and before k-means."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_images import NoiseSource, PatchEncoder
from toy_kmeans import blobs, numbered, pieces
from toy_pca import across_ranks, correlated

from digit.data.preprocess import PreprocessConfig
from digit.errors import DigitError, MismatchError, Stopped
from digit.runtime.files import read_json
from digit.tokenizers.discriminative import DiscriminativeTokenizer, fit_codebook
from digit.tokenizers.kept import KeptTensors
from digit.tokenizers.kmeans import unfinished
from digit.tokenizers.kmeans.codebook import Codebook, fit_kmeans
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.pca import PCA, Moments, fit_pca

SMALL = PreprocessConfig(image_size=16, encoder_size=16)


@pytest.mark.parametrize("whiten", [False, True])
def test_equals_scikit_learn(whiten):
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = correlated(500, 12) + 40
    ours, explained = fit_pca(pieces(x, 70), 5, whiten=whiten)
    theirs = decomposition.PCA(5, whiten=whiten, svd_solver="full").fit(x.double().numpy())
    signs = np.sign((ours.components.numpy() * theirs.components_).sum(1))
    np.testing.assert_allclose(ours.mean, theirs.mean_, rtol=1e-6)
    np.testing.assert_allclose(ours.components.numpy() * signs[:, None], theirs.components_, atol=1e-6)
    np.testing.assert_allclose(ours.project(x).numpy() * signs, theirs.transform(x.double().numpy()), atol=1e-4)
    np.testing.assert_allclose(ours.scale, np.sqrt(theirs.explained_variance_) if whiten else 1, rtol=1e-5)
    assert explained == pytest.approx(theirs.explained_variance_ratio_.sum(), rel=1e-6)


def test_whitened_features_are_white():
    x = correlated(800, 9)
    y = fit_pca(x, 6, whiten=True)[0].project(x)
    torch.testing.assert_close(torch.cov(y.T.double()), torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.mean(0), torch.zeros(6), atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([0.0, 1.0, 1e4]))
def test_moments_do_not_depend_on_the_cuts(seed, size, offset):
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((60, 4)) + offset)
    moments = Moments(4)
    for part in x.split(size):
        moments.add(part)
    assert moments.num == 60
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.scatter / 59, torch.cov(x.T), rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.booleans())
def test_restore_and_project_are_inverse(seed, num, whiten):
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((50, 6))).float()
    pca = fit_pca(x, num, whiten=whiten)[0]
    y = pca.project(x)
    torch.testing.assert_close(pca.project(pca.restore(y)), y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pca.restore(y) - pca.restore(0 * y), pca.directions(y), atol=1e-4, rtol=1e-4)
    if num == 6:
        torch.testing.assert_close(pca.restore(y), x, atol=1e-4, rtol=1e-4)


def test_projection_does_not_depend_on_the_batch():
    x = correlated(200, 33) * 100
    pca = fit_pca(x, 20, whiten=True)[0]
    assert torch.equal(pca.project(x), torch.cat([pca.project(part) for part in x.split(7)]))


def test_streams_with_numbers_and_arrays_are_the_same():
    x = correlated(300, 5)
    whole = fit_pca(x, 3)[0]
    for features in (numbered(x, 0), pieces(x, 50), x.numpy(), x.double()):
        found = fit_pca(features, 3)[0]
        torch.testing.assert_close(found.components, whole.components)
    stream = pieces(x, 50)
    fit_pca(stream, 3)
    assert stream.passes == 1


def test_two_ranks_fit_what_one_does(tmp_path):
    torch.multiprocessing.spawn(across_ranks, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    alone = fit_pca(correlated(300, 5), 3, whiten=True)
    for name, tensor in alone[0].tensors().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor)
    assert first["explained"] == second["explained"] == pytest.approx(alone[1])
    assert torch.equal(first["centroids"], second["centroids"])
    book = fit_kmeans(KMeansConfig(num_clusters=6, pca=3, whiten=True), correlated(300, 5))
    torch.testing.assert_close(first["centroids"], book.centroids)


# ---- in front of k-means


def pca_config(**changes) -> KMeansConfig:
    return KMeansConfig(**dict(num_clusters=8, pca=2, whiten=True) | changes)


def test_tokens_are_those_of_projected_features(tmp_path):
    x = blobs(spread=1.0)
    cfg = pca_config()
    book = fit_kmeans(cfg, pieces(x, 70))
    by_hand = fit_kmeans(replace(cfg, pca=0, whiten=False), pieces(book.pca.project(x), 70))
    assert torch.equal(book.centroids, by_hand.centroids) and book.dim == 5 and by_hand.dim == 2
    assert torch.equal(book.predict(x), by_hand.predict(book.pca.project(x)))
    assert book.embed([3, 1]).shape == (2, 5)
    torch.testing.assert_close(book.pca.project(book.embed(torch.arange(8))), book.centroids)
    assert 0 < book.meta["pca"]["explained"] < 1 and book.summary()["pca"]["num"] == 2
    assert book.fingerprint != Codebook(book.centroids).fingerprint
    book.save(tmp_path)
    again = Codebook.load(tmp_path)
    assert again.fingerprint == book.fingerprint and torch.equal(again.predict(x), book.predict(x))
    assert read_json(tmp_path / "codebook.json")["format"] == 2  # an older version would read centroids alone
    assert "by 2 components" in repr(again)


def test_without_pca_nothing_changes(tmp_path):
    x = blobs()
    book = fit_kmeans(KMeansConfig(num_clusters=8), x)
    book.save(tmp_path)
    assert read_json(tmp_path / "codebook.json")["format"] == 1 and "pca" not in book.meta and book.pca is None
    assert book.fingerprint == Codebook(book.centroids).fingerprint


def test_a_tokenizer_takes_it():
    cfg = KMeansConfig(num_clusters=8, pca=2)
    book = fit_codebook(NoiseSource(), SMALL, PatchEncoder(), cfg, subset=0.5)
    tokenizer = DiscriminativeTokenizer(PatchEncoder(), book)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    tokens = tokenizer.encode(images)
    assert torch.equal(tokens, torch.cat([tokenizer.encode(one) for one in images.split(1)]))
    assert tokenizer.embed(tokens).shape == (5, 16, 3)


@pytest.fixture
def every_iteration(monkeypatch):
    monkeypatch.setattr(unfinished, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(unfinished, "SAVING_SHARE", float("inf"))


class Kill(Exception):
    """The end of a process that nothing was prepared for."""


@pytest.mark.parametrize("in_pass", [1, 2])
def test_a_killed_fit_goes_on_to_the_same_codebook(tmp_path, every_iteration, in_pass):
    x, cfg = blobs(spread=1.0), pca_config()
    stream = pieces(x, 70)

    def breaking():
        for number, part in enumerate(stream()):
            if stream.passes == in_pass and number == 4:
                raise Kill
            yield part

    with pytest.raises(Kill):
        fit_kmeans(cfg, breaking, folder=tmp_path, request={"data": 1})
    assert (tmp_path / "pca.partial.safetensors").exists() == (in_pass == 2)
    again = pieces(x, 70)
    book = fit_kmeans(cfg, again, folder=tmp_path, request={"data": 1})
    assert again.passes == 3 - in_pass
    whole = fit_kmeans(cfg, pieces(x, 70))
    assert book.fingerprint == whole.fingerprint and book.meta == whole.meta
    book.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codebook.json", "codebook.safetensors"]


def test_what_was_kept_for_another_request_is_left(tmp_path, caplog):
    x = correlated(100, 4)
    kept = KeptTensors(tmp_path / "kept.safetensors", {"data": "here"})
    first = fit_pca(x, 2, kept=kept)
    assert fit_pca(torch.zeros(0, 4), 2, kept=kept)[0].fingerprint == first[0].fingerprint  # read, not fitted
    other = KeptTensors(tmp_path / "kept.safetensors", {"data": "there"})
    assert fit_pca(2 * x, 2, kept=other)[0].fingerprint != first[0].fingerprint
    assert "data = here, now asked for there" in caplog.text


@pytest.mark.parametrize("damage", [lambda d: d[:-4], lambda d: d[:-9] + bytes([d[-9] ^ 64]) + d[-8:], lambda d: b""])
def test_a_damaged_file_is_told_and_made_again(tmp_path, caplog, damage):
    x, path = correlated(100, 4), tmp_path / "kept.safetensors"
    first = fit_pca(x, 2, kept=KeptTensors(path, {}))[0]
    path.write_bytes(damage(path.read_bytes()))
    assert fit_pca(x, 2, kept=KeptTensors(path, {}))[0].fingerprint == first.fingerprint
    assert len(caplog.records) == 1 and "kept.safetensors is damaged" in caplog.text


def test_a_signal_ends_the_pass(tmp_path):
    stream = pieces(blobs(), 70)
    parts = []

    def signalled():
        for part in stream():
            parts.append(part)
            os.kill(os.getpid(), signal.SIGTERM)
            yield part

    with pytest.raises(Stopped, match="PCA of the features: its pass is not done"):
        fit_kmeans(pca_config(), signalled, folder=tmp_path)
    assert len(parts) == 1


# ---- errors


def test_mistakes_say_what_to_do():
    x = correlated(50, 4)
    with pytest.raises(DigitError, match="pca is 5, but the features are 4 numbers: set it to 4 or less"):
        fit_pca(x, 5)
    flat = torch.cat([x, x[:, :1] + x[:, 1:2]], 1)
    with pytest.raises(DigitError, match="vary along 4 of 5 directions: set it to 4 or less"):
        fit_pca(flat.double(), 5, whiten=True)
    with pytest.raises(DigitError, match="no features at all"):
        fit_pca(lambda: iter(()), 2)
    with pytest.raises(DigitError, match="from 4 to 3 columns"):
        fit_pca(lambda: iter((x, x[:, :3])), 2)
    with pytest.raises(DigitError, match=r"shape \(N, D\)"):
        fit_pca(lambda: iter((x[0],)), 2)
    for poison in (torch.nan, torch.inf):
        with pytest.raises(DigitError, match="NaN, Inf"):
            fit_pca(torch.cat([x, torch.full((1, 4), poison)]), 2)
    pca = fit_pca(x, 2)[0]
    with pytest.raises(MismatchError, match="PCA takes 4 features, the input has 3"):
        pca.project(x[:, :3])
    with pytest.raises(DigitError, match="scale of 0"):
        PCA(pca.mean, pca.components, torch.zeros(2))
    with pytest.raises(DigitError, match="centroids of 3 numbers, PCA of 2"):
        Codebook(torch.randn(4, 3), pca=pca)
    with pytest.raises(DigitError, match="NaN or Inf"):
        Codebook(torch.randn(4, 2), pca=pca).predict(torch.full((1, 4), torch.nan))
