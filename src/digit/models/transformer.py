"""The released transformer (fairseq's decoder without encoder attention; paper, section 3 and appendix A.3).

Shapes: B sequences, T positions, D width, H heads, d = D / H; tables of rotary positions (T, 2, d/2).
Prior: post-norm without a final norm. Renderer and VQ-only baselines: pre-norm with a final LayerNorm.
One backbone serves next-token models (causal) and masked ones (bidirectional).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.positions import Places, line_places, rotary_table, rotate

CACHE_SPAN = 32  # positions
StepKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`step_kernel.step_attention`: q, k, v (B, H, 1, d), keys and values (B, H, t, d), position (1,) to (B, H, 1, d)."""
Added = Mapping[int, Tensor]
"""Number of a block to what is added to its input, (B, T, D)."""
MAX_DEPTH, MAX_MLP_RATIO = 1024, 1024  # larger numbers in a file are errors, and would take hours to build


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of the backbone."""

    depth: int = 16
    """Number of blocks."""
    embed_dim: int = 1024
    """Width of the residual stream."""
    num_heads: int = 16
    """Attention heads; divides embed_dim."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward layer over embed_dim."""
    norm: Literal["post", "pre"] = "post"
    """post: LayerNorm after each residual sum (the prior); pre: before each branch and at the end (all others)."""
    dropout: float = 0.1
    """Dropout on the embeddings and on each residual branch; attention weights and activations get none."""
    qk_norm: bool = False
    """Divide queries and keys of each head by their root mean square, times a learned gain for each of its channels
    (Dehghani et al. 2023, section 2). The paper's models do not."""
    rotary: Literal["none", "1d", "2d"] = "none"
    """Rotary positions in attention: by the place in the sequence, or by row and column of the token's cell in the
    picture (`models/positions.py`). The paper's models have none."""

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_heads"):
            if getattr(self, name) < 1:
                raise DigitError(f"{name} is {getattr(self, name)}: at least 1")
        if not 1 <= self.depth <= MAX_DEPTH:
            raise DigitError(f"depth is {self.depth}: choose 1 to {MAX_DEPTH} blocks")
        if not 0 < self.mlp_ratio <= MAX_MLP_RATIO or self.mlp_dim < 1:
            raise DigitError(f"mlp_ratio is {self.mlp_ratio}: choose above 0, up to {MAX_MLP_RATIO}")
        if self.embed_dim % self.num_heads:
            raise DigitError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}: change one")
        if self.norm not in ("post", "pre"):
            raise DigitError(f"norm is {self.norm!r}: choose post or pre")
        if not 0 <= self.dropout < 1:
            raise DigitError(f"dropout is {self.dropout}: choose a fraction from 0 to below 1")
        if self.rotary not in (axes := {"none": 0, "1d": 1, "2d": 2}):
            raise DigitError(f"rotary is {self.rotary!r}: choose none, 1d or 2d")
        if (parts := 2 * axes[self.rotary]) and self.head_dim % parts:
            raise DigitError(
                f"rotary {self.rotary} needs heads of a width that {parts} divides, embed_dim {self.embed_dim} over "
                f"num_heads {self.num_heads} is {self.head_dim}: change one, or set rotary to none"
            )

    @property
    def head_dim(self) -> int:
        """Width d of a head."""
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Width of the feed-forward layer."""
        return round(self.embed_dim * self.mlp_ratio)


class KVCache:
    """Keys and values of the positions seen so far, (depth, B, H, span, d), filled from the front.

    The span grows by CACHE_SPAN positions: matrix kernels read a dense block, and would copy a slice of a longer one.
    `position` is where the next input starts; the backbone advances it after each forward. Only for use
    without gradients. `rotations` is the table of rotary positions of all max_len positions, if the model has them.
    """

    def __init__(
        self, cfg: TransformerConfig, batch: int, max_len: int, like: Tensor, rotations: Tensor | None = None
    ) -> None:
        empty = like.new_zeros(cfg.depth, batch, cfg.num_heads, 0, cfg.head_dim)
        self.rotations = rotations
        self.keys, self.values, self.max_len, self.position = empty, empty, max_len, 0
        self.mask: Tensor | None = None

    def reserve(self, length: int) -> None:
        """Make room for `length` positions; new ones are zeros."""
        span = self.keys.shape[3]
        assert length <= self.max_len, f"cache of {self.max_len} positions asked to hold {length}"
        if length > span:
            more = (0, 0, 0, min(self.max_len, -(-length // CACHE_SPAN) * CACHE_SPAN) - span)
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        """Store (B, H, n, d) at `position`; returns what the new positions attend to."""
        end = self.position + k.shape[2]
        assert self.position == 0 or k.shape[2] == 1, "past an empty cache, positions come one at a time"
        self.reserve(end)
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, self.position, k.shape[2]).copy_(k)
        values.narrow(2, self.position, k.shape[2]).copy_(v)
        if self.position == 0:
            return KeysValues(k, v)
        if layer == 0:  # the others see the same
            self.mask = self.keys.new_zeros(1, self.keys.shape[3])
            self.mask[:, end:] = float("-inf")
        return KeysValues(keys, values, self.mask)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (B, H, n, d) and attend to all positions up to theirs: (B, H, n, d)."""
        return attend(q, self.extend(layer, k, v))

    def rotation(self, length: int) -> Tensor | None:
        """Rotary positions of the next `length` positions."""
        return None if self.rotations is None else self.rotations[self.position : self.position + length]

    def advance(self, length: int) -> None:
        """All layers have stored `length` positions."""
        self.position += length


