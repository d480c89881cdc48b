# mypy: allow-untyped-defs, allow-incomplete-defs
"""Exponentials and row sums of a block of logits in memory: one read and one write for all outputs.

One program handles one row, so nothing is added up across programs. Blocks are at most ``VOCAB_BLOCK`` columns wide. A row is
usually one chunk, which stays in registers from its maximum to its exponentials, so raising its offset costs nothing. Rows
take several chunks where one would need too many registers (soft-cap, float64) and where they are wider. Then a chunk may
raise the offset after others were written: the program reads ahead for the row's maximum, once, and rescales its sums and
what it has written. Only such rows run a kernel compiled with this branch, which doubles the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.head_spec import HeadSpec
from ...core.row_head import inverse_temperature
from ...core.stats import CoreOptions
from ...tile.sums import RAISE_ABOVE, BlockSums
from ..torch.passes import Logits
from .launch import Launch
from .logits import label_column, load_logits, matched, warps
from .math import FLOOR, converted, exact, scale_and_cap


@triton.jit(do_not_specialize=["inverse", "first"])
def scan_kernel(
    source,  # (N, W)
    destination,  # (N, W) or None
    bias,  # (W,) or None
    labels,  # (N,)
    k,  # (N,)
    new_k,  # (N,) what follows is relative to it
    e,  # (N,) as all that follow; None where not wanted
    ez,
    ee,
    z_sum,
    target,
    before,
    after,
    inverse,  # (N,) inverse temperatures of the rows, or None
    source_stride,
    destination_stride,
    bias_stride,
    scale: tl.float64,
    cap: tl.float64,
    first,
    width,
    LIMIT: tl.constexpr,  # largest z - k that does not raise k
    SOFTCAP: tl.constexpr,
    SLOPE: tl.constexpr,  # whether the destination gets a soft-cap's 1 - tanh^2
    MATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # width > BLOCK
):
    row = tl.program_id(0).to(tl.int64)
    ACC: tl.constexpr = e.dtype.element_ty
    source += row * source_stride
    if destination is not None:
        TYPE: tl.constexpr = destination.dtype.element_ty
        destination += row * destination_stride
    at = label_column(labels, row, first, width)
    scale, cap = exact(scale, ACC), exact(cap, ACC)
    if inverse is not None:
        own = tl.load(inverse + row)
        scale, cap = (scale, cap * own) if SOFTCAP else (scale * own, cap)
    offset = tl.load(k + row)
    zero = tl.full((), 0.0, ACC)
    lowest = tl.full((), float("-inf"), ACC)
    sum_e, sum_ez, sum_ee, sum_z = zero, zero, zero, zero
    at_label, left, right = lowest, lowest, lowest
    for start in range(0, width if WIDE else 1, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z, slope = load_logits(source, bias, bias_stride, column, width, scale, cap, ACC, SOFTCAP, MATCH)
        others = tl.where((column < width) & (column != at), z, float("-inf"))
        if z_sum is not None:
            sum_z += tl.sum(z)
        if target is not None:
            at_label = tl.maximum(at_label, tl.max(tl.where(column == at, z, float("-inf"))))
            left = tl.maximum(left, tl.max(tl.where(column < at, others, float("-inf"))))
            right = tl.maximum(right, tl.max(tl.where(column > at, others, float("-inf"))))
        # The maximum needs the whole chunk, so every thread has read it before any thread writes: the destination may be the
        # source, or narrower rows that start where the source's start.
        top = tl.max(others)
        if top - offset > LIMIT:
            if WIDE:
                FEW: tl.constexpr = BLOCK // 8  # the chunk stays in registers meanwhile
                for ahead in range(start + BLOCK, width, FEW):
                    further = ahead + tl.arange(0, FEW)
                    y, _ = load_logits(source, bias, bias_stride, further, width, scale, cap, ACC, SOFTCAP, MATCH)
                    top = tl.maximum(top, tl.max(tl.where((further < width) & (further != at), y, float("-inf"))))
                shift = offset - top
                factor = tl.exp(shift)
                sum_ez = tl.where(factor > 0, sum_ez + shift * sum_e, 0.0) * factor  # shift may be -inf
                sum_ee *= factor * factor
                sum_e *= factor
                if destination is not None:
                    tl.debug_barrier()  # a thread may read what another has written
                    for written in range(0, start, FEW):
                        c = written + tl.arange(0, FEW)
                        values = tl.load(destination + c, mask=c < width, other=0.0).to(ACC) * factor
                        tl.store(destination + c, converted(values, TYPE), mask=c < width)
            offset = top
        distance = others - offset
        exponential = tl.exp(distance)
        sum_e += tl.sum(exponential)
        if ez is not None:
            sum_ez += tl.sum(tl.maximum(distance, FLOOR) * exponential)
        if ee is not None:
            sum_ee += tl.sum(exponential * exponential)
        if destination is not None:
            if SOFTCAP and SLOPE:
                exponential *= slope
            tl.store(destination + column, converted(exponential, TYPE), mask=column < width)
    tl.store(new_k + row, offset)
    tl.store(e + row, sum_e)
    if ez is not None:
        tl.store(ez + row, sum_ez)
    if ee is not None:
        tl.store(ee + row, sum_ee)
    if z_sum is not None:
        tl.store(z_sum + row, sum_z)
    if target is not None:
        tl.store(target + row, at_label)
        tl.store(before + row, left)
        tl.store(after + row, right)


def chunk_of(acc: torch.dtype, softcap: bool) -> tuple[int, int]:
    """Columns that a program holds at a time, and how many of them each thread holds."""
    return (8192, 16) if acc == torch.float32 and not softcap else (2048, 8)


def scan_launch(
    logits: Logits,
    head: HeadSpec,
    options: CoreOptions,
    source: Tensor,  # (N, W)
    destination: Tensor | None,  # (N, W)
    k: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    sums: BlockSums,  # written, with the offsets ``k``
    v0: int,
    v1: int,
) -> Launch:
    """The launch of ``scan_kernel`` for N programs."""
    width = source.shape[1]
    bias = None if logits.bias is None else logits.bias[v0:v1]
    chunk, elements = chunk_of(sums.e.dtype, head.softcap is not None)
    block = min(chunk, triton.next_power_of_2(width))
    scale, cap = scale_and_cap(head)
    return Launch(
        scan_kernel,
        {
            "source": source,
            "destination": destination,
            "bias": bias,
            "labels": labels.contiguous(),
            "k": k.contiguous(),
            "new_k": sums.k,
            "e": sums.e,
            "ez": sums.ez,
            "ee": sums.ee,
            "z_sum": sums.z,
            "target": sums.target,
            "before": sums.before,
            "after": sums.after,
            "inverse": inverse_temperature(head),
            "source_stride": source.stride(0),
            "destination_stride": 0 if destination is None else destination.stride(0),
            "bias_stride": 1 if bias is None else bias.stride(0),
            "scale": scale,
            "cap": cap,
            "first": v0,
            "width": width,
        },
        {
            "LIMIT": 11.0 if destination is not None and destination.dtype == torch.float16 else RAISE_ABOVE,
            "SOFTCAP": head.softcap is not None,
            "SLOPE": not options.slopes_later,
            "MATCH": matched(logits),
            "BLOCK": block,
            "WIDE": width > block,
        },
        num_warps=warps(block, elements),
        num_stages=1,
    )


def new_block_sums(
    outputs: frozenset[str],
    like: Tensor,  # (N,)
) -> BlockSums:
    """What the scan writes for the token statistics wanted, each (N,), in the type and on the device of ``like``."""
    names = ["k", "e"]
    optional = (("entropy", "ez"), ("log_sum_sq_probs", "ee"), ("mean_logits", "z"))
    names += [name for output, name in optional if output in outputs]
    names += ["target", "before", "after"] if "is_top1" in outputs else []
    values = torch.empty((len(names), len(like)), dtype=like.dtype, device=like.device)
    return BlockSums(**dict(zip(names, values, strict=True)))


def scan_block(
    logits: Logits,
    head: HeadSpec,
    options: CoreOptions,
    source: Tensor,  # (N, W)
    destination: Tensor | None,  # (N, W), may be ``source``, or narrower rows that start where the source's start
    zy: Tensor,  # (N,)
    k: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    v0: int,
    v1: int,
) -> BlockSums:
    """See ``scan_block`` in ``torch/passes.py``."""
    sums = new_block_sums(options.outputs, zy)
    if len(source):
        scan_launch(logits, head, options, source, destination, k, labels, sums, v0, v1).run(len(source))
    return sums
