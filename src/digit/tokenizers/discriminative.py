"""Discriminative tokenizer (paper, section 3.2): a quantizer replaces each feature of a frozen encoder by a token.

Shapes: B images, N tokens an image (the encoder's grid in raster order), D features, K codes. Of a codebook with L
levels, an image has N L tokens: the L codes of the first cell of the grid, then those of the second, and so on.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from digit.data.loader import CropLoader, on_device
from digit.data.pictures import as_images
from digit.errors import DigitError, MismatchError
from digit.models.tokens import as_integers, by_cell, require_range
from digit.runtime import distributed
from digit.runtime.hardware import choose_device
from digit.tokenizers.base import Encoder, Quantizer, QuantizerConfig
from digit.tokenizers.quantizers import quantizer_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from digit.data.images import ImageSource
    from digit.data.pictures import Images
    from digit.data.preprocess import PreprocessConfig
    from digit.models.tokens import Integers


def choose_images(num_images: int, tokens_per_image: int, min_points: int, *, subset: float, seed: int) -> np.ndarray:
    """Sorted indices (int64) of a seeded random `subset` of the images; more where they give under `min_points`."""
    if not 0 < subset <= 1:
        raise DigitError(f"codebook subset is {subset}: it is a fraction of the images, above 0 and at most 1")
    enough = math.ceil(min_points / tokens_per_image)
    num = min(num_images, max(math.ceil(subset * num_images), enough))
    return np.sort(np.random.default_rng([seed, 3]).permutation(num_images)[:num])


def fit_codebook(
    source: "ImageSource",
    preprocess: "PreprocessConfig",
    encoder: Encoder,
    cfg: QuantizerConfig,
    *,
    subset: float = 0.1,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int | None = None,
    max_bad_fraction: float = 0.01,
    across_ranks: bool = False,
    folder: str | Path | None = None,
) -> Quantizer:
    """Fit a quantizer to the patch features of a random subset of the images, one crop each (section 4.1: 10%).

    Args:
        cfg: settings of the quantizer; their type says which one (tokenizers/quantizers.py).
        subset: fraction of the images; more are taken where they give fewer than `cfg.min_points` features.
        across_ranks: every rank of the job calls this, takes its share of the images, and gets the codebook of all.
        folder: where the codebook will be saved. The state of an unfinished fit is kept there: the next call computes
            the features again, goes on at the last finished iteration, and ends with the same codebook.

    Raises DigitError for fewer patches than codes and past `max_bad_fraction`; Stopped where a signal asked for it.
    """
    quantizer, tokens = quantizer_of(cfg), math.prod(encoder.grid)
    indices = choose_images(len(source), tokens, cfg.min_points, subset=subset, seed=seed)
    bad: list[tuple[str, str]] = []
    with distributed.alone(not across_ranks):
        mine = distributed.share(len(indices), batch_size)  # whole batches, so that one rank makes the same batches

    def features() -> Iterator[tuple[Tensor, np.ndarray]]:
        loader = CropLoader(
            source, preprocess, indices=indices, seed=seed, batch_size=batch_size, num_workers=num_workers,
            max_bad_fraction=max_bad_fraction, start_row=mine.start,
        )  # fmt: skip
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
        "preprocessing": preprocess.described(),
        quantizer.name: asdict(cfg),
        "source": {"name": source.name, "fingerprint": source.fingerprint},
        "subset": subset,
        "seed": seed,
    }
    request = about | {"source": {"fingerprint": source.fingerprint}, quantizer.name: None}  # the fit adds its settings
    codebook = quantizer.fit(cfg, features, across_ranks=across_ranks, folder=folder, request=request)
    with distributed.alone(not across_ranks):
        bad = [entry for part in distributed.gather(bad) for entry in part]
    if len(bad) > max_bad_fraction * len(indices):
        raise DigitError(
            f"{len(bad)} of {len(indices)} images unreadable, more than max_bad_fraction {max_bad_fraction:g}: "
            f"see digit inspect; the first: {bad[0][0]} ({bad[0][1]})"
        )
    codebook.meta = (
        about | {"num_images": len(indices) - len(bad), "bad": [list(entry) for entry in bad]} | codebook.meta
    )
    return codebook


class DiscriminativeTokenizer:
    """A frozen encoder and a quantizer of its features; an ImageTokenizer.

    Raises MismatchError where the codebook was fitted on another encoder.
    """

    def __init__(self, encoder: Encoder, codebook: Quantizer):
        described, fitted = encoder.describe(), codebook.meta.get("encoder", {})
        if codebook.dim != encoder.dim:
            raise MismatchError(
                f"codebook has {codebook.dim} features, encoder gives {encoder.dim}: "
                f"it was fitted on {fitted.get('name', 'an encoder that is not recorded')}; choose that encoder "
                "or refit (digit codebook ...)"
            )
        this = described | {"fingerprint": encoder.fingerprint}
        if fitted.get("fingerprint") not in (None, encoder.fingerprint):
            raise MismatchError(
                f"codebook was fitted on {_encoder_text(fitted)}, this encoder is {_encoder_text(this)}: "
                "choose that encoder or refit (digit codebook ...)"
            )
        self.encoder, self.codebook = encoder, codebook

    def __repr__(self) -> str:
        name, (rows, columns) = self.encoder.describe().get("name", type(self.encoder).__name__), self.grid
        levels = f" on {self.num_levels} levels" if self.num_levels > 1 else ""
        return f"DiscriminativeTokenizer({name}, {rows} x {columns} tokens of {self.vocab_size} codes{levels})"

    @property
    def device(self) -> torch.device:
        """Where the encoder computes."""
        return getattr(self.encoder, "device", torch.device("cpu"))

    @property
    def vocab_size(self) -> int:
        """Number K of codes."""
        return self.codebook.vocab_size

    @property
    def num_levels(self) -> int:
        """Tokens L of each cell of the grid."""
        return self.codebook.num_levels

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens, in raster order; of several levels, of the cells."""
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
        """Move encoder and codebook; returns self. Raises DigitError where the device does not exist."""
        device = choose_device(device)
        if isinstance(self.encoder, torch.nn.Module):
            self.encoder.to(device)
        self.codebook.to(device)
        return self

    def features(self, images: "Images") -> 'Float[Tensor, "B N D"]':
        """The encoder's features before quantisation, float32."""
        return self.encoder.features(as_images(images))

    @torch.no_grad()
    def encode(self, images: "Images") -> 'Int64[Tensor, "B N"]':
        """Square RGB crops (B, 3, S, S) uint8 -> tokens in 0..K-1, on the encoder's device.

        Takes what else `digit.data.pictures.as_images` takes: Pillow pictures, arrays, floats in 0..1, which are
        rounded to uint8. Raises DigitError for anything else.
        """
        return self.quantize(self.features(images))  # (B, N)

    def quantize(self, features: Tensor) -> Tensor:
        """The tokens of features (B, N, D): (B, N), of several levels (B, N L)."""
        codes = self.codebook.predict(features)
        return codes if self.num_levels == 1 else codes.flatten(1)

    @torch.no_grad()
    def encode_features(self, images: "Images") -> 'tuple[Int64[Tensor, "B N"], Float[Tensor, "B N D"]]':
        """Tokens and the features that they stand for, from one pass of the encoder."""
        features = self.features(images)
        return self.quantize(features), features

    def embed(self, tokens: "Integers") -> 'Float[Tensor, "B N D"]':
        """The vector of each token, float32; of several levels, of each cell (B, N L) -> (B, N, D).

        Raises MismatchError for tokens outside 0..K-1, and for numbers of them that are no multiple of L.
        """
        tokens = as_integers("tokens", tokens)
        require_range("tokens", tokens, 0, self.vocab_size - 1, "this codebook")
        if (levels := self.num_levels) > 1:
            tokens = by_cell(tokens, levels)
        return self.codebook.embed(tokens)  # (B, N, D)


def _encoder_text(described: dict[str, Any]) -> str:
    layer = "" if described.get("layer") is None else f" layer {described['layer']}"
    return f"{described.get('name', 'unnamed')}{layer} (fingerprint {str(described.get('fingerprint'))[:12]})"
