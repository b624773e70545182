"""Images and statistics in files of other programs; pickled code is never executed.

| program | file | arrays |
|---|---|---|
| guided-diffusion (ADM) | .npz | arr_0 with images, or mu, sigma, mu_s, sigma_s, with or without images |
| pytorch-fid, clean-fid | .npz | mu, sigma |
| dgm-eval | .npz | reps (N, D), features |
| torch-fidelity | .pt of its cache | {"mu", "sigma"}, or features (N, D) |
"""

import math
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy._core import multiarray

from digit.errors import DigitError, MismatchError
from digit.evaluation.traits import Traits
from digit.metrics.frechet import FeatureStats
from digit.runtime.files import as_path, atomic_path

DIGEST_BYTES = 32  # SHA-256
AGAIN = "compute the statistics again"
TORCH_SUFFIXES = (".pt", ".pth")  # of torch-fidelity's cache
REPRESENTATIONS = "reps"  # dgm-eval's name for features


def read_npz_images(path: str | Path) -> np.ndarray:
    """Read arr_0 of an .npz, uint8 (N, H, W, 3); memory-mapped if uncompressed (50,000 images of 256 px: 9.8 GB).

    Pickled arrays are refused, so no code is executed. Raises DigitError for a missing, damaged or other file.
    """
    path = as_path(path)
    with _Archive(path) as (archive, names):
        if "arr_0" not in names:
            raise DigitError(f"{path} holds {_listing(names)}, wanted arr_0 with images, uint8 (N, H, W, 3)")
        entry = archive.getinfo("arr_0.npy")
        with archive.open(entry) as file:
            shape, fortran, dtype = _npy_header(file)
            header = file.tell()
        if others := [name for name in names if name != "arr_0" and _is_images(archive, f"{name}.npy")]:
            raise DigitError(
                f"{path} holds images in arr_0 and {', '.join(others)}: save each set in a file of its own"
            )
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise DigitError(
                f"{path}: arr_0 is {dtype} {shape}, wanted uint8 (N, H, W, 3), RGB in 0..255 "
                "(floats of 0..1: np.rint(255 * x).astype(np.uint8))"
            )
        if entry.file_size != header + math.prod(shape):
            raise DigitError(
                f"{path}: arr_0 has shape {shape} and holds {entry.file_size - header} bytes: it is damaged"
            )
        if entry.compress_type != zipfile.ZIP_STORED:
            return _load(path, "arr_0")
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)  # lengths of name and extra field of the local header (PKWARE 4.3.7)
        start = file.tell() + 4 + sum(int.from_bytes(file.read(2), "little") for _ in range(2))
    return np.memmap(path, dtype=np.uint8, mode="r", offset=start + header, shape=shape)


def read_npz_names(path: str | Path) -> list[str]:
    """Names of the arrays in an .npz. Raises DigitError for a missing file and one that is no .npz."""
    with _Archive(path) as (_, names):
        return names


class _Archive:
    """Opens an .npz as (zip archive, names of its arrays); errors in the file become DigitError."""

    def __init__(self, path: str | Path):
        self.path = as_path(path)

    def __enter__(self) -> tuple[zipfile.ZipFile, list[str]]:
        try:
            self.archive = zipfile.ZipFile(self.path)
        except FileNotFoundError as error:
            raise DigitError(f"no such file: {self.path}") from error
        except (zipfile.BadZipFile, OSError) as error:
            raise DigitError(f"{self.path} is no .npz file ({error})") from error
        return self.archive, [name.removesuffix(".npy") for name in self.archive.namelist()]

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.archive.close()
        if isinstance(error, ValueError | EOFError | OSError | zipfile.BadZipFile | NotImplementedError):
            raise DigitError(f"{self.path} cannot be read ({error}): it is damaged or holds pickled arrays") from error


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _is_images(archive: zipfile.ZipFile, entry: str) -> bool:
    """Whether an entry is an array with the shape of RGB images, (N, H, W, 3) or (N, 3, H, W)."""
    if entry not in archive.namelist():
        return False
    with archive.open(entry) as file:
        shape, _, _ = _npy_header(file)
    return len(shape) == 4 and 3 in (shape[1], shape[3])


def _load(path: str | Path, name: str) -> np.ndarray:
    with np.load(as_path(path), allow_pickle=False) as arrays:
        return arrays[name]


