# mypy: allow-untyped-defs, allow-incomplete-defs
"""The gradient of a block of logits in memory, once the statistics of its rows are known, and its column sums for db."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...core.head_spec import HeadSpec
from ...core.row_head import inverse_temperature
from ...core.stats import CoreOptions
from ..torch.passes import Logits
from .launch import Launch
from .logits import label_column, load_logits, matched, warps
from .math import FLOOR, converted, exact, scale_and_cap

#: Columns of a row per program of ``logits_gradient_kernel``, and how many of them each of its threads handles.
PIECE, PIECE_ELEMENTS = 2048, 16
#: Rows and columns that a program of ``column_sums_kernel`` adds at a time.
SUM_ROWS, SUM_COLUMNS = 32, 64


@triton.jit(do_not_specialize=["inverse", "first"])
def logits_gradient_kernel(
    source,  # (N, W)
    destination,  # (N, W)
    bias,  # (W,) or None
    labels,  # (N,)
    k,  # (N,)
    mix,  # (2, N) or None
    at_target,  # (N,) or None
    inverse,  # (N,) inverse temperatures of the rows, or None
    source_stride,
    destination_stride,
    bias_stride,
    mix_stride,
    scale: tl.float64,
    cap: tl.float64,
    first,
    width,
    SOFTCAP: tl.constexpr,
    MATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    ACC: tl.constexpr = k.dtype.element_ty
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale, cap = exact(scale, ACC), exact(cap, ACC)
    if inverse is not None:
        own = tl.load(inverse + row)
        scale, cap = (scale, cap * own) if SOFTCAP else (scale * own, cap)
    z, slope = load_logits(source + row * source_stride, bias, bias_stride, column, width, scale, cap, ACC, SOFTCAP, MATCH)
    distance = z - tl.load(k + row)
    g = tl.exp(distance)
    if mix is not None:
        g *= tl.load(mix + row) + tl.load(mix + mix_stride + row) * tl.maximum(distance, FLOOR)
    if SOFTCAP:
        g *= slope
    entry = tl.full((), 0.0, ACC)
    if at_target is not None:
        entry = tl.load(at_target + row)
    g = tl.where(column == label_column(labels, row, first, width), entry, g)
    g = converted(g, destination.dtype.element_ty)
    tl.store(destination + row * destination_stride + column, g, mask=column < width)


@triton.jit(do_not_specialize=["n"])
def column_sums_kernel(
    values,  # (N, W)
    factors,  # (N,)
    out,  # (W,), added to
    values_stride,
    n,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ACC: tl.constexpr = out.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), ACC)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < n)[:, None] & (column < width)[None, :]
        block = tl.load(values + row.to(tl.int64)[:, None] * values_stride + column[None, :], mask=mask, other=0.0)
        sums += block.to(ACC) * tl.load(factors + row, mask=row < n, other=0.0).to(ACC)[:, None]
    total = tl.load(out + column, mask=column < width, other=0.0) + tl.sum(sums, axis=0)
    tl.store(out + column, total, mask=column < width)


def logits_gradient_launch(
    logits: Logits,
    head: HeadSpec,
    source: Tensor,  # (N, W)
    destination: Tensor,  # (N, W)
    k: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    v0: int,
    v1: int,
    mix: Tensor | None,  # (2, N)
    at_target: Tensor | None,  # (N,)
) -> Launch:
    """The launch of ``logits_gradient_kernel`` for N x ``ceil(W / BLOCK)`` programs."""
    width = source.shape[1]
    bias = None if logits.bias is None else logits.bias[v0:v1]
    mix = None if mix is None else mix.contiguous()
    block = min(PIECE, triton.next_power_of_2(width))
    scale, cap = scale_and_cap(head)
    return Launch(
        logits_gradient_kernel,
        {
            "source": source,
            "destination": destination,
            "bias": bias,
            "labels": labels.contiguous(),
            "k": k.contiguous(),
            "mix": mix,
            "at_target": None if at_target is None else at_target.contiguous(),
            "inverse": inverse_temperature(head),
            "source_stride": source.stride(0),
            "destination_stride": destination.stride(0),
            "bias_stride": 1 if bias is None else bias.stride(0),
            "mix_stride": 0 if mix is None else mix.stride(0),
            "scale": scale,
            "cap": cap,
            "first": v0,
            "width": width,
        },
        {"SOFTCAP": head.softcap is not None, "MATCH": matched(logits), "BLOCK": block},
        num_warps=warps(block, PIECE_ELEMENTS),
        num_stages=1,
    )


def column_sums_launch(
    values: Tensor,  # (N, W)
    factors: Tensor,  # (N,)
    out: Tensor,  # (W,)
) -> Launch:
    """The launch of ``column_sums_kernel`` for ``ceil(W / SUM_COLUMNS)`` programs."""
    return Launch(
        column_sums_kernel,
        {
            "values": values,
            "factors": factors.contiguous(),
            "out": out,
            "values_stride": values.stride(0),
            "n": len(values),
            "width": values.shape[1],
        },
        {"ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS},
        num_warps=8,
    )


def logits_gradient_block(
    logits: Logits,
    head: HeadSpec,
    options: CoreOptions,
    source: Tensor,  # (N, W)
    destination: Tensor,  # (N, W)
    k: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    v0: int,
    v1: int,
    mix: Tensor | None,  # (2, N)
    at_target: Tensor | None,  # (N,)
    dbias: Tensor | None,  # (W,)
    scale: Tensor,  # (N,)
) -> None:
    """``ElementWise.gradient_block``; see ``torch/passes.py``."""
    n, width = source.shape
    if n == 0:
        return
    launch = logits_gradient_launch(logits, head, source, destination, k, labels, v0, v1, mix, at_target)
    launch.run(n, triton.cdiv(width, launch.constants["BLOCK"]))
    if dbias is not None:
        column_sums_launch(destination, scale, dbias).run(triton.cdiv(width, SUM_COLUMNS))
