"""GEMMs that accumulate in float32, whatever the device offers."""

from __future__ import annotations

import torch
from torch import Tensor


def mm_accumulate(acc: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None) -> None:
    """``acc += factor * (a @ b)`` with a float32 (float64) ``acc``; factor is a 0-dim tensor.

    A GPU hands out its float32 accumulators for 16-bit operands. A CPU's bf16 GEMM rounds its result; its fp16 GEMM is
    emulated anyway, so float32 operands cost nothing there.
    """
    if a.dtype == acc.dtype and factor is None:
        torch.addmm(acc, a, b, out=acc)
    elif a.is_cuda and factor is None:
        torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)
    else:
        if a.is_cuda and a.dtype != acc.dtype:
            product = torch.mm(a, b, out_dtype=acc.dtype)
        elif a.dtype == torch.float16:
            product = torch.mm(a.to(acc.dtype), b.to(acc.dtype))
        else:
            product = torch.mm(a, b)
        if factor is None:
            acc.add_(product)
        else:
            acc.addcmul_(product.to(acc.dtype), factor)
