"""The log-prob core in C++ on CPUs.

bfloat16 goes through oneDNN's small GEMM: logits live in the cache, in float32, and only the gradient tile reaches memory,
vocabulary-major, as the dW GEMM reads it. What that GEMM cannot take (other dtypes, an odd hidden size, a CPU without it)
is done by the blockwise algorithm of ``blockwise``, its element-wise passes in C++.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.blocking import blocks
from ...core.dtypes import rounding
from ...core.head_spec import HeadSpec
from ...core.row_head import head_rows, inverse_temperature
from ...core.stats import CoreOptions, RowStats
from ...core.weight_rows import HeadRows
from ...operators.loading import has_bf16_gemm
from ...operators.schemas import SPAN, new_sums, packed_rows_size, packed_tokens_size
from ...tile.factors import gradient_factors
from ...tile.head_gradient import HeadGradient
from ...tile.sums import BlockSums, combine
from ...tile.targets import target_logit_and_slope
from ..interface import Call
from ..torch import blockwise
from .passes import NATIVE_PASSES, block_sums, head_numbers, output_bits, target_logits

log = logging.getLogger("logitless")
_ops = torch.ops.logitless
_MIN_TOKENS = 64
#: Bytes that each thread works in, whatever the shape, besides 4 per token.
_THREAD_BYTES = 3 << 20


def why_no_small_gemm(x: Tensor, weight: Tensor | HeadRows) -> str | None:
    """The reason why the small GEMM cannot serve a call; it reads pairs of neighbours in rows of both operands."""
    if isinstance(weight, HeadRows):
        return "the weight is read block by block"
    if x.dtype != torch.bfloat16 or weight.dtype == torch.float64:
        return f"hidden states are {x.dtype} and the weight is {weight.dtype}"
    if x.shape[1] % 2 or not x.shape[1]:
        return f"a hidden size of {x.shape[1]} is not even"
    if weight.stride(1) != 1:
        return "the weight's rows are not contiguous"
    return None if has_bf16_gemm() else "oneDNN has no bfloat16 GEMM with a float32 result on this CPU"


def _takes(x: Tensor, weight: Tensor | HeadRows) -> bool:
    reason = why_no_small_gemm(x, weight)
    if reason is not None:
        log.debug("cpu backend: a GEMM by PyTorch and a pass over its result, since %s", reason)
    return reason is None


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _pack_tokens(x: Tensor) -> Tensor:
    packed = torch.empty(packed_tokens_size(*x.shape), dtype=x.dtype, device=x.device)
    _ops.pack_tokens(x, packed)
    return packed


def _pack_rows(x: Tensor, scale: Tensor) -> Tensor:
    packed = torch.empty(packed_rows_size(*x.shape), dtype=x.dtype, device=x.device)
    _ops.pack_rows(x, scale, packed)
    return packed


def _block(n: int, hidden: int, workspace: int, per_token: int) -> tuple[int, int]:
    """Tokens and vocabulary entries at a time: half of the workspace for packed tokens, half for the gradient of a block."""
    tokens = min(n, max(_MIN_TOKENS, workspace // (2 * hidden * per_token)))
    return max(1, tokens), max(SPAN, workspace // (4 * max(1, tokens)) // SPAN * SPAN)


def workspace_bytes(call: Call) -> int:
    """What the threads work in."""
    return torch.get_num_threads() * (_THREAD_BYTES + 4 * call.num_tokens)


def score(
    x: Tensor,  # (N, H)
    weight: Tensor | HeadRows,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    head: HeadSpec,
    options: CoreOptions,
    *,
    tile: Tensor | None = None,  # (N, V)
    unit_dhidden: bool = False,
) -> RowStats:
    """See ``blockwise.score``. The tile is opaque: ``tile_gradients`` reads it as (V, N)."""
    if not _takes(x, weight):
        return blockwise.score(
            x, weight, bias, labels, head, options, tile=tile, unit_dhidden=unit_dhidden, passes=NATIVE_PASSES
        )
    assert isinstance(weight, Tensor)
    x, bias = _rows(x), None if bias is None else bias.float().contiguous()
    tokens, width = _block(len(x), x.shape[1], options.workspace, 2)
    dhidden = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if unit_dhidden else None
    if tile is not None:
        tokens = max(1, len(x))  # a tile is one block
    parts = []
    for r0, r1 in blocks(max(1, len(x)), tokens):
        r1 = min(r1, len(x))
        rows = None if dhidden is None else dhidden[r0:r1]
        own = head_rows(head, slice(r0, r1))
        parts.append(_score(x[r0:r1], weight, bias, labels[r0:r1], own, options, tile, rows, width))
    stats = RowStats.cat(parts)
    stats.unit_dhidden = dhidden
    return stats


def _score(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head: HeadSpec,
    options: CoreOptions,
    tile: Tensor | None,
    dhidden: Tensor | None,  # (N, H) zeros, gets d logps / d hidden
    width: int,
) -> RowStats:
    zy, k, slope = target_logit_and_slope(target_logits(x, weight, bias, labels, options.precision), head)
    total = _sum_rows(x, weight, bias, labels, zy, k, head, options, tile, dhidden, width)
    stats, _ = combine([total], zy, k, slope, len(weight))
    if dhidden is not None:
        scale, at_target, _ = gradient_factors(stats, torch.ones_like(zy), None, head)
        _ops.finish_rows(dhidden, scale, scale * at_target, weight, labels)
    return stats


def score_shard(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V_r, H)
    bias: Tensor | None,  # (V_r,)
    labels: Tensor,  # (N,)
    zy: Tensor,  # (N,)
    k: Tensor,  # (N,)
    head: HeadSpec,
    options: CoreOptions,
    *,
    tile: Tensor | None = None,  # (N, V_r)
    unit_dhidden: bool = False,
) -> BlockSums:
    """See ``blockwise.score_shard``."""
    if not _takes(x, weight):
        given = x, weight, bias, labels, zy, k, head, options
        return blockwise.score_shard(*given, tile=tile, unit_dhidden=unit_dhidden, passes=NATIVE_PASSES)
    x, bias = _rows(x), None if bias is None else bias.float().contiguous()
    tokens, width = _block(len(x), x.shape[1], options.workspace, 2)
    dhidden = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if unit_dhidden else None
    if tile is not None:
        tokens = max(1, len(x))  # a tile is one block
    parts = []
    for r0, r1 in blocks(max(1, len(x)), tokens):
        part = slice(r0, min(r1, len(x)))
        rows = None if dhidden is None else dhidden[part]
        own = x[part], weight, bias, labels[part], zy[part], k[part], head_rows(head, part)
        sums = _sum_rows(*own, options, tile, rows, width)
        sums.k = k[part] if sums.k is None else sums.k
        parts.append(sums)
    total = BlockSums.cat(parts)
    total.dhidden = dhidden
    return total


def _sum_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    zy: Tensor,
    k: Tensor,
    head: HeadSpec,
    options: CoreOptions,
    tile: Tensor | None,
    dhidden: Tensor | None,  # (N, H) zeros, gets the exponentials' slopes times the weight
    width: int,
) -> BlockSums:
    """The sums of some tokens; ``k`` where it was raised."""
    n, vocab = len(x), len(weight)
    packed, sums, raised = _pack_tokens(x), new_sums(n, x.device), k.clone()
    numbers, how = head_numbers(head), (output_bits(options), rounding(x.dtype, options.precision))
    gradient = None if tile is None else tile.view(-1)
    if dhidden is not None:
        gradient = torch.empty(min(width, vocab) * n, dtype=x.dtype, device=x.device)
    for v0, v1 in blocks(vocab, vocab if dhidden is None else width):
        before = raised.clone()
        block, g = weight[v0:v1], None if gradient is None else gradient[: (v1 - v0) * n]
        own = inverse_temperature(head)
        _ops.score_block(packed, block, bias, labels, k, raised, sums, None, own, g, *numbers, v0, *how)
        if dhidden is not None:
            if not torch.equal(before, raised):
                dhidden.mul_((before - raised).exp_()[:, None])
            _ops.grad_hidden(g, block, dhidden)
    return block_sums(sums, options, zy.dtype, None if torch.equal(raised, k) else raised)


def tile_gradients(
    x: Tensor,  # (N, H)
    weight: Tensor | HeadRows,  # (V, H)
    labels: Tensor,  # (N,)
    tile: Tensor,  # (N, V), as ``score`` left it
    stats: RowStats,
    coefficients: Tensor,  # (N,) dLoss / dlogps
    head: HeadSpec,
    options: CoreOptions,
    *,
    dhidden: Tensor | None,  # (N, H) float32, written
    head_gradient: HeadGradient | None,
    entropy_coefficients: Tensor | None = None,  # (N,)
    hidden_done: Callable[[], None] | None = None,
) -> None:
    """See ``blockwise.tile_gradients``."""
    if not _takes(x, weight):
        given: tuple[Any, ...] = (x, weight, labels, tile, stats, coefficients, head, options)
        made: dict[str, Any] = {"dhidden": dhidden, "head_gradient": head_gradient, "hidden_done": hidden_done}
        blockwise.tile_gradients(*given, **made, entropy_coefficients=entropy_coefficients, passes=NATIVE_PASSES)
        return
    gradient = tile.view(-1)
    scale, at_target, mix = gradient_factors(stats, coefficients, entropy_coefficients, head)
    if mix is not None:
        NATIVE_PASSES.mix_tile_(tile.view(len(weight), -1), mix, stats.k, head, options, transposed=True)
    target = scale * at_target
    if dhidden is not None:
        dhidden.zero_()
        _ops.grad_hidden(gradient, weight, dhidden)
        _ops.finish_rows(dhidden, scale, target, weight, labels.clamp(0, len(weight) - 1))  # others: target 0
        if hidden_done is not None:
            hidden_done()
    if head_gradient is not None:
        _add_head_gradient(head_gradient, gradient, _rows(x), scale, target, labels, 0, len(weight))


def _add_head_gradient(
    head_gradient: HeadGradient,
    gradient: Tensor,  # (W * N,), vocabulary-major
    x: Tensor,  # (N, H)
    scale: Tensor,  # (N,)
    target: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    v0: int,
    v1: int,
    packed: Tensor | None = None,  # of x and scale, where the caller has it
    into: Tensor | None = None,  # (W, H) float32, added to instead of the head's dW
) -> None:
    dweight, accumulate = into, True
    if head_gradient.weight is not None:
        packed = _pack_rows(x, scale) if packed is None else packed
        if into is None:
            dweight, accumulate = head_gradient.weight[v0:v1], head_gradient.accumulate
    dbias = None if head_gradient.bias is None else head_gradient.bias[v0:v1]
    _ops.grad_weight(gradient, packed, x, scale, target, labels, v0, v1 - v0, accumulate, dweight, dbias)


def recompute_gradients(
    x: Tensor,  # (N, H)
    weight: Tensor | HeadRows,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    stats: RowStats,
    coefficients: Tensor | None,  # (N,)
    entropy_coefficients: Tensor | None,  # (N,)
    head: HeadSpec,
    options: CoreOptions,
    *,
    dhidden: Tensor | None,  # (N, H) float32, written
    head_gradient: HeadGradient | None,
) -> None:
    """See ``blockwise.recompute_gradients``."""
    if not _takes(x, weight):
        given: tuple[Any, ...] = (x, weight, bias, labels, stats, coefficients, entropy_coefficients, head, options)
        blockwise.recompute_gradients(*given, dhidden=dhidden, head_gradient=head_gradient, passes=NATIVE_PASSES)
        return
    x, bias = _rows(x), None if bias is None else bias.float().contiguous()
    n, hidden = x.shape
    scale, at_target, mix = gradient_factors(stats, coefficients, entropy_coefficients, head)
    target = scale * at_target
    tokens, width = _block(n, hidden, options.workspace, 4)
    chunks = [slice(r0, min(r1, n)) for r0, r1 in blocks(max(1, n), tokens)]
    dw = None if head_gradient is None else head_gradient.weight
    # one chunk is packed once, whatever the number of vocabulary blocks
    packed = _pack_tokens(x) if len(chunks) == 1 else None
    packed_rows = _pack_rows(x, scale) if len(chunks) == 1 and dw is not None else None
    several = dw is not None and len(chunks) > 1 and head_gradient is not None and not head_gradient.accumulate
    if several:  # dW's rows are added to in a float32 block, which the workspace bounds too
        width = min(width, max(SPAN, options.workspace // (4 * hidden) // SPAN * SPAN))
    buffer = torch.empty(min(width, len(weight)) * min(tokens, n), dtype=x.dtype, device=x.device)
    if dhidden is not None:
        dhidden.zero_()
    for v0, v1 in blocks(len(weight), width):
        block = None
        if several:
            block = torch.zeros((v1 - v0, hidden), dtype=torch.float32, device=x.device)
        for rows in chunks:
            here, w = x[rows], weight[v0:v1]
            gradient = buffer[: (v1 - v0) * len(here)]
            _ops.score_block(
                _pack_tokens(here) if packed is None else packed,
                w,
                bias,
                labels[rows],
                None,
                stats.k[rows],
                None,
                None if mix is None else mix[:, rows].contiguous(),
                inverse_temperature(head_rows(head, rows)),
                gradient,
                *head_numbers(head),
                v0,
                0,
                rounding(x.dtype, options.precision),
            )
            if dhidden is not None:
                _ops.grad_hidden(gradient, w, dhidden[rows])
            if head_gradient is not None:
                own = scale[rows], target[rows], labels[rows]
                _add_head_gradient(head_gradient, gradient, here, *own, v0, v1, packed_rows, block)
        if block is not None:
            assert dw is not None
            dw[v0:v1] = block
    if dhidden is not None:
        _ops.finish_rows(dhidden, scale, target, weight, labels.clamp(0, len(weight) - 1))  # others: target 0
