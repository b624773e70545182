"""Hidden features trained towards the tokenizer's code vectors, beside the cross-entropy, in training alone.

reAR (He et al. 2025, "reAR: Rethinking Visual Autoregressive Models via Generator-Tokenizer Consistency
Regularization", arXiv 2510.04450): a next-token model learns integers, and never sees that some codes stand for nearly
the same picture. Two small networks f read its hidden features, one in a shallow layer a, one in a deep layer b:

    loss = cross-entropy + w_c mean_i (1 - cos(f_c(h^a_i), z(x_i))) + w_n mean_i (1 - cos(f_n(h^b_i), z(x_i+1)))

h^l_i is the output of block l at the position whose input is token x_i (l = 0: the embedded input), z(x) the vector of
x in the codebook, which gets no gradient. Released weights: both 1; layers: the first block, and three quarters of the
depth (18 of 24). Where the input has other tokens in place of some, x is the image's own token all the same.

Not as released: f has one hidden layer of the model's width in place of two of 2,048, since our models are small. z is
centred, the mean vector of the codebook is taken away: two K-means centroids of a network's features have a cosine of
0.16 to 0.49 on average, two codes of a VQGAN 0.08, and a constant answer would seem that good. Of several levels, z is
the sum of the codes' vectors.

Shapes: B sequences, N positions of the target, L levels, V codes of each, C numbers of a code vector, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

CURRENT, NEXT = "current", "next"


class CodeHeads(nn.Module):
    """The networks f and the two losses.

    Args:
        codes: code vectors of the target's tokens; they are no parameters.
        width: that of the model.
        layers: for `current`, `next` or both, the number of blocks whose output is read.
        weights: the weight of each.
    """

    codes: Tensor

    def __init__(
        self, codes: Float[Tensor, "L V C"], width: int, *, layers: Mapping[str, int], weights: Mapping[str, float]
    ) -> None:
        super().__init__()
        self.num_levels, self.vocab_size, dim = codes.shape
        self.layers, self.weights = dict(layers), dict(weights)
        centred = codes.float() - codes.float().mean(1, keepdim=True)
        self.register_buffer("codes", centred.flatten(0, 1))  # (L V, C); saved, so that a crash dump is complete
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)) for name in self.layers}
        )

    def vectors(self, tokens: Int64[Tensor, "B M"]) -> Float[Tensor, "B N C"]:
        """Centred code vectors of each position of the target."""
        first = torch.arange(self.num_levels, device=tokens.device) * self.vocab_size
        return self.codes[tokens.unflatten(1, (-1, self.num_levels)) + first].sum(2)

    def forward(
        self, hidden: Sequence[Float[Tensor, "B _ D"]], target: Int64[Tensor, "B M"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The weighted losses of a batch, and the detached mean cosines {"current_cosine", "next_cosine"}.

        `hidden` has the embedded input and every block's output, (B, T, D), of the last block with a smaller T. Their
        last position is that of the last token but one, which predicts the last.
        """
        wanted, losses, metrics = self.vectors(target), [], {}
        for name, head in self.heads.items():
            known = wanted[:, : -1 if name == CURRENT else None]  # the last token is no input
            read = head(hidden[self.layers[name]][:, -known.shape[1] :])
            cosine = F.cosine_similarity(read.float(), known, dim=-1).mean()
            losses.append(self.weights[name] * (1 - cosine))
            metrics[f"{name}_cosine"] = cosine.detach()
        return torch.stack(losses).sum(), metrics


def code_head_flops(positions: int, width: int, dim: int) -> float:
    """Training FLOPs of one head over so many positions."""
    return 6.0 * positions * (width**2 + width * dim)
