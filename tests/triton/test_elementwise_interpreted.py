"""Triton's element-wise functions on rows and segments, against plain torch and float64.

The entropy's pass and advantages have files of their own.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from logitless.kernels.backends.torch import rows as torch_rows
from logitless.kernels.backends.torch.segments import segment_sum as torch_segment_sum
from logitless.kernels.tile.segments import segment_sum

from ..native.emulated import BF16, F16, F32, F64, TYPES, beside_is_untouched, matrix
from ..native.operators import EPSILON, accumulate
from .conftest import DEVICE, moved

pytest.importorskip("triton")
from logitless.kernels.backends.triton import scatter
from logitless.kernels.backends.triton.elementwise import TRITON_PASSES
from logitless.kernels.backends.triton.scaled import scaled_to_dtype_launch

#: NumPy's, in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@quick
@given(lengths=st.lists(st.sampled_from([0, 0, 1, 2, 5, 127, 1023, 1024, 1025, 2100]), max_size=7), seed=st.integers(0, 9))
@example(lengths=[], seed=0)
@example(lengths=[0, 0], seed=0)
@example(lengths=[0, 2049, 0, 0, 1, 0], seed=1)
def test_segment_sums(lengths, seed):
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)
    for dtype in (F32, F64):
        values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)
        parts = values.double().split(lengths) if lengths else []
        wanted = torch.tensor([float(p.sum()) for p in parts], dtype=F64, device=DEVICE)
        size = torch.tensor([float(p.abs().sum()) for p in parts], dtype=F64, device=DEVICE)
        for function in (TRITON_PASSES.segment_sum, torch_segment_sum):
            got = function(values.to(DEVICE), offsets)
            assert got.dtype == dtype
            limit = 2 * EPSILON[dtype] * wanted.abs() + 16 * EPSILON[F64] * size
            assert ((got.double() - wanted).abs() <= limit).all()


@pytest.mark.parametrize("function", [TRITON_PASSES.segment_sum, torch_segment_sum], ids=["triton", "torch"])
def test_nothing_leaks_from_one_segment_into_another(function):
    values, offsets = torch.randn(40, device=DEVICE), torch.tensor([0, 7, 7, 20, 40], device=DEVICE)
    clean = function(values, offsets)
    values[[3, 25]] = torch.tensor([math.nan, math.inf], device=DEVICE)
    got = function(values, offsets)
    assert got[0].isnan() and got[3] == math.inf and torch.equal(got[1:3], clean[1:3]) and got[1] == 0


@pytest.mark.parametrize("add", [TRITON_PASSES.segment_sum, torch_segment_sum], ids=["triton", "torch"])
def test_segment_sums_are_differentiable(add):
    values = torch.randn(20, dtype=F64, device=DEVICE, requires_grad=True)
    offsets = torch.tensor([0, 3, 3, 19, 20], device=DEVICE)
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, offsets, add), values)
    assert torch.autograd.gradgradcheck(lambda v: segment_sum(v, offsets, add).square(), values)
    assert torch.equal(torch.func.grad(lambda v: segment_sum(v, offsets, add).sum())(values.detach()), torch.ones_like(values))


def some_values(n: int, width: int, dtype: torch.dtype, seed: int, *, pad: int = 0, skip: int = 0) -> torch.Tensor:
    values = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return moved(matrix(n, width, dtype, pad=pad, skip=skip, values=values))


@pytest.mark.parametrize("values", [F32, F64])
@pytest.mark.parametrize("out", TYPES)
def test_scatter_rows(values, out):
    """As torch's, of any strides, with one factor, one per row, or none, and with what is added to or nothing."""
    for width, with_base in itertools.product((1, 7, 64, 1100), (False, True)):
        n, count = 6, 11
        g = torch.Generator().manual_seed(width)
        source = some_values(n, width, values, width, pad=width % 3, skip=1)
        base = some_values(n, width, values, width + 1, pad=width % 4) if with_base else None
        index = torch.randperm(count, generator=g)[:n].to(DEVICE)
        per_row = torch.randn(n, generator=g).to(values).to(DEVICE)
        for factor in (None, per_row[0], per_row):
            given = (count, width), out, index, source, factor, base
            found, expected = TRITON_PASSES.scatter_rows(*given), torch_rows.scatter_rows(*given)
            assert found.dtype == out and found.shape == (count, width)
            if DEVICE.type == "cpu":
                assert torch.equal(found, expected)
            else:  # a fused multiply-add
                limit = 4 * EPSILON[values] * (source.abs() * per_row.abs().max() + 1).max() + 2 * EPSILON[out] * expected.abs()
                assert ((found - expected).abs() <= limit).all()


def test_scatter_rows_leaves_what_is_beside_its_rows():
    out = moved(matrix(11, 70, F32, pad=1, skip=3, values=torch.full((11, 70), 7.0)))
    values, index = some_values(4, 70, F32, 0), torch.tensor([10, 0, 3, 5], device=DEVICE)
    scatter.scatter_rows_launch(values, index, torch.ones(1, device=DEVICE), None, out, F32).run(4, 1)
    assert torch.equal(out[index], values)
    others = torch.ones(11, dtype=torch.bool, device=DEVICE)
    others[index] = False
    assert (out[others] == 7).all()
    assert beside_is_untouched(out)


