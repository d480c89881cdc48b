"""Triton's element-wise passes over blocks of logits, against float64, and as a part of the blockwise algorithm."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import logitless as ll
from logitless.kernels.backends.torch import blockwise as torch_backend
from logitless.kernels.backends.torch.passes import TORCH_PASSES
from logitless.kernels.core.dtypes import accumulate_dtype, tile_dtype
from logitless.kernels.core.stats import OPTIONAL_OUTPUTS, CoreOptions
from logitless.kernels.tile.head_gradient import HeadGradient

from ..core import test_linear_logps as promises
from ..helpers import relative_error
from ..native.emulated import BF16, F16, F32, F64, TYPES, beside_is_untouched, make_tile
from ..native.operators import EVERYTHING, OUTPUT_BITS, ROUNDING, Tile, check_tile, expected_tile, new_sums
from .conftest import DEVICE, moved

pytest.importorskip("triton")
from logitless.kernels.backends.triton import scan
from logitless.kernels.backends.triton.elementwise import TRITON_PASSES

#: NumPy's, in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BIT_OF = {"entropy": "ez", "mean_logits": "z", "is_top1": "top", "log_sum_sq_probs": "ee"}
HEADS = [
    {},
    {"logit_scale": 0.3, "temperature": 1.7},
    {"logit_scale": -0.5},
    {"softcap": 5.0},
    {"logit_scale": 1.3, "softcap": 2.0, "temperature": 0.25},
]


@pytest.fixture
def narrow_chunks(monkeypatch):
    """Rows of several chunks, of which a later one may raise the offset."""
    monkeypatch.setattr(scan, "chunk_of", lambda acc, softcap: (64, 16))


def some_tile(*args, **options) -> Tile:
    tile = make_tile(*args, **options)
    for name in ("source", "destination", "labels", "k", "bias", "sums", "mix", "at_target"):
        setattr(tile, name, moved(getattr(tile, name)))
    if tile.sums is not None:
        tile.at_target = None
    return tile


def run(tile: Tile) -> None:
    """The pass that the tile's arguments mean: with sums the scan, and else the gradient."""
    width = tile.source.shape[1]
    logits = SimpleNamespace(bias=tile.bias, match=bool(tile.rounding), model_dtype=ROUNDING[tile.rounding])
    head = ll.HeadSpec(tile.logit_scale, tile.softcap or None, tile.temperature)
    options = CoreOptions(frozenset(name for name, bit in BIT_OF.items() if tile.outputs & OUTPUT_BITS[bit]))
    common = (logits, head, options, tile.source, tile.destination)
    block = (tile.labels, tile.first, tile.first + width)
    if tile.sums is None:
        TRITON_PASSES.gradient_block(*common, tile.k, *block, tile.mix, tile.at_target, None, torch.empty(0))
        return
    sums = TRITON_PASSES.scan_block(*common, tile.k, tile.k, *block)
    assert {f for f in ("ez", "ee", "z", "target", "before", "after") if getattr(sums, f) is None} == unwanted(tile.outputs)
    for i, name in enumerate(("e", "ez", "ee", "z", "target", "before", "after")):
        if getattr(sums, name) is not None:
            tile.sums[i] = getattr(sums, name)
    tile.k.copy_(sums.k)


def unwanted(outputs: int) -> set[str]:
    names = {bit for bit, value in OUTPUT_BITS.items() if not outputs & value}
    return names - {"top"} | ({"target", "before", "after"} if "top" in names else set())


def run_and_check(tile: Tile):
    expected = expected_tile(tile)
    run(tile)
    check_tile(tile, expected)
    if tile.destination is not None:
        assert beside_is_untouched(tile.destination)
    return expected


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("destination", [None, *TYPES])
def test_blocks_of_any_type(source, destination):
    run_and_check(some_tile(3, 300, source, destination, bias=BF16, outputs=EVERYTHING))
    run_and_check(some_tile(3, 300, source, destination))
    if destination is not None:
        run_and_check(some_tile(3, 300, source, destination, bias=F32, sums=False))


@pytest.mark.parametrize("width", [1, 2, 7, 33, 511, 2049, 9001])
@pytest.mark.parametrize(("source", "destination"), [(F32, BF16), (BF16, BF16), (F64, F64)])
def test_blocks_of_any_width_and_stride(width, source, destination):
    for pad, skip in ((0, 0), (1, 3), (8, 1)):
        for sums in (True, False):
            run_and_check(some_tile(2, width, source, destination, pad=pad, skip=skip, sums=sums, outputs=EVERYTHING * sums))


