"""``recompute_gradients`` in Triton: dX and dW from logits that are made again, with the gradient as the GEMM's epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.blocking import blocks
from ...core.dtypes import gemm_dtype
from ...core.head_spec import HeadSpec
from ...core.row_head import head_rows
from ...core.stats import CoreOptions, RowStats
from ...tile.factors import add_bias_gradient, for_gemm, gradient_factors, scale_rows
from ...tile.grad_filter import count_blocks
from ...tile.head_gradient import HeadGradient
from ...tile.targets import add_targets, targets_in_tile
from ..torch import blockwise as torch_backend
from .elementwise import TRITON_PASSES
from .gemm.launch import recompute_block
from .launch import unit_columns
from .products import add_products, gradient_shape, is_wide, weight_rows
from .tuning.lookup import config_of


def recompute_gradients(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    stats: RowStats,
    coefficients: Tensor | None,  # (N,) dLoss / dlogps
    entropy_coefficients: Tensor | None,  # (N,) dLoss / dentropy, with stats.entropy
    head: HeadSpec,
    options: CoreOptions,
    *,
    dhidden: Tensor | None,  # (N, H) float32 (float64), written
    head_gradient: HeadGradient | None,
) -> None:
    """See ``torch/blockwise.py``."""
    if is_wide(x):
        given: tuple[Any, ...] = (x, weight, bias, labels, stats, coefficients, entropy_coefficients, head, options)
        torch_backend.recompute_gradients(*given, dhidden=dhidden, head_gradient=head_gradient, passes=TRITON_PASSES)
        return
    x, bias, labels = unit_columns(x), None if bias is None else bias.contiguous(), labels.contiguous()
    n, vocab = len(x), len(weight)
    if dhidden is not None:
        dhidden.zero_()
    config = config_of(x, vocab, head, options)
    grad_dtype = gemm_dtype(x.dtype, x.device)
    factors = gradient_factors(stats, coefficients, entropy_coefficients, head)
    scale, at_target, mix = for_gemm(*factors, stats, grad_dtype)
    rows, width = gradient_shape(n, vocab, grad_dtype, config, options)
    chunks = [slice(r0, min(r1, n)) for r0, r1 in blocks(max(1, n), rows)] if n else []
    need_weight = head_gradient is not None and head_gradient.weight is not None
    ax = [scale_rows(x[here], scale[here], grad_dtype) if need_weight else None for here in chunks]
    buffer = torch.empty((min(rows, n), width), dtype=grad_dtype, device=x.device)
    for v0, v1 in blocks(vocab, width):
        into = None  # float32 block, where several chunks of tokens add to rows that are written once
        if head_gradient is not None and need_weight and len(chunks) != 1 and not head_gradient.accumulate:
            into = torch.zeros((v1 - v0, x.shape[1]), dtype=head_gradient.acc, device=x.device)
        block = weight_rows(weight, v0, v1, x.dtype)
        for here, scaled in zip(chunks, ax, strict=True):
            g = buffer[: len(x[here]), : v1 - v0]
            active = recompute_block(
                x[here],
                block,
                None if bias is None else bias[v0:v1],
                labels[here],
                stats.k[here],
                None if mix is None else mix[:, here].contiguous(),
                at_target[here] if targets_in_tile(x.device) else None,
                scale[here],
                g,
                head_rows(head, here),
                options,
                config,
                first=v0,
            )
            if active is not None:
                count_blocks(active)
            if head_gradient is not None and head_gradient.bias is not None:
                add_bias_gradient(head_gradient.bias[v0:v1], g, scale[here])
            add_products(
                weight,
                v0,
                v1,
                g,
                active,
                config,
                dhidden=None if dhidden is None else dhidden[here],
                head_gradient=head_gradient,
                ax=scaled,
                into=into,
            )
        if into is not None:
            assert head_gradient is not None and head_gradient.weight is not None
            head_gradient.weight[v0:v1].copy_(into)
    if dhidden is not None:
        dhidden.mul_(scale[:, None])
    if not targets_in_tile(x.device):
        add_targets(x, weight, labels, factors[0] * factors[1], dhidden, head_gradient)
