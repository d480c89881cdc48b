"""Triton's last pass over a tile against plain torch, over types, strides and shapes that are multiples of nothing."""

from __future__ import annotations

import itertools

import pytest
import torch

from ..native.emulated import BF16, F32, TYPES, beside_is_untouched, matrix
from ..native.operators import accumulate, finished_tile, some_factors
from .conftest import DEVICE, moved

pytest.importorskip("triton")
from logitless.kernels.backends.triton import finish

#: NumPy's, in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "columns", "width"), [(1, 1, 1), (5, 77, 16), (4, 77, 100), (4, 4500, 2049), (3, 70, 3)])
def test_finish_tile(dtype, n, columns, width):
    for (pad, skip), given_factors, target in itertools.product(((0, 0), (3, 1)), (True, False), (True, False)):
        g = torch.Generator().manual_seed(columns + n)
        tile = moved(matrix(n, columns, dtype, pad=pad, skip=skip, values=torch.randn(n, columns, generator=g)))
        labels = torch.randint(columns, (n,), generator=g)
        labels[0], labels[-1] = min(width, columns) - 1, min(width, columns - 1)  # borders of blocks
        labels = labels.to(DEVICE)
        factors = some_factors(-(-columns // width), n, accumulate(dtype), g).to(DEVICE) if given_factors else None
        at_target = torch.randn(n, generator=g).to(accumulate(dtype)).to(DEVICE) if target else None
        expected = finished_tile(tile, factors, labels, at_target, width)
        finish.finish_tile(tile, [None] if factors is None else list(factors), labels, at_target, width)
        assert torch.equal(tile, expected)
        assert beside_is_untouched(tile)


def test_finish_tile_takes_blocks_without_factors():
    tile = torch.randn(4, 30, device=DEVICE)
    factor = torch.tensor([1.0, 0.5, 1.0, 0.25], device=DEVICE)
    expected = tile.clone()
    expected[:, 10:20] *= factor[:, None]
    finish.finish_tile(tile, [None, factor, None], torch.zeros(4, dtype=torch.long, device=DEVICE), None, 10)
    assert torch.equal(tile, expected)


def test_finish_tile_leaves_blocks_of_factor_1_to_the_bit():
    signalling = torch.full((2, 40), 0x7F81, dtype=torch.int16, device=DEVICE).view(BF16)  # arithmetic would make it 0x7FC1
    factors = torch.ones(4, 2, device=DEVICE)
    factors[2, 1] = 0.5
    finish.finish_tile(signalling, list(factors), torch.zeros(2, dtype=torch.long, device=DEVICE), None, 10)
    changed = (signalling.view(torch.int16) != 0x7F81).nonzero()
    assert {tuple(place) for place in changed.tolist()} <= {(1, column) for column in range(20, 30)}


def test_finish_tile_of_a_label_out_of_range_writes_nothing_foreign():
    tile = moved(matrix(3, 8, F32, pad=2, values=torch.zeros(3, 8)))
    finish.finish_tile(tile, [None], torch.tensor([8, -1, 4], device=DEVICE), torch.ones(3, device=DEVICE), 8)
    assert tile.nonzero().tolist() == [[2, 4]]
    assert beside_is_untouched(tile)


def test_no_rows_and_no_columns():
    labels, none = torch.empty(0, dtype=torch.long, device=DEVICE), torch.empty(0, 4, device=DEVICE)
    finish.finish_tile(none, [torch.empty(0, device=DEVICE)] * 2, labels, torch.empty(0, device=DEVICE), 3)
    finish.finish_tile(torch.empty(3, 0, device=DEVICE), [], torch.zeros(3, dtype=torch.long, device=DEVICE), None, 5)