class SteppedCache:
    """A filled KVCache for steps of one position whose shapes and addresses never change, as a CUDA graph needs it.

    The position is a number on the device, (1,) int64. `kernel` reads the cache up to it. Without one, attention reads
    all `span` positions, and a mask hides those past it.
    """

    def __init__(self, cache: KVCache, position: Tensor, span: int, kernel: StepKernel | None = None) -> None:
        self.keys, self.values = cache.keys[:, :, :, :span], cache.values[:, :, :, :span]
        self.position, self.kernel, self.mask, self.rotations = position, kernel, None, cache.rotations
        if kernel is None:
            unseen = torch.arange(span, device=position.device) > position
            self.mask = self.keys.new_zeros(1, span).masked_fill_(unseen, float("-inf"))

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        """Store (B, H, 1, d) at the position; returns what it attends to, for steps without a kernel."""
        assert self.kernel is None
        self.keys[layer].index_copy_(2, self.position, k)
        self.values[layer].index_copy_(2, self.position, v)
        return KeysValues(self.keys[layer], self.values[layer], self.mask)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (B, H, 1, d) and attend to all positions up to theirs: (B, H, 1, d)."""
        if self.kernel is None:
            return attend(q, self.extend(layer, k, v))
        return self.kernel(q, k, v, self.keys[layer], self.values[layer], self.position)

    def rotation(self, length: int) -> Tensor | None:
        """Rotary positions of the next position; `length` is 1."""
        return None if self.rotations is None else self.rotations.index_select(0, self.position)

    def advance(self, length: int) -> None:
        """The next step's position."""
        self.position += length


class Dropout(nn.Module):
    """Inverted dropout. On CPU the mask takes 16 random bits per element, 3.5 times as fast as torch's Bernoulli."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        drop = round(self.p * 2**16)  # p is met to within 2**-17
        keep = torch.empty_like(x, requires_grad=False)
        torch.ge(bits, drop - 2**15, out=keep)  # written in x's type: a mask of bools would be copied at each product
        return x * keep.mul_(1 / (1 - drop / 2**16))


class KeysValues(NamedTuple):
    """Keys and values (B, H, t, d), and, if some are hidden, an additive mask (n, t) of 0 and -inf."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


def attend(q: Float[Tensor, "B H N C"], seen: KeysValues, *, causal: bool = False) -> Float[Tensor, "B H N C"]:
    """softmax(q k^T / sqrt(d)) v for (B, H, n, d) queries over (B, H, t, d); causal needs n == t.

    Uses torch's fused kernel, except on CPU in half precision or for one query: there two batched matmuls and a softmax
    are 3 to 10 times as fast (measured at 64 to 256 positions, torch 2.13, AVX-512 bf16).
    """
    keys, values, mask = seen
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type != "cpu" or not (half or q.shape[2] == 1):
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal)
    batch, heads, n, width = q.shape
    table, scale = keys.flatten(0, 1).transpose(1, 2), width**-0.5  # (B * H, d, t)
    if n == 1:
        scores = torch.bmm((q * scale).view(-1, 1, width), table)  # (B * H, 1, t); the product is dense, q need not be
        if mask is not None:
            scores += mask
    else:
        bias = q.new_full((n, n), float("-inf")).triu_(1) if causal else q.new_zeros(())
        scores = torch.baddbmm(bias, q.flatten(0, 1), table, beta=float(causal), alpha=scale)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(batch, heads, n, width)


