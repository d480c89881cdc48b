"""The smaller CUDA operators on the emulator, and all emulated tests under sanitizers."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .emulated import BF16, COMPILER, F16, F32, F64, ROOT, SANITIZED, TYPES, beside_is_untouched, matrix
from .operators import (
    EPSILON,
    PairCase,
    Tile,
    accumulate,
    expected_dot,
    expected_pairs,
    finished_tile,
    new_sums,
    some_factors,
)


def test_no_rows_and_no_columns(ops):
    for n, width in ((0, 10), (3, 0), (0, 0)):
        labels = torch.zeros(n, dtype=torch.long)
        sums = new_sums(n)
        Tile(torch.empty(n, width), torch.empty(n, width), labels, torch.zeros(n), sums=sums).run(ops)
        assert torch.equal(sums, new_sums(n))
    ops.indexed_dot(torch.empty(0, 4), torch.empty(7, 4), None, torch.empty(0, dtype=torch.long), False, torch.empty(0))
    ops.scale_scatter(torch.empty(0, 4), torch.empty(0, dtype=torch.long), torch.ones(1), torch.empty(7, 4))
    ops.scaled_convert(torch.empty(0, 4), torch.ones(1), torch.empty(0, 4, dtype=BF16))
    ops.finish_tile(torch.empty(0, 4), torch.empty(2, 0), torch.empty(0, dtype=torch.long), torch.empty(0), 3)
    ops.finish_tile(torch.empty(3, 0), torch.empty(0, 3), torch.zeros(3, dtype=torch.long), torch.zeros(3), 5)
    none = torch.empty(0, dtype=F64)
    ops.pair_loss(torch.empty(0), None, torch.zeros(1, dtype=torch.long), None, 0, False, 1, 0, 0, 1, none, none, None)


@pytest.mark.parametrize("x", TYPES)
@pytest.mark.parametrize("weight", TYPES)
def test_indexed_dot(ops, x, weight):
    for hidden in (1, 37, 256, 1500):
        check_indexed_dot(ops, x, weight, hidden)


def check_indexed_dot(ops, x, weight, hidden):
    n, vocab, match = 9, 23, hidden % 2 == 0
    g = torch.Generator().manual_seed(hidden)
    a = matrix(n, hidden, x, pad=hidden % 3, skip=hidden % 5, values=torch.randn(n, hidden, generator=g))
    w = matrix(vocab, hidden, weight, pad=hidden % 2, skip=1, values=torch.randn(vocab, hidden, generator=g))
    labels = torch.randint(0, vocab, (n,), generator=g)
    bias = None if hidden == 37 else torch.randn(vocab, generator=g).to(weight)
    out = torch.full((n,), math.nan, dtype=accumulate(x))
    ops.indexed_dot(a, w, bias, labels, match, out)
    expected, scale = expected_dot(a, w, bias, labels, match)
    limit = 8 * EPSILON[accumulate(x)] * scale + (2 * EPSILON[x] * expected.abs() if match else 0)
    assert ((out.double() - expected).abs() <= limit).all()


def test_indexed_dot_of_a_label_out_of_range_reads_nothing_foreign(ops):
    x, weight, out = torch.randn(3, 8), torch.randn(5, 8), torch.zeros(3)
    ops.indexed_dot(x, weight, None, torch.tensor([5, -1, 4]), False, out)
    assert out.isnan().tolist() == [True, True, False]


PAIR_CASES = [
    PairCase(0, False),
    PairCase(0, True, 2.0, 0.7, 0.1, 0.25),
    PairCase(0, False, 0.1, 0.0, 0.5),
    PairCase(1, False, 0.05),
    PairCase(1, True),
    PairCase(2, False, 0.1, scale=3.0),
    PairCase(2, True),
]


@pytest.mark.parametrize("case", PAIR_CASES, ids=str)
def test_pair_loss(emulated, ops, case):
    for weights, dtype in itertools.product((None, F32, BF16, F16, F64, torch.bool), (F32, F64)):
        check_pair_loss(emulated, ops, case, weights, dtype)


def check_pair_loss(emulated, ops, case, weights, dtype):
    with_ref = weights in (None, BF16)
    lengths = [5, 700, 0, 3, 64, 0, 0, 0, 1, 33]
    g = torch.Generator().manual_seed(1)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    n, pairs = int(offsets[-1]), len(lengths) // 2
    logps = -torch.rand(n, generator=g).to(dtype) * 3
    w = None
    if weights is not None:
        w = (torch.rand(n, generator=g) * (torch.rand(n, generator=g) > 0.3)).to(weights)
        if weights == torch.bool:
            w = torch.rand(n, generator=g) > 0.3
        logps[w == 0] = math.nan  # a token without weight changes nothing, whatever stands there
    ref = torch.randn(2 * pairs, generator=g, dtype=F64) * 5 if with_ref else None
    losses, sequences = torch.full((pairs,), math.nan, dtype=F64), torch.full((2 * pairs,), math.nan, dtype=F64)
    coefficients = torch.full((n,), math.nan, dtype=dtype)
    wanted = expected_pairs(case, logps.nan_to_num(), w, offsets, ref)
    numbers = (case.kind, case.mean, case.beta, case.gamma, case.label_smoothing, case.scale)
    emulated.order(case.kind)
    ops.pair_loss(logps, w, offsets, ref, *numbers, losses, sequences, coefficients)
    torch.testing.assert_close(sequences, wanted[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses, wanted[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(coefficients.double(), wanted[2], rtol=4 * EPSILON[dtype] + 1e-11, atol=1e-15)
    alone = torch.zeros_like(losses)
    ops.pair_loss(logps, w, offsets, ref, *numbers, alone, sequences, None)
    assert torch.equal(alone, losses)


@pytest.mark.parametrize("delta", [-5000.0, -50.0, 0.0, 50.0, 5000.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_pair_loss_far_from_the_margin(ops, delta, label_smoothing):
    logps = torch.tensor([delta, 0.0], dtype=F64)
    case = PairCase(0, False, 1.0, label_smoothing=label_smoothing)
    losses, sequences, coefficients = torch.zeros(1, dtype=F64), torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
    offsets = torch.tensor([0, 1, 2])
    ops.pair_loss(logps, None, offsets, None, 0, False, 1.0, 0.0, label_smoothing, 1.0, losses, sequences, coefficients)
    wanted = expected_pairs(case, logps, None, offsets, None)
    torch.testing.assert_close(losses, wanted[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(coefficients, wanted[2], rtol=1e-12, atol=0)
    if delta == 0:
        assert losses.item() == math.log(2)


@pytest.mark.parametrize("values", [F32, F64])
@pytest.mark.parametrize("out", TYPES)
def test_scale_scatter(ops, values, out):
    for width, each in itertools.product((1, 7, 64, 2100), (False, True)):
        check_scale_scatter(ops, values, out, width, each)


def check_scale_scatter(ops, values, out, width, each):
    n, rows = 6, 11
    g = torch.Generator().manual_seed(width)
    source = matrix(n, width, values, pad=width % 3, skip=1, values=torch.randn(n, width, generator=g))
    target = matrix(rows, width, out, pad=1, skip=width % 4, values=torch.zeros(rows, width))
    index = torch.randperm(rows, generator=g)[:n]
    factor = torch.randn(n if each else 1, generator=g).to(values)
    ops.scale_scatter(source, index, factor, target)
    expected = torch.zeros(rows, width, dtype=out)
    expected[index] = (source * factor[:, None]).to(out)
    assert torch.equal(target, expected)
    assert beside_is_untouched(target)


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("out", TYPES)
def test_scaled_convert(ops, source, out):
    for count, skip in itertools.product((1, 8, 2047, 20_001), (0, 1)):
        check_scaled_convert(ops, source, out, count, skip)


def check_scaled_convert(ops, source, out, count, skip):
    a = matrix(1, count, source, skip=skip, values=torch.randn(1, count, generator=torch.Generator().manual_seed(count)))
    b = matrix(1, count, out, skip=skip)
    factor = torch.tensor([1.7], dtype=accumulate(source))
    ops.scaled_convert(a, factor, b)
    assert torch.equal(b, (a.to(factor.dtype) * factor).to(out))
    if source == out:
        ops.scaled_convert(a, factor, a)
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("order", [0, 1, 7])
def test_finish_tile(emulated, ops, dtype, order):
    emulated.order(order)
    shapes = ((1, 1, 1), (5, 77, 16), (4, 77, 100), (7, 4500, 2048), (3, 300, 1))
    for (n, columns, width), (pad, skip) in itertools.product(shapes, ((0, 0), (3, 1))):
        for given, target in ((True, True), (True, False), (False, True), (False, False)):
            check_finish_tile(ops, dtype, n, columns, width, pad, skip, given, target)


def check_finish_tile(ops, dtype, n, columns, width, pad, skip, given, target):
    g = torch.Generator().manual_seed(columns + n)
    tile = matrix(n, columns, dtype, pad=pad, skip=skip, values=torch.randn(n, columns, generator=g))
    labels = torch.randint(0, columns, (n,), generator=g)
    factors = some_factors(-(-columns // width), n, accumulate(dtype), g) if given else None
    at_target = torch.randn(n, generator=g).to(accumulate(dtype)) if target else None
    expected = finished_tile(tile, factors, labels, at_target, width)
    ops.finish_tile(tile, factors, labels, at_target, width)
    assert torch.equal(tile, expected)
    assert beside_is_untouched(tile)


def test_finish_tile_leaves_blocks_of_factor_1_to_the_bit(ops):
    signalling = torch.full((2, 40), 0x7F81, dtype=torch.int16).view(BF16)  # arithmetic would make it 0x7FC1
    factors = torch.ones(4, 2)
    factors[2, 1] = 0.5
    ops.finish_tile(signalling, factors, torch.zeros(2, dtype=torch.long), None, 10)
    changed = (signalling.view(torch.int16) != 0x7F81).nonzero().tolist()
    assert changed == [[1, column] for column in range(20, 30)]


def test_finish_tile_of_a_label_out_of_range_writes_nothing_foreign(ops):
    tile = matrix(3, 8, F32, pad=2, values=torch.zeros(3, 8))
    ops.finish_tile(tile, None, torch.tensor([8, -1, 4]), torch.ones(3), 8)
    assert tile.nonzero().tolist() == [[2, 4]]
    assert beside_is_untouched(tile)


@pytest.mark.slow
@pytest.mark.skipif(SANITIZED, reason="is running")
def test_no_access_out_of_bounds_or_off_alignment():
    """The tests of the emulated kernels again, in a process with the address sanitizer, which must be there from the start."""
    names = ("test_cuda_emulated.py", "test_cuda_emulated_ops.py", "test_arguments.py")
    files = [str(ROOT / "tests/native" / name) for name in names]
    runtimes = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the sanitizer looks for the function that throws when it starts
        found = subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=False
        ).stdout.strip()
        if not Path(found).is_file():
            pytest.skip(f"the compiler has no {name}")
        runtimes.append(found)
    variables = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "LOGITLESS_EMULATOR_SANITIZED": "1"}
    same_addresses = "applies_the_head or leaves_rows or do_not_depend or masked or not_finite or far_from or bad_argument"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", *files]
    command += ["-k", f"not ({same_addresses})"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
