"""The released prior's incremental decoding, rendered in plain torch: the peer of `compare.py --only released`.

The same steps in the same order as the released code's decoder, which is fairseq's: separate projections of query, key
and value; a cache that `torch.cat` lengthens by a position at every step; two batched products around a softmax in
float32; post-norm blocks with exact GELU; symbols that are never drawn; top-k of the log probabilities in float32. What
fairseq does beside these (padding masks, finished sequences, reordering of the cache) is left out, so it is a little
faster than the released code. Weights are random.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.models.sequence import SequenceConfig

SPECIAL = 5  # symbols before the codes: bos, pad, eos, unk, <n>
START = 2  # eos begins a sequence


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        """x (1, B, D), the newest position -> (1, B, D); `cache` has the keys and values of those before."""

        def split(y: Tensor) -> Tensor:
            return y.contiguous().view(1, -1, self.head_dim).transpose(0, 1)  # (B heads, 1, head_dim)

        q, k, v = split(self.q(x) * self.head_dim**-0.5), split(self.k(x)), split(self.v(x))
        if cache:
            k, v = torch.cat([cache["k"], k], dim=1), torch.cat([cache["v"], v], dim=1)
        cache["k"], cache["v"] = k, v
        scores = torch.bmm(q, k.transpose(1, 2))
        attention = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
        return self.out(torch.bmm(attention, v).transpose(0, 1).contiguous().view_as(x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention, self.attention_norm = Attention(dim, heads), nn.LayerNorm(dim)
        self.fc1, self.fc2, self.norm = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        x = self.attention_norm(x + self.attention(x, cache))
        return self.norm(x + self.fc2(F.gelu(self.fc1(x))))


class PlainPrior(nn.Module):
    """A prior without labels in the shape of `cfg`, its vocabulary with the released symbols."""

    def __init__(self, cfg: SequenceConfig):
        super().__init__()
        self.length, symbols, dim = cfg.target_len, cfg.vocab_size + SPECIAL, cfg.embed_dim
        self.embedding, self.positions = nn.Embedding(symbols, dim), nn.Embedding(self.length + 2, dim)
        self.blocks = nn.ModuleList(Block(dim, cfg.num_heads) for _ in range(cfg.depth))
        self.output = nn.Linear(dim, symbols, bias=False)

    @torch.no_grad()
    def sample(self, batch_size: int, top_k: int) -> Tensor:
        """(B, N) int64 codes, N tokens each."""
        device = self.output.weight.device
        tokens = torch.full((batch_size, 1), START, device=device)
        caches: list[dict[str, Tensor]] = [{} for _ in self.blocks]
        for step in range(self.length):
            position = torch.tensor(step, device=device)
            x = self.embedding(tokens[:, -1:]) * self.embedding.embedding_dim**0.5 + self.positions(position)
            x = x.transpose(0, 1)
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block(x, cache)
            log_p = F.log_softmax(self.output(x.transpose(0, 1))[:, -1], dim=-1, dtype=torch.float32)
            log_p[:, :SPECIAL] = -torch.inf
            kept, symbols = log_p.topk(min(top_k, log_p.shape[1] - SPECIAL))
            drawn = torch.multinomial(kept.exp(), 1)
            tokens = torch.cat([tokens, symbols.gather(1, drawn)], dim=1)
        return tokens[:, 1:] - SPECIAL
