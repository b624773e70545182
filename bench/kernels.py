"""Kernels of a decoding step on a GPU, alone: python bench/kernels.py cuda prints one JSON line a case.

Attention of one query at the paper's shapes, by Triton with several tiles and numbers of warps and by torch over a
masked cache, beside a copy of as many bytes; and sampling from the logits. On `cpu` it prints what it would time.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor

from digit.models.transformer import KeysValues, attend
from digit.sampling.filters import sample_filtered

CALLS, REPLAYS = 20, 10  # calls in one CUDA graph, and timed replays of it
ROWS, HEADS, WIDTH = 128, 16, 64
CASES = {"prior": (256, 160), "renderer": (512, 384)}  # positions of the cache, and those filled at an average step
LOGITS = {"prior, top-k 200 of 8192": (8192, 200, 1.0), "renderer, top-p 0.8 of 1024": (1024, 0, 0.8)}
Run = Callable[[], object]


def microseconds(run: Run) -> float:
    """Median time of one call, many in one CUDA graph, so that launching from Python does not count."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            run()
    taken = []
    for _ in range(REPLAYS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1000 / CALLS)
    return round(median(taken[2:]), 2)


def by_triton(tile: int, warps: int, tensors: tuple[Tensor, ...]) -> Tensor:
    from digit.models import step_kernel

    step_kernel.TILE, step_kernel.WARPS = tile, warps
    return step_kernel.step_attention(*tensors)


def by_torch(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, mask: Tensor) -> Tensor:
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    return attend(q, KeysValues(keys, values, mask))


def attention(model: str, device: torch.device) -> Iterator[tuple[str, Run]]:
    length, filled = CASES[model]
    how = {"device": device, "dtype": torch.bfloat16}
    q, k, v = torch.randn(ROWS, 3, HEADS, 1, WIDTH, **how).unbind(1)
    keys, values = torch.randn(2, ROWS, HEADS, length, WIDTH, **how)
    position = torch.tensor([filled - 1], device=device)
    mask = torch.zeros(1, length, **how).masked_fill_(torch.arange(length, device=device) >= filled, float("-inf"))
    tensors = (q, k, v, keys, values, position)
    for tile in (2048, 4096, 8192):
        for warps in (2, 4, 8):
            yield f"Triton, tile {tile}, {warps} warps", partial(by_triton, tile, warps, tensors)
    span = -(-filled // 64) * 64
    yield (
        "torch, masked span of 64s",
        partial(by_torch, q, k, v, keys[:, :, :span], values[:, :, :span], position, mask[:, :span]),
    )
    source = torch.empty(ROWS * HEADS * filled * WIDTH * 2, **how)  # as many bytes as the step reads
    yield "floor: reading as many bytes", source.sum


def sampling(name: str, device: torch.device) -> Run:
    num, top_k, top_p = LOGITS[name]
    logits, u = torch.randn(ROWS, num, device=device), torch.rand(ROWS, device=device, dtype=torch.float64)
    return partial(sample_filtered, logits, u, 1.0, top_k, top_p)


@torch.no_grad()
def main() -> None:
    device = torch.device(sys.argv[1])
    cases = [(f"attention of {model}: {name}", run) for model in CASES for name, run in attention(model, device)]
    cases += [(f"sampling of {name}", sampling(name, device)) for name in LOGITS]
    for name, run in cases:
        line: dict[str, object] = {"name": name, "fault": None}
        if device.type == "cuda":
            try:
                line["microseconds"] = microseconds(run)
            except Exception as error:  # of Triton or CUDA: the other cases count all the same
                line["fault"] = f"{type(error).__name__}: {str(error)[:300]}"
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
