# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rows of raw logits in memory, as the element-wise kernels of ``scan.py`` and ``logits_gradient.py`` read them."""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.dtypes import rounding
from ..torch.passes import Logits
from .math import rounded, transformed


@triton.jit
def load_logits(
    source,  # a row
    bias,  # its columns' biases, or None
    bias_stride,
    column,
    width,
    scale,
    cap,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MATCH: tl.constexpr,
):
    """Logits, and ``1 - tanh^2`` of a soft-cap. Logits beyond the row are 0, which is T(0)."""
    r = tl.load(source + column, mask=column < width, other=0.0).to(ACC)
    if bias is not None:
        r += tl.load(bias + column * bias_stride, mask=column < width, other=0.0).to(ACC)
    return transformed(rounded(r, MATCH), scale, cap, SOFTCAP)


@triton.jit
def label_column(labels, row, first, width):
    """The label's column in a row: negative for a label before the block, larger than any column for one after it."""
    column = tl.load(labels + row) - first
    return tl.where(column >= width, 2147483647, column).to(tl.int32)


def matched(logits: Logits) -> int:
    """MATCH of :func:`load_logits`: the rounding that the precision of the logits asks for."""
    return rounding(logits.model_dtype, "match") if logits.match else 0


def warps(block: int, elements: int) -> int:
    """Warps of a program that handles ``block`` columns at a time, ``elements`` per thread."""
    return max(1, block // (32 * elements))
