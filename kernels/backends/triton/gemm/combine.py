# mypy: allow-untyped-defs, allow-incomplete-defs
"""The statistics of each row from the sums of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from ..math import FLOOR, log1p

#: Rows per program of ``combine_kernel``, and blocks that it adds at a time.
COMBINE_ROWS, COMBINE_CHUNK = 32, 32
#: Rows of ``stats`` in ``combine_kernel``.
STATS = ("logps", "sum_others", "log_denom", "target_offset", "entropy", "mean_logits", "log_sum_sq_probs")


@dataclass(frozen=True)
class PartialRows:
    """The rows of the partial sums: 0 for those not wanted. Rows 0 and 1 are the sums of e and the offsets."""

    ez: int
    z: int
    ee: int
    target: int  # and the next two
    top: int
    count: int

    @classmethod
    def of(cls, outputs: frozenset[str], filtered: bool) -> PartialRows:
        """The rows for some token statistics; ``filtered``: a gradient tile follows, some of whose blocks may be left out."""
        count, rows = 2, {}
        names = {"ez": "entropy", "z": "mean_logits", "ee": "log_sum_sq_probs", "target": "is_top1"}
        wanted = {row: name in outputs for row, name in names.items()} | {"top": filtered}
        for row, is_wanted in wanted.items():
            rows[row] = count if is_wanted else 0
            count += (3 if row == "target" else 1) * is_wanted
        return cls(**rows, count=count)

    def constants(self) -> dict[str, Any]:
        return {
            "ROW_EZ": self.ez,
            "ROW_Z": self.z,
            "ROW_EE": self.ee,
            "ROW_TARGET": self.target,
            "ROW_TOP": self.top,
        }


@triton.jit
def weighted_sum(partial, row: tl.constexpr, plane, at, mask, factor):
    """The sum over blocks (dimension 0) of a row of ``partial`` times ``factor``, in float64."""
    values = tl.load(partial + row * plane + at, mask=mask, other=0.0).to(tl.float64)
    # a block whose factor is 0 may hold infinite sums
    return tl.sum(tl.where(factor > 0, values * factor, 0.0), axis=0)


@triton.jit(
    do_not_specialize=["partial", "k", "zy", "sums", "stats", "is_top1", "num_tokens", "v_blocks", "vocab_size"],
)
def combine_kernel(
    partial,  # (rows, v_blocks, N), from score_kernel; row 1 gets the factor of each block's gradient
    k,  # (N,) float32, as given to score_kernel; gets the offset common to all blocks
    zy,  # (N,) float32 logits of the labels
    sums,  # (7, N) float64, sums of earlier blocks relative to the old k, updated; or None
    stats,  # (7, N) float32 or None: logps, sum_others, log_denom, target_offset, entropy, mean_logits, log_sum_sq_probs
    is_top1,  # (N,) bool or None
    num_tokens,
    v_blocks,
    vocab_size,
    ROW_EZ: tl.constexpr,
    ROW_Z: tl.constexpr,
    ROW_EE: tl.constexpr,
    ROW_TARGET: tl.constexpr,
    ROW_TOP: tl.constexpr,
    FIRST: tl.constexpr,  # ``sums`` is empty
    FACTORS: tl.constexpr,  # row 1 (and ROW_TOP, as exponentials) are wanted
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = r < num_tokens
    plane = v_blocks.to(tl.int64) * num_tokens
    before_k = tl.load(k + r, mask=is_row, other=0.0)
    new_k = before_k
    for c in range(0, v_blocks, CHUNK):
        block = c + tl.arange(0, CHUNK)
        mask = (block < v_blocks)[:, None] & is_row[None, :]
        at = block.to(tl.int64)[:, None] * num_tokens + r[None, :]
        offsets = tl.load(partial + plane + at, mask=mask, other=-float("inf"))
        new_k = tl.maximum(new_k, tl.max(offsets, axis=0))
    wide_k = new_k.to(tl.float64)
    sum_e = tl.zeros((BLOCK_R,), dtype=tl.float64)
    sum_ez = tl.zeros((BLOCK_R,), dtype=tl.float64)
    sum_ee = tl.zeros((BLOCK_R,), dtype=tl.float64)
    sum_z = tl.zeros((BLOCK_R,), dtype=tl.float64)
    target = tl.full((BLOCK_R,), -float("inf"), dtype=tl.float32)
    before = tl.full((BLOCK_R,), -float("inf"), dtype=tl.float32)
    others = tl.full((BLOCK_R,), -float("inf"), dtype=tl.float32)
    if not FIRST:
        raised = before_k.to(tl.float64) - wide_k  # not ``shift``: a name in the loop below must keep its type
        lowered = tl.exp(raised)
        wide_n = num_tokens.to(tl.int64)
        sum_e = tl.load(sums + r, mask=is_row, other=0.0) * lowered
        if ROW_EZ:
            earlier = tl.load(sums + wide_n + r, mask=is_row, other=0.0)
            sum_ez = earlier * lowered + tl.where(lowered > 0, raised, 0.0) * sum_e
        if ROW_EE:
            sum_ee = tl.load(sums + 2 * wide_n + r, mask=is_row, other=0.0) * lowered * lowered
        if ROW_Z:
            sum_z = tl.load(sums + 3 * wide_n + r, mask=is_row, other=0.0)
        if ROW_TARGET:
            target = tl.load(sums + 4 * wide_n + r, mask=is_row, other=0.0).to(tl.float32)
            before = tl.load(sums + 5 * wide_n + r, mask=is_row, other=0.0).to(tl.float32)
            others = tl.load(sums + 6 * wide_n + r, mask=is_row, other=0.0).to(tl.float32)
    for c in range(0, v_blocks, CHUNK):
        block = c + tl.arange(0, CHUNK)
        mask = (block < v_blocks)[:, None] & is_row[None, :]
        at = block.to(tl.int64)[:, None] * num_tokens + r[None, :]
        shift = tl.load(partial + plane + at, mask=mask, other=-float("inf")).to(tl.float64) - wide_k[None, :]
        factor = tl.exp(shift)
        part_e = tl.load(partial + at, mask=mask, other=0.0).to(tl.float64) * factor
        sum_e += tl.sum(part_e, axis=0)
        if ROW_EZ:
            sum_ez += weighted_sum(partial, ROW_EZ, plane, at, mask, factor)
            sum_ez += tl.sum(tl.where(factor > 0, shift, 0.0) * part_e, axis=0)
        if ROW_EE:
            sum_ee += weighted_sum(partial, ROW_EE, plane, at, mask, factor * factor)
        if ROW_Z:
            sum_z += tl.sum(tl.load(partial + ROW_Z * plane + at, mask=mask, other=0.0).to(tl.float64), axis=0)
        if ROW_TARGET:
            inf = float("inf")
            of = partial + ROW_TARGET * plane + at
            target = tl.maximum(target, tl.max(tl.load(of, mask=mask, other=-inf), axis=0))
            before = tl.maximum(before, tl.max(tl.load(of + plane, mask=mask, other=-inf), axis=0))
            others = tl.maximum(others, tl.max(tl.load(of + 2 * plane, mask=mask, other=-inf), axis=0))
        if FACTORS:
            tl.store(partial + plane + at, factor.to(tl.float32), mask=mask)
            if ROW_TOP:
                top = partial + ROW_TOP * plane + at
                tl.store(top, tl.exp(tl.load(top, mask=mask, other=0.0) - new_k[None, :]), mask=mask)
    tl.store(k + r, new_k, mask=is_row)
    if sums is not None:
        wide_n = num_tokens.to(tl.int64)
        tl.store(sums + r, sum_e, mask=is_row)
        if ROW_EZ:
            tl.store(sums + wide_n + r, sum_ez, mask=is_row)
        if ROW_EE:
            tl.store(sums + 2 * wide_n + r, sum_ee, mask=is_row)
        if ROW_Z:
            tl.store(sums + 3 * wide_n + r, sum_z, mask=is_row)
        if ROW_TARGET:
            tl.store(sums + 4 * wide_n + r, target.to(tl.float64), mask=is_row)
            tl.store(sums + 5 * wide_n + r, before.to(tl.float64), mask=is_row)
            tl.store(sums + 6 * wide_n + r, others.to(tl.float64), mask=is_row)
    if stats is not None:
        to = stats + r
        wide_n = num_tokens.to(tl.int64)
        offset = tl.load(zy + r, mask=is_row, other=0.0).to(tl.float64) - wide_k
        e_target = tl.exp(offset)
        denominator = sum_e + e_target
        at_target = offset == 0
        log_denom = tl.where(at_target, log1p(sum_e), tl.log(denominator))
        tl.store(to, tl.where(at_target, -log_denom, offset - log_denom).to(tl.float32), mask=is_row)
        tl.store(to + wide_n, sum_e.to(tl.float32), mask=is_row)
        tl.store(to + 2 * wide_n, log_denom.to(tl.float32), mask=is_row)
        tl.store(to + 3 * wide_n, offset.to(tl.float32), mask=is_row)
        if ROW_EZ:
            mean = (sum_ez + e_target * tl.maximum(offset, FLOOR)) / denominator
            tl.store(to + 4 * wide_n, (log_denom - mean).to(tl.float32), mask=is_row)
        if ROW_Z:
            tl.store(to + 5 * wide_n, (sum_z / vocab_size).to(tl.float32), mask=is_row)
        if ROW_EE:  # 1 - sum p^2 is small for a confident model: see ``combine`` in tile/sums.py
            p_y = e_target / denominator
            squares = sum_ee / denominator / denominator
            rest = tl.maximum(sum_e / denominator * (1 + p_y) - squares, 0.0)
            value = tl.where(rest < 0.5, log1p(-rest), tl.log(squares + p_y * p_y))
            tl.store(to + 6 * wide_n, value.to(tl.float32), mask=is_row)
        if ROW_TARGET:
            tl.store(is_top1 + r, (target > before) & (target >= others), mask=is_row)


def combine_launch(
    partial: Tensor,  # (rows.count, v_blocks, N) float32
    k: Tensor,  # (N,) float32
    zy: Tensor,  # (N,) float32
    sums: Tensor | None,  # (7, N) float64
    stats: Tensor | None,  # (7, N) float32
    is_top1: Tensor | None,  # (N,) bool
    rows: PartialRows,
    *,
    vocab_size: int,
    is_first: bool,
    factors: bool,
) -> Launch:
    """The launch of ``combine_kernel`` for ``ceil(N / COMBINE_ROWS)`` programs."""
    arguments = {
        "partial": partial,
        "k": k,
        "zy": zy,
        "sums": sums,
        "stats": stats,
        "is_top1": is_top1,
        "num_tokens": partial.shape[2],
        "v_blocks": partial.shape[1],
        "vocab_size": vocab_size,
    }
    sizes = {"BLOCK_R": COMBINE_ROWS, "CHUNK": COMBINE_CHUNK}
    constants = {**rows.constants(), "FIRST": is_first, "FACTORS": factors, **sizes}
    return Launch(combine_kernel, arguments, constants, num_warps=4)
