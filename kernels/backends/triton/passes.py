# mypy: allow-untyped-defs, allow-incomplete-defs
"""The element-wise passes of ``torch_backend`` in Triton: one read and one write of a block for all outputs.

A program takes a row (in ``gradient_kernel`` a piece of one), so nothing is added up across programs. Blocks are at most
``plan.VOCAB_BLOCK`` columns wide, and a row is one chunk, which stays in registers from its maximum to its exponentials:
raising its offset costs nothing. Where that takes too many registers (soft-cap, float64), and in wider rows, a chunk may
raise the offset after others were written; the program then looks ahead for the row's maximum, once, and brings what it
has added up and written to that. This is compiled for such rows alone: it doubles the registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.dtypes import accumulate_dtype
from ...core.head_spec import HeadSpec
from ...core.stats import CoreOptions
from ...planner.plan import VOCAB_BLOCK
from ..native.passes import rounding
from ..torch import passes as torch_scan
from ..torch.passes import BlockSums, Logits, Passes
from .aot.compilation import Compilation, aligned
from .compat import on_device
from .math import rounded
from .rows import OPTIONS, converted, exact, finish_tile, head_numbers, target_logits, transformed

#: exp underflows below it; keeps -inf * 0 out of sums.
FLOOR = tl.constexpr(torch_scan.FLOOR)
#: Elements of a program of ``gradient_kernel``, and of each of its threads.
PIECE, PIECE_ELEMENTS = 2048, 16
#: Rows and columns that a program of ``column_sums_kernel`` adds at a time.
SUM_ROWS, SUM_COLUMNS = 32, 64


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
    """Logits and ``1 - tanh^2``. Beyond the row logits are 0, as T(0) is."""
    r = tl.load(source + column, mask=column < width, other=0.0).to(ACC)
    if bias is not None:
        r += tl.load(bias + column * bias_stride, mask=column < width, other=0.0).to(ACC)
    return transformed(rounded(r, MATCH), scale, cap, SOFTCAP)


@triton.jit
def label_column(labels, row, first, width):
    """A row's column of the label: negative where it is before the block, beyond every column where it is after it."""
    column = tl.load(labels + row) - first
    return tl.where(column >= width, 2147483647, column).to(tl.int32)


