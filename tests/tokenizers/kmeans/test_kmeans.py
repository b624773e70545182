"""K-means: against scikit-learn and brute force, in memory and streamed, start, empty clusters, errors."""

import math
import os
import signal
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from toy_kmeans import SHARED, across_ranks, blobs, budget, fit_share, pieces

from digit.errors import DigitError, MismatchError, Stopped
from digit.tokenizers.kmeans import unfinished
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.kmeans.kmeans import KMeans
from digit.tokenizers.kmeans.nearest import FastNearest, argmax_rows, nearest, two_least
from digit.tokenizers.kmeans.points import open_points
from digit.tokenizers.kmeans.unfinished import UnfinishedFit


def brute_force(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return (x.double()[:, None] - centroids.double()).square().sum(-1).argmin(1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_fit_sets_what_it_says(init, precision):
    x = blobs()
    kmeans = KMeans(KMeansConfig(num_clusters=16, init=init, precision=precision))
    assert kmeans.fit(x) is kmeans
    labels = kmeans.predict(x)
    assert kmeans.centroids_.shape == (16, 5) and kmeans.centroids_.dtype == torch.float32
    assert labels.dtype == torch.int64 and torch.equal(labels, brute_force(x, kmeans.centroids_))
    assert torch.equal(kmeans.counts_, labels.bincount(minlength=16)) and kmeans.num_points_ == len(x)
    exact = (x.double() - kmeans.centroids_[labels].double()).square().sum()
    assert kmeans.inertia_ == pytest.approx(float(exact), rel=1e-4)
    p = kmeans.counts_[kmeans.counts_ > 0] / len(x)
    assert kmeans.entropy_ == pytest.approx(float(-(p * p.log2()).sum()), rel=1e-5)
    assert kmeans.dead_codes_ == int((kmeans.counts_ == 0).sum())
    assert kmeans.usage_ == pytest.approx(1 - kmeans.dead_codes_ / 16)
    assert kmeans.history_[-1]["inertia"] == kmeans.inertia_


def test_far_apart_start_finds_separated_blobs():
    x = blobs(clusters=24, num=720)
    kmeans = KMeans(KMeansConfig(num_clusters=24, init="k-means++")).fit(x)
    assert kmeans.dead_codes_ == 0 and kmeans.inertia_ / len(x) < 2 * 5 * 0.05**2


def test_as_good_as_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    x = torch.randn(1500, 12, generator=torch.Generator().manual_seed(1))
    ours = KMeans(KMeansConfig(num_clusters=20, init="k-means++", num_iterations=50)).fit(x)
    theirs = cluster.KMeans(20, n_init=3, max_iter=50, random_state=0).fit(x.numpy())
    assert ours.inertia_ < 1.02 * theirs.inertia_


def test_iterations_equal_lloyds_by_hand():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(2))
    cfg = KMeansConfig(num_clusters=6, num_iterations=4, tolerance=0, precision="fp32", max_points_per_centroid=None)
    centroids = open_points(x, cfg).take_start()
    for _ in range(4):
        labels = brute_force(x, centroids)
        centroids = torch.stack([x[labels == k].double().mean(0) for k in range(6)]).float()
    torch.testing.assert_close(KMeans(cfg).fit(x).centroids_, centroids)


def test_inertia_never_rises():
    x = blobs(spread=1.5)
    history = KMeans(KMeansConfig(num_clusters=12, precision="fp32", tolerance=0)).fit(x).history_
    inertia = [entry["inertia"] for entry in history]
    steps = [b <= a * (1 + 1e-6) for a, b in pairwise(inertia)]
    reseeded = [entry["reseeded"] > 0 for entry in history]
    assert all(ok or any(reseeded[: i + 1]) for i, ok in enumerate(steps))


def test_same_seed_same_result_other_seed_another():
    x = blobs(spread=2.0)
    fits = [KMeans(KMeansConfig(num_clusters=10, seed=s, tolerance=0)).fit(x).centroids_ for s in (0, 0, 1)]
    assert torch.equal(fits[0], fits[1]) and not torch.equal(fits[0], fits[2])


def test_empty_clusters_are_reseeded():
    x = torch.cat(
        [torch.zeros(500, 3), blobs(60, clusters=10, dim=3) + 10]
    )  # a random start picks the same point again and again
    kmeans = KMeans(KMeansConfig(num_clusters=11, num_iterations=30)).fit(x)
    assert sum(entry["reseeded"] for entry in kmeans.history_) > 0
    assert kmeans.dead_codes_ == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inertia_of_tight_far_clusters_does_not_cancel(precision):
    x = blobs(spread=1e-3) * 10 + 100
    kmeans = KMeans(KMeansConfig(num_clusters=8, init="k-means++", precision=precision)).fit(x)
    exact = (x.double() - kmeans.centroids_[kmeans.predict(x)].double()).square().sum()
    assert kmeans.inertia_ == pytest.approx(float(exact), rel=1e-4)


def test_many_points_a_cluster_are_added_up_exactly():
    x = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0)) + 30
    kmeans = KMeans(KMeansConfig(num_clusters=1, max_points_per_centroid=None, num_iterations=2)).fit(x)
    torch.testing.assert_close(kmeans.centroids_[0].double(), x.double().mean(0), rtol=1e-7, atol=0)


