"""The C++ operators against float64, on every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.operators import loading, schemas

from .operators import finished_tile, some_factors

if loading.why_no_cpu_extension():
    pytest.skip("; ".join(loading.why_no_cpu_extension()), allow_module_level=True)

ops = torch.ops.logitless
FLOOR = -1000.0
HEADS = [HeadSpec(), HeadSpec(logit_scale=0.3, temperature=0.7), HeadSpec(logit_scale=-2.0, softcap=5.0, temperature=1.3)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
#: What a sum of float32 values may be off by, relative to the sum of their sizes; a float64 one.
EPS = {torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def acc_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def numbers(head: HeadSpec) -> tuple[float, float, float]:
    return head.logit_scale, head.softcap or 0.0, head.temperature


class Reference:
    """Everything the pass knows of some rows, in float64."""

    def __init__(self, raw, labels, head, k, first):
        n, w = raw.shape
        self.z = head.apply(raw)
        self.slope = torch.ones_like(raw)
        if head.softcap is not None:  # 1 - tanh^2, without its cancellation
            self.slope = 1 / torch.cosh(raw * head.logit_scale / head.softcap) ** 2
        index = torch.arange(first, first + w)
        self.inside = index == labels[:, None]
        self.d = self.z - k.double()[:, None]
        self.e = self.d.exp().masked_fill(self.inside, 0)
        none = torch.full((n, 1), -torch.inf, dtype=torch.float64)

        def top(mask):
            return torch.cat((self.z.masked_fill(~mask, -torch.inf), none), 1).amax(1)

        self.sums = {
            "e": self.e.sum(1),
            "ez": (self.e * self.d.clamp(min=FLOOR)).sum(1),
            "ee": (self.e**2).sum(1),
            "z": self.z.sum(1),
            "target": top(self.inside),
            "before": top(index < labels[:, None]),
            "after": top(index > labels[:, None]),
        }

    def sizes(self):
        """What the errors of each sum are relative to."""
        return {**self.sums, "ez": (self.e * self.d.clamp(min=FLOOR)).abs().sum(1) + self.sums["e"], "z": self.z.abs().sum(1)}


def assert_sums(sums, k_before, k_after, reference_of, acc, slack=1.0):
    """Sums against the reference relative to the k that came out."""
    ref = reference_of(k_after)
    for row, name in enumerate(schemas.SUMS):
        size = ref.sizes()[name].abs()
        if name in ("target", "before", "after"):
            size = ref.z.abs().nan_to_num(0, 0, 0).amax(1)
        # an exponent of d is as good as d: absolute error eps * |z|
        reach = 1 + (ref.z.abs().nan_to_num(0, 0, 0).amax(1) + k_after.abs().double() if name in ("e", "ez", "ee") else 0)
        got, want = sums[row], ref.sums[name]
        # where a GEMM made the logits (slack > 1), they may cancel: the error is that of its terms
        terms = (ref.z.shape[1] if name == "z" else 1) * (slack > 1) if name in ("z", "target", "before", "after") else 0
        same = (got == want) | ((got - want).abs() <= slack * EPS[acc] * (size * reach + terms + 1e-30))
        assert same.all(), (name, got[~same], want[~same])


def make(n, w, dtype, seed, peak=0.0, first=3, gap=2):
    g = torch.Generator().manual_seed(seed)
    raw = torch.randn(n, w + gap, generator=g, dtype=torch.float64)
    labels = torch.randint(max(0, first - 2), first + w + 2, (n,), generator=g)
    if peak and w > 1:
        raw[torch.arange(n), torch.randint(w, (n,), generator=g)] += peak
    source = raw.to(dtype)[:, :w]  # rows with gaps
    k = torch.randn(n, generator=g, dtype=torch.float64).to(acc_of(dtype))
    return source, labels, k


@pytest.mark.parametrize("head", HEADS, ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(0, 5),
    w=st.sampled_from([1, 2, 7, 16, 33, 1000, 1024, 1025, 2500]),
    seed=st.integers(0, 999),
    peak=st.sampled_from([0.0, 20.0, 200.0]),
    bias=st.booleans(),
)
def test_tile_pass(dtype, head, n, w, seed, peak, bias):
    source, labels, k = make(n, w, dtype, seed, peak)
    acc, first = acc_of(dtype), 3
    b = torch.randn(first + w, generator=torch.Generator().manual_seed(seed)).to(acc) if bias else None
    if bias and w > 2:
        b[first + 1] = -torch.inf
    raw = source.double() + (b[first:].double() if bias else 0)
    for destination in (None, torch.empty_like(source), source.clone()):
        sums, raised = schemas.new_sums(n, source.device), k.clone()
        into = source.clone() if destination is not None and destination.shape == source.shape else source
        out = into if destination is not None else None  # in place
        ops.tile_pass(into, out, b, labels, raised, sums, None, None, None, *numbers(head), first, 15, 0)
        assert_sums(sums, k, raised, lambda kk: Reference(raw, labels, head, kk, first), acc)
        assert (raised >= k).all()
        if out is not None:
            ref = Reference(raw, labels, head, raised, first)
            want = ref.e * ref.slope
            scale = torch.finfo(dtype).eps * want.abs() + 2 * torch.finfo(dtype).tiny
            reach = 1 + EPS[acc] / torch.finfo(dtype).eps * (10 + ref.z.abs().nan_to_num(0, 0, 0) + raised.abs()[:, None])
            limit = torch.finfo(dtype).max
            ok = ((out.double() - want).abs() <= 2 * scale * reach) | (want > limit)
            # 1 - tanh^2 of the reference cancels where the model's own value does not
            ok |= ref.slope < 1e-12
            assert ok.all(), (out[~ok], want[~ok])


def test_tile_pass_carries_sums_over_blocks_and_raises_k_late():
    raw = torch.randn(6, 4000, dtype=torch.float64)
    raw[:3, 3500] += 150
    raw[4, 100] += 60
    labels = torch.tensor([0, 1999, 2000, 3500, 3999, 100])
    k = raw[torch.arange(6), labels].float()
    sums, raised = schemas.new_sums(6, raw.device), k.clone()
    for first in range(0, 4000, 1300):
        part = raw[:, first : first + 1300].float()
        ops.tile_pass(part, None, None, labels, raised, sums, None, None, None, 1.0, 0.0, 1.0, first, 15, 0)
    assert (raised > k).any() and (raised == k).any()
    raw = raw.float().double()
    assert_sums(sums, k, raised, lambda kk: Reference(raw, labels, HeadSpec(), kk, 0), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peak", [0.0, 200.0])
@pytest.mark.parametrize("width", [5, 1000, 1031, 9000])
def test_tile_pass_gives_the_same_bits_whatever_else_is_asked_for(dtype, peak, width):
    source, labels, k = make(6, width, dtype, 4, peak)
    results = []
    for outputs, out in ((0, None), (15, None), (0, torch.empty_like(source)), (15, source)):
        sums, raised = schemas.new_sums(6, source.device), k.clone()
        ops.tile_pass(source, out, None, labels, raised, sums, None, None, None, 1.0, 0.0, 1.0, 3, outputs, 0)
        results.append((sums[0], raised))
    for sums, raised in results[1:]:
        assert torch.equal(sums, results[0][0]) and torch.equal(raised, results[0][1])


@pytest.mark.parametrize(("rounding", "dtype"), [(1, torch.bfloat16), (2, torch.float16)])
def test_tile_pass_rounds_logits_on_request(rounding, dtype):
    source, labels, k = make(4, 300, torch.float32, 0)
    bias = torch.randn(303)
    sums, out = schemas.new_sums(4, source.device), torch.empty(4, 300)
    ops.tile_pass(source, out, bias, labels, k, sums, None, None, None, 1.0, 0.0, 1.0, 3, 15, rounding)
    raw = (source + bias[3:]).to(dtype).double()
    assert_sums(sums, k, k, lambda kk: Reference(raw, labels, HeadSpec(), kk, 3), torch.float32)


@pytest.mark.parametrize("head", HEADS, ids=["plain", "scaled", "capped"])
def test_tile_pass_of_a_known_row_mixes_and_writes_the_target(head):
    source, labels, k = make(5, 1500, torch.float32, 1)
    labels[:2] = 700
    mix, at_target = torch.randn(2, 5), torch.randn(5)
    out = torch.empty(5, 1500)
    ops.tile_pass(source, out, None, labels, k, None, mix, at_target, None, *numbers(head), 3, 0, 0)
    ref = Reference(source.double(), labels, head, k, 3)
    want = ref.e * ref.slope * (mix[0].double()[:, None] + mix[1].double()[:, None] * ref.d)
    want = torch.where(ref.inside, at_target.double()[:, None], want)
    # the two terms of the factor may cancel: the error is that of their sizes
    size = ref.e * ref.slope * (mix[0].double().abs()[:, None] + mix[1].double().abs()[:, None] * ref.d.abs())
    reach = 10 + ref.z.abs() + k.abs().double()[:, None]
    assert ((out - want).abs() <= 1e-6 * reach * size + 1e-6 * want.abs()).all()


@pytest.mark.parametrize("outputs", [16, 31])
@pytest.mark.parametrize("destination", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tile_pass_leaves_out_the_slope_on_request(outputs, destination):
    source, labels, k = make(5, 1500, torch.float32, 1)
    labels[:2] = 700
    want, got = torch.empty(5, 1500), torch.empty(5, 1500, dtype=destination)
    plain = HeadSpec(softcap=HEADS[2].softcap)
    ops.tile_pass(source, got, None, labels, k, schemas.new_sums(5, k.device), None, None, None, *numbers(plain), 3, outputs, 0)
    capped = plain.apply(source)
    ops.tile_pass(
        capped, want, None, labels, k.clone(), schemas.new_sums(5, k.device), None, None, None, 1.0, 0.0, 1.0, 3, 0, 0
    )
    torch.testing.assert_close(got.float(), want, rtol=1e-5 + torch.finfo(destination).eps, atol=1e-6)


def test_tile_pass_writes_16_bit_rows_where_32_bit_rows_start():
    source, labels, k = make(7, 2048, torch.float32, 2, gap=0)
    k -= 1
    want = torch.empty(7, 2048, dtype=torch.bfloat16)
    sums = schemas.new_sums(7, source.device)
    ops.tile_pass(source.clone(), want, None, labels, k.clone(), sums, None, None, None, 1.0, 0.0, 1.0, 3, 0, 0)
    source = source.contiguous()
    in_place = source.view(torch.bfloat16)[:, :2048]
    ops.tile_pass(source, in_place, None, labels, k, sums, None, None, None, 1.0, 0.0, 1.0, 3, 0, 0)
    assert torch.equal(in_place, want)


def test_a_row_with_nan_or_infinite_logits_ends():
    source = torch.randn(3, 5000)
    source[0, 7] = torch.nan
    source[1, 4999] = torch.inf
    labels, k, sums = torch.tensor([1, 2, 3]), torch.zeros(3), schemas.new_sums(3, source.device)
    ops.tile_pass(source, source, None, labels, k, sums, None, None, None, 1.0, 0.0, 1.0, 0, 15, 0)
    assert sums[0, :2].isnan().all() and sums[0, 2].isfinite()


needs_gemm = pytest.mark.skipif(not loading.has_bf16_gemm(), reason="oneDNN has no bfloat16 small GEMM here")


@needs_gemm
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@settings(max_examples=20, deadline=None)
@given(
    n=st.sampled_from([0, 1, 3, 15, 16, 17, 64, 65, 100]),
    vocab=st.sampled_from([1, 2, 63, 64, 65, 300, 513, 17000]),
    hidden=st.sampled_from([2, 6, 32, 34, 66, 128]),
    seed=st.integers(0, 999),
    head=st.sampled_from(HEADS),
    gap=st.sampled_from([0.0, 0.0, 60.0, 300.0]),
    outputs=st.sampled_from([0, 15, 31]),  # 16: without the slope
    bias=st.booleans(),
)
def test_score_block(weight_dtype, n, vocab, hidden, seed, head, gap, outputs, bias):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, hidden + 2, generator=g).bfloat16()[:, :hidden]  # rows with gaps
    w = (torch.randn(vocab, hidden, generator=g) / hidden**0.5).to(weight_dtype)
    if gap and n and vocab > 1:  # one entry far above the targets of some tokens
        v = int(torch.randint(vocab, (1,), generator=g))
        w[v] = (x[: 1 + n // 2].float().mean(0) * (gap / max(1.0, x[0].float().square().sum().item()))).to(weight_dtype)
    b = torch.randn(vocab, generator=g) if bias else None
    labels = torch.randint(vocab, (n,), generator=g)
    raw = x.double() @ w.bfloat16().double().T + (b.double() if bias else 0)
    k = head.apply(raw)[torch.arange(n), labels].float()
    packed = torch.empty(schemas.packed_tokens_size(n, hidden), dtype=torch.bfloat16)
    ops.pack_tokens(x, packed)
    gradient = torch.empty(vocab * n, dtype=torch.bfloat16)
    sums, raised = schemas.new_sums(n, x.device), k.clone()
    ops.score_block(packed, w, b, labels, k, raised, sums, None, None, gradient, *numbers(head), 0, outputs, 0)
    if not outputs:
        full = schemas.new_sums(n, x.device)
        ops.score_block(packed, w, b, labels, k, k.clone(), full, None, None, None, *numbers(head), 0, 15, 0)
        torch.testing.assert_close(sums[0], full[0], rtol=0, atol=0) if not bool((raised != k).any()) else None
        sums[1:] = full[1:]
    # the float32 GEMM's own rounding: hidden terms of size |x| |w|
    slack = 4 + (x.float().norm(dim=1).max().item() * w.float().norm(dim=1).max().item() if n else 0)
    assert_sums(sums, k, raised, lambda kk: Reference(raw, labels, head, kk, 0), torch.float32, slack)
    ref = Reference(raw, labels, head, raised, 0)
    want, got = (ref.e if outputs & 16 else ref.e * ref.slope), gradient.view(vocab, n).T.double()
    roundings = 1 + (raised != k).double()[:, None]  # what was written before k was raised is rounded again
    error = (got - want).abs() - want.abs() * 2**-8 * 1.02 * roundings - 1e-5 * (1 + slack) * want.abs()
    ok = error <= 1e-34 + ref.e * 2**-123  # exponents of both factors stop where float32 would be subnormal
    assert ok.all(), (got[~ok], want[~ok], raised - k)

    # the same sums, to the bit, from the vocabulary in blocks
    again, k_again = schemas.new_sums(n, x.device), k.clone()
    for v in range(0, vocab, 2 * schemas.SPAN):
        here = w[v : v + 2 * schemas.SPAN]
        ops.score_block(packed, here, b, labels, k, k_again, again, None, None, None, *numbers(head), v, outputs, 0)
    assert torch.equal(again[0], sums[0]) and torch.equal(k_again, raised)

    dhidden = torch.randn(n, hidden, generator=g)
    before = dhidden.double()
    ops.grad_hidden(gradient, w, dhidden)
    exact = got @ w.bfloat16().double()
    size = got.abs() @ w.bfloat16().double().abs() + before.abs()
    eps32 = 1e-6 + 2e-7 * vocab**0.5  # a float32 sum of that many terms
    assert ((dhidden - before - exact).abs() <= eps32 * size + 1e-30).all()

    scale, values = torch.randn(n, generator=g), torch.randn(n, generator=g)
    rows = torch.empty(schemas.packed_rows_size(n, hidden), dtype=torch.bfloat16)
    ops.pack_rows(x, scale, rows)
    scaled = (x.float() * scale[:, None]).bfloat16().double()
    exact = (got.T @ scaled).index_add_(0, labels, x.double() * values.double()[:, None])
    size = (got.T.abs() @ scaled.abs()).index_add_(0, labels, (x.double() * values.double()[:, None]).abs())
    exact_bias = (got.T @ scale.double()).index_add_(0, labels, values.double())
    size_bias = (got.T.abs() @ scale.double().abs()).index_add_(0, labels, values.double().abs())
    for accumulate, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.bfloat16)):
        dweight = torch.ones(vocab, hidden, dtype=dtype)
        dbias = torch.zeros(vocab)
        ops.grad_weight(gradient, rows, x, scale, values, labels, 0, vocab, accumulate, dweight, dbias)
        eps = 2**-8 if dtype == torch.bfloat16 else 1e-6
        assert (
            (dweight - exact - float(accumulate)).abs() <= eps * (exact.abs() + float(accumulate)) + 1e-6 * size + 1e-30
        ).all()
        assert ((dbias - exact_bias).abs() <= 1e-6 * size_bias + 1e-30).all()


@needs_gemm
def test_score_block_is_the_same_for_any_number_of_threads():
    x, w = torch.randn(70, 64).bfloat16(), torch.randn(3000, 64).bfloat16()
    labels = torch.randint(3000, (70,))
    packed = torch.empty(schemas.packed_tokens_size(70, 64), dtype=torch.bfloat16)
    ops.pack_tokens(x, packed)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sums, gradient = schemas.new_sums(70, x.device), torch.empty(3000 * 70, dtype=torch.bfloat16)
            dhidden, k = torch.zeros(70, 64), torch.zeros(70)
            ops.score_block(packed, w, None, labels, torch.zeros(70), k, sums, None, None, gradient, 1.0, 0.0, 1.0, 0, 15, 0)
            ops.grad_hidden(gradient, w, dhidden)
            results.append((sums, gradient, k))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_indexed_dot(dtype, weight_dtype):
    x, w = torch.randn(9, 1500).to(dtype), torch.randn(40, 1500).to(weight_dtype)
    labels, acc = torch.randint(40, (9,)), acc_of(dtype)
    bias = torch.randn(40).to(acc)
    out = torch.empty(9, dtype=acc)
    ops.indexed_dot(x, w, bias, labels, False, out)
    products = x.double() * w[labels].to(dtype).double()
    want = products.sum(1) + bias[labels].double()
    assert ((out - want).abs() <= EPS[acc] * (products.abs().sum(1) + 1)).all()
    matched = torch.empty_like(out)
    ops.indexed_dot(x, w, bias, labels, True, matched)
    assert torch.equal(matched, out.to(dtype).to(acc))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_scattering_and_converting_round_once(dtype):
    acc = acc_of(dtype)
    values, rows, factor = torch.randn(5, 37).to(acc), torch.tensor([7, 0, 3, 9, 1]), torch.randn(5).to(acc)
    out = torch.zeros(11, 37, dtype=dtype)
    ops.scale_scatter(values, rows, factor, out)
    want = torch.zeros(11, 37, dtype=dtype).index_copy_(0, rows, (values * factor[:, None]).to(dtype))
    assert torch.equal(out, want)
    ops.scale_scatter(values, rows, factor[:1], out)
    assert torch.equal(out[rows], (values * factor[0]).to(dtype))
    source = torch.randn(300_001).to(acc)
    out = torch.empty(300_001, dtype=dtype)
    ops.scaled_convert(source, factor[:1], out)
    assert torch.equal(out, (source * factor[0]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finish_tile(dtype):
    g = torch.Generator().manual_seed(0)
    for n, columns, width in ((0, 9, 4), (3, 0, 4), (1, 1, 1), (5, 77, 16), (4, 77, 100), (7, 4500, 2048), (3, 300, 1)):
        whole = torch.randn(n, columns + 3, generator=g).to(dtype)
        for multiplied, target in ((True, True), (True, False), (False, True), (False, False)):
            both = whole.clone()
            tile, beside = both[:, 1 : 1 + columns], both[:, 1 + columns :]
            labels = torch.randint(0, max(1, columns), (n,), generator=g)
            factors = some_factors(-(-columns // width), n, acc_of(dtype), g) if multiplied else None
            at_target = torch.randn(n, generator=g).to(acc_of(dtype)) if target and columns else None
            expected = finished_tile(tile, factors, labels, at_target, width)
            ops.finish_tile(tile, factors, labels, at_target, width)
            assert torch.equal(tile, expected)
            assert torch.equal(beside, whole[:, 1 + columns :]) and torch.equal(both[:, 0], whole[:, 0])


def test_finish_tile_leaves_blocks_of_factor_1_to_the_bit():
    signalling = torch.full((2, 40), 0x7F81, dtype=torch.int16).view(torch.bfloat16)  # arithmetic would make it 0x7FC1
    factors = torch.ones(4, 2)
    factors[2, 1] = 0.5
    ops.finish_tile(signalling, factors, torch.zeros(2, dtype=torch.long), None, 10)
    same = signalling.view(torch.int16) == 0x7F81
    assert same[0].all() and same[1, :20].all() and same[1, 30:].all()
    assert signalling.isnan().all()


def test_special_values_survive_conversion():
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 65504.0, 65520.0, 6e-8, 2e-8, 3.4e38, 1e-5])
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(len(special), dtype=dtype)
        ops.scaled_convert(special, torch.ones(1), out)
        torch.testing.assert_close(out, special.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_bad_arguments_are_named():
    x, labels, k = torch.randn(2, 8), torch.zeros(2, dtype=torch.long), torch.zeros(2)
    sums = schemas.new_sums(2, x.device)

    def call(**changes):
        given = {"source": x, "destination": None, "bias": None, "labels": labels, "k": k, "sums": sums, "mix": None}
        given |= {
            "at_target": None,
            "inverse_temperature": None,
            "logit_scale": 1.0,
            "softcap": 0.0,
            "temperature": 1.0,
            "first": 0,
            "outputs": 0,
        }
        ops.tile_pass(**(given | {"rounding": 0} | changes))

    for name, value in {
        "source": torch.zeros(2, 8, dtype=torch.int32),
        "destination": torch.empty(2, 7),
        "bias": torch.zeros(7),
        "labels": labels.int(),
        "k": k.double(),
        "sums": sums.float(),
        "mix": torch.zeros(3, 2),
        "at_target": torch.zeros(1),
        "inverse_temperature": torch.ones(3),
        "rounding": 3,
    }.items():
        with pytest.raises(RuntimeError, match=name):
            call(**{name: value})


def test_bad_arguments_of_finish_tile_are_named():
    good = {"tile": torch.zeros(2, 8), "factors": torch.ones(3, 2), "labels": torch.zeros(2, dtype=torch.long)}
    good |= {"at_target": torch.zeros(2), "width": 3}
    for name, value in {
        "tile": torch.zeros(8).expand(2, 8),
        "factors": torch.ones(2, 3),
        "labels": torch.zeros(3, dtype=torch.long),
        "at_target": torch.zeros(2, dtype=torch.float64),
        "width": 0,
    }.items():
        with pytest.raises(RuntimeError, match=name):
            ops.finish_tile(**(good | {name: value}))


ISAS = ("avx512_bf16", "avx512", "avx2", "generic")


@pytest.mark.skipif("LOGITLESS_CPU_ISA" in os.environ, reason="this is the run on one instruction set")
@pytest.mark.parametrize("isa", [i for i in ISAS if i != loading.cpu_instruction_set()])
def test_other_instruction_sets(isa):
    env = os.environ | {"LOGITLESS_CPU_ISA": isa}
    code = "from logitless.kernels.operators.loading import *; print(why_no_cpu_extension() or cpu_instruction_set())"
    name = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout.strip()
    if name != isa:
        pytest.skip(f"this machine has no {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=os.path.dirname(__file__) + "/../..")
    assert run.returncode == 0, run.stdout[-3000:]
