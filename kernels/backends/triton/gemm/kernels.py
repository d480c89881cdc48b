# mypy: allow-untyped-defs, allow-incomplete-defs
"""The head's GEMM with an epilogue: blocks of logits that stay in registers.

``score_kernel`` reduces each block of logits to row sums relative to the target (and writes the gradient tile, if there is
one); ``combine_kernel`` adds these up. ``recompute_kernel`` writes a block's gradient once the statistics are known.

Each program makes blocks ``program, program + programs, ...`` of BLOCK_N tokens by BLOCK_V vocabulary entries. Blocks are
ordered so that programs that run together share GROUP blocks of tokens, which stay in the L2 cache with the weight rows that
they are multiplied by. No two programs add to the same number: results are the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..math import RAISE_ABOVE, logits_of
from .epilogue import add_bias, add_exponentials, label_and_before, mask_label, sum_logits, write_gradient


@triton.jit
def load_block(
    source,  # (rows, columns): a pointer, or with TMA a descriptor of blocks (ROWS, COLUMNS)
    stride,
    row,
    rows,
    column,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,  # columns is a multiple of COLUMNS
):
    """A block of a matrix, 0 beyond its rows and columns."""
    if TMA:
        return source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        inside = (r < rows)[:, None]
        if not EVEN:
            inside = inside & (c < columns)[None, :]
        return tl.load(source + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def multiply(
    x,  # (N, H)
    w,  # (W, H)
    x_stride,
    w_stride,
    row,
    rows,
    entry,
    entries,
    hidden_size,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x[row:row+BLOCK_N] @ w[entry:entry+BLOCK_V].T`` in float32."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for h in range(0, hidden_size, BLOCK_H):
        a = load_block(x, x_stride, row, rows, h, hidden_size, BLOCK_N, BLOCK_H, TMA, EVEN)
        b = load_block(w, w_stride, entry, entries, h, hidden_size, BLOCK_V, BLOCK_H, TMA, EVEN)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def place(block, n_blocks, v_blocks, GROUP: tl.constexpr):
    """The token block and the vocabulary block of a number: GROUP token blocks go through the whole vocabulary."""
    span = GROUP * v_blocks
    first = block // span * GROUP
    size = tl.minimum(n_blocks - first, GROUP)
    within = block % span
    return first + within % size, within // size


@triton.jit
def tempered(
    r,  # (ROWS, COLUMNS) raw logits
    inverse,  # (N,)
    row,  # (ROWS,)
    is_row,
    scale,
    cap,
    SOFTCAP: tl.constexpr,
):
    """``u = r * scale`` and ``cap`` of each row, (ROWS,) and (ROWS, 1): one of the two times the row's inverse temperature."""
    own = tl.load(inverse + row, mask=is_row, other=1.0)
    if SOFTCAP:
        own *= cap
        return r * scale, own, own[:, None]
    else:
        return r * (own * scale)[:, None], cap, cap


