# mypy: allow-untyped-defs, allow-incomplete-defs
"""A scaled copy in another type, for gradients that were collected in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.dtypes import accumulate_dtype
from ..torch import rows as torch_rows
from .launch import Launch
from .math import converted

#: Elements per program: 16 per thread.
BLOCK = 2048


@triton.jit
def scaled_to_dtype_kernel(
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


def scaled_to_dtype_launch(
    source: Tensor,  # contiguous
    factor: Tensor,  # (1,)
    out: Tensor,  # like source; may be source
) -> Launch:
    """The launch of ``scaled_to_dtype_kernel`` for ``ceil(count / BLOCK)`` programs."""
    arguments = {"source": source, "factor": factor, "out": out, "count": source.numel()}
    return Launch(scaled_to_dtype_kernel, arguments, {"BLOCK": BLOCK}, num_warps=4)


def scaled_to_dtype(
    source: Tensor,
    factor: Tensor,  # 0-dim
    dtype: torch.dtype,
    in_place: bool,
) -> Tensor:
    """``(source * factor).to(dtype)`` without a full-size temporary; ``in_place`` may overwrite ``source``.

    Multiplied in float32 (float64 for a float64 source). Torch operators serve a source that is not contiguous.
    """
    if not source.is_contiguous():
        return torch_rows.scaled_to_dtype(source, factor, dtype, in_place)
    out = source if in_place and source.dtype == dtype else torch.empty(source.shape, dtype=dtype, device=source.device)
    if source.numel():
        launch = scaled_to_dtype_launch(source, factor.to(accumulate_dtype(source.dtype)).reshape(1), out)
        launch.run(triton.cdiv(source.numel(), BLOCK))
    return out
