"""Products of a block of the gradient: its shares in dX and dW; and the sizes of such blocks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...core.blocking import block_shape, weight_block
from ...core.stats import CoreOptions
from ...tile.gemm import mm_accumulate
from ...tile.head_gradient import HeadGradient
from .gemm.config import GemmConfig
from .gemm.filtered import filtered_mm
from .launch import unit_columns


def is_wide(x: Tensor) -> bool:
    """Whether operands are float64, which the GEMM kernels do not take."""
    return x.dtype == torch.float64


def weight_rows(weight: Tensor, v0: int, v1: int, dtype: torch.dtype) -> Tensor:
    """Rows v0..v1 of the weight in that dtype, with a unit column stride."""
    return unit_columns(weight_block(weight, v0, v1, dtype))


def gradient_shape(n: int, vocab: int, g_dtype: torch.dtype, config: GemmConfig, options: CoreOptions) -> tuple[int, int]:
    """Tokens and vocabulary entries of a block of the gradient that fits the workspace, multiples of the kernels' blocks."""
    rows, width = block_shape(n, vocab, g_dtype.itemsize, options.workspace)
    rows = n if rows >= n else max(config.BLOCK_N, rows // config.BLOCK_N * config.BLOCK_N)
    return max(1, rows), vocab if width >= vocab else max(config.BLOCK_V, width // config.BLOCK_V * config.BLOCK_V)


def add_products(
    weight: Tensor,  # (V, H)
    v0: int,
    v1: int,
    g: Tensor,  # (N, v1 - v0) in the GEMMs' dtype
    active: Tensor | None,  # blocks of g that are not left out; None for all
    config: GemmConfig,
    *,
    dhidden: Tensor | None,  # (N, H), gets g @ weight[v0:v1] added
    head_gradient: HeadGradient | None,
    ax: tuple[Tensor, Tensor | None] | None,  # from scale_rows: scaled rows of X, and the factor still missing
    into: Tensor | None = None,  # (v1 - v0, H) float32, added to in place of the head's rows
) -> None:
    """The shares of a block of the gradient in dX and dW, by the vendor's GEMM or, filtered, by ``filtered_mm``."""
    if dhidden is not None:
        block = weight_rows(weight, v0, v1, g.dtype)
        if active is None:
            mm_accumulate(dhidden, g, block)
        else:
            filtered_mm(g, block, dhidden, active, config, transposed=False, accumulate=True)
    if head_gradient is None or ax is None:
        return
    if active is None:
        if into is None:
            head_gradient.add_weight(v0, v1, g, *ax)
        else:
            mm_accumulate(into, g.t(), *ax)
        return
    assert head_gradient.weight is not None
    rows, factor = ax
    transpose = functools.partial(filtered_mm, g, rows, active=active, config=config, transposed=True)
    direct = head_gradient.weight[v0:v1] if into is None else into
    if factor is None:
        transpose(out=direct, accumulate=into is not None or head_gradient.accumulate)
        return
    product = torch.empty(direct.shape, dtype=head_gradient.acc, device=direct.device)
    transpose(out=product, accumulate=False)
    if into is None and not head_gradient.accumulate:
        direct.copy_(product.mul_(factor))
    else:
        direct.addcmul_(product, factor)