@triton.jit(do_not_specialize=["first"])
def scan_kernel(
    source,  # (N, W)
    destination,  # (N, W) or None
    bias,  # (W,) or None
    labels,  # (N,)
    k,  # (N,)
    new_k,  # (N,) what follows is relative to it
    e,  # (N,) and all others; None where not wanted
    ez,
    ee,
    z_sum,
    target,
    before,
    after,
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
        # All threads have read the chunk before they know its maximum, and write after that: the destination may be the
        # source, or narrower rows that start where the source's start.
        top = tl.max(others)
        if top - offset > LIMIT:
            if WIDE:
                FEW: tl.constexpr = BLOCK // 8  # the chunk waits in registers meanwhile
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
                    tl.debug_barrier()  # other threads may have written what a thread reads
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


@triton.jit(do_not_specialize=["first"])
def gradient_kernel(
    source,  # (N, W)
    destination,  # (N, W)
    bias,  # (W,) or None
    labels,  # (N,)
    k,  # (N,)
    mix,  # (2, N) or None
    at_target,  # (N,) or None
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


def _matched(logits: Logits) -> int:
    return rounding(logits.model_dtype, "match") if logits.match else 0


def _chunk(acc: torch.dtype, softcap: bool) -> tuple[int, int]:
    """Columns that a program of ``scan_kernel`` holds at a time, and how many of them a thread holds."""
    return (8192, 16) if acc == torch.float32 and not softcap else (2048, 8)


def _warps(block: int, elements: int) -> int:
    return max(1, block // (32 * elements))


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
    """See ``torch_scan.scan_block``."""
    n, width = source.shape
    want = options.outputs
    names = ["k", "e"]
    names += [name for output, name in (("entropy", "ez"), ("log_sum_sq_probs", "ee"), ("mean_logits", "z")) if output in want]
    names += ["target", "before", "after"] if "is_top1" in want else []
    sums = BlockSums(**dict(zip(names, torch.empty((len(names), n), dtype=zy.dtype, device=zy.device), strict=True)))
    if n == 0:
        return sums
    bias = None if logits.bias is None else logits.bias[v0:v1]
    chunk, elements = _chunk(zy.dtype, head.softcap is not None)
    block = min(chunk, triton.next_power_of_2(width))
    with on_device(source):
        scan_kernel[n,](
            source,
            destination,
            bias,
            labels.contiguous(),
            k.contiguous(),
            sums.k,
            sums.e,
            sums.ez,
            sums.ee,
            sums.z,
            sums.target,
            sums.before,
            sums.after,
            source.stride(0),
            0 if destination is None else destination.stride(0),
            1 if bias is None else bias.stride(0),
            *head_numbers(head),
            v0,
            width,
            LIMIT=11.0 if destination is not None and destination.dtype == torch.float16 else torch_scan.RAISE_ABOVE,
            SOFTCAP=head.softcap is not None,
            SLOPE=not options.slopes_later,
            MATCH=_matched(logits),
            BLOCK=block,
            WIDE=width > block,
            num_warps=_warps(block, elements),
            num_stages=1,
            **OPTIONS,
        )
    return sums


def gradient_block(
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
    """See ``torch_scan.gradient_block``."""
    n, width = source.shape
    if n == 0:
        return
    bias = None if logits.bias is None else logits.bias[v0:v1]
    mix = None if mix is None else mix.contiguous()
    block = min(PIECE, triton.next_power_of_2(width))
    with on_device(source):
        gradient_kernel[n, triton.cdiv(width, block)](
            source,
            destination,
            bias,
            labels.contiguous(),
            k.contiguous(),
            mix,
            None if at_target is None else at_target.contiguous(),
            source.stride(0),
            destination.stride(0),
            1 if bias is None else bias.stride(0),
            0 if mix is None else mix.stride(0),
            *head_numbers(head),
            v0,
            width,
            SOFTCAP=head.softcap is not None,
            MATCH=_matched(logits),
            BLOCK=block,
            num_warps=_warps(block, PIECE_ELEMENTS),
            num_stages=1,
            **OPTIONS,
        )
        if dbias is not None:
            column_sums_kernel[triton.cdiv(width, SUM_COLUMNS),](
                destination,
                scale.contiguous(),
                dbias,
                destination.stride(0),
                n,
                width,
                ROWS=SUM_ROWS,
                COLUMNS=SUM_COLUMNS,
                num_warps=8,
                **OPTIONS,
            )


TRITON_PASSES = Passes(target_logits, scan_block, gradient_block, finish_tile)


def compilations() -> list[Compilation]:
    """The specialisations that matter on a GPU: sums alone, with the tile, and with all statistics, of whole blocks."""
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    statistics = ("ez", "ee", "z_sum", "target", "before", "after")
    strides = ("source_stride", "destination_stride", "values_stride", "mix_stride")
    common = {**dict.fromkeys((*strides, "first", "width", "n"), "i32"), "scale": "fp64", "cap": "fp64", "labels": "*i64"}
    plain = {"bias": None, "bias_stride": 1, "MATCH": 0}
    found = []

    def add(kernel: Any, name: str, types: dict[str, str], constants: dict[str, Any], warps: int, dtype: torch.dtype) -> None:
        found.append(aligned(kernel, name, types, constants, warps, dtype=names[dtype]))

    for source, destination in (
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        acc = accumulate_dtype(source)
        types = {**common, "source": f"*{names[source]}", "destination": f"*{names[destination]}"}
        types |= dict.fromkeys(("k", "new_k", "e", *statistics, "mix", "at_target"), f"*{names[acc]}")
        for softcap in (False, True):
            suffix = f"{names[source]}_{names[destination]}" + "_softcap" * softcap
            chunk, elements = _chunk(acc, softcap)
            how = {**plain, "SOFTCAP": softcap, "SLOPE": True, "LIMIT": torch_scan.RAISE_ABOVE}
            how |= {"BLOCK": chunk, "WIDE": chunk < VOCAB_BLOCK}
            alone = dict.fromkeys(statistics)
            nowhere = {"destination": None, "destination_stride": 0}
            for name, changes in (("sums", {**alone, **nowhere}), ("tile", alone), ("all", {})):
                add(scan_kernel, f"scan_{name}_{suffix}", types, {**how, **changes}, _warps(chunk, elements), source)
            how = {**plain, "SOFTCAP": softcap, "BLOCK": PIECE}
            for name, changes in (("plain", {"mix": None, "mix_stride": 0}), ("mixed", {})):
                warps = _warps(PIECE, PIECE_ELEMENTS)
                add(gradient_kernel, f"gradient_{name}_{suffix}", types, {**how, **changes}, warps, source)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        types = {**common, **dict.fromkeys(("factors", "out"), f"*{names[accumulate_dtype(dtype)]}")}
        types["values"] = f"*{names[dtype]}"
        add(column_sums_kernel, f"column_sums_{names[dtype]}", types, {"ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS}, 8, dtype)
    return found
