"""Errors of the compiled operators name the argument, what is accepted and what was given; the same on CPUs and GPUs."""

from __future__ import annotations

import math

import pytest
import torch

from logitless.kernels.operators import loading, schemas

from .emulated import BF16, F64, SANITIZED, make_tile
from .operators import EVERYTHING, new_sums


@pytest.fixture(params=["cpu", "emulated"])
def ops(request):
    if request.param == "emulated":
        return request.getfixturevalue("emulated").ops
    if SANITIZED:
        pytest.skip("only the emulated kernels are compiled with sanitizers")
    if reasons := loading.why_no_cpu_extension():
        pytest.skip("; ".join(reasons))
    return torch.ops.logitless


def call(ops, **changes):
    tile = make_tile(4, 20, outputs=EVERYTHING)
    for name, value in changes.items():
        setattr(tile, name, value)
    tile.run(ops)


BAD_TILES = {
    "source must have 2 dimension": {"source": torch.zeros(4)},
    "source must be float32, bfloat16": {"source": torch.zeros(4, 20, dtype=torch.int32)},
    "source must have stride 1": {"source": torch.zeros(20, 4).t()},
    "destination must have size 20 in dimension 1": {"destination": torch.zeros(4, 21)},
    "destination must be float32, bfloat16": {"destination": torch.zeros(4, 20, dtype=torch.int64)},
    "destination must have rows that do not overlap": {"destination": torch.zeros(20).expand(4, 20)},
    "destination or sums must be given": {"destination": None, "sums": None},
    "bias must have an entry for each of the columns 3 to 23, got 22": {"bias": torch.zeros(22), "first": 3},
    "labels must be int64, got int32": {"labels": torch.zeros(4, dtype=torch.int32)},
    "labels must have size 4": {"labels": torch.zeros(5, dtype=torch.long)},
    "k must be float32, got float64": {"k": torch.zeros(4, dtype=F64)},
    "sums must have size 7": {"sums": torch.zeros(6, 4, dtype=F64)},
    "sums must be float64, got float32": {"sums": torch.zeros(7, 4)},
    "mix must not be given with sums": {"mix": torch.zeros(2, 4)},
    "mix must have size 2": {"mix": torch.zeros(3, 4), "sums": None},
    "at_target must be float32": {"at_target": torch.zeros(4, dtype=F64)},
    "inverse_temperature must be float32": {"inverse_temperature": torch.ones(4, dtype=F64)},
    "inverse_temperature must have size 4": {"inverse_temperature": torch.ones(3)},
    "logit_scale must be finite": {"logit_scale": math.nan},
    "softcap must be finite and >= 0, got -1": {"softcap": -1.0},
    "temperature must be finite and > 0, got 0": {"temperature": 0.0},
    "first must be >= 0": {"first": -1},
    "outputs must be a sum": {"outputs": 32},
    "rounding must be 0, 1 or 2, got 3": {"rounding": 3},
}


@pytest.mark.parametrize("message", BAD_TILES)
def test_bad_argument_of_tile_pass(ops, message):
    with pytest.raises(RuntimeError, match=message):
        call(ops, **BAD_TILES[message])