def _listing(names: list[str]) -> str:
    return ", ".join(sorted(names)[:6]) or "nothing"


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance (float64) of a reference, used instead of its images."""

    mu: np.ndarray  # (D,) pooled features
    sigma: np.ndarray  # (D, D)
    mu_s: np.ndarray | None = None  # (E,) spatial features, for sFID
    sigma_s: np.ndarray | None = None  # (E, E)
    num: int | None = None  # number of images; None in files of other programs
    network: str | None = None  # fingerprint of the network; None in files of other programs
    traits: Traits | None = None  # of the images; None in files of other programs and of older versions
    digests: np.ndarray | None = None  # (N, 32) uint8, SHA-256 of each image's pixels; None where traits is
    features: np.ndarray | None = None  # (N, D) float32 pooled features, of files that hold them; never saved

    @classmethod
    def of_features(cls, path: str | Path, features: np.ndarray) -> Self:
        """The statistics of features (N, D) that a file holds. Raises DigitError for other shapes, NaN and infinity."""
        if features.ndim != 2 or len(features) < 2 or features.dtype.kind != "f" or not np.isfinite(features).all():
            raise DigitError(
                f"{path} holds features {features.dtype} {features.shape}, wanted finite floats (N, D) of at least 2 "
                f"images: {AGAIN}"
            )
        stats = FeatureStats.of(features)
        return cls(stats.mean, stats.cov, num=len(features), features=features.astype(np.float32))

    def check(self, network: str, dim: int) -> None:
        """Raise MismatchError if the statistics belong to another network."""
        if self.network not in (None, network):
            raise MismatchError(
                f"the reference statistics are of network {self.network[:12]}, this network is {network[:12]}: "
                "compute them again with this network, or give the images"
            )
        if len(self.mu) != dim:
            raise MismatchError(
                f"the reference statistics have {len(self.mu)} features, the network gives {dim}: statistics of "
                "Inception (2048) need --inception FILE"
            )

    def save(self, path: str | Path) -> None:
        """Write .npz with mu, sigma and the other fields that are set; other programs read the first two."""
        arrays = {name: value for name, value in vars(self).items() if value is not None and name != "features"}
        if self.traits is not None:
            arrays["traits"] = self.traits.to_json()
        with atomic_path(path) as temporary, open(temporary, "wb") as out:
            np.savez(out, **arrays)


def read_statistics(path: str | Path) -> Statistics | None:
    """Read mu, sigma (and mu_s, sigma_s) from a file of `Statistics.save` or of another program, as listed above.

    Of features of dgm-eval or torch-fidelity the statistics are computed. None for an .npz without any of these. Raises
    DigitError for a damaged file, pickled objects, wrong shapes, NaN, and a mean without its covariance.
    """
    if as_path(path).suffix.lower() in TORCH_SUFFIXES:
        return _read_torch(as_path(path))
    with _Archive(path) as (_, names):
        if REPRESENTATIONS in names and "mu" not in names:
            return Statistics.of_features(path, _load(path, REPRESENTATIONS))
        if not {"mu", "sigma"} & set(names):
            return None
        moments = {name: _load(path, name) for name in ("mu", "sigma", "mu_s", "sigma_s") if name in names}
        extra = {name: _load(path, name).item() for name in ("num", "network", "traits") if name in names}
        digests = _load(path, "digests") if "digests" in names else None
    for mean, cov in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in moments) != (cov in moments):
            raise DigitError(f"{path} holds {_listing(names)}, wanted both {mean} and {cov}")
        if mean in moments:
            moments[mean], moments[cov] = _checked(path, mean, moments[mean], cov, moments[cov])
    num, network = extra.get("num"), extra.get("network")
    if num is not None and (type(num) is not int or num < 1):
        raise DigitError(f"{path}: num is {num!r}, wanted the number of images: {AGAIN}")
    traits = Traits.read(str(extra["traits"]), f"{path}: traits") if "traits" in extra else None
    wanted = None if traits is None else ((traits.num, DIGEST_BYTES), np.dtype(np.uint8), traits.num)
    if wanted != (None if digests is None else (digests.shape, digests.dtype, num)):
        raise DigitError(f"{path}: num, traits and digests do not belong together: {AGAIN}")
    network = None if network is None else str(network)
    return Statistics(**moments, num=num, network=network, traits=traits, digests=digests)


def _read_torch(path: Path) -> Statistics:
    """Read what torch-fidelity caches: a dictionary of mu and sigma, or a tensor of features (N, D)."""
    types = {type(np.dtype(name)) for name in ("float16", "float32", "float64", "int64")}
    allowed = [np.ndarray, np.dtype, *types, *(vars(multiarray)[name] for name in ("_reconstruct", "scalar"))]
    try:
        with torch.serialization.safe_globals(allowed):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DigitError(f"no such file: {path}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise DigitError(f"{path} is damaged, or holds other objects than arrays and tensors") from error
    if isinstance(held, torch.Tensor):
        return Statistics.of_features(path, held.numpy())
    if not isinstance(held, dict) or not {"mu", "sigma"} <= set(held):
        raise DigitError(f"{path} holds no statistics (mu, sigma) or features (N, D) of torch-fidelity")
    mu, sigma = (np.asarray(held[name]) for name in ("mu", "sigma"))
    return Statistics(*_checked(path, "mu", mu, "sigma", sigma))


def _checked(path: str | Path, mean: str, m: np.ndarray, cov: str, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if m.ndim != 1 or s.shape != (len(m), len(m)) or m.dtype.kind != "f" or s.dtype.kind != "f":
        raise DigitError(f"{path}: {mean} is {m.dtype} {m.shape} and {cov} {s.dtype} {s.shape}, wanted (D,) and (D, D)")
    if not (np.isfinite(m).all() and np.isfinite(s).all()):
        raise DigitError(f"{path}: {mean} or {cov} holds NaN or infinity: {AGAIN}")
    if not np.allclose(s, s.T, rtol=1e-3, atol=1e-6 * abs(s).max()) or (np.diag(s) < 0).any():
        raise DigitError(f"{path}: {cov} is no covariance (symmetric, no negative variance): {AGAIN}")
    return m.astype(np.float64), s.astype(np.float64)
