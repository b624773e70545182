"""Linear probes: accuracy of a linear classifier on frozen features, layer by layer (paper, 4.2, Table 2, Figure 3b).

Two solvers. SGD as released (momentum 0.9, cosine schedule, learning rate 0.4) takes any number of images and trains
one head for each layer and learning rate at the same time. L-BFGS runs to the optimum, without a seed or a learning
rate, on features that fit in memory. The settings of the sweep are chosen on images held out of the training set; the
test images are used once, at the end.

Features are a tensor, or rows that are read batch by batch (`feature_rows`): SGD's memory does not grow with N.

Shapes: N training and M test images, L layers, D features, C classes, S settings of the sweep.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64, Real
from torch import Tensor

from digit.errors import DigitError
from digit.metrics.feature_rows import CHUNK, FeatureRows, Features, as_rows, batches, is_finite, near
from digit.metrics.intervals import Interval, difference_interval, proportion_interval
from digit.metrics.judge import fit_linear_classifier, nonzero_scale
from digit.runtime.progress import Progress
from digit.runtime.settings import check_settings, within

MAX_ITERATIONS = 1000  # of L-BFGS
LBFGS_VALUE_BYTES = 24  # float64 of the features, their standardised copy and a product
LBFGS_MAX_BYTES = 2**34  # one layer's features; more is refused, since all images must lie in memory


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How the classifiers are trained and chosen."""

    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs: multinomial logistic regression at its optimum, in float64; sgd: as released, for many images."""
    l2: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """lbfgs: weights of ||W||^2 / 2 beside the mean cross-entropy, to choose from."""
    tolerance: float = 1e-9
    """lbfgs: stops where a step changes the loss by less."""
    learning_rates: tuple[float, ...] = (0.01, 0.04, 0.1, 0.4, 1.0)
    """sgd: learning rates to choose from (released: 0.4)."""
    weight_decays: tuple[float, ...] = (0.0,)
    """sgd: weight decays to choose from, each with every learning rate."""
    num_epochs: int = 80
    """sgd: passes over the training images (released: 100,000 updates of 1024 images, 80 passes over ImageNet)."""
    batch_size: int = 1024
    """sgd: images per update."""
    momentum: float = 0.9
    """sgd: momentum."""
    standardise: bool = True
    """sgd: scale features to mean 0 and standard deviation 1 over the training images; lbfgs always does, since its l2
    would otherwise depend on the features' scale."""
    validation_fraction: float = 0.1
    """Fraction of the training images held out to choose settings and the best layer; never the test images."""
    seed: int = 0
    """Seed of the split and of sgd's image order."""
    positions: Literal["auto", "all", "trained"] = "auto"
    """Positions of a sequence model whose mean is taken: all (released: 257), or trained, without the last token (256),
    which a model of ours never reads in training. auto: all for released models, trained for others."""
    memory_budget_bytes: int = within("[0, inf)", 2**31)
    """Features above this size (float32) are written to files, rounded to float16, and read batch by batch."""
    confidence: float = 0.95
    """Confidence of the intervals (Wilson over test images; paired bootstrap for differences)."""

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.l2 or not self.learning_rates or not self.weight_decays:
            raise DigitError("the probe's l2, learning_rates and weight_decays need at least one number each")
        if not 0 < self.validation_fraction < 1:
            raise DigitError(f"validation_fraction is {self.validation_fraction}: give a fraction between 0 and 1")
        if min(self.num_epochs, self.batch_size) < 1:
            raise DigitError(f"num_epochs {self.num_epochs} and batch_size {self.batch_size} must both be at least 1")

    @property
    def settings(self) -> list[dict[str, float]]:
        """The settings of the sweep, S entries."""
        if self.solver == "lbfgs":
            return [{"l2": l2} for l2 in self.l2]
        pairs = product(self.learning_rates, self.weight_decays)
        return [{"learning_rate": rate, "weight_decay": decay} for rate, decay in pairs]


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """The probe of one layer."""

    name: str
    top1: Interval
    """Accuracy on the test images, 0..1."""
    setting: dict[str, float]
    """The chosen setting of the sweep."""
    validation_top1: float
    """Accuracy on the held-out training images with the chosen setting; choose layers by this."""
    correct: Bool[Tensor, " M"]
    """For each test image, to compare two probes of the same test images."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but `correct`, for JSON."""
        kept = {"name": self.name, "top1": self.top1.to_dict(), "setting": self.setting}
        return kept | {"validation_top1": self.validation_top1}


def best_layer(results: Sequence[LayerResult]) -> LayerResult:
    """argmax_n validation_top1_n: the best layer on held-out images; choosing on test images would be biased."""
    return max(results, key=lambda result: result.validation_top1)


