"""Triton kernel: attention of one query a row over a key-value cache whose filled length is a number on the GPU.

It needs Triton, which torch's CUDA builds bring; `decoding.step_kernel` decides whether it is used.

Shapes: R rows, H heads, d width of a head, T positions of the cache. Scores, softmax and sums are in float32.
"""

from typing import Any, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

TILE = 4096  # elements of keys that a program reads at once: 64 positions of 64 features
WARPS = 4
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x log2 e): the GPU has an instruction for exp2


def step_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Store k and v at `position`, and attend to all positions up to it: softmax(q K^T / sqrt(d)) V.

    Args:
        q, k, v: (R, H, 1, d) of one type, float32, bfloat16 or float16; views of one matrix need no copy.
        keys, values: caches (R, H, T, d), of equal strides; changed in place. What lies past `position` is not read.
        position: (1,) int64 in 0..T-1.

    Returns (R, H, 1, d), contiguous.
    """
    rows, heads, _, dim = q.shape
    assert keys.stride() == values.stride() and keys.stride(3) == q.stride(3) == k.stride(3) == v.stride(3) == 1
    out = torch.empty((rows, heads, 1, dim), dtype=q.dtype, device=q.device)
    padded = triton.next_power_of_2(dim)
    strides = [stride for x in (q, k, v) for stride in (x.stride(0), x.stride(1))]
    launcher: Any = attend_to_cache  # what jit makes of it takes a grid
    launcher[(rows * heads,)](
        *(q, k, v, keys, values, position, out),
        *strides,
        *keys.stride()[:3],
        heads,
        dim**-0.5 * LOG2_E,
        DIM=dim,
        PADDED=padded,
        BLOCK=max(16, TILE // padded),
        num_warps=WARPS,
    )
    return out


@triton.jit
@no_type_check  # tests check annotations at every call, which a compiler of source text cannot follow
def attend_to_cache(
    q_at,
    k_at,
    v_at,
    keys_at,
    values_at,
    position_at,
    out_at,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    cache_row,
    cache_head,
    cache_step,
    num_heads,
    scale,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and head. Names in _at are addresses, those after them strides in elements."""
    row, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    position = tl.load(position_at)
    feature = tl.arange(0, PADDED)
    exists = feature < DIM
    q = tl.load(q_at + row * q_row + head * q_head + feature, exists, 0.0).to(tl.float32) * scale
    k = tl.load(k_at + row * k_row + head * k_head + feature, exists, 0.0)
    v = tl.load(v_at + row * v_row + head * v_head + feature, exists, 0.0)
    cache = row.to(tl.int64) * cache_row + head.to(tl.int64) * cache_head
    newest = cache + position * cache_step + feature
    tl.store(keys_at + newest, k, exists)
    tl.store(values_at + newest, v, exists)

    # softmax over blocks of positions (Milakov & Gimelshein 2018), beginning with the newest, which needs no read
    largest = tl.sum(q * k.to(tl.float32), 0)
    total = tl.full((), 1.0, tl.float32)
    mean = v.to(tl.float32)
    start = tl.full((), 0, tl.int64)
    while start < position:  # not a range: Triton's interpreter refuses a loaded bound with NumPy 2.4
        step = start + tl.arange(0, BLOCK)
        seen = step < position
        tile = cache + step[:, None] * cache_step + feature[None, :]
        inside = seen[:, None] & exists[None, :]
        block_keys = tl.load(keys_at + tile, inside, 0.0).to(tl.float32)
        block_values = tl.load(values_at + tile, inside, 0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(block_keys * q[None, :], 1), float("-inf"))
        top = tl.maximum(largest, tl.max(scores, 0))
        shrink, weight = tl.exp2(largest - top), tl.exp2(scores - top)
        total = total * shrink + tl.sum(weight, 0)
        mean = mean * shrink + tl.sum(weight[:, None] * block_values, 0)
        largest, start = top, start + BLOCK
    tl.store(out_at + tl.program_id(0) * DIM + feature, (mean / total).to(out_at.dtype.element_ty), exists)
