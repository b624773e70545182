"""Next-token decoding with a key-value cache, for prior, renderer and VQ-only baseline (paper, A.3).

All tensors stay on the model's device. One forward pass takes prefix, start and given tokens; then each step computes
one position with a key-value cache, on a GPU as a replay of a recorded CUDA graph.

Shapes: C images of a micro-batch, R rows of the network (C, or 2C under guidance), M target tokens, V codes, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from digit.models.decoding import StepTransformer, step_kernel
from digit.models.sequence import SequenceModel, upto
from digit.models.transformer import Added, KVCache, SteppedCache
from digit.sampling.requests import TokenRequest, conditions
from digit.sampling.sampler import Sampler, twice

SPAN = 64  # positions; without a kernel, a recorded step reads the cache up to the next multiple of this


class NextTokenSampler(Sampler):
    """Samples from a next-token model.

    Settings:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely codes; 0 is off.
        top_p: sample among the most likely codes up to this probability; 1 is off.
        cfg_scale: guidance, u + s (c - u); 1 is off. Needs a model trained with label_dropout or prefix_dropout.
        cfg_schedule: constant, or growing over the tokens: linear, cosine.
        dtype: compute in this type, e.g. torch.bfloat16 (2 to 4 times as fast on CPUs with AVX-512 bf16).
        micro_batch_size: images computed together (twice the rows with guidance); default 64. A short micro-batch
            takes as long as a full one. Another micro_batch_size, dtype or device may round differently and so give
            another token.
        stage: name of the random stream; default "renderer" for a model with prefix, else "prior".
        use_cache: False recomputes all positions for every token (tests).
        fixed_shapes: steps with constant shapes, recorded as CUDA graphs on a GPU; default True on a GPU.
    """

    def __init__(
        self, model: SequenceModel, *, use_cache: bool = True, fixed_shapes: bool | None = None, **settings: Any
    ) -> None:
        assert not model.cfg.masked, "masked models are sampled by MaskedSampler"
        super().__init__(model, **settings)
        on_gpu = model.device.type == "cuda"
        self.use_cache, self.fixed_shapes = use_cache, on_gpu if fixed_shapes is None else fixed_shapes
        self.step = StepTransformer(self.model.transformer, self.num_rows)
        self.records = self.use_cache and self.fixed_shapes
        self._recorded = RecordedSteps() if self.records else None  # kept from call to call

    @property
    def held_bytes(self) -> int:
        """Bytes of its copy of the weights, and of the cache of recorded steps."""
        return super().held_bytes + (0 if self._recorded is None else self._recorded.held_bytes)

    @property
    def num_decisions(self) -> int:
        """One a token."""
        return self.model.cfg.target_len

    @property
    def uniform_shape(self) -> tuple[int, ...]:
        """One number a token."""
        return (self.model.cfg.target_len,)

    def sample_micro_batch(
        self, rows: TokenRequest, u: Tensor, report: Callable[[Tensor | int], None]
    ) -> Int64[Tensor, "C M"]:
        decoder = self._recorded or (CachedSteps() if self.use_cache else UncachedSteps())
        decoder.begin(self, rows, u)
        for i in range(rows.given.shape[1], self.model.cfg.target_len):
            decoder.decide(self, i)
            report(1)
        return decoder.tokens.clone()

    def new_cache(self) -> KVCache:
        """Room for all positions of one micro-batch."""
        return self.model.new_cache(self.num_rows)

    def added(self, rows: TokenRequest) -> Added:
        """What an aligned prefix adds at every position, {block: (R, 1 + M, D)}; {} for other models."""
        condition = conditions(self.model, rows, self.guided)
        return self.model.added(self.num_rows, condition["prefix"], condition["drop_prefix"])

    def first_features(
        self, rows: TokenRequest, cache: KVCache, added: Added | None = None, known: int | None = None
    ) -> Float[Tensor, "R D"]:
        """Features of the first position to sample: prefix, start and `known` given tokens in one pass, cached."""
        given = rows.given if known is None else rows.given[:, :known]
        x = self.model.embed(twice(given, self.guided), **conditions(self.model, rows, self.guided))
        length = x.shape[1]
        features = self.model.transformer(
            x, causal=True, first=length - 1, cache=cache, added=upto(added or {}, length)
        )  # (R, 1, D)
        return features[:, 0]

    def next_features(
        self,
        token: Int64[Tensor, " C"] | Int64[Tensor, "C L"],
        index: int | Tensor,
        cache: KVCache | SteppedCache,
        added: Added | None = None,
    ) -> Float[Tensor, "R D"]:
        """Features after target position number `index` (a number, or one on the device) with this token, or codes."""
        x = self.model.embed_token(twice(token, self.guided), index)  # (R, D)
        here = {block: at_position(more, index + 1) for block, more in (added or {}).items()}
        return self.step(x, cache, here)

    def first_logits(self, rows: TokenRequest, cache: KVCache, added: Added | None = None) -> Float[Tensor, "R V"]:
        """Logits of the first token to sample, from `first_features`."""
        return self.model.head(self.first_features(rows, cache, added))

    def next_logits(
        self, token: Int64[Tensor, " C"], index: int | Tensor, cache: KVCache | SteppedCache, added: Added | None = None
    ) -> Float[Tensor, "R V"]:
        """Logits of the token after target token number `index`, from `next_features`; of one level."""
        return self.model.head(self.next_features(token, index, cache, added))

    def level_logits(self, features: Float[Tensor, "R D"], lower: Int64[Tensor, "C J"]) -> Float[Tensor, "R V"]:
        """Logits of a position's code of level J, given those of the levels before it."""
        return self.model.level_logits(features, twice(lower, self.guided))


