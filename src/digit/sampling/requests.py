"""A request to a sampler, checked once and split into micro-batches of equal size.

Matrix kernels choose their order of summation by the number of rows, so that an image sampled alone and the same image
sampled among others could differ in the last bit, and from then on in its tokens. Every micro-batch therefore has
exactly `micro_batch_size` rows; a short one is padded with copies of its last row. Measured on CPU (torch 2.13, MKL and
oneDNN): with a fixed shape, a row depends neither on its position nor on the other rows, bit for bit, in float32 and
bfloat16.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from digit.errors import DigitError
from digit.models.sequence import SequenceModel
from digit.models.tokens import as_integers
from digit.runtime.scalars import as_int

MICRO_BATCH_SIZE = 64  # half-precision kernels reach 90% of their peak speed (52% at 16 rows, 69% at 32)


@dataclass(frozen=True, kw_only=True)
class TokenRequest:
    """Tokens to sample: B images, P prefix tokens, m given target tokens."""

    seeds: list[int]
    """Seed of each image."""
    prefix: Tensor | None
    """(B, P) int64."""
    labels: Tensor | None
    """(B,) int64, -1 for none."""
    given: Tensor
    """(B, m) int64, the first target tokens; m may be 0."""

    def rows(self, index: list[int]) -> "TokenRequest":
        """Only these rows, in this order."""
        pick = torch.tensor(index, device=self.given.device)
        return TokenRequest(
            seeds=[self.seeds[i] for i in index],
            prefix=None if self.prefix is None else self.prefix[pick],
            labels=None if self.labels is None else self.labels[pick],
            given=self.given[pick],
        )


def make_request(
    model: SequenceModel, seeds: Sequence[int], prefix: Tensor | None, labels: Tensor | None, given: Tensor | None
) -> TokenRequest:
    """Check the rows against the model and move them to its device. Raises DigitError where they do not fit."""
    cfg, device, batch = model.cfg, model.device, len(seeds)
    given = torch.empty(batch, 0, dtype=torch.int64) if given is None else as_integers("given", given)
    prefix = None if prefix is None else as_integers("prefix", prefix)
    labels = None if labels is None else as_integers("labels", labels)
    rows = {"prefix": prefix, "labels": labels, "given": given}
    for name, value in rows.items():
        if value is not None and len(value) != batch:
            raise DigitError(f"{name} has {len(value)} rows for {batch} seeds: give one row per seed")
    if given.shape[1] > cfg.target_len:
        raise DigitError(f"{given.shape[1]} tokens are given, an image has {cfg.target_len}")
    if prefix is None and cfg.prefix_len and not cfg.prefix_dropout:
        raise DigitError(f"this model needs a prefix of {cfg.prefix_len} tokens for each image: pass prefix=")
    check_range("given token", given, 0, cfg.vocab_size - 1 + cfg.masked)
    check_range("prefix token", prefix, 0, cfg.prefix_vocab_size - 1)
    check_range("label", labels, -1, cfg.num_classes - 1)
    move = partial(torch.Tensor.to, device=device, dtype=torch.int64)
    return TokenRequest(
        seeds=[as_int("seed", seed) for seed in seeds],
        prefix=None if prefix is None else move(prefix),
        labels=None if labels is None else move(labels),
        given=move(given),
    )


def check_range(name: str, values: Tensor | None, low: int, high: int) -> None:
    """Raise DigitError naming the first value outside low..high."""
    if values is None or not values.numel():
        return
    outside = (values < low) | (values > high)
    if outside.any():
        raise DigitError(f"{name} {int(values[outside][0])} is out of range: this model knows {low} to {high}")


def check_guidance(model: SequenceModel, scale: float) -> None:
    """Raise DigitError for guidance of a model that was trained without label or prefix dropout."""
    if scale != 1 and not (model.cfg.label_dropout or model.cfg.prefix_dropout):
        raise DigitError(
            f"cfg_scale is {scale}, but this model was trained without label_dropout or prefix_dropout: "
            "set cfg_scale to 1, or train with one of them above 0"
        )


def micro_batches(request: TokenRequest, size: int) -> Iterator[tuple[TokenRequest, int]]:
    """Requests of exactly `size` rows, each with the number of rows that count; the others copy the last one."""
    total = len(request.seeds)
    for begin in range(0, total, size):
        index = [min(i, total - 1) for i in range(begin, begin + size)]
        yield request.rows(index), min(size, total - begin)


class Conditions(TypedDict):
    """Keywords of `SequenceModel.embed` and `SequenceModel.features`."""

    prefix: Tensor | None
    labels: Tensor | None
    drop_prefix: Tensor | None


def conditions(model: SequenceModel, request: TokenRequest, guided: bool) -> Conditions:
    """prefix, labels and drop_prefix for `SequenceModel.embed`; with guidance, a second, unconditional half."""
    prefix, labels, drop = request.prefix, request.labels, None
    if guided:
        if labels is not None:
            hidden = torch.full_like(labels, -1) if model.cfg.label_dropout else labels
            labels = torch.cat([labels, hidden])
        if prefix is not None:
            prefix = torch.cat([prefix, prefix])
            if model.cfg.prefix_dropout:
                drop = torch.arange(len(prefix), device=prefix.device) >= len(prefix) // 2
    return {"prefix": prefix, "labels": labels, "drop_prefix": drop}
