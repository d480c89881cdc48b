# mypy: allow-untyped-defs, allow-incomplete-defs
"""Epilogues of the GEMM kernels on a block in registers: row sums relative to the label, the gradient, and the stores.

Each goes over the block PART columns at a time, by halving it: handled all at once, the compiler keeps every intermediate of
the whole block in registers, and spills.

The recursion is in this file alone. A function that halves a block calls itself through its argument SELF and must be passed
as that: Triton 3.4 collects a function's dependencies from the names in it and does not terminate for one that names itself.
The public functions pass it.

Where registers are short even so, a half of APART columns or more is inside a branch, which skips columns beyond the
vocabulary: ptxas then starts no part of it before the other half is done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..math import FLOOR, logits_of, rounded

#: Replaces -inf before a soft-cap, which turns the -inf of an entry that the bias masks into an ordinary logit.
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def halves(t):
    """The left and the right half of a block; columns stay in their registers."""
    return tl.split(tl.permute(tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def joined(left, right):
    """The inverse of ``halves``."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _add_bias(acc, bias, limit, MATCH: tl.constexpr, PART: tl.constexpr, SELF: tl.constexpr):
    if bias is not None and acc.shape[1] > PART:
        left, right = halves(acc)
        half: tl.constexpr = acc.shape[1] // 2
        left = SELF(left, bias, limit, MATCH, PART, SELF)
        return joined(left, SELF(right, bias + half, limit - half, MATCH, PART, SELF))
    else:
        if bias is not None:
            v = tl.arange(0, acc.shape[1])
            acc += tl.load(bias + v, mask=v < limit, other=0.0).to(tl.float32)[None, :]
        return rounded(acc, MATCH)


@triton.jit
def add_bias(
    acc,  # (ROWS, COLUMNS)
    bias,  # to the entry of the block's first column, or None
    limit,  # the first column beyond the vocabulary
    MATCH: tl.constexpr,
    PART: tl.constexpr,
):
    """Raw logits."""
    return _add_bias(acc, bias, limit, MATCH, PART, _add_bias)


@triton.jit
def _mask_label(u, top, label, limit, SOFTCAP: tl.constexpr, PART: tl.constexpr, SELF: tl.constexpr):
    if u.shape[1] > PART:
        left, right = halves(u)
        half: tl.constexpr = u.shape[1] // 2
        left, top = SELF(left, top, label, limit, SOFTCAP, PART, SELF)
        right, top = SELF(right, top, label - half, limit - half, SOFTCAP, PART, SELF)
        return joined(left, right), top
    else:
        column = tl.arange(0, u.shape[1])[None, :]
        u = tl.where((column == label[:, None]) | (column >= limit), LOWEST if SOFTCAP else -float("inf"), u)
        return u, tl.maximum(top, tl.max(u, axis=1))


@triton.jit
def mask_label(
    u,  # (ROWS, COLUMNS)
    top,  # (ROWS,), updated: the largest u except the label's
    label,  # (ROWS,) the label's column, which may be outside
    limit,  # the first column beyond the vocabulary
    SOFTCAP: tl.constexpr,
    PART: tl.constexpr,
):
    """u with -inf (LOWEST before a soft-cap) at the label and beyond the vocabulary, and top."""
    return _mask_label(u, top, label, limit, SOFTCAP, PART, _mask_label)


@triton.jit
def _sum_logits(u, limit, cap, SOFTCAP: tl.constexpr, PART: tl.constexpr, APART: tl.constexpr, SELF: tl.constexpr):
    if SOFTCAP and u.shape[1] > PART:
        left, right = halves(u)
        half: tl.constexpr = u.shape[1] // 2
        total = SELF(left, limit, cap, SOFTCAP, PART, APART, SELF)
        if half < APART or limit > half:
            total += SELF(right, limit - half, cap, SOFTCAP, PART, APART, SELF)
        return total
    else:
        z, _ = logits_of(u, cap, SOFTCAP)
        return tl.sum(z, axis=1)


@triton.jit
def sum_logits(u, limit, cap, SOFTCAP: tl.constexpr, PART: tl.constexpr, APART: tl.constexpr):
    """Row sums of the logits. u (ROWS, COLUMNS) -> (ROWS,)."""
    return _sum_logits(u, limit, cap, SOFTCAP, PART, APART, _sum_logits)