def at_position(table: Float[Tensor, "R T D"], index: int | Int64[Tensor, " 1"]) -> Float[Tensor, "R D"]:
    """One position's rows."""
    return table.index_select(1, index)[:, 0] if isinstance(index, Tensor) else table[:, index]


class Steps(ABC):
    """Samples the tokens of one micro-batch one after the other. Each call gets the sampler as an argument."""

    tokens: Tensor
    """(C, M) int64; only given and sampled ones are valid."""

    def begin(self, sampler: NextTokenSampler, rows: TokenRequest, u: Tensor) -> None:
        """Start a micro-batch of C images with uniforms u (C, M)."""
        self.rows, self.u, self.known = rows, u, rows.given.shape[1]
        self.tokens = rows.given.new_empty(len(rows.given), sampler.model.cfg.target_len)
        self.tokens[:, : self.known] = rows.given

    def decide(self, sampler: NextTokenSampler, i: int) -> None:
        """Sample target token number i, given all tokens before it."""
        self.tokens[:, i] = sampler.pick(sampler.combine(self.logits(sampler, i), i), self.u[:, i])

    @abstractmethod
    def logits(self, sampler: NextTokenSampler, i: int) -> Tensor:
        """Logits (R, V) of target token number i."""


class UncachedSteps(Steps):
    """Computes the whole sequence again for each token."""

    def logits(self, sampler: NextTokenSampler, i: int) -> Tensor:
        model, guided = sampler.model, sampler.guided
        first = i - i % model.cfg.levels  # token of this position
        x = model.embed(twice(self.tokens[:, :first], guided), **conditions(model, self.rows, guided))
        added = upto(sampler.added(self.rows), x.shape[1])
        features = model.transformer(x, causal=True, added=added)[:, -1]
        return sampler.level_logits(features, self.tokens[:, first:i])


class CachedSteps(Steps):
    """Computes one position per token, with a growing cache."""

    def begin(self, sampler: NextTokenSampler, rows: TokenRequest, u: Tensor) -> None:
        super().begin(sampler, rows, u)
        self.cache, self.added = sampler.new_cache(), sampler.added(rows)

    def logits(self, sampler: NextTokenSampler, i: int) -> Tensor:
        levels = sampler.model.cfg.levels
        if levels > 1:
            return self._level_logits(sampler, i, levels)
        if i == self.known:
            return sampler.first_logits(self.rows, self.cache, self.added)
        return sampler.next_logits(self.tokens[:, i - 1], i - 1, self.cache, self.added)

    def _level_logits(self, sampler: NextTokenSampler, i: int, levels: int) -> Tensor:
        """The backbone runs once for all levels of a position."""
        position, level = divmod(i, levels)
        first = position * levels
        if i == self.known:
            self.features = sampler.first_features(self.rows, self.cache, self.added, first)
        elif not level:
            before = self.tokens[:, first - levels : first]
            self.features = sampler.next_features(before, position - 1, self.cache, self.added)
        return sampler.level_logits(self.features, self.tokens[:, first:i])


