# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sums over packed segments: one program per segment, which adds in float64 and in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

#: Tokens of a segment that a program adds at a time.
BLOCK = 1024


@triton.jit
def segment_sum_kernel(
    values,  # (N,)
    offsets,  # (S + 1,)
    out,  # (S,)
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    start, stop = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, stop, BLOCK):
        token = first + tl.arange(0, BLOCK)
        sums += tl.load(values + token, mask=token < stop, other=0.0).to(tl.float64)
    tl.store(out + segment, tl.sum(sums).to(out.dtype.element_ty))


def segment_sum_launch(
    values: Tensor,  # (N,)
    offsets: Tensor,  # (S + 1,)
    out: Tensor,  # (S,)
) -> Launch:
    """The launch of ``segment_sum_kernel`` for S programs."""
    arguments = {"values": values.contiguous(), "offsets": offsets.contiguous(), "out": out}
    return Launch(segment_sum_kernel, arguments, {"BLOCK": BLOCK}, num_warps=4)


def segment_sum(
    values: Tensor,  # (N,)
    offsets: Tensor,  # (S + 1,) int64, non-decreasing from 0 to N
) -> Tensor:
    """Sums (S,) of ``values[offsets[j]:offsets[j + 1]]``, added in float64, in the dtype of the values."""
    out = torch.empty(len(offsets) - 1, dtype=values.dtype, device=values.device)
    if len(out):
        segment_sum_launch(values, offsets, out).run(len(out))
    return out
