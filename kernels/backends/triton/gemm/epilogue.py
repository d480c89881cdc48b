# mypy: allow-untyped-defs, allow-incomplete-defs
"""What happens to a block of logits in registers: row sums relative to the label, and the gradient.

The functions go over a block PART columns at a time, by halving it. All at once, the compiler holds every intermediate of
the whole block in registers, and spills.

What halves a block calls itself by its argument SELF, as which it must be passed: Triton 3.4 looks for what a function
depends on among the names in it, and comes to no end with one that names itself.

Where registers are short even so, a half of APART columns or more is behind a branch, which skips what is beyond the
vocabulary: ptxas begins no part of it before the other half is done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..math import logits_of

#: As FLOOR of torch_scan, which says why.
FLOOR = tl.constexpr(-1000.0)
#: What -inf is for a soft-cap, which makes an ordinary logit of an entry that the bias masks with -inf.
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def halves(t):
    """The left and the right half of a block; columns stay in the registers where they are."""
    return tl.split(tl.permute(tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def joined(left, right):
    """The inverse of ``halves``."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], 2 * left.shape[1]))


@triton.jit
def mask_label(
    u,  # (ROWS, COLUMNS)
    top,  # (ROWS,), updated: the largest u but for the label
    label,  # (ROWS,) the label's column, which may be outside
    limit,  # the first column beyond the vocabulary
    SOFTCAP: tl.constexpr,
    PART: tl.constexpr,
    SELF: tl.constexpr,
):
    """Returns u with -inf (LOWEST before a soft-cap) at the label and beyond the vocabulary, and top."""
    if u.shape[1] > PART:
        left, right = halves(u)
        half: tl.constexpr = u.shape[1] // 2
        left, top = SELF(left, top, label, limit, SOFTCAP, PART, SELF)
        right, top = SELF(right, top, label - half, limit - half, SOFTCAP, PART, SELF)
        return joined(left, right), top
    column = tl.arange(0, u.shape[1])[None, :]
    u = tl.where((column == label[:, None]) | (column >= limit), LOWEST if SOFTCAP else -float("inf"), u)
    return u, tl.maximum(top, tl.max(u, axis=1))


@triton.jit
def sum_logits(u, limit, cap, SOFTCAP: tl.constexpr, PART: tl.constexpr, APART: tl.constexpr, SELF: tl.constexpr):
    """Row sums of the logits. u (ROWS, COLUMNS) -> (ROWS,)."""
    if SOFTCAP and u.shape[1] > PART:
        left, right = halves(u)
        half: tl.constexpr = u.shape[1] // 2
        total = SELF(left, limit, cap, SOFTCAP, PART, APART, SELF)
        if half < APART or limit > half:
            total += SELF(right, limit - half, cap, SOFTCAP, PART, APART, SELF)
        return total
    z, _ = logits_of(u, cap, SOFTCAP)
    return tl.sum(z, axis=1)


@triton.jit
def add_label_and_before(u, target, before, label, PART: tl.constexpr, SELF: tl.constexpr):
    """``target`` gets the u of each label, ``before`` the largest u of a column below it. u (ROWS, COLUMNS)."""
    if u.shape[1] > PART:
        left, right = halves(u)
        target, before = SELF(left, target, before, label, PART, SELF)
        return SELF(right, target, before, label - u.shape[1] // 2, PART, SELF)
    column = tl.arange(0, PART)[None, :]
    target = tl.maximum(target, tl.max(tl.where(column == label[:, None], u, -float("inf")), axis=1))
    return target, tl.maximum(before, tl.max(tl.where(column < label[:, None], u, -float("inf")), axis=1))


@triton.jit
def label_and_before(u, none, label, PART: tl.constexpr):
    """The u of each label in the block and the largest before it, -inf for labels outside. Few blocks hold a label."""
    target, before = none, none
    if tl.max(((label >= 0) & (label < u.shape[1])).to(tl.int32), axis=0) > 0:
        target, before = add_label_and_before(u, none, none, label, PART, add_label_and_before)
    return target, before


@triton.jit
def add_exponentials(
    u,  # (ROWS, COLUMNS), from mask_label
    offset,  # (ROWS,)
    sum_e,  # (ROWS, PART), added to
    sum_ez,  # (ROWS,)
    sum_ee,  # (ROWS,)
    gradient,  # (ROWS, 1) pointers to the rows' first column, or None
    is_row,
    limit,
    cap,
    SOFTCAP: tl.constexpr,
    SLOPE: tl.constexpr,  # whether the gradient gets a soft-cap's 1 - tanh^2
    EZ: tl.constexpr,
    EE: tl.constexpr,
    PART: tl.constexpr,
    APART: tl.constexpr,
    SELF: tl.constexpr,
):
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
def write_gradient(
    u,  # (ROWS, COLUMNS)
    largest,  # (ROWS,), updated: the largest |gradient|
    offset,  # (ROWS,)
    constant,  # (ROWS,) or None: the exponentials are multiplied by constant + linear * (z - offset)
    linear,
    at_label,  # (ROWS,) or None, for 0
    gradient,  # (ROWS, 1) pointers to the rows' first column
    is_row,
    label,  # (ROWS,) the label's column, which may be outside
    limit,
    cap,
    SOFTCAP: tl.constexpr,
    PART: tl.constexpr,
    APART: tl.constexpr,
    SELF: tl.constexpr,
):
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
