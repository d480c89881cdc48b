# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rows of dX put in their places: scaled, added to, and converted in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.dtypes import accumulate_dtype
from ..torch import rows as torch_rows
from .launch import Launch, unit_columns
from .math import TYPES, converted

#: Elements of a row per program, and per thread: accesses of 16 bytes for 16-bit types, pairs of them for float32.
BLOCK, ELEMENTS = 1024, 8


@triton.jit(do_not_specialize=["out_rows"])
def scatter_rows_kernel(
    values,  # (N, H)
    rows,  # (N,) distinct
    factor,  # (1,) or (N,), or None for 1
    base,  # (N, H), or None for 0
    out,  # (P, H)
    values_stride,
    factor_stride,  # 0 for one factor
    base_stride,
    out_stride,
    out_rows,
    hidden,
    ACC: tl.constexpr,  # type in which a row is scaled and added to
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row >= 0 and row < out_rows:  # callers guarantee the range; a write out of range must not corrupt other memory
        result = tl.load(values + i * values_stride + column, mask=column < hidden).to(ACC)
        if factor is not None:
            result *= tl.load(factor + i * factor_stride)
        if base is not None:
            result += tl.load(base + i * base_stride + column, mask=column < hidden).to(ACC)
        tl.store(out + row * out_stride + column, converted(result, out.dtype.element_ty), mask=column < hidden)


def scatter_rows_launch(
    values: Tensor,  # (N, H), unit column stride
    rows: Tensor,  # (N,) int64
    factor: Tensor | None,  # (1,) or (N,) in ``acc``
    base: Tensor | None,  # (N, H), unit column stride
    out: Tensor,  # (P, H), unit column stride
    acc: torch.dtype,
) -> Launch:
    """The launch of ``scatter_rows_kernel`` for N x ``ceil(H / BLOCK)`` programs."""
    block = min(BLOCK, triton.next_power_of_2(values.shape[1]))
    return Launch(
        scatter_rows_kernel,
        {
            "values": values,
            "rows": rows.contiguous(),
            "factor": factor,
            "base": base,
            "out": out,
            "values_stride": values.stride(0),
            "factor_stride": 0 if factor is None or len(factor) == 1 else factor.stride(0),
            "base_stride": 0 if base is None else base.stride(0),
            "out_stride": out.stride(0),
            "out_rows": len(out),
            "hidden": values.shape[1],
        },
        {"ACC": TYPES[acc], "BLOCK": block},
        num_warps=max(1, block // (32 * ELEMENTS)),
    )


def scatter_rows(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: Tensor,  # (N,) int64, in range
    values: Tensor,  # (N, H)
    factor: Tensor | None = None,  # 0-dim or (N,)
    base: Tensor | None = None,  # (N, H)
    distinct: bool = True,
) -> Tensor:
    """A tensor of that shape (P, H) and dtype with ``values * factor + base`` at ``rows`` and 0 elsewhere.

    Computed in float32, or in float64 where ``values`` or ``base`` is. Unless the rows are ``distinct``, values of equal rows
    add up: torch's ``index_add_`` does that, since programs that add to one row would need atomics.
    """
    if not distinct:
        return torch_rows.scatter_rows(shape, dtype, rows, values, factor, base, distinct)
    out = torch.zeros(shape, dtype=dtype, device=values.device)
    if values.numel() == 0:
        return out
    acc = accumulate_dtype(values.dtype)
    acc = acc if base is None else torch.promote_types(acc, base.dtype)
    values, base = unit_columns(values), None if base is None else unit_columns(base)
    factor = None if factor is None else factor.to(acc).reshape(-1)
    launch = scatter_rows_launch(values, rows, factor, base, out.view(-1, values.shape[1]), acc)
    launch.run(len(values), triton.cdiv(values.shape[1], launch.constants["BLOCK"]))
    return out
