"""One model over one sequence layout: prior, renderers and VQ-only baselines (paper, section 3 and 4.3; A.3).

    next-token   [prefix (P) | start or class | target 0 .. M-2]   causal; the output at P + i predicts target i
    masked       [prefix (P) | start or class | target 0 .. M-1]   bidirectional; the output at P + 1 + i is target i's

Shapes: B sequences, P prefix tokens, M target tokens, V target codes, D width. Of a codebook with several levels, L
tokens share a position (`models/depth.py`): the sequence then has P / L and M / L positions. As released, prefix and
[start | target] have a position table each, embeddings are scaled by sqrt(D) before positions are added, and the input
embedding and the output projection are separate. Not as released: no special symbols (released decoding forbids them),
so the softmax is over codes alone and no end-of-sequence symbol is predicted. Nor is an aligned prefix
(`models/aligned.py`), which is added to the target's positions: no position stands before the start symbol then.

Random order (RAR, Yu et al. 2024, "Randomized Autoregressive Visual Generation", section 3.2): training may put the
target's positions into an order of each sequence's own. A second position table tells each of them which place it
predicts next. In raster order the sum of both tables is one table, so a trained model has no second one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from digit.errors import DigitError, MismatchError
from digit.models.aligned import AlignedPrefix, check_grid
from digit.models.code_heads import CodeHeads
from digit.models.depth import DepthLevel, check_levels, depth_flops, embed_codes, embed_levels
from digit.models.losses import linear_cross_entropy
from digit.models.positions import grid_places, line_places, sincos_2d
from digit.models.products import PackedLinear, TiedLinear
from digit.models.tokens import Integers, as_integers, as_tokens, require_range
from digit.models.transformer import MAX_DEPTH, Added, Dropout, KVCache, Transformer, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class SequenceConfig(TransformerConfig):
    """Vocabularies and lengths of a sequence model, and its backbone."""

    vocab_size: int
    """Number V of target codes."""
    target_len: int
    """Number M of target tokens."""
    prefix_vocab_size: int = 0
    """Number of prefix codes; 0 together with prefix_len 0 is a model without prefix."""
    prefix_len: int = 0
    """Number P of prefix tokens; may differ from target_len."""
    num_classes: int = 0
    """Classes whose embedding can stand in for the start symbol; 0 is an unconditional model."""
    levels: int = 1
    """Codes at each position of the target, which follow one another in its tokens (a residual or product codebook)."""
    prefix_levels: int = 1
    """The same of the prefix."""
    masked: bool = False
    """Masked-token model (MaskGIT) rather than next-token model."""
    label_dropout: float = 0.0
    """Fraction of training sequences that see the plain start symbol, not their class (for guidance; paper: 0)."""
    prefix_dropout: float = 0.0
    """Fraction of training sequences that see a learned null prefix (for guidance; paper: 0)."""
    conditioning: Literal["prefix", "aligned"] = "prefix"
    """prefix: its tokens stand before the start symbol, as in the paper; aligned: an encoder reads them, and its output
    is added where each target token is predicted."""
    encoder_depth: int = 1
    """Blocks of the encoder of an aligned prefix; bidirectional, of the model's width."""
    added_blocks: int = 2
    """Blocks to whose input an aligned prefix is added, evenly spaced from the first; at most depth."""
    prefix_rows: int = 0
    """Rows of the prefix's grid, for an aligned prefix and for rotary 2d."""
    target_rows: int = 0
    """Rows of the target's grid, for an aligned prefix and for rotary 2d."""
    learned_positions: bool = True
    """Position tables, added to the embeddings as in the paper; a model without them has rotary positions alone."""
    tied_embeddings: bool = False
    """Logits are the products with the embeddings of the target's codes, without an output projection of their own."""
    random_order: bool = False
    """A table that tells each position which place it predicts next, for training in random orders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.vocab_size, self.target_len) < 1:
            raise DigitError(f"vocab_size {self.vocab_size} and target_len {self.target_len} must both be at least 1")
        if (least := min(self.prefix_len, self.prefix_vocab_size, self.num_classes)) < 0:
            raise DigitError(f"prefix_len, prefix_vocab_size and num_classes cannot be below 0, one is {least}")
        if (self.prefix_len > 0) != (self.prefix_vocab_size > 0):
            raise DigitError(
                f"prefix_len is {self.prefix_len} and prefix_vocab_size {self.prefix_vocab_size}: set both, or neither"
            )
        check_levels("levels", self.levels, self.target_len)
        check_levels("prefix_levels", self.prefix_levels, self.prefix_len)
        if self.masked and self.levels > 1:
            raise DigitError(f"levels is {self.levels}, but a masked model predicts one code a position: set it to 1")
        for name, rate, needed in (
            ("label_dropout", self.label_dropout, self.num_classes),
            ("prefix_dropout", self.prefix_dropout, self.prefix_len),
        ):
            if not 0 <= rate <= 1:
                raise DigitError(f"{name} is {rate}: choose a fraction from 0 to 1")
            if rate and not needed:
                raise DigitError(f"{name} is {rate}, but the model has no {name.split('_')[0]}: set it to 0")
        if self.conditioning not in ("prefix", "aligned"):
            raise DigitError(f"conditioning is {self.conditioning!r}: choose prefix or aligned")
        if self.aligned:
            self._check_aligned()
        if self.rotary == "2d":
            check_grid("target", self.target_places, self.target_rows)
            if self.prefix_len:
                check_grid("prefix", self.prefix_places, self.prefix_rows)
        if not self.learned_positions and self.rotary == "none":
            raise DigitError("learned_positions is false, so the model needs rotary positions: set rotary to 1d or 2d")
        if self.random_order and self.masked:
            raise DigitError("random_order is for next-token models, a masked model knows no order: leave it out")
        if self.random_order and not self.learned_positions:
            raise DigitError("random_order needs position tables: set learned_positions to true")

    def _check_aligned(self) -> None:
        if not self.prefix_len:
            raise DigitError("conditioning is aligned, but the model has no prefix: choose prefix")
        check_grid("prefix", self.prefix_places, self.prefix_rows)
        check_grid("target", self.target_places, self.target_rows)
        for name, value, most in (
            ("encoder_depth", self.encoder_depth, MAX_DEPTH),
            ("added_blocks", self.added_blocks, self.depth),
        ):
            if not 1 <= value <= most:
                raise DigitError(f"{name} is {value}: choose 1 to {most}")

    @property
    def aligned(self) -> bool:
        """Whether the prefix is added rather than put before the start symbol."""
        return self.conditioning == "aligned"

    @property
    def target_places(self) -> int:
        """Positions of the target: one for all codes of a place."""
        return self.target_len // self.levels

    @property
    def prefix_places(self) -> int:
        """Positions of the prefix, as `target_places`."""
        return self.prefix_len // self.prefix_levels

    @property
    def start_position(self) -> int:
        """Position of the start symbol: the prefix's positions, or 0 where the prefix is aligned."""
        return 0 if self.aligned else self.prefix_places

    @property
    def num_positions(self) -> int:
        """Positions of the whole sequence, with the last target token."""
        return self.start_position + 1 + self.target_places

    def places(self, length: int, device: torch.device) -> Float[Tensor, "T A"]:
        """Where each of the first positions lies, for rotary positions: in the sequence, or on the target's grid.

        On the grid a prefix token has the place that it covers in the picture, and the start symbol (-1, -1).
        """
        if self.rotary != "2d":
            return line_places(length, device)
        grid = self.target_rows, self.target_places // self.target_rows
        places = [torch.full((1, 2), -1.0, device=device), grid_places(grid, grid, self.target_places, device)]
        if self.start_position:
            prefix_grid = self.prefix_rows, self.prefix_places // self.prefix_rows
            places.insert(0, grid_places(prefix_grid, grid, self.prefix_places, device))
        return torch.cat(places)[:length]

    @property
    def trained(self) -> SequenceConfig:
        """The configuration of the model once it is trained (`SequenceModel.end_random_order`)."""
        return replace(self, random_order=False)

    @property
    def kind(self) -> str:
        """Name of this kind of model in `sampling.kinds.KINDS`."""
        return "masked" if self.masked else "next_token"

    def to_dict(self) -> dict[str, Any]:
        """What NAME.json of a saved model holds: its kind and every setting."""
        return {"kind": self.kind} | asdict(self)

    @property
    def mask_token(self) -> int:
        """Input id that hides a target token in a masked model."""
        return self.vocab_size