def test_scatter_rows_of_a_row_out_of_range_writes_nothing_foreign():
    out = moved(matrix(3, 8, F32, pad=2, skip=2, values=torch.zeros(3, 8)))
    values, index = some_values(3, 8, F32, 0), torch.tensor([3, -1, 1], device=DEVICE)
    scatter.scatter_rows_launch(values, index, None, None, out, F32).run(3, 1)
    assert torch.equal(out[1], values[2]) and not out[[0, 2]].any()
    assert beside_is_untouched(out)


def test_scatter_rows_that_are_not_distinct_add_up():
    values, index = some_values(5, 70, F32, 0), torch.tensor([2, 0, 2, 2, 1], device=DEVICE)
    factor, base = torch.randn(5, device=DEVICE), some_values(5, 70, F32, 1)
    found = TRITON_PASSES.scatter_rows((4, 70), F32, index, values, factor, base, distinct=False)
    terms = values * factor[:, None] + base
    expected = torch.stack([terms[index == row].sum(dim=0) for row in range(4)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("values", TYPES)
@pytest.mark.parametrize("base", [None, *TYPES])
def test_scatter_rows_computes_in_float32_at_least(values, base):
    """In float64 where one of both is."""
    n, width = 5, 40
    wide = F64 if F64 in (values, base) else F32
    source, factor = some_values(n, width, values, 0), torch.randn(n, dtype=F64, device=DEVICE).to(F32)
    added = None if base is None else some_values(n, width, base, 1)
    index = torch.arange(n, device=DEVICE).flip(0)
    found = TRITON_PASSES.scatter_rows((n, width), F64, index, source, factor, added)
    expected = source.to(wide) * factor.to(wide)[:, None]
    expected = expected if added is None else expected + added.to(wide)
    torch.testing.assert_close(found, expected.to(F64).flip(0), rtol=4 * EPSILON[wide], atol=4 * EPSILON[wide])


def test_scatter_rows_of_columns_of_any_stride():
    values, index = some_values(6, 40, F32, 0), torch.arange(6, device=DEVICE)
    transposed = values.t().contiguous().t()
    found = TRITON_PASSES.scatter_rows((6, 40), BF16, index, transposed, None, transposed)
    assert torch.equal(found, (2 * values).to(BF16))


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("out", TYPES)
def test_scaled_to_dtype(source, out):
    for shape in ((1,), (8,), (2047,), (3, 1667)):
        g = torch.Generator().manual_seed(shape[0])
        a = torch.randn(shape, generator=g).to(source).to(DEVICE)
        factor = torch.tensor(1.7, dtype=accumulate(source), device=DEVICE)
        before = a.clone()
        expected = (a.to(factor.dtype) * factor).to(out)
        found = TRITON_PASSES.scaled_to_dtype(a, factor, out, in_place=False)
        assert torch.equal(found, expected) and found.dtype == out
        assert torch.equal(a, before)
        found = TRITON_PASSES.scaled_to_dtype(a, factor, out, in_place=True)
        assert torch.equal(found, expected)
        assert (found.data_ptr() == a.data_ptr()) == (source == out)


@pytest.mark.parametrize("source", [F32, F64])
@pytest.mark.parametrize("out", TYPES)
def test_scaled_to_dtype_is_that_of_torch(source, out):
    a = torch.randn(41, 130, dtype=source, device=DEVICE)
    factor = torch.tensor(-0.3, dtype=F64, device=DEVICE)
    expected = torch_rows.scaled_to_dtype(a, factor, out, in_place=False)
    assert torch.equal(TRITON_PASSES.scaled_to_dtype(a, factor, out, in_place=False), expected)
    for strided in (a.t().contiguous().t(), torch.cat((a, a), dim=1)[:, :130]):
        for in_place in (False, True):
            assert torch.equal(TRITON_PASSES.scaled_to_dtype(strided, factor, out, in_place), expected)


def test_scaled_to_dtype_writes_no_further_than_its_elements():
    memory = torch.full((100,), 3.0, device=DEVICE)
    launch = scaled_to_dtype_launch(torch.ones(60, device=DEVICE), torch.full((1,), 2.0, device=DEVICE), memory[20:80])
    launch.run(1)
    assert (memory[20:80] == 2).all() and (memory[:20] == 3).all() and (memory[80:] == 3).all()


def test_no_rows_and_no_columns():
    labels, none = torch.empty(0, dtype=torch.long, device=DEVICE), torch.empty(0, 4, device=DEVICE)
    factor = torch.ones((), device=DEVICE)
    assert not TRITON_PASSES.scatter_rows((7, 4), F32, labels, none, factor).any()
    assert TRITON_PASSES.scatter_rows((7, 0), F16, torch.arange(3, device=DEVICE), torch.empty(3, 0, device=DEVICE)).shape == (
        7,
        0,
    )
    assert TRITON_PASSES.scaled_to_dtype(none, factor, F16, in_place=False).shape == (0, 4)
    assert TRITON_PASSES.segment_sum(torch.empty(0, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)).shape == (
        0,
    )
