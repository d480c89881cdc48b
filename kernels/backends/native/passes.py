"""The element-wise functions by compiled operators: one read and one write of a block of logits for all outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...core.dtypes import accumulate_dtype, rounding
from ...core.head_spec import HeadSpec
from ...core.row_head import inverse_temperature
from ...core.stats import CoreOptions
from ...core.weight_rows import HeadRows
from ...operators.schemas import MARGIN_FUNCTIONS, new_sums
from ...tile.sums import BlockSums
from ..torch.passes import TORCH_PASSES, Logits

_ops = torch.ops.logitless
#: Bits of ``tile_pass``' outputs.
_BITS = {"entropy": 1, "mean_logits": 2, "is_top1": 4, "log_sum_sq_probs": 8}
_WITHOUT_SLOPE = 16


def output_bits(options: CoreOptions) -> int:
    return sum(_BITS[name] for name in options.outputs) + _WITHOUT_SLOPE * options.slopes_later


def head_numbers(head: HeadSpec) -> tuple[float, float, float]:
    return head.logit_scale, head.softcap or 0.0, head.temperature


def block_sums(sums: Tensor, options: CoreOptions, dtype: torch.dtype, k: Tensor | None) -> BlockSums:
    """From the operators' layout. sums (7, n) float64, k (n,) where it was raised."""
    e, ez, ee, z, target, before, after = sums.to(dtype)
    want = options.outputs
    result = BlockSums(e, k=k)
    if "entropy" in want:
        result.ez = ez
    if "log_sum_sq_probs" in want:
        result.ee = ee
    if "mean_logits" in want:
        result.z = z
    if "is_top1" in want:
        result.target, result.before, result.after = target, before, after
    return result


def target_logits(x: Tensor, weight: Tensor | HeadRows, bias: Tensor | None, labels: Tensor, precision: str) -> Tensor:
    """See ``backends.torch.passes.target_logits``."""
    if isinstance(weight, HeadRows) or x.stride(1) != 1 or weight.stride(1) != 1:  # the operator reads rows
        return TORCH_PASSES.target_logits(x, weight, bias, labels, precision)
    out = torch.empty(len(x), dtype=accumulate_dtype(x.dtype), device=x.device)
    bias = None if bias is None else bias.to(out.dtype).contiguous()
    _ops.indexed_dot(x, weight, bias, labels, precision == "match", out)
    return out


def scan_block(
    logits: Logits,
    head: HeadSpec,
    options: CoreOptions,
    source: Tensor,
    destination: Tensor | None,
    zy: Tensor,
    k: Tensor,
    labels: Tensor,
    v0: int,
    v1: int,
) -> BlockSums:
    """See ``backends.torch.passes.scan_block``."""
    sums, raised = new_sums(len(source), source.device), k.clone()
    _ops.tile_pass(
        source,
        destination,
        logits.wide_bias(),
        labels,
        raised,
        sums,
        None,
        None,
        inverse_temperature(head),
        *head_numbers(head),
        v0,
        output_bits(options),
        rounding(logits.model_dtype, "match") if logits.match else 0,
    )
    # to look whether any was raised would synchronise a GPU
    changed = source.is_cuda or not torch.equal(raised, k)
    return block_sums(sums, options, zy.dtype, raised if changed else None)


def gradient_block(
    logits: Logits,
    head: HeadSpec,
    options: CoreOptions,
    source: Tensor,
    destination: Tensor,
    k: Tensor,
    labels: Tensor,
    v0: int,
    v1: int,
    mix: Tensor | None,
    at_target: Tensor | None,
    dbias: Tensor | None,
    scale: Tensor,
) -> None:
    """See ``backends.torch.passes.gradient_block``."""
    _ops.tile_pass(
        source,
        destination,
        logits.wide_bias(),
        labels,
        k,
        None,
        None if mix is None else mix.contiguous(),
        at_target,
        inverse_temperature(head),
        *head_numbers(head),
        v0,
        0,
        rounding(logits.model_dtype, "match") if logits.match else 0,
    )
    if dbias is not None:
        step = len(destination) if destination.is_cuda else max(1, options.cache_elements // destination.shape[1])
        for r in range(0, len(destination), step):
            dbias.addmv_(destination[r : r + step].to(dbias.dtype).t(), scale[r : r + step].to(dbias.dtype))


def finish_tile(tile: Tensor, factors: list[Tensor | None], labels: Tensor, at_target: Tensor | None, width: int) -> None:
    """See ``backends.torch.passes.finish_tile``."""
    given = None
    if (some := next((f for f in factors if f is not None), None)) is not None:
        given = torch.stack([torch.ones_like(some) if f is None else f for f in factors])
    if given is not None or at_target is not None:
        _ops.finish_tile(tile, given, labels, at_target, width)


def scatter_rows(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: Tensor,
    values: Tensor,
    factor: Tensor | None = None,
    base: Tensor | None = None,
    distinct: bool = True,
) -> Tensor:
    """See :class:`ElementWise`."""
    if not distinct or base is not None or not values.is_contiguous():
        return TORCH_PASSES.scatter_rows(shape, dtype, rows, values, factor, base, distinct)
    out = torch.zeros(shape, dtype=dtype, device=values.device)
    factor = values.new_ones(1) if factor is None else factor.to(values.dtype).reshape(-1)
    _ops.scale_scatter(values, rows, factor.contiguous(), out.view(-1, values.shape[1]))
    return out


def scaled_to_dtype(source: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """See :class:`ElementWise`."""
    if source.dtype == dtype or not source.is_contiguous():
        return TORCH_PASSES.scaled_to_dtype(source, factor, dtype, in_place)
    out = torch.empty(source.shape, dtype=dtype, device=source.device)
    _ops.scaled_convert(source, factor.to(source.dtype).reshape(1), out)
    return out


def pair_margins(
    logps: Tensor,  # (N,)
    weights: Tensor | None,  # (N,) float64
    offsets: Tensor,  # (2p + 1,) int64
    ref_logps: Tensor | None,  # (2p,) float64
    function: str,  # one of MARGIN_FUNCTIONS
    mean: bool,
    beta: float,
    gamma: float,
    label_smoothing: float,
    scale: float,
    losses: Tensor,  # (p,) float64, written
    sequence_logps: Tensor,  # (2p,) float64, written
    coefficients: Tensor | None,  # (N,), written
) -> None:
    """The operator ``pair_loss``; see ``operators/schemas.py``."""
    kind = MARGIN_FUNCTIONS.index(function)
    numbers = kind, mean, beta, gamma, label_smoothing, scale
    _ops.pair_loss(logps, weights, offsets, ref_logps, *numbers, losses, sequence_logps, coefficients)


NATIVE_PASSES = replace(
    TORCH_PASSES,
    target_logits=target_logits,
    scan_block=scan_block,
    gradient_block=gradient_block,
    finish_tile=finish_tile,
    scatter_rows=scatter_rows,
    scaled_to_dtype=scaled_to_dtype,
    pair_margins=pair_margins,
)
