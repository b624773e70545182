"""Discriminative tokenizer (section 3.2): features of a frozen encoder, each replaced by its nearest k-means centroid.

Legend: B images, N tokens an image (the encoder's grid in raster order), D features, K codes.
"""

import hashlib
import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from digit.data.loader import CropLoader, on_device
from digit.errors import DigitError, MismatchError
from digit.runtime.files import load_tensors, read_json, save_tensors, sha256_tensors, write_json
from digit.tokenizers.kmeans.config import KMeansConfig
from digit.tokenizers.kmeans.kmeans import KMeans
from digit.tokenizers.kmeans.nearest import nearest
from digit.tokenizers.kmeans.shares import Shares
from digit.tokenizers.kmeans.unfinished import UnfinishedFit

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, UInt8

    from digit.data.images import ImageSource
    from digit.data.preprocess import PreprocessConfig

log = logging.getLogger(__name__)
FORMAT = 1
UNFINISHED = "kmeans.partial.safetensors"  # in a codebook's folder, while it is fitted
MANY_DEAD_CODES = 0.05  # of all; more is worth a warning
MIN_POINTS_PER_CODE = 8  # below this a centroid is the mean of a handful of patches; the subset grows to avoid it
SUMMARY_KEYS = ("num_codes", "dim", "num_images", "num_points", "inertia", "usage", "entropy", "dead_codes")


class Encoder(Protocol):
    """What of a frozen encoder is needed here; see digit.tokenizers.encoders.FrozenEncoder."""

    dim: int
    grid: tuple[int, int]
    fingerprint: str

    def features(self, images: Tensor) -> Tensor: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass
class Codebook:
    """K centroids (K, D) float32, and how they came about (encoder, layer, preprocessing, k-means, usage, history)."""

    centroids: 'Float[Tensor, "codes dim"]'
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.centroids.ndim != 2 or not self.centroids.numel():
            raise DigitError(f"a codebook is (codes, features), got an array of shape {tuple(self.centroids.shape)}")
        self.centroids = self.centroids.detach().float().contiguous()
        if not torch.isfinite(self.centroids).all():
            raise DigitError("the codebook holds NaN or Inf: fit it again (digit codebook ...)")
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return self.centroids.shape[0]

    @property
    def dim(self) -> int:
        """Features D of a centroid."""
        return self.centroids.shape[1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the centroids, 64 hex digits; unchanged by save and load."""
        if self._fingerprint is None:
            self._fingerprint = sha256_tensors({"centroids": self.centroids})
        return self._fingerprint

    @property
    def encoder_name(self) -> str:
        """The encoder it was fitted on, as far as known."""
        return str(self.meta.get("encoder", {}).get("name", "an encoder that is not recorded"))

    def to(self, device: str | torch.device) -> Self:
        """Move the centroids; returns self."""
        self.centroids = self.centroids.to(device)
        return self

    def predict(self, features: 'Float[Tensor, "... dim"]') -> 'Int64[Tensor, "..."]':
        """Nearest centroid, int64 in 0..K-1. Raises MismatchError where D differs."""
        return nearest(features, self.centroids)

    def summary(self) -> dict[str, Any]:
        """The figures of the fit: points, inertia, usage, entropy in bits, dead codes; for reports."""
        known = {"num_codes": len(self), "dim": self.dim} | self.meta
        return {key: known[key] for key in SUMMARY_KEYS if key in known} | {"encoder": self.encoder_name}

    def save(self, folder: str | Path) -> None:
        """Write codebook.safetensors and, last, codebook.json into `folder`; a fit kept there is done with."""
        folder = Path(folder)
        save_tensors(folder / "codebook.safetensors", {"centroids": self.centroids})
        write_json(folder / "codebook.json", {"format": FORMAT, "fingerprint": self.fingerprint} | self.meta)
        (folder / UNFINISHED).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote. Raises DigitError on unreadable files, MismatchError where they are of two fits."""
        folder = Path(folder)
        meta = read_json(folder / "codebook.json")
        tensors = load_tensors(folder / "codebook.safetensors")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT or "centroids" not in tensors:
            raise DigitError(f"{folder} holds no codebook of format {FORMAT}: make it again (digit codebook ...)")
        if not isinstance(meta.get("encoder", {}), dict) or not tensors["centroids"].is_floating_point():
            raise DigitError(f"{folder} is damaged (encoder or centroids): make it again (digit codebook ...)")
        about = {key: value for key, value in meta.items() if key not in ("format", "fingerprint")}
        codebook = cls(tensors["centroids"].clone(), about)
        if meta.get("fingerprint") != codebook.fingerprint:
            raise MismatchError(
                f"{folder}: codebook.json says fingerprint {str(meta.get('fingerprint'))[:12]}, the centroids give "
                f"{codebook.fingerprint[:12]}: the files are of two fits; make the folder again (digit codebook ...)"
            )
        return codebook

    @classmethod
    def from_npy(cls, path: str | Path, meta: dict[str, Any] | None = None) -> Self:
        """Read centroids released as a (K, D) .npy (km_8k.npy); a file that needs pickle is refused."""
        try:
            centroids = np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            raise DigitError(f"no such file: {path}") from error
        except Exception as error:  # a damaged header raises nearly anything
            raise DigitError(f"{path} is no plain .npy ({error}): wanted floats of shape (codes, features)") from error
        if not isinstance(centroids, np.ndarray) or centroids.ndim != 2 or centroids.dtype.kind != "f":
            got = f"{centroids.dtype} {centroids.shape}" if isinstance(centroids, np.ndarray) else "an archive"
            raise DigitError(f"{path} holds {got}, wanted floats of shape (codes, features)")
        return cls(torch.from_numpy(centroids.astype(np.float32)), {"released_file": Path(path).name} | (meta or {}))


def choose_images(num_images: int, tokens_per_image: int, num_clusters: int, *, subset: float, seed: int) -> np.ndarray:
    """Sorted indices (int64) of a seeded random `subset` of the images; more where that gives under 8 points a code."""
    if not 0 < subset <= 1:
        raise DigitError(f"codebook subset is {subset}: it is a fraction of the images, above 0 and at most 1")
    enough = math.ceil(MIN_POINTS_PER_CODE * num_clusters / tokens_per_image)
    num = min(num_images, max(math.ceil(subset * num_images), enough))
    return np.sort(np.random.default_rng([seed, 3]).permutation(num_images)[:num])


def fit_codebook(
    source: "ImageSource",
    preprocess: "PreprocessConfig",
    encoder: Encoder,
    kmeans_cfg: KMeansConfig,
    *,
    subset: float = 0.1,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int | None = None,
    max_bad_fraction: float = 0.01,
    across_ranks: bool = False,
    folder: str | Path | None = None,
) -> Codebook:
    """K-means on the patch features of a random subset of the images, one crop each (section 4.1: 10% of ImageNet).

    The subset grows beyond `subset` where it would give fewer than 8 points a code. Features that exceed
    `kmeans_cfg.memory_budget_bytes` are computed anew in every iteration, which costs time, not memory.
    across_ranks: every rank of the job calls this alike, takes its share of the images, and gets the codebook of all of
    them; the budget is each one's own.
    folder: where the codebook will be saved. The state of k-means is kept there meanwhile, so that a fit which is cut
    short computes the features again but goes on at its last iteration, to the same codebook.
    Raises DigitError for fewer patches than codes and past `max_bad_fraction`; Stopped where a signal asked for it.
    """
    tokens = math.prod(encoder.grid)
    indices = choose_images(len(source), tokens, kmeans_cfg.num_clusters, subset=subset, seed=seed)
    shares, bad = Shares(across_ranks), []
    mine = shares.part(len(indices), batch_size)  # whole batches, so that they are those of one rank

    def features() -> Iterator[tuple[Tensor, np.ndarray]]:
        loader = CropLoader(
            source, preprocess, indices=indices, seed=seed, batch_size=batch_size, num_workers=num_workers,
            max_bad_fraction=max_bad_fraction, start_row=mine.start,
        )  # fmt: skip
        with loader.sharing_cores():
            batches = itertools.islice(loader, -(-len(mine) // batch_size))
            rows = itertools.count(mine.start, batch_size)
            for row, batch in zip(rows, on_device(batches, getattr(encoder, "device", "cpu")), strict=False):
                images = batch.images if batch.ok.all() else batch.images[batch.ok]
                if len(images):
                    numbers = (row + np.flatnonzero(batch.ok.numpy()))[:, None] * tokens + np.arange(tokens)  # (b, N)
                    yield encoder.features(images).flatten(0, 1), numbers.ravel()  # (b N, D), (b N,)
        bad[:] = loader.bad

    about = {
        "encoder": encoder.describe() | {"fingerprint": encoder.fingerprint},
        "layer": encoder.describe().get("layer"),
        "preprocessing": asdict(preprocess),
        "kmeans": asdict(kmeans_cfg),
        "source": {"name": source.name, "fingerprint": source.fingerprint},
        "subset": subset,
        "seed": seed,
    }
    unfinished = None if folder is None else UnfinishedFit(Path(folder) / UNFINISHED, _request(about))
    kmeans = KMeans(kmeans_cfg).fit(features, across_ranks=across_ranks, unfinished=unfinished)
    bad = shares.join(bad)
    if len(bad) > max_bad_fraction * len(indices):
        raise DigitError(
            f"{len(bad)} of {len(indices)} images unreadable, more than max_bad_fraction {max_bad_fraction:g}: "
            f"see digit inspect; the first: {bad[0][0]} ({bad[0][1]})"
        )
    if shares.rank == 0:
        warn_of_dead_codes(kmeans.dead_codes_, kmeans_cfg.num_clusters)
    return Codebook(
        kmeans.centroids_.cpu(),
        about | {
            "num_images": len(indices) - len(bad),
            "bad": [list(entry) for entry in bad],
            "num_points": kmeans.num_points_,
            "streamed": kmeans.streamed_,
            "inertia": kmeans.inertia_,
            "usage": kmeans.usage_,
            "entropy": kmeans.entropy_,
            "dead_codes": kmeans.dead_codes_,
            "counts": kmeans.counts_.tolist(),
            # less the seconds: the same fit gives the same file
            "history": [{k: v for k, v in entry.items() if k != "seconds"} for entry in kmeans.history_],
        },
    )  # fmt: skip


def _request(about: dict[str, Any]) -> dict[str, Any]:
    """What decides a fit, of what is recorded about it."""
    free = {"source": {"fingerprint": about["source"]["fingerprint"]}, "kmeans": None}  # KMeans adds its own settings
    return about | free


def warn_of_dead_codes(dead: int, num_codes: int) -> None:
    """Log a warning where many codes stand for no patch at all."""
    if dead > MANY_DEAD_CODES * num_codes:
        log.warning(
            "%d of %d codes (%.0f percent) stand for no patch: give more or more varied images (codebook_subset), or a "
            "smaller kmeans.num_clusters", dead, num_codes, 100 * dead / num_codes,
        )  # fmt: skip


class DiscriminativeTokenizer:
    """Images to indices of the nearest centroids; an ImageTokenizer.

    Raises MismatchError where codebook and encoder do not belong together.
    """

    def __init__(self, encoder: Encoder, codebook: Codebook):
        described = encoder.describe()
        if codebook.dim != encoder.dim:
            raise MismatchError(
                f"codebook has {codebook.dim} features, encoder gives {encoder.dim}: "
                f"it was fitted on {codebook.encoder_name}; choose that encoder or refit (digit codebook ...)"
            )
        fitted, this = codebook.meta.get("encoder", {}), described | {"fingerprint": encoder.fingerprint}
        if fitted.get("fingerprint") not in (None, encoder.fingerprint):
            raise MismatchError(
                f"codebook was fitted on {_encoder_text(fitted)}, this encoder is {_encoder_text(this)}: "
                "choose that encoder or refit (digit codebook ...)"
            )
        self.encoder, self.codebook = encoder, codebook

    @property
    def device(self) -> torch.device:
        """Where the encoder computes."""
        return getattr(self.encoder, "device", torch.device("cpu"))

    @property
    def vocab_size(self) -> int:
        """Number K of codes."""
        return len(self.codebook)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens, in raster order."""
        rows, columns = self.encoder.grid
        return rows, columns

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the encoder's and the codebook's fingerprints, 64 hex digits."""
        return hashlib.sha256(f"{self.encoder.fingerprint}|{self.codebook.fingerprint}".encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """For the token store's manifest: encoder, its hash, layer, codebook hash and the whole tokenizer's hash."""
        encoder = self.encoder.describe()
        return {
            "encoder": encoder,
            "encoder_hash": self.encoder.fingerprint,
            "layer": encoder.get("layer"),
            "codebook_hash": self.codebook.fingerprint,
            "tokenizer_hash": self.fingerprint,
        }

    def to(self, device: str | torch.device) -> Self:
        """Move encoder and codebook; returns self."""
        if isinstance(self.encoder, torch.nn.Module):
            self.encoder.to(device)
        self.codebook.to(device)
        return self

    def features(self, images: 'UInt8[Tensor, "batch 3 height width"]') -> 'Float[Tensor, "batch tokens dim"]':
        """The encoder's features before quantisation, float32."""
        return self.encoder.features(images)

    @torch.no_grad()
    def encode(self, images: 'UInt8[Tensor, "batch 3 height width"]') -> 'Int64[Tensor, "batch tokens"]':
        """uint8 RGB crops in 0..255 -> tokens in 0..K-1, on the encoder's device."""
        return self.codebook.predict(self.features(images))  # (B, N)

    @torch.no_grad()
    def encode_features(
        self, images: 'UInt8[Tensor, "batch 3 height width"]'
    ) -> 'tuple[Int64[Tensor, "batch tokens"], Float[Tensor, "batch tokens dim"]]':
        """Tokens and the features that they stand for, from one pass of the encoder."""
        features = self.features(images)
        return self.codebook.predict(features), features

    def embed(self, tokens: 'Int64[Tensor, "batch tokens"]') -> 'Float[Tensor, "batch tokens dim"]':
        """The centroid of each token. Raises DigitError for tokens outside 0..K-1."""
        low, high = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
        if low < 0 or high >= len(self.codebook):
            raise DigitError(
                f"tokens run from {low} to {high}, this codebook knows 0 to {len(self.codebook) - 1}: "
                "they are of another codebook"
            )
        return self.codebook.centroids[tokens.to(self.codebook.centroids.device)]  # (B, N, D)


def _encoder_text(described: dict[str, Any]) -> str:
    layer = "" if described.get("layer") is None else f" layer {described['layer']}"
    return f"{described.get('name', 'unnamed')}{layer} (fingerprint {str(described.get('fingerprint'))[:12]})"
