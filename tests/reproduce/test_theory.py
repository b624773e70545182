"""PCA and LDA against scikit-learn; Propositions 2.1 and 2.2 where they hold and where they do not; Figure 6."""

import numpy as np
import pytest
from PIL import Image

from digit.errors import DigitError
from digit.reproduce import propositions as theory
from digit.reproduce.propositions import (
    ALONG_THE_SPREAD,
    PAPER_LIKE,
    ToyData,
    fisher_directions,
    jensen_gap,
    leading_direction,
    loading_angle,
    noise_against_accuracy,
    principal_angles,
    principal_components,
    solve_autoencoder,
    train_autoencoder,
    train_contrastive,
    two_views,
)
from digit.reproduce.theory import TheoryConfig, run_theory
from digit.runtime.files import read_json


def _blobs(num=600, dim=6, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(num) % classes
    mixing = rng.normal(size=(dim, dim))
    return rng.normal(size=(classes, dim))[labels] * 2 + rng.normal(size=(num, dim)) @ mixing + 5, labels


@pytest.fixture(scope="module")
def spectrum():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1500, 8)) * 0.7 ** np.arange(8) @ np.linalg.qr(rng.normal(size=(8, 8)))[0] + 0.3
    return x, *principal_components(x, 4)


# -------------------------------------------------------------------- references


def test_pca_equals_scikit_learn():
    from sklearn.decomposition import PCA

    x, _ = _blobs()
    ours, variances = principal_components(x, 4)
    theirs = PCA(4).fit(x)
    np.testing.assert_allclose(variances, theirs.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(np.abs((ours * theirs.components_).sum(1)), 1, rtol=1e-10)


@pytest.mark.parametrize("classes", [2, 4])
def test_lda_equals_scikit_learn(classes):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, labels = _blobs(classes=classes)
    x, labels = x[: -len(x) // 3], labels[: -len(x) // 3]  # unequal classes
    ours = fisher_directions(x, labels, classes - 1)
    theirs = LinearDiscriminantAnalysis(solver="eigen").fit(x, labels).scalings_.T[: classes - 1]
    theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(np.abs((ours * theirs).sum(1)), 1, rtol=1e-8)


def test_two_classes_have_the_closed_form_of_fisher():
    x, labels = _blobs(classes=2)
    within = sum(np.cov(x[labels == k], rowvar=False, bias=True) * (labels == k).mean() for k in (0, 1))
    expected = np.linalg.solve(within, x[labels == 1].mean(0) - x[labels == 0].mean(0))
    assert principal_angles(fisher_directions(x, labels), expected).max() < 1e-6


def test_principal_angles_equal_scipy_and_resolve_small_ones():
    from scipy.linalg import subspace_angles

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 7)), rng.normal(size=(2, 7))
    np.testing.assert_allclose(principal_angles(a, b), np.degrees(subspace_angles(a.T, b.T))[::-1], rtol=1e-9)
    np.testing.assert_allclose(principal_angles(b, a), principal_angles(a, b), rtol=1e-9)
    tiny = np.array([[1.0, 1e-9]])
    np.testing.assert_allclose(principal_angles(tiny, np.array([[1.0, 0.0]])), np.degrees(1e-9), rtol=1e-6)


def test_misuse_says_what_to_do():
    x, labels = _blobs()
    with pytest.raises(DigitError, match="3 classes have 2 discriminant directions, asked for 3"):
        fisher_directions(x, labels, 3)
    with pytest.raises(DigitError, match="7 directions"):
        principal_components(x, 7)
    with pytest.raises(DigitError, match="share"):
        two_views(1.5)


# -------------------------------------------------------------------- Proposition 2.1


def test_autoencoder_spans_the_principal_subspace(spectrum):
    x, loadings, _ = spectrum
    trained = train_autoencoder(x, 3, num_steps=6000)
    assert trained.angles[0] > 10 and trained.angles[-1] < 0.01
    np.testing.assert_allclose(trained.encoder @ trained.decoder, np.eye(3), atol=1e-4)  # Eq. 10: W1 = pinv(W2)
    projector = trained.decoder @ trained.encoder
    np.testing.assert_allclose(projector, loadings[:3].T @ loadings[:3], atol=1e-3)  # Eq. 11


def test_normal_equations_are_a_power_iteration(spectrum):
    x, _, variances = spectrum
    tangents = np.tan(np.radians(solve_autoencoder(x, 3, num_rounds=30).angles))
    rate = (tangents[25] / tangents[15]) ** 0.1
    assert rate == pytest.approx(variances[3] / variances[2], rel=0.01)


