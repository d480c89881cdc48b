"""Triton's logits of the labels against float64, over types, strides and shapes that are multiples of nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import logitless as ll

from ..native.emulated import BF16, F32, F64, TYPES, matrix
from ..native.operators import EPSILON, accumulate, expected_dot
from .conftest import DEVICE, moved

pytest.importorskip("triton")
from logitless.kernels.backends.triton import targets

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
    got = targets.target_logits(x, weight, bias, labels, precision)
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
        zy, k, slope = targets.target_logit_and_slope(a, w, bias, labels, precision, head)
        r = targets.target_logits(a, w, bias, labels, precision).double()
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
        zy, _, slope = targets.target_logit_and_slope(
            u, torch.ones_like(u[:1]), None, torch.zeros(321, dtype=torch.long, device=DEVICE), "auto", ll.HeadSpec(softcap=1.0)
        )
        u = u[:, 0].double()
        torch.testing.assert_close(zy.double(), u.tanh(), rtol=4 * EPSILON[dtype], atol=0)
        torch.testing.assert_close(slope.double(), 1 / u.cosh().square(), rtol=16 * EPSILON[dtype], atol=0)


def test_target_logits_keep_minus_infinity_and_nan():
    x, w, bias, labels = some_rows(3, 8, 5, F32, F32)
    labels[:] = torch.tensor([0, 1, 2])
    bias[0], bias[1] = -math.inf, math.nan
    zy, k, slope = targets.target_logit_and_slope(x, w, bias, labels, "auto", ll.HeadSpec())
    assert zy[0] == -math.inf and k[0] == pytest.approx(-1e30)
    assert zy[1].isnan() and k[1].isnan() and zy[2] == k[2] and slope is None
    zy, k, slope = targets.target_logit_and_slope(x, w, bias, labels, "auto", ll.HeadSpec(softcap=20.0))
    assert zy[0] == k[0] == -20 and slope[0] == 0


def test_a_label_out_of_range_reads_nothing():
    x, w, bias, _ = some_rows(3, 8, 5, F32, F32)
    got = targets.target_logits(x, w, bias, torch.tensor([5, -1, 4], device=DEVICE), "auto")
    assert got.isnan().tolist() == [True, True, False]


def test_a_target_logit_does_not_depend_on_its_neighbours():
    x, w, bias, labels = some_rows(7, 1300, 9, BF16, F32)
    whole = targets.target_logits(x, w, bias, labels, "float32")
    for i in range(7):
        assert torch.equal(targets.target_logits(x[i : i + 1], w, bias, labels[i : i + 1], "float32")[0], whole[i])


def test_columns_of_any_stride():
    x, w, bias, labels = some_rows(6, 40, 17, F32, F32)
    wanted = targets.target_logits(x, w, bias, labels, "auto")
    there = targets.target_logits(x.t().contiguous().t(), w.t().contiguous().t(), bias, labels, "auto")
    assert torch.equal(there, wanted)


def test_no_rows():
    labels, none = torch.empty(0, dtype=torch.long, device=DEVICE), torch.empty(0, 4, device=DEVICE)
    assert targets.target_logits(none, torch.empty(7, 4, device=DEVICE), None, labels, "auto").shape == (0,)
    zy, k, slope = targets.target_logit_and_slope(none, torch.empty(7, 4, device=DEVICE), None, labels, "auto", HEADS[2])
    assert zy.shape == k.shape == slope.shape == (0,)
