"""The CUDA kernels against float64, run on a CPU by an emulator of what they use of CUDA (``cuda_emulator.h``).

The bindings, the launch code and the kernels are those of the extension; only the compiler is another. What this cannot see is
anything about speed, and what a GPU's compiler makes of the code: ``tests/gpu`` and ``test_cuda_build.py`` look there.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from .emulated import BF16, F16, F32, F64, TYPES, beside_is_untouched, make_tile
from .operators import EVERYTHING, WITHOUT_SLOPE, Tile, check_tile, expected_tile, new_sums


def run_and_check(ops, tile: Tile) -> None:
    expected = expected_tile(tile)
    tile.run(ops)
    check_tile(tile, expected)
    if tile.destination is not None and tile.destination.dtype.is_floating_point:
        assert beside_is_untouched(tile.destination)


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("destination", [None, *TYPES])
def test_tile_pass_of_all_types(ops, source, destination):
    bias = TYPES[(TYPES.index(source) + 1) % 4]
    for outputs in (0, EVERYTHING):
        run_and_check(ops, make_tile(3, 300, source, destination, bias=bias, outputs=outputs))
    if destination is not None:
        run_and_check(ops, make_tile(3, 300, source, destination, bias=bias, sums=False))


@pytest.mark.parametrize("bias", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_tile_pass_with_a_bias_of_any_type(ops, source, bias):
    run_and_check(ops, make_tile(2, 131, source, F32, bias=bias, outputs=EVERYTHING))


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 31, 33, 511, 512, 513, 1024, 2049, 4100, 9001, 17_000])
@pytest.mark.parametrize(("source", "destination"), [(F32, BF16), (BF16, BF16), (F64, F64)])
def test_tile_pass_of_any_width_and_stride(ops, width, source, destination):
    n = 5 if width < 5000 else 2
    for pad, skip in ((0, 0), (1, 3), (8, 1)):
        run_and_check(ops, make_tile(n, width, source, destination, pad=pad, skip=skip, outputs=EVERYTHING))
        if width < 5000:
            run_and_check(ops, make_tile(n, width, source, destination, pad=pad, skip=skip, sums=False))


@pytest.mark.parametrize("outputs", range(16))
def test_tile_pass_leaves_rows_of_sums_that_are_not_wanted(ops, outputs):
    tile = make_tile(3, 100, outputs=outputs)
    tile.sums[:4] = 0.5
    run_and_check(ops, tile)


@pytest.mark.parametrize(
    "head",
    [
        {"logit_scale": 0.3, "temperature": 1.7},
        {"logit_scale": -0.5},
        {"softcap": 5.0},
        {"logit_scale": 1.3, "softcap": 2.0, "temperature": 0.25},
        {"softcap": 1e4},
    ],
)
@pytest.mark.parametrize("source", [F32, BF16, F64])
def test_tile_pass_applies_the_head(ops, head, source):
    for sums, rounding in itertools.product((True, False), (0, 1, 2)):
        tile = make_tile(4, 777, source, F32, bias=F32, sums=sums, outputs=EVERYTHING, rounding=rounding, **head)
        run_and_check(ops, tile)


@pytest.mark.parametrize("head", [{}, {"logit_scale": -0.5}, {"logit_scale": 1.3, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("source", [F32, F64])
def test_tile_pass_at_one_temperature_per_row(ops, head, source):
    """The last row's logits are far apart, so its offset is raised."""
    for sums in (True, False):
        inverse = torch.tensor([1.0, 0.3, 2.5, 40.0 if sums else 0.5], dtype=F64 if source == F64 else F32)
        tile = make_tile(4, 777, source, F32, bias=F32, sums=sums, outputs=EVERYTHING, **head)
        tile.inverse_temperature = inverse
        run_and_check(ops, tile)


@pytest.mark.parametrize("first", [0, 1001])
@pytest.mark.parametrize("source", [F32, BF16])
def test_tile_pass_with_the_label_anywhere(ops, first, source):
    width = 700
    places = [-1000, -2, -1, 0, 1, 3, 4, 7, 8, 511, 512, width - 2, width - 1, width, width + 1, 2**31, 2**40]
    tile = make_tile(len(places), width, source, source, bias=BF16, outputs=EVERYTHING, first=first)
    tile.labels = torch.tensor(places) + first
    run_and_check(ops, tile)
    tile = make_tile(len(places), width, source, source, sums=False, first=first)
    tile.labels = torch.tensor(places) + first
    tile.at_target = None
    run_and_check(ops, tile)


