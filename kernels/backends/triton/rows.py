# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels on rows: logits of the labels, finished tiles, sums over segments, scaled copies.

Each result is written by one program, which adds in an order that depends on its own sizes alone: results are the same
bits in every run, and a row's do not depend on its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.dtypes import accumulate_dtype
from ...core.head_spec import HeadSpec
from ..native.passes import rounding
from .aot.compilation import Compilation, aligned
from .compat import on_device
from .math import rounded, transform

#: Of every launch. Triton 3.9 warns where it is left to its default, which changes in 3.10.
OPTIONS = {"enable_fp_fusion": True}
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}
#: Tokens of a program of ``target_kernel``: 4 rows of 1024 elements keep 16 loads of 16 bytes in flight for every thread.
TOKENS = 4
#: Elements of a row, or of a tensor, that a program handles at a time.
BLOCK = 1024


@triton.jit
def exact(number, ACC: tl.constexpr):
    """A number of the host in the type of the sums. It is declared float64, as Triton would round a float to float32."""
    return tl.full((), number, tl.float64).to(ACC)


@triton.jit
def converted(values, TYPE: tl.constexpr):
    """``values`` in another type; from float64 to 16 bits by way of float32, as torch does it."""
    if values.dtype == tl.float64 and tl.float64 != TYPE:
        values = values.to(tl.float32)
    return values.to(TYPE)


@triton.jit
def transformed(r, scale, cap, SOFTCAP: tl.constexpr):
    """``transform``, and in float64 to float64's precision."""
    if SOFTCAP and r.dtype == tl.float64:
        u = r * scale
        size = tl.abs(u)
        t = tl.exp(-2.0 * size)
        s = u * u
        # the continued fraction of tanh, to 6e-18 below 0.625
        fraction = 1.0 + s / (3.0 + s / (5.0 + s / (7.0 + s / (9.0 + s / (11.0 + s / (13.0 + s / 15.0))))))
        tanh = tl.where(size < 0.625, size / fraction, (1.0 - t) / (1.0 + t))
        slope = 2.0 * t / (1.0 + t) * (1.0 + tanh)
        z = tl.where(u < 0, -tanh, tanh) * cap
    else:
        z, slope = transform(r, scale, cap, SOFTCAP)
    return z, slope


