"""Position tables by their definition."""

import math

import torch

from digit.models.positions import sincos_2d


def test_sincos_2d_by_definition():
    rows, columns, frequencies = torch.tensor([0.5, 2.0]), torch.arange(3.0), torch.tensor([1.0, 0.1])
    table = sincos_2d(rows, columns, frequencies)
    assert table.shape == (6, 4, 2)
    for i, row in enumerate(rows.tolist()):
        for j, column in enumerate(columns.tolist()):
            parts = [[f(p * s) for s in (1.0, 0.1)] for p in (row, column) for f in (math.sin, math.cos)]
            torch.testing.assert_close(table[3 * i + j], torch.tensor(parts))