class RecordedSteps(CachedSteps):
    """Steps with constant shapes and addresses, recorded as a CUDA graph and replayed.

    A replay launches all kernels of a step at once; launching them one by one would take longer than running them.
    Where `step_kernel` gives a kernel, which reads the filled length on the GPU, one graph serves all positions;
    elsewhere there is one for every SPAN positions.
    """

    def __init__(self) -> None:
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by span
        self.stream: Any = None  # for all recordings: each stream of its own would hold a cuBLAS workspace
        self.is_allocated = False

    def begin(self, sampler: NextTokenSampler, rows: TokenRequest, u: Tensor) -> None:
        if not self.is_allocated:
            self._allocate(sampler)
        self.rows, self.known, self.cache.position = rows, rows.given.shape[1], 0
        self.u.copy_(u)
        for block, more in sampler.added(rows).items():
            self.added[block].copy_(more)
        self.tokens[:, : self.known] = rows.given

    def _allocate(self, sampler: NextTokenSampler) -> None:
        cfg, device, num = sampler.model.cfg, sampler.model.device, sampler.micro_batch_size
        self.start = cfg.start_position + 1  # position of the first target token
        self.cache, self.max_len = sampler.new_cache(), cfg.num_positions - 1
        blocks = sampler.model.aligned.blocks if cfg.aligned else ()
        self.added = {
            block: self.cache.keys.new_zeros(sampler.num_rows, 1 + cfg.target_places, cfg.embed_dim) for block in blocks
        }
        self.cache.reserve(self.max_len)
        self.kernel = step_kernel(device, self.cache.keys.dtype, cfg.embed_dim // cfg.num_heads)
        self.span = SPAN if self.kernel is None else self.max_len
        self.tokens = torch.zeros(num, cfg.target_len, dtype=torch.int64, device=device)  # (C, M)
        self.u = torch.zeros(num, cfg.target_len, dtype=torch.float64, device=device)  # (C, M)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the newest token
        self.is_allocated = True

    @property
    def held_bytes(self) -> int:
        """Bytes of the cache and of an aligned prefix."""
        if not self.is_allocated:
            return 0
        return sum(kept.nbytes for kept in (self.cache.keys, self.cache.values, *self.added.values()))

    def decide(self, sampler: NextTokenSampler, i: int) -> None:
        levels = sampler.model.cfg.levels
        position, level = divmod(i, levels)
        if position == self.known // levels:
            super().decide(sampler, i)
            self.position.fill_(self.start + position)
            return
        if level:
            return  # sampled together with the first level
        newest = self.start + position - 1  # position of the tokens before
        self._run(sampler, min(self.max_len, (newest // self.span + 1) * self.span))

    def _step(self, sampler: NextTokenSampler, span: int) -> None:
        """Sample the token after the newest one, with the first `span` positions of the cache, and advance."""
        newest = self.position - self.start  # (1,)
        if sampler.model.cfg.levels > 1:
            return self._step_of_levels(sampler, span, newest)
        token = self.tokens.index_select(1, newest)[:, 0]
        cache = SteppedCache(self.cache, self.position, span, self.kernel)
        logits = sampler.next_logits(token, newest, cache, self.added)
        index = newest + 1  # computed once: each operator is a launch
        sampled = sampler.pick(sampler.combine(logits, index), self.u.index_select(1, index)[:, 0])
        self.tokens.index_copy_(1, index, sampled[:, None])

    def _step_of_levels(self, sampler: NextTokenSampler, span: int, newest: Tensor) -> None:
        """`_step` of all levels of a position."""
        levels = sampler.model.cfg.levels
        codes = self.tokens.unflatten(1, (-1, levels))  # (C, N, L), a view
        cache = SteppedCache(self.cache, self.position, span, self.kernel)
        features = sampler.next_features(codes.index_select(1, newest)[:, 0], newest, cache, self.added)
        index = newest + 1
        sampled = codes.new_empty(len(codes), 0)
        for level in range(levels):
            place = index * levels + level
            logits = sampler.combine(sampler.level_logits(features, sampled), place)
            code = sampler.pick(logits, self.u.index_select(1, place)[:, 0])
            sampled = torch.cat([sampled, code[:, None]], 1)
        codes.index_copy_(1, index, sampled[:, None])

    def _run(self, sampler: NextTokenSampler, span: int) -> None:
        if self.position.device.type != "cuda":
            self._step(sampler, span)
            return
        if span not in self.graphs:
            self._record(sampler, span)
        self.graphs[span].replay()

    def _record(self, sampler: NextTokenSampler, span: int) -> None:
        """Run the step once on a separate stream, as CUDA requires before a recording, undo it, and record it."""
        self.stream = self.stream or torch.cuda.Stream(self.position.device)
        position, stream = self.position.clone(), self.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(sampler, span)
            self.position.copy_(position)  # the recorded step overwrites the token and the cache entry
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self.graphs.values()), None)
        # threads that write PNGs wait for events meanwhile, which the default mode would take for an error
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._step(sampler, span)
        self.graphs[span] = graph
