"""Section 2 of the paper in numbers: what linear autoencoders and linear contrastive encoders learn.

    Proposition 2.1 (A.1)   the linear autoencoder spans the principal subspace            Eq. 9 to 12
    Proposition 2.2 (A.2)   contrastive learning separates as Fisher's LDA "in principle"  Eq. 13 to 16
    Figure 6                two Gaussians, one dimension kept: PCA's or LDA's accuracy as noise is added

Both propositions are tested where they hold and where they need a condition that the paper does not state. All is NumPy
in float64. Rows are samples, x (N, D), and directions, (M, D). Angles are in degrees, 0 to 90.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
import torch
from scipy.linalg import eigh

from digit.errors import DigitError

# -------------------------------------------------------------------- references: PCA, LDA


def principal_components(x: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """C w_k = v_k w_k, C = Cov(x): the first M = num loading vectors w (M, D), orthonormal, and variances v (M,).

    x is (N, D); the largest variance comes first. Raises DigitError for other shapes and num outside 1..D.
    """
    variances, vectors = np.linalg.eigh(np.cov(_samples(x, num), rowvar=False))
    return vectors[:, ::-1].T[:num], variances[::-1][:num]


def fisher_directions(x: np.ndarray, labels: np.ndarray, num: int = 1) -> np.ndarray:
    """argmax_w w' S_B w / w' S_W w  (paper, Eq. 13): Fisher's directions w (num, D) of x (N, D) with labels (N,).

    Unit rows, best first; num is at most the number of classes minus 1, else DigitError.
    """
    x, classes = _samples(x, num), np.unique(labels)
    if num >= len(classes):
        raise DigitError(f"{len(classes)} classes have {len(classes) - 1} discriminant directions, asked for {num}")
    share = np.array([(labels == k).mean() for k in classes])  # (C,)
    means = np.stack([x[labels == k].mean(0) for k in classes])  # (C, D)
    residual = x - means[np.searchsorted(classes, labels)]
    offsets = (means - share @ means) * np.sqrt(share)[:, None]
    return _top_directions(offsets.T @ offsets, residual.T @ residual / len(x), num)


def principal_angles(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """atan2(sin_k, cos_k): angles (min(M, K),) between the spans of the rows of (M, D) and (K, D), smallest first.

    cos_k are the singular values of Q1' Q2 and sin_k those of Q2 - Q1 Q1' Q2, for orthonormal bases Q1 (D, M) and
    Q2 (D, K) of the spans. All angles are 0 for equal spans.
    """
    bases = [np.linalg.qr(np.atleast_2d(rows).T)[0] for rows in (first, second)]
    cosines, sines = bases[0].T @ bases[1], bases[1] - bases[0] @ (bases[0].T @ bases[1])
    cosines = np.linalg.svd(cosines, compute_uv=False)
    sines = np.sort(np.linalg.svd(sines, compute_uv=False))[
        : len(cosines)
    ]  # an arc cosine alone resolves 1e-6 degrees at best
    return np.degrees(np.arctan2(sines, cosines))


def _samples(x: np.ndarray, num: int) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2 or not 1 <= num <= x.shape[1]:
        raise DigitError(f"{num} directions of an array of shape {x.shape}: wanted (samples, features), num in 1..D")
    return x


def _top_directions(between: np.ndarray, within: np.ndarray, num: int) -> np.ndarray:
    """argmax_w w' A w / w' B w, A w = r B w with the largest r: unit rows w (num, D), A between, B within (D, D)."""
    vectors = eigh(between, within)[1][:, ::-1].T[:num]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# -------------------------------------------------------------------- Proposition 2.1: linear autoencoder and PCA


@dataclass(frozen=True, kw_only=True)
class LinearAutoencoder:
    """A trained pair of matrices, and the angle of its span to the principal subspace during training."""

    encoder: np.ndarray  # W1 (M, D)
    decoder: np.ndarray  # W2 (D, M)
    steps: list[int]
    angles: list[float]  # largest principal angle to the principal subspace at each of `steps`

    @property
    def loadings(self) -> np.ndarray:
        """Left singular vectors (M, D) of the decoder: an estimate of the loading vectors from the weights alone."""
        return np.linalg.svd(self.decoder, full_matrices=False)[0].T

    def loadings_by_codes(self, x: np.ndarray) -> np.ndarray:
        """Left singular vectors (M, D) of the reconstruction W2 W1 X: from weights and the variance of codes."""
        codes = (x - x.mean(0)) @ self.encoder.T  # (N, M)
        return np.linalg.svd(self.decoder @ codes.T, full_matrices=False)[0].T[: codes.shape[1]]


def train_autoencoder(
    x: np.ndarray,
    num: int,
    *,
    weight_decay: float = 0.0,
    num_steps: int = 4000,
    learning_rate: float = 0.1,
    seed: int = 0,
    centre: bool = True,
) -> LinearAutoencoder:
    """min ||X - W2 W1 X||² / N + weight_decay (||W1||² + ||W2||²)  (paper, Eq. 9; decay: Kunin et al. 2019).

    Gradient descent on W1 (M, D) and W2 (D, M), M = num, from small random weights; x (N, D) is scaled to a largest
    variance of 1. centre False does not subtract the mean; the span is then that of the uncentred second moments,
    not of PCA.
    """
    loadings, variances = principal_components(x, num)
    shifted = x - x.mean(0) if centre else x
    second_moment = shifted.T @ shifted / len(x)
    second_moment = second_moment / (variances[0] if centre else np.linalg.eigvalsh(second_moment)[-1])
    rng = np.random.default_rng(seed)
    w1, w2 = (rng.normal(scale=0.3 / x.shape[1] ** 0.5, size=shape) for shape in ((num, x.shape[1]), (x.shape[1], num)))
    steps, angles = [], []
    recorded = set(np.geomspace(1, num_steps, 60).astype(int)) | {0, num_steps}
    for step in range(num_steps + 1):
        if step in recorded:
            steps.append(step)
            angles.append(float(principal_angles(w2.T, loadings).max()))
        error = second_moment - w2 @ (w1 @ second_moment)  # (I - W2 W1) C
        gradient1 = -2 * w2.T @ error + 2 * weight_decay * w1
        gradient2 = -2 * error @ w1.T + 2 * weight_decay * w2
        w1, w2 = w1 - learning_rate * gradient1, w2 - learning_rate * gradient2
    return LinearAutoencoder(encoder=w1, decoder=w2, steps=steps, angles=angles)


def solve_autoencoder(x: np.ndarray, num: int, *, num_rounds: int = 60, seed: int = 0) -> LinearAutoencoder:
    """W1 = (W2' W2)^-1 W2'  (paper, Eq. 10);  W2 = C W1' (W1 C W1')^-1;  C = Cov(x), x (N, D).

    Solves the two normal equations in turn. A round multiplies the decoder's span by C: a power iteration. Each round
    therefore multiplies the tangent of the angle by v_(M+1) / v_M, a ratio of variances.
    """
    loadings, cov = principal_components(x, num)[0], np.cov(x, rowvar=False)
    w2 = np.random.default_rng(seed).normal(size=(x.shape[1], num))
    angles = [float(principal_angles(w2.T, loadings).max())]
    for _ in range(num_rounds):
        w1 = np.linalg.pinv(w2)
        w2 = cov @ w1.T @ np.linalg.inv(w1 @ cov @ w1.T)
        angles.append(float(principal_angles(w2.T, loadings).max()))
    return LinearAutoencoder(encoder=np.linalg.pinv(w2), decoder=w2, steps=list(range(num_rounds + 1)), angles=angles)


def loading_angle(vectors: np.ndarray, loadings: np.ndarray) -> float:
    """max_k angle(vectors_k, loadings_k) over rows k of (M, D), in degrees."""
    return float(max(principal_angles(a, b)[0] for a, b in zip(vectors, loadings, strict=True)))


def autoencoder_against_pca(
    *, dim: int = 12, num: int = 4, num_samples: int = 2000, num_steps: int = 20_000, seed: int = 0
) -> dict:
    """Test Proposition 2.1 on Gaussian data with a geometric spectrum, rotated at random and off-centre.

    Returns angles in degrees. subspace_angle tests the claim of a common span: by gradient descent, by the normal
    equations, with weight decay, and without centring. loading_angle tests the claim that the weights give the loading
    vectors: by singular vectors of the decoder with and without decay, and of the reconstruction.
    """
    rng = np.random.default_rng([seed, 21])
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    x = rng.normal(size=(num_samples, dim)) * 0.75 ** np.arange(dim) @ rotation.T + rng.normal(size=dim)
    loadings, variances = principal_components(x, num + 1)
    trained, solved = train_autoencoder(x, num, num_steps=num_steps, seed=seed), solve_autoencoder(x, num, seed=seed)
    decayed = train_autoencoder(x, num, num_steps=num_steps, seed=seed, weight_decay=0.02)
    uncentred = train_autoencoder(x, num, num_steps=num_steps, seed=seed, centre=False)
    loadings = loadings[:num]
    return {
        "dim": dim, "latent_dim": num, "num_samples": num_samples, "num_steps": num_steps, "seed": seed,
        "variances": variances.tolist(),
        "subspace_angle": {
            "gradient": trained.angles[-1], "normal_equations": solved.angles[-1], "weight_decay": decayed.angles[-1],
            "gradient_uncentred": uncentred.angles[-1],
        },
        "loading_angle": {
            "decoder": loading_angle(trained.loadings, loadings),
            "decoder_weight_decay": loading_angle(decayed.loadings, loadings),
            "reconstruction": loading_angle(trained.loadings_by_codes(x), loadings),
        },
        "curves": {
            "gradient": [trained.steps, trained.angles], "weight_decay": [decayed.steps, decayed.angles],
            "normal_equations": [solved.steps, solved.angles],
        },
    }  # fmt: skip


# -------------------------------------------------------------------- Proposition 2.2: contrastive encoder and LDA


@dataclass(frozen=True, kw_only=True)
class TwoViews:
    """x = +-mean + image noise (shared by both views) + view noise (of each view): a model of positive pairs.

    The distribution of a view depends only on the sum of both noises; contrastive learning also depends on the part
    that two views share. With image_cov 0 a pair is two independent samples of one class.
    """

    mean: np.ndarray  # (D,), of class 1; class 0 has the opposite
    image_cov: np.ndarray  # (D, D)
    view_cov: np.ndarray  # (D, D), what the augmentation does

    @property
    def within(self) -> np.ndarray:
        """S_W (D, D) of the views."""
        return self.image_cov + self.view_cov

    @property
    def between(self) -> np.ndarray:
        """S_B (D, D) = mean mean', Eq. 16 up to its factor."""
        return np.outer(self.mean, self.mean)

    @property
    def lda(self) -> np.ndarray:
        """S_W^-1 mean, Fisher's direction (D,), Eq. 13; unit length."""
        return _top_directions(self.between, self.within, 1)[0]

    @property
    def pca(self) -> np.ndarray:
        """First principal component (D,) of the views."""
        return np.linalg.eigh(self.between + self.within)[1][:, -1]

    @property
    def contrastive(self) -> np.ndarray:
        """argmax_w w' Cov(x, x+) w / w' Cov(x) w: the direction w (D,) that a linear encoder learns from Eq. 14.

        This holds as long as the second term of Eq. 14 is quadratic: with codes Wx of covariance S,
        E log E exp(f'f- / t) = tr S² / 2 t² for Gaussian x, and the loss becomes
        -tr(W Cov(x, x+) W') / t + tr (W Cov(x) W')² / 2 t². Its minimum whitens, so the rows of W are the leading
        generalised eigenvectors. Cov(x, x+) is S_B plus the image noise: an LDA whose classes are the images.
        """
        return _top_directions(self.between + self.image_cov, self.between + self.within, 1)[0]

    def sample(self, num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample `num` positive pairs: x (num, D), x+ (num, D), classes (num,) 0 or 1."""
        labels, zero = rng.integers(0, 2, num), np.zeros_like(self.mean)
        shared = (2 * labels - 1)[:, None] * self.mean + rng.multivariate_normal(zero, self.image_cov, num)
        first, second = (shared + rng.multivariate_normal(zero, self.view_cov, num) for _ in range(2))
        return first, second, labels


def two_views(share: float, *, kind: str = "shape", view_variance: float = 0.2) -> TwoViews:
    """The example in two dimensions: within-class noise of variance 4 along one axis and 0.25 along the other, rotated.

    kind "shape" changes the augmentation from isotropic noise (share 0) to the whole within-class noise (share 1); kind
    "amount" makes it this share of the within-class noise, with the same shape. S_W and S_B, and so LDA and PCA, do not
    change.
    """
    if kind not in ("shape", "amount") or not 0 <= share <= 1:
        raise DigitError(f"kind {kind!r} and share {share}: wanted shape or amount, and a share from 0 to 1")
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    rotation = np.array([[cos, -sin], [sin, cos]])
    within = rotation @ np.diag([4.0, 0.25]) @ rotation.T
    isotropic = view_variance * np.eye(2) * (1 - share) if kind == "shape" else 0.0
    view_cov = share * within + isotropic
    return TwoViews(mean=rotation @ np.array([0.5, 0.75]), image_cov=within - view_cov, view_cov=view_cov)


def train_contrastive(
    views: TwoViews,
    *,
    normalise: bool = False,
    temperature: float = 0.5,
    num_steps: int = 400,
    batch_size: int = 256,
    learning_rate: float = 0.05,
    seed: int = 0,
) -> np.ndarray:
    """min_W  -E f(x)'f(x+) / t + E log E exp(f(x)'f(x-) / t)  (paper, Eq. 14),  f(x) = Wx,  W (M, D).

    Trains on new pairs in every step and returns W as trained. normalise uses f(x) = Wx / ||Wx|| with M = 2, as
    contrastive models do and the step after Eq. 15 assumes; without it M = 1 and the temperature t only scales W.
    """
    rng = np.random.default_rng(seed)
    weight = torch.tensor(rng.normal(scale=0.5, size=(1 + normalise, len(views.mean))), requires_grad=True)
    optimizer = torch.optim.Adam([weight], learning_rate)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + np.cos(np.pi * step / num_steps))
        codes, positives = (_encode(weight, x, normalise) for x in views.sample(batch_size, rng)[:2])  # (B, M)
        uniformity = torch.logsumexp(codes @ positives.T / temperature, 1).mean() - np.log(batch_size)
        loss = uniformity - (codes * positives).sum(1).mean() / temperature
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach().numpy()


def _encode(weight: torch.Tensor, x: np.ndarray, normalise: bool) -> torch.Tensor:
    codes = torch.from_numpy(x) @ weight.T
    return codes / codes.norm(dim=1, keepdim=True) if normalise else codes


def leading_direction(weight: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """W' u, u = argmax_{||u|| = 1} u' W C W' u: the functional (D,) of x that varies most in the codes Wx.

    W is weight (M, D), C the covariance cov (D, D) of x.
    """
    return weight.T @ np.linalg.eigh(weight @ cov @ weight.T)[1][:, -1]


def jensen_gap(codes: np.ndarray, temperature: float) -> dict[str, float]:
    """mean_i log mean_j exp(h_i'h_j / t) >= 1 / (t m²) sum_ij h_i'h_j  (paper, Eq. 15), h codes (m, M).

    Returns both sides ("left", "right"), the sum of all inner products, and the largest eigenvalue of their Gram
    matrix, which the proof bounds by the sum. The sum is m² ||mean code||²: 0 for centred codes, whatever their
    variance. It bounds the largest eigenvalue only if no inner product is negative.
    """
    gram = codes @ codes.T
    left = np.log(np.exp(gram / temperature).mean(1)).mean()
    return {
        "left": float(left),
        "right": float(gram.mean() / temperature),
        "sum": float(gram.sum()),
        "largest_eigenvalue": float(np.linalg.eigvalsh(gram)[-1]),
    }


def contrastive_against_lda(
    *,
    shares: Sequence[float] = (0, 0.1, 0.25, 0.5, 0.75, 1),
    amounts: Sequence[float] = (0.1, 0.5),
    num_seeds: int = 3,
    num_steps: int = 400,
) -> dict:
    """Test Proposition 2.2 on `two_views`: angles, in degrees, of the learnt direction to those of LDA and PCA.

    Each entry of "shape" and "amount" holds the share, the angles of the closed form, and those of trained encoders (a
    list over seeds), with codes Wx ("linear") and Wx / ||Wx|| ("normalised").
    """
    results: dict = {"num_seeds": num_seeds, "num_steps": num_steps}
    for kind, kind_shares in (("shape", shares), ("amount", amounts)):
        results[kind] = [_alignment(two_views(share, kind=kind), share, num_seeds, num_steps) for share in kind_shares]
    views = two_views(1)
    results["lda_to_pca"] = float(principal_angles(views.lda, views.pca)[0])
    rng, weight = np.random.default_rng(22), train_contrastive(views, normalise=True, num_steps=num_steps)
    codes = _encode(torch.from_numpy(weight), views.sample(1000, rng)[0], True).numpy()
    results["jensen"] = {"trained": jensen_gap(codes, 0.5), "centred": jensen_gap(codes - codes.mean(0), 0.5)}
    return results


def _alignment(views: TwoViews, share: float, num_seeds: int, num_steps: int) -> dict:
    def angles(direction: np.ndarray) -> dict[str, float]:
        targets = {"lda": views.lda, "pca": views.pca}
        return {name: float(principal_angles(direction, target)[0]) for name, target in targets.items()}

    result: dict = {"share": float(share), "closed_form": angles(views.contrastive)}
    for name, normalise in (("linear", False), ("normalised", True)):
        trained = []
        for seed in range(num_seeds):
            weight = train_contrastive(views, normalise=normalise, num_steps=num_steps, seed=seed)
            trained.append(angles(leading_direction(weight, views.between + views.within)))
        result[name] = {target: [angle[target] for angle in trained] for target in ("lda", "pca")}
    return result


# -------------------------------------------------------------------- Figure 6: noise against accuracy


@dataclass(frozen=True, kw_only=True)
class ToyData:
    """Two equally likely Gaussians in the plane with one covariance."""

    offset: tuple[float, float] = (0.0, 2.0)
    """Mean of class 2; the mean of class 1 is 0."""
    correlation: float = 0.8
    """Correlation of the two features, each of variance 1 within a class."""

    @property
    def within(self) -> np.ndarray:
        """Covariance (2, 2) of a class."""
        return np.array([[1.0, self.correlation], [self.correlation, 1.0]])

    @property
    def scale(self) -> float:
        """Unit of the noise: root mean square of both features' standard deviations, over both classes together."""
        return float(np.sqrt((2 + 0.25 * np.square(self.offset).sum()) / 2))

    def sample(self, num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Sample `num` points of each class: x (2 num, 2) and classes (2 num,)."""
        labels = np.repeat([0, 1], num)
        return rng.multivariate_normal([0, 0], self.within, 2 * num) + labels[:, None] * np.array(self.offset), labels

    def accuracy(self, direction: np.ndarray, noise: float) -> float:
        """Phi(|w'd| / 2 sqrt(w' (S_W + s² I) w)): accuracy of the best threshold along w (2,).

        w is the direction, s = noise * scale the noise, d (2,) `offset`, S_W (2, 2) `within`, and Phi the distribution
        function of the standard normal.
        """
        total = self.within + (noise * self.scale) ** 2 * np.eye(2)
        distance = abs(direction @ np.array(self.offset)) / (2 * np.sqrt(direction @ total @ direction))
        return NormalDist().cdf(float(distance))


def noise_against_accuracy(
    data: ToyData, *, levels: Sequence[float], num_seeds: int, num: int = 500, refit: bool = False
) -> dict[str, np.ndarray]:
    """Figure 6(d): {"pca", "lda"} -> accuracy (num_seeds, levels) of a threshold on 1-D codes of held-out points.

    A level is the standard deviation of the isotropic Gaussian noise in units of `data.scale`. The projection is fitted
    on clean points, as an encoder would be (refit True: on noisy points). The linear classifier, a threshold midway
    between the class means, is fitted on noisy points. `num` training and `num` test points per class.
    """
    accuracy = {name: np.empty((num_seeds, len(levels))) for name in ("pca", "lda")}
    for seed in range(num_seeds):
        rng = np.random.default_rng([seed, 6])
        (x, labels), (test, truth) = data.sample(num, rng), data.sample(num, rng)
        unit_noise = rng.normal(size=(2, *x.shape)) * data.scale
        for column, level in enumerate(levels):
            noisy, noisy_test = x + level * unit_noise[0], test + level * unit_noise[1]
            fitted = noisy if refit else x
            directions = {"pca": principal_components(fitted, 1)[0][0], "lda": fisher_directions(fitted, labels)[0]}
            for name, w in directions.items():
                accuracy[name][seed, column] = _threshold_accuracy(noisy @ w, labels, noisy_test @ w, truth)
    return accuracy


def _threshold_accuracy(codes: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    low, high = (codes[labels == k].mean() for k in (0, 1))
    return float((((test - (low + high) / 2) * (high - low) > 0) == truth).mean())


PAPER_LIKE = ToyData()  # the classes differ across the main axis
ALONG_THE_SPREAD = ToyData(offset=(2.0, 1.0))  # along it: noise covers LDA's narrow axis


def figure6(*, levels: Sequence[float], num_seeds: int, num: int = 500) -> dict:
    """Figure 6 for both examples: accuracies (num_seeds, levels), projection kept and refitted, and closed forms."""
    result: dict = {"levels": [float(level) for level in levels], "num_seeds": num_seeds, "points_per_class": num}
    for name, data in (("paper_like", PAPER_LIKE), ("along_the_spread", ALONG_THE_SPREAD)):
        views = TwoViews(mean=np.array(data.offset) / 2, image_cov=np.zeros((2, 2)), view_cov=data.within)
        fitted = {
            kind: noise_against_accuracy(data, levels=levels, num_seeds=num_seeds, num=num, refit=kind == "refitted")
            for kind in ("kept", "refitted")
        }
        result[name] = {"data": asdict(data), "noise_unit": data.scale}
        result[name] |= {kind: {m: a.tolist() for m, a in accuracy.items()} for kind, accuracy in fitted.items()}
        exact = (("pca", views.pca), ("lda", views.lda))
        result[name]["closed_form"] = {m: [data.accuracy(w, level) for level in levels] for m, w in exact}
    return result