def top1_difference(first: LayerResult, second: LayerResult, cfg: ProbeConfig) -> Interval:
    """mean_i ([first is correct on i] - [second is correct on i]) over the same test images (M,), paired bootstrap."""
    return difference_interval(first.correct.double(), second.correct.double(), confidence=cfg.confidence)


def probe_layers(
    train: Features,
    labels: Real[Tensor, " N"],
    test: Features,
    test_labels: Real[Tensor, " M"],
    cfg: ProbeConfig,
    names: Sequence[str] = (),
    groups: Real[Tensor, " N"] | None = None,
    device: torch.device | None = None,
    states: "Callable[[str], FitState] | None" = None,
) -> list[LayerResult]:
    """top1_n = 1/M sum_i [argmax_c (W_n z_i + b_n)_c = y_i], z the standardised features of layer n = 0..L-1.

    train (N, L, D) has labels (N,), test (M, L, D) has test_labels y (M,), classes 0..C-1; both are tensors or rows in
    files. The setting is chosen on held-out training images; the classifier is then trained on all of them. sgd runs on
    `device`, by default the features' own, lbfgs on the CPU. groups (N,) int64 says which rows are crops of one image;
    they are held out together, since otherwise a setting that memorises images would win. states("sweep") and
    states("final") keep the state of sgd's two fits, so that a probe that was killed goes on, to the bit.

    Raises DigitError for missing labels, labels that do not fit, NaN, too few images to hold any out, and too many for
    lbfgs.
    """
    labels, test_labels = labels.long().cpu(), test_labels.long().cpu()
    num_classes = _check(train, labels, test, test_labels)
    if device is None:
        device = train.device if isinstance(train, Tensor) else torch.device("cpu")
    train, test, sgd = as_rows(train), as_rows(test), cfg.solver == "sgd"
    num, num_layers, _ = train.shape
    check_size(cfg, train.shape[0], train.shape[2])
    if sgd:
        train = near(train, device)
    order, held = _split(torch.arange(num) if groups is None else groups, cfg)
    data, settings = ProbeData(train, labels, num_classes, device), cfg.settings

    def fit(rows: Tensor, sweep: Sweep, stage: str) -> Heads:
        if not sgd:
            return fit_lbfgs(data, rows, sweep, cfg, bar.update)
        return fit_sgd(data, rows, sweep, cfg, bar.update, states and states(stage))

    with Progress(f"probe ({cfg.solver})", _num_updates(cfg, train, num - held)) as bar:
        heads = fit(order[held:], [settings] * num_layers, "sweep")
        scores = _accuracies(heads, train, order[:held], labels)  # (L, S)
        chosen = scores.argmax(1).tolist()  # ties: the first setting
        heads = fit(order.sort().values, [[settings[s]] for s in chosen], "final")
    correct = _predict(heads, test, torch.arange(test.shape[0]))[:, :, 0] == test_labels[:, None]  # (M, L)
    return [
        LayerResult(
            name=names[n] if names else f"layer {n}",
            top1=proportion_interval(int(correct[:, n].sum()), len(correct), confidence=cfg.confidence),
            setting=settings[s],
            validation_top1=float(scores[n, s]),
            correct=correct[:, n],
        )
        for n, s in enumerate(chosen)
    ]


def _accuracies(heads: "Heads", features: FeatureRows, rows: Tensor, labels: Tensor) -> Tensor:
    """(L, S) float64 accuracies on some rows (B,) of features whose labels are (N,)."""
    return (_predict(heads, features, rows) == labels[rows, None, None]).double().mean(0)


def _split(groups: Tensor, cfg: ProbeConfig) -> tuple[Tensor, int]:
    """(rows in random order, group by group; number of the first rows that are held out)."""
    groups = torch.unique(groups, return_inverse=True)[1]
    num = int(groups.max()) + 1
    place = torch.randperm(num, generator=torch.Generator().manual_seed(cfg.seed % 2**63)).argsort()
    held = max(1, round(cfg.validation_fraction * num))
    if held >= num:
        raise DigitError(f"{num} training images, {held} of them held out, leave none to train on: give more")
    rank = place[groups]
    return rank.argsort(stable=True), int((rank < held).sum())


@dataclass(frozen=True)
class Heads:
    """Linear classifiers, S for each of L layers, on features standardised with mean and scale (L, D)."""

    weight: Float[Tensor, "L D S C"]
    bias: Float[Tensor, "L S C"]
    mean: Tensor
    scale: Tensor

    def logits(self, features: Real[Tensor, "B L D"]) -> Float[Tensor, "B L S C"]:
        """(B, L, D) -> (B, L, S, C)."""
        x = (features.to(self.weight.dtype) - self.mean) / self.scale
        return torch.einsum("bld,ldsc->blsc", x, self.weight) + self.bias


