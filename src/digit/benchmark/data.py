"""Data loading: random batches of tokens beside a memory copy, JPEG files to crops beside decoding alone."""

import io
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from digit.benchmark.clock import alternate
from digit.benchmark.measurement import Measurement
from digit.benchmark.sizes import Size
from digit.benchmark.train import token_store
from digit.data.decode import decode_image
from digit.data.preprocess import PreprocessConfig, crop_image
from digit.errors import DigitError

JPEG_SIZE, JPEG_QUALITY = (500, 375), 90  # a typical photograph of ImageNet
STORE_BATCHES = 100
NO_ARITHMETIC = "-"


def time_data(size: Size, repeats: int, folder: str | None = None) -> list[Measurement]:
    """Token store and image files, on the CPU; `folder` holds JPEG files to use instead of generated ones."""
    return [time_store(size, repeats), time_images(size, repeats, read_files(folder, size.num_images))]


def time_store(size: Size, repeats: int) -> Measurement:
    """Sequences per second in random batches, as training reads them; the floor copies as many bytes."""
    store = token_store(size.store_rows, size.discriminative_len, size.recipe.quantizer_cfg.vocab_size)
    batches, step = store.batches(size.store_batch, seed=0), count()
    source = batches(next(step))["discriminative"].numpy()
    target = np.empty_like(source)

    def read() -> None:
        for _ in range(STORE_BATCHES):
            batches(next(step))

    def copy() -> None:
        for _ in range(STORE_BATCHES):
            np.copyto(target, source)

    times, peaks = alternate({"read": read, "copy": copy}, repeats, torch.device("cpu"))
    labels: dict[str, Any] = dict(
        part="data", case=f"tokens, batch {size.store_batch}", precision=NO_ARITHMETIC, unit="sequences"
    )
    total = size.store_batch * STORE_BATCHES
    return Measurement(**labels, count=total, time=times["read"], floor=times["copy"], peak=peaks["read"])


def time_images(size: Size, repeats: int, files: Sequence[bytes]) -> Measurement:
    """Images per second of one process: decode, resize, random crop, flip; the floor is Pillow's decoding alone."""
    cfg = PreprocessConfig()

    def crop() -> None:
        for index, data in enumerate(files):
            crop_image(decode_image(data), cfg, seed=0, index=index, crop=0)

    times, peaks = alternate({"crop": crop, "decode": decoder(files)}, repeats, torch.device("cpu"))
    labels: dict[str, Any] = dict(
        part="data", case="JPEG to crop", precision=NO_ARITHMETIC, unit="images", count=len(files)
    )
    return Measurement(**labels, time=times["crop"], floor=times["decode"], peak=peaks["crop"])


def decoder(files: Sequence[bytes]) -> Callable[[], None]:
    """Returns a function that decodes the files with Pillow alone."""

    def decode() -> None:
        for data in files:
            with Image.open(io.BytesIO(data)) as image:
                image.load()

    return decode


def read_files(folder: str | None, num: int) -> list[bytes]:
    """Reads `num` JPEG files of a folder, or generates them. Raises DigitError for a folder without any."""
    if folder is None:
        return [generated_jpeg(index) for index in range(num)]
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[:num]
    if not paths:
        raise DigitError(f"{folder} holds no .jpg or .jpeg: give a folder of photographs, or leave --images out")
    return [path.read_bytes() for path in paths]


def generated_jpeg(index: int) -> bytes:
    """Soft blobs with noise: about 100 kB, like a photograph of this size."""
    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
        JPEG_SIZE, Image.Resampling.BICUBIC
    )
    noisy = np.clip(np.asarray(coarse) + rng.normal(0, 8, (JPEG_SIZE[1], JPEG_SIZE[0], 1)), 0, 255)
    stream = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()