def test_without_centring_the_span_is_another(spectrum):
    x, _, _ = spectrum
    trained = train_autoencoder(x, 3, num_steps=6000, centre=False)
    assert trained.angles[-1] > 10
    second_moments = np.linalg.eigh(x.T @ x)[1][:, -3:].T
    assert principal_angles(trained.decoder.T, second_moments).max() < 1


def test_the_weights_give_the_loadings_only_with_decay_or_with_the_codes(spectrum):
    x, loadings, _ = spectrum
    plain, decayed = (train_autoencoder(x, 3, num_steps=20_000, weight_decay=decay) for decay in (0.0, 0.02))
    assert loading_angle(plain.loadings, loadings[:3]) > 10
    assert loading_angle(plain.loadings_by_codes(x), loadings[:3]) < 0.01
    assert loading_angle(decayed.loadings, loadings[:3]) < 0.01


def test_the_span_does_not_single_out_a_basis(spectrum):
    x, loadings, _ = spectrum  # why: W2 G and G^-1 W1 have the same error for every G
    trained = train_autoencoder(x, 3, num_steps=6000)
    mix = np.random.default_rng(0).normal(size=(3, 3))
    np.testing.assert_allclose(
        (trained.decoder @ mix) @ (np.linalg.inv(mix) @ trained.encoder), trained.decoder @ trained.encoder, atol=1e-9
    )
    assert loading_angle(np.linalg.svd(trained.decoder @ mix)[0].T[:3], loadings[:3]) > 5


# -------------------------------------------------------------------- Proposition 2.2


def _angles(views, **training):
    weight = train_contrastive(views, num_steps=300, **training)
    direction = leading_direction(weight, views.between + views.within)
    return principal_angles(direction, views.lda)[0], principal_angles(direction, views.pca)[0]


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_views_are_distributed_alike_whatever_they_share(share):
    reference = two_views(1)
    for kind in ("shape", "amount"):
        views = two_views(max(share, 0.1) if kind == "amount" else share, kind=kind)
        np.testing.assert_allclose(views.within, reference.within)
        assert np.linalg.eigvalsh(views.image_cov)[0] > -1e-12 and np.linalg.eigvalsh(views.view_cov)[0] > 0
        x, positive, labels = views.sample(200_000, np.random.default_rng(0))
        np.testing.assert_allclose(np.cov(x, rowvar=False), views.between + views.within, atol=0.06)
        np.testing.assert_allclose(x.T @ positive / len(x), views.between + views.image_cov, atol=0.06)
        assert principal_angles(fisher_directions(x, labels), views.lda)[0] < 1
        assert principal_angles(principal_components(x, 1)[0], views.pca)[0] < 1


@pytest.mark.parametrize("normalise", [False, True])
def test_contrastive_learns_lda_where_pairs_are_of_a_class(normalise):
    to_lda, to_pca = _angles(two_views(1), normalise=normalise)
    assert to_lda < 3 and to_pca > 75


@pytest.mark.parametrize("normalise", [False, True])
def test_contrastive_learns_lda_where_the_augmentation_has_the_shape_of_the_class_noise(normalise):
    assert _angles(two_views(0.3, kind="amount"), normalise=normalise)[0] < 3


@pytest.mark.parametrize("normalise", [False, True])
def test_counterexample_isotropic_augmentation_learns_pca(normalise):
    to_lda, to_pca = _angles(two_views(0), normalise=normalise)
    assert to_lda > 60 and to_pca < 20


@pytest.mark.parametrize(
    ("share", "kind", "lda", "pca"), [(1, "shape", 0, None), (0.2, "amount", 0, None), (0, "shape", None, 0)]
)
def test_closed_form_of_the_contrastive_direction(share, kind, lda, pca):
    views = two_views(share, kind=kind)
    for target, expected in ((views.lda, lda), (views.pca, pca)):
        if expected is not None:
            assert principal_angles(views.contrastive, target)[0] == pytest.approx(expected, abs=1e-5)


def test_training_follows_the_closed_form_in_between():
    found = [_angles(two_views(share))[0] for share in (0, 0.25, 0.5)]
    assert found[0] > found[1] > found[2]
    exact = [principal_angles(v.contrastive, v.lda)[0] for v in map(two_views, (0, 0.25, 0.5))]
    assert np.abs(np.subtract(found, exact)).max() < 15  # the closed form is of Gaussian x, these are two Gaussians