@dataclass(frozen=True)
class ProbeData:
    """Training data of the classifiers."""

    features: Features  # (N, L, D)
    labels: Int64[Tensor, " N"]  # on the CPU
    num_classes: int
    device: torch.device | None = None  # where sgd computes; None: where the features are, the CPU for files

    @property
    def rows(self) -> FeatureRows:
        """The features, to be read by rows."""
        return as_rows(self.features)

    @property
    def place(self) -> torch.device:
        """Where sgd computes."""
        if self.device is not None:
            return self.device
        return self.features.device if isinstance(self.features, Tensor) else torch.device("cpu")


@runtime_checkable
class FitState(Protocol):
    """Where sgd keeps its state while it runs: weights, momentum, the number of the update."""

    def load(self) -> Mapping[str, Tensor]:
        """What was saved last; empty where nothing was."""
        ...

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        ...

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace what was saved."""
        ...


Sweep = list[list[dict[str, float]]]  # (L, S) settings
Advance = Callable[[int], object]  # called with the number of steps just done


def _ignore(advance: int) -> None:
    pass


def _num_updates(cfg: ProbeConfig, train: FeatureRows, kept: int) -> int:
    """Length of the progress bar: classifiers (lbfgs) or updates (sgd), of the sweep and the final fit together."""
    if cfg.solver == "lbfgs":
        return train.shape[1] * (len(cfg.settings) + 1)
    return cfg.num_epochs * sum(-(-num // cfg.batch_size) for num in (kept, train.shape[0]))


def _predict(heads: Heads, features: FeatureRows, rows: Tensor) -> Tensor:
    """Predict classes (B, L, S) int64 on the CPU for the given rows (B,) of features (N, L, D)."""
    parts = (part for _, part in batches(features, rows.split(CHUNK), heads.weight.device))
    return torch.cat([heads.logits(part).argmax(3).cpu() for part in parts])


def fit_lbfgs(
    data: ProbeData, rows: Int64[Tensor, " R"], sweep: Sweep, cfg: ProbeConfig, advance: Advance = _ignore
) -> Heads:
    """min_W,b  1/N sum_i CE(W (x_i - m) / s + b, y_i) + l2/2 ||W||²,  W (C, D), b (C,).

    Fits a classifier for every layer and setting on the given rows (N,) of the data, each to its optimum; m and s (D,)
    are the mean and standard deviation of these rows.
    """
    fitted = []
    for layer, settings in enumerate(sweep):
        features = _layer(data.rows, rows, layer)  # (N, D)
        for setting in settings:
            options: dict[str, Any] = dict(
                num_classes=data.num_classes, max_iterations=MAX_ITERATIONS, tolerance=cfg.tolerance
            )
            fitted.append(fit_linear_classifier(features, data.labels[rows], l2=setting["l2"], **options))
            advance(1)
    shape = (len(sweep), len(sweep[0]))
    weight = torch.stack([one.weight for one in fitted]).unflatten(0, shape)  # (L, S, C, D)
    bias = torch.stack([one.bias for one in fitted]).unflatten(0, shape)  # (L, S, C)
    mean, scale = (torch.stack([getattr(one, name) for one in fitted[:: shape[1]]]) for name in ("mean", "scale"))
    return Heads(weight.permute(0, 3, 1, 2), bias, mean, scale)


def _layer(features: FeatureRows, rows: Tensor, layer: int) -> Tensor:
    """One layer (B, D) of some rows (B,)."""
    return torch.cat([features.take(part)[:, layer] for part in rows.split(CHUNK)])


@torch.no_grad()
def fit_sgd(
    data: ProbeData,
    rows: Int64[Tensor, " R"],
    sweep: Sweep,
    cfg: ProbeConfig,
    advance: Advance = _ignore,
    kept: FitState | None = None,
) -> Heads:
    """g = dCE/dW + lambda W,  v <- mu v + g,  W <- W - eta/2 (1 + cos(pi t / T)) v;  from W = v = 0.

    Fits a classifier W (C, D), and b (C,) without decay, for every layer and setting on the given rows (N,) of data.
    lambda is the weight decay, mu the momentum, eta the learning rate, t of T the update. All classifiers train at the
    same time, on the data's device. A fit that was killed goes on from what `kept` holds, to the bit.
    """
    state = _begun(data, rows, sweep, cfg, kept)
    features, device, mean, scale = data.rows, data.place, state["mean"], state["scale"]
    weight, bias, rates, decays = (state[name] for name in ("weight", "bias", "rates", "decays"))
    weight_momentum, bias_momentum = state["weight_momentum"], state["bias_momentum"]
    generator = torch.Generator().manual_seed(cfg.seed % 2**63)
    per_epoch, step = -(-len(rows) // cfg.batch_size), int(state["step"])
    total = cfg.num_epochs * per_epoch
    advance(step)
    for epoch in range(cfg.num_epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]  # also of an epoch that is done, as before
        parts = order.split(cfg.batch_size)[max(0, step - epoch * per_epoch) :]
        for batch, read in batches(features, parts, device):
            x = (read.float() - mean) / scale  # (B, L, D)
            error = (torch.einsum("bld,ldsc->blsc", x, weight) + bias).softmax(3)
            error[torch.arange(len(batch)), :, :, data.labels[batch]] -= 1
            error /= len(batch)  # (B, L, S, C), d CE / d logits
            gradient = torch.einsum("bld,blsc->ldsc", x, error).addcmul_(weight, decays[:, None])
            rate = rates * (0.5 * (1 + math.cos(math.pi * step / total)))  # (L, S, 1)
            weight -= rate[:, None] * weight_momentum.mul_(cfg.momentum).add_(gradient)
            bias -= rate * bias_momentum.mul_(cfg.momentum).add_(error.sum(0))
            step += 1
            advance(1)
            if kept is not None and (kept.due or step == total):
                kept.save(state | {"step": torch.tensor(step)})
    return Heads(weight, bias, mean, scale)


def _begun(data: ProbeData, rows: Tensor, sweep: Sweep, cfg: ProbeConfig, kept: FitState | None) -> dict[str, Tensor]:
    """The state of `fit_sgd`: what was saved of a fit of the same settings, else that before the first update."""
    features, device = data.rows, data.place
    _, num_layers, dim = features.shape
    settings = {
        name: torch.tensor([[[setting[key]] for setting in settings] for settings in sweep], device=device)  # (L, S, 1)
        for name, key in (("rates", "learning_rate"), ("decays", "weight_decay"))
    }
    saved = {name: tensor.to(device, copy=True) for name, tensor in (kept.load() if kept is not None else {}).items()}
    if saved and all(torch.equal(saved[name], values) for name, values in settings.items()):
        return saved
    mean, scale = _moments(features, rows, device) if cfg.standardise else torch.tensor([0.0, 1.0], device=device)
    weight = torch.zeros(num_layers, dim, len(sweep[0]), data.num_classes, device=device)  # (L, D, S, C)
    bias = torch.zeros(num_layers, len(sweep[0]), data.num_classes, device=device)  # (L, S, C)
    momentum = {"weight_momentum": weight.clone(), "bias_momentum": bias.clone()}  # 0
    about = {"mean": mean, "scale": scale, "step": torch.tensor(0)}
    return {"weight": weight, "bias": bias} | momentum | settings | about


def _moments(features: FeatureRows, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (L, D) float32 of the rows, CHUNK at a time; a constant feature has deviation 1."""
    zero = torch.zeros(features.shape[1:], dtype=torch.float64, device=device)
    parts = rows.split(CHUNK)
    mean = sum((part.double().sum(0) for _, part in batches(features, parts, device)), zero) / len(rows)
    squares = ((part.double() - mean).square().sum(0) for _, part in batches(features, parts, device))
    scale = (sum(squares, zero) / len(rows)).sqrt()
    return mean.float(), nonzero_scale(scale).float()