def in_place(tile: Tile, dtype: torch.dtype) -> Tile:
    """The destination of the given type starts where the source starts, row by row."""
    source = tile.source
    rows = source.stride(0) * source.element_size() // dtype.itemsize
    assert source.storage_offset() == 0
    memory = torch.empty(0, dtype=dtype).set_(source.untyped_storage())
    tile.destination = memory.as_strided(source.shape, (rows, 1), 0)
    return tile


IN_PLACE = [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (F32, F16), (F64, F32), (F64, BF16)]


@pytest.mark.parametrize(("source", "destination"), IN_PLACE)
@pytest.mark.parametrize("width", [5, 5000])
@pytest.mark.parametrize("peak", ["no sums", None, 0.0, 0.55, 1.0])
def test_tile_pass_in_place(emulated, ops, source, destination, width, peak):
    sums = peak != "no sums"
    for order in (0, 1, 7) if source != destination else (0,):  # threads that run ahead must not overwrite what others read
        tile = make_tile(3, width, source, None, pad=3, sums=sums, outputs=EVERYTHING, seed=3)
        if sums and peak is not None:
            tile.source[1, int(peak * (width - 1))] = 60.0
        emulated.order(order)
        expected = expected_tile(in_place(tile, destination))
        tile.run(ops)
        check_tile(tile, expected)


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("destination", [None, *TYPES])
@pytest.mark.parametrize("at", [0, 300, 2500, 4999])
def test_overflow_raises_the_offset_to_the_row_maximum(ops, source, destination, at):
    """The entry beats the label by 200 nats: exp(200) is infinite in float32."""
    tile = make_tile(4, 5000, source, destination, outputs=EVERYTHING, seed=at)
    tile.source[1, at] = 200.0
    tile.labels[1] = (at + 17) % 5000
    tile.source[3, at] = 200.0
    tile.labels[3] = at  # its own entry does not count
    tile.sums[0] = 2.5
    tile.sums[1] = -1.25
    tile.sums[2] = 0.75
    expected = expected_tile(tile)
    assert expected.raised.tolist()[1] and (destination == F16 or expected.raised.tolist() == [False, True, False, False])
    tile.run(ops)
    check_tile(tile, expected)
    assert tile.k[1] == 200 and torch.isfinite(tile.sums[:4]).all()


@pytest.mark.parametrize("destination", [BF16, F32])
def test_overflow_where_the_factor_is_not_zero(ops, destination):
    """Two steps above the offset, the second within exp's range of the first: the prefix and its sums survive."""
    tile = make_tile(3, 9000, F32, destination, outputs=EVERYTHING)
    tile.source[0, 4500] = 36.0
    tile.source[0, 4600] = 41.0
    tile.source[2, 8999] = 33.5
    tile.source[:, 100] = 25.0
    tile.labels[:] = 77
    tile.sums[0] = 1e9
    tile.sums[1] = 1e8
    tile.sums[2] = 1e10
    run_and_check(ops, tile)


def test_overflow_of_offsets_at_the_end_of_float32(ops):
    """A label masked with -inf has k = -1e30, and everything beats it."""
    tile = make_tile(2, 3000, F32, F32, outputs=EVERYTHING)
    tile.k[:] = -1e30
    run_and_check(ops, tile)
    assert torch.isfinite(tile.sums[:4]).all()


@pytest.mark.parametrize(("source", "huge"), [(F32, 2e38), (BF16, 2e38), (F64, 1.2e308)])
def test_overflow_of_logits_at_the_end_of_their_type(ops, source, huge):
    """The shift times the sums so far is infinite where its factor is 0."""
    tile = make_tile(1, 9000, source, None, outputs=1)
    tile.source[:] = -0.6 * huge
    tile.source[0, 8500] = 0.8 * huge
    tile.k[:] = tile.source[0, 0]
    tile.labels[:] = 3
    tile.sums[0] = 1e9
    tile.run(ops)
    assert tile.k[0] == tile.source[0, 8500] and tile.sums[:2, 0].tolist() == [1, 0]


