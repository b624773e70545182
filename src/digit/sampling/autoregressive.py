"""Next-token decoding with a key-value cache, for prior, renderer and VQ-only baseline (paper, A.3).

Everything stays on the model's device. Prefix, start and given tokens go through in one pass; then a position at a time
against a preallocated cache, on a GPU as replays of recorded steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from digit.models.decoding import StepTransformer
from digit.models.sequence import SequenceModel
from digit.models.transformer import KVCache, SteppedCache
from digit.sampling.requests import Request, conditions
from digit.sampling.sampler import Sampler, twice

if TYPE_CHECKING:
    from jaxtyping import Int64

SPAN = 64  # a recorded step reads the cache up to the next multiple of this many positions


def generate(
    model: SequenceModel,
    *,
    seeds: Sequence[int],
    prefix: Int64[Tensor, "B P"] | None = None,
    labels: Int64[Tensor, " B"] | None = None,
    given: Int64[Tensor, "B m"] | None = None,
    on_token: Callable[[int], None] | None = None,
    **settings: Any,
) -> Int64[Tensor, "B M"]:
    """Draw the target tokens of B images: `NextTokenSampler(model, **settings)(seeds, ...)`.

    Args:
        model: a next-token model, any device.
        seeds: one an image; seed, conditions and settings fix an image's tokens, whatever is drawn beside it.
        prefix: prefix tokens (renderers).
        labels: class numbers; -1 or None is unconditional.
        given: the first m tokens, kept as they are (completion); read in one pass.
        on_token: called after every step with the number of tokens just decided, over all images B * (M - m) in sum.
        settings: as `NextTokenSampler` takes them.

    Raises:
        DigitError: conditions that do not fit the model, or settings without meaning.
    """
    return NextTokenSampler(model, **settings)(seeds, prefix=prefix, labels=labels, given=given, on_token=on_token)


class NextTokenSampler(Sampler):
    """Draws from a next-token model.

    Settings:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely codes; 0 is off.
        top_p: draw among the most likely codes up to this probability; 1 is off.
        cfg_scale: guidance, u + s (c - u); 1 is off. Needs a model trained with label_dropout or prefix_dropout.
        dtype: compute in this type, e.g. torch.bfloat16 (2 to 4 times as fast on CPUs with AVX-512 bf16).
        micro_batch_size: images computed together (twice the rows with guidance); default 64. A short micro-batch
            costs as much as a full one. Another micro_batch_size, dtype or device may round differently and so give
            another token.
        stage: names the stream of random numbers; default "renderer" for a model with prefix, else "prior".
        use_cache: off recomputes every position for every token (tests).
        fixed_shapes: steps of shapes that never change, recorded as CUDA graphs on a GPU (its default).
    """

    def __init__(
        self, model: SequenceModel, *, use_cache: bool = True, fixed_shapes: bool | None = None, **settings: Any
    ) -> None:
        assert not model.cfg.masked, "masked models are drawn by MaskedSampler"
        super().__init__(model, **settings)
        on_gpu = model.positions.device.type == "cuda"
        self.use_cache, self.fixed_shapes = use_cache, on_gpu if fixed_shapes is None else fixed_shapes
        self.step = StepTransformer(self.model.transformer, self.micro_batch_size * (2 if self.guided else 1))
        self._steps: FixedSteps | None = None

    @property
    def uniform_shape(self) -> tuple[int, ...]:
        """One number a token."""
        return (self.model.cfg.target_len,)

    def sample_micro_batch(self, rows: Request, u: Tensor, report: Callable[[Tensor | int], None]) -> Tensor:
        if not self.use_cache:
            return self._decode_uncached(rows, u, report)
        if not self.fixed_shapes:
            return self._decode(rows, u, report)
        if self._steps is None:
            self._steps = FixedSteps(self)
        return self._steps.decode(rows, u, report)

    def _decode(self, rows: Request, u: Tensor, report: Callable[[Tensor | int], None]) -> Tensor:
        """Everything known goes through at once, then a token at a time against the cache. Returns (C, M)."""
        length, known = self.model.cfg.target_len, rows.given.shape[1]
        tokens = rows.given.new_empty(len(rows.given), length)
        tokens[:, :known] = rows.given
        cache = self.new_cache()
        for i in range(known, length):
            logits = self.first_logits(rows, cache) if i == known else self.next_logits(tokens[:, i - 1], i - 1, cache)
            tokens[:, i] = self.pick(self.combine(logits), u[:, i])
            report(1)
        return tokens

    def new_cache(self) -> KVCache:
        """Room for all positions of one pass."""
        return self.model.new_cache(self.micro_batch_size * (2 if self.guided else 1))

    def first_logits(self, rows: Request, cache: KVCache) -> Tensor:
        """Logits (R, V) of the first token to draw: prefix, start and given tokens in one pass, kept in the cache."""
        x = self.model.embed(twice(rows.given, self.guided), **conditions(self.model, rows, self.guided))
        features = self.model.transformer(x, causal=True, first=x.shape[1] - 1, cache=cache)  # (R, 1, D)
        return self.model.head(features[:, 0])

    def next_logits(self, token: Tensor, index: int | Tensor, cache: KVCache | SteppedCache) -> Tensor:
        """Logits (R, V) of the token after target token number `index`, token (C,)."""
        x = self.model.embed_token(twice(token, self.guided), index)  # (R, D)
        return self.model.head(self.step(x, cache))

    def _decode_uncached(self, rows: Request, u: Tensor, report: Callable[[Tensor | int], None]) -> Tensor:
        """As `_decode`, with the whole sequence computed again for each token. Returns (C, M)."""
        tokens, how = rows.given, conditions(self.model, rows, self.guided)
        for i in range(tokens.shape[1], self.model.cfg.target_len):
            x = self.model.embed(twice(tokens, self.guided), **how)
            logits = self.model.head(self.model.transformer(x, causal=True)[:, -1])  # (R, V)
            tokens = torch.cat([tokens, self.pick(self.combine(logits), u[:, i])[:, None]], dim=1)
            report(1)
        return tokens


class FixedSteps:
    """Steps whose shapes and addresses never change: one is recorded for every SPAN positions, and replayed.

    A replay launches all of a step's kernels at once, where launching them one by one would take longer than they run.
    """

    def __init__(self, sampler: NextTokenSampler) -> None:
        cfg, device, num = sampler.model.cfg, sampler.model.positions.device, sampler.micro_batch_size
        self.sampler, self.before = sampler, cfg.prefix_len + 1  # positions before the first target token
        self.cache, self.max_len = sampler.new_cache(), cfg.prefix_len + cfg.target_len
        self.cache.reserve(self.max_len)
        self.tokens = torch.zeros(num, cfg.target_len, dtype=torch.int64, device=device)  # (C, M)
        self.u = torch.zeros(num, cfg.target_len, dtype=torch.float64, device=device)  # (C, M)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the newest token
        self.recorded: dict[int, torch.cuda.CUDAGraph] = {}

    def decode(self, rows: Request, u: Tensor, report: Callable[[Tensor | int], None]) -> Tensor:
        """One pass. Returns (C, M)."""
        known, length = rows.given.shape[1], self.tokens.shape[1]
        self.cache.begin = 0
        self.u.copy_(u)
        self.tokens[:, :known] = rows.given
        if known == length:
            return self.tokens.clone()
        logits = self.sampler.combine(self.sampler.first_logits(rows, self.cache))  # (C, V)
        self.tokens[:, known] = self.sampler.pick(logits, u[:, known])
        self.position.fill_(self.before + known)
        report(1)
        for position in range(self.before + known, self.max_len):
            self._run(min(self.max_len, (position // SPAN + 1) * SPAN))
            report(1)
        return self.tokens.clone()

    def step(self, span: int) -> None:
        """Draw the token after the newest one, on the first `span` positions of the cache, and move on."""
        newest = self.position - self.before  # (1,)
        token = self.tokens.index_select(1, newest)[:, 0]
        logits = self.sampler.next_logits(token, newest, SteppedCache(self.cache, self.position, span))
        drawn = self.sampler.pick(self.sampler.combine(logits), self.u.index_select(1, newest + 1)[:, 0])
        self.tokens.index_copy_(1, newest + 1, drawn[:, None])

    def _run(self, span: int) -> None:
        if self.position.device.type != "cuda":
            self.step(span)
            return
        if span not in self.recorded:
            self._record(span)
        self.recorded[span].replay()

    def _record(self, span: int) -> None:
        """Run the step once on a stream of its own, as CUDA wants before a recording, undo it, and record it."""
        position, stream = self.position.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(span)
            self.position.copy_(position)  # the token and the cache entry will be written again
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self.recorded.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            self.step(span)
        self.recorded[span] = graph