def test_identical_points_leave_dead_codes_and_end():
    kmeans = KMeans(KMeansConfig(num_clusters=4)).fit(torch.full((50, 3), 7.0))
    assert kmeans.inertia_ == 0 and kmeans.dead_codes_ == 3 and kmeans.entropy_ == 0


def test_stops_when_settled():
    assert len(KMeans(KMeansConfig(num_clusters=8, init="k-means++", num_iterations=50)).fit(blobs()).history_) < 12


# ---- streams


def test_stream_that_fits_is_read_once_and_equals_the_tensor():
    x = blobs(spread=1.0)
    cfg = KMeansConfig(num_clusters=8, max_points_per_centroid=None, precision="fp32", num_iterations=5, tolerance=0)
    stream = pieces(x, 70)
    streamed = KMeans(cfg).fit(stream)
    assert stream.passes == 1 and not streamed.streamed_ and streamed.num_points_ == len(x)
    again = KMeans(cfg).fit(pieces(x, 11))
    torch.testing.assert_close(streamed.centroids_, again.centroids_)


def test_stream_beyond_the_budget_is_read_every_iteration():
    x = blobs(spread=1.0, num=4000, dim=6)
    base = dict(num_clusters=8, max_points_per_centroid=None, precision="fp32", num_iterations=5, tolerance=0)
    small = KMeansConfig(**base, memory_budget_bytes=budget(KMeansConfig(**base), 6, 100))
    stream = pieces(x, 70)
    streamed = KMeans(small).fit(stream)
    assert streamed.streamed_ and stream.passes == 1 + 5 + 1 and streamed.num_points_ == len(x)
    # the first points have the smallest keys of the same random numbers, so a fit in memory starts alike
    torch.testing.assert_close(streamed.centroids_, KMeans(KMeansConfig(**base)).fit(pieces(x, 300)).centroids_)
    assert torch.equal(streamed.centroids_, KMeans(small).fit(pieces(x, 70)).centroids_)


def test_budget_bounds_what_is_kept():
    x = torch.randn(20_000, 8)
    base = dict(num_clusters=4, max_points_per_centroid=None)
    cfg = KMeansConfig(**base, memory_budget_bytes=budget(KMeansConfig(**base), 8, 200))
    points = open_points(pieces(x, 512), cfg)
    start = points.take_start()
    assert points.streamed and start.untyped_storage().nbytes() <= cfg.memory_budget_bytes
    assert max(chunk.nelement() * 4 for chunk in points.chunks()) <= cfg.memory_budget_bytes
    assert sum(len(chunk) for chunk in points.chunks()) == len(x)


