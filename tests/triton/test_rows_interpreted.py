"""Triton's kernels on rows, against float64, over types, strides and shapes that are multiples of nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import logitless as ll
from logitless.kernels.sequence_logps import segment_sum

from ..native.emulated import BF16, F16, F32, F64, TYPES, beside_is_untouched, matrix
from ..native.operators import EPSILON, accumulate, expected_dot, finished_tile, some_factors
from .conftest import DEVICE, moved

pytest.importorskip("triton")
from logitless.kernels.backends.triton import rows

#: NumPy's, in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
HEADS = [ll.HeadSpec(), ll.HeadSpec(-0.3, None, 1.7), ll.HeadSpec(1.3, 5.0, 0.7), ll.HeadSpec(softcap=1e3)]


def some_rows(n, hidden, vocab, x, weight, *, pad=0, skip=0, seed=0):
    """x (n, H), weight (V, H), bias (V,) of any stride, labels (n,)."""
    g = torch.Generator().manual_seed(seed)
    a = matrix(n, hidden, x, pad=pad, skip=skip, values=torch.randn(n, hidden, generator=g))
    w = matrix(vocab, hidden, weight, pad=skip, skip=pad, values=torch.randn(vocab, hidden, generator=g))
    bias = matrix(vocab, 1, weight, pad=pad, values=torch.randn(vocab, 1, generator=g))[:, 0]
    return *(moved(t) for t in (a, w, bias)), torch.randint(vocab, (n,), generator=g).to(DEVICE)


@pytest.mark.parametrize("x", TYPES)
@pytest.mark.parametrize("weight", TYPES)
def test_target_logits_of_any_type(x, weight):
    for precision, with_bias in itertools.product(("float32", "match"), (False, True)):
        a, w, bias, labels = some_rows(5, 37, 23, x, weight, pad=1, skip=3)
        bias = bias if with_bias else None
        check_target_logits(a, w, bias, labels, precision)


@quick
@given(n=st.integers(1, 11), hidden=st.integers(1, 2100), pad=st.integers(0, 5), skip=st.integers(0, 3), seed=st.integers(0, 9))
@example(n=1, hidden=1, pad=0, skip=0, seed=0)
@example(n=4, hidden=1024, pad=0, skip=0, seed=0)
@example(n=9, hidden=2049, pad=8, skip=1, seed=1)
def test_target_logits_of_any_shape(n, hidden, pad, skip, seed):
    a, w, bias, labels = some_rows(n, hidden, 1 + seed * 7, F32, BF16, pad=pad, skip=skip, seed=seed)
    check_target_logits(a, w, bias, labels, "float32")


def check_target_logits(x, weight, bias, labels, precision):
    got = rows.target_logits(x, weight, bias, labels, precision)
    match = precision == "match" and x.dtype.itemsize == 2
    expected, scale = expected_dot(x, weight, bias, labels, match)
    unit = EPSILON[accumulate(x.dtype)]
    limit = 8 * unit * scale + (2 * EPSILON[x.dtype] * expected.abs() if match else 0)
    assert got.dtype == accumulate(x.dtype)
    assert ((got.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("x", [F32, BF16, F64])
def test_target_logit_and_slope_apply_the_head(head, x):
    a, w, bias, labels = some_rows(9, 50, 31, x, x)
    w[labels[0]] *= 1e-4  # a tanh of almost nothing, and one that is saturated
    bias[labels[0]] = 0
    w[labels[1]] *= 100
    for precision in ("float32", "match"):
        zy, k, slope = rows.target_logit_and_slope(a, w, bias, labels, precision, head)
        r = rows.target_logits(a, w, bias, labels, precision).double()
        unit = 8 * EPSILON[zy.dtype]
        expected = head.apply(r)
        torch.testing.assert_close(zy.double(), expected, rtol=unit, atol=0)
        assert torch.equal(k, zy)
        assert (slope is None) == (head.softcap is None)
        if slope is not None:
            u = r * (head.logit_scale / head.softcap)
            rtol = unit * (1 + 4 * float(u.abs().max()))
            torch.testing.assert_close(slope.double(), 1 / torch.cosh(u).square(), rtol=rtol, atol=1e-37)


def test_the_soft_cap_is_exact_in_every_type():
    """tanh over all its range: relative errors of z and of the slope."""
    for dtype in (F32, F64):
        u = torch.linspace(-4, 4, 321, dtype=dtype, device=DEVICE)[:, None] ** 3 / 16
        zy, _, slope = rows.target_logit_and_slope(
            u, torch.ones_like(u[:1]), None, torch.zeros(321, dtype=torch.long, device=DEVICE), "auto", ll.HeadSpec(softcap=1.0)
        )
        u = u[:, 0].double()
        torch.testing.assert_close(zy.double(), u.tanh(), rtol=4 * EPSILON[dtype], atol=0)
        torch.testing.assert_close(slope.double(), 1 / u.cosh().square(), rtol=16 * EPSILON[dtype], atol=0)


def test_target_logits_keep_minus_infinity_and_nan():
    x, w, bias, labels = some_rows(3, 8, 5, F32, F32)
    labels[:] = torch.tensor([0, 1, 2])
    bias[0], bias[1] = -math.inf, math.nan
    zy, k, slope = rows.target_logit_and_slope(x, w, bias, labels, "auto", ll.HeadSpec())
    assert zy[0] == -math.inf and k[0] == pytest.approx(-1e30)
    assert zy[1].isnan() and k[1].isnan() and zy[2] == k[2] and slope is None
    zy, k, slope = rows.target_logit_and_slope(x, w, bias, labels, "auto", ll.HeadSpec(softcap=20.0))
    assert zy[0] == k[0] == -20 and slope[0] == 0


def test_a_label_out_of_range_reads_nothing():
    x, w, bias, _ = some_rows(3, 8, 5, F32, F32)
    got = rows.target_logits(x, w, bias, torch.tensor([5, -1, 4], device=DEVICE), "auto")
    assert got.isnan().tolist() == [True, True, False]


def test_a_target_logit_does_not_depend_on_its_neighbours():
    x, w, bias, labels = some_rows(7, 1300, 9, BF16, F32)
    whole = rows.target_logits(x, w, bias, labels, "float32")
    for i in range(7):
        assert torch.equal(rows.target_logits(x[i : i + 1], w, bias, labels[i : i + 1], "float32")[0], whole[i])


def test_columns_of_any_stride():
    x, w, bias, labels = some_rows(6, 40, 17, F32, F32)
    wanted = rows.target_logits(x, w, bias, labels, "auto")
    there = rows.target_logits(x.t().contiguous().t(), w.t().contiguous().t(), bias, labels, "auto")
    assert torch.equal(there, wanted)


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
        rows.finish_tile(tile, [None] if factors is None else list(factors), labels, at_target, width)
        assert torch.equal(tile, expected)
        assert beside_is_untouched(tile)


def test_finish_tile_takes_blocks_without_factors():
    tile = torch.randn(4, 30, device=DEVICE)
    factor = torch.tensor([1.0, 0.5, 1.0, 0.25], device=DEVICE)
    expected = tile.clone()
    expected[:, 10:20] *= factor[:, None]
    rows.finish_tile(tile, [None, factor, None], torch.zeros(4, dtype=torch.long, device=DEVICE), None, 10)
    assert torch.equal(tile, expected)


def test_finish_tile_leaves_blocks_of_factor_1_to_the_bit():
    signalling = torch.full((2, 40), 0x7F81, dtype=torch.int16, device=DEVICE).view(BF16)  # arithmetic would make it 0x7FC1
    factors = torch.ones(4, 2, device=DEVICE)
    factors[2, 1] = 0.5
    rows.finish_tile(signalling, list(factors), torch.zeros(2, dtype=torch.long, device=DEVICE), None, 10)
    changed = (signalling.view(torch.int16) != 0x7F81).nonzero()
    assert {tuple(place) for place in changed.tolist()} <= {(1, column) for column in range(20, 30)}


def test_finish_tile_of_a_label_out_of_range_writes_nothing_foreign():
    tile = moved(matrix(3, 8, F32, pad=2, values=torch.zeros(3, 8)))
    rows.finish_tile(tile, [None], torch.tensor([8, -1, 4], device=DEVICE), torch.ones(3, device=DEVICE), 8)
    assert tile.nonzero().tolist() == [[2, 4]]
    assert beside_is_untouched(tile)


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
        for function in (rows.segment_sum, segment_sum):
            got = function(values.to(DEVICE), offsets)
            assert got.dtype == dtype
            limit = 2 * EPSILON[dtype] * wanted.abs() + 16 * EPSILON[F64] * size
            assert ((got.double() - wanted).abs() <= limit).all()


@pytest.mark.parametrize("function", [rows.segment_sum, segment_sum], ids=["triton", "any device"])
def test_nothing_leaks_from_one_segment_into_another(function):
    values, offsets = torch.randn(40, device=DEVICE), torch.tensor([0, 7, 7, 20, 40], device=DEVICE)
    clean = function(values, offsets)
    values[[3, 25]] = torch.tensor([math.nan, math.inf], device=DEVICE)
    got = function(values, offsets)
    assert got[0].isnan() and got[3] == math.inf and torch.equal(got[1:3], clean[1:3]) and got[1] == 0


def test_segment_sums_are_differentiable():
    values = torch.randn(20, dtype=F64, device=DEVICE, requires_grad=True)
    offsets = torch.tensor([0, 3, 3, 19, 20], device=DEVICE)
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, offsets), values)
    assert torch.autograd.gradgradcheck(lambda v: segment_sum(v, offsets).square(), values)
    assert torch.equal(torch.func.grad(lambda v: segment_sum(v, offsets).sum())(values.detach()), torch.ones_like(values))


@pytest.mark.parametrize("values", [F32, F64])
@pytest.mark.parametrize("out", TYPES)
def test_scale_scatter(values, out):
    for width, each in itertools.product((1, 7, 64, 1100), (False, True)):
        n, count = 6, 11
        g = torch.Generator().manual_seed(width)
        source = moved(matrix(n, width, values, pad=width % 3, skip=1, values=torch.randn(n, width, generator=g)))
        target = moved(matrix(count, width, out, pad=1, skip=width % 4, values=torch.zeros(count, width)))
        index = torch.randperm(count, generator=g)[:n].to(DEVICE)
        factor = torch.randn(n if each else 1, generator=g).to(values).to(DEVICE)
        rows.scale_scatter(source, index, factor, target)
        expected = torch.zeros(count, width, dtype=out, device=DEVICE)
        expected[index] = (source * factor[:, None]).to(out)
        assert torch.equal(target, expected)
        assert beside_is_untouched(target)


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("out", TYPES)
def test_scaled_convert(source, out):
    for count in (1, 8, 2047, 5001):
        a = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(source).to(DEVICE)
        b = torch.full_like(a, math.nan, dtype=out)
        factor = torch.tensor([1.7], dtype=accumulate(source), device=DEVICE)
        rows.scaled_convert(a, factor, b)
        assert torch.equal(b, (a.to(factor.dtype) * factor).to(out))
        if source == out:
            rows.scaled_convert(a, factor, a)
            assert torch.equal(a, b)


def test_no_rows_and_no_columns():
    labels, none = torch.empty(0, dtype=torch.long, device=DEVICE), torch.empty(0, 4, device=DEVICE)
    assert rows.target_logits(none, torch.empty(7, 4, device=DEVICE), None, labels, "auto").shape == (0,)
    zy, k, slope = rows.target_logit_and_slope(none, torch.empty(7, 4, device=DEVICE), None, labels, "auto", HEADS[2])
    assert zy.shape == k.shape == slope.shape == (0,)
    rows.finish_tile(none, [torch.empty(0, device=DEVICE)] * 2, labels, torch.empty(0, device=DEVICE), 3)
    rows.finish_tile(torch.empty(3, 0, device=DEVICE), [], torch.zeros(3, dtype=torch.long, device=DEVICE), None, 5)
    rows.scale_scatter(none, labels, torch.ones(1, device=DEVICE), torch.empty(7, 4, device=DEVICE))
    rows.scaled_convert(none, torch.ones(1, device=DEVICE), torch.empty(0, 4, dtype=F16, device=DEVICE))
    assert rows.segment_sum(torch.empty(0, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)).shape == (0,)
