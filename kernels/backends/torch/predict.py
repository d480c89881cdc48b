"""The predicted cost of the blockwise algorithm on a GPU, for ``torch`` and for ``cuda``, which differ in their passes.

For N tokens, hidden size H and vocabulary V, in bfloat16:

=============================  ==========================  =====================================================
work                           cuda                        torch
=============================  ==========================  =====================================================
logits, 2 NHV FLOP             cuBLAS, 4 NV bytes written  the same
exponentials                   one pass: 4 NV bytes;       24 NV; 34 NV with G, 30 NV when the sums are known
                               6 NV with G
dX, dW, 2 NHV each             cuBLAS from G, 2 NV bytes each
=============================  ==========================  =====================================================
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ...core.blocking import block_shape
from ...core.dtypes import accumulate_dtype, tile_dtype
from ...cost_model.costs import Cost, Sheet, Sizes, ceil
from ...cost_model.gpu_constants import Gpu, gpu_of
from ..interface import Call


@dataclass(frozen=True)
class Traffic:
    """What the element-wise passes of a backend move.

    Attributes:
        short_launches: short kernels for each block of logits, beside the GEMM.
        touched, touched_with_g: how often a pass reads or writes a float32 logit, without and with a gradient.
        written, written_again: how often it reads or writes an entry of the gradient, when the sums are unknown and known.
        fused_rows: whether rows of X and dX are gathered and scaled in one pass each, not by torch's operators.
    """

    short_launches: int
    touched: int
    touched_with_g: int
    written: int
    written_again: int
    fused_rows: bool


TORCH_TRAFFIC = Traffic(20, 6, 7, 3, 1, fused_rows=False)


def predict(traffic: Traffic, call: Call, gpu: Gpu | None = None) -> Cost:
    """What a call should take; ``gpu`` replaces the constants of its device."""
    return _predict(traffic, call, gpu_of(call.device, call.architecture) if gpu is None else gpu)


@functools.lru_cache(maxsize=1024)
def _predict(traffic: Traffic, call: Call, gpu: Gpu) -> Cost:
    n, h, v = call.num_tokens, call.hidden_size, call.vocab_size
    operand, acc = call.dtype.itemsize, accumulate_dtype(call.dtype).itemsize
    g = tile_dtype(call.dtype, call.device).itemsize
    known, makes_g, in_tile = call.work == "recompute", call.work != "forward", call.work == "tile"
    tokens, sheet = ceil(n, call.tiles), Sheet(gpu, call.dtype)  # tokens of a tile
    rows, width = block_shape(tokens, v, acc + (g if known else acc), call.workspace)
    chunks, blocks = call.tiles * ceil(tokens, rows), ceil(v, width)
    sizes = Sizes(n, h, v, operand, acc, g, in_tile, *((1, call.tiles) if in_tile else (blocks, chunks)))

    read = operand * (n * h * blocks + v * h * chunks)
    sheet.gemm("logits GEMM", 2 * n * h * v, read + acc * n * v, chunks * blocks)
    touched = acc * (traffic.touched_with_g if makes_g else traffic.touched)
    written = g * (traffic.written_again if known else traffic.written) * makes_g
    in_cache = min(rows, tokens) * width * acc <= gpu.l2_bytes // 2
    sheet.elementwise(
        "pass over the logits",
        (touched + written) * n * v,
        traffic.short_launches * chunks * blocks,
        exponentials=n * v,
        cached=touched * n * v * in_cache,
    )
    makes_dx = call.work == "frozen" or (makes_g and call.train_hidden)
    makes_dw = call.work in ("tile", "recompute") and call.train_weight
    accumulates = call.accumulate or (known and chunks > 1)
    sheet.gradients(sizes, makes_dx, makes_dw, accumulates)
    by_element, spans = 0, 0
    if not known:  # gathered, and multiplied by the labels' rows of the weight
        by_element += 4 * operand if traffic.fused_rows else 6 * operand + 4 * acc
        spans += 0 if traffic.fused_rows else 4
    if call.work == "frozen":
        by_element += 4 * operand + 8 * acc + (0 if traffic.fused_rows else 2 * acc * blocks)
        spans += 5
    sheet.rows(sizes, makes_dx, makes_dw, by_element, spans)
    if makes_dw:
        sheet.scaling(sizes, call.weight_dtype.itemsize, call.accumulate, accumulates)
    return Cost(gpu, tuple(sheet.parts))
