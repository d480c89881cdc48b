"""Launches of the kernels of ``kernels.py``: a block of logits becomes row sums and a gradient tile, or the final gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ....core.dtypes import rounding
from ....core.head_spec import HeadSpec
from ....core.row_head import inverse_temperature
from ....core.stats import CoreOptions
from ..compat import descriptor_step, gemm_warps, multiprocessors
from ..launch import Launch
from ..math import scale_and_cap
from .combine import COMBINE_ROWS, PartialRows, combine_launch
from .config import GemmConfig, input_precision
from .kernels import recompute_kernel, score_kernel


def _describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can represent a matrix: aligned rows that do not overlap."""
    aligned = t.data_ptr() % 16 == 0 and t.stride(0) % descriptor_step(t.element_size()) == 0
    return aligned and t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.numel() > 0


def _aligned(t: Tensor) -> bool:
    """Whether Triton can infer that every row of a matrix, and of its blocks, starts and ends at a multiple of 16 bytes.

    It tests integers for multiples of 16, whatever the element size.
    """
    return t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0


def _operands(x: Tensor, weight: Tensor, config: GemmConfig) -> tuple[Any, Any, bool]:
    """Both operands as the kernel takes them, descriptors or tensors, and whether they are descriptors.

    x (N, H), weight (W, H), unit column strides.
    """
    if not (config.tma and _describable(x) and _describable(weight)):
        return x, weight, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(x, [config.BLOCK_N, config.BLOCK_H]),
        TensorDescriptor.from_tensor(weight, [config.BLOCK_V, config.BLOCK_H]),
        True,
    )


def epilogue(
    kernel: Any, config: GemmConfig, *, softcap: bool, known: bool, filtered: bool, tempered: bool = False
) -> dict[str, Any]:
    """How the epilogue goes through a block.

    PART: columns that it handles at a time. A gradient, which is not summed, takes fewer where registers are short; so do rows
    that are ``tempered`` one by one, with a soft-cap.

    APART: from how many columns on it handles halves strictly one after the other; BLOCK_V: never. Registers are short with the
    soft-cap's tanh beside 128 of the block's elements in each thread, with operands that are not ``known`` to be aligned, and
    with the bookkeeping of a ``filtered`` gradient (which Triton 3.6 cannot compile in one piece for sm_100).

    FLATTEN: whether the next block's loads start during the epilogue. Not around halves of a gradient: Triton 3.6 fails on a
    branch without results in a flattened loop, and 3.9 keeps too much in registers and waits for each product.
    """
    elements = config.BLOCK_N * config.BLOCK_V // (32 * config.num_warps)
    part = config.SOFTCAP_PART if softcap else config.PART
    part = min(part, 8) if tempered and softcap and elements >= 64 else part
    columns = 32 if not known or (softcap and elements >= 128) else config.BLOCK_V
    if kernel is not recompute_kernel:
        return {"PART": part, "APART": columns, "FLATTEN": config.flatten}
    part = part if known or filtered else min(part, 16)
    columns = min(columns, 64) if filtered else columns
    return {"PART": part, "APART": columns, "FLATTEN": config.flatten and columns == config.BLOCK_V}


def _gemm_launch(
    kernel: Any,
    config: GemmConfig,
    head: HeadSpec,
    options: CoreOptions,
    x: Tensor,  # (N, H)
    weight: Tensor,  # (W, H)
    first: int,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    *,
    filtered: bool = False,
) -> Launch:
    """A launch of a kernel of ``kernels.py``, with the arguments that both have in common added."""
    n, hidden = x.shape
    a, b, tma = _operands(x, weight, config)
    known = tma or (_aligned(x) and _aligned(weight))
    if not known:
        config = config.for_unaligned()
    scale, cap = scale_and_cap(head)
    inverse = inverse_temperature(head)
    assert inverse is None or len(inverse) == n
    softcap = head.softcap is not None
    return Launch(
        kernel,
        {
            "x": a,
            "w": b,
            "x_stride": x.stride(0),
            "w_stride": weight.stride(0),
            **arguments,
            "inverse": inverse,
            "num_tokens": n,
            "num_entries": len(weight),
            "hidden_size": hidden,
            "first": first,
            "scale": scale,
            "cap": cap,
        },
        {
            **constants,
            "SOFTCAP": softcap,
            "MATCH": rounding(x.dtype, options.precision),
            "BLOCK_N": config.BLOCK_N,
            "BLOCK_V": config.BLOCK_V,
            "BLOCK_H": config.BLOCK_H,
            "GROUP": config.GROUP,
            **epilogue(kernel, config, softcap=softcap, known=known, filtered=filtered, tempered=inverse is not None),
            "TMA": tma,
            "EVEN": hidden % config.BLOCK_H == 0,
            "PRECISION": input_precision(x.dtype, x.device),
        },
        num_warps=gemm_warps(config.BLOCK_N, config.BLOCK_V, config.num_warps),
        num_stages=config.num_stages,
    )


def _programs(x: Tensor, weight: Tensor, config: GemmConfig) -> int:
    """The grid of a kernel of ``kernels.py``."""
    blocks = triton.cdiv(len(x), config.BLOCK_N) * triton.cdiv(len(weight), config.BLOCK_V)
    return min(blocks, multiprocessors(x.device) * config.programs_per_sm)


