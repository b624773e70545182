"""Tokens of a model in one call, for tests."""

from collections.abc import Sequence

from torch import Tensor

from digit.models.sequence import SequenceModel
from digit.sampling.kinds import get_kind


def generate(
    model: SequenceModel,
    *,
    seeds: Sequence[int],
    prefix: Tensor | None = None,
    labels: Tensor | None = None,
    given: Tensor | None = None,
    on_token=None,
    **settings,
) -> Tensor:
    """(B, M) tokens by the sampler of the model's kind."""
    sampler = get_kind(model.cfg.kind).sampler(model, **settings)
    return sampler(seeds, prefix=prefix, labels=labels, given=given, on_token=on_token)
