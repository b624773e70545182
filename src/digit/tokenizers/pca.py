"""Principal components of features, fitted in one pass over batches, and whitening; what a quantizer may see instead.

    y = (x - m) V^T / s        s = 1, or sqrt(lambda) where whitened

V holds the P directions of largest variance lambda, m is the mean. The pass adds up each batch's mean and its products
about that mean in float64 (Chan, Golub & LeVeque 1983), so that neither the number of features nor a large mean costs
precision, and no feature is kept.

Shapes: n rows of a batch, D features, P kept directions.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from digit.errors import DigitError, MismatchError, Stopped
from digit.runtime import distributed
from digit.runtime.files import sha256_tensors
from digit.runtime.progress import Progress
from digit.runtime.signals import StopSignals
from digit.tokenizers.kept import KeptTensors
from digit.tokenizers.kmeans.nearest import FeatureArray, as_features
from digit.tokenizers.shares import Shares

if TYPE_CHECKING:
    from jaxtyping import Float

    from digit.tokenizers.kmeans.points import Features

FLAT = 1e-12  # of the largest variance: below, a direction is rounding
PREFIX = "pca."  # of the tensors' names


@dataclass(frozen=True)
class PCA:
    """A fitted projection; its tensors are float32 and on one device."""

    mean: 'Float[Tensor, " D"]'
    components: 'Float[Tensor, "P D"]'
    """Orthonormal rows, by falling variance; the largest number of each row is positive."""
    scale: 'Float[Tensor, " P"]'
    """The standard deviation along each direction where whitened, else 1."""

    def __post_init__(self) -> None:
        num, dim = self.components.shape if self.components.ndim == 2 else (0, 0)
        if not num or self.mean.shape != (dim,) or self.scale.shape != (num,) or num > dim:
            raise DigitError("a PCA is of a mean (D,), components (P, D) and a scale (P,): fit it again")
        if not all(torch.isfinite(tensor).all() for tensor in self.tensors().values()) or self.scale.min() <= 0:
            raise DigitError("the PCA holds NaN, Inf or a scale of 0: fit it again (digit codebook ...)")

    @property
    def dim(self) -> int:
        """Features D that it takes."""
        return self.components.shape[1]

    @property
    def num(self) -> int:
        """Directions P that it keeps."""
        return len(self.components)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its tensors, 64 hex digits."""
        return sha256_tensors(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, as `from_tensors` reads them."""
        return {f"{PREFIX}mean": self.mean, f"{PREFIX}components": self.components, f"{PREFIX}scale": self.scale}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "PCA | None":
        """The PCA among some tensors; None where there is none."""
        names = [f"{PREFIX}{name}" for name in ("mean", "components", "scale")]
        if not any(name in tensors for name in names):
            return None
        if not all(name in tensors and tensors[name].is_floating_point() for name in names):
            raise DigitError(f"a PCA needs floats named {', '.join(names)}: fit it again (digit codebook ...)")
        return cls(*(tensors[name].float().clone() for name in names))

    def to(self, device: str | torch.device) -> "PCA":
        """The same on another device."""
        return PCA(self.mean.to(device), self.components.to(device), self.scale.to(device))

    @torch.no_grad()
    def project(self, features: FeatureArray) -> 'Float[Tensor, "... P"]':
        """(..., D) to (..., P) float32, on the features' device. Raises MismatchError for another D.

        Multiplied in float64, so that the result does not depend on how many features come together.
        """
        features = as_features(features)
        dim = features.shape[-1] if features.ndim else 0
        if dim != self.dim:
            raise MismatchError(
                f"the codebook's PCA takes {self.dim} features, the input has {dim}: "
                "use the encoder and the layer that the codebook was fitted on, or refit (digit codebook ...)"
            )
        mean, components, scale = (
            tensor.to(features.device).double() for tensor in (self.mean, self.components, self.scale)
        )
        return ((features.double() - mean) @ (components / scale[:, None]).T).float()

    @torch.no_grad()
    def restore(self, projected: 'Float[Tensor, "... P"]') -> 'Float[Tensor, "... D"]':
        """The features that project to these and lie in the kept directions, (..., P) to (..., D) float32."""
        return (self.directions(projected).double() + self.mean.double()).float()

    @torch.no_grad()
    def directions(self, projected: 'Float[Tensor, "... P"]') -> 'Float[Tensor, "... D"]':
        """As `restore`, of differences: without the mean."""
        return (projected.double() @ (self.components * self.scale[:, None]).double()).float()

    def of(self, features: "Features") -> "Features":
        """Projected features: of an array, or of a callable that iterates over them, with their numbers if any."""
        return mapped(features, self.project)


def mapped(features: "Features", function: Callable[[Tensor], Tensor]) -> "Features":
    """`features` with a function of (n, D) rows applied: an array at once, a callable in each of its passes."""
    if not callable(features):
        return function(as_features(features))
    stream: Callable[[], Iterable[Any]] = features

    def parts() -> Iterator[Any]:
        for part in stream():
            yield function(part) if isinstance(part, Tensor) else (function(part[0]), part[1])

    return parts


class Moments:
    """Number, mean and scatter sum (x - m)(x - m)^T of rows that come in batches, in float64."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.num = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, rows: 'Float[Tensor, "n D"]') -> None:
        """Take in more rows."""
        rows = rows.to(self.mean.device, torch.float64)
        mean, total = rows.mean(0), self.num + len(rows)
        centred, step = rows - mean, mean - self.mean
        self.scatter += centred.T @ centred
        self.scatter += torch.outer(step, step) * (self.num * len(rows) / total)
        self.mean += step * (len(rows) / total)
        self.num = total

    def add_up(self, shares: Shares) -> None:
        """The moments of the rows of all ranks, on every rank."""
        if distributed.world_size() == 1:
            return
        own, mean = self.num, self.mean
        self.num = int(shares.add_up(torch.tensor([own], dtype=torch.int64))[0])
        self.mean = shares.add_up(own * mean) / max(1, self.num)
        step = mean - self.mean
        self.scatter += torch.outer(step, step) * own
        shares.add_up(self.scatter)

    def variances(self) -> tuple[Tensor, Tensor]:
        """(D,) variances along the principal directions, falling, of n - 1 degrees of freedom; (D, D) directions."""
        covariance = self.scatter / max(1, self.num - 1)
        if not torch.isfinite(covariance).all():
            raise DigitError("features for PCA hold NaN, Inf or values too large: check the encoder and its precision")
        values, columns = torch.linalg.eigh(covariance.cpu())  # on the CPU: equal bits on every rank
        directions = columns.flip(1).T
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        return values.flip(0).clamp(min=0), directions * largest.sign()


def gather_moments(features: "Features", shares: Shares) -> Moments:
    """The moments of features, a tensor (N, D) or a callable, of all ranks; one pass. Raises Stopped after a signal."""
    stream = features if callable(features) else lambda: iter([as_features(features)])
    moments: Moments | None = None
    with Progress("features for PCA") as bar:
        for part in stream():
            rows = part if isinstance(part, Tensor) else part[0]
            if rows.ndim != 2 or not rows.shape[1]:
                raise DigitError(f"PCA wants features of shape (N, D), got {tuple(rows.shape)}")
            moments = moments or Moments(rows.shape[1], rows.device)
            if rows.shape[1] != len(moments.mean):
                raise DigitError(f"features for PCA change from {len(moments.mean)} to {rows.shape[1]} columns midway")
            if len(rows):
                moments.add(rows)
            bar.update(len(rows))
            if shares.asked_to_stop:
                break
    try:
        shares.agree_to_go_on()
    except Stopped:
        raise Stopped("PCA of the features: its pass is not done") from None
    known = [kind for kind in distributed.gather(moments and (len(moments.mean), moments.mean.device.type)) if kind]
    if not known:
        raise DigitError("PCA got no features at all: the source gave no readable image")
    moments = moments or Moments(*known[0])
    moments.add_up(shares)
    return moments


@torch.no_grad()
def fit_pca(
    features: "Features",
    num: int,
    *,
    whiten: bool = False,
    across_ranks: bool = False,
    kept: KeptTensors | None = None,
) -> tuple[PCA, float]:
    """The PCA of features, and the share of their variance that it keeps, in one pass over them.

    Args:
        features: a tensor (N, D), or a callable whose call iterates tensors (n, D), or such tensors with numbers.
        num: directions P to keep.
        whiten: divide by the standard deviation along each.
        across_ranks: every rank of the job calls this with its own share of the features.
        kept: where the result is kept, and read where it is there.

    Raises DigitError for more directions than the features have, NaN or Inf; Stopped where a signal asked for it.
    """
    signals = StopSignals() if kept else nullcontext()
    with distributed.alone(not across_ranks), signals as signals:
        if kept and (found := kept.load()):
            pca = PCA.from_tensors(found[0])
            assert pca is not None, "written below"
            return pca, found[1]["explained"]
        moments = gather_moments(features, Shares(signals))
        values, directions = moments.variances()
        rank = int((values > FLAT * values[0]).sum())
        if num > rank:
            have = f"are {rank} numbers" if rank == len(values) else f"vary along {rank} of {len(values)} directions"
            raise DigitError(f"pca is {num}, but the features {have}: set it to {rank} or less")
        scale = values[:num].sqrt() if whiten else torch.ones(num)
        pca = PCA(moments.mean.cpu().float(), directions[:num].float().contiguous(), scale.float())
        explained = float(values[:num].sum() / values.sum())
        if kept:
            kept.save(pca.tensors(), {"explained": explained})
    return pca, explained