class Attention(nn.Module):
    """Multi-head self-attention with biases; q, k and v come out of one matmul."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.embed_dim, 3 * cfg.embed_dim)
        self.out = nn.Linear(cfg.embed_dim, cfg.embed_dim)
        self.qk_norm, self.rotary = cfg.qk_norm, cfg.rotary != "none"
        if cfg.qk_norm:
            self.q_gain, self.k_gain = (nn.Parameter(torch.ones(cfg.head_dim)) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool,
        layer: int,
        cache: KVCache | SteppedCache | None,
        first: int = 0,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) to (B, T - first, D): the outputs of positions from `first` on."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        if x.device.type == "cpu" and length > 1:  # batched products need dense blocks; a GPU's kernels take views
            q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()  # (B, H, T, d) each
        else:
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = self.with_positions(q, k, rotation)
        seen = KeysValues(k, v) if cache is None else cache.extend(layer, k, v)
        y = attend(q, seen, causal=causal and length > 1)[:, :, first:]  # (B, H, T - first, d)
        return self.out(y.transpose(1, 2).reshape(batch, length - first, width))

    def with_positions(self, q: Tensor, k: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, H, n, d), normalised and turned where the model does so.

        The paper's models learn a table that `SequenceModel.with_positions` adds to the input, so no position enters
        here. `rotation` has the rotary positions of these n positions. Training, the first pass of decoding and each
        cached step (models/decoding.py) all call it.
        """
        if self.qk_norm:
            width = (q.shape[-1],)
            q, k = F.rms_norm(q, width, self.q_gain.to(q.dtype)), F.rms_norm(k, width, self.k_gain.to(k.dtype))
        if not self.rotary:
            return q, k
        assert rotation is not None, "a cache of a model with rotary positions needs their table: Transformer.rotations"
        return rotate(q, rotation), rotate(k, rotation)


class MLP(nn.Module):
    """Two layers with the exact GELU between."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(cfg.embed_dim, cfg.mlp_dim)
        self.fc2 = nn.Linear(cfg.mlp_dim, cfg.embed_dim)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and feed-forward with residual sums, post- or pre-norm."""

    def __init__(self, cfg: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.pre, self.layer = cfg.norm == "pre", layer
        self.attention, self.mlp = Attention(cfg), MLP(cfg)
        self.norm1, self.norm2 = nn.LayerNorm(cfg.embed_dim), nn.LayerNorm(cfg.embed_dim)
        self.dropout = Dropout(cfg.dropout)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool,
        cache: KVCache | SteppedCache | None,
        first: int = 0,
        rotation: Tensor | None = None,
    ) -> Tensor:
        # the number matters to a cache alone; read without one, it would make the compiler treat each block as another
        layer = 0 if cache is None else self.layer
        how = dict(causal=causal, layer=layer, cache=cache, first=first, rotation=rotation)
        if self.pre:
            x = x[:, first:] + self.dropout(self.attention(self.norm1(x), **how))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x[:, first:] + self.dropout(self.attention(x, **how)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Transformer(nn.Module):
    """`depth` blocks, and the final norm where they are pre-norm.

    `places` says where each position lies, for rotary positions; by default on a line.
    """

    def __init__(self, cfg: TransformerConfig, places: Places | None = None) -> None:
        super().__init__()
        assert cfg.rotary != "2d" or places is not None, "rotary 2d needs the places of a grid"
        self.rotary, self.head_dim, self.places = cfg.rotary != "none", cfg.head_dim, places or line_places
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.depth))
        self.final_norm = nn.LayerNorm(cfg.embed_dim) if cfg.norm == "pre" else nn.Identity()

    def rotations(self, length: int, device: torch.device) -> Tensor | None:
        """The table of rotary positions (length, 2, d/2) of the first positions; None for a model without them."""
        return rotary_table(self.places(length, device), self.head_dim) if self.rotary else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        causal: bool,
        first: int = 0,
        cache: KVCache | SteppedCache | None = None,
        added: Added | None = None,
        hidden: list[Tensor] | None = None,
        rotation: Tensor | None = None,
    ) -> Float[Tensor, "B T-{first} D"]:
        """Features after the last block and the final norm, of positions from `first` on.

        Args:
            x: embedded input; with a cache that is not empty, one position.
            causal: whether position t sees positions up to t alone.
            first: earlier outputs are not returned, and the last block skips their feed-forward layer.
            cache: keys and values of earlier positions; extended by these.
            added: what is added to the input of some blocks (an aligned prefix).
            hidden: list that gets the input and every block's output (before the final norm) appended: all positions,
                of the last block those from `first` on.
            rotation: rotary positions of each sequence, (B, T, 2, d/2), where they are not in the order of `places`.
        """
        if hidden is not None:
            hidden.append(x)
        length = x.shape[1]
        if rotation is None:
            rotation = self.rotations(length, x.device) if cache is None else cache.rotation(length)
        for number, block in enumerate(self.blocks):
            last = block is self.blocks[-1]
            if added and number in added:
                x = x + added[number]
            x = block(x, causal=causal, cache=cache, first=first if last else 0, rotation=rotation)
            if hidden is not None:
                hidden.append(x)
        if cache is not None:
            cache.advance(length)
        return self.final_norm(x)
