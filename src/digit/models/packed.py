"""Linear layers whose weights lie in memory as the kernels of `products.linear` read them.

torch's own `F.linear` rearranges a bfloat16 weight at every call, which for few rows takes as long as the product.
Measured on an AVX-512 EPYC at 8 and 64 rows: float32 3 times as fast (by another kernel altogether), bfloat16 1.3 to
1.6 times. For inference only: packed weights get no gradient and are saved nowhere.
"""

import torch
from torch import Tensor, nn

from digit.models.products import arranged, linear, takes_onednn


class PackedLinear(nn.Module):
    """y = x W^T + b, W packed for inputs of about `num_rows` rows."""

    def __init__(self, layer: nn.Linear, num_rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = arranged(layer.weight.detach(), num_rows)
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the weight's type."""
        return linear(x, self.weight, self.bias)


@torch.no_grad()
def packs(layer: nn.Linear) -> bool:
    """Whether this torch build packs this layer, and its processor gains by it."""
    gains = layer.weight.dtype == torch.float32 or torch.cpu._is_avx512_bf16_supported()
    return gains and takes_onednn(layer.weight, layer.weight) and arranged(layer.weight[:1]).is_mkldnn


def pack_linears(module: nn.Module, num_rows: int) -> nn.Module:
    """Replace every nn.Linear inside `module` that can be packed, in place; returns the module."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and packs(child):
            setattr(module, name, PackedLinear(child, num_rows))
        else:
            pack_linears(child, num_rows)
    return module
