"""The compiled CUDA operators on a GPU, against float64. ``python -m pytest -m gpu``; elsewhere they are skipped.

``tests/native`` runs the same kernels on a CPU, with more cases. Here is what only a GPU shows: its own arithmetic, sizes
beyond 2^31, streams, graphs, several devices, and the same bits on every run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from logitless.kernels.operators import schemas

from ..native.emulated import BF16, F16, F32, F64, TYPES, Emulated, build, make_tile
from ..native.operators import (
    EPSILON,
    EVERYTHING,
    PairCase,
    Tile,
    accumulate,
    check_tile,
    expected_dot,
    expected_pairs,
    expected_tile,
    finished_tile,
    new_sums,
    some_factors,
)

#: ``cpu`` runs the tests of this file on the emulator, to test the tests.
DEVICE = os.environ.get("LOGITLESS_GPU_TEST_DEVICE", "cuda")
LIBRARY = Path(schemas.__file__).parents[1] / "_cuda.so"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the emulator has no such thing")


def has_kernels() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("logitless::tile_pass", "CUDA")


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    if DEVICE == "cpu":
        library = tmp_path_factory.mktemp("emulated") / "emulated.so"
        build(library)
        emulated = Emulated(library)
        yield emulated.ops  # which exist as long as this object
        return
    if not has_kernels() and LIBRARY.exists():
        torch.ops.load_library(str(LIBRARY))
    if not has_kernels():
        pytest.skip("the CUDA extension is not built")
    yield torch.ops.logitless


def move(tile: Tile, device: str = DEVICE) -> Tile:
    """A copy on the device, with the same strides."""

    def there(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None:
            return None
        size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        whole = t.as_strided((size,), (1,)).to(device, copy=True)
        return whole.as_strided(t.shape, t.stride())

    names = ("source", "destination", "labels", "k", "bias", "sums", "mix", "at_target")
    return replace(tile, **{name: there(getattr(tile, name)) for name in names})


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("destination", [None, *TYPES])
@pytest.mark.parametrize("width", [1, 77, 8192, 32_003])
def test_tile_pass(ops, source, destination, width):
    for pad, softcap in ((0, 0.0), (3, 5.0)):
        for outputs in (0, EVERYTHING):
            tile = move(
                make_tile(33, width, source, destination, pad=pad, bias=F32, softcap=softcap, temperature=0.7, outputs=outputs)
            )
            if width > 77 and softcap == 0:
                tile.source[7, width // 2] = 140.0
            expected = expected_tile(tile)
            tile.run(ops)
            check_tile(tile, expected)
        if destination is not None:
            tile = move(make_tile(33, width, source, destination, pad=pad, bias=BF16, softcap=softcap, sums=False))
            expected = expected_tile(tile)
            tile.run(ops)
            check_tile(tile, expected)


@pytest.mark.parametrize(("source", "destination"), [(F32, F32), (BF16, BF16), (F32, BF16), (F32, F16), (F64, F32)])
@pytest.mark.parametrize("sums", [True, False])
def test_tile_pass_in_place(ops, source, destination, sums):
    tile = move(make_tile(64, 20_000, source, None, sums=sums, outputs=EVERYTHING))
    if sums:
        tile.source[3, 11_000] = 150.0
    memory = torch.empty(0, dtype=destination, device=DEVICE).set_(tile.source.untyped_storage())
    stride = tile.source.stride(0) * tile.source.element_size() // destination.itemsize
    tile.destination = memory.as_strided(tile.source.shape, (stride, 1))
    expected = expected_tile(tile)
    tile.run(ops)
    check_tile(tile, expected)


@pytest.mark.parametrize("x", TYPES)
@pytest.mark.parametrize("weight", TYPES)
@pytest.mark.parametrize("hidden", [7, 4096])
def test_indexed_dot(ops, x, weight, hidden):
    a, w = torch.randn(50, hidden, device=DEVICE).to(x), torch.randn(300, hidden, device=DEVICE).to(weight)
    bias, labels = torch.randn(300, device=DEVICE), torch.randint(0, 300, (50,), device=DEVICE)
    for match in (False, True):
        out = torch.empty(50, dtype=accumulate(x), device=DEVICE)
        ops.indexed_dot(a, w, bias, labels, match, out)
        expected, scale = expected_dot(a, w, bias, labels, match)
        limit = 8 * EPSILON[accumulate(x)] * scale + (2 * EPSILON[x] * expected.abs() if match else 0)
        assert ((out.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("kind", range(len(schemas.MARGIN_FUNCTIONS)))
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_pair_loss(ops, kind, mean, dtype):
    case = PairCase(kind, mean, 0.2, 0.3 if kind == 0 else 0.0, 0.1 if kind == 0 else 0.0, 0.5)
    offsets = torch.tensor([0, 900, 1000, 1000, 1003, 4000, 4000], device=DEVICE)
    logps = (-torch.rand(4000, device=DEVICE)).to(dtype)
    weights = torch.rand(4000, device=DEVICE) * (torch.rand(4000, device=DEVICE) > 0.5)
    ref = torch.randn(6, dtype=F64, device=DEVICE)
    losses, sequences = torch.empty(3, dtype=F64, device=DEVICE), torch.empty(6, dtype=F64, device=DEVICE)
    coefficients = torch.empty_like(logps)
    numbers = (case.kind, case.mean, case.beta, case.gamma, case.label_smoothing, case.scale)
    ops.pair_loss(logps, weights, offsets, ref, *numbers, losses, sequences, coefficients)
    wanted = expected_pairs(case, logps, weights, offsets, ref)
    torch.testing.assert_close(losses, wanted[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(sequences, wanted[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(coefficients.double(), wanted[2], rtol=4 * EPSILON[dtype] + 1e-11, atol=1e-15)


@pytest.mark.parametrize("values", [F32, F64])
@pytest.mark.parametrize("out", TYPES)
def test_scaling(ops, values, out):
    source, rows = torch.randn(37, 1003, device=DEVICE).to(values), torch.randperm(80, device=DEVICE)[:37]
    for factor in (torch.randn(1, device=DEVICE).to(values), torch.randn(37, device=DEVICE).to(values)):
        target, expected = torch.zeros(80, 1003, device=DEVICE).to(out), torch.zeros(80, 1003, device=DEVICE).to(out)
        ops.scale_scatter(source, rows, factor, target)
        expected[rows] = (source * factor[:, None]).to(out)
        assert torch.equal(target, expected)
    converted = torch.empty(37, 1003, device=DEVICE, dtype=out)
    ops.scaled_convert(source, factor[:1], converted)
    assert torch.equal(converted, (source * factor[0]).to(out))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("columns", "width"), [(20_000, 8192), (20_011, 8192), (77, 16), (1, 1)])
def test_finish_tile(ops, dtype, columns, width):
    g = torch.Generator().manual_seed(columns)
    factors = some_factors(-(-columns // width), 50, accumulate(dtype), g).to(DEVICE)
    tile = torch.randn(50, columns + 3, generator=g).to(dtype).to(DEVICE)[:, :columns]
    labels, at_target = torch.randint(columns, (50,), device=DEVICE), torch.randn(50, device=DEVICE).to(accumulate(dtype))
    for given in (factors, None):
        expected = finished_tile(tile, given, labels, at_target, width)
        ops.finish_tile(tile, given, labels, at_target, width)
        assert torch.equal(tile, expected)


def everything(ops, tile: Tile, x: torch.Tensor) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """A function that calls each operator once, and all that they write."""
    n, device = len(tile.labels), tile.source.device
    zy, converted = torch.empty(n, device=device), torch.empty_like(x)
    losses, sequences = torch.empty(1, dtype=F64, device=device), torch.empty(2, dtype=F64, device=device)
    coefficients, scattered = torch.empty(n, device=device), torch.zeros_like(x)
    offsets = torch.tensor([0, n // 3, n], device=device)
    rows, wide = torch.arange(n, device=device).flip(0), x.float()
    finished, factors = torch.empty_like(tile.destination), torch.ones(3, n, device=device)
    factors[1, ::2] = 0.3

    def run() -> None:
        ops.indexed_dot(x, x, None, rows, False, zy)
        tile.run(ops)
        ops.pair_loss(zy, None, offsets, None, 0, True, 0.1, 0.0, 0.0, 1.0, losses, sequences, coefficients)
        ops.scale_scatter(wide, rows, coefficients, scattered)
        ops.scaled_convert(x, coefficients[:1], converted)
        finished.copy_(tile.destination)
        ops.finish_tile(finished, factors, tile.labels, zy, -(-finished.shape[1] // 3))

    results = [zy, tile.k, tile.sums, tile.destination, losses, sequences, coefficients, scattered, converted, finished]
    return run, results


def test_the_same_bits_on_every_run(ops):
    tile = move(make_tile(64, 20_011, BF16, BF16, outputs=EVERYTHING))
    tile.source[5, 17_000] = 100.0
    x = torch.randn(64, 1000, device=DEVICE).to(BF16)
    start = (tile.k.clone(), tile.sums.clone())
    run, results = everything(ops, tile, x)
    first = None
    for _ in range(3 if DEVICE == "cpu" else 100):
        tile.k.copy_(start[0])
        tile.sums.copy_(start[1])
        run()
        first = [r.clone() for r in results] if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@needs_gpu
def test_capture_in_a_graph(ops):
    x = torch.randn(64, 1000, device=DEVICE).to(BF16)
    tile = move(make_tile(64, 20_011, BF16, BF16, outputs=EVERYTHING))
    start = (tile.k.clone(), tile.sums.clone())
    run, results = everything(ops, tile, x)
    run()
    eager = [r.clone() for r in results]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    tile.k.copy_(start[0])
    tile.sums.copy_(start[1])
    for r in results:
        if r is not tile.k and r is not tile.sums:
            r.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, results, strict=True))


@needs_gpu
def test_runs_on_the_current_stream(ops):
    stream = torch.cuda.Stream()
    source, out = torch.zeros(1 << 24, device=DEVICE), torch.empty(1 << 24, device=DEVICE)
    factor = torch.ones(1, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        source.fill_(3.0)
        ops.scaled_convert(source, factor, out)
    stream.synchronize()
    assert bool((out == 3).all())


@needs_gpu
def test_runs_on_the_device_of_its_tensors(ops):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    tile = move(make_tile(8, 3000, F32, BF16, outputs=EVERYTHING), "cuda:1")
    expected = expected_tile(tile)
    with torch.cuda.device(0):
        tile.run(ops)
        assert torch.cuda.current_device() == 0
    check_tile(tile, expected)
    with pytest.raises(RuntimeError, match="labels must be on device 1"):
        replace(tile, labels=tile.labels.to("cuda:0")).run(ops)


@needs_gpu
def test_sizes_beyond_2_to_the_31(ops):
    """Rows and elements at the end of 4.3 GB are those of a small tensor."""
    n, width, tail = 16_400, 131_080, 3
    assert n * width > 2**31
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB")
    big = torch.empty(n, width, dtype=BF16, device=DEVICE).normal_()
    last = big[-tail:].clone()
    labels = torch.arange(n, device=DEVICE) % width

    zy, small = torch.empty(n, device=DEVICE), torch.empty(tail, device=DEVICE)
    x = torch.randn(tail, width, device=DEVICE).to(BF16)
    ops.indexed_dot(x, big, None, torch.arange(n - tail, n, device=DEVICE), False, small)
    ops.indexed_dot(x, last, None, torch.arange(tail, device=DEVICE), False, zy[:tail])
    assert torch.equal(small, zy[:tail])

    whole = Tile(big, big, labels, torch.zeros(n, device=DEVICE), sums=new_sums(n, DEVICE), outputs=EVERYTHING)
    part = Tile(last, last, labels[-tail:], torch.zeros(tail, device=DEVICE), sums=new_sums(tail, DEVICE), outputs=EVERYTHING)
    whole.run(ops)
    part.run(ops)
    assert torch.equal(big[-tail:], last)
    assert torch.equal(whole.sums[:, -tail:], part.sums)

    factors = torch.ones(2, n, device=DEVICE)
    factors[1, -tail:] = 0.5
    ops.finish_tile(big, factors, labels, None, width - 1000)
    ops.finish_tile(last, factors[:, -tail:].contiguous(), labels[-tail:], None, width - 1000)
    assert torch.equal(big[-tail:], last)

    factor = torch.tensor([2.0], device=DEVICE)
    ops.scaled_convert(big, factor, big)
    assert torch.equal(big[-tail:], last * 2)
    ops.scale_scatter(x.float(), torch.arange(n - tail, n, device=DEVICE), factor, big)
    assert torch.equal(big[-tail:], x * 2)