def test_subsample_of_max_points_per_centroid():
    x = blobs(num=4000, dim=6)
    base = dict(num_clusters=8, max_points_per_centroid=20)
    assert KMeans(KMeansConfig(**base)).fit(x).num_points_ == 160
    stream = pieces(x, 70)
    kept = KMeans(KMeansConfig(**base)).fit(stream)
    assert kept.num_points_ == 160 and stream.passes == 1 and not kept.streamed_
    small = KMeansConfig(**base, memory_budget_bytes=budget(KMeansConfig(**base), 6, 40))
    streamed = KMeans(small).fit(pieces(x, 70))
    assert streamed.streamed_ and 100 < streamed.num_points_ < 230  # a Bernoulli draw of 160 of 4000


def test_sample_is_uniform_and_independent_of_the_cuts():
    x = torch.arange(1000.0)[:, None]
    cfg = KMeansConfig(num_clusters=10, max_points_per_centroid=10)
    samples = [torch.cat(list(open_points(pieces(x, size), cfg).chunks())).flatten() for size in (1, 64, 1000)]
    assert len(samples[0].unique()) == 100 and 400 < samples[0].mean() < 600
    for other in samples[1:]:
        assert torch.equal(samples[0].sort().values, other.sort().values)


# ---- several ranks


def test_two_ranks_fit_what_one_does(tmp_path):
    torch.multiprocessing.spawn(across_ranks, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for name in SHARED:
        alone = fit_share(name, blobs(spread=1.5))
        assert torch.equal(first[name]["centroids_"], second[name]["centroids_"]), name
        assert first[name]["streamed_"] == (name == "stream again") == alone["streamed_"]
        assert first[name]["num_points_"] == alone["num_points_"]
        if name == "stream":  # drawn by each rank for itself, so from another start
            assert first[name]["inertia_"] == pytest.approx(alone["inertia_"], rel=0.15)
        else:
            torch.testing.assert_close(first[name]["centroids_"], alone["centroids_"])
            assert torch.equal(first[name]["counts_"], alone["counts_"])


def test_one_rank_needs_no_group():
    x = blobs()
    fits = [KMeans(KMeansConfig(num_clusters=8)).fit(x, across_ranks=several).centroids_ for several in (False, True)]
    assert torch.equal(*fits)


# ---- cut short


@pytest.fixture
def every_iteration(monkeypatch):
    monkeypatch.setattr(unfinished, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(unfinished, "SAVING_SHARE", math.inf)


class Kill(Exception):
    """The end of a process that nothing was prepared for."""


def killed_in(iteration: int, x: torch.Tensor, cfg: KMeansConfig, kept: UnfinishedFit) -> None:
    """A fit of a stream that is read anew in every iteration, and breaks in that one."""
    stream = pieces(x, 70)

    def breaking():
        if stream.passes == iteration + 1:
            raise Kill
        return stream()

    with pytest.raises(Kill):
        KMeans(cfg).fit(breaking, unfinished=kept)


def streamed_cfg(**changes) -> KMeansConfig:
    cfg = KMeansConfig(num_clusters=11, num_iterations=9, max_points_per_centroid=None, **changes)
    return replace(cfg, memory_budget_bytes=budget(cfg, 3, 100))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0), ("bf16", 1e-4)])
