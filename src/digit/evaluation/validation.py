"""The last rows of Tables 3 and 4: metrics of a perfect model of the tokens, from tokenized validation images.

    VQ only      image -> VQ tokens -> VQGAN decoder
    DiGIT + VQ   image -> discriminative tokens -> renderer -> VQ tokens -> VQGAN decoder
    DiGIT        image -> discriminative tokens -> renderer straight to pixels, where the renderer is one

All are compared with the images themselves. The first is a lower bound for every model of these VQ tokens, the second
for every prior with this renderer.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.data.fingerprint import digest
from digit.evaluation.features import Shard, collect, shards
from digit.evaluation.image_set import Images, open_images
from digit.evaluation.samples import EvaluateConfig, describe_protocol, describe_side, scores, versions
from digit.evaluation.traps import Side
from digit.metrics.frechet import count_warnings
from digit.metrics.judge import JudgeNetwork
from digit.pipeline.pipeline import DigitPipeline
from digit.runtime import distributed
from digit.runtime.files import sha256_tensors, write_json
from digit.runtime.hardware import hardware_precision

VQ_ROW, DIGIT_ROW = "validation data: VQ only", "validation data: DiGIT + VQ"
PIXEL_ROW = "validation data: DiGIT straight to pixels"


def validation_rows(
    pipe: DigitPipeline,
    source: Images,
    num: int | None = None,
    network: JudgeNetwork | None = None,
    cfg: EvaluateConfig | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Metrics of validation images after encoding and decoding, against the images themselves.

    Args:
        pipe: needs vq, or a renderer straight to pixels; with tokenizer and renderer the row "DiGIT + VQ" too, with the
            pipeline's sampling settings.
        source: validation images; resized to the pipeline's size and cropped as everywhere.
        num: number of images to use, spread evenly if they are sorted by class; all by default.
        network, cfg, out, device: as for `evaluate`; cfg.seed is the seed of the first rendered image.

    Returns {"protocol", "images", "rows": {row: metrics}, "left_out", "warnings", "rounding", "versions"}. The features
    of rendered images are cached, 1,000 images at a time.
    """
    pipe.require(*(["tokenizer", "renderer"] if pipe.renders_pixels else ["vq"]))
    cfg = replace(cfg or EvaluateConfig(), image_size=pipe.image_size, measures="published")
    network = network or cfg.load_network(device)
    images = open_images(source, num)
    real_shards = list(shards(images, pipe.image_size))

    def features(parts: list[Shard], name: str) -> Side:
        judged = collect(parts, network, batch_size=cfg.batch_size, cache=cfg.cache_folder, description=name)
        return Side("reference", images, pipe.image_size, judged)

    real = features(real_shards, "judge validation images")
    rows, left_out, warnings = {}, {}, []
    for row, make in _routes(pipe, cfg.seed).items():
        if make is None:
            left_out[row] = "the pipeline has no tokenizer, or no renderer that takes its tokens"
            continue
        side = features(list(_through(real_shards, make, _identity(pipe, row, cfg.seed))), row)
        rows[row], missing = distributed.on_main(
            lambda side=side: scores(replace(side, role="samples"), real, network, cfg)
        )
        left_out |= {f"{row}: {name}": reason for name, reason in missing.items()}
        warnings += [f"{row}: {text}" for text in distributed.on_main(lambda side=side: _traps(side, real))]
    result = {
        "protocol": describe_protocol(network, cfg),
        "images": describe_side(real),
        "rows": rows,
        "left_out": left_out,
        "warnings": warnings,
        "rounding": pipe.vq.rounding if pipe.vq is not None else "nearest",
        "versions": versions(),
    }
    if out is not None:
        distributed.on_main(lambda: write_json(out, result))
    return result


def _traps(decoded: Side, real: Side) -> list[str]:
    """Warnings about the numbers and the pixels of the images of a row."""
    assert decoded.features is not None
    remarks = decoded.images.remarks if decoded.images is not None else ()
    return [*remarks, *count_warnings(decoded.count, real.count, decoded.features.pooled.shape[1])]


Route = Callable[[Tensor, int], Tensor]  # (uint8 (B, 3, S, S), index of the first) -> uint8 (B, 3, S, S)


def _routes(pipe: DigitPipeline, seed: int) -> dict[str, Route | None]:
    """The function that makes the images of each row; image i is rendered with seed + i."""
    vq, tokenizer = pipe.vq, pipe.tokenizer
    if pipe.renders_pixels:
        assert tokenizer is not None, "required"
        return {PIXEL_ROW: lambda images, first: pipe.rerender(images, seed + first)}
    assert vq is not None
    routes: dict[str, Route | None] = {VQ_ROW: lambda images, first: vq.decode(vq.encode(images)), DIGIT_ROW: None}
    if tokenizer is not None and pipe.renderer is not None and pipe.renderer.cfg.prefix_len:
        routes[DIGIT_ROW] = lambda images, first: pipe.rerender(images, seed + first)
    return routes


def _through(parts: list[Shard], make: Route, identity: bytes) -> Iterator[Shard]:
    first = 0
    for part in parts:
        key = digest([identity, str(first).encode(), part.key.encode()])
        yield Shard(key, part.num, lambda part=part, first=first: make(part.make(), first))
        first += part.num


def _identity(pipe: DigitPipeline, row: str, seed: int) -> bytes:
    """Hash of all that the images of a row depend on, besides the validation images."""
    parts = [row, *([pipe.vq.fingerprint, pipe.vq.rounding] if pipe.vq is not None else [])]
    if row != VQ_ROW:
        assert pipe.renderer is not None and pipe.tokenizer is not None
        renderer = sha256_tensors(pipe.renderer.state_dict())
        parts += [
            pipe.tokenizer.fingerprint,
            renderer,
            repr(pipe.sampling.renderer),
            hardware_precision(pipe.sampling.precision, pipe.device),
            str(seed),
        ]
        if pipe.renderer_sees_labels and pipe.prior is not None:  # which tells the likeliest class
            parts.append(sha256_tensors(pipe.prior.state_dict()))
    return digest(part.encode() for part in parts).encode()
