"""The Triton kernels without a GPU: python kernels.py interpreted|compiled prints one JSON line a check.

With TRITON_INTERPRET=1 Triton's interpreter runs them on CPU tensors. Without it they are compiled for an H100, which
finds what an interpreter accepts and a GPU does not; nothing runs then.
"""

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from digit.models import decoding, step_kernel
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.transformer import KeysValues, attend
from digit.runtime import progress
from digit.sampling import next_token
from digit.sampling.next_token import NextTokenSampler

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = (64, 96, 7)  # of a head: the paper's, one that is no power of two, and an odd one
INTERPRETED: dict[str, Callable[[], None]] = {}
COMPILED: dict[str, Callable[[], None]] = {}


def filled(length: int, position: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as views of one matrix, and caches of which only the positions before `position` are numbers."""
    torch.manual_seed(0)
    new = torch.randn(3, 3, 2, 1, width).to(dtype).unbind(1)  # (R, H, 1, d) each
    caches = torch.randn(2, 3, 2, length, width).to(dtype)
    caches[:, :, :, position:] = float("nan")
    return [*new, *caches]


def attention_at(length: int, position: int, width: int, dtype: torch.dtype) -> None:
    q, k, v, keys, values = filled(length, position, width, dtype)
    stored = [keys.clone(), values.clone()]
    out = step_kernel.step_attention(q, k, v, *stored, torch.tensor([position]))
    keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
    for is_now, wanted in zip(stored, (keys, values), strict=True):
        torch.testing.assert_close(is_now, wanted, rtol=0, atol=0, equal_nan=True)
    seen = KeysValues(keys[:, :, : position + 1].double(), values[:, :, : position + 1].double())
    torch.testing.assert_close(out, attend(q.double(), seen).to(dtype))


def all_positions(width: int, dtype: torch.dtype) -> None:
    block = max(16, step_kernel.TILE // triton.next_power_of_2(width))
    for length, position in ((1, 0), (5, 4), (block, block - 1), (block + 1, block), (2 * block + 3, block + 1)):
        attention_at(length, position, width, dtype)


for name, dtype in TYPES.items():
    for width in WIDTHS:
        INTERPRETED[f"attention of one query, {name}, width {width}"] = lambda w=width, t=dtype: all_positions(w, t)


def same_tokens(**changes: Any) -> None:
    """Steps through the kernel sample what steps through torch's attention sample."""
    torch.manual_seed(0)
    size: dict[str, Any] = dict(vocab_size=11, target_len=6, depth=2, embed_dim=24, num_heads=2, prefix_dropout=0.1)
    size |= dict(prefix_len=17, prefix_vocab_size=7)
    network = SequenceModel(SequenceConfig(**size | changes)).eval()
    prefix = torch.arange(51).view(3, 17) % 7
    how: dict[str, Any] = dict(micro_batch_size=2, top_p=0.9, cfg_scale=2.0)
    next_token.step_kernel = lambda *_: step_kernel.step_attention
    by_kernel = NextTokenSampler(network, fixed_shapes=True, **how)
    by_torch = NextTokenSampler(network, fixed_shapes=False, **how)
    for given in (None, torch.full((3, 2), 4)):
        assert torch.equal(*(sample(range(3), prefix=prefix, given=given) for sample in (by_kernel, by_torch)))


INTERPRETED["tokens, pre-norm"] = lambda: same_tokens(norm="pre")
INTERPRETED["tokens, post-norm"] = lambda: same_tokens(norm="post")


def unusable_kernel_is_refused() -> None:
    def forgetful(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
        return step_kernel.step_attention(q, k, v, keys.clone(), values.clone(), position)

    decoding.check_step_kernel(step_kernel.step_attention, torch.device("cpu"), torch.bfloat16, 8)
    try:
        decoding.check_step_kernel(forgetful, torch.device("cpu"), torch.bfloat16, 8)
    except AssertionError:
        return
    raise AssertionError("a kernel that stores nothing passed")


INTERPRETED["a kernel that fails its trial"] = unusable_kernel_is_refused


def compiled(width: int, name: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, padded = step_kernel.attend_to_cache, triton.next_power_of_2(width)
    kinds = {n: "constexpr" if n.isupper() else f"*{name}" if n.endswith("_at") else "i32" for n in kernel.arg_names}
    constants = {"DIM": width, "PADDED": padded, "BLOCK": max(16, step_kernel.TILE // padded)}
    source = ASTSource(kernel, kinds | {"position_at": "*i64", "scale": "fp32"}, constants)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": step_kernel.WARPS})
    assert done.asm["cubin"] and done.metadata.shared < 48 * 1024


for name in TYPES:
    for width in WIDTHS:
        COMPILED[f"attention of one query, {name}, width {width}"] = lambda w=width, t=name: compiled(w, t)


if __name__ == "__main__":
    progress.quiet()
    for name, function in {"interpreted": INTERPRETED, "compiled": COMPILED}[sys.argv[1]].items():
        fault = None
        try:
            function()
        except Exception as error:
            frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            fault = f"{type(error).__name__}: {str(error)[:600]} {frames[-1:]}"
        print(json.dumps({"name": name, "fault": fault}), flush=True)
