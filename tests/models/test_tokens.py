"""Tokens as people bring them: any integer type, arrays and lists; floats and tokens of another model are refused."""

import numpy as np
import pytest
import torch

from digit.errors import DigitError, MismatchError
from digit.models.tokens import as_integers, as_tokens

TOKENS = torch.tensor([[0, 5, 3], [1, 2, 5]])


def known(tokens):
    return as_tokens(tokens, vocab_size=6, num_tokens=3, owner="the codebook")


def test_an_int64_tensor_is_not_copied():
    assert known(TOKENS) is TOKENS and known(TOKENS[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    "brought",
    [
        *(TOKENS.to(dtype) for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16)),
        *(TOKENS.numpy().astype(dtype) for dtype in ("u1", "<i4", ">i4", "u8")),
        TOKENS.numpy()[:, ::-1][:, ::-1],
        TOKENS.tolist(),
        [tuple(row) for row in TOKENS.tolist()],
        list(TOKENS),
        list(TOKENS.numpy()),
    ],
    ids=str,
)
def test_every_kind_gives_the_same_tokens(brought):
    tokens = known(brought)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, TOKENS)


@pytest.mark.parametrize(
    "brought, said",
    [
        (TOKENS.float(), "tokens are float32: give integers"),
        (TOKENS.numpy() / 1, "tokens are float64"),
        ([[0.0, 1.0, 2.0]], "tokens are float64"),
        (TOKENS > 2, "tokens are bool"),
        (TOKENS.to(torch.complex64), "complex64"),
        ([[0, 1], [2]], "in rows of one length"),
        ([["a", "b", "c"]], "give integers"),
        ("abc", "give integers"),
        ([TOKENS[0], TOKENS[0, :2]], "different shapes"),
        (np.array([[2**64 - 1, 0, 0]], dtype=np.uint64), "give integers"),
        (TOKENS[0], r"shape \(3,\), the codebook takes \(B, 3\)"),
        (TOKENS[:, :2], r"shape \(2, 2\), the codebook takes \(B, 3\)"),
        (TOKENS + 1, "run from 1 to 6, the codebook knows 0 to 5"),
        (TOKENS - 1, "run from -1 to 4"),
    ],
)
def test_anything_else_is_one_line(brought, said):
    with pytest.raises(DigitError, match=said) as caught:
        known(brought)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_nothing_is_no_tokens():
    with pytest.raises(DigitError, match="tokens are None"):
        known(None)


def test_another_models_tokens_are_a_mismatch():
    with pytest.raises(MismatchError):
        known(TOKENS + 1)


def test_integers_have_any_shape():
    assert as_integers("labels", [1, 2]).tolist() == [1, 2] and as_integers("labels", torch.tensor(3)).shape == ()
    assert as_integers("labels", []).dtype == torch.int64
