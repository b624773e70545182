"""Quantisers of VQ tokenizers: features (B, C, H, W) to codes, in fp32 whatever the precision around them.

All have `embedding.weight` (vocab_size, C), the table of codes, but `SignQuantizer`, which needs none.
Shapes: N vectors, C their channels, K = vocab_size codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from digit.models.vq_layout import QuantizerKind

MAX_SCORES = 2**27  # (vector, code) pairs that are compared together: 512 MB of float32


class Quantizer(nn.Module):
    """Nearest code vector: argmin_k |z - c_k|."""

    def __init__(self, vocab_size: int, z_channels: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, z_channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / vocab_size, 1.0 / vocab_size)

    def forward(self, z: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Int64[Tensor, "B H W ..."]]:
        """z (B, C, H, W) -> code vectors (B, C, H, W) float32 and indices (B, H, W) int64; of L levels (B, H, W, L)."""
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().movedim(1, -1)  # (B, H, W, C)
            indices = self.assign(flat.reshape(-1, flat.shape[-1]))
            indices = indices.view(*flat.shape[:-1], *indices.shape[1:])
            return self.lookup(indices), indices

    def assign(self, points: Float[Tensor, "N C"]) -> Int64[Tensor, "N ..."]:
        """Index of the code of each vector, or of several codes."""
        parts = points.split(max(1, MAX_SCORES // self.vocab_size))
        return torch.cat([self.choose(part) for part in parts]) if len(parts) > 1 else self.choose(points)

    def choose(self, points: Float[Tensor, "N C"]) -> Int64[Tensor, "N ..."]:
        """As `assign`, of so few vectors that all their scores fit into memory."""
        return nearest_code(points, self.embedding.weight)

    def lookup(self, indices: Int64[Tensor, "B H W ..."]) -> Float[Tensor, "B C H W"]:
        """The code vectors that the decoder takes."""
        return self.codes(indices).movedim(-1, 1)  # (B, C, H, W)

    def codes(self, indices: Int64[Tensor, ...]) -> Float[Tensor, "... C"]:
        """The code vector of each index."""
        return self.embedding(indices)


class ResidualQuantizer(Quantizer):
    """Several codes a vector: each level's nearest code to what the levels before it leave (Lee et al. 2022, Eq. 1).

    Level l's codes are rows l K .. (l + 1) K - 1 of the table, K = vocab_size. Indices have a last dimension of L
    levels, and the decoder takes the sum of their codes.
    """

    def __init__(self, vocab_size: int, z_channels: int, num_levels: int) -> None:
        super().__init__(num_levels * vocab_size, z_channels)
        self.vocab_size, self.num_levels = vocab_size, num_levels

    def choose(self, points: Float[Tensor, "N C"]) -> Int64[Tensor, "N L"]:
        indices, rest = [], points
        for codes in self.levels:
            indices.append(nearest_code(rest, codes))
            rest = rest - codes[indices[-1]]
        return torch.stack(indices, 1)

    def codes(self, indices: Int64[Tensor, "... L"]) -> Float[Tensor, "... C"]:
        """The sum of the code vectors of all levels."""
        first = torch.arange(self.num_levels, device=indices.device) * self.vocab_size
        return self.embedding(indices + first).sum(-2)

    @property
    def levels(self) -> tuple[Float[Tensor, "K C"], ...]:
        """The codes of each level."""
        return self.embedding.weight.split(self.vocab_size)


class CosineQuantizer(Quantizer):
    """The code at the smallest angle: argmin_k |z/|z| - c_k/|c_k||. The decoder takes c_k/|c_k|."""

    def choose(self, points: Float[Tensor, "N C"]) -> Int64[Tensor, " N"]:
        return nearest_code(F.normalize(points), F.normalize(self.embedding.weight))

    def codes(self, indices: Int64[Tensor, ...]) -> Float[Tensor, "... C"]:
        return F.normalize(self.embedding(indices), dim=-1)


class DotQuantizer(Quantizer):
    """The code with the largest product: argmax_k z.c_k (IBQ)."""

    def choose(self, points: Float[Tensor, "N C"]) -> Int64[Tensor, " N"]:
        return (points @ self.embedding.weight.t()).argmax(1)


class LogitQuantizer(Quantizer):
    """The code with the largest logit of a linear layer: the Gumbel quantiser without its noise."""

    def __init__(self, vocab_size: int, z_channels: int) -> None:
        super().__init__(vocab_size, z_channels)
        self.proj = nn.Linear(z_channels, vocab_size)

    def choose(self, points: Float[Tensor, "N C"]) -> Int64[Tensor, " N"]:
        return self.proj(points).argmax(1)


class SignQuantizer(Quantizer):
    """Codes in {-1, 1}^C without a table: index = sum_c 2^c [z_c > 0] (lookup-free quantisation, Yu et al. 2024)."""

    def __init__(self, vocab_size: int, z_channels: int) -> None:
        nn.Module.__init__(self)
        self.vocab_size, self.z_channels = vocab_size, z_channels

    def assign(self, points: Float[Tensor, "N C"]) -> Int64[Tensor, " N"]:
        return ((points > 0).long() << self._bits(points)).sum(1)

    def codes(self, indices: Int64[Tensor, ...]) -> Float[Tensor, "... C"]:
        return ((indices[..., None] >> self._bits(indices)) & 1).float() * 2 - 1

    def _bits(self, like: Tensor) -> Int64[Tensor, " C"]:
        return torch.arange(self.z_channels, device=like.device)


QUANTIZERS: dict[QuantizerKind, type[Quantizer]] = {
    "nearest": Quantizer,
    "cosine": CosineQuantizer,
    "dot": DotQuantizer,
    "logits": LogitQuantizer,
    "signs": SignQuantizer,
}


def nearest_code(points: Float[Tensor, "N C"], codes: Float[Tensor, "K C"]) -> Int64[Tensor, " N"]:
    """Index of the nearest code for each point."""
    # ||x - c||^2 = ||x||^2 - 2 x.c + ||c||^2, and ||x||^2 does not move the minimum
    return torch.addmm(codes.square().sum(1), points, codes.t(), alpha=-2.0).argmin(1)
