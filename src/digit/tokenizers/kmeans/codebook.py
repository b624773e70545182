"""The codebook of a k-means fit: a quantizer of K centroids, of the features or of their principal components.

Shapes: K codes, D features, P principal components where there is a PCA, else D.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from digit.errors import DigitError, MismatchError
from digit.models.tokens import as_integers, require_range
from digit.runtime import distributed
from digit.runtime.files import MAKE_AGAIN, as_path, load_tensors, read_json, save_tensors, sha256_tensors, write_json
from digit.runtime.hardware import choose_device
from digit.tokenizers.kept import KeptTensors
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.kmeans.kmeans import KMeans
from digit.tokenizers.kmeans.nearest import nearest
from digit.tokenizers.kmeans.unfinished import UnfinishedFit
from digit.tokenizers.pca import PCA, fit_pca

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from digit.models.tokens import Integers
    from digit.tokenizers.kmeans.nearest import FeatureArray
    from digit.tokenizers.kmeans.points import Features

log = logging.getLogger(__name__)
FORMAT, FORMAT_WITH_PCA = 1, 2
KIND = "kmeans"  # of tokenizers.quantizers.QUANTIZERS
UNFINISHED, UNFINISHED_PCA = "kmeans.partial.safetensors", "pca.partial.safetensors"  # in its folder, during the fit
MANY_DEAD_CODES = 0.05  # of all; more is worth a warning
SUMMARY_KEYS = (
    "num_codes", "dim", "num_images", "num_points", "inertia", "usage", "entropy", "dead_codes", "pca", "quality",
)  # fmt: skip


@dataclass
class Codebook:
    """K centroids (K, P) float32, and how they came about (encoder, layer, preprocessing, k-means, usage, history)."""

    centroids: 'Float[Tensor, "K P"]'
    meta: dict[str, Any] = field(default_factory=dict)
    pca: PCA | None = None
    """What features pass before they are compared with the centroids."""

    def __post_init__(self) -> None:
        if self.centroids.ndim != 2 or not self.centroids.numel():
            raise DigitError(f"a codebook is (codes, features), got an array of shape {tuple(self.centroids.shape)}")
        self.centroids = self.centroids.detach().float().contiguous()
        if not torch.isfinite(self.centroids).all():
            raise DigitError("the codebook holds NaN or Inf: fit it again (digit codebook ...)")
        if self.pca is not None and self.pca.num != self.centroids.shape[1]:
            raise DigitError(f"centroids of {self.centroids.shape[1]} numbers, PCA of {self.pca.num}: fit both again")
        self._fingerprint: str | None = None
        self._restored: Tensor | None = None

    def __len__(self) -> int:
        return self.centroids.shape[0]

    @property
    def vocab_size(self) -> int:
        """Number K of codes."""
        return len(self)

    @property
    def device(self) -> torch.device:
        """Where the centroids are."""
        return self.centroids.device

    @property
    def dim(self) -> int:
        """Features D that it takes."""
        return self.centroids.shape[1] if self.pca is None else self.pca.dim

    @property
    def vectors(self) -> 'Float[Tensor, "K D"]':
        """What each code stands for, as features."""
        if self.pca is None:
            return self.centroids
        if self._restored is None:
            self._restored = self.pca.restore(self.centroids)
        return self._restored

    @property
    def num_levels(self) -> int:
        """Codes of one feature."""
        return 1

    @property
    def level_vectors(self) -> 'Float[Tensor, "1 K D"]':
        """`vectors`, of the one level."""
        return self.vectors[None]

    def tensors(self) -> dict[str, Tensor]:
        """What codebook.safetensors holds."""
        return {"centroids": self.centroids} | (self.pca.tensors() if self.pca else {})

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the centroids and the PCA, 64 hex digits; unchanged by save and load."""
        if self._fingerprint is None:
            self._fingerprint = sha256_tensors(self.tensors())
        return self._fingerprint

    @property
    def encoder_name(self) -> str:
        """The encoder it was fitted on, as far as known."""
        return str(self.meta.get("encoder", {}).get("name", "an encoder that is not recorded"))

    def to(self, device: str | torch.device) -> Self:
        """Move its tensors; returns self. Raises DigitError where the device does not exist."""
        device = choose_device(device)
        self.centroids = self.centroids.to(device)
        self.pca, self._restored = self.pca and self.pca.to(device), None
        return self

    def predict(self, features: "FeatureArray") -> 'Int64[Tensor, "..."]':
        """Nearest centroid, int64 in 0..K-1. Raises MismatchError where D differs."""
        return nearest(features if self.pca is None else self.pca.project(features), self.centroids)

    def __repr__(self) -> str:
        components = "" if self.pca is None else f" by {self.pca.num} components"
        return f"Codebook({len(self)} codes of {self.dim} features{components}, fitted on {self.encoder_name})"

    def embed(self, tokens: "Integers") -> 'Float[Tensor, "... D"]':
        """The centroid of each token in 0..K-1, as features, float32. Raises MismatchError for others."""
        tokens = as_integers("tokens", tokens)
        require_range("tokens", tokens, 0, len(self) - 1, "this codebook")
        return self.vectors[tokens.to(self.device)]

    def summary(self) -> dict[str, Any]:
        """The figures of the fit: points, inertia, usage, entropy in bits, dead codes; for reports."""
        known = {"num_codes": len(self), "dim": self.dim} | self.meta
        return {key: known[key] for key in SUMMARY_KEYS if key in known} | {"encoder": self.encoder_name}

    def save(self, folder: str | Path) -> None:
        """Write codebook.safetensors and, last, codebook.json into `folder`; a fit kept there is done with."""
        folder = as_path(folder)
        save_tensors(folder / "codebook.safetensors", self.tensors())
        about = {"format": FORMAT_WITH_PCA if self.pca else FORMAT, "quantizer": KIND, "fingerprint": self.fingerprint}
        write_json(folder / "codebook.json", about | self.meta)
        remove_unfinished(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote. Raises DigitError on unreadable files, MismatchError where they are of two fits."""
        folder = as_path(folder)
        meta = read_json(folder / "codebook.json")
        tensors = load_tensors(folder / "codebook.safetensors")
        known = (FORMAT, FORMAT_WITH_PCA)
        if not isinstance(meta, dict) or meta.get("format") not in known or "centroids" not in tensors:
            raise DigitError(
                f"{folder / 'codebook.json'} is not of a codebook of format {FORMAT} or {FORMAT_WITH_PCA}: {MAKE_AGAIN}"
            )
        if not isinstance(meta.get("encoder", {}), dict) or not tensors["centroids"].is_floating_point():
            raise DigitError(f"{folder / 'codebook.json'} is damaged (encoder or centroids): {MAKE_AGAIN}")
        about = {key: value for key, value in meta.items() if key not in ("format", "quantizer", "fingerprint")}
        codebook = cls(tensors["centroids"].clone(), about, PCA.from_tensors(tensors))
        if meta.get("fingerprint") != codebook.fingerprint:
            raise MismatchError(
                f"{folder / 'codebook.json'} says fingerprint {str(meta.get('fingerprint'))[:12]}, the centroids give "
                f"{codebook.fingerprint[:12]}: the files are of two fits; {MAKE_AGAIN}"
            )
        return codebook

    @classmethod
    def from_npy(cls, path: str | Path, meta: dict[str, Any] | None = None) -> Self:
        """Read centroids released as a (K, D) .npy (km_8k.npy); a file that needs pickle is refused."""
        try:
            centroids = np.load(as_path(path), allow_pickle=False)
        except FileNotFoundError as error:
            raise DigitError(f"no such file: {path}") from error
        except Exception as error:  # a damaged header raises nearly anything
            raise DigitError(f"{path} is no plain .npy ({error}): wanted floats of shape (codes, features)") from error
        if not isinstance(centroids, np.ndarray) or centroids.ndim != 2 or centroids.dtype.kind != "f":
            got = f"{centroids.dtype} {centroids.shape}" if isinstance(centroids, np.ndarray) else "an archive"
            raise DigitError(
                f"{path} holds {got}, wanted floats of shape (codes, features): give the centroids as .npy"
            )
        return cls(torch.from_numpy(centroids.astype(np.float32)), {"released_file": as_path(path).name} | (meta or {}))


def fit_kmeans(
    cfg: KMeansConfig,
    features: "Features",
    *,
    across_ranks: bool = False,
    folder: str | Path | None = None,
    request: dict[str, Any] | None = None,
) -> Codebook:
    """Fit k-means to features and return its codebook on the CPU, with the metrics of the fit in `meta`.

    Args:
        cfg: settings of the fit.
        features: a tensor (N, D), or a callable that `KMeans.fit` takes.
        across_ranks: every rank of the job calls this with its own share of the features.
        folder: where the state of an unfinished fit is kept; None keeps none.
        request: what else decides the result; an unfinished fit of another request is not continued.

    Raises DigitError for fewer points than codes, NaN or Inf; Stopped where a signal asked for it.
    """
    pca, seen, about = project_features(cfg, features, across_ranks=across_ranks, folder=folder, request=request)
    fit = fit_centroids(cfg, seen, UNFINISHED, across_ranks=across_ranks, folder=folder, request=request, pca=pca)
    return Codebook(fit.centroids_.cpu(), metrics_of(fit) | about, pca)


def remove_unfinished(folder: Path) -> None:
    """Remove what was kept of a fit until its result is saved."""
    for path in folder.glob("*.partial.safetensors"):
        path.unlink(missing_ok=True)


def project_features(
    cfg: KMeansConfig,
    features: "Features",
    *,
    across_ranks: bool,
    folder: str | Path | None,
    request: dict[str, Any] | None,
) -> "tuple[PCA | None, Features, dict[str, Any]]":
    """The PCA that the settings ask for, what it makes of the features, and an entry for codebook.json.

    Arguments as of `fit_kmeans`. Without one: None, the features themselves, and no entry.
    """
    if not cfg.pca:
        return None, features, {}
    asked = {"num": cfg.pca, "whiten": cfg.whiten}
    kept = None if folder is None else KeptTensors(as_path(folder) / UNFINISHED_PCA, (request or {}) | {"pca": asked})
    pca, explained = fit_pca(features, cfg.pca, whiten=cfg.whiten, across_ranks=across_ranks, kept=kept)
    return pca, pca.of(features), {"pca": asked | {"explained": explained}}


def fit_centroids(
    cfg: KMeansConfig,
    features: "Features",
    unfinished: str,
    *,
    across_ranks: bool,
    folder: str | Path | None,
    request: dict[str, Any] | None,
    pca: PCA | None,
) -> KMeans:
    """K-means of what a PCA made of the features; `unfinished` is the file of its state. Warns of dead codes."""
    request = (request or {}) | ({"pca": pca.fingerprint} if pca else {})
    state = None if folder is None else UnfinishedFit(as_path(folder) / unfinished, request)
    fit = KMeans(cfg).fit(features, across_ranks=across_ranks, unfinished=state)
    if not across_ranks or distributed.is_main():
        warn_of_dead_codes(fit.dead_codes_, cfg.num_clusters)
    return fit


def metrics_of(fit: KMeans) -> dict[str, Any]:
    """What codebook.json says of a fit: without the seconds, so that the same fit gives the same file."""
    return {
        "num_points": fit.num_points_,
        "streamed": fit.streamed_,
        "inertia": fit.inertia_,
        "usage": fit.usage_,
        "entropy": fit.entropy_,
        "dead_codes": fit.dead_codes_,
        "counts": fit.counts_.tolist(),
        "history": [{k: v for k, v in entry.items() if k != "seconds"} for entry in fit.history_],
    }


def warn_of_dead_codes(dead: int, num_codes: int) -> None:
    """Log a warning where many codes stand for no patch at all."""
    if dead > MANY_DEAD_CODES * num_codes:
        log.warning(
            "%d of %d codes (%.0f percent) stand for no patch: give more or more varied images (codebook_subset), or a "
            "smaller kmeans.num_clusters", dead, num_codes, 100 * dead / num_codes,
        )  # fmt: skip
