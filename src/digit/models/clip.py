"""Image half of CLIP (Radford et al. 2021, section 2.4), whose embeddings CMMD compares.

Shapes: B images, S input side, N = (S / patch_size)² patches, L = 1 + N tokens, D embed_dim, E output_dim.
A pre-norm ViT with a LayerNorm before the first block, x * sigmoid(1.702 x) in place of GELU, and a projection without
bias of the class token. Heads have 64 channels, as in all models of the release.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.transformer import KeysValues, attend

HEAD_DIM = 64
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Size of the network; the defaults are ViT-L/14 at 336 px."""

    embed_dim: int = 1024
    """Channels D of a token."""
    depth: int = 24
    """Blocks."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    input_size: int = 336
    """Side S in pixels; the position table fits no other."""
    hidden_dim: int = 4096
    """Hidden width of the MLP."""
    output_dim: int = 768
    """Channels E of an embedding."""

    def __post_init__(self) -> None:
        if self.embed_dim < HEAD_DIM or self.embed_dim % HEAD_DIM:
            raise DigitError(f"CLIP: embed_dim {self.embed_dim} is no multiple of {HEAD_DIM}")


class ClipBlock(nn.Module):
    """x + attn(norm1 x), then x + mlp(norm2 x)."""

    def __init__(self, cfg: ClipConfig):
        super().__init__()
        dim = cfg.embed_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS), nn.LayerNorm(dim, eps=NORM_EPS)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, cfg.hidden_dim), nn.Linear(cfg.hidden_dim, dim)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, HEAD_DIM))  # (B, L, 3, H, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, 64)
        x = x + self.proj(attend(q, KeysValues(k, v)).transpose(1, 2).flatten(2))
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class ClipVision(nn.Module):
    """Normalised images to embeddings."""

    def __init__(self, cfg: ClipConfig):
        super().__init__()
        self.cfg, dim = cfg, cfg.embed_dim
        self.patch_embed = nn.Conv2d(3, dim, cfg.patch_size, cfg.patch_size, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(dim))
        self.pos_embed = nn.Parameter(torch.zeros(1 + (cfg.input_size // cfg.patch_size) ** 2, dim))
        self.norm_pre, self.norm = nn.LayerNorm(dim, eps=NORM_EPS), nn.LayerNorm(dim, eps=NORM_EPS)
        self.blocks = nn.ModuleList(ClipBlock(cfg) for _ in range(cfg.depth))
        self.head = nn.Linear(dim, cfg.output_dim, bias=False)

    def forward(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B E"]:
        """Normalised images to embeddings, whose length is not 1."""
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat((self.cls_token.expand(len(x), 1, -1), patches), dim=1) + self.pos_embed
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))
