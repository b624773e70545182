"""Section 2 of the paper in numbers: what linear autoencoders and linear contrastive encoders learn, and under noise.

    Proposition 2.1 (A.1)   the linear autoencoder spans the principal subspace            Eq. 9 to 12
    Proposition 2.2 (A.2)   contrastive learning separates as Fisher's LDA "in principle"  Eq. 13 to 16
    Figure 6                two Gaussians, one dimension kept: PCA's or LDA's accuracy as noise is added

Both propositions are tested where they hold and where they need a condition that the paper leaves unsaid. NumPy,
float64; rows are samples, x (N, D), and directions, (M, D). Angles are in degrees, 0 to 90.
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
    """The first `num` loading vectors (num, D), orthonormal, and the variances along them (num,), largest first."""
    variances, vectors = np.linalg.eigh(np.cov(_samples(x, num), rowvar=False))
    return vectors[:, ::-1].T[:num], variances[::-1][:num]


def fisher_directions(x: np.ndarray, labels: np.ndarray, num: int = 1) -> np.ndarray:
    # argmax_w w' S_B w / w' S_W w  (paper, Eq. 13)
    """Fisher's discriminant directions (num, D), unit rows, best first; at most one less than there are classes."""
    x, classes = _samples(x, num), np.unique(labels)
    if num >= len(classes):
        raise DigitError(f"{len(classes)} classes have {len(classes) - 1} discriminant directions, asked for {num}")
    share = np.array([(labels == k).mean() for k in classes])  # (C,)
    means = np.stack([x[labels == k].mean(0) for k in classes])  # (C, D)
    residual = x - means[np.searchsorted(classes, labels)]
    offsets = (means - share @ means) * np.sqrt(share)[:, None]
    return _top_directions(offsets.T @ offsets, residual.T @ residual / len(x), num)


