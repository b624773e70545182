"""Cache of sampled tensors under a hash of all that they depend on: an interrupted evaluation resumes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from digit.data.fingerprint import digest
from digit.errors import DigitError
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime.files import load_tensors, plain, save_tensors, sha256_tensors


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


def pipeline_key(pipe: DigitPipeline) -> str:
    """SHA-256 over the parts of a pipeline that decide its samples and completions, without its sampling settings."""
    assert pipe.vq is not None
    models = (pipe.prior, pipe.renderer)
    parts = [model.fingerprint if model else "-" for model in (pipe.tokenizer, pipe.vq)]
    parts += [sha256_tensors(model.state_dict()) if model else "-" for model in models]
    return digest(part.encode() for part in (*parts, pipe.vq.rounding, str(pipe.image_size)))
