"""The product that makes the gradient of the hidden states."""

from __future__ import annotations

from torch import Tensor

from ..core.blocking import ROW_ELEMENTS, blocks, weight_block
from ..core.weight_rows import HeadRows, JoinedRows
from .gemm import mm_accumulate


def add_hidden(
    dhidden: Tensor,  # (N, K) float32 (float64), added to
    g: Tensor,  # (N, v1 - v0)
    weight: Tensor | HeadRows,  # (V, K)
    v0: int,
    v1: int,
) -> None:
    """``dhidden += g @ weight[v0:v1]``; on a CPU, whose GEMM rounds its result, an adapter's columns in float32."""
    block = weight_block(weight, v0, v1, g.dtype)
    if g.is_cuda or g.dtype.itemsize > 2 or not isinstance(weight, JoinedRows):
        mm_accumulate(dhidden, g, block)
        return
    hidden = weight.base.shape[1]
    mm_accumulate(dhidden[:, :hidden], g, block[:, :hidden])
    assert weight.trained is not None
    columns = weight.trained[v0:v1].to(dhidden.dtype)
    for r0, r1 in blocks(len(g), max(1, ROW_ELEMENTS // g.shape[1])):
        mm_accumulate(dhidden[r0:r1, hidden:], g[r0:r1].to(dhidden.dtype), columns)