def test_a_killed_fit_goes_on_to_the_same_centroids(tmp_path, every_iteration, precision, tolerance):
    x = torch.cat([torch.zeros(900, 3), blobs(90, clusters=10, dim=3) + 10])  # some clusters are re-seeded at first
    cfg, path = streamed_cfg(precision=precision, tolerance=tolerance), tmp_path / "k.safetensors"
    whole = KMeans(cfg).fit(pieces(x, 70))
    assert sum(entry["reseeded"] for entry in whole.history_) > 1
    for iteration in (1, 4, len(whole.history_) - 1):  # the last one is the pass over the finished centroids
        path.unlink(missing_ok=True)
        killed_in(iteration, x, cfg, UnfinishedFit(path, {}))
        (tmp_path / ".k.safetensors.ab0_9xyz.aside.safetensors").write_bytes(b"half")  # a kill while it was written
        stream = pieces(x, 70)
        again = KMeans(cfg).fit(stream, unfinished=UnfinishedFit(path, {}))
        assert [left.name for left in tmp_path.iterdir()] == ["k.safetensors"]
        assert stream.passes == len(whole.history_) + 1 - iteration
        assert torch.equal(again.centroids_, whole.centroids_) and torch.equal(again.counts_, whole.counts_)
        metrics = [[{k: v for k, v in e.items() if k != "seconds"} for e in fit.history_] for fit in (again, whole)]
        assert metrics[0] == metrics[1]


@pytest.mark.parametrize(("in_pass", "said"), [(1, "no iteration is"), (2, "0 of"), (5, "3 of"), (8, "6 of")])
def test_a_signal_ends_a_fit_within_the_pass(tmp_path, in_pass, said):
    x, path, before = blobs(spread=2.0, dim=3), tmp_path / "k", signal.getsignal(signal.SIGTERM)
    cfg = replace(streamed_cfg(tolerance=0), num_iterations=6)
    stream = pieces(x, 70)

    def signalled():
        for part in stream():
            if stream.passes == in_pass:
                parts.append(part)
                os.kill(os.getpid(), signal.SIGTERM)
            yield part

    parts = []
    with pytest.raises(Stopped, match=f"k-means: {said}"):
        KMeans(cfg).fit(signalled, unfinished=UnfinishedFit(path, {"data": "x"}))
    assert len(parts) == 1 and signal.getsignal(signal.SIGTERM) == before
    again = KMeans(cfg).fit(pieces(x, 70), unfinished=UnfinishedFit(path, {"data": "x"}))
    assert len(again.history_) == 7 and torch.equal(again.centroids_, KMeans(cfg).fit(pieces(x, 70)).centroids_)


def test_small_fits_write_no_state(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "SAVE_EVERY_SECONDS", 600.0)  # what is small on this machine today
    KMeans(KMeansConfig(num_clusters=8)).fit(blobs(), unfinished=UnfinishedFit(tmp_path / "k", {}))
    assert not list(tmp_path.iterdir())


def cut(data: bytes) -> bytes:
    return data[:-40]


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 64]) + data[-8:]


def another_number(data: bytes) -> bytes:
    return data.replace(b'\\"reseeded\\": 0', b'\\"reseeded\\": 7', 1)


@pytest.mark.parametrize("damage", [cut, flipped, another_number, lambda data: b"", lambda data: b"\xff" * 50])
def test_a_damaged_state_is_told_once_and_left(tmp_path, every_iteration, caplog, damage):
    x, cfg, path = blobs(spread=2.0, dim=3), streamed_cfg(tolerance=0), tmp_path / "k.safetensors"
    killed_in(4, x, cfg, UnfinishedFit(path, {}))
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    again = KMeans(cfg).fit(pieces(x, 70), unfinished=UnfinishedFit(path, {}))
    assert len(caplog.records) == 1 and "k.safetensors is damaged" in caplog.text
    assert torch.equal(again.centroids_, KMeans(cfg).fit(pieces(x, 70)).centroids_)