def test_bad_argument_of_the_other_operators(ops):
    labels, out = torch.zeros(2, dtype=torch.long), torch.zeros(2)
    x, w = torch.zeros(2, 8), torch.zeros(5, 8)
    with pytest.raises(RuntimeError, match="weight must have size 8"):
        ops.indexed_dot(x, torch.zeros(5, 9), None, labels, False, out)
    with pytest.raises(RuntimeError, match="out must be float32, got bfloat16"):
        ops.indexed_dot(x, w, None, labels, False, out.bfloat16())
    with pytest.raises(RuntimeError, match="bias must have size 5"):
        ops.indexed_dot(x, w, torch.zeros(4), labels, False, out)
    one, two = torch.zeros(1, dtype=F64), torch.zeros(2, dtype=F64)
    offsets = torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match="kind must be 0, 1 or 2, got 3"):
        ops.pair_loss(out, None, offsets, None, 3, False, 1, 0, 0, 1, one, two, None)
    with pytest.raises(RuntimeError, match="offsets must have size 3"):
        ops.pair_loss(out, None, offsets[:2], None, 0, False, 1, 0, 0, 1, one, two, None)
    with pytest.raises(RuntimeError, match="logps must be float32 or float64, got float16"):
        ops.pair_loss(out.half(), None, offsets, None, 0, False, 1, 0, 0, 1, one, two, None)
    with pytest.raises(RuntimeError, match="factor must have size 2"):
        ops.scale_scatter(x, labels, torch.zeros(3), w)
    with pytest.raises(RuntimeError, match="values must be float32 or float64"):
        ops.scale_scatter(x.half(), labels, torch.zeros(1), w)
    with pytest.raises(RuntimeError, match="source must be contiguous"):
        ops.scaled_convert(torch.zeros(8, 2).t(), torch.zeros(1), x)
    with pytest.raises(RuntimeError, match="out must have size 2 in dimension 0"):
        ops.scaled_convert(x, torch.zeros(1), w)
    with pytest.raises(RuntimeError, match="factors must have size 3 in dimension 0, got 2"):
        ops.finish_tile(x, torch.ones(2, 2), labels, None, 3)
    with pytest.raises(RuntimeError, match="factors must be float32, got bfloat16"):
        ops.finish_tile(x, torch.ones(1, 2, dtype=BF16), labels, None, 8)
    with pytest.raises(RuntimeError, match="at_target must be float64, got float32"):
        ops.finish_tile(x.double(), None, labels, out, 8)
    with pytest.raises(RuntimeError, match="width must be > 0, got 0"):
        ops.finish_tile(x, None, labels, out, 0)
    with pytest.raises(RuntimeError, match="tile must have rows that do not overlap"):
        ops.finish_tile(torch.zeros(8).expand(2, 8), None, labels, out, 8)
    with pytest.raises(RuntimeError, match="tile must be float32, bfloat16, float16 or float64, got int64"):
        ops.finish_tile(x.long(), None, labels, None, 8)


def test_memory_shared_in_another_way_is_refused(ops):
    buffer = torch.zeros(8 * 100)
    source = buffer.as_strided((4, 50), (100, 1), 0)
    narrow = buffer.view(BF16)
    shared = [
        buffer.as_strided((4, 50), (100, 1), 1),  # shifted by an element
        buffer.as_strided((4, 50), (100, 1), 100),  # shifted by a row
        buffer.as_strided((4, 50), (60, 1), 0),  # another stride
        narrow.as_strided((4, 50), (200, 1), 2),
        narrow.as_strided((4, 50), (100, 1), 0),  # dense rows over padded ones
        buffer.view(F64).as_strided((4, 50), (50, 1), 0),  # wider than the source
    ]
    for destination in shared:
        with pytest.raises(RuntimeError, match="destination must not share memory with source"):
            call(ops, source=source, destination=destination, labels=torch.zeros(4, dtype=torch.long), **wide(50))
    with pytest.raises(RuntimeError, match="out must not share memory with source"):
        ops.scaled_convert(buffer[:100], torch.ones(1), narrow[:100])


def wide(width: int) -> dict:
    return {"k": torch.zeros(4), "at_target": None, "sums": new_sums(4), "bias": torch.zeros(width)}