@quick
@given(
    n=st.integers(1, 5),
    width=st.integers(1, 400),
    first=st.sampled_from([0, 17, 1000]),
    head=st.sampled_from(HEADS),
    types=st.sampled_from([(F32, BF16), (F32, None), (BF16, BF16), (F16, F32), (F64, F64)]),
    outputs=st.integers(0, EVERYTHING),
    peak=st.sampled_from([None, 0.0, 0.5, 1.0]),
    rounding=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 99),
)
def test_any_shape_head_and_overflow(n, width, first, head, types, outputs, peak, rounding, seed):
    source, destination = types
    rounding = rounding if source != F64 else 0
    given_head = {"softcap": 300.0} if head.get("softcap") and peak is not None else head  # else nothing can overflow
    how = {"first": first, "outputs": outputs, "rounding": rounding, "seed": seed, "bias": F32, **given_head}
    tile = some_tile(n, width, source, destination, pad=seed % 3, **how)
    tile.labels += first - seed % 7  # some are in another block
    if peak is not None:
        tile.source[seed % n, int(peak * (width - 1))] = 200.0
    with pytest.MonkeyPatch.context() as patch:
        if seed % 2:
            patch.setattr(scan, "chunk_of", lambda acc, softcap: (32, 16))
        run_and_check(tile)


@pytest.mark.parametrize("outputs", range(EVERYTHING + 1))
def test_any_choice_of_outputs(outputs):
    run_and_check(some_tile(2, 100, outputs=outputs))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("source", [F32, BF16, F64])
def test_the_head_is_applied(head, source):
    for sums, rounding in itertools.product((True, False), (0, 1, 2) if source != F64 else (0,)):
        outputs = EVERYTHING if sums else 0
        run_and_check(some_tile(3, 277, source, F32, bias=F32, sums=sums, outputs=outputs, rounding=rounding, **head))


