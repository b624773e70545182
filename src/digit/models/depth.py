"""Several codes at each position of a sequence: embedded as their sum, predicted one level after another.

The codes of a residual or product codebook belong to one place of the picture. As positions of their own they would
make the sequence L times as long; here the backbone takes one position for all of them, as in the RQ-Transformer (Lee
et al. 2022, "Autoregressive Image Generation using Residual Quantization"), whose small depth transformer is a
feed-forward layer for each level here:

    input       x_n = sum_l E_l[k_nl]
    level 0     logits = head_0(h_n)                                                 h_n the backbone's features
    level l     logits = head_l(h_n + W2_l GELU(W1_l norm_l(h_n + sqrt(D) sum_{j<l} E_j[k_nj])))

Tokens (B, M) hold the L codes of position 0, then those of position 1, and so on: M = N L. Each code lies in 0..V-1;
its level follows from its place.

Shapes: B sequences, N positions, L levels, V codes of each level, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.products import TiedLinear

MAX_LEVELS = 16
HIDDEN = 2  # width of a level's feed-forward layer over D


def check_levels(name: str, levels: int, length: int) -> None:
    """Raise DigitError where `length` tokens are not so many codes at each of some positions."""
    if not 1 <= levels <= MAX_LEVELS or length % levels:
        raise DigitError(f"{name} is {levels} for {length} tokens: choose 1 to {MAX_LEVELS}, a divisor of them")


def embed_codes(table: nn.Embedding, tokens: Int64[Tensor, "B M"], levels: int) -> Float[Tensor, "B N D"]:
    """The sum of the embeddings of each position's codes; level l's rows of the table begin at l V."""
    return table(tokens) if levels == 1 else embed_levels(table, tokens.unflatten(1, (-1, levels)), levels)


def embed_levels(table: nn.Embedding, codes: Int64[Tensor, "*B J"], levels: int) -> Float[Tensor, "*B D"]:
    """The sum of the embeddings of the first J of a position's codes."""
    first = torch.arange(codes.shape[-1], device=codes.device) * (table.num_embeddings // levels)
    return table(codes + first).sum(-2)


class DepthLevel(nn.Module):
    """Features of one level after the first, and `head`, its projection to logits."""

    def __init__(self, width: int, head: nn.Linear | TiedLinear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, HIDDEN * width), nn.Linear(HIDDEN * width, width)
        self.head = head

    def forward(self, features: Float[Tensor, "*B D"], lower: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What `head` takes: `features` of the backbone, `lower` the embedded codes of the levels before."""
        return features + self.fc2(F.gelu(self.fc1(self.norm(features + lower))))


def depth_flops(positions: int, levels: int, width: int) -> float:
    """Training FLOPs of the feed-forward layers of all levels after the first, without the projections to logits."""
    return 6.0 * positions * (levels - 1) * 2 * HIDDEN * width**2