@pytest.mark.parametrize("source", [F32, BF16])
@pytest.mark.parametrize("destination", [None, F32])
def test_blocks_of_a_row_add_up_to_the_whole(ops, source, destination):
    n, width = 6, 4000
    whole = make_tile(n, width, source, destination, bias=F32, outputs=EVERYTHING)
    whole.labels[:] = torch.tensor([0, 10, 1500, 1501, 3999, 2700])
    whole.source[2, 3000], whole.source[3, 2], whole.source[4, 2000] = 150.0, 150.0, 45.0
    expected = expected_tile(whole)
    parts, k = [], whole.k.clone()
    for first, last in ((0, 1), (1, 1501), (1501, 2700), (2700, 4000)):
        part = Tile(
            whole.source[:, first:last],
            None if destination is None else whole.destination[:, first:last],
            whole.labels,
            whole.k,
            bias=whole.bias,
            sums=whole.sums,
            at_target=whole.at_target,
            first=first,
            outputs=EVERYTHING,
        )
        part.run(ops)
        parts.append((slice(first, last), whole.k.clone()))
    if destination is not None:  # the caller brings earlier blocks to the last offset
        for columns, offset in parts:
            factor = (offset.double() - whole.k.double()).exp()[:, None]
            block = whole.destination[:, columns]
            at = torch.arange(columns.start, columns.stop) == whole.labels[:, None]
            block.copy_(torch.where(at, block, block * factor))
    check_tile(whole, expected)
    assert (whole.k != k).tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 10.0])
@pytest.mark.parametrize("destination", [BF16, F32])
def test_entries_masked_with_minus_infinity_count_nothing(ops, sums, softcap, destination):
    outputs = EVERYTHING + (WITHOUT_SLOPE if destination is BF16 and sums else 0)
    tile = make_tile(4, 600, F32, destination, bias=F32, sums=sums, outputs=outputs, softcap=softcap)
    tile.bias[100:400] = -math.inf
    tile.labels[:] = torch.tensor([0, 150, 450, 599])
    tile.source[3] = -math.inf
    run_and_check(ops, tile)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_end_and_stay_among_themselves(ops, value):
    tile = make_tile(3, 5000, F32, BF16, outputs=EVERYTHING)
    tile.labels[:] = 9
    clean = make_tile(3, 5000, F32, BF16, outputs=EVERYTHING)
    clean.labels[:] = 9
    clean.run(ops)
    tile.source[1, 2500] = value
    tile.run(ops)
    assert tile.sums[0, 1].isnan()
    for row in (0, 2):
        assert torch.equal(tile.sums[:, row], clean.sums[:, row])
        assert torch.equal(tile.destination[row], clean.destination[row])


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("peak", [False, True])
def test_sums_do_not_depend_on_what_is_written_where_rows_lie_or_whose_turn_it_is(emulated, ops, source, peak):
    width, results = 5003, []
    variants = [(None, 0, 0, 0), (BF16, 0, 0, 1), (F32, 1, 2, 2), (F64, 5, 1, 0), (None, 3, 7, 3)]  # float16: raised sooner
    for destination, pad, skip, order in variants:
        for outputs in (0, EVERYTHING):
            tile = make_tile(3, width, source, destination, pad=pad, skip=skip, outputs=outputs, softcap=30.0 if peak else 0.0)
            if peak:
                tile.source[1, 4000], tile.temperature = 200.0, 0.5
            emulated.order(order)
            tile.run(ops)
            results.append((tile.sums[0], tile.k))
    assert all(torch.equal(e, results[0][0]) and torch.equal(k, results[0][1]) for e, k in results)
    alone = make_tile(3, width, source, None, softcap=30.0 if peak else 0.0)
    if peak:
        alone.source[1, 4000], alone.temperature = 200.0, 0.5
    for row in range(3):  # nor on neighbours
        part = Tile(alone.source[row : row + 1], None, alone.labels[row : row + 1], alone.k[row : row + 1], sums=new_sums(1))
        part.softcap, part.temperature = alone.softcap, alone.temperature
        part.run(ops)
        assert torch.equal(part.sums[0, 0], results[0][0][row])


def test_tile_pass_takes_slices_of_the_statistics(ops):
    tile = make_tile(5, 200, outputs=EVERYTHING)
    tile.sums = new_sums(9)[:, 2:7]
    before = tile.sums.clone()
    expected = expected_tile(tile)
    tile.run(ops)
    check_tile(tile, expected)
    assert not torch.equal(before, tile.sums)
    tile = make_tile(5, 200, sums=False)
    wide = torch.full((2, 11), math.nan)
    wide[:, 3:8] = tile.mix
    tile.mix = wide[:, 3:8]
    run_and_check(ops, tile)


def test_columns_of_one_buffer_may_be_source_and_destination(ops):
    buffer = torch.randn(4, 100)
    tile = make_tile(4, 50, F32, F32, outputs=EVERYTHING)
    tile.source, tile.destination = buffer[:, :50], buffer[:, 50:]
    expected = expected_tile(tile)
    tile.run(ops)
    check_tile(tile, expected)
