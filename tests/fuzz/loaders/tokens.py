"""Token stores: damaged manifests and arrays, tokens outside their vocabulary."""

import io
import json
import os
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from digit.data.tokens import TokenStore

from ..mutate import STRANGE, damage, json_bytes, strange_json

ROWS, CLASSES = 6, ["a", "b"]
LENGTHS = {"discriminative": (4, 50), "vq": (9, 300)}  # name: (tokens a row, vocabulary)
DTYPES = ("<u2", ">u2", "<i2", "<i4", "<i8", "<f4", "|u1", "|b1", "<U3", "|O", "|V2", "<M8[s]", "<u2, <u2")


class TokensLoader:
    """TokenStore.open, check and batches."""

    name = "tokens"

    def build(self, folder: Path, rng: random.Random) -> None:
        files = store(rng.random() < 0.5)
        for _ in range(rng.choice((1, 1, 2))):
            self._change(files, rng)
        for name, data in files.items():
            if data is None:
                os.symlink(rng.choice(("/nowhere", name, "/dev/zero", "labels.npy", ".")), folder / name)
            else:
                (folder / name).write_bytes(data)

    def _change(self, files: dict[str, bytes | None], rng: random.Random) -> None:
        array = rng.choice(("discriminative.npy", "vq.npy", "labels.npy"))
        action = rng.random()
        if action < 0.4:
            manifest = json.loads(store(rng.random() < 0.2)["manifest.json"])
            files["manifest.json"] = json_bytes(strange_json(manifest, rng), rng)
        elif action < 0.5:
            files["manifest.json"] = damage(files.get("manifest.json") or b"", rng)
        elif action < 0.75:
            files[array] = damage(files.get(array) or b"", rng, where=slice(0, rng.choice((128, 5000))))
        elif action < 0.85:
            files[array] = _odd_array(rng)
        elif action < 0.9:
            del files[rng.choice(list(files))]
        elif action < 0.95:
            files[array] = files[rng.choice(list(files))]
        else:
            files[rng.choice(list(files))] = None

    def load(self, folder: Path) -> None:
        opened = TokenStore.open(folder)
        rows = len(opened)
        read = opened.batches(4, seed=0)
        batches = [opened.batch(slice(None)), opened.batch([0, rows - 1]), *(read(step) for step in range(3))]
        for name in ("discriminative", "vq"):
            layout = opened.manifest[name]
            assert (layout is None) == (getattr(opened, name) is None), "tokens without a layout"
            for batch in batches if layout else ():
                tokens = batch[name]
                assert tokens.shape[1] == layout["length"], f"{name} rows of another length"
                assert tokens.min() >= 0 and tokens.max() < layout["vocab_size"], f"a token of {name} outside its range"
        labels, classes = batches[0]["labels"], opened.manifest["classes"]
        assert labels.min() >= -1 and labels.max() < max(1, len(classes)), "a label outside its range"
        whole = {f"{name}.npy": getattr(opened, name) for name in ("discriminative", "vq") if opened.manifest[name]}
        for name, stated in (opened.manifest.get("crc32") or {}).items():
            assert f"{name}.npy" not in whole or zlib.crc32((folder / f"{name}.npy").read_bytes()) == stated, "flipped"
        assert isinstance(opened.manifest["source"]["fingerprint"], str)


def store(hashed: bool) -> dict[str, bytes | None]:
    """The files of a small complete store; with `hashed` the manifest holds a checksum of each array."""
    numbers = np.random.default_rng(0)
    arrays = {
        name: numbers.integers(0, vocab, (ROWS, length)).astype("<u2") for name, (length, vocab) in LENGTHS.items()
    }
    arrays["labels"] = numbers.integers(-1, len(CLASSES), ROWS).astype("<i4")
    files: dict[str, bytes | None] = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
    manifest: dict[str, Any] = {
        "format": 2,
        "rows": ROWS,
        "crops_per_image": 1,
        "seed": 0,
        "classes": CLASSES,
        "bad": [],
        "encoder": {"name": "e"},
        "encoder_hash": "e",
        "layer": None,
        "codebook_hash": "c" * 64,
        "tokenizer_hash": "t",
        "vqgan_hash": "v" * 64,
        "preprocessing": {"image_size": 8},
        "source": {"name": "s", "fingerprint": "f" * 64, "num_images": ROWS, "subset": None},
    }
    for name, (length, vocab) in LENGTHS.items():
        manifest[name] = {"grid": [1, length], "length": length, "vocab_size": vocab}
    if hashed:
        manifest["crc32"] = {name: zlib.crc32(files[f"{name}.npy"]) for name in arrays}
    return files | {"manifest.json": json.dumps(manifest).encode()}


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def _odd_array(rng: random.Random) -> bytes:
    """A .npy of another dtype or shape, or one with a false header."""
    if rng.random() < 0.5:
        shape = rng.choice(((ROWS, 4), (ROWS, 9), (ROWS,), (), (0, 4), (4, ROWS), (1, ROWS, 4), (5, 9)))
        return _npy(np.zeros(shape, dtype=np.dtype(rng.choice(DTYPES))))
    shape = rng.choice(
        ((10**12, 4), (-1, 4), (ROWS, "4"), (2**63, 2), (0,) * 40, rng.choice(STRANGE[:20]), (ROWS, 4.0))
    )
    header = {"descr": rng.choice(DTYPES), "fortran_order": rng.choice((False, True, 0, None)), "shape": shape}
    text = (repr(header) + "\n").encode("latin1", "replace")
    version = rng.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    length = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + length + text + bytes(ROWS * 8)