@triton.jit(do_not_specialize=["labels", "zy", "k", "slope", "n", "vocab"])
def target_kernel(
    x,  # (N, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    labels,  # (N,)
    zy,  # (N,) the label's logits; raw ones where k is None
    k,  # (N,) or None
    slope,  # (N,), with a soft-cap
    x_stride,
    x_step,  # between columns
    weight_stride,
    weight_step,
    bias_stride,
    scale: tl.float64,
    cap: tl.float64,
    n,
    vocab,
    hidden,
    SOFTCAP: tl.constexpr,
    MATCH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A label that is out of range gives NaN and reads nothing."""
    ACC: tl.constexpr = zy.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = row < n
    label = tl.load(labels + row, mask=there, other=0)
    known = there & (label >= 0) & (label < vocab)
    x_row = x + row[:, None] * x_stride
    weight_row = weight + label[:, None] * weight_stride
    sums = tl.zeros((TOKENS, BLOCK), ACC)
    for start in range(0, hidden, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        mask = known[:, None] & (column < hidden)
        a = tl.load(x_row + column.to(tl.int64) * x_step, mask=mask, other=0.0)
        w = tl.load(weight_row + column.to(tl.int64) * weight_step, mask=mask, other=0.0)
        sums += a.to(ACC) * converted(w, a.dtype).to(ACC)
    raw = tl.sum(sums, axis=1)
    if bias is not None:
        raw += tl.load(bias + label * bias_stride, mask=known, other=0.0).to(ACC)
    raw = tl.where(known, rounded(raw, MATCH), float("nan"))
    if k is None:
        tl.store(zy + row, raw, mask=there)
    else:
        z, flatness = transformed(raw, exact(scale, ACC), exact(cap, ACC), SOFTCAP)
        tl.store(zy + row, z, mask=there)
        tl.store(k + row, tl.where(z < -1e30, -1e30, z), mask=there)  # NaN stays
        if slope is not None:
            tl.store(slope + row, flatness, mask=there)


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
    """One program a row. Where all factors are 1 it reads nothing of the tile."""
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
                        if at_target is not None:  # the very entry that is written below: neither has to be first
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


@triton.jit(do_not_specialize=["out_rows"])
def scale_scatter_kernel(
    values,  # (N, H)
    rows,  # (N,) distinct
    factor,  # (1,) or (N,)
    out,  # (P, H)
    values_stride,
    factor_stride,  # 0 for one factor
    out_stride,
    out_rows,
    hidden,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row >= 0 and row < out_rows:  # rows are in range; one that is not must not write foreign memory
        scaled = tl.load(values + i * values_stride + column, mask=column < hidden) * tl.load(factor + i * factor_stride)
        tl.store(out + row * out_stride + column, converted(scaled, out.dtype.element_ty), mask=column < hidden)


@triton.jit
def scaled_convert_kernel(
    source,  # (count,)
    factor,  # (1,)
    out,  # (count,)
    count,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(factor)
    scaled = tl.load(source + at, mask=at < count).to(f.dtype) * f
    tl.store(out + at, converted(scaled, out.dtype.element_ty), mask=at < count)


def head_numbers(head: HeadSpec) -> tuple[float, float]:
    """``scale`` and ``cap`` of ``transform``."""
    if head.softcap is None:
        return head.slope, 1.0
    return head.logit_scale / head.softcap, head.softcap / head.temperature


def _launch_targets(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    precision: str,
    head: HeadSpec,
    zy: Tensor,  # (N,)
    k: Tensor | None,  # (N,)
    slope: Tensor | None,  # (N,)
) -> None:
    n, hidden = x.shape
    if n == 0:
        return
    with on_device(x):
        target_kernel[triton.cdiv(n, TOKENS),](
            x,
            weight,
            bias,
            labels.contiguous(),
            zy,
            k,
            slope,
            *x.stride(),
            *weight.stride(),
            1 if bias is None else bias.stride(0),
            *head_numbers(head),
            n,
            len(weight),
            hidden,
            SOFTCAP=head.softcap is not None,
            MATCH=rounding(x.dtype, precision),
            TOKENS=TOKENS,
            BLOCK=min(BLOCK, triton.next_power_of_2(max(1, hidden))),
            num_warps=4,
            **OPTIONS,
        )


def target_logits(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    precision: str,
) -> Tensor:
    """See ``torch_scan.target_logits``."""
    raw = torch.empty(len(x), dtype=accumulate_dtype(x.dtype), device=x.device)
    _launch_targets(x, weight, bias, labels, precision, HeadSpec(), raw, None, None)
    return raw


def target_logit_and_slope(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    precision: str,
    head: HeadSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``torch_scan.target_logit_and_slope`` of ``target_logits``, in one launch. Each (N,)."""
    zy, k, *slope = torch.empty((2 + (head.softcap is not None), len(x)), dtype=accumulate_dtype(x.dtype), device=x.device)
    _launch_targets(x, weight, bias, labels, precision, head, zy, k, slope[0] if slope else None)
    return zy, k, slope[0] if slope else None


def finish_tile(
    tile: Tensor,  # (N, V)
    factors: list[Tensor | None],  # each (N,)
    labels: Tensor,  # (N,)
    at_target: Tensor | None,  # (N,)
    width: int,
) -> None:
    """See ``torch_scan.finish_tile``."""
    given = None
    if (some := next((f for f in factors if f is not None), None)) is not None:
        given = torch.stack([torch.ones_like(some) if f is None else f for f in factors])
    n, columns = tile.shape
    if tile.numel() == 0 or (given is None and at_target is None):
        return
    blocks = triton.cdiv(columns, width)
    with on_device(tile):
        finish_tile_kernel[n,](
            tile,
            given,
            labels.contiguous(),
            None if at_target is None else at_target.contiguous(),
            tile.stride(0),
            0 if given is None else given.stride(0),
            columns,
            width,
            blocks,
            BLOCKS=triton.next_power_of_2(blocks),
            BLOCK=min(2 * BLOCK, triton.next_power_of_2(min(columns, width))),
            num_warps=8,
            **OPTIONS,
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
    n, hidden = values.shape
    if values.numel() == 0:
        return
    block = min(BLOCK, triton.next_power_of_2(hidden))
    with on_device(values):
        finish_rows_kernel[n, triton.cdiv(hidden, block)](
            values,
            scale,
            target,
            weight,
            labels,
            values.stride(0),
            *weight.stride(),
            hidden,
            TYPE=TYPES[dtype],
            BLOCK=block,
            num_warps=4,
            **OPTIONS,
        )


def segment_sum(
    values: Tensor,  # (N,)
    offsets: Tensor,  # (S + 1,) int64, rising from 0 to N
) -> Tensor:
    """Sums (S,) of ``values[offsets[j]:offsets[j + 1]]``, added in float64, in the dtype of the values."""
    out = torch.empty(len(offsets) - 1, dtype=values.dtype, device=values.device)
    if len(out):
        with on_device(values):
            segment_sum_kernel[len(out),](values.contiguous(), offsets.contiguous(), out, BLOCK=BLOCK, num_warps=4, **OPTIONS)
    return out


def scale_scatter(
    values: Tensor,  # (N, H) float32 (float64)
    rows: Tensor,  # (N,) int64, distinct
    factor: Tensor,  # (1,) or (N,), as values
    out: Tensor,  # (P, H)
) -> None:
    """``out[rows[i]] = values[i] * factor`` in out's dtype. Rows of any stride."""
    n, hidden = values.shape
    if values.numel() == 0:
        return
    block = min(BLOCK, triton.next_power_of_2(hidden))
    with on_device(values):
        scale_scatter_kernel[n, triton.cdiv(hidden, block)](
            values,
            rows.contiguous(),
            factor,
            out,
            values.stride(0),
            factor.stride(0) if len(factor) == n > 1 else 0,
            out.stride(0),
            len(out),
            hidden,
            BLOCK=block,
            num_warps=4,
            **OPTIONS,
        )


def scaled_convert(
    source: Tensor,
    factor: Tensor,  # (1,)
    out: Tensor,  # like source
) -> None:
    """``out = source * factor`` in out's dtype; both contiguous. ``out`` may be ``source``."""
    count = source.numel()
    if count == 0:
        return
    with on_device(source):
        grid = (triton.cdiv(count, 2 * BLOCK),)
        scaled_convert_kernel[grid](source, factor, out, count, BLOCK=2 * BLOCK, num_warps=4, **OPTIONS)


def compilations() -> list[Compilation]:
    """The specialisations that matter on a GPU: hidden sizes and vocabularies that are multiples of 16."""
    found = []
    numbers = {"scale": "fp64", "cap": "fp64"}
    sizes = dict.fromkeys(("n", "vocab", "hidden", "columns", "width", "blocks", "out_rows", "count"), "i32")
    strides = ("x_stride", "weight_stride", "tile_stride", "factors_stride", "values_stride", "out_stride")
    common = {**numbers, **sizes, **dict.fromkeys(strides, "i32"), "labels": "*i64", "rows": "*i64", "offsets": "*i64"}
    for torch_dtype, dtype, acc in (
        (torch.bfloat16, "bf16", "fp32"),
        (torch.float16, "fp16", "fp32"),
        (torch.float32, "fp32", "fp32"),
        (torch.float64, "fp64", "fp64"),
    ):
        types = {**common, "x": f"*{dtype}", "weight": f"*{dtype}", "tile": f"*{dtype}"}
        types |= dict.fromkeys(("zy", "k", "slope", "factors", "at_target", "factor", "values"), f"*{acc}")
        plain = {"x_step": 1, "weight_step": 1, "bias_stride": 1, "MATCH": 0, "TOKENS": TOKENS, "BLOCK": BLOCK, "bias": None}
        for name, changes in (
            ("raw", {"k": None, "slope": None, "SOFTCAP": False}),
            ("plain", {"slope": None, "SOFTCAP": False}),
            ("softcap", {"SOFTCAP": True}),
        ):
            constants = {**plain, **changes}
            found.append(aligned(target_kernel, f"target_{name}_{dtype}", types, constants, 4, dtype=dtype))
        constants = {"weight_step": 1, "TYPE": TYPES[torch_dtype], "BLOCK": BLOCK}
        rows_of = {**types, "values": f"*{acc}", "scale": f"*{acc}", "target": f"*{acc}"}
        found.append(aligned(finish_rows_kernel, f"finish_rows_{dtype}", rows_of, constants, 4, dtype=dtype))
        constants = {"BLOCKS": 32, "BLOCK": 2 * BLOCK}
        found.append(aligned(finish_tile_kernel, f"finish_tile_{dtype}", types, constants, 8, dtype=dtype))
        converts = {**types, "source": f"*{acc}", "out": f"*{dtype}"}
        constants = {"factor_stride": 0, "BLOCK": BLOCK}
        found.append(aligned(scale_scatter_kernel, f"scale_scatter_{dtype}", converts, constants, 4, dtype=acc))
        found.append(aligned(scaled_convert_kernel, f"scaled_convert_{dtype}", converts, {"BLOCK": 2 * BLOCK}, 4, dtype=acc))
    for dtype in ("fp32", "fp64"):
        types = {**common, "values": f"*{dtype}", "out": f"*{dtype}"}
        found.append(aligned(segment_sum_kernel, f"segment_sum_{dtype}", types, {"BLOCK": BLOCK}, 4, dtype=dtype))
    return found
