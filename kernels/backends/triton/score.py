"""``score`` in Triton: statistics of the tokens, with a gradient tile or with d logps / d hidden.

The exponentials are the epilogue of the logits' GEMM, so logits never reach memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.blocking import VOCAB_BLOCK, blocks
from ...core.dtypes import gemm_dtype
from ...core.head_spec import HeadSpec
from ...core.row_head import head_rows
from ...core.stats import CoreOptions, RowStats
from ...operators.schemas import new_sums
from ...tile.factors import block_dtype
from ...tile.targets import target_entry, targets_in_tile
from ...tile.unit import add_unit
from ..torch import blockwise as torch_backend
from .elementwise import TRITON_PASSES
from .finish import finish_blocks, finish_rows
from .gemm.combine import STATS, PartialRows
from .gemm.config import GemmConfig
from .gemm.launch import score_block
from .launch import unit_columns
from .products import gradient_shape, is_wide, weight_rows
from .targets import target_logit_and_slope
from .tuning.lookup import config_of


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
    """See ``torch/blockwise.py``."""
    if is_wide(x):
        given: tuple[Any, ...] = (x, weight, bias, labels, head, options)
        return torch_backend.score(*given, tile=tile, unit_dhidden=unit_dhidden, passes=TRITON_PASSES)
    x, bias, labels = unit_columns(x), None if bias is None else bias.contiguous(), labels.contiguous()
    n, vocab = len(x), len(weight)
    config = config_of(x, vocab, head, options)
    if unit_dhidden:
        dhidden = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        g_dtype = block_dtype(gemm_dtype(x.dtype, x.device))
        rows, width = gradient_shape(n, vocab, g_dtype, config, options)
    else:
        dhidden, g_dtype = None, None
        width = _step(weight, x.dtype)
        row_bytes = 4 * PartialRows.of(options.outputs, options.grad_filter > 0).count * -(-width // config.BLOCK_V)
        rows = max(config.BLOCK_N, options.workspace // row_bytes // config.BLOCK_N * config.BLOCK_N)
    chunks = []
    for r0, r1 in blocks(max(1, n), rows):
        r1 = min(r1, n)
        here = x[r0:r1], weight, bias, labels[r0:r1], head_rows(head, slice(r0, r1)), options, config, width
        if dhidden is not None:
            assert g_dtype is not None
            chunks.append(_score_unit(*here, dhidden[r0:r1], g_dtype))
        else:
            chunks.append(_score_rows(*here, None if tile is None else tile[r0:r1]))
    stats = RowStats.cat(chunks)
    stats.unit_dhidden = dhidden
    return stats


def _step(weight: Tensor, dtype: torch.dtype) -> int:
    """Vocabulary entries at a time: all of them where the kernels can read the weight without a copy."""
    return len(weight) if weight.dtype == dtype and weight.stride(1) == 1 else min(len(weight), VOCAB_BLOCK)


class _Statistics:
    """The tensors into which the kernels write the statistics of some tokens."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: HeadSpec, options: CoreOptions
    ) -> None:
        n = len(x)
        self.zy, self.start, self.slope = target_logit_and_slope(x, weight, bias, labels, options.precision, head)
        # Every block starts from the label's offset, not from that of earlier blocks: the same sums in any partition.
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
            weight_rows(weight, v0, v1, x.dtype),
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
            if offset is not out.k:  # later blocks may have raised the offset
                factor.mul_((offset - out.k).exp_())
                if top is not None:
                    top.mul_((offset - out.k).exp_())
            finish_blocks(tile[:, v0:v1], factor, labels - v0 if v0 else labels, entry, config.BLOCK_V)
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
        block = weight_rows(weight, v0, v1, x.dtype)
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
        finish_blocks(g, factor, labels, None, config.BLOCK_V)
        if v0:
            finish_blocks(dhidden, (before - out.k).exp_()[None], labels, None, dhidden.shape[1])
        add_unit(dhidden, g, block if block.dtype == grad_dtype else block.to(grad_dtype))
    stats = out.collect()
    scale = -head.slope * (-stats.log_denom).exp()
    finish_rows(dhidden, scale, -scale * target_entry(stats), weight, labels, x.dtype)
    return stats