# Arguments that depend on the number of tokens, even only by their address, are not specialised, so that no batch needs a new
# compilation.
@triton.jit(do_not_specialize=["labels", "k", "inverse", "partial", "num_tokens", "num_entries", "first", "scale", "cap"])
def score_kernel(
    x,  # (N, H)
    w,  # (W, H): vocabulary entries first..first+W
    x_stride,
    w_stride,
    bias,  # (W,) or None
    labels,  # (N,) int64
    k,  # (N,) float32 offsets of ordinary rows
    partial,  # (rows, v_blocks, N) float32, written: row 0 has sums of e, row 1 the block's offset, others as numbered below
    gradient,  # (N, W) or None, gets e * (1 - tanh^2 or, without SLOPE, 1), 0 at the label
    gradient_stride,
    num_tokens,
    num_entries,
    hidden_size,
    first,
    scale,
    cap,
    inverse,  # (N,) float32 inverse temperatures of the rows, or None
    SOFTCAP: tl.constexpr,
    SLOPE: tl.constexpr,
    MATCH: tl.constexpr,
    # rows of ``partial``, 0 for those not wanted: sums of e (z - k), of z, of e^2; u at the label, followed by the largest u
    # before it and the largest except it; the largest logit except the label's
    ROW_EZ: tl.constexpr,
    ROW_Z: tl.constexpr,
    ROW_EE: tl.constexpr,
    ROW_TARGET: tl.constexpr,
    ROW_TOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    APART: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_blocks = tl.cdiv(num_tokens, BLOCK_N)
    v_blocks = tl.cdiv(num_entries, BLOCK_V)
    plane = v_blocks.to(tl.int64) * num_tokens
    tl.assume(hidden_size > 0)  # otherwise a flattened loop gets a copy for no iterations
    for block in tl.range(tl.program_id(0), n_blocks * v_blocks, tl.num_programs(0), flatten=FLATTEN):
        n_block, v_block = place(block, n_blocks, v_blocks, GROUP)
        row, entry = n_block * BLOCK_N, v_block * BLOCK_V
        acc = multiply(
            x, w, x_stride, w_stride, row, num_tokens, entry, num_entries, hidden_size,
            BLOCK_N, BLOCK_V, BLOCK_H, TMA, EVEN, PRECISION,
        )  # fmt: skip
        r = row + tl.arange(0, BLOCK_N)
        is_row = r < num_tokens
        label = (tl.load(labels + r, mask=is_row, other=-1) - first).to(tl.int32) - entry
        offset = tl.load(k + r, mask=is_row, other=0.0)
        to = partial + v_block.to(tl.int64) * num_tokens + r
        biases = None if bias is None else bias + entry
        u = add_bias(acc, biases, num_entries - entry, MATCH, PART)
        if inverse is None:
            u *= scale
            row_cap, block_cap = cap, cap
        else:
            u, row_cap, block_cap = tempered(u, inverse, r, is_row, scale, cap, SOFTCAP)
        zero = tl.zeros((BLOCK_N,), dtype=tl.float32)
        none = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
        if ROW_TARGET:
            target, before = label_and_before(u, none, label, PART)
            tl.store(to + ROW_TARGET * plane, target, mask=is_row)
        if ROW_Z:  # entries beyond the vocabulary are 0
            tl.store(to + ROW_Z * plane, sum_logits(u, num_entries - entry, block_cap, SOFTCAP, PART, APART), mask=is_row)
        u, top = mask_label(u, none, label, num_entries - entry, SOFTCAP, PART)
        if ROW_TARGET:
            tl.store(to + (ROW_TARGET + 1) * plane, tl.where(label >= BLOCK_V, top, before), mask=is_row)
            tl.store(to + (ROW_TARGET + 2) * plane, top, mask=is_row)
        # The transform is monotonic, so the largest logit is that of the largest u. Ordinary rows keep their offset. A row
        # whose sum could overflow takes its largest logit as the offset of this block alone.
        top, _ = logits_of(top, row_cap, SOFTCAP)
        offset = tl.where(top - offset > RAISE_ABOVE, top, offset)
        sum_e = tl.zeros((BLOCK_N,), dtype=tl.float32)
        rows_of_gradient = None if gradient is None else gradient + (r.to(tl.int64) * gradient_stride + entry)[:, None]
        sum_e, sum_ez, sum_ee = add_exponentials(
            u, offset, sum_e, zero, zero, rows_of_gradient, is_row, num_entries - entry, block_cap, SOFTCAP, SLOPE,
            ROW_EZ > 0, ROW_EE > 0, PART, APART,
        )  # fmt: skip
        tl.store(to, sum_e, mask=is_row)
        tl.store(to + plane, offset, mask=is_row)
        if ROW_EZ:
            tl.store(to + ROW_EZ * plane, sum_ez, mask=is_row)
        if ROW_EE:
            tl.store(to + ROW_EE * plane, sum_ee, mask=is_row)
        if ROW_TOP:
            tl.store(to + ROW_TOP * plane, top, mask=is_row)


@triton.jit(
    do_not_specialize=[
        "labels", "k", "inverse", "mix", "at_target", "row_scale", "active",
        "num_tokens", "num_entries", "first", "scale", "cap", "threshold",
    ],
)  # fmt: skip
def recompute_kernel(
    x,  # (N, H)
    w,  # (W, H): vocabulary entries first..first+W
    x_stride,
    w_stride,
    bias,  # (W,) or None
    labels,  # (N,) int64
    k,  # (N,) float32, final
    inverse,  # (N,) float32 inverse temperatures of the rows, or None
    mix,  # (2, N) float32 or None, for 1 and 0
    at_target,  # (N,) float32, or None for 0
    row_scale,  # (N,) float32, what a row of the gradient is multiplied by later; None without active
    gradient,  # (N, W), gets e * (1 - tanh^2) * (mix[0] + mix[1] (z - k)), ``at_target`` at the label
    gradient_stride,
    active,  # (n_blocks, v_blocks) int8 or None: 0 where no entry times row_scale reaches the threshold and none is a label's
    num_tokens,
    num_entries,
    hidden_size,
    first,
    scale,
    cap,
    threshold,
    SOFTCAP: tl.constexpr,
    MATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    APART: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_blocks = tl.cdiv(num_tokens, BLOCK_N)
    v_blocks = tl.cdiv(num_entries, BLOCK_V)
    tl.assume(hidden_size > 0)
    for block in tl.range(tl.program_id(0), n_blocks * v_blocks, tl.num_programs(0), flatten=FLATTEN):
        n_block, v_block = place(block, n_blocks, v_blocks, GROUP)
        row, entry = n_block * BLOCK_N, v_block * BLOCK_V
        acc = multiply(
            x, w, x_stride, w_stride, row, num_tokens, entry, num_entries, hidden_size,
            BLOCK_N, BLOCK_V, BLOCK_H, TMA, EVEN, PRECISION,
        )  # fmt: skip
        r = row + tl.arange(0, BLOCK_N)
        is_row = r < num_tokens
        label = (tl.load(labels + r, mask=is_row, other=-1) - first).to(tl.int32) - entry
        offset = tl.load(k + r, mask=is_row, other=0.0)
        constant, linear, at_label = None, None, None
        if mix is not None:
            constant = tl.load(mix + r, mask=is_row, other=0.0)
            linear = tl.load(mix + num_tokens.to(tl.int64) + r, mask=is_row, other=0.0)
        if at_target is not None:
            at_label = tl.load(at_target + r, mask=is_row, other=0.0)
        biases = None if bias is None else bias + entry
        u = add_bias(acc, biases, num_entries - entry, MATCH, PART)
        if inverse is None:
            u *= scale
            block_cap = cap
        else:
            u, _, block_cap = tempered(u, inverse, r, is_row, scale, cap, SOFTCAP)
        largest = tl.zeros((BLOCK_N,), dtype=tl.float32)
        rows_of_gradient = gradient + (r.to(tl.int64) * gradient_stride + entry)[:, None]
        largest = write_gradient(
            u, largest, offset, constant, linear, at_label, rows_of_gradient, is_row, label, num_entries - entry, block_cap,
            SOFTCAP, PART, APART,
        )  # fmt: skip
        if active is not None:
            a = tl.abs(tl.load(row_scale + r, mask=is_row, other=0.0))
            # a label's entry is never dropped, whatever its size
            has_label = (label >= 0) & (label < tl.minimum(BLOCK_V, num_entries - entry))
            keep = tl.max((has_label | (largest * a >= threshold)).to(tl.int32), axis=0)
            tl.store(active + n_block * v_blocks + v_block, keep.to(tl.int8))
