"""The predicted cost of the ``triton`` backend on a GPU, and the bytes of its partial sums.

The exponentials are in the GEMM's epilogue, after the products and not behind them: time, but no bytes. The GEMM of the logits
runs at ``triton_gemm`` of cuBLAS's rate and writes 2 NV bytes of G where that is wanted; partial sums move 16 N V/128 bytes. dX
and dW are cuBLAS's GEMMs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from ...core.blocking import block_shape
from ...core.dtypes import accumulate_dtype, tile_dtype
from ...cost_model.costs import Cost, Sheet, Sizes, ceil
from ...cost_model.gpu_constants import Gpu, gpu_of
from ..interface import Call

#: Tokens and vocabulary entries of a block of the partial sums.
PARTIAL_BLOCK = 128
#: Rows of partial sums for each output besides the two of the log-probabilities.
_PARTIAL_ROWS = {"entropy": 1, "mean_logits": 1, "is_top1": 3, "log_sum_sq_probs": 1}


def partial_sum_bytes(vocab_size: int, outputs: Iterable[str] = ()) -> int:
    """Bytes of the sums over each block of the vocabulary that are kept per token until they are added up."""
    rows = 2 + sum(_PARTIAL_ROWS.get(name, 0) for name in outputs)
    return 4 * rows * -(-vocab_size // PARTIAL_BLOCK)


def workspace_bytes(call: Call) -> int:
    """The partial sums of one block of tokens, which are kept however small the workspace is."""
    return PARTIAL_BLOCK * partial_sum_bytes(call.vocab_size, call.outputs)


def predict(call: Call, gpu: Gpu | None = None) -> Cost:
    """What a call should take; ``gpu`` replaces the constants of its device."""
    return _predict(call, gpu_of(call.device, call.architecture) if gpu is None else gpu)


@functools.lru_cache(maxsize=1024)
def _predict(call: Call, gpu: Gpu) -> Cost:
    n, h, v = call.num_tokens, call.hidden_size, call.vocab_size
    operand, acc = call.dtype.itemsize, accumulate_dtype(call.dtype).itemsize
    g = tile_dtype(call.dtype, call.device).itemsize
    known, makes_g, in_tile = call.work == "recompute", call.work != "forward", call.work == "tile"
    tokens, sheet = ceil(n, call.tiles), Sheet(gpu, call.dtype)  # tokens of a tile
    if call.work in ("forward", "tile"):  # the sums need a row of partial sums, and a block only for G
        rows, width = max(1, call.workspace // partial_sum_bytes(v)), v
    else:
        rows, width = block_shape(tokens, v, g, call.workspace)
    chunks, blocks = call.tiles * ceil(tokens, rows), ceil(v, width)
    sizes = Sizes(n, h, v, operand, acc, g, in_tile, *((1, call.tiles) if in_tile else (blocks, chunks)))

    read = operand * (n * h * blocks + v * h * chunks)
    sheet.gemm("logits GEMM", 2 * n * h * v, read + g * n * v * makes_g, chunks * blocks, gpu.triton_gemm)
    sheet.elementwise("exponentials of the epilogue", 0, 0, exponentials=n * v)
    if not known:
        sheet.elementwise("partial sums", 2 * n * partial_sum_bytes(v), 8 * chunks * blocks)
    makes_dx = call.work == "frozen" or (makes_g and call.train_hidden)
    makes_dw = call.work in ("tile", "recompute") and call.train_weight
    accumulates = call.accumulate or (known and chunks > 1)
    sheet.gradients(sizes, makes_dx, makes_dw, accumulates)
    by_element = 0 if known else 4 * operand  # gathered, and multiplied by the labels' rows of the weight
    if call.work == "frozen":  # the rows are finished in one launch
        by_element += operand + 2 * acc
    sheet.rows(sizes, makes_dx, makes_dw, by_element, 0)
    if makes_dw:
        sheet.scaling(sizes, call.weight_dtype.itemsize, call.accumulate, accumulates)
    return Cost(gpu, tuple(sheet.parts))