def test_the_state_of_another_fit_is_told_and_left(tmp_path, every_iteration, caplog):
    x, cfg, path = blobs(spread=2.0, dim=3), streamed_cfg(tolerance=0), tmp_path / "k.safetensors"
    killed_in(4, x, cfg, UnfinishedFit(path, {"data": "here"}))
    before = path.read_bytes()
    for other, request, told in (
        (cfg, "there", "data = here, now asked for there"),
        (replace(cfg, seed=1), "here", "kmeans.seed = 0, now asked for 1"),
    ):
        path.write_bytes(before)
        caplog.clear()
        again = KMeans(other).fit(pieces(x, 70), unfinished=UnfinishedFit(path, {"data": request}))
        assert len(caplog.records) == 1 and told in caplog.text
        assert torch.equal(again.centroids_, KMeans(other).fit(pieces(x, 70)).centroids_)
    caplog.clear()
    path.write_bytes(before)
    fewer = KMeans(cfg).fit(pieces(x[:-1], 70), unfinished=UnfinishedFit(path, {"data": "here"}))
    assert "kmeans.points = 600, now asked for 599" in caplog.text and fewer.num_points_ == 599


# ---- nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num", [1, 63, 64, 256])
@pytest.mark.parametrize("offset", [0, -4, 4])  # rows of both signs, all below zero, all above
def test_argmax_finds_a_maximum_of_every_row(num, dtype, offset):
    scores = (torch.randn(50, num) + offset).to(dtype)
    index = argmax_rows(scores)
    assert index.dtype == torch.int64 and torch.equal(scores.gather(1, index[:, None])[:, 0], scores.amax(1))


def test_argmax_of_zeros_and_infinities():
    scores = torch.full((4, 64), -torch.inf, dtype=torch.bfloat16)
    scores[0, 5], scores[1, 6], scores[2, 7:9], scores[3, 9] = 0.0, -0.0, torch.tensor([-1e-30, -1]), torch.inf
    assert argmax_rows(scores).tolist() == [5, 6, 7, 9]


def test_predict_takes_leading_shapes_and_is_batch_independent():
    x = torch.randn(3, 70, 16)
    kmeans = KMeans(KMeansConfig(num_clusters=33)).fit(x.flatten(0, 1))
    whole = kmeans.predict(x)
    assert whole.shape == (3, 70) and torch.equal(whole, torch.stack([kmeans.predict(part) for part in x]))
    assert kmeans.predict(torch.zeros(0, 16)).shape == (0,)


def test_near_ties_are_decided_exactly():
    centroids = 100 + torch.randn(40, 8) * 1e-3  # float32 scores of these differ by less than their rounding
    x = 100 + torch.randn(200, 8) * 1e-3
    assert torch.equal(nearest(x, centroids), brute_force(x, centroids))


def test_fast_search_finds_a_centroid_as_near():
    x, centroids = torch.randn(500, 64) + 1, torch.randn(300, 64) + 1
    distance = (x[:, None] - centroids).square().sum(-1)
    fast = FastNearest(centroids, offset=float(distance.amin(1).mean()))
    found = distance.gather(1, fast(x)[:, None])[:, 0]
    assert (found / distance.amin(1)).max() < 1.02 and (fast(x) == distance.argmin(1)).float().mean() > 0.9
    assert torch.equal(fast(x[:7]), fast(x)[:7])


def test_predict_ignores_autocast_and_matmul_precision():
    x, centroids = torch.randn(100, 32), torch.randn(50, 32)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(nearest(x, centroids), brute_force(x, centroids))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- errors