@triton.jit
def _label_and_before(u, target, before, label, PART: tl.constexpr, SELF: tl.constexpr):
    if u.shape[1] > PART:
        left, right = halves(u)
        target, before = SELF(left, target, before, label, PART, SELF)
        return SELF(right, target, before, label - u.shape[1] // 2, PART, SELF)
    else:
        column = tl.arange(0, PART)[None, :]
        target = tl.maximum(target, tl.max(tl.where(column == label[:, None], u, -float("inf")), axis=1))
        return target, tl.maximum(before, tl.max(tl.where(column < label[:, None], u, -float("inf")), axis=1))


@triton.jit
def label_and_before(
    u,  # (ROWS, COLUMNS)
    none,  # (ROWS,) -inf
    label,  # (ROWS,) the label's column, which may be outside
    PART: tl.constexpr,
):
    """Of each row the u of its label and the largest u before it, -inf for labels outside. Few blocks hold a label."""
    target, before = none, none
    if tl.max(((label >= 0) & (label < u.shape[1])).to(tl.int32), axis=0) > 0:
        target, before = _label_and_before(u, none, none, label, PART, _label_and_before)
    return target, before


@triton.jit
def _add_exponentials(
    u, offset, sum_e, sum_ez, sum_ee, gradient, is_row, limit, cap, SOFTCAP: tl.constexpr, SLOPE: tl.constexpr,
    EZ: tl.constexpr, EE: tl.constexpr, PART: tl.constexpr, APART: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    if u.shape[1] > PART:
        left, right = halves(u)
        half: tl.constexpr = u.shape[1] // 2
        sum_e, sum_ez, sum_ee = SELF(
            left, offset, sum_e, sum_ez, sum_ee, gradient, is_row, limit, cap, SOFTCAP, SLOPE, EZ, EE, PART, APART, SELF
        )
        right_gradient = None if gradient is None else gradient + half
        if half < APART or limit > half:
            sum_e, sum_ez, sum_ee = SELF(
                right, offset, sum_e, sum_ez, sum_ee, right_gradient, is_row, limit - half, cap,
                SOFTCAP, SLOPE, EZ, EE, PART, APART, SELF,
            )  # fmt: skip
        return sum_e, sum_ez, sum_ee
    else:
        z, slope = logits_of(u, cap, SOFTCAP)
        if SOFTCAP:
            z = tl.where(u == LOWEST, -float("inf"), z)
        d = z - offset[:, None]
        e = tl.exp(d)
        sum_e += tl.sum(e, axis=1)
        if EZ:
            sum_ez += tl.sum(e * tl.maximum(d, FLOOR), axis=1)
        if EE:
            sum_ee += tl.sum(e * e, axis=1)
        if gradient is not None:
            column = tl.arange(0, PART)[None, :]
            if SOFTCAP and SLOPE:
                e *= slope
            tl.store(gradient + column, e.to(gradient.dtype.element_ty), mask=is_row[:, None] & (column < limit))
        return sum_e, sum_ez, sum_ee


@triton.jit
def add_exponentials(
    u,  # (ROWS, COLUMNS), from mask_label
    offset,  # (ROWS,)
    sum_e,  # (ROWS,), added to: sums of e = exp(z - offset)
    sum_ez,  # (ROWS,), with EZ: of e (z - offset)
    sum_ee,  # (ROWS,), with EE: of e^2
    gradient,  # (ROWS, 1) pointers to the rows' first column, which get e; or None
    is_row,
    limit,  # the first column beyond the vocabulary
    cap,
    SOFTCAP: tl.constexpr,
    SLOPE: tl.constexpr,  # whether the gradient gets a soft-cap's 1 - tanh^2
    EZ: tl.constexpr,
    EE: tl.constexpr,
    PART: tl.constexpr,
    APART: tl.constexpr,
):
    """The three sums."""
    return _add_exponentials(
        u, offset, sum_e, sum_ez, sum_ee, gradient, is_row, limit, cap, SOFTCAP, SLOPE, EZ, EE, PART, APART, _add_exponentials
    )


@triton.jit
def _write_gradient(
    u, largest, offset, constant, linear, at_label, gradient, is_row, label, limit, cap,
    SOFTCAP: tl.constexpr, PART: tl.constexpr, APART: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    if u.shape[1] > PART:
        left, right = halves(u)
        half: tl.constexpr = u.shape[1] // 2
        largest = SELF(
            left, largest, offset, constant, linear, at_label, gradient, is_row, label, limit, cap,
            SOFTCAP, PART, APART, SELF,
        )  # fmt: skip
        if half < APART or limit > half:
            largest = SELF(
                right, largest, offset, constant, linear, at_label, gradient + half, is_row, label - half, limit - half, cap,
                SOFTCAP, PART, APART, SELF,
            )  # fmt: skip
        return largest
    else:
        column = tl.arange(0, PART)[None, :]
        is_label = column == label[:, None]
        z, slope = logits_of(u, cap, SOFTCAP)
        d = tl.where(is_label | (column >= limit), -float("inf"), z) - offset[:, None]
        g = tl.exp(d)
        if constant is not None:
            g *= constant[:, None] + linear[:, None] * tl.maximum(d, FLOOR)
        if SOFTCAP:
            g *= slope
        if at_label is not None:
            g = tl.where(is_label, at_label[:, None], g)
        tl.store(gradient + column, g.to(gradient.dtype.element_ty), mask=is_row[:, None] & (column < limit))
        return tl.maximum(largest, tl.max(tl.abs(g), axis=1))


@triton.jit
def write_gradient(
    u,  # (ROWS, COLUMNS)
    largest,  # (ROWS,), updated: the largest |gradient|
    offset,  # (ROWS,)
    constant,  # (ROWS,) or None: the exponentials are multiplied by constant + linear * (z - offset)
    linear,
    at_label,  # (ROWS,), or None for 0
    gradient,  # (ROWS, 1) pointers to the rows' first column
    is_row,
    label,  # (ROWS,) the label's column, which may be outside
    limit,  # the first column beyond the vocabulary
    cap,
    SOFTCAP: tl.constexpr,
    PART: tl.constexpr,
    APART: tl.constexpr,
):
    """Writes the gradient of a block; returns largest."""
    return _write_gradient(
        u, largest, offset, constant, linear, at_label, gradient, is_row, label, limit, cap, SOFTCAP, PART, APART,
        _write_gradient,
    )  # fmt: skip


@triton.jit
def _write_product(acc, out, is_row, limit, ACCUMULATE: tl.constexpr, PART: tl.constexpr, SELF: tl.constexpr):
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


@triton.jit
def write_product(
    acc,  # (ROWS, COLUMNS)
    out,  # (ROWS, 1) pointers to the rows' first column
    is_row,
    limit,  # the first column beyond the matrix
    ACCUMULATE: tl.constexpr,
    PART: tl.constexpr,
):
    """Writes a block, or adds it to ``out``, whose values do not fit in registers beside the whole block."""
    _write_product(acc, out, is_row, limit, ACCUMULATE, PART, _write_product)