@pytest.mark.skipif(bool(loading.why_no_cpu_extension()), reason="; ".join(loading.why_no_cpu_extension()))
def test_bad_argument_that_only_gpus_accept():
    ops = torch.ops.logitless
    with pytest.raises(RuntimeError, match="bias must be float32, got bfloat16"):
        call(ops, bias=torch.zeros(20, dtype=BF16))
    with pytest.raises(RuntimeError, match="destination must be float64 if and only if source is, got float64 for float32"):
        call(ops, destination=torch.zeros(4, 20, dtype=F64))
    labels, out = torch.zeros(2, dtype=torch.long), torch.zeros(2)
    x, w = torch.zeros(2, 8), torch.zeros(5, 8)
    with pytest.raises(RuntimeError, match="bias must be float32, got float64"):
        ops.indexed_dot(x, w, torch.zeros(5, dtype=F64), labels, False, out)
    with pytest.raises(RuntimeError, match="out must be float64 if and only if values is, got float64 for float32"):
        ops.scale_scatter(x, labels, torch.zeros(1), w.double())
    with pytest.raises(RuntimeError, match="source must be float32, got bfloat16"):
        ops.scaled_convert(x.bfloat16(), torch.zeros(1), x)
    one, two = torch.zeros(1, dtype=F64), torch.zeros(2, dtype=F64)
    with pytest.raises(RuntimeError, match="weights must be float64, got float32"):
        ops.pair_loss(out, torch.ones(2), torch.tensor([0, 1, 2]), None, 0, False, 1, 0, 0, 1, one, two, None)
    with pytest.raises(RuntimeError, match="offsets must be between 0 and the 2 elements of logps, got 0 to 3"):
        ops.pair_loss(out, None, torch.tensor([0, 1, 3]), None, 0, False, 1, 0, 0, 1, one, two, None)


@pytest.mark.skipif(bool(loading.why_no_cpu_extension()), reason="; ".join(loading.why_no_cpu_extension()))
def test_bad_argument_of_the_operators_of_cpus():
    ops = torch.ops.logitless
    labels, ones = torch.zeros(3, dtype=torch.long), torch.ones(3)
    x, w = torch.zeros(3, 4, dtype=BF16), torch.zeros(5, 4, dtype=BF16)
    tokens = torch.empty(schemas.packed_tokens_size(3, 4), dtype=BF16)
    rows = torch.empty(schemas.packed_rows_size(3, 4), dtype=BF16)
    gradient, dweight = torch.zeros(5, 3, dtype=BF16), torch.zeros(5, 4)
    with pytest.raises(RuntimeError, match="x must be bfloat16, got float32"):
        ops.pack_tokens(x.float(), tokens)
    with pytest.raises(RuntimeError, match="x must have an even number of columns, got 3"):
        ops.pack_tokens(x[:, :3], tokens)
    with pytest.raises(RuntimeError, match="out must have 256 elements, got 64"):
        ops.pack_rows(x, ones, tokens)
    numbers = (1.0, 0.0, 1.0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="start must be given with sums, got None"):
        ops.score_block(tokens, w, None, labels, None, ones, new_sums(3), None, None, None, *numbers)
    with pytest.raises(RuntimeError, match="packed must have 64 elements, got 256"):
        ops.score_block(rows, w, None, labels, None, ones, None, None, None, gradient, *numbers)
    with pytest.raises(RuntimeError, match="bias must have an entry for each of the columns 0 to 5, got 4"):
        ops.score_block(tokens, w, torch.zeros(4), labels, None, ones, None, None, None, gradient, *numbers)
    with pytest.raises(RuntimeError, match="gradient must have 15 elements, got 12"):
        ops.score_block(tokens, w, None, labels, None, ones, None, None, None, gradient[:4].contiguous(), *numbers)
    with pytest.raises(RuntimeError, match="weight must be float32, bfloat16 or float16, got float64"):
        ops.grad_hidden(gradient, w.double(), torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="dhidden must be float32, got bfloat16"):
        ops.grad_hidden(gradient, w, x)
    with pytest.raises(RuntimeError, match="target must have size 3 in dimension 0, got 2"):
        ops.finish_rows(torch.zeros(3, 4), ones, ones[:2], w, labels)
    with pytest.raises(RuntimeError, match="packed must be given with dweight, got None"):
        ops.grad_weight(gradient, None, x, ones, ones, labels, 0, 5, True, dweight, None)
    with pytest.raises(RuntimeError, match=r"dweight must be float32, .* got bfloat16 with accumulate"):
        ops.grad_weight(gradient, rows, x, ones, ones, labels, 0, 5, True, dweight.bfloat16(), None)