@pytest.mark.parametrize("make", [lambda x: x, lambda x: pieces(x, 3)], ids=["tensor", "stream"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_unusable_numbers(make, poison):
    x = torch.randn(20, 3)
    x[13, 1] = poison
    with pytest.raises(DigitError, match="NaN, Inf"):
        KMeans(KMeansConfig(num_clusters=2)).fit(make(x))


@pytest.mark.parametrize("make", [lambda x: x, lambda x: pieces(x, 3)], ids=["tensor", "stream"])
def test_more_clusters_than_points(make):
    with pytest.raises(DigitError, match="wants 9 clusters but got 8 points"):
        KMeans(KMeansConfig(num_clusters=9)).fit(make(torch.randn(8, 3)))


def test_other_errors():
    with pytest.raises(DigitError, match="not fitted"):
        KMeans(KMeansConfig(num_clusters=2)).predict(torch.randn(4, 3))
    fitted = KMeans(KMeansConfig(num_clusters=2)).fit(torch.randn(8, 3))
    with pytest.raises(MismatchError, match="have 3 features, the input has 5"):
        fitted.predict(torch.randn(4, 5))
    with pytest.raises(DigitError, match="NaN or Inf"):
        fitted.predict(torch.full((4, 3), torch.nan))
    with pytest.raises(DigitError, match=r"shape \(N, D\)"):
        KMeans(KMeansConfig(num_clusters=2)).fit(torch.randn(8, 3, 2))
    with pytest.raises(DigitError, match="no features at all"):
        KMeans(KMeansConfig(num_clusters=2)).fit(lambda: iter(()))
    with pytest.raises(DigitError, match="from 3 to 4 columns"):
        KMeans(KMeansConfig(num_clusters=2)).fit(lambda: iter((torch.randn(8, 3), torch.randn(8, 4))))


@pytest.mark.parametrize(("num", "dim"), [(2, 3), (50, 4), (4, 300)])
@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_too_small_a_budget_names_one_that_works(num, dim, init):
    x = torch.randn(3 * num, dim)
    with pytest.raises(DigitError, match="memory budget of 100 bytes is too small") as error:
        KMeans(KMeansConfig(num_clusters=num, init=init, memory_budget_bytes=100)).fit(pieces(x, 4))
    least = int(str(error.value).split("at least ")[1].split()[0])
    kmeans = KMeans(KMeansConfig(num_clusters=num, init=init, memory_budget_bytes=least)).fit(pieces(x, 4))
    assert kmeans.streamed_ and kmeans.num_points_ == len(x)


BAD_VALUES = [("num_clusters", 0), ("num_iterations", 0), ("init", "best"), ("precision", "int8"), ("tolerance", -1)]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_config_is_checked(field, value):
    with pytest.raises(DigitError, match=field):
        KMeansConfig(**{field: value})


@pytest.mark.parametrize("num", [1, 5, 64, 128, 200])
def test_the_two_least_of_each_row(num):
    scores = torch.randn(50, num, generator=torch.Generator().manual_seed(0)).mul(4).round()  # with ties
    index, low, second = two_least(scores.clone())
    ordered = scores.sort(1).values
    assert low.equal(ordered[:, 0]) and scores.gather(1, index[:, None])[:, 0].equal(low)
    assert second.equal(ordered[:, 1] if num > 1 else torch.full((50,), torch.inf))
    assert argmax_rows(-scores).equal(index)


def test_features_are_tensors_arrays_or_lists():
    x = blobs()
    whole = KMeans(KMeansConfig(num_clusters=4)).fit(x)
    for brought in (x.numpy(), x.double().numpy(), x.double(), x.tolist()):
        again = KMeans(KMeansConfig(num_clusters=4)).fit(brought)
        assert torch.equal(again.centroids_, whole.centroids_)
        assert torch.equal(whole.predict(brought), whole.predict(x))
    counts = np.arange(12).reshape(6, 2)
    assert KMeans(KMeansConfig(num_clusters=2)).fit(counts).predict(counts).shape == (6,)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_array_of_numbers_is_refused():
    fitted = KMeans(KMeansConfig(num_clusters=4)).fit(blobs())
    for wrong in ([["a", "b"]], [[1.0], [1.0, 2.0]], "features", None, blobs() > 0, blobs().to(torch.complex64)):
        for call in (fitted.predict, KMeans(KMeansConfig(num_clusters=4)).fit):
            with pytest.raises(DigitError, match="features are .*numbers of shape"):
                call(wrong)
    for wrong in (torch.tensor(3.0), torch.zeros(2, 3, 5), np.zeros(5)):
        with pytest.raises(DigitError, match="shape"):
            KMeans(KMeansConfig(num_clusters=4)).fit(wrong)
