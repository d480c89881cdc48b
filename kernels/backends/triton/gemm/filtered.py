# mypy: allow-untyped-defs, allow-incomplete-defs
"""The GEMMs of a filtered gradient: blocks in which nothing reaches ``grad_filter`` are neither read nor multiplied.

A block of the result is made by one program, which goes over the active blocks of its row (or column) in their order:
the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import halves


@triton.jit
def write_product(
    acc,  # (ROWS, COLUMNS)
    out,  # (ROWS, 1) pointers to the rows' first column
    is_row,
    limit,  # the first column beyond the matrix
    ACCUMULATE: tl.constexpr,
    PART: tl.constexpr,
    SELF: tl.constexpr,  # see epilogue.py
):
    """Write or add a block, PART columns at a time: what is added to does not fit in registers beside it."""
    if acc.shape[1] > PART:
        left, right = halves(acc)
        half: tl.constexpr = acc.shape[1] // 2
        SELF(left, out, is_row, limit, ACCUMULATE, PART, SELF)
        SELF(right, out + half, is_row, limit - half, ACCUMULATE, PART, SELF)
    else:
        column = tl.arange(0, acc.shape[1])[None, :]
        mask = is_row[:, None] & (column < limit)
        if ACCUMULATE:
            acc += tl.load(out + column, mask=mask, other=0.0)
        tl.store(out + column, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["places", "counts", "inner_size", "out_size", "columns_of_list"])
def filtered_kernel(
    g,  # (N, W) the gradient
    b,  # (W, H) weight, or with TRANSPOSED (N, H) hidden states times their factors
    out,  # (N, H), or with TRANSPOSED (W, H)
    places,  # (blocks of out, columns_of_list) int32: the active blocks, in order, first
    counts,  # (blocks of out,) int32, of active blocks
    g_stride,
    b_stride,
    out_stride,
    inner_size,  # W, or with TRANSPOSED N
    out_size,  # N, or with TRANSPOSED W
    hidden_size,
    columns_of_list,
    TRANSPOSED: tl.constexpr,  # out = g.T @ b, else g @ b
    ACCUMULATE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STEP: tl.constexpr,  # divides BLOCK_IN
    PRECISION: tl.constexpr,
):
    # programs that run together share rows of the result's block, so that a block of g is read from memory once
    h_block, out_block = tl.program_id(0), tl.program_id(1)
    r = out_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    h = h_block * BLOCK_H + tl.arange(0, BLOCK_H)
    is_row, is_column = r < out_size, h < hidden_size
    wide_r = r.to(tl.int64)
    steps: tl.constexpr = BLOCK_IN // STEP
    acc = tl.zeros((BLOCK_OUT, BLOCK_H), dtype=tl.float32)
    places += out_block.to(tl.int64) * columns_of_list
    for i in range(tl.load(counts + out_block) * steps):
        first = tl.load(places + i // steps) * BLOCK_IN + i % steps * STEP
        inner = first + tl.arange(0, STEP)
        inside = inner < inner_size
        wide = inner.to(tl.int64)
        if TRANSPOSED:
            a = tl.load(g + wide[:, None] * g_stride + r[None, :], mask=inside[:, None] & is_row[None, :], other=0.0).T
        else:
            a = tl.load(g + wide_r[:, None] * g_stride + inner[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
        rows = tl.load(b + wide[:, None] * b_stride + h[None, :], mask=inside[:, None] & is_column[None, :], other=0.0)
        acc = tl.dot(a, rows, acc, input_precision=PRECISION)
    rows_of_out = out + (wide_r * out_stride + h_block * BLOCK_H)[:, None]
    limit = hidden_size - h_block * BLOCK_H
    PART: tl.constexpr = BLOCK_H if BLOCK_H < 32 else 32  # Triton 3.4 makes a tensor of min(BLOCK_H, 32)
    write_product(acc, rows_of_out, is_row, limit, ACCUMULATE, PART, write_product)
