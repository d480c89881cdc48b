# mypy: allow-untyped-defs, allow-incomplete-defs
"""The GEMMs of a filtered gradient: blocks in which no entry reaches ``grad_filter`` are neither read nor multiplied.

One program makes a block of the result. It goes over the active blocks of its row (or column) in order, so results are the
same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from .config import GemmConfig, input_precision
from .epilogue import write_product


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
    # programs that run together share their rows of the result, so that a block of g is read from memory once
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
    write_product(acc, rows_of_out, is_row, limit, ACCUMULATE, PART)


def filtered_launch(
    g: Tensor,  # (N, W)
    b: Tensor,  # (W, H), or transposed (N, H)
    out: Tensor,  # (N, H), or transposed (W, H)
    places: Tensor,  # (blocks of out, columns_of_list) int32
    counts: Tensor,  # (blocks of out,) int32
    config: GemmConfig,
    *,
    transposed: bool,
    accumulate: bool,
) -> Launch:
    """The launch of ``filtered_kernel`` for ``ceil(H / BLOCK_H)`` x blocks of ``out`` programs."""
    block_out, block_in = (config.BLOCK_V, config.BLOCK_N) if transposed else (config.BLOCK_N, config.BLOCK_V)
    wide = g.element_size() == 4
    return Launch(
        filtered_kernel,
        {
            "g": g,
            "b": b,
            "out": out,
            "places": places,
            "counts": counts,
            "g_stride": g.stride(0),
            "b_stride": b.stride(0),
            "out_stride": out.stride(0),
            "inner_size": len(b),
            "out_size": len(out),
            "hidden_size": b.shape[1],
            "columns_of_list": places.shape[1],
        },
        {
            "TRANSPOSED": transposed,
            "ACCUMULATE": accumulate,
            "BLOCK_OUT": block_out,
            "BLOCK_IN": block_in,
            "BLOCK_H": 64 if wide else 128,
            "STEP": min(block_in, 32 if wide else 64),
            "PRECISION": input_precision(g.dtype, g.device),
        },
        num_warps=8,
        num_stages=3,
    )


def filtered_mm(
    g: Tensor,  # (N, W)
    b: Tensor,  # (W, H), or transposed (N, H), of g's dtype, unit column stride
    out: Tensor,  # (N, H), or transposed (W, H)
    active: Tensor,  # (n_blocks, v_blocks), 0 for blocks of g that are left out
    config: GemmConfig,
    *,
    transposed: bool,
    accumulate: bool,
) -> None:
    """``out = g @ b``, transposed ``g.T @ b``, or added to ``out``, without the blocks of ``g`` that are not active."""
    keep = (active != 0).t() if transposed else active != 0
    places = torch.argsort(keep.logical_not().to(torch.int8), dim=1, stable=True).to(torch.int32).contiguous()
    counts = keep.sum(dim=1, dtype=torch.int32)
    launch = filtered_launch(g, b, out, places, counts, config, transposed=transposed, accumulate=accumulate)
    launch.run(triton.cdiv(b.shape[1], launch.constants["BLOCK_H"]), len(places))