def check_size(cfg: ProbeConfig, num: int, dim: int) -> None:
    """Raise DigitError where `num` images of one layer's `dim` features are too many for lbfgs; before any work."""
    if cfg.solver == "lbfgs" and (needed := LBFGS_VALUE_BYTES * num * dim) > LBFGS_MAX_BYTES:
        raise DigitError(
            f"{num:,} training images of {dim} features would take lbfgs {needed / 2**30:.0f} GiB of memory and days: "
            "use the solver sgd, or fewer images"
        )


def _check(train: Features, labels: Tensor, test: Features, test_labels: Tensor) -> int:
    """Check labels and features; returns the number of classes."""
    for split, features, own in (("training", train, labels), ("test", test, test_labels)):
        if len(features.shape) != 3 or features.shape[0] != len(own) or not len(own):
            raise DigitError(
                f"{len(own)} labels for {split} features {tuple(features.shape)}, wanted N labels for (N, L, D)"
            )
        if own.min() < 0:
            raise DigitError(f"{int((own < 0).sum())} {split} images have no label: leave them out")
        if not is_finite(as_rows(features)):
            raise DigitError(f"{split} features hold NaN or infinity: check the images and the network's weights")
    if train.shape[1:] != test.shape[1:]:
        raise DigitError(f"training features are {tuple(train.shape[1:])}, test features {tuple(test.shape[1:])} "
                         "(layers, features): take both from one model")  # fmt: skip
    num_classes = int(labels.max()) + 1
    if num_classes < 2 and len(labels) > 1:
        raise DigitError("all training images are of one class: a probe needs at least 2")
    if test_labels.max() >= num_classes:
        raise DigitError(
            f"test labels run to {int(test_labels.max())}, training labels to {num_classes - 1}: "
            "number both with one list of classes, or give training images of every class"
        )
    return num_classes
