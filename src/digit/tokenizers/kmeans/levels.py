"""Residual and product K-means: L codes of one feature, as the sum of L vectors (Jegou et al. 2011; Lee et al. 2022).

    residual    k_l = nearest of level l's centroids to x - sum_{j<l} c_j[k_j]
    product     k_l = nearest of level l's centroids to part l of x; c_l is 0 outside its part
    both        q(x) = sum_l c_l[k_l]

The levels are fitted one after another, each by K-means in all its forms: in memory or streamed, on several ranks, kept
on the disk and continued where it was cut short. A finished level is kept until the whole codebook is saved.

Shapes: L levels, K codes of each, D features, P principal components where there is a PCA, else D.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from digit.errors import DigitError, MismatchError
from digit.models.tokens import as_integers, require_range
from digit.runtime import distributed
from digit.runtime.files import MAKE_AGAIN, as_path, load_tensors, read_json, save_tensors, sha256_tensors, write_json
from digit.runtime.hardware import choose_device
from digit.tokenizers.kept import KeptTensors
from digit.tokenizers.kmeans.codebook import fit_centroids, metrics_of, project_features, remove_unfinished
from digit.tokenizers.kmeans.config import KMeansConfig, ProductKMeansConfig, ResidualKMeansConfig
from digit.tokenizers.kmeans.nearest import FeatureArray, as_features, nearest
from digit.tokenizers.pca import PCA, mapped

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from digit.models.tokens import Integers
    from digit.tokenizers.kmeans.points import Features

FORMAT = 1
RESIDUAL, PRODUCT = "residual_kmeans", "product_kmeans"  # of tokenizers.quantizers.QUANTIZERS
SUMMARY_KEYS = ("num_codes", "num_levels", "dim", "num_images", "num_points", "usage", "entropy", "dead_codes", "pca")


@dataclass
class LevelCodebook:
    """Centroids (L, K, P) float32 of all levels, and how they came about; a Quantizer."""

    kind: Literal["residual_kmeans", "product_kmeans"]
    centroids: 'Float[Tensor, "L K P"]'
    meta: dict[str, Any] = field(default_factory=dict)
    pca: PCA | None = None
    """What features pass first."""

    def __post_init__(self) -> None:
        if self.centroids.ndim != 3 or not self.centroids.numel():
            raise DigitError(f"a codebook of levels is (levels, codes, features), got {tuple(self.centroids.shape)}")
        self.centroids = self.centroids.detach().float().contiguous()
        if not torch.isfinite(self.centroids).all():
            raise DigitError("the codebook holds NaN or Inf: fit it again (digit codebook ...)")
        if self.pca is not None and self.pca.num != self.centroids.shape[2]:
            raise DigitError(f"centroids of {self.centroids.shape[2]} numbers, PCA of {self.pca.num}: fit both again")
        if self.kind == PRODUCT and self.num_levels > self.centroids.shape[2]:
            raise DigitError(f"{self.num_levels} parts of {self.centroids.shape[2]} numbers: set num_levels lower")
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        about = f"{self.num_levels} levels of {self.vocab_size} codes, {self.dim} features"
        return f"LevelCodebook({self.kind}, {about}, fitted on {self.encoder_name})"

    @property
    def vocab_size(self) -> int:
        """Number K of codes of each level."""
        return self.centroids.shape[1]

    @property
    def num_levels(self) -> int:
        """Number L of levels: codes of one feature."""
        return self.centroids.shape[0]

    @property
    def dim(self) -> int:
        """Features D that it takes."""
        return self.centroids.shape[2] if self.pca is None else self.pca.dim

    @property
    def device(self) -> torch.device:
        """Where the centroids are."""
        return self.centroids.device

    @property
    def encoder_name(self) -> str:
        """The encoder it was fitted on, as far as known."""
        return str(self.meta.get("encoder", {}).get("name", "an encoder that is not recorded"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the kind, the centroids and the PCA, 64 hex digits; unchanged by save and load."""
        if self._fingerprint is None:
            self._fingerprint = sha256_tensors(self.tensors() | {self.kind: torch.empty(0)})
        return self._fingerprint

    @property
    def level_vectors(self) -> 'Float[Tensor, "L K D"]':
        """What each code adds to a feature; without the mean that a PCA takes away."""
        return self.centroids if self.pca is None else self.pca.directions(self.centroids)

    def tensors(self) -> dict[str, Tensor]:
        """What codebook.safetensors holds."""
        return {"centroids": self.centroids} | (self.pca.tensors() if self.pca else {})

    def to(self, device: str | torch.device) -> Self:
        """Move its tensors; returns self. Raises DigitError where the device does not exist."""
        device = choose_device(device)
        self.centroids = self.centroids.to(device)
        self.pca = self.pca and self.pca.to(device)
        return self

    def predict(self, features: FeatureArray) -> 'Int64[Tensor, "... L"]':
        """The codes of each feature, (..., D) to (..., L) int64 in 0..K-1.

        Raises MismatchError for another D, DigitError for NaN or Inf.
        """
        features = as_features(features)
        seen = features.float() if self.pca is None else self.pca.project(features)
        codes = []
        for level in range(self.num_levels):
            centroids, columns = self.centroids[level].to(seen.device), self.columns(level)
            codes.append(nearest(seen[..., columns], centroids[:, columns]))
            seen = seen - centroids[codes[-1]] if self.kind == RESIDUAL else seen
        return torch.stack(codes, -1)

    def columns(self, level: int) -> slice:
        """The numbers of a feature that a level looks at: all, or its part."""
        return columns_of(self.kind, level, self.num_levels, self.centroids.shape[2])

    def embed(self, tokens: "Integers") -> 'Float[Tensor, "... D"]':
        """The sum of the vectors of each feature's codes, (..., L) in 0..K-1 to (..., D) float32.

        Raises MismatchError for others.
        """
        tokens = as_integers("tokens", tokens)
        if not tokens.ndim or tokens.shape[-1] != self.num_levels:
            shape = tuple(tokens.shape)
            raise MismatchError(f"tokens have shape {shape}, this codebook takes (..., {self.num_levels})")
        require_range("tokens", tokens, 0, self.vocab_size - 1, "this codebook")
        tokens = tokens.to(self.device)
        total = torch.stack([self.centroids[level][tokens[..., level]] for level in range(self.num_levels)]).sum(0)
        return total if self.pca is None else self.pca.restore(total)

    def summary(self) -> dict[str, Any]:
        """The figures of the fit for reports: usage over all levels, entropy in bits of a feature's codes together."""
        known = {"num_codes": self.vocab_size, "num_levels": self.num_levels, "dim": self.dim} | self.meta
        known = {key: known[key] for key in (*SUMMARY_KEYS, "quality") if key in known}
        return known | {"encoder": self.encoder_name}

    def save(self, folder: str | Path) -> None:
        """Write codebook.safetensors and, last, codebook.json into `folder`; a fit kept there is done with."""
        folder = as_path(folder)
        save_tensors(folder / "codebook.safetensors", self.tensors())
        about = {"format": FORMAT, "quantizer": self.kind, "fingerprint": self.fingerprint}
        write_json(folder / "codebook.json", about | self.meta)
        remove_unfinished(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote. Raises DigitError on unreadable files, MismatchError where they are of two fits."""
        folder = as_path(folder)
        meta, tensors = read_json(folder / "codebook.json"), load_tensors(folder / "codebook.safetensors")
        valid = isinstance(meta, dict) and meta.get("format") == FORMAT and isinstance(meta.get("encoder", {}), dict)
        if not valid or meta.get("quantizer") not in (RESIDUAL, PRODUCT) or "centroids" not in tensors:
            raise DigitError(f"{folder / 'codebook.json'} is of no codebook of levels of format {FORMAT}: {MAKE_AGAIN}")
        if not tensors["centroids"].is_floating_point():
            raise DigitError(f"{folder / 'codebook.safetensors'} is damaged (centroids): {MAKE_AGAIN}")
        about = {key: value for key, value in meta.items() if key not in ("format", "quantizer", "fingerprint")}
        codebook = cls(meta["quantizer"], tensors["centroids"].clone(), about, PCA.from_tensors(tensors))
        if meta.get("fingerprint") != codebook.fingerprint:
            raise MismatchError(
                f"{folder / 'codebook.json'} says fingerprint {str(meta.get('fingerprint'))[:12]}, the centroids give "
                f"{codebook.fingerprint[:12]}: the files are of two fits; {MAKE_AGAIN}"
            )
        return codebook


def columns_of(kind: str, level: int, num_levels: int, num: int) -> slice:
    """The part of `num` numbers that a level of a product codebook looks at, as even as they divide; else all."""
    if kind == RESIDUAL:
        return slice(0, num)
    return slice(level * num // num_levels, (level + 1) * num // num_levels)


def fit_residual_kmeans(cfg: ResidualKMeansConfig, features: "Features", **options: Any) -> LevelCodebook:
    """Fit residual K-means; arguments and errors as of `kmeans.codebook.fit_kmeans`."""
    return fit_levels(RESIDUAL, cfg, features, **options)


def fit_product_kmeans(cfg: ProductKMeansConfig, features: "Features", **options: Any) -> LevelCodebook:
    """Fit product K-means; arguments and errors as of `kmeans.codebook.fit_kmeans`."""
    return fit_levels(PRODUCT, cfg, features, **options)


def fit_levels(
    kind: Literal["residual_kmeans", "product_kmeans"],
    cfg: KMeansConfig,
    features: "Features",
    *,
    across_ranks: bool = False,
    folder: str | Path | None = None,
    request: dict[str, Any] | None = None,
) -> LevelCodebook:
    """The levels one after another, each in as many passes over the features as K-means takes."""
    with distributed.alone(not across_ranks):
        return _fit_levels(kind, cfg, features, folder, request)


def _fit_levels(
    kind: Literal["residual_kmeans", "product_kmeans"],
    cfg: KMeansConfig,
    features: "Features",
    folder: str | Path | None,
    request: dict[str, Any] | None,
) -> LevelCodebook:
    """`fit_levels` on the ranks that take part."""
    shared: dict[str, Any] = {"across_ranks": distributed.world_size() > 1, "folder": folder}
    pca, seen, about = project_features(cfg, features, request=request, **shared)
    single = KMeansConfig(**{f.name: getattr(cfg, f.name) for f in fields(KMeansConfig)} | {"pca": 0, "whiten": False})
    centroids: list[Tensor] = []  # (K, P) of each finished level
    levels: list[dict[str, Any]] = []
    for level in range(cfg.num_levels):
        # which the levels before it decide too, and the number of levels alone in a product
        asked = (request or {}) | {kind: asdict(cfg) | {"device": None}, "level": level}
        asked |= {"before": sha256_tensors(dict(zip(map(str, range(level)), centroids, strict=True)))}
        kept = None if folder is None else KeptTensors(as_path(folder) / f"level{level}.partial.safetensors", asked)
        found = kept and kept.load()
        if not found:
            rest = mapped(seen, remainder(kind, tuple(centroids), cfg.num_levels))
            fit = fit_centroids(single, rest, f"kmeans{level}.partial.safetensors", request=asked, pca=pca, **shared)
            found = {"centroids": fit.centroids_.cpu()}, metrics_of(fit)
            if kept:
                kept.save(*found)
        levels.append(found[1])
        centroids.append(found[0]["centroids"])
    dim = centroids[0].shape[1] if kind == RESIDUAL else sum(part.shape[1] for part in centroids)
    table = torch.zeros(cfg.num_levels, cfg.num_clusters, dim)
    for level, part in enumerate(centroids):
        table[level][:, columns_of(kind, level, cfg.num_levels, dim)] = part
    return LevelCodebook(kind, table, levels_about(levels) | about, pca)


def remainder(kind: str, centroids: Sequence[Tensor], num_levels: int) -> Callable[[Tensor], Tensor]:
    """(n, P) features to what the level after these finished ones clusters: the residual, or its part."""

    def rest(rows: Tensor) -> Tensor:
        if kind == PRODUCT:
            if rows.ndim == 2 and num_levels > rows.shape[1]:
                raise DigitError(f"num_levels is {num_levels}, features are {rows.shape[1]} numbers: set it lower")
            return rows[..., columns_of(kind, len(centroids), num_levels, rows.shape[-1])]
        rows = rows.float()
        for level in centroids:
            level = level.to(rows.device)
            rows = rows - level[nearest(rows, level)]
        return rows

    return rest


def levels_about(levels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What codebook.json says of the levels: of all together, and of each."""
    return {
        "num_points": levels[0]["num_points"],
        "usage": sum(level["usage"] for level in levels) / len(levels),
        "entropy": sum(level["entropy"] for level in levels),
        "dead_codes": sum(level["dead_codes"] for level in levels),
        "levels": list(levels),
    }
