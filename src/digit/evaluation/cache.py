"""Cache of sampled tensors under a hash of all that they depend on: an interrupted evaluation resumes.

Several ranks share the rows of a file (`remember_rows`) or the files (`remember_parts`). Rows are made in blocks that
begin at multiples of the block's size, so that a file does not depend on the number of ranks.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.data.fingerprint import digest
from digit.errors import DigitError
from digit.evaluation.sharing import rows_to_main
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime import distributed
from digit.runtime.files import load_tensors, plain, save_tensors, sha256_tensors

PATIENCE = 60  # seconds that a network file system may hide a file which another rank has written
Rows = Callable[[int, int], Mapping[str, Tensor]]  # (start, stop) -> rows start .. stop - 1 of each tensor


def request_key(**request: Any) -> str:
    """16 hex digits that change with any value of the request (JSON values)."""
    return digest([json.dumps(plain(request), sort_keys=True).encode()])[:16]


def remember(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Load the tensors of a file; if it is missing or damaged, make them with `make` and save them.

    They are memory-mapped either way, so that many sets of features take no memory that another could not have.
    """
    try:
        return load_tensors(path)
    except DigitError:
        save_tensors(path, make())
        return load_tensors(path)


def remember_rows(path: Path, total: int, block: int, make: Rows) -> Mapping[str, Tensor]:
    """As `remember`, for tensors of `total` rows that the ranks make together, `block` rows at a time.

    All ranks call it together and get all rows. A tensor may have fewer rows, such as those of the first images alone.
    """
    if not distributed.on_main(lambda: readable(path)):
        own = distributed.share(total, block)

        def rows() -> dict[str, Tensor]:
            made = [make(start, min(start + block, own.stop)) for start in range(own.start, own.stop, block)]
            return {name: torch.cat([part[name] for part in made]) for name in (made[0] if made else ())}

        together = rows_to_main(rows)
        distributed.on_main(lambda: save_tensors(path, together))
    return load_soon(path)


def remember_parts(
    paths: Sequence[Path], make: Callable[[int], Mapping[str, Tensor]], rows: Sequence[int]
) -> list[Mapping[str, Tensor]]:
    """The tensors of several files, `make(i)` those of file i with `rows[i]` rows; ranks share the missing files.

    All ranks call it together and get all tensors.
    """
    missing = distributed.on_main(lambda: [i for i, path in enumerate(paths) if not readable(path, rows[i])])

    def make_own() -> None:
        for place in distributed.share(len(missing)):
            save_tensors(paths[missing[place]], make(missing[place]))

    distributed.on_every_rank(make_own)
    return [load_soon(path) for path in paths]


def readable(path: Path, rows: int | None = None) -> bool:
    """Whether a file of tensors is there and whole, each with so many rows."""
    try:
        tensors = load_tensors(path)
    except DigitError:
        return False
    return rows is None or all(len(tensor) == rows for tensor in tensors.values())


def load_soon(path: Path) -> Mapping[str, Tensor]:
    """Load the tensors of a file that some rank has written; another machine may see it late."""
    deadline = time.monotonic() + (PATIENCE if distributed.world_size() > 1 else 0)
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    return load_tensors(path)


def pipeline_key(pipe: DigitPipeline) -> str:
    """SHA-256 over the parts of a pipeline that decide its samples and completions, without its sampling settings."""
    models = (pipe.prior, pipe.renderer)
    parts = [model.fingerprint if model else "-" for model in (pipe.tokenizer, pipe.vq)]
    parts += [sha256_tensors(model.state_dict()) if model else "-" for model in models]
    rounding = pipe.vq.rounding if pipe.vq is not None else "-"  # of a renderer straight to pixels
    return digest(part.encode() for part in (*parts, rounding, str(pipe.image_size)))