def score_launch(
    x: Tensor,  # (N, H), unit column stride
    weight: Tensor,  # (W, H), unit column stride
    bias: Tensor | None,  # (W,)
    labels: Tensor,  # (N,)
    k: Tensor,  # (N,) float32
    partial: Tensor,  # (rows.count, v_blocks, N) float32
    gradient: Tensor | None,  # (N, W)
    rows: PartialRows,
    head: HeadSpec,
    options: CoreOptions,
    config: GemmConfig,
    *,
    first: int,
) -> Launch:
    """The launch of ``score_kernel``."""
    arguments = {
        "bias": bias,
        "labels": labels,
        "k": k,
        "partial": partial,
        "gradient": gradient,
        "gradient_stride": 0 if gradient is None else gradient.stride(0),
    }
    constants = {**rows.constants(), "SLOPE": not options.slopes_later}
    return _gemm_launch(score_kernel, config, head, options, x, weight, first, arguments, constants)


def score_block(
    x: Tensor,  # (N, H), unit column stride
    weight: Tensor,  # (W, H), of x's dtype, unit column stride: vocabulary entries first..first+W
    bias: Tensor | None,  # (W,)
    labels: Tensor,  # (N,) int64
    zy: Tensor,  # (N,) float32 logits of the labels
    k: Tensor,  # (N,) float32 offsets, raised where this block needs it
    sums: Tensor | None,  # (7, N) float64 of earlier blocks, updated; None for the only block
    stats: Tensor | None,  # (7, N) float32, see STATS: written after the last block
    is_top1: Tensor | None,  # (N,) bool, as stats
    head: HeadSpec,
    options: CoreOptions,
    config: GemmConfig,
    *,
    first: int,
    vocab_size: int,
    start: Tensor | None = None,  # (N,) k before the first block; None for the first block
    gradient: Tensor | None = None,  # (N, W), gets e * (1 - tanh^2), 0 at the label, each block relative to its own offset
) -> tuple[Tensor, Tensor | None]:
    """Adds a block of logits to the statistics.

    Returns the factor of each BLOCK_V columns of ``gradient``, (blocks, N), and with ``grad_filter`` the largest exponential in
    them, (blocks, N).
    """
    assert len(weight) % config.BLOCK_V == 0 or first + len(weight) == vocab_size  # a label beyond a block is not in it
    n, factors = len(x), gradient is not None
    rows = PartialRows.of(options.outputs, factors and options.grad_filter > 0)
    partial = torch.empty((rows.count, triton.cdiv(len(weight), config.BLOCK_V), n), dtype=torch.float32, device=x.device)
    given = x, weight, bias, labels, k if start is None else start, partial, gradient, rows, head, options, config
    score_launch(*given, first=first).run(_programs(x, weight, config))
    combine_launch(partial, k, zy, sums, stats, is_top1, rows, vocab_size=vocab_size, is_first=first == 0, factors=factors).run(
        triton.cdiv(n, COMBINE_ROWS)
    )
    return partial[1], partial[rows.top] if rows.top else None


def recompute_launch(
    x: Tensor,  # (N, H), unit column stride
    weight: Tensor,  # (W, H), unit column stride
    bias: Tensor | None,  # (W,)
    labels: Tensor,  # (N,)
    k: Tensor,  # (N,) float32
    mix: Tensor | None,  # (2, N) float32
    at_target: Tensor | None,  # (N,) float32
    row_scale: Tensor | None,  # (N,) float32, with active
    gradient: Tensor,  # (N, W)
    active: Tensor | None,  # (n_blocks, v_blocks) int8
    head: HeadSpec,
    options: CoreOptions,
    config: GemmConfig,
    *,
    first: int,
) -> Launch:
    """The launch of ``recompute_kernel``."""
    arguments = {
        "bias": bias,
        "labels": labels,
        "k": k,
        "mix": mix,
        "at_target": at_target,
        "row_scale": row_scale,
        "gradient": gradient,
        "gradient_stride": gradient.stride(0),
        "active": active,
        "threshold": float(options.grad_filter),
    }
    is_filtered = active is not None
    return _gemm_launch(recompute_kernel, config, head, options, x, weight, first, arguments, {}, filtered=is_filtered)


def recompute_block(
    x: Tensor,  # (N, H), unit column stride
    weight: Tensor,  # (W, H), of x's dtype, unit column stride: vocabulary entries first..first+W
    bias: Tensor | None,  # (W,)
    labels: Tensor,  # (N,) int64
    k: Tensor,  # (N,) final
    mix: Tensor | None,  # (2, N) contiguous
    at_target: Tensor | None,  # (N,)
    scale: Tensor,  # (N,)
    gradient: Tensor,  # (N, W), written
    head: HeadSpec,
    options: CoreOptions,
    config: GemmConfig,
    *,
    first: int,
) -> Tensor | None:
    """The gradient of a block of logits whose statistics are known.

    Returns with ``grad_filter`` which blocks (BLOCK_N, BLOCK_V) of it count, (n_blocks, v_blocks) int8.
    """
    active = None
    if options.grad_filter > 0:
        shape = triton.cdiv(len(x), config.BLOCK_N), triton.cdiv(len(weight), config.BLOCK_V)
        active = torch.empty(shape, dtype=torch.int8, device=x.device)
    row_scale = None if active is None else scale
    given = x, weight, bias, labels, k, mix, at_target, row_scale, gradient, active, head, options, config
    recompute_launch(*given, first=first).run(_programs(x, weight, config))
    return active
