"""x W^T + b without gradients, by the fastest kernels of the CPU.

torch hands float32 products to MKL, which leaves AVX-512 unused on AMD processors; oneDNN, which torch ships too, uses
it everywhere (measured on an AVX-512 EPYC: 430 against 200 GFLOP/s). It is a private operator of torch; builds
without it use F.linear, which is only slower.
"""

from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


@cache
def has_onednn() -> bool:
    """Whether this build of torch has oneDNN's linear operator, and the processor AVX-512."""
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return built and torch.backends.cpu.get_cpu_capability() == "AVX512"


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` computes this product by oneDNN: on the CPU, of one type, without gradient or autocast."""
    if x.device.type != "cpu" or x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return has_onednn()


def linear(
    x: Float[Tensor, "*B I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"] | None = None,
    *,
    gelu: bool = False,
) -> Float[Tensor, "*B O"]:
    """x W^T + b, or with `gelu` the exact GELU of that."""
    if weight.is_mkldnn or (x.numel() and uses_onednn(x, weight)):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def prepacked(weight: Float[Tensor, "O I"], num_rows: int | None = None) -> Float[Tensor, "O I"]:
    """`weight` prepacked for oneDNN, for products of about `num_rows` rows; pass the result only to `linear`.

    Returns the weight itself where `linear` would not use oneDNN.
    """
    with torch.no_grad():
        if uses_onednn(weight, weight) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
            return torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    return weight


class TiedLinear(nn.Module):
    """y = E x: logits by the rows first .. first + num - 1 of an embedding table, which stays the embedding's."""

    bias = None

    def __init__(self, embedding: nn.Embedding, first: int, num: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.first = embedding.embedding_dim, num, first
        self._embedding = (embedding,)  # in a tuple: as a part of this module it would be saved twice

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        """The rows; gradients reach the table."""
        return self._embedding[0].weight[self.first : self.first + self.out_features]

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """E x in the table's type."""
        return F.linear(x, self.weight)


class PackedLinear(nn.Module):
    """y = x W^T + b, W packed for inputs of about `num_rows` rows."""

    def __init__(self, layer: nn.Linear | TiedLinear, num_rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = prepacked(layer.weight.detach(), num_rows)
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """x W^T + b in the weight's type."""
        return linear(x, self.weight, self.bias)


@torch.no_grad()
def can_pack(layer: nn.Linear | TiedLinear) -> bool:
    """Whether this torch build can pack this layer, and packing makes it faster on this processor."""
    gains = layer.weight.dtype == torch.float32 or torch.cpu._is_avx512_bf16_supported()
    return gains and uses_onednn(layer.weight, layer.weight) and prepacked(layer.weight[:1]).is_mkldnn


def pack_linears(module: Module, num_rows: int) -> Module:
    """Replace every linear layer inside `module` that can be packed, in place; returns the module."""
    for name, child in module.named_children():
        if (type(child) is nn.Linear or isinstance(child, TiedLinear)) and can_pack(child):
            setattr(module, name, PackedLinear(child, num_rows))
        else:
            pack_linears(child, num_rows)
    return module