def principal_angles(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Angles (min(M, K),) between the spans of rows (M, D) and (K, D), smallest first; all 0 for equal spans."""
    bases = [np.linalg.qr(np.atleast_2d(rows).T)[0] for rows in (first, second)]
    cosines, sines = bases[0].T @ bases[1], bases[1] - bases[0] @ (bases[0].T @ bases[1])
    cosines = np.linalg.svd(cosines, compute_uv=False)
    sines = np.sort(np.linalg.svd(sines, compute_uv=False))[: len(cosines)]  # an arc cosine alone ends at 1e-6 degrees
    return np.degrees(np.arctan2(sines, cosines))


def _samples(x: np.ndarray, num: int) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2 or not 1 <= num <= x.shape[1]:
        raise DigitError(f"{num} directions of an array of shape {x.shape}: wanted (samples, features), num in 1..D")
    return x


def _top_directions(wanted: np.ndarray, unwanted: np.ndarray, num: int) -> np.ndarray:
    # the largest w' A w / w' B w, one after the other: A w = r B w
    vectors = eigh(wanted, unwanted)[1][:, ::-1].T[:num]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# -------------------------------------------------------------------- Proposition 2.1: linear autoencoder and PCA


@dataclass(frozen=True, kw_only=True)
class LinearAutoencoder:
    """A trained pair of matrices and how its span came to the principal one."""

    encoder: np.ndarray  # W1 (M, D)
    decoder: np.ndarray  # W2 (D, M)
    steps: list[int]
    angles: list[float]  # largest principal angle to the principal subspace at each of `steps`

    @property
    def loadings(self) -> np.ndarray:
        """Left singular vectors (M, D) of the decoder: what the weights alone say of the loading vectors."""
        return np.linalg.svd(self.decoder, full_matrices=False)[0].T

    def loadings_by_codes(self, x: np.ndarray) -> np.ndarray:
        """Left singular vectors (M, D) of the reconstruction W2 W1 X: the weights and the variance of the codes."""
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
    # min ||X - W2 W1 X||^2 / N + weight_decay (||W1||^2 + ||W2||^2)  (paper, Eq. 9; decay: Kunin et al. 2019)
    """Gradient descent on both matrices from small random weights; x (N, D) is scaled to a largest variance of 1.

    centre False leaves the mean in, where the span is that of the uncentred second moments and not of PCA.
    """
    loadings, variances = principal_components(x, num)
    shifted = x - x.mean(0) if centre else x
    second_moment = shifted.T @ shifted / len(x)
    second_moment = second_moment / (variances[0] if centre else np.linalg.eigvalsh(second_moment)[-1])
    rng = np.random.default_rng(seed)
    w1, w2 = (rng.normal(scale=0.3 / x.shape[1] ** 0.5, size=shape) for shape in ((num, x.shape[1]), (x.shape[1], num)))
    steps, angles = [], []
    shown = set(np.geomspace(1, num_steps, 60).astype(int)) | {0, num_steps}
    for step in range(num_steps + 1):
        if step in shown:
            steps.append(step)
            angles.append(float(principal_angles(w2.T, loadings).max()))
        error = second_moment - w2 @ (w1 @ second_moment)  # (I - W2 W1) C
        gradient1 = -2 * w2.T @ error + 2 * weight_decay * w1
        gradient2 = -2 * error @ w1.T + 2 * weight_decay * w2
        w1, w2 = w1 - learning_rate * gradient1, w2 - learning_rate * gradient2
    return LinearAutoencoder(encoder=w1, decoder=w2, steps=steps, angles=angles)


def solve_autoencoder(x: np.ndarray, num: int, *, num_rounds: int = 60, seed: int = 0) -> LinearAutoencoder:
    # W1 = (W2' W2)^-1 W2'  (paper, Eq. 10);  W2 = C W1' (W1 C W1')^-1
    """The two normal equations in turn. A round multiplies the decoder's span by C: a power iteration.

    So the tangent of the angle shrinks by variance M + 1 over variance M a round, and stays where these are equal.
    """
    loadings, cov = principal_components(x, num)[0], np.cov(x, rowvar=False)
    w2 = np.random.default_rng(seed).normal(size=(x.shape[1], num))
    angles = [float(principal_angles(w2.T, loadings).max())]
    for _ in range(num_rounds):
        w1 = np.linalg.pinv(w2)
        w2 = cov @ w1.T @ np.linalg.inv(w1 @ cov @ w1.T)
        angles.append(float(principal_angles(w2.T, loadings).max()))
    return LinearAutoencoder(encoder=np.linalg.pinv(w2), decoder=w2, steps=list(range(num_rounds + 1)), angles=angles)


def loading_angle(found: np.ndarray, loadings: np.ndarray) -> float:
    """The largest angle between a found vector and the loading vector of the same rank, rows (M, D)."""
    return float(max(principal_angles(a, b)[0] for a, b in zip(found, loadings, strict=True)))


def autoencoder_against_pca(
    *, dim: int = 12, num: int = 4, num_samples: int = 2000, num_steps: int = 20_000, seed: int = 0
) -> dict:
    """Proposition 2.1 on Gaussian data of geometric spectrum, turned at random and off-centre -> figures, in degrees.

    subspace_angle: of the claim of a common span; by gradient, by the normal equations, and without centring.
    loading_angle: of the claim that the weights give the loading vectors; by singular vectors of the decoder with and
    without decay, and of the reconstruction.
    """
    rng = np.random.default_rng([seed, 21])
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    x = rng.normal(size=(num_samples, dim)) * 0.75 ** np.arange(dim) @ turn.T + rng.normal(size=dim)
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
    """A model of positive pairs: x = +-mean + image noise, shared by both views + view noise, each view's own.

    The distribution of a view depends on the sum of both noises alone; contrastive learning sees besides which part two
    views share. image_cov 0 makes a pair two independent draws of one class.
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
        """S_B (D, D): mean mean', Eq. 16 up to its factor."""
        return np.outer(self.mean, self.mean)

    @property
    def lda(self) -> np.ndarray:
        """Fisher's direction (D,), Eq. 13: S_W^-1 mean."""
        return _top_directions(self.between, self.within, 1)[0]

    @property
    def pca(self) -> np.ndarray:
        """First principal component (D,) of the views."""
        return np.linalg.eigh(self.between + self.within)[1][:, -1]

    @property
    def contrastive(self) -> np.ndarray:
        # argmax_w w' Cov(x, x+) w / w' Cov(x) w
        """Direction (D,) that a linear encoder learns from Eq. 14 as long as its second term is quadratic.

        With codes Wx of covariance S, E log E exp(f'f- / t) = tr S^2 / 2 t^2 for Gaussian x, and the loss becomes
        -tr(W Cov(x, x+) W') / t + tr (W Cov(x) W')^2 / 2 t^2: its minimum whitens, so that the rows of W are the
        leading generalised eigenvectors. Cov(x, x+) is S_B and the image noise: this LDA's classes are the images.
        """
        return _top_directions(self.between + self.image_cov, self.between + self.within, 1)[0]

    def draw(self, num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`num` positive pairs: x (num, D), x+ (num, D), classes (num,) 0 or 1."""
        labels, zero = rng.integers(0, 2, num), np.zeros_like(self.mean)
        shared = (2 * labels - 1)[:, None] * self.mean + rng.multivariate_normal(zero, self.image_cov, num)
        first, second = (shared + rng.multivariate_normal(zero, self.view_cov, num) for _ in range(2))
        return first, second, labels


def two_views(share: float, *, kind: str = "shape", view_variance: float = 0.2) -> TwoViews:
    """The example in two dimensions: within-class noise of variance 4 along one axis, 0.25 along the other, turned.

    kind "shape" moves the augmentation from isotropic (share 0) to the whole within-class noise (share 1); "amount"
    gives it that share of the within-class noise, in its shape. S_W and S_B, hence LDA and PCA, stay the same.
    """
    if kind not in ("shape", "amount") or not 0 <= share <= 1:
        raise DigitError(f"kind {kind!r} and share {share}: wanted shape or amount, and a share from 0 to 1")
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    turn = np.array([[cos, -sin], [sin, cos]])
    within = turn @ np.diag([4.0, 0.25]) @ turn.T
    rest = view_variance * np.eye(2) * (1 - share) if kind == "shape" else 0.0
    view_cov = share * within + rest
    return TwoViews(mean=turn @ np.array([0.5, 0.75]), image_cov=within - view_cov, view_cov=view_cov)


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
    # -E f(x)'f(x+) / t + E log E exp(f(x)'f(x-) / t)  (paper, Eq. 14)
    """Train f(x) = Wx, fresh pairs every step -> W (M, D), rows scaled as trained.

    normalise takes f(x) = Wx / ||Wx|| with M = 2, as contrastive models do and the step after Eq. 15 assumes; without,
    M = 1 and the temperature only scales W.
    """
    rng = np.random.default_rng(seed)
    weight = torch.tensor(rng.normal(scale=0.5, size=(1 + normalise, len(views.mean))), requires_grad=True)
    optimizer = torch.optim.Adam([weight], learning_rate)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + np.cos(np.pi * step / num_steps))
        codes, positives = (_encode(weight, x, normalise) for x in views.draw(batch_size, rng)[:2])  # (B, M)
        spread = torch.logsumexp(codes @ positives.T / temperature, 1).mean() - np.log(batch_size)
        loss = spread - (codes * positives).sum(1).mean() / temperature
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach().numpy()


def _encode(weight: torch.Tensor, x: np.ndarray, normalise: bool) -> torch.Tensor:
    codes = torch.from_numpy(x) @ weight.T
    return codes / codes.norm(dim=1, keepdim=True) if normalise else codes


def leading_direction(weight: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """The functional of x (D,) whose values vary most in the codes Wx: W (M, D), covariance of x (D, D)."""
    return weight.T @ np.linalg.eigh(weight @ cov @ weight.T)[1][:, -1]


def jensen_gap(codes: np.ndarray, temperature: float) -> dict[str, float]:
    # mean_i log mean_j exp(h_i'h_j / t) >= 1 / (t m^2) sum_ij h_i'h_j  (paper, Eq. 15)
    """Both sides of Eq. 15 for codes (m, M), and what the proof concludes from its right side.

    The sum of all inner products is m^2 ||mean code||^2: 0 for centred codes, whatever their spread. It bounds the
    largest eigenvalue of their Gram matrix only where no inner product is negative.
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
    """Proposition 2.2 on `two_views`: angles between the learnt direction and LDA's and PCA's -> figures, in degrees.

    Each entry of "shape" and "amount": the share, the closed form's angles, and the trained encoders' (a list over
    seeds), with codes as they are ("linear") and on the unit circle ("normalised").
    """
    results: dict = {"num_seeds": num_seeds, "num_steps": num_steps}
    for kind, chosen in (("shape", shares), ("amount", amounts)):
        results[kind] = [_alignment(two_views(share, kind=kind), share, num_seeds, num_steps) for share in chosen]
    views = two_views(1)
    results["lda_to_pca"] = float(principal_angles(views.lda, views.pca)[0])
    rng, weight = np.random.default_rng(22), train_contrastive(views, normalise=True, num_steps=num_steps)
    codes = _encode(torch.from_numpy(weight), views.draw(1000, rng)[0], True).numpy()
    results["jensen"] = {"trained": jensen_gap(codes, 0.5), "centred": jensen_gap(codes - codes.mean(0), 0.5)}
    return results


def _alignment(views: TwoViews, share: float, num_seeds: int, num_steps: int) -> dict:
    def angles(direction: np.ndarray) -> dict[str, float]:
        targets = {"lda": views.lda, "pca": views.pca}
        return {name: float(principal_angles(direction, target)[0]) for name, target in targets.items()}

    result: dict = {"share": float(share), "closed_form": angles(views.contrastive)}
    for name, normalise in (("linear", False), ("normalised", True)):
        found = []
        for seed in range(num_seeds):
            weight = train_contrastive(views, normalise=normalise, num_steps=num_steps, seed=seed)
            found.append(angles(leading_direction(weight, views.between + views.within)))
        result[name] = {target: [angle[target] for angle in found] for target in ("lda", "pca")}
    return result


# -------------------------------------------------------------------- Figure 6: noise against accuracy


@dataclass(frozen=True, kw_only=True)
class ToyData:
    """Two equally likely Gaussians in the plane with one covariance."""

    offset: tuple[float, float] = (0.0, 2.0)
    """Mean of class 2 less mean of class 1, which is 0."""
    correlation: float = 0.8
    """Of the two features, each of variance 1 within a class."""

    @property
    def within(self) -> np.ndarray:
        """Covariance (2, 2) of a class."""
        return np.array([[1.0, self.correlation], [self.correlation, 1.0]])

    @property
    def scale(self) -> float:
        """Unit of the noise: the root mean square over both features of their standard deviation, classes together."""
        return float(np.sqrt((2 + 0.25 * np.square(self.offset).sum()) / 2))

    def draw(self, num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """x (2 num, 2) and classes (2 num,)."""
        labels = np.repeat([0, 1], num)
        return rng.multivariate_normal([0, 0], self.within, 2 * num) + labels[:, None] * np.array(self.offset), labels

    def accuracy(self, direction: np.ndarray, noise: float) -> float:
        # Phi(|w'd| / 2 sqrt(w' (S_W + s^2 I) w))
        """What the best threshold along `direction` (2,) gets at a noise of `noise` units."""
        total = self.within + (noise * self.scale) ** 2 * np.eye(2)
        return NormalDist().cdf(abs(direction @ np.array(self.offset)) / (2 * np.sqrt(direction @ total @ direction)))


def noise_against_accuracy(
    data: ToyData, *, levels: Sequence[float], num_seeds: int, num: int = 500, refit: bool = False
) -> dict[str, np.ndarray]:
    """Figure 6(d): {"pca", "lda"} -> accuracy (num_seeds, levels) on held-out points of 1-D codes.

    A level is the standard deviation of the isotropic Gaussian noise in units of `data.scale`. The projection is fitted
    on clean points and kept, as an encoder is (refit True: fitted anew on noisy ones); the linear classifier, one
    threshold midway between the class means, on noisy points. `num` training and `num` test points a class.
    """
    accuracy = {name: np.empty((num_seeds, len(levels))) for name in ("pca", "lda")}
    for seed in range(num_seeds):
        rng = np.random.default_rng([seed, 6])
        (x, labels), (test, truth) = data.draw(num, rng), data.draw(num, rng)
        steps = rng.normal(size=(2, *x.shape)) * data.scale
        for column, level in enumerate(levels):
            noisy, noisy_test = x + level * steps[0], test + level * steps[1]
            seen = noisy if refit else x
            for name, w in (("pca", principal_components(seen, 1)[0][0]), ("lda", fisher_directions(seen, labels)[0])):
                accuracy[name][seed, column] = _threshold_accuracy(noisy @ w, labels, noisy_test @ w, truth)
    return accuracy


def _threshold_accuracy(codes: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    low, high = (codes[labels == k].mean() for k in (0, 1))
    return float((((test - (low + high) / 2) * (high - low) > 0) == truth).mean())


PAPER_LIKE = ToyData()  # the classes differ across the main spread
ALONG_THE_SPREAD = ToyData(offset=(2.0, 1.0))  # they differ mostly along it: under noise LDA's narrow axis is drowned


def figure6(*, levels: Sequence[float], num_seeds: int, num: int = 500) -> dict:
    """Accuracy (num_seeds, levels) as lists for both examples, projection kept and refitted, with closed forms."""
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
