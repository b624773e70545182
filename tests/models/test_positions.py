"""Position tables and rotary positions by their definition."""

import math

import pytest
import torch

from digit.models.positions import grid_places, line_places, rotary_table, rotate, sincos_2d

CPU = torch.device("cpu")


def test_sincos_2d_by_definition():
    rows, columns, frequencies = torch.tensor([0.5, 2.0]), torch.arange(3.0), torch.tensor([1.0, 0.1])
    table = sincos_2d(rows, columns, frequencies)
    assert table.shape == (6, 4, 2)
    for i, row in enumerate(rows.tolist()):
        for j, column in enumerate(columns.tolist()):
            parts = [[f(p * s) for s in (1.0, 0.1)] for p in (row, column) for f in (math.sin, math.cos)]
            torch.testing.assert_close(table[3 * i + j], torch.tensor(parts))


def test_places_on_a_grid_are_the_middles_of_its_cells():
    places = grid_places((2, 2), (4, 4), 4, CPU)  # in cells of the finer grid
    assert places.tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    assert grid_places((2, 3), (2, 3), 4, CPU).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]
    assert line_places(3, CPU).tolist() == [[0], [1], [2]]


@pytest.mark.parametrize("places", [line_places(7, CPU), grid_places((2, 3), (2, 3), 6, CPU)], ids=["1d", "2d"])
def test_rotary_positions_turn_pairs_as_complex_numbers(places):
    width = 8
    x = torch.randn(2, 3, len(places), width, generator=torch.Generator().manual_seed(0))
    num = width // 2 // places.shape[1]
    frequencies = torch.tensor([10_000.0 ** (-j / num) for j in range(num)])
    angles = torch.cat([axis[:, None] * frequencies for axis in places.T], 1)  # (T, d / 2)
    turned = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    got = rotate(x, rotary_table(places, width))
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1))
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), rotary_table(places, width)).dtype == torch.bfloat16


def test_products_depend_on_how_far_apart_two_tokens_are():
    q, k = torch.randn(2, 1, 1, 16, 8, generator=torch.Generator().manual_seed(0))[..., :1, :].expand(2, 1, 1, 16, 8)
    table = rotary_table(grid_places((4, 4), (4, 4), 16, CPU), 8)
    scores = (rotate(q, table) @ rotate(k, table).transpose(-1, -2)).view(4, 4, 4, 4)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 1, 3, 3])  # one row down, two columns on
    assert (scores[0, 0, 1, 2] - scores[0, 0, 2, 1]).abs() > 1e-3


def test_each_sequence_may_have_a_table_of_its_own():
    table = rotary_table(line_places(5, CPU), 4)
    x, order = torch.randn(2, 3, 5, 4), torch.stack([torch.arange(5), torch.tensor([4, 2, 0, 1, 3])])
    own = rotate(x, table[order])
    torch.testing.assert_close(own[:1], rotate(x[:1], table))
    torch.testing.assert_close(own[1:, :, order[1].argsort()], rotate(x[1:, :, order[1].argsort()], table))
