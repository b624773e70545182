"""Filters on a CPU and on a GPU keep the same codes."""

import torch

from digit.sampling.filters import ascending, keep_threshold


def test_top_k_alone_by_topk_is_what_the_sort_gives():
    """A GPU takes the k-th largest logit from topk, a CPU from a sort: ties included, the same codes remain."""
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    logits[0, :7] = logits[0, 9]
    for k in (1, 3, 20):
        least = logits.topk(k).values[:, -1:]
        assert torch.equal(keep_threshold(ascending(logits), k, 1.0), least)
