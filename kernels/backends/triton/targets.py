# mypy: allow-untyped-defs, allow-incomplete-defs
"""Logits of the labels by an indexed dot product of hidden states and weight rows, exact in float32 (float64).

Each logit is summed by one program, in an order that depends on the hidden size alone: it is the same bits in every run, and
other tokens do not affect it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.dtypes import accumulate_dtype, rounding
from ...core.head_spec import HeadSpec
from ...core.row_head import inverse_temperature
from .launch import Launch
from .math import converted, exact, rounded, scale_and_cap, transformed

#: Tokens per program: 4 rows of 1024 elements keep 16 loads of 16 bytes in flight for every thread.
TOKENS = 4
#: Elements of a row that a program handles at a time.
BLOCK = 1024


@triton.jit(do_not_specialize=["labels", "zy", "k", "slope", "inverse", "n", "vocab"])
def target_kernel(
    x,  # (N, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    labels,  # (N,)
    zy,  # (N,) the label's logits; raw ones where k is None
    k,  # (N,) or None
    slope,  # (N,), with a soft-cap
    inverse,  # (N,) inverse temperatures of the rows, or None
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
    """A label out of range gives NaN, without an access to memory out of range."""
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
        if inverse is not None:
            z *= tl.load(inverse + row, mask=there, other=1.0)
        tl.store(zy + row, z, mask=there)
        tl.store(k + row, tl.where(z < -1e30, -1e30, z), mask=there)  # NaN stays
        if slope is not None:
            tl.store(slope + row, flatness, mask=there)


def target_launch(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    precision: str,
    head: HeadSpec,
    zy: Tensor,  # (N,)
    k: Tensor | None,  # (N,), None for raw logits
    slope: Tensor | None,  # (N,), with a soft-cap
) -> Launch:
    """The launch of ``target_kernel`` for ``ceil(N / TOKENS)`` programs."""
    scale, cap = scale_and_cap(head)
    return Launch(
        target_kernel,
        {
            "x": x,
            "weight": weight,
            "bias": bias,
            "labels": labels.contiguous(),
            "zy": zy,
            "k": k,
            "slope": slope,
            "inverse": inverse_temperature(head),
            "x_stride": x.stride(0),
            "x_step": x.stride(1),
            "weight_stride": weight.stride(0),
            "weight_step": weight.stride(1),
            "bias_stride": 1 if bias is None else bias.stride(0),
            "scale": scale,
            "cap": cap,
            "n": len(x),
            "vocab": len(weight),
            "hidden": x.shape[1],
        },
        {
            "SOFTCAP": head.softcap is not None,
            "MATCH": rounding(x.dtype, precision),
            "TOKENS": TOKENS,
            "BLOCK": min(BLOCK, triton.next_power_of_2(max(1, x.shape[1]))),
        },
        num_warps=4,
    )


def target_logits(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    precision: str,
) -> Tensor:
    """Raw logits (N,) of the labels in float32 (float64); see ``ElementWise.target_logits``."""
    raw = torch.empty(len(x), dtype=accumulate_dtype(x.dtype), device=x.device)
    if len(x):
        target_launch(x, weight, bias, labels, precision, HeadSpec(), raw, None, None).run(triton.cdiv(len(x), TOKENS))
    return raw


def target_logit_and_slope(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    precision: str,
    head: HeadSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``target_logit_and_slope`` of ``tile/targets.py`` of :func:`target_logits`, in one launch. Each (N,)."""
    zy, k, *slope = torch.empty((2 + (head.softcap is not None), len(x)), dtype=accumulate_dtype(x.dtype), device=x.device)
    of_softcap = slope[0] if slope else None
    if len(x):
        target_launch(x, weight, bias, labels, precision, head, zy, k, of_softcap).run(triton.cdiv(len(x), TOKENS))
    return zy, k, of_softcap
