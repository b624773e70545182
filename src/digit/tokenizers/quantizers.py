"""Every quantizer by name: its settings, its fit, and what reads its folder. A new one is an entry here.

The recipe holds the settings of each under its name here, and `recipe.quantizer` chooses (runs/recipe.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digit.errors import DigitError
from digit.runtime.files import as_path, read_json
from digit.tokenizers.base import Quantizer, QuantizerConfig
from digit.tokenizers.kmeans.codebook import Codebook, fit_kmeans
from digit.tokenizers.kmeans.config import KMeansConfig, ProductKMeansConfig, ResidualKMeansConfig
from digit.tokenizers.kmeans.levels import (
    PRODUCT,
    RESIDUAL,
    LevelCodebook,
    fit_product_kmeans,
    fit_residual_kmeans,
)


@dataclass(frozen=True, kw_only=True)
class QuantizerKind:
    """What makes and reads one kind of quantizer."""

    name: str
    """Its key in QUANTIZERS, in codebook.json and in the recipe."""
    config: type
    """Class of its settings."""
    fit: Callable[..., Quantizer]
    """(cfg, features, *, across_ranks, folder, request) to a quantizer on the CPU, as `kmeans.codebook.fit_kmeans`."""
    load: Callable[[Path], Quantizer]
    """The quantizer that `save` wrote to a folder."""


QUANTIZERS = {
    kind.name: kind
    for kind in (
        QuantizerKind(name="kmeans", config=KMeansConfig, fit=fit_kmeans, load=Codebook.load),
        QuantizerKind(name=RESIDUAL, config=ResidualKMeansConfig, fit=fit_residual_kmeans, load=LevelCodebook.load),
        QuantizerKind(name=PRODUCT, config=ProductKMeansConfig, fit=fit_product_kmeans, load=LevelCodebook.load),
    )
}


def quantizer_of(cfg: QuantizerConfig) -> QuantizerKind:
    """The kind of quantizer that these settings are of."""
    kinds = {kind.config: kind for kind in QUANTIZERS.values()}
    return next(kinds[base] for base in type(cfg).__mro__ if base in kinds)  # one config may extend another


def load_quantizer(folder: str | Path) -> Quantizer:
    """Read a codebook folder, whatever quantizer wrote it. Raises DigitError on unreadable files and unknown names."""
    about = read_json(as_path(folder) / "codebook.json")
    name: Any = about.get("quantizer", "kmeans") if isinstance(about, dict) else "kmeans"
    if not isinstance(name, str) or name not in QUANTIZERS:
        raise DigitError(
            f"{folder} holds a quantizer {name!r}, this version knows {', '.join(QUANTIZERS)}: update digit"
        )
    return QUANTIZERS[name].load(as_path(folder))
