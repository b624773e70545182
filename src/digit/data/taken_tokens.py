"""VQ tokens that one token store takes from another, of the same crops and the same VQGAN.

A second codebook changes the discriminative tokens alone: the VQ tokens are linked, not made and stored once more.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from digit.data.rows import COPY_ROWS, link_or_copy, write_rows
from digit.data.tokens import TokenStore
from digit.runtime.request import require_same_request

if TYPE_CHECKING:
    from digit.data.source import ImageSource


class TakenTokens:
    """The VQ tokens of a finished store, of the same crops and the same VQGAN as the store that is written.

    Raises MismatchError for a store of other crops or of another VQGAN.
    """

    def __init__(self, store: TokenStore, request: dict[str, Any]) -> None:
        self.store = store
        _require_same_vq(store, request)

    @property
    def checksums(self) -> dict[str, int]:
        """CRC-32 of the files of VQ tokens, by name without .npy."""
        sums = self.store.manifest.get("crc32") or {}
        return {stem: value for stem, value in sums.items() if stem.partition("-")[0] == "vq"}

    def unreadable(self, source: "ImageSource", indices: Sequence[int] | np.ndarray | None) -> dict[str, Any]:
        """{index: [first row, key, reason]} of the images that this store left out."""
        reasons, crops = dict(self.store.manifest["bad"]), self.store.crops_per_image
        if not reasons:
            return {}
        images = range(len(source)) if indices is None else indices
        keys = ((place * crops, int(index), source.key(int(index))) for place, index in enumerate(images))
        return {str(index): [row, key, reasons[key]] for row, index, key in keys if key in reasons}

    def copy(self, final: Path, rows: np.ndarray) -> None:
        """Writes the VQ tokens of `rows`, (R,) int64 numbers of this store's rows, to a .npy; links an equal file."""
        shards = self.store.manifest.get("shards") or [len(self.store)]
        twin = self.store.folder / final.name
        if twin.exists() and len(rows):
            shard = int(np.searchsorted(np.cumsum(shards), rows[0], side="right"))
            first = sum(shards[:shard])
            if len(rows) == shards[shard] and rows[0] == first and rows[-1] == first + len(rows) - 1:
                link_or_copy(twin, final)
                return
        vq = self.store.vq
        assert vq is not None  # as the comparison has found
        parts = (vq.take(rows[start : start + COPY_ROWS], axis=0) for start in range(0, len(rows), COPY_ROWS))
        write_rows(final, (len(rows), vq.shape[1]), "<u2", parts)


def crop_settings(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a PreprocessConfig, as a dictionary, that decide the pixels of a crop.

    On the path `released` the encoder scales its input from the crop, so that its own size decides none.
    """
    unused = {"encoder_size"} if preprocessing["path"] == "released" else {"image_size"}
    usual = {"fit": "crop"}  # as manifests leave it out
    return {name: value for name, value in preprocessing.items() if name not in unused and usual.get(name) != value}


def _require_same_vq(store: TokenStore, request: dict[str, Any]) -> None:
    """Raises MismatchError where a request would give other VQ tokens than a finished store holds."""

    def deciding(made: dict[str, Any]) -> dict[str, Any]:
        source = {name: made["source"][name] for name in ("fingerprint", "num_images", "subset")}
        own = {name: made[name] for name in ("vqgan_hash", "vq", "crops_per_image", "seed")}
        return {"preprocessing": crop_settings(made["preprocessing"]), "source": source} | own

    advice = "leave out the VQ tokens to take, or give those of the same crops and VQGAN"
    require_same_request(store.folder, deciding(store.manifest), deciding(request), advice)
