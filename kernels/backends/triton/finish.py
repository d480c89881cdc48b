# mypy: allow-untyped-defs, allow-incomplete-defs
"""The last pass over a gradient tile, and over rows of dX: factors of blocks, and the labels' entries.

A program handles one row (``finish_rows_kernel``: a piece of one), so other rows do not affect the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .math import TYPES, converted

#: Elements of a row that a program handles at a time: of a tile, and of dX.
TILE_BLOCK, ROW_BLOCK = 2048, 1024


@triton.jit(do_not_specialize=["factors", "labels", "at_target", "factors_stride"])
def finish_tile_kernel(
    tile,  # (N, V)
    factors,  # (blocks, N) or None
    labels,  # (N,)
    at_target,  # (N,) or None
    tile_stride,
    factors_stride,
    columns,
    width,
    blocks,
    BLOCKS: tl.constexpr,  # at least ``blocks``
    BLOCK: tl.constexpr,
):
    """One program per row. It does not read the tile where all factors of its row are 1."""
    row = tl.program_id(0).to(tl.int64)
    TYPE: tl.constexpr = tile.dtype.element_ty
    tile += row * tile_stride
    if at_target is not None:
        label = tl.load(labels + row)
        entry = converted(tl.load(at_target + row), TYPE)
    if factors is not None:
        factors += row
        index = tl.arange(0, BLOCKS)
        all_factors = tl.load(factors + index.to(tl.int64) * factors_stride, mask=index < blocks, other=1.0)
        if tl.sum((all_factors != 1.0).to(tl.int32)) > 0:
            first = 0
            for _ in range(blocks):
                factor = tl.load(factors)
                last = tl.minimum(first + width, columns)
                if factor != 1.0:
                    for start in range(first, last, BLOCK):
                        column = start + tl.arange(0, BLOCK)
                        mask = column < last
                        values = converted(tl.load(tile + column, mask=mask, other=0.0).to(factor.dtype) * factor, TYPE)
                        if at_target is not None:  # as written below: the order of the two writes does not matter
                            values = tl.where(column == label, entry, values)
                        tl.store(tile + column, values, mask=mask)
                first = last
                factors += factors_stride
    if at_target is not None:
        tl.store(tile + label, entry, mask=(label >= 0) & (label < columns))


@triton.jit(do_not_specialize=["scale", "target", "labels"])
def finish_rows_kernel(
    values,  # (N, H)
    scale,  # (N,)
    target,  # (N,)
    weight,  # (V, H)
    labels,  # (N,)
    values_stride,
    weight_stride,
    weight_step,
    hidden,
    TYPE: tl.constexpr,  # to which the weight is rounded first
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    label = tl.load(labels + row)
    w = converted(tl.load(weight + label * weight_stride + column.to(tl.int64) * weight_step, mask=mask), TYPE)
    at = values + row * values_stride + column
    ACC: tl.constexpr = values.dtype.element_ty
    tl.store(at, tl.load(at, mask=mask) * tl.load(scale + row) + w.to(ACC) * tl.load(target + row), mask=mask)


def finish_tile_launch(
    tile: Tensor,  # (N, V)
    factors: Tensor | None,  # (blocks, N)
    labels: Tensor,  # (N,)
    at_target: Tensor | None,  # (N,)
    width: int,
) -> Launch:
    """The launch of ``finish_tile_kernel`` for N programs."""
    columns = tile.shape[1]
    blocks = triton.cdiv(columns, width)
    return Launch(
        finish_tile_kernel,
        {
            "tile": tile,
            "factors": factors,
            "labels": labels.contiguous(),
            "at_target": None if at_target is None else at_target.contiguous(),
            "tile_stride": tile.stride(0),
            "factors_stride": 0 if factors is None else factors.stride(0),
            "columns": columns,
            "width": width,
            "blocks": blocks,
        },
        {
            "BLOCKS": triton.next_power_of_2(blocks),
            "BLOCK": min(TILE_BLOCK, triton.next_power_of_2(min(columns, width))),
        },
        num_warps=8,
    )


def finish_blocks(
    tile: Tensor,  # (N, V)
    factors: Tensor | None,  # (blocks, N), each for ``width`` columns
    labels: Tensor,  # (N,) columns of the tile, or outside
    at_target: Tensor | None,  # (N,)
    width: int,
) -> None:
    """Multiply each block of ``width`` columns by its row's factor, and write ``at_target`` at the labels."""
    if tile.numel() and not (factors is None and at_target is None):
        finish_tile_launch(tile, factors, labels, at_target, width).run(len(tile))


def finish_tile(
    tile: Tensor,  # (N, V)
    factors: list[Tensor | None],  # each (N,), None for 1
    labels: Tensor,  # (N,)
    at_target: Tensor | None,  # (N,)
    width: int,
) -> None:
    """:func:`finish_blocks` with a list of factors; see ``finish_tile`` in ``torch/passes.py``."""
    given = None
    if (some := next((f for f in factors if f is not None), None)) is not None:
        given = torch.stack([torch.ones_like(some) if f is None else f for f in factors])
    finish_blocks(tile, given, labels, at_target, width)


def finish_rows_launch(
    values: Tensor,  # (N, H)
    scale: Tensor,  # (N,)
    target: Tensor,  # (N,)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    dtype: torch.dtype,
) -> Launch:
    """The launch of ``finish_rows_kernel`` for N x ``ceil(H / BLOCK)`` programs."""
    return Launch(
        finish_rows_kernel,
        {
            "values": values,
            "scale": scale,
            "target": target,
            "weight": weight,
            "labels": labels,
            "values_stride": values.stride(0),
            "weight_stride": weight.stride(0),
            "weight_step": weight.stride(1),
            "hidden": values.shape[1],
        },
        {"TYPE": TYPES[dtype], "BLOCK": min(ROW_BLOCK, triton.next_power_of_2(values.shape[1]))},
        num_warps=4,
    )


def finish_rows(
    values: Tensor,  # (N, H) float32 (float64), updated
    scale: Tensor,  # (N,)
    target: Tensor,  # (N,)
    weight: Tensor,  # (V, H), rounded to ``dtype`` first
    labels: Tensor,  # (N,) in range
    dtype: torch.dtype,
) -> None:
    """``values = values * scale + target * weight[labels]``, row by row."""
    if values.numel():
        launch = finish_rows_launch(values, scale, target, weight, labels, dtype)
        launch.run(len(values), triton.cdiv(values.shape[1], launch.constants["BLOCK"]))