def test_temperature_only_scales_a_linear_encoder():
    weights = [train_contrastive(two_views(1), temperature=t, num_steps=300) for t in (0.5, 2.0)]
    assert principal_angles(*weights)[0] < 2
    assert np.linalg.norm(weights[1]) / np.linalg.norm(weights[0]) == pytest.approx(2, rel=0.1)  # sqrt(2 / 0.5)


def test_jensens_bound_and_what_it_does_not_say():
    codes = np.random.default_rng(0).normal(size=(50, 3))
    gap = jensen_gap(codes, 0.5)
    assert gap["left"] >= gap["right"] == pytest.approx((codes @ codes.T).mean() / 0.5)  # Eq. 15
    centred = jensen_gap(codes - codes.mean(0), 0.5)
    assert abs(centred["sum"]) < 1e-9 < centred["largest_eigenvalue"], "the sum bounds no eigenvalue"
    positive = jensen_gap(np.abs(codes), 0.5)
    assert positive["sum"] >= positive["largest_eigenvalue"], "but does where no product is negative"


# -------------------------------------------------------------------- Figure 6


LEVELS = (0.0, 0.25, 0.5, 1.0)


@pytest.mark.parametrize("data", [PAPER_LIKE, ALONG_THE_SPREAD])
def test_accuracy_meets_its_closed_form(data):
    accuracy = noise_against_accuracy(data, levels=LEVELS, num_seeds=10)
    views = theory.TwoViews(mean=np.array(data.offset) / 2, image_cov=np.zeros((2, 2)), view_cov=data.within)
    for name, direction in (("pca", views.pca), ("lda", views.lda)):
        expected = [data.accuracy(direction, level) for level in LEVELS]
        np.testing.assert_allclose(accuracy[name].mean(0), expected, atol=0.015)  # 10 x 1000 test points: 0.005


def test_threshold_equals_scikit_learns_discriminant():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    (x, labels), (test, truth) = (PAPER_LIKE.sample(300, np.random.default_rng(seed)) for seed in (0, 1))
    w = fisher_directions(x, labels)[0]
    theirs = LinearDiscriminantAnalysis().fit((x @ w)[:, None], labels).score((test @ w)[:, None], truth)
    assert theory._threshold_accuracy(x @ w, labels, test @ w, truth) == pytest.approx(theirs)


def test_lda_leads_under_noise_unless_the_classes_lie_along_the_spread():
    def lead(data, refit):
        accuracy = noise_against_accuracy(data, levels=LEVELS, num_seeds=10, refit=refit)
        return (accuracy["lda"] - accuracy["pca"]).mean(0)

    assert (lead(PAPER_LIKE, False) > 0.02).all()
    kept = lead(ALONG_THE_SPREAD, False)
    assert kept[0] > 0.03 and kept[-1] < -0.02
    assert (lead(ALONG_THE_SPREAD, True) > 0).all()


def test_results_are_seeded():
    first, second = (noise_against_accuracy(PAPER_LIKE, levels=LEVELS, num_seeds=2) for _ in range(2))
    np.testing.assert_array_equal(first["lda"], second["lda"])
    weights = [train_contrastive(two_views(1), num_steps=20, seed=seed) for seed in (3, 3, 4)]
    assert (weights[0] == weights[1]).all() and (weights[0] != weights[2]).any()


def test_noise_unit_is_the_spread_of_the_data():
    data = ToyData(offset=(3.0, 1.0), correlation=0.2)
    x, _ = data.sample(200_000, np.random.default_rng(0))
    assert data.scale == pytest.approx(np.sqrt(x.var(0).mean()), rel=0.01)


# -------------------------------------------------------------------- the whole run


def test_run_theory_writes_json_outcomes_and_plots(tmp_path):
    cfg = TheoryConfig(num_seeds=5, num_levels=3, training_seeds=1, training_steps=120, shares=(0, 1))
    result = run_theory(tmp_path, scale=cfg)
    assert result == read_json(tmp_path / "theory.json")
    outcomes = {s["statement"].split(":")[0] + str(i): s["outcome"] for i, s in enumerate(result["statements"])}
    assert outcomes == {
        "2.10": "holds",
        "2.11": "holds on a condition",
        "2.22": "holds on a condition",
        "A.2, after Eq. 153": "does not hold",
        "Figure 6(d)4": "holds on a condition",
    }
    for name in ("fig6.png", "propositions.png"):
        assert min(Image.open(tmp_path / name).size) > 300


def test_unknown_scale(tmp_path):
    with pytest.raises(DigitError, match="choose one of tiny, small, paper"):
        run_theory(tmp_path, scale="huge")
