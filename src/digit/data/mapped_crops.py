"""The test images on disk: cut once, by all ranks together, and memory-mapped by each of them.

FOLDER/images.npy   uint8 (N, 3, S, S), centre crops; 50,000 of 256 px are 9.8 GB
FOLDER/labels.npy   int64 (N,), -1 = none
FOLDER/crops.json   what they were cut from; written last
"""

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from digit.data.loader import CropLoader
from digit.data.preprocess import PreprocessConfig
from digit.data.rows import ArrayFile, copy_rows
from digit.data.source import ImageSource
from digit.errors import DigitError
from digit.runtime import distributed
from digit.runtime.files import plain, read_json, save_npy, write_json

BATCH = 64  # images


def mapped_crops(
    folder: Path, source: ImageSource, cfg: PreprocessConfig
) -> tuple[UInt8[Tensor, "N 3 S S"], Int64[Tensor, " N"]]:
    """(images, labels): centre crops of all readable images of a source, RGB 0..255, in order.

    The images are a memory map, so that all processes of a machine share one copy. All ranks call it together. Raises
    DigitError if no image can be read, or where the disk has no room.
    """
    centre = replace(cfg, random_crop=False, flip=False)
    request = plain({"source": source.fingerprint, "images": len(source), "preprocessing": centre.described()})
    if not distributed.on_main(lambda: is_cut(folder, request)):
        cut(folder, source, centre, request)
    images = np.load(folder / "images.npy", mmap_mode="c")  # changes stay in memory; torch warns of read-only maps
    return torch.from_numpy(images), torch.from_numpy(np.load(folder / "labels.npy"))


def is_cut(folder: Path, request: dict[str, Any]) -> bool:
    """Whether the folder holds these crops, in full length."""
    path, images = folder / "crops.json", folder / "images.npy"
    kept = read_json(path) if path.exists() else {}
    if kept.get("request") != request or not images.exists():
        return False
    return images.stat().st_size == kept["bytes"]


def cut(folder: Path, source: ImageSource, cfg: PreprocessConfig, request: dict[str, Any]) -> None:
    """Cut the crops, every rank its share; unreadable images are left out."""
    shape = (len(source), 3, cfg.crop_size, cfg.crop_size)
    array = ArrayFile(folder / "images.partial.npy", shape, "|u1")
    distributed.on_main(lambda: begin(folder, array))
    shares = distributed.on_every_rank(lambda: write_share(array, source, cfg))
    labels, ok = (np.concatenate([share[i] for share in shares]) for i in (0, 1))
    distributed.on_main(lambda: finish(folder, array, labels, ok, request, source.name))


def begin(folder: Path, array: ArrayFile) -> None:
    """Allocate the file, so that a full disk is noticed now."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "crops.json").unlink(missing_ok=True)
    array.allocate()


def write_share(array: ArrayFile, source: ImageSource, cfg: PreprocessConfig) -> tuple[np.ndarray, np.ndarray]:
    """Write this rank's crops; returns labels and which images could be read, in order."""
    share = distributed.share(len(source), BATCH)
    loader = CropLoader(source, cfg, batch_size=BATCH, max_bad_fraction=1.0, start_row=share.start)
    labels, ok = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=bool)]
    with array:
        row = share.start
        for batch in islice(loader, math.ceil(len(share) / BATCH)):
            array.write(row, batch.images.numpy())
            labels.append(batch.labels.numpy())
            ok.append(batch.ok.numpy())
            row += len(batch)
        array.sync()
    return np.concatenate(labels), np.concatenate(ok)


def finish(
    folder: Path, array: ArrayFile, labels: np.ndarray, ok: np.ndarray, request: dict[str, Any], name: str
) -> None:
    """Leave out what could not be read, and write what says that the crops are complete."""
    if not ok.any():
        raise DigitError(f"{name} holds no image that can be read")
    images = folder / "images.npy"
    copy_rows(array.path, images, ok, array)
    array.path.unlink(missing_ok=True)
    save_npy(folder / "labels.npy", labels[ok])
    write_json(folder / "crops.json", {"request": request, "rows": int(ok.sum()), "bytes": images.stat().st_size})
