"""The log-prob core in Triton: GEMMs whose epilogue takes the exponentials, so that logits never reach memory.

What the three entry points mean is in ``torch_backend``. dX and dW are products of the gradient tile by the vendor's GEMM,
or, with ``grad_filter``, by one that leaves out blocks. float64 is done by the blockwise algorithm of ``torch_backend``, its
element-wise passes in Triton.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...core.dtypes import gemm_dtype
from ...core.head_spec import HeadSpec
from ...core.stats import CoreOptions, RowStats
from ...operators.native import new_sums
from ...planner.plan import VOCAB_BLOCK, block_shape
from ...tile.entropy import mix_tile_
from ...tile.gemm import mm_accumulate
from ...tile.grad_filter import count_blocks
from ...tile.head_gradient import HeadGradient
from ..torch import blockwise as torch_backend
from ..torch.blockwise import (
    add_bias_gradient,
    add_targets,
    add_unit,
    block_dtype,
    for_gemm,
    gradient_factors,
    scale_rows,
    target_entry,
    targets_in_tile,
)
from ..torch.passes import blocks, weight_block
from .gemm.launch import STATS, PartialRows, filtered_mm, finish_block, gradient_block, score_block
from .passes import TRITON_PASSES
from .rows import finish_rows, target_logit_and_slope
from .tuning.configs import GemmConfig, gemm_config


def _is_wide(x: Tensor) -> bool:
    """float64, which no tensor core of the kernels takes."""
    return x.dtype == torch.float64


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _block(weight: Tensor, v0: int, v1: int, dtype: torch.dtype) -> Tensor:
    """Rows of the weight in that dtype, with contiguous columns."""
    return _rows(weight_block(weight, v0, v1, dtype))


def _step(weight: Tensor, dtype: torch.dtype) -> int:
    """Vocabulary entries at a time: all of them, where the kernels can read the weight as it is."""
    return len(weight) if weight.dtype == dtype and weight.stride(1) == 1 else min(len(weight), VOCAB_BLOCK)


def score(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,) int64, in range
    head: HeadSpec,
    options: CoreOptions,
    *,
    tile: Tensor | None = None,  # (N, V) gets G, relative to the returned k
    unit_dhidden: bool = False,
) -> RowStats:
    """See ``torch_backend.score``."""
    if _is_wide(x):
        given: tuple[Any, ...] = (x, weight, bias, labels, head, options)
        return torch_backend.score(*given, tile=tile, unit_dhidden=unit_dhidden, passes=TRITON_PASSES)
    x, bias, labels = _rows(x), None if bias is None else bias.contiguous(), labels.contiguous()
    n, vocab = len(x), len(weight)
    config = gemm_config(x.device, x.dtype, n, x.shape[1], vocab, head.softcap is not None)
    if unit_dhidden:
        dhidden = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        g_dtype = block_dtype(gemm_dtype(x.dtype, x.device))
        rows, width = _gradient_shape(n, vocab, g_dtype, config, options)
    else:
        dhidden, g_dtype = None, None
        width = _step(weight, x.dtype)
        row_bytes = 4 * PartialRows.of(options.outputs, options.grad_filter > 0).count * -(-width // config.BLOCK_V)
        rows = max(config.BLOCK_N, options.workspace // row_bytes // config.BLOCK_N * config.BLOCK_N)
    chunks = []
    for r0, r1 in blocks(max(1, n), rows):
        r1 = min(r1, n)
        here = x[r0:r1], weight, bias, labels[r0:r1], head, options, config, width
        if dhidden is not None:
            assert g_dtype is not None
            chunks.append(_score_unit(*here, dhidden[r0:r1], g_dtype))
        else:
            chunks.append(_score_rows(*here, None if tile is None else tile[r0:r1]))
    stats = RowStats.cat(chunks)
    stats.unit_dhidden = dhidden
    return stats


def _gradient_shape(n: int, vocab: int, g_dtype: torch.dtype, config: GemmConfig, options: CoreOptions) -> tuple[int, int]:
    """Tokens and vocabulary entries of a block of the gradient in the workspace, multiples of the kernels' blocks."""
    rows, width = block_shape(n, vocab, g_dtype.itemsize, options.workspace)
    rows = n if rows >= n else max(config.BLOCK_N, rows // config.BLOCK_N * config.BLOCK_N)
    return max(1, rows), vocab if width >= vocab else max(config.BLOCK_V, width // config.BLOCK_V * config.BLOCK_V)


class _Statistics:
    """Where the kernels leave the statistics of some tokens."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: HeadSpec, options: CoreOptions
    ) -> None:
        n = len(x)
        self.zy, self.start, self.slope = target_logit_and_slope(x, weight, bias, labels, options.precision, head)
        # Every block starts from the label's offset, whatever blocks before it did: the same sums in any partition.
        self.k = self.start.clone()
        self.values = torch.empty((len(STATS), n), dtype=torch.float32, device=x.device)
        self.top1 = torch.empty(n, dtype=torch.bool, device=x.device) if "is_top1" in options.outputs else None
        self.outputs = options.outputs

    def collect(self) -> RowStats:
        named = dict(zip(STATS, self.values, strict=True))
        optional = {name: named.pop(name) for name in ("entropy", "mean_logits", "log_sum_sq_probs")}
        wanted = {name: value for name, value in optional.items() if name in self.outputs}
        return RowStats(k=self.k, target_slope=self.slope, is_top1=self.top1, **named, **wanted)


def _score_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head: HeadSpec,
    options: CoreOptions,
    config: GemmConfig,
    width: int,
    tile: Tensor | None,  # (N, V), written
) -> RowStats:
    vocab = len(weight)
    out = _Statistics(x, weight, bias, labels, head, options)
    if not len(x):
        return out.collect()
    spans = list(blocks(vocab, width))
    sums = None if len(spans) == 1 else new_sums(len(x), x.device)
    factors, largest, offsets = [], [], []
    for v0, v1 in spans:
        last = v1 == vocab
        factor, top = score_block(
            x,
            _block(weight, v0, v1, x.dtype),
            None if bias is None else bias[v0:v1],
            labels,
            out.zy,
            out.k,
            sums,
            out.values if last else None,
            out.top1 if last else None,
            head,
            options,
            config,
            first=v0,
            vocab_size=vocab,
            start=out.start,
            gradient=None if tile is None else tile[:, v0:v1],
        )
        factors.append(factor)
        largest.append(top)
        offsets.append(out.k if last else out.k.clone())
    stats = out.collect()
    if tile is not None:
        entry = -target_entry(stats) if targets_in_tile(x.device) else None
        for (v0, v1), factor, top, offset in zip(spans, factors, largest, offsets, strict=True):
            if offset is not out.k:  # later blocks may have raised it
                factor.mul_((offset - out.k).exp_())
                if top is not None:
                    top.mul_((offset - out.k).exp_())
            finish_block(tile[:, v0:v1], factor, labels - v0 if v0 else labels, entry, config.BLOCK_V)
        if options.grad_filter > 0:
            stats.block_max = torch.cat([t for t in largest if t is not None]).t()
    return stats


def _score_unit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head: HeadSpec,
    options: CoreOptions,
    config: GemmConfig,
    width: int,
    dhidden: Tensor,  # (N, H) zeros, gets d logps / d hidden
    g_dtype: torch.dtype,
) -> RowStats:
    n, vocab = len(x), len(weight)
    out = _Statistics(x, weight, bias, labels, head, options)
    if not n:
        return out.collect()
    grad_dtype = gemm_dtype(x.dtype, x.device)
    sums = new_sums(n, x.device)
    buffer = torch.empty((n, width), dtype=g_dtype, device=x.device)
    for v0, v1 in blocks(vocab, width):
        before, g, last = out.k.clone(), buffer[:, : v1 - v0], v1 == vocab
        block = _block(weight, v0, v1, x.dtype)
        factor, _ = score_block(
            x,
            block,
            None if bias is None else bias[v0:v1],
            labels,
            out.zy,
            out.k,
            sums,
            out.values if last else None,
            out.top1 if last else None,
            head,
            options,
            config,
            first=v0,
            vocab_size=vocab,
            start=out.start,
            gradient=g,
        )
        finish_block(g, factor, labels, None, config.BLOCK_V)
        if v0:
            finish_block(dhidden, (before - out.k).exp_()[None], labels, None, dhidden.shape[1])
        add_unit(dhidden, g, block if block.dtype == grad_dtype else block.to(grad_dtype))
    stats = out.collect()
    scale = -head.slope * (-stats.log_denom).exp()
    finish_rows(dhidden, scale, -scale * target_entry(stats), weight, labels, x.dtype)
    return stats


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
    """See ``torch_backend.tile_gradients``."""
    if stats.block_max is None:
        given: tuple[Any, ...] = (x, weight, labels, tile, stats, coefficients, head, options)
        made: dict[str, Any] = {"dhidden": dhidden, "head_gradient": head_gradient}
        torch_backend.tile_gradients(*given, **made, entropy_coefficients=entropy_coefficients)
        return
    x = _rows(x)
    n, vocab = tile.shape
    config = gemm_config(x.device, x.dtype, n, x.shape[1], vocab, head.softcap is not None)
    grad_dtype = gemm_dtype(x.dtype, x.device)
    factors = gradient_factors(stats, coefficients, entropy_coefficients, head)
    target_values = factors[0] * factors[1]
    scale, at_target, mix = for_gemm(*factors, stats, grad_dtype)
    largest = stats.block_max
    if factors[2] is not None:
        assert mix is not None
        largest = _largest_mixed(largest, factors[2])
        mix_tile_(tile, mix, stats.k, head, options)
        mix = None  # it is in the tile
        if targets_in_tile(x.device):
            tile[torch.arange(n, device=x.device), labels] = at_target.to(tile.dtype)
    active = _active_blocks(largest, factors[0], labels, options.grad_filter, config)
    count_blocks(active)
    ax = None
    if dhidden is not None:
        dhidden.zero_()
    if head_gradient is not None and head_gradient.weight is not None:
        ax = scale_rows(x, scale, grad_dtype)
    # an fp16 tile is float32 until here: it is brought into fp16's range block by block
    for v0, v1 in blocks(vocab, max(config.BLOCK_V, VOCAB_BLOCK) if tile.dtype != grad_dtype else vocab):
        g = tile[:, v0:v1]
        if mix is not None:
            g = g * mix[0, :, None]
        keep = active[:, v0 // config.BLOCK_V : -(-v1 // config.BLOCK_V)]
        product = weight, v0, v1, g.to(grad_dtype), keep, config
        _add_products(*product, dhidden=dhidden, head_gradient=head_gradient, ax=ax)
    if dhidden is not None:
        dhidden.mul_(scale[:, None])
    if head_gradient is not None and head_gradient.bias is not None:
        add_bias_gradient(head_gradient.bias, tile, scale if mix is None else factors[0])
    if not targets_in_tile(x.device):
        add_targets(x, weight, labels, target_values, dhidden, head_gradient)


def _largest_mixed(
    block_max: Tensor,  # (N, v_blocks): no exponential of the block is larger
    mix: Tensor,  # (2, N)
) -> Tensor:
    """No ``|e * (mix[0] + mix[1] * log e)|`` of the block is larger."""
    entropic = (block_max * block_max.clamp(min=1e-38).log()).abs()  # |e log e| has another maximum, at 1 / e
    entropic = torch.where(block_max > math.exp(-1), entropic.clamp(min=math.exp(-1)), entropic)
    return block_max * mix[0].abs()[:, None] + entropic * mix[1].abs()[:, None]


def _active_blocks(
    block_max: Tensor,  # (N, v_blocks): the largest exponential, which the gradient's entry cannot exceed
    scale: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    grad_filter: float,
    config: GemmConfig,
) -> Tensor:
    """(n_blocks, v_blocks) bool: where an entry may reach the filter, or is a label's."""
    keep = block_max * scale.abs()[:, None] >= grad_filter
    keep[torch.arange(len(labels), device=labels.device), labels // config.BLOCK_V] = True
    padded = torch.nn.functional.pad(keep, (0, 0, 0, -len(keep) % config.BLOCK_N))
    return padded.unflatten(0, (-1, config.BLOCK_N)).any(dim=1)


def _add_products(
    weight: Tensor,  # (V, H)
    v0: int,
    v1: int,
    g: Tensor,  # (N, v1 - v0) in the GEMMs' dtype
    active: Tensor | None,  # blocks of g that count; None: all
    config: GemmConfig,
    *,
    dhidden: Tensor | None,  # (N, H), gets g @ weight[v0:v1] added
    head_gradient: HeadGradient | None,
    ax: tuple[Tensor, Tensor | None] | None,  # rows of X times their scale, and the factor still missing: see scale_rows
    into: Tensor | None = None,  # (v1 - v0, H) float32, added to in place of the head's rows
) -> None:
    if dhidden is not None:
        block = _block(weight, v0, v1, g.dtype)
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
    """See ``torch_backend.recompute_gradients``."""
    if _is_wide(x):
        given: tuple[Any, ...] = (x, weight, bias, labels, stats, coefficients, entropy_coefficients, head, options)
        torch_backend.recompute_gradients(*given, dhidden=dhidden, head_gradient=head_gradient, passes=TRITON_PASSES)
        return
    x, bias, labels = _rows(x), None if bias is None else bias.contiguous(), labels.contiguous()
    n, vocab = len(x), len(weight)
    if dhidden is not None:
        dhidden.zero_()
    config = gemm_config(x.device, x.dtype, n, x.shape[1], vocab, head.softcap is not None)
    grad_dtype = gemm_dtype(x.dtype, x.device)
    factors = gradient_factors(stats, coefficients, entropy_coefficients, head)
    scale, at_target, mix = for_gemm(*factors, stats, grad_dtype)
    rows, width = _gradient_shape(n, vocab, grad_dtype, config, options)
    chunks = [slice(r0, min(r1, n)) for r0, r1 in blocks(max(1, n), rows)] if n else []
    need_weight = head_gradient is not None and head_gradient.weight is not None
    ax = [scale_rows(x[here], scale[here], grad_dtype) if need_weight else None for here in chunks]
    buffer = torch.empty((min(rows, n), width), dtype=grad_dtype, device=x.device)
    for v0, v1 in blocks(vocab, width):
        into = None  # float32 block, where several chunks of tokens add to rows that are written once
        if head_gradient is not None and need_weight and len(chunks) != 1 and not head_gradient.accumulate:
            into = torch.zeros((v1 - v0, x.shape[1]), dtype=head_gradient.acc, device=x.device)
        block = _block(weight, v0, v1, x.dtype)
        for here, scaled in zip(chunks, ax, strict=True):
            g = buffer[: len(x[here]), : v1 - v0]
            active = gradient_block(
                x[here],
                block,
                None if bias is None else bias[v0:v1],
                labels[here],
                stats.k[here],
                None if mix is None else mix[:, here].contiguous(),
                at_target[here] if targets_in_tile(x.device) else None,
                scale[here],
                g,
                head,
                options,
                config,
                first=v0,
            )
            if active is not None:
                count_blocks(active)
            if head_gradient is not None and head_gradient.bias is not None:
                add_bias_gradient(head_gradient.bias[v0:v1], g, scale[here])
            _add_products(
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
