"""The masked sampler's choices on the authors' MaskGIT renderer, token by token, against a naive reference.

The reference follows the released decoding (RELEASED_CODE, Stage 2 NAR) in plain loops and float64, with the same
uniform numbers: it shares nothing with the sampler but the model's logits.
"""

import math

import pytest
import torch
from safetensors.torch import load_file

from digit.convert.fairseq import read_fairseq
from digit.sampling.config import released_renderer
from digit.sampling.filters import image_uniforms
from digit.sampling.kinds import make_sampler

STEPS, TOKENS, SEEDS = 8, 256, (3, 11)


@pytest.fixture(scope="module")
def model(golden):
    return read_fairseq(golden / "stage2_nar.pt", masked=True).model.eval()


@pytest.fixture(scope="module")
def prefix(golden):
    return load_file(golden / "expected.safetensors")["tokens"]


def draw(logits: list[float], u: float) -> tuple[int, float]:
    """The code at which the cumulative probability passes u, and its log probability."""
    peak = max(logits)
    weights = [math.exp(value - peak) for value in logits]
    total, passed = sum(weights), 0.0
    for code, weight in enumerate(weights):
        passed += weight
        if passed > u * total:
            return code, logits[code] - peak - math.log(total)
    raise AssertionError("u is below 1")


def reference(model, prefix: torch.Tensor, seed: int) -> list[list[int]]:
    """The tokens after each step; a hidden one is -1."""
    u = image_uniforms([seed], "renderer", (STEPS, 2, TOKENS))[0].tolist()
    tokens, history = [-1] * TOKENS, []
    for step in range(STEPS):
        given = torch.tensor([[model.cfg.mask_token if code < 0 else code for code in tokens]])
        with torch.no_grad():
            logits = model(given, prefix=prefix[None])[0].double().tolist()
        ratio, confidence = (step + 1) / STEPS, {}
        masked = [place for place in range(TOKENS) if tokens[place] < 0]
        for place in masked:
            tokens[place], log_probability = draw(logits[place], u[step][0][place])
            noise = -math.log(-math.log(u[step][1][place]))
            confidence[place] = log_probability + 4.5 * (1 - ratio) * noise
        if step + 1 < STEPS:
            count = max(1, min(len(masked) - 1, math.floor(TOKENS * math.cos(math.pi / 2 * ratio))))
            for place in sorted(masked, key=confidence.__getitem__)[:count]:
                tokens[place] = -1
        history.append(list(tokens))
    return history


def test_every_choice_is_the_released_one(model, prefix):
    told = []
    sampler = make_sampler(model, released_renderer(masked=True))
    sampled = sampler(SEEDS, prefix=prefix, on_token=told.append)
    histories = [reference(model, row, seed) for row, seed in zip(prefix, SEEDS, strict=True)]
    for row, history in zip(sampled.tolist(), histories, strict=True):
        assert row == history[-1]
    hidden = [[sum(code < 0 for code in tokens) for tokens in history] for history in histories]
    assert hidden[0] == hidden[1] == [251, 236, 212, 181, 142, 97, 49, 0]
    assert told == [2 * (a - b) for a, b in zip([TOKENS, *hidden[0]], hidden[0], strict=False)]


def test_a_filter_would_choose_otherwise(model, prefix):
    """The released decoding draws from all codes: a top-p of 0.8, as of the other renderer, gives other tokens."""
    free, filtered = (
        make_sampler(model, released_renderer(masked=masked), stage="renderer") for masked in (True, False)
    )
    first = {"prefix": prefix}
    assert not free(SEEDS, **first).equal(filtered(SEEDS, **first))