def test_the_head_in_float64_is_exact():
    """Its numbers are no float32: 1 / 0.7 rounded to it would be off by 1e-8."""
    for head in ({"temperature": 0.7}, {"softcap": 2.3, "temperature": 0.7}, {"softcap": 300.0, "logit_scale": 1 / 3}):
        tile = some_tile(3, 200, F64, F64, outputs=EVERYTHING, **head)
        tile.k[:] = 0
        z = ll.HeadSpec(tile.logit_scale, tile.softcap or None, tile.temperature).apply(tile.source)
        run(tile)
        torch.testing.assert_close(tile.sums[3], z.sum(dim=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [0, 1001])
@pytest.mark.parametrize("source", [F32, BF16])
def test_the_label_anywhere(first, source, narrow_chunks):
    width = 140
    places = [-1000, -2, -1, 0, 1, 63, 64, 127, 128, width - 2, width - 1, width, width + 1, 2**31, 2**40]
    for sums, target in ((True, False), (False, True), (False, False)):
        tile = some_tile(len(places), width, source, source, sums=sums, outputs=EVERYTHING * sums, first=first)
        tile.labels = (torch.tensor(places) + first).to(DEVICE)
        if not target:
            tile.at_target = None
        run_and_check(tile)


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("destination", [None, *TYPES])
@pytest.mark.parametrize("at", [63, 299])
def test_overflow_raises_the_offset_to_the_row_maximum(source, destination, at, narrow_chunks):
    """The entry beats the label by 200 nats: exp(200) is infinite in float32."""
    tile = some_tile(4, 300, source, destination, outputs=EVERYTHING, seed=at)
    tile.source[1, at] = 200.0
    tile.labels[1] = (at + 17) % 300
    tile.source[3, at] = 200.0
    tile.labels[3] = at  # its own entry does not count
    expected = run_and_check(tile)
    assert expected.raised.tolist()[1] and (destination == F16 or expected.raised.tolist() == [False, True, False, False])
    assert tile.k[1] == 200 and torch.isfinite(tile.sums[:4]).all()


def test_a_raised_offset_is_not_the_label_itself(narrow_chunks):
    """Found when the program looks ahead: after the raise the rivals would be nothing beside it."""
    tile = some_tile(1, 300, F32, F32, outputs=EVERYTHING)
    tile.source[0, 10], tile.source[0, 290] = 60.0, 200.0
    tile.labels[:] = 290
    run_and_check(tile)
    assert tile.k[0] == 60


@pytest.mark.parametrize("destination", [BF16, F32])
def test_overflow_where_the_factor_is_not_zero(destination, narrow_chunks):
    """Two steps above the offset, the second within exp's range of the first: what was written and added up survives."""
    tile = some_tile(3, 900, F32, destination, outputs=EVERYTHING)
    tile.source[0, 450] = 36.0
    tile.source[0, 640] = 41.0
    tile.source[2, 899] = 33.5
    tile.source[:, 100] = 25.0
    tile.labels[:] = 77
    assert run_and_check(tile).raised.tolist() == [True, False, True]


def test_overflow_of_offsets_at_the_end_of_float32(narrow_chunks):
    """A label masked with -inf has k = -1e30, and everything beats it."""
    tile = some_tile(2, 300, F32, F32, outputs=EVERYTHING)
    tile.k[:] = -1e30
    run_and_check(tile)
    assert torch.isfinite(tile.sums[:4]).all()


@pytest.mark.parametrize(("source", "huge"), [(F32, 2e38), (BF16, 2e38), (F64, 1.2e308)])
def test_overflow_of_logits_at_the_end_of_their_type(source, huge, narrow_chunks):
    """The shift times the sums so far is infinite where its factor is 0."""
    tile = some_tile(1, 900, source, None, outputs=1)
    tile.source[:] = -0.6 * huge
    tile.source[0, 850] = 0.8 * huge
    tile.k[:] = tile.source[0, 0]
    tile.labels[:] = 3
    run(tile)
    assert tile.k[0] == tile.source[0, 850] and tile.sums[:2, 0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("source", "destination"), [(t, t) for t in TYPES] + [(F32, BF16), (F32, F16), (F64, F32), (F64, BF16)]
)
@pytest.mark.parametrize("peak", [None, 0.0, 0.55, 1.0])
def test_in_place(source, destination, peak, narrow_chunks):
    """The destination is the source, or its narrower rows start where the source's start."""
    tile = some_tile(3, 500, source, None, pad=4, outputs=EVERYTHING, seed=3)
    if peak is not None:
        tile.source[1, int(peak * 499)] = 60.0
    memory = torch.empty(0, dtype=destination, device=DEVICE).set_(tile.source.untyped_storage())
    tile.destination = memory.as_strided((3, 500), (504 * source.itemsize // destination.itemsize, 1), 0)
    expected = expected_tile(tile)
    run(tile)
    check_tile(tile, expected)


def test_the_gradient_in_place():
    for dtype in TYPES:
        tile = some_tile(3, 500, dtype, None, sums=False)
        tile.destination = tile.source
        expected = expected_tile(tile)
        run(tile)
        check_tile(tile, expected)


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 10.0])
@pytest.mark.parametrize("destination", [BF16, F32])
def test_entries_masked_with_minus_infinity_count_nothing(sums, softcap, destination, narrow_chunks):
    outputs = EVERYTHING if sums else 0
    tile = some_tile(4, 300, F32, destination, bias=F32, sums=sums, outputs=outputs, softcap=softcap)
    tile.bias[50:200] = -math.inf
    tile.labels[:] = torch.tensor([0, 75, 225, 299])
    tile.source[3] = -math.inf
    run_and_check(tile)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_stay_among_themselves(value, narrow_chunks):
    tile, clean = (some_tile(3, 500, F32, BF16, outputs=EVERYTHING) for _ in range(2))
    for t in (tile, clean):
        t.labels[:] = 9
    run(clean)
    tile.source[1, 250] = value
    run(tile)
    assert tile.sums[0, 1].isnan()
    for row in (0, 2):
        assert torch.equal(tile.sums[:, row], clean.sums[:, row])
        assert torch.equal(tile.destination[row], clean.destination[row])


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("peak", [False, True])
def test_sums_do_not_depend_on_what_is_written_where_rows_lie_or_on_neighbours(source, peak, narrow_chunks):
    width, results = 203, []

    def tile_of(destination=None, **how):
        tile = some_tile(3, width, source, destination, softcap=300.0 if peak else 0.0, **how)
        if peak:
            tile.source[1, 150], tile.temperature = 200.0, 0.5
        return tile

    variants = [(None, 0, 0, 0), (BF16, 0, 0, EVERYTHING), (F32, 1, 2, 0), (None, 3, 7, EVERYTHING)]  # float16: raised sooner
    for destination, pad, skip, outputs in variants:
        tile = tile_of(destination, pad=pad, skip=skip, outputs=outputs)
        run(tile)
        results.append((tile.sums[0], tile.k))
    assert all(torch.equal(e, results[0][0]) and torch.equal(k, results[0][1]) for e, k in results)
    alone = tile_of()
    for i in range(3):
        row = slice(i, i + 1)
        part = Tile(alone.source[row], None, alone.labels[row], alone.k[row].clone(), sums=new_sums(1, DEVICE))
        part.softcap, part.temperature = alone.softcap, alone.temperature
        run(part)
        assert torch.equal(part.sums[0, 0], results[0][0][i])


@pytest.mark.parametrize("destination", [BF16, F32, F64])
def test_the_gradient_of_the_bias_is_added(destination):
    source = F64 if destination == F64 else F32
    for n, width in ((1, 1), (70, 3), (33, 130)):
        tile = some_tile(n, width, source, destination, sums=False)
        scale, dbias = torch.randn(n, dtype=tile.k.dtype), torch.randn(width, dtype=tile.k.dtype)
        scale, dbias = scale.to(DEVICE), dbias.to(DEVICE)
        logits = SimpleNamespace(bias=None, match=False, model_dtype=None)
        given, got = dbias.clone(), dbias
        block = (tile.labels, 0, width, tile.mix, tile.at_target, got, scale)
        TRITON_PASSES.gradient_block(logits, ll.HeadSpec(), CoreOptions(), tile.source, tile.destination, tile.k, *block)
        terms = tile.destination.double() * scale.double()[:, None]
        limit = 64 * torch.finfo(dbias.dtype).eps * (terms.abs().sum(dim=0) + given.abs().double())
        assert ((got.double() - given.double() - terms.sum(dim=0)).abs() <= limit).all()


def test_a_bias_and_mix_of_any_stride():
    tile = some_tile(3, 60, F32, F32, bias=F32, sums=False)
    wide = torch.full((60, 3), math.nan, device=DEVICE)
    wide[:, 1] = tile.bias
    tile.bias = wide[:, 1]
    columns = torch.full((2, 8), math.nan, device=DEVICE)
    columns[:, 2:5] = tile.mix
    tile.mix = columns[:, 2:5]
    run_and_check(tile)


def test_no_rows():
    for sums in (True, False):
        tile = some_tile(0, 10, F32, F32, sums=sums)
        run(tile)


def rows_that_raise_late(dtype: torch.dtype, width: int):
    """x (N, H), weight (V, H), bias, labels; two rows all but rule their label out, by rivals in different blocks."""
    n, vocab, hidden = 4, 3 * width + 7, 16
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(n, hidden, generator=g), torch.randn(vocab, hidden, generator=g) * 0.3
    labels = torch.randint(width, (n,), generator=g)
    labels[0], labels[2] = width - 1, width
    for row, rival in ((1, 2 * width + 5), (3, vocab - 1)):
        x[row] += 45 * w[rival] / w[rival].square().sum()
    return (t.to(DEVICE) for t in (x.to(dtype), w.to(dtype), torch.randn(vocab, generator=g).to(dtype), labels))


def all_gradients(x, w, bias, labels, head, passes):
    """Statistics, and the gradients from a kept tile, from the frozen head's pass, and from recomputed logits."""
    acc, options = accumulate_dtype(x.dtype), CoreOptions(frozenset(OPTIONAL_OUTPUTS), "float32")
    c = torch.linspace(-1, 1, len(x), dtype=acc, device=x.device)
    tile = torch.full((len(x), len(w)), torch.nan, dtype=tile_dtype(x.dtype, x.device), device=x.device)
    stats = torch_backend.score(x, w, bias, labels, head, options, tile=tile, passes=passes)
    found = [torch_backend.score(x, w, bias, labels, head, options, unit_dhidden=True, passes=passes).unit_dhidden]
    for kept in (True, False):
        dhidden = torch.empty(x.shape, dtype=acc, device=x.device)
        dhead = HeadGradient(w, bias, need_weight=True, need_bias=True, accumulate=True)
        how = {"dhidden": dhidden, "head_gradient": dhead}
        if kept:
            torch_backend.tile_gradients(x, w, labels, tile, stats, c, head, options, **how)
        else:
            entropy = torch.full_like(c, 0.3)
            torch_backend.recompute_gradients(x, w, bias, labels, stats, c, entropy, head, options, **how, passes=passes)
        found += [dhidden, dhead.weight, dhead.bias]
    return stats, found


@pytest.mark.parametrize(
    ("dtype", "head", "limits"),
    [
        (F64, ll.HeadSpec(1.2, 80.0, 0.6), (1e-12, 1e-12)),
        (F32, ll.HeadSpec(), (2e-5, 2e-5)),
        (BF16, ll.HeadSpec(1.2, 80.0, 0.6), (2e-5, 2**-7)),
        (F16, ll.HeadSpec(), (2e-5, 2**-9)),
    ],
    ids=str,
)
def test_the_blockwise_algorithm_agrees_with_torch_operators(dtype, head, limits, monkeypatch):
    promises.shrink_blocks(monkeypatch, 64)
    x, w, bias, labels = rows_that_raise_late(dtype, 64)
    ours, found = all_gradients(x, w, bias, labels, head, TRITON_PASSES)
    theirs, expected = all_gradients(x, w, bias, labels, head, TORCH_PASSES)
    assert (ours.target_offset < 0).nonzero()[:, 0].tolist() == [1, 3]
    for name in ("logps", "k", "sum_others", "log_denom", "entropy", "mean_logits", "log_sum_sq_probs"):
        mine, its = getattr(ours, name), getattr(theirs, name)
        assert ((mine - its).abs() / (1 + its.abs())).max() <= limits[0], name
    assert torch.equal(ours.is_top1, theirs.is_top1)
    for mine, its in zip(found, expected, strict=True):
        assert relative_error(mine, its) <= limits[1]