class SequenceModel(nn.Module):
    """Transformer over [prefix | start | target] with logits over the target's codes."""

    uses_every_parameter = True  # in the loss of every batch, with or without labels

    def __init__(self, cfg: SequenceConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.embed_dim
        self.token_embed = nn.Embedding(cfg.levels * cfg.vocab_size + cfg.masked, width)  # the last row hides a token
        self.start_embed = nn.Embedding(1 + cfg.num_classes, width)  # row 0 plain start, row 1 + c class c
        self.positions = self._table(1 + cfg.target_places)  # of [start | target]
        if cfg.random_order:
            self.next_positions = self._table(cfg.target_places)  # of the place predicted next
        if cfg.prefix_len:
            self.prefix_embed = nn.Embedding(cfg.prefix_levels * cfg.prefix_vocab_size, width)
            self.prefix_positions = self._table(cfg.prefix_places)
        if cfg.prefix_dropout:
            self.null_prefix = nn.Parameter(torch.empty(width))
        if cfg.aligned:
            self.aligned = AlignedPrefix(
                TransformerConfig(
                    depth=cfg.encoder_depth,
                    embed_dim=width,
                    num_heads=cfg.num_heads,
                    mlp_ratio=cfg.mlp_ratio,
                    norm="pre",
                    dropout=cfg.dropout,
                    qk_norm=cfg.qk_norm,
                    rotary=cfg.rotary,
                ),
                grid=(cfg.prefix_rows, cfg.prefix_places // cfg.prefix_rows),
                target_grid=(cfg.target_rows, cfg.target_places // cfg.target_rows),
                blocks=[i * cfg.depth // cfg.added_blocks for i in range(cfg.added_blocks)],
            )
        self.dropout = Dropout(cfg.dropout)
        self.transformer = Transformer(cfg, cfg.places)
        self.head = self._head(0)
        if cfg.levels > 1:
            self.depth = nn.ModuleList(DepthLevel(width, self._head(level)) for level in range(1, cfg.levels))
        self.code_heads: CodeHeads | None = None  # of a training that has their losses, which takes them away again
        self.reset_parameters()

    def _table(self, num: int) -> Any:
        """A position table for `num` positions, a parameter; None for a model without learned positions."""
        return nn.Parameter(torch.empty(num, self.cfg.embed_dim)) if self.cfg.learned_positions else None

    def _head(self, level: int) -> nn.Linear | TiedLinear:
        """The projection to the logits of a level's codes."""
        cfg = self.cfg
        if cfg.tied_embeddings:
            return TiedLinear(self.token_embed, level * cfg.vocab_size, cfg.vocab_size)
        return nn.Linear(cfg.embed_dim, cfg.vocab_size, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The released initialisation: N(0, 1/D) tables and output projection, Xavier-uniform matrices, zero biases."""
        width = self.cfg.embed_dim
        for name, parameter in self.named_parameters():
            level = name.startswith("depth.") and not name.endswith("head.weight")  # as the blocks' own layers
            if "transformer" not in name and not level:  # tables, positions, projections
                nn.init.normal_(parameter, std=width**-0.5)
            elif "norm" in name:
                nn.init.constant_(parameter, float(name.endswith("weight")))
            elif name.endswith("gain"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "qkv" in name:  # three square matrices in one
                for matrix in parameter.chunk(3):
                    nn.init.xavier_uniform_(matrix, gain=2**-0.5)
            else:
                nn.init.xavier_uniform_(parameter)

    @torch.no_grad()
    def start_from_codes(self, codes: Float[Tensor, "V C"], prefix_codes: Float[Tensor, "K E"] | None = None) -> None:
        """Set token tables and output projection from code vectors, so that near codes start with near embeddings.

        Not as released (random tables); for short training: on CIFAR-10 tokens a renderer gains 0.35 nats a token in
        its first 10,000 images. Of several levels, the codes of each follow those of the one before. Vectors are
        standardised and turned into the model's width by a random orthogonal map.
        """
        self.token_embed.weight[: len(codes)] = lift(codes, self.cfg.embed_dim)
        for head, rows in zip(self.heads, self.token_embed.weight[: len(codes)].chunk(self.cfg.levels), strict=True):
            if not self.cfg.tied_embeddings:
                head.weight.copy_(rows)
        if prefix_codes is not None and self.cfg.prefix_len:
            self.prefix_embed.weight.copy_(lift(prefix_codes, self.cfg.embed_dim))

    @torch.no_grad()
    def start_from_places(self, grid: tuple[int, int], prefix_grid: tuple[int, int] | None = None) -> None:
        """Set position tables from places in the picture, so that near tokens, prefix and target alike, start near.

        Not as released (random tables); for short training: a renderer of rendered shapes gains 0.3 nats a token in its
        first 24,000 images. One half of a row says where its token is, the other where the token that it predicts is; a
        random orthogonal map mixes both. `grid` and `prefix_grid` are (rows, columns) of target and prefix.
        """
        width = self.cfg.embed_dim
        half = width // 2
        if half < 4 or not self.cfg.learned_positions:
            return  # too narrow for a sine and a cosine of row and column, the random table stays; or there is none
        finest = max(*grid, *(prefix_grid or ()))
        nowhere = torch.zeros(1, half)
        own = grid_positions(grid, half, finest)  # (M, D / 2)
        after_start = torch.cat([nowhere, own])
        predicted = after_start if self.cfg.masked else torch.cat([own, nowhere])
        turn = torch.linalg.qr(torch.randn(width, width))[0][: 2 * half]
        if self.cfg.random_order:
            self.next_positions.copy_(torch.cat([torch.zeros_like(own), own], 1) @ turn)
            predicted = torch.zeros_like(predicted)
        self.positions.copy_(torch.cat([after_start, predicted], 1) @ turn)
        if self.cfg.prefix_len:
            assert prefix_grid is not None, "a model with a prefix needs the grid of its prefix"
            self.prefix_positions.copy_(grid_positions(prefix_grid, half, finest).repeat(1, 2) @ turn)

    @property
    def heads(self) -> list[nn.Linear | TiedLinear | PackedLinear]:
        """The projection to logits of each level."""
        levels: Any = self.depth if self.cfg.levels > 1 else ()
        return [self.head, *(level.head for level in levels)]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.start_embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.start_embed.weight.dtype

    def hidden_matrices(self) -> list[tuple[nn.Parameter, int]]:
        """Weight matrices inside the blocks, each with the number of equal ones stacked in it (q, k and v: 3)."""
        parts = [self.transformer, *([self.aligned] if self.cfg.aligned else [])]
        parts += [layer for level in self.depth for layer in (level.fc1, level.fc2)] if self.cfg.levels > 1 else []
        found = [pair for part in parts for pair in part.named_parameters()]
        return [(p, 3 if "qkv" in name else 1) for name, p in found if p.ndim == 2]

    # ---------------------------------------------------------------- embedding

    def embed(
        self,
        target: Int64[Tensor, "B L"],
        prefix: Int64[Tensor, "B P"] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
        drop_prefix: Bool[Tensor, " B"] | None = None,
        order: Int64[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Embedded [prefix | start | target] with positions, T = P + 1 + L; with an aligned prefix [start | target].

        `drop_prefix` marks rows that see the null prefix. Of several levels, P and L count positions. `order` has the
        places of a sequence's positions where they do not follow raster order.
        """
        batch = target.shape[0]  # len() would bake the number of images into an exported graph
        start = self.start_embed(self._start_rows(labels, batch, target.device))  # (B, D)
        embedded = embed_codes(self.token_embed, target, self.cfg.levels)
        tokens = torch.cat([start[:, None], embedded], dim=1)  # (B, 1 + L, D)
        x = self.with_positions(tokens, self.target_positions(tokens.shape[1], order))
        if not self.cfg.prefix_len:
            if prefix is not None:
                raise DigitError("this model takes no prefix (prefix_len 0): leave it out, or use a renderer")
            return x
        if self.cfg.aligned:
            return x  # `added` has the prefix
        before = self.with_positions(self._prefix(prefix, batch, drop_prefix), self.prefix_positions)  # (B, P, D)
        return torch.cat([before, x], dim=1)

    def target_positions(
        self, length: int, order: Int64[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "*B L D"] | None:
        """What the position tables add to the first `length` positions of [start | target]; None without tables."""
        if not self.cfg.random_order:
            return None if self.positions is None else self.positions[:length]
        following = F.pad(self.next_positions, (0, 0, 0, 1))  # after the last position comes none
        if order is None:
            return (self.positions + following)[:length]
        own, predicted = F.pad(order + 1, (1, 0)), F.pad(order, (0, 1), value=self.cfg.target_places)  # (B, 1 + N)
        return F.embedding(own[:, :length], self.positions) + F.embedding(predicted[:, :length], following)

    @torch.no_grad()
    def end_random_order(self) -> None:
        """Add up the two position tables, once the model is trained: the same logits, to the bit, in raster order."""
        if self.cfg.random_order:
            self.positions[:-1] += self.next_positions
            del self.next_positions
            self.cfg = self.cfg.trained

    def added(
        self,
        batch: int,
        prefix: Int64[Tensor, "B P"] | None = None,
        drop_prefix: Bool[Tensor, " B"] | None = None,
    ) -> Added:
        """What an aligned prefix adds to the input of some blocks: {block: (B, 1 + M, D)}; {} for any other model.

        Row t belongs to position t of [start | target]. Each target token's part is added where it is predicted: one
        position earlier in a next-token model.
        """
        if not self.cfg.aligned:
            return {}
        x = self.with_positions(self._prefix(prefix, batch, drop_prefix), self.prefix_positions)  # (B, P, D)
        place = (0, 0, 1, 0) if self.cfg.masked else (0, 0, 0, 1)
        return {block: F.pad(more, place) for block, more in self.aligned(self.dropout(x)).items()}

    def embed_token(
        self, token: Int64[Tensor, " B"] | Int64[Tensor, "B L"], index: int | Int64[Tensor, " 1"]
    ) -> Float[Tensor, "B D"]:
        """Embedded target token number `index` (a number, or one on the device), as `embed` gives it.

        Of several levels: the codes (B, L) of position number `index`.
        """
        levels = self.cfg.levels
        embedded = self.token_embed(token) if levels == 1 else embed_levels(self.token_embed, token, levels)
        table = self.target_positions(1 + self.cfg.target_places)
        return self.with_positions(embedded, None if table is None else table[1 + index])

    def level_features(self, features: Float[Tensor, "*B D"], lower: Int64[Tensor, "*B J"]) -> Float[Tensor, "*B D"]:
        """What the head of level J takes, from the backbone's features and the codes of the levels before it."""
        if not lower.shape[-1]:
            return features
        level = self.depth[lower.shape[-1] - 1]
        assert isinstance(level, DepthLevel)
        embedded = embed_levels(self.token_embed, lower, self.cfg.levels) * math.sqrt(self.cfg.embed_dim)
        return level(features, embedded.to(features.dtype))

    def level_logits(self, features: Float[Tensor, "*B D"], lower: Int64[Tensor, "*B J"]) -> Float[Tensor, "*B V"]:
        """Logits of a position's code of level J."""
        return self.heads[lower.shape[-1]](self.level_features(features, lower))

    def with_positions(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """sqrt(D) tokens + positions, (..., D). All position tables enter here, in training and in cached decoding."""
        if positions is None:
            return tokens * math.sqrt(self.cfg.embed_dim)
        return torch.add(positions, tokens, alpha=math.sqrt(self.cfg.embed_dim))

    def _start_rows(self, labels: Tensor | None, batch: int, device: torch.device) -> Tensor:
        if labels is None:
            return torch.zeros(batch, dtype=torch.int64, device=device)
        if not self.cfg.num_classes:
            raise DigitError("this model knows no classes (num_classes 0): leave the labels out")
        return labels + 1  # -1, no label, is the plain start symbol

    def _prefix(self, prefix: Tensor | None, batch: int, drop: Tensor | None) -> Tensor:
        """Prefix embeddings (B, P, D), the learned null prefix where dropped or absent."""
        if not self.cfg.prefix_dropout and (prefix is None or drop is not None):
            raise DigitError(
                f"this model needs a prefix of {self.cfg.prefix_len} tokens: pass prefix=, "
                "or train with prefix_dropout above 0 to sample without one"
            )
        if prefix is None:
            return self.null_prefix.expand(batch, self.cfg.prefix_places, -1)
        if prefix.shape[1] != self.cfg.prefix_len:
            raise DigitError(f"prefix has {prefix.shape[1]} tokens, the model was built for {self.cfg.prefix_len}")
        x = embed_codes(self.prefix_embed, prefix, self.cfg.prefix_levels)  # (B, P, D)
        return x if drop is None else torch.where(drop[:, None, None], self.null_prefix, x)

    # ---------------------------------------------------------------- forward

    def features(
        self,
        target: Int64[Tensor, "B L"],
        prefix: Int64[Tensor, "B P"] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
        drop_prefix: Bool[Tensor, " B"] | None = None,
        hidden: list[Tensor] | None = None,
        added: Added | None = None,
        order: Int64[Tensor, "B N"] | None = None,
        whole: bool = True,
    ) -> Float[Tensor, "B N D"]:
        """The features whose `head` gives the logits of each target token; of several levels, of each position.

        `added` is what `self.added` gave for this prefix before, so that an aligned prefix is encoded once. `hidden`
        gets the embedding output and every block's output appended: `whole`, over all positions with the last token's,
        or where training computes them, without that, and the last block's from the start symbol on. With `order`, the
        places of the target's positions, `target` is in that order, and so are the features.
        """
        cfg = self.cfg
        if target.shape[1] > cfg.target_len or target.shape[1] % cfg.levels:
            each = f", {cfg.levels} for each position" if cfg.levels > 1 else ""
            raise DigitError(f"target has {target.shape[1]} tokens, the model was built for {cfg.target_len}{each}")
        whole = whole and hidden is not None
        # the last token is no input of a next-token model's logits
        seen = target if whole or cfg.masked else target[:, : -cfg.levels]
        x = self.dropout(self.embed(seen, prefix, labels, drop_prefix, order))  # (B, T, D)
        added = self.added(len(target), prefix, drop_prefix) if added is None else added
        rotation = None
        if order is not None:
            predicted = F.pad(order, (0, 1), value=cfg.target_places)  # (B, 1 + N): the last row adds nothing
            added = {block: at_places(more, predicted) for block, more in added.items()}
            rotation = self.rotation_in(order, x.shape[1])
        first = cfg.start_position + cfg.masked
        how = dict(causal=not cfg.masked, first=0 if whole else first, rotation=rotation, hidden=hidden)
        y = self.transformer(x, added=upto(added, x.shape[1]), **how)
        return y[:, first if whole else 0 :][:, : target.shape[1] // cfg.levels]

    def forward(
        self,
        target: Integers,
        prefix: Integers | None = None,
        labels: Integers | None = None,
        return_hidden: bool = False,
    ) -> Float[Tensor, "B M V"] | tuple[Float[Tensor, "B M V"], list[Float[Tensor, "B T D"]]]:
        """Logits of every target token.

        Args:
            target: codes (B, M) in 0..V-1, of any integer type; a masked model also takes `cfg.mask_token`. A
                next-token model shifts them itself.
            prefix: prefix codes (B, P); None uses the null prefix (models trained with prefix_dropout).
            labels: classes (B,) by position, 0..num_classes-1; -1 or None is the plain start symbol.
            return_hidden: also return the embedding output and every block's output over the whole sequence
                [prefix | start | target], T = P + 1 + M (linear probes average over all of it); [start | target] where
                the prefix is aligned.

        Raises:
            DigitError: prefix, labels, codes or lengths that the model was not built for; anything but integers.
        """
        cfg, device = self.cfg, self.device
        target = as_tokens(target, vocab_size=cfg.vocab_size + cfg.masked, owner="this model").to(device)
        if prefix is not None:
            prefix = as_tokens(prefix, vocab_size=cfg.prefix_vocab_size or None, owner="its prefix").to(device)
            if len(prefix) != len(target):
                raise MismatchError(f"prefix has {len(prefix)} rows, target {len(target)}: give one for each image")
        if labels is not None:
            labels = self._known_labels(labels, len(target))
        hidden: list[Tensor] | None = [] if return_hidden else None
        features = self.features(target, prefix, labels, hidden=hidden)
        codes = target.unflatten(1, (-1, cfg.levels))  # (B, N, L)
        logits = [self.level_logits(features, codes[..., :level]) for level in range(cfg.levels)]
        logits = logits[0] if cfg.levels == 1 else torch.stack(logits, 2).flatten(1, 2)  # (B, M, V)
        return logits if hidden is None else (logits, hidden)

    def _known_labels(self, labels: Integers, batch: int) -> Tensor:
        """Labels (B,) as int64 on the model's device. Raises DigitError for any others than -1..num_classes-1."""
        labels = as_integers("labels", labels).to(self.device)
        if labels.shape != (batch,):
            raise MismatchError(f"labels have shape {tuple(labels.shape)}, wanted ({batch},), one for each image")
        if self.cfg.num_classes:  # `embed` refuses labels of a model without classes
            require_range("labels", labels, -1, self.cfg.num_classes - 1, "this model")
        return labels

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for [prefix | start | target]; the last target token is never an input."""
        length = self.cfg.num_positions - 1
        rotations = self.transformer.rotations(length, self.device)
        return KVCache(self.cfg, batch, length, like=self.start_embed.weight, rotations=rotations)

    def rotation_in(self, order: Int64[Tensor, "B N"], length: int) -> Tensor | None:
        """Rotary positions (B, T, 2, d/2) of the first `length` positions of sequences in orders of their own."""
        start = 1 + self.cfg.start_position
        table = self.transformer.rotations(self.cfg.num_positions, order.device)
        before = torch.arange(start, device=order.device).expand(len(order), -1)
        return None if table is None else table[torch.cat([before, start + order], 1)[:, :length]]

    # ---------------------------------------------------------------- training

    def noise(self, batch: Mapping[str, Tensor | None], generator: torch.Generator | None) -> dict[str, Tensor]:
        """Sample the random masks of a batch's loss: hide (B, M), drop_labels (B,) and drop_prefix (B,), bool.

        A row that loses its prefix loses its label too, where labels are dropped. Returns only those that this model
        uses, on the generator's device. Sampled for a whole batch before it is split
        into micro-batches, they give the micro-batches the losses of the whole batch (apart from dropout).
        """
        cfg, target, masks = self.cfg, batch["target"], {}
        assert target is not None, "a batch has target tokens"
        device = target.device if generator is None else generator.device  # where the micro-batches will go
        for name, rate in (("drop_labels", cfg.label_dropout), ("drop_prefix", cfg.prefix_dropout)):
            if rate and (name == "drop_prefix" or batch.get("labels") is not None):
                masks[name] = uniform((len(target),), generator, device) < rate
        if masks.keys() >= {"drop_labels", "drop_prefix"}:  # guidance leads away from what is drawn knowing nothing
            masks["drop_labels"] = masks["drop_labels"] | masks["drop_prefix"]
        if cfg.masked:
            masks["hide"] = cosine_mask(*target.shape, generator=generator, device=device)
        return masks

    def loss(
        self,
        target: Int64[Tensor, "B M"],
        prefix: Int64[Tensor, "B P"] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
        label_smoothing: float = 0.0,
        hide: Bool[Tensor, "B M"] | None = None,
        drop_labels: Bool[Tensor, " B"] | None = None,
        drop_prefix: Bool[Tensor, " B"] | None = None,
        seen: Int64[Tensor, "B M"] | None = None,
        order: Int64[Tensor, "B N"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Mean cross-entropy over the target (masked models: over the hidden tokens), and metrics.

        `order` (`runs.batches.RandomOrder`) has for each sequence a permutation of its N target positions, in which
        they are predicted; raster order without it. It needs `cfg.random_order`.

        `noise` samples `hide` (tokens to predict, required by a masked model), `drop_labels` and `drop_prefix` (rows
        that lose their label or prefix). `seen` are the target's tokens as a next-token model reads them, some replaced
        by others; of several levels the heads still read the position's own lower codes, without which a higher one
        means nothing. With `code_heads` their losses are added. Dropout uses torch's global generator. Metrics are
        detached scalars: nll (nats per token, without smoothing), perplexity, accuracy, and the cosines of code heads.
        """
        if drop_labels is not None and labels is not None:
            labels = labels.masked_fill(drop_labels, -1)
        if order is not None:
            assert self.cfg.random_order, "a model that learns random orders has random_order set"
            target = in_order(target, order)
            seen = None if seen is None else in_order(seen, order)
        if not self.cfg.masked:
            hidden: list[Tensor] | None = None if self.code_heads is None else []
            inputs = (target if seen is None else seen), prefix, labels, drop_prefix
            features = self.features(*inputs, hidden=hidden, order=order, whole=False).flatten(0, 1)  # (B * M, D)
            if self.cfg.levels > 1:
                loss, metrics = self._loss_of_levels(features, target, label_smoothing)
            else:
                loss, metrics = linear_cross_entropy(features, self.head.weight, target.flatten(), label_smoothing)
            if self.code_heads is None or hidden is None:
                return loss, metrics
            more, cosines = self.code_heads(hidden, target)
            return loss + more, metrics | cosines
        assert seen is None, "a masked model reads the tokens that it does not predict: they stay as they are"
        assert hide is not None, "a masked model predicts hidden tokens: pass the result of noise()"
        features = self.features(target.masked_fill(hide, self.cfg.mask_token), prefix, labels, drop_prefix)
        if target.device.type != "cpu":  # the host would wait for the number of hidden tokens
            flat = features.flatten(0, 1), self.head.weight, target.flatten()
            return linear_cross_entropy(*flat, label_smoothing, hide.flatten())
        return linear_cross_entropy(features[hide], self.head.weight, target[hide], label_smoothing)

    def _loss_of_levels(
        self, features: Float[Tensor, "R D"], target: Int64[Tensor, "B M"], label_smoothing: float
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The mean over the levels, each given the levels before it; metrics over all, and the nll of each level."""
        codes = target.view(-1, self.cfg.levels)  # (R, L)
        losses, parts = [], []
        for level in range(self.cfg.levels):
            seen, weight = self.level_features(features, codes[:, :level]), self.heads[level].weight
            loss, metrics = linear_cross_entropy(seen, weight, codes[:, level], label_smoothing)
            losses.append(loss)
            parts.append(metrics)
        nll = torch.stack([part["nll"] for part in parts])
        accuracy = torch.stack([part["accuracy"] for part in parts]).mean()
        by_level = {f"nll_{level}": value for level, value in enumerate(nll)}
        mean = nll.mean()
        return torch.stack(losses).mean(), {"nll": mean, "perplexity": mean.exp(), "accuracy": accuracy} | by_level


def training_flops(cfg: SequenceConfig) -> float:
    """Training FLOPs of one image: 6 x (matrix parameters used) x (positions) + attention (Kaplan et al. 2020, 2.1).

    The output projection counts at the target positions alone, the embeddings not at all.
    """
    positions = cfg.start_position + cfg.target_places + (1 if cfg.masked else 0)
    total = block_flops(positions, cfg.depth, cfg.embed_dim) + 6.0 * cfg.target_len * cfg.embed_dim * cfg.vocab_size
    total += depth_flops(cfg.target_places, cfg.levels, cfg.embed_dim)
    if cfg.aligned:
        total += block_flops(cfg.prefix_places, cfg.encoder_depth, cfg.embed_dim)
        total += 6.0 * cfg.added_blocks * cfg.target_places * cfg.embed_dim**2
    return total


def block_flops(positions: int, depth: int, width: int) -> float:
    """Training FLOPs of `depth` blocks over one sequence of so many positions."""
    matrices, attention = 12 * depth * width**2, 2 * depth * positions * width  # multiply-adds a position
    return 6.0 * positions * (matrices + attention)


def upto(added: Added, length: int) -> Added:
    """The parts of the first `length` positions."""
    return {block: more[:, :length] for block, more in added.items()}


def in_order(tokens: Int64[Tensor, "B M"], order: Int64[Tensor, "B N"]) -> Int64[Tensor, "B M"]:
    """The tokens of each sequence's positions in an order of its own; those of several levels stay together."""
    codes = tokens.unflatten(1, (order.shape[1], -1))  # (B, N, L)
    return codes.gather(1, order[..., None].expand_as(codes)).flatten(1)


def at_places(table: Float[Tensor, "B T D"], index: Int64[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
    """The rows of each sequence's table at its own places."""
    first = torch.arange(len(table), device=table.device)[:, None] * table.shape[1]
    return F.embedding(first + index, table.flatten(0, 1))  # its gradient is faster than that of a gather of elements


def lift(codes: Float[Tensor, "V C"], width: int) -> Float[Tensor, "V {width}"]:
    """Code vectors (V, C) as embeddings (V, D) with elements of variance 1/D; distances keep their proportions."""
    centred = codes.float() - codes.float().mean(0)
    basis = torch.randn(max(width, codes.shape[1]), min(width, codes.shape[1]), device=codes.device)
    turn = torch.linalg.qr(basis)[0]  # orthonormal columns
    lifted = centred @ (turn.T if turn.shape[0] == width else turn)  # (V, D)
    return lifted / lifted.square().mean().sqrt().clamp_min(1e-8) / math.sqrt(width)


def grid_positions(grid: tuple[int, int], width: int, finest: int) -> Float[Tensor, "N {width}"]:
    """Sines and cosines of the row and the column of each cell's middle, in raster order; zeros fill up the width.

    Wavelengths run geometrically from four pictures to four cells of a grid with `finest` cells a side, so that the
    rows of two grids over one picture are comparable.
    """
    rows, columns = grid
    frequencies = math.pi / 2 * finest ** torch.linspace(0, 1, width // 4)  # radians per picture, (W / 4,)
    table = sincos_2d((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, frequencies)
    table = table[:, [0, 2, 1, 3]].flatten(1)  # sines before cosines, (N, W)
    return F.pad(table, (0, width - table.shape[1]))


def uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Float[Tensor, " ..."]:
    """U(0, 1), sampled on the generator's device and moved to `device`."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)


def cosine_mask(
    batch: int, length: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Bool[Tensor, "{batch} {length}"]:
    """Tokens to hide: min(M, floor(M cos(u pi / 2)) + 1) random ones a row, u ~ U(0, 1) (MaskGIT; released code)."""
    device = torch.device(device)
    u = uniform((batch, 1), generator, device)
    count = (length * torch.cos(u * (math.pi / 2))).floor() + 1  # (B, 1); rank < count also caps it at M
    rank = uniform((batch, length), generator, device).argsort(1).argsort(1)
    return rank < count
