"""Decoding step of the backbone: one position per row with a key-value cache, as plain functions instead of modules.

Call overhead equals compute in small models, so residual adds and, for few rows, the GELU are fused into matmuls.
Equals `Transformer.forward` up to rounding.

Shapes: R rows, D width, H heads, d = D / H.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from digit.models.products import PackedLinear
from digit.models.transformer import Added, Block, KeysValues, KVCache, StepKernel, SteppedCache, Transformer, attend

FUSED_GELU_ROWS = 16  # above this, oneDNN's GELU is slower than torch's (measured at 8 and 64 rows)
Product = Callable[..., Tensor]
log = logging.getLogger(__name__)


@functools.cache
def step_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> StepKernel | None:
    """The kernel of `SteppedCache` for this device, type and width of a head, or None: torch's attention with a mask.

    A kernel needs a CUDA device and Triton. It is tried once, since Triton compiles where it runs, with the C compiler
    and the GPU that it finds there.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    try:
        from digit.models.step_kernel import step_attention

        check_step_kernel(step_attention, device, dtype, head_dim)
    except Exception as error:  # of Triton, its compilers or the driver: each raises its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("Triton's attention for one query does not work here (%s): decoding uses torch's", reason)
        return None
    return step_attention


@torch.no_grad()
def check_step_kernel(kernel: StepKernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise AssertionError where the kernel stores or computes anything but torch's attention does."""
    rows, heads, length = 3, 2, 80
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(rows, 3, heads, 1, head_dim, generator=generator).to(dtype).unbind(1)  # views, as in a step
    keys, values = torch.randn(2, rows, heads, length, head_dim, generator=generator).to(dtype)
    for position in (0, 64, 71):
        stored = [keys.to(device, copy=True), values.to(device, copy=True)]
        new = [x.to(device) for x in (q, k, v)]
        out = kernel(new[0], new[1], new[2], stored[0], stored[1], torch.tensor([position], device=device))
        keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
        assert torch.equal(stored[0].cpu(), keys) and torch.equal(stored[1].cpu(), values), "it stores something else"
        seen = KeysValues(*(x[:, :, : position + 1].double() for x in (keys, values)))
        torch.testing.assert_close(out.cpu(), attend(q.double(), seen).to(dtype))


class StepTransformer:
    """`transformer(x[:, None], causal=True, cache=cache)[:, 0]` for one position, without its modules."""

    def __init__(self, transformer: Transformer, num_rows: int) -> None:
        self.blocks: list[StepBlock] = []
        for block in transformer.blocks:
            assert isinstance(block, Block)
            self.blocks.append(StepBlock(block, num_rows))
        self.final_norm = normaliser(transformer.final_norm)

    def __call__(
        self, x: Float[Tensor, "R D"], cache: KVCache | SteppedCache, added: Added | None = None
    ) -> Float[Tensor, "R D"]:
        """Features after the final norm; extends the cache by one position. `added` {block: (R, D)} joins inputs."""
        rotation = cache.rotation(1)
        for layer, block in enumerate(self.blocks):
            if added and layer in added:
                x = x + added[layer]
            x = block(x, layer, cache, rotation)
        cache.advance(1)
        return self.final_norm(x)


class StepBlock:
    """One block of the backbone."""

    def __init__(self, block: Block, num_rows: int) -> None:
        attention, mlp = block.attention, block.mlp
        self.pre, self.num_heads = block.pre, attention.num_heads
        self.with_positions = attention.with_positions
        self.qkv, self.out = product(attention.qkv), product_and_sum(attention.out)
        self.fc1, self.fc2 = product(mlp.fc1, gelu=True, num_rows=num_rows), product_and_sum(mlp.fc2)
        self.norm1, self.norm2 = normaliser(block.norm1), normaliser(block.norm2)

    def __call__(
        self, x: Float[Tensor, "R D"], layer: int, cache: KVCache | SteppedCache, rotation: Tensor | None
    ) -> Float[Tensor, "R D"]:
        if self.pre:
            x = self.out(self.attend(self.norm1(x), layer, cache, rotation), x)
            return self.fc2(self.fc1(self.norm2(x)), x)
        x = self.norm1(self.out(self.attend(x, layer, cache, rotation), x))
        return self.norm2(self.fc2(self.fc1(x), x))

    def attend(
        self, x: Float[Tensor, "R D"], layer: int, cache: KVCache | SteppedCache, rotation: Tensor | None
    ) -> Float[Tensor, "R D"]:
        """Attention before its output projection."""
        rows, width = x.shape
        q, k, v = self.qkv(x).view(rows, 3, self.num_heads, 1, width // self.num_heads).unbind(1)  # (R, H, 1, d)
        q, k = self.with_positions(q, k, rotation)
        return cache.attend(layer, q, k, v).reshape(rows, width)


def product(linear: nn.Linear | PackedLinear, *, gelu: bool = False, num_rows: int = 0) -> Product:
    """x (R, in) to x W^T + b (R, out), with `gelu` the exact GELU of it."""
    weight, bias = linear.weight, linear.bias
    if isinstance(linear, PackedLinear) and (not gelu or num_rows <= FUSED_GELU_ROWS):
        call, function = torch.ops.mkldnn._linear_pointwise.default, "gelu" if gelu else "none"
        return lambda x: call(x, weight, bias, function, [], "none")
    plain: Product = linear if isinstance(linear, PackedLinear) else partial(F.linear, weight=weight, bias=bias)
    return (lambda x: F.gelu(plain(x))) if gelu else plain


def product_and_sum(linear: nn.Linear | PackedLinear) -> Product:
    """x (R, in) and y (R, out) to y + x W^T + b."""
    weight, bias = linear.weight, linear.bias
    if isinstance(linear, PackedLinear):
        call = torch.ops.mkldnn._linear_pointwise.binary
        return lambda x, y: call(x, y, weight, bias, "add")
    return lambda x, y: y + F.linear(x, weight, bias)


def normaliser(norm: nn.LayerNorm | nn.Identity) -> Product:
    """The norm as a plain function."""
    if isinstance(norm, nn.Identity):
        return lambda x: x
    return lambda x: F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
