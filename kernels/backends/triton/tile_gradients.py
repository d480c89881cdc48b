"""``tile_gradients`` in Triton: dX and dW from a finished tile, without the blocks below ``grad_filter``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.blocking import VOCAB_BLOCK, blocks
from ...core.dtypes import gemm_dtype
from ...core.head_spec import HeadSpec
from ...core.stats import CoreOptions, RowStats
from ...tile.factors import add_bias_gradient, for_gemm, gradient_factors, scale_rows
from ...tile.grad_filter import count_blocks
from ...tile.head_gradient import HeadGradient
from ...tile.targets import add_targets, targets_in_tile
from ..torch import blockwise as torch_backend
from .elementwise import TRITON_PASSES
from .gemm.config import GemmConfig
from .launch import unit_columns
from .products import add_products
from .tuning.lookup import config_of


def tile_gradients(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    tile: Tensor,  # (N, V) G
    stats: RowStats,
    coefficients: Tensor,  # (N,) dLoss / dlogps
    head: HeadSpec,
    options: CoreOptions,
    *,
    dhidden: Tensor | None,  # (N, H) float32 (float64), written
    head_gradient: HeadGradient | None,
    entropy_coefficients: Tensor | None = None,  # (N,) dLoss / dentropy
) -> None:
    """See ``torch/blockwise.py``."""
    if stats.block_max is None:
        given: tuple[Any, ...] = (x, weight, labels, tile, stats, coefficients, head, options)
        made: dict[str, Any] = {"dhidden": dhidden, "head_gradient": head_gradient}
        torch_backend.tile_gradients(*given, **made, entropy_coefficients=entropy_coefficients, passes=TRITON_PASSES)
        return
    x = unit_columns(x)
    n, vocab = tile.shape
    config = config_of(x, vocab, head, options)
    grad_dtype = gemm_dtype(x.dtype, x.device)
    factors = gradient_factors(stats, coefficients, entropy_coefficients, head)
    target_values = factors[0] * factors[1]
    scale, at_target, mix = for_gemm(*factors, stats, grad_dtype)
    largest = stats.block_max
    if factors[2] is not None:
        assert mix is not None
        largest = largest_mixed(largest, factors[2])
        TRITON_PASSES.mix_tile_(tile, mix, stats.k, head, options)
        mix = None  # the tile has it
        if targets_in_tile(x.device):
            tile[torch.arange(n, device=x.device), labels] = at_target.to(tile.dtype)
    active = _active_blocks(largest, factors[0], labels, options.grad_filter, config)
    count_blocks(active)
    ax = None
    if dhidden is not None:
        dhidden.zero_()
    if head_gradient is not None and head_gradient.weight is not None:
        ax = scale_rows(x, scale, grad_dtype)
    # an fp16 tile is float32 until here: each block is scaled into fp16's range
    for v0, v1 in blocks(vocab, max(config.BLOCK_V, VOCAB_BLOCK) if tile.dtype != grad_dtype else vocab):
        g = tile[:, v0:v1]
        if mix is not None:
            g = g * mix[0, :, None]
        keep = active[:, v0 // config.BLOCK_V : -(-v1 // config.BLOCK_V)]
        product = weight, v0, v1, g.to(grad_dtype), keep, config
        add_products(*product, dhidden=dhidden, head_gradient=head_gradient, ax=ax)
    if dhidden is not None:
        dhidden.mul_(scale[:, None])
    if head_gradient is not None and head_gradient.bias is not None:
        add_bias_gradient(head_gradient.bias, tile, scale if mix is None else factors[0])
    if not targets_in_tile(x.device):
        add_targets(x, weight, labels, target_values, dhidden, head_gradient)


def largest_mixed(
    block_max: Tensor,  # (N, v_blocks) bounds of the exponentials
    mix: Tensor,  # (2, N)
) -> Tensor:
    """A bound of ``|e * (mix[0] + mix[1] * log e)|`` in each block. (N, v_blocks)."""
    entropic = (block_max * block_max.clamp(min=1e-38).log()).abs()  # |e log e| has another maximum, at 1 / e
    entropic = torch.where(block_max > math.exp(-1), entropic.clamp(min=math.exp(-1)), entropic)
    return block_max * mix[0].abs()[:, None] + entropic * mix[1].abs()[:, None]


def _active_blocks(
    block_max: Tensor,  # (N, v_blocks): the largest exponential, a bound of the gradient's entries
    scale: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    grad_filter: float,
    config: GemmConfig,
) -> Tensor:
    """(n_blocks, v_blocks) bool: blocks in which an entry may reach the filter, or is a label's."""
    keep = block_max * scale.abs()[:, None] >= grad_filter
    keep[torch.arange(len(labels), device=labels.device), labels // config.BLOCK_V] = True
    padded = torch.nn.functional.pad(keep, (0, 0, 0, -len(keep) % config.BLOCK_N))
    return padded.unflatten(0, (-1, config.BLOCK_N)).any(dim=1)
