"""The log-prob core in plain torch operators, on any device: GEMMs by the vendor's library, the rest in cache-sized blocks.

Three entry points, which every backend has:

- ``score``: one pass over the logits: statistics; with ``tile`` the gradient tile ``G`` too; with ``unit_dhidden``
  d logps / d hidden instead, for which no tile is kept.
- ``tile_gradients``: ``dX`` and ``dW`` from a finished tile, once the loss's coefficients are known.
- ``recompute_gradients``: the same from the inputs, making each block of logits again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.blocking import MOST_ROWS, ROW_MULTIPLE, VOCAB_BLOCK, block_shape, blocks, weight_block
from ...core.dtypes import accumulate_dtype, gemm_dtype, logits_gemm_dtype
from ...core.head_spec import HeadSpec
from ...core.row_head import head_rows
from ...core.stats import CoreOptions, RowStats
from ...core.weight_rows import HeadRows
from ...tile.factors import FP16_SCALE, add_bias_gradient, block_dtype, for_gemm, gradient_factors, rounding_of, scale_rows
from ...tile.head_gradient import HeadGradient
from ...tile.hidden_gradient import add_hidden
from ...tile.sums import BlockSums, merge, statistics
from ...tile.targets import add_targets, put_targets, target_entry, target_logit_and_slope, targets_in_tile
from ...tile.unit import add_unit, finish_unit
from ..interface import ElementWise
from .passes import TORCH_PASSES, Logits


def score(
    x: Tensor,  # (N, H)
    weight: Tensor | HeadRows,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,) int64, in range
    head: HeadSpec,
    options: CoreOptions,
    *,
    tile: Tensor | None = None,  # (N, V) gets G, relative to the returned k
    unit_dhidden: bool = False,
    passes: ElementWise = TORCH_PASSES,
) -> RowStats:
    """One pass over the logits: ``2 * N * H * V`` FLOP, twice that with ``unit_dhidden``."""
    rows, width, multiple = _partition(x, weight, options)
    dhidden = None
    if unit_dhidden:
        dhidden = torch.zeros(x.shape, dtype=accumulate_dtype(x.dtype), device=x.device)
    chunks = []
    for r0, r1 in blocks(max(1, len(x)), rows):
        part = slice(r0, r1)
        own, y, tempered = x[part], labels[part], head_rows(head, part)
        tile_rows = None if tile is None else tile[part]
        dhidden_rows = None if dhidden is None else dhidden[part]
        zy, k, ty = target_logit_and_slope(passes.target_logits(own, weight, bias, y, options.precision), tempered)
        given = own, weight, bias, y, zy, k, tempered, options, width, multiple, tile_rows, dhidden_rows, passes
        sums, factors = _sum_rows(*given)
        stats = statistics(sums, zy, ty, len(weight))
        if dhidden_rows is not None:
            finish_unit(own, weight, y, stats, tempered, dhidden_rows)
        if tile_rows is not None:
            at_target = -target_entry(stats) if targets_in_tile(tile_rows.device) else None
            passes.finish_tile(tile_rows, factors, y, at_target, width)
        chunks.append(stats)
    stats = RowStats.cat(chunks)
    stats.unit_dhidden = dhidden
    return stats


def score_shard(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V_r, H) rows of a head that is sharded over ranks
    bias: Tensor | None,  # (V_r,)
    labels: Tensor,  # (N,) relative to the first row; outside of the rows where another rank has the label
    zy: Tensor,  # (N,) target logits
    k: Tensor,  # (N,) zy, but finite
    head: HeadSpec,
    options: CoreOptions,
    *,
    tile: Tensor | None = None,  # (N, V_r) gets exponentials relative to the sums' k, 0 at the label
    unit_dhidden: bool = False,
    passes: ElementWise = TORCH_PASSES,
) -> BlockSums:
    """The part of ``score`` that one rank does: sums over its rows, with ``k`` set, and with ``unit_dhidden`` ``dhidden``."""
    rows, width, multiple = _partition(x, weight, options)
    dhidden = torch.zeros(x.shape, dtype=accumulate_dtype(x.dtype), device=x.device) if unit_dhidden else None
    chunks = []
    for r0, r1 in blocks(max(1, len(x)), rows):
        part = slice(r0, r1)
        tile_rows, dhidden_rows = (None if t is None else t[part] for t in (tile, dhidden))
        given = x[part], weight, bias, labels[part], zy[part], k[part], head_rows(head, part), options, width, multiple
        sums, factors = _sum_rows(*given, tile_rows, dhidden_rows, passes)
        if tile_rows is not None:
            passes.finish_tile(tile_rows, factors, labels[part], None, width)
        chunks.append(sums)
    sums = BlockSums.cat(chunks)
    sums.dhidden = dhidden
    return sums


def _partition(x: Tensor, weight: Tensor | HeadRows, options: CoreOptions) -> tuple[int, int, int]:
    """Rows and columns of a block of logits, and of how many rows every GEMM is.

    One partition for all modes: a GEMM's rounding may depend on its shape, and a token's logps must not depend on whether its
    gradient is wanted (identical policy and reference give exactly ln 2).
    """
    size = 4 if x.is_cuda else logits_gemm_dtype(x.dtype, x.device, options.precision).itemsize
    rows, width = block_shape(len(x), len(weight), 2 * size, options.workspace, options.batch_invariant)
    if not options.batch_invariant:
        return rows, width, 1
    # how a GPU's library computes may depend on any number of rows
    return (rows, width, rows) if x.is_cuda else (min(rows, MOST_ROWS), width, ROW_MULTIPLE)


def _sum_rows(
    x: Tensor,
    weight: Tensor | HeadRows,
    bias: Tensor | None,
    labels: Tensor,
    zy: Tensor,  # (N,) target logits
    k: Tensor,  # (N,) zy, but finite
    head: HeadSpec,
    options: CoreOptions,
    width: int,
    multiple: int,  # of how many rows every GEMM is
    tile: Tensor | None,  # (N, V), written
    dhidden: Tensor | None,  # (N, H) zeros, gets the exponentials' slopes times the weight
    passes: ElementWise,
) -> tuple[BlockSums, list[Tensor | None]]:
    """The sums of some tokens, and what each block of the tile is still to be multiplied by. See ``sums.merge``."""
    n, vocab = len(x), len(weight)
    logits = Logits(x, weight, bias, options.precision, multiple)
    grad_dtype = gemm_dtype(x.dtype, x.device)
    in_tile = tile is not None and tile.dtype == logits.dtype
    scratch = None if in_tile else torch.empty((logits.rows, width), dtype=logits.dtype, device=x.device)
    g_block = None
    if dhidden is not None and (logits.dtype != grad_dtype or grad_dtype == torch.float16):
        g_block = torch.empty((n, width), dtype=block_dtype(grad_dtype), device=x.device)
    running = k
    parts: list[BlockSums] = []
    for v0, v1 in blocks(vocab, width):
        w = v1 - v0
        destination: Tensor | None
        if tile is not None:
            destination = tile[:, v0:v1]
            source = destination if scratch is None else scratch[:n, :w]
        else:
            assert scratch is not None
            source = scratch[:n, :w]
            destination = None if dhidden is None else source if g_block is None else g_block[:, :w]
        logits.block(v0, v1, source if scratch is None else scratch[:, :w])
        part = passes.scan_block(logits, head, options, source, destination, zy, k, labels, v0, v1)
        parts.append(part)
        if dhidden is not None:
            assert destination is not None
            if part.k is not None or running is not k:
                here = k if part.k is None else part.k
                new = torch.maximum(running, here)
                for rows, offset in ((dhidden, running), (destination, here)):
                    passes.finish_tile(rows, [(offset - new).exp()], labels, None, rows.shape[1])
                running = new
            add_unit(dhidden, destination, weight_block(weight, v0, v1, grad_dtype))
    return merge(parts, k)


def tile_gradients(
    x: Tensor,  # (N, H)
    weight: Tensor | HeadRows,  # (V, H)
    labels: Tensor,  # (N,)
    tile: Tensor,  # (N, V) G
    stats: RowStats,
    coefficients: Tensor,  # (N,) dLoss / dlogps
    head: HeadSpec,
    options: CoreOptions,
    *,
    dhidden: Tensor | None,  # (N, H) float32 (float64), written
    head_gradient: HeadGradient | None,
    entropy_coefficients: Tensor | None = None,  # (N,) dLoss / dentropy, with stats.entropy and options.slopes_later
    hidden_done: Callable[[], None] | None = None,  # called when ``dhidden`` is complete, before dW
    passes: ElementWise = TORCH_PASSES,
) -> None:
    """``dX = a (.) (G W)``, ``dW = G^T (a (.) X)`` and ``db = G^T a`` with ``a = -c * slope / D``."""
    grad_dtype = gemm_dtype(x.dtype, x.device)
    vocab = tile.shape[1]
    row_factor = None
    if entropy_coefficients is not None:
        factors = gradient_factors(stats, coefficients, entropy_coefficients, head)
        target_values = factors[0] * factors[1]
        scale, at_target, mix = for_gemm(*factors, stats, grad_dtype)
        assert mix is not None
        passes.mix_tile_(tile, mix, stats.k, head, options)
        if targets_in_tile(tile.device):
            put_targets(tile, labels, at_target)
    elif grad_dtype == torch.float16:  # the float32 tile is normalised block by block, into fp16's range
        normalise, scale = (-stats.log_denom).exp(), -coefficients * head.slope
        target_values = -target_entry(stats) * normalise * scale
        row_factor, scale = normalise * FP16_SCALE, scale / FP16_SCALE
    else:
        scale = -coefficients * head.slope * (-stats.log_denom).exp()
        target_values = -target_entry(stats) * scale
        if targets_in_tile(tile.device):
            scale = scale * rounding_of(target_entry(stats), tile.dtype)

    def operand(v0: int, v1: int) -> Tensor:
        block = tile[:, v0:v1]
        if row_factor is not None:
            return (block * row_factor[:, None]).to(grad_dtype)
        return block if block.dtype == grad_dtype else block.to(grad_dtype)

    whole = row_factor is None and tile.dtype == grad_dtype and weight.dtype == grad_dtype
    if dhidden is not None:
        if whole and isinstance(weight, Tensor) and not x.is_cuda:
            dhidden.copy_(torch.mm(tile, weight)) if tile.dtype != dhidden.dtype else torch.mm(tile, weight, out=dhidden)
        else:
            dhidden.zero_()
            for v0, v1 in [(0, vocab)] if whole and isinstance(weight, Tensor) else blocks(vocab, VOCAB_BLOCK):
                add_hidden(dhidden, operand(v0, v1), weight, v0, v1)
        dhidden.mul_(scale[:, None])
        if not targets_in_tile(x.device):
            add_targets(x, weight, labels, target_values, dhidden, None)
        if hidden_done is not None:
            hidden_done()
    if head_gradient is not None and head_gradient.weight is not None:
        ax, factor = scale_rows(head_gradient.inputs(x), scale, head_gradient.operand(grad_dtype, x.device))
        # accumulating in blocks keeps the GEMM's result small before it is added in float32
        at_once = whole and not head_gradient.accumulate and not head_gradient.low_rank
        for v0, v1 in [(0, vocab)] if at_once else blocks(vocab, VOCAB_BLOCK):
            head_gradient.add_weight(v0, v1, operand(v0, v1), ax, factor)
    if head_gradient is not None and head_gradient.bias is not None:
        add_bias_gradient(head_gradient.bias, tile, scale if row_factor is None else scale * row_factor)
    if not targets_in_tile(x.device):
        add_targets(x, weight, labels, target_values, None, head_gradient)


def recompute_gradients(
    x: Tensor,  # (N, H)
    weight: Tensor | HeadRows,  # (V, H)
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
    passes: ElementWise = TORCH_PASSES,
) -> None:
    """Gradients from recomputed logits. The outer loop is over the vocabulary, so each block of dW is finished at once."""
    grad_dtype = gemm_dtype(x.dtype, x.device)
    g_dtype = block_dtype(grad_dtype)
    n, vocab = len(x), len(weight)
    logits_size = 4 if x.is_cuda else logits_gemm_dtype(x.dtype, x.device, options.precision).itemsize
    rows, width = block_shape(n, vocab, logits_size + g_dtype.itemsize, options.workspace, options.batch_invariant)
    # the rows that a GEMM of ``score`` has: other roundings of the logits than those of k and the sums would not cancel
    multiple = 1 if not options.batch_invariant else rows if x.is_cuda else ROW_MULTIPLE
    factors = gradient_factors(stats, coefficients, entropy_coefficients, head)
    target_values = factors[0] * factors[1]
    scale, at_target, mix = for_gemm(*factors, stats, grad_dtype)
    if dhidden is not None:
        dhidden.zero_()
    token_chunks = list(blocks(max(1, n), rows))
    several = len(token_chunks) > 1
    makers = [Logits(x[r0:r1], weight, bias, options.precision, multiple) for r0, r1 in token_chunks]
    scratch = torch.empty((min(rows, n), width), dtype=makers[0].dtype, device=x.device)
    tile = torch.empty((min(rows, n), width), dtype=g_dtype, device=x.device)
    for v0, v1 in blocks(vocab, width):
        span = v1 - v0
        dweight: Tensor | None = None  # float32 block, where several chunks of tokens add to rows that are written once
        if head_gradient is not None and head_gradient.weight is not None and several and not head_gradient.accumulate:
            dweight = torch.zeros((span, head_gradient.columns), dtype=head_gradient.acc, device=x.device)
        for (r0, r1), logits in zip(token_chunks, makers, strict=True):
            r1 = min(r1, n)
            source, g = scratch[: r1 - r0, :span], tile[: r1 - r0, :span]
            logits.block(v0, v1, source)  # as many rows as tokens: a padded copy of x is in no plan
            here = slice(r0, r1)
            passes.gradient_block(
                logits,
                head_rows(head, here),
                options,
                source,
                g,
                stats.k[here],
                labels[here],
                v0,
                v1,
                None if mix is None else mix[:, here],
                at_target[here] if targets_in_tile(x.device) else None,
                None if head_gradient is None or head_gradient.bias is None else head_gradient.bias[v0:v1],
                scale[here],
            )
            g = g.to(grad_dtype)
            if dhidden is not None:
                add_hidden(dhidden[r0:r1], g, weight, v0, v1)
            if head_gradient is not None and head_gradient.weight is not None:
                operand = head_gradient.operand(grad_dtype, x.device)
                ax, factor = scale_rows(head_gradient.inputs(x[r0:r1], r0), scale[r0:r1], operand)
                if dweight is None:
                    head_gradient.add_weight(v0, v1, g, ax, factor)
                else:
                    head_gradient.add_product(dweight, g, ax, factor)
        if dweight is not None:
            assert head_gradient is not None and head_gradient.weight is not None
            head_gradient.weight[v0:v1].copy_(dweight)
    if dhidden is not None:
        dhidden.mul_(scale[:, None])
    if not targets_in_tile(x.device):
        add_targets(x, weight, labels, target_values, dhidden, head_gradient)
