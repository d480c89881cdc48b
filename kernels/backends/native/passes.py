"""The element-wise passes of ``torch_backend`` by compiled operators: one read and one write of a block for all outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.dtypes import accumulate_dtype
from ...core.head_spec import HeadSpec
from ...core.stats import CoreOptions
from ...operators.native import new_sums
from ..torch import passes as torch_scan
from ..torch.passes import BlockSums, Logits, Passes

_ops = torch.ops.logitless
#: Bits of ``tile_pass``' outputs.
_BITS = {"entropy": 1, "mean_logits": 2, "is_top1": 4, "log_sum_sq_probs": 8}
_WITHOUT_SLOPE = 16
_ROUNDING = {torch.bfloat16: 1, torch.float16: 2}


def output_bits(options: CoreOptions) -> int:
    return sum(_BITS[name] for name in options.outputs) + _WITHOUT_SLOPE * options.slopes_later


def head_numbers(head: HeadSpec) -> tuple[float, float, float]:
    return head.logit_scale, head.softcap or 0.0, head.temperature


def rounding(dtype: torch.dtype, precision: str) -> int:
    """Which rounding of the logits ``precision`` asks for, with hidden states of that dtype."""
    return _ROUNDING.get(dtype, 0) if precision == "match" else 0


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


def target_logits(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, precision: str) -> Tensor:
    """See ``torch_scan.target_logits``."""
    if x.stride(1) != 1 or weight.stride(1) != 1:  # the operator reads rows
        return torch_scan.target_logits(x, weight, bias, labels, precision)
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
    """See ``torch_scan.scan_block``."""
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
        *head_numbers(head),
        v0,
        output_bits(options),
        _ROUNDING[logits.model_dtype] if logits.match else 0,
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
    """See ``torch_scan.gradient_block``."""
    _ops.tile_pass(
        source,
        destination,
        logits.wide_bias(),
        labels,
        k,
        None,
        None if mix is None else mix.contiguous(),
        at_target,
        *head_numbers(head),
        v0,
        0,
        _ROUNDING[logits.model_dtype] if logits.match else 0,
    )
    if dbias is not None:
        step = len(destination) if destination.is_cuda else max(1, options.cache_elements // destination.shape[1])
        for r in range(0, len(destination), step):
            dbias.addmv_(destination[r : r + step].to(dbias.dtype).t(), scale[r : r + step].to(dbias.dtype))


def finish_tile(tile: Tensor, factors: list[Tensor | None], labels: Tensor, at_target: Tensor | None, width: int) -> None:
    """See ``torch_scan.finish_tile``."""
    given = None
    if (some := next((f for f in factors if f is not None), None)) is not None:
        given = torch.stack([torch.ones_like(some) if f is None else f for f in factors])
    if given is not None or at_target is not None:
        _ops.finish_tile(tile, given, labels, at_target, width)


NATIVE_PASSES = Passes(target_logits, scan_block, gradient_block, finish_tile)
