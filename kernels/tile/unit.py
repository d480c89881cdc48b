"""``d logps / d hidden`` of a frozen head, added up block by block while the logits are there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.blocking import ROW_ELEMENTS, blocks
from ..core.head_spec import HeadSpec
from ..core.stats import RowStats
from ..core.weight_rows import HeadRows
from .factors import FP16_SCALE
from .gemm import mm_accumulate
from .targets import target_entry


def add_unit(dhidden: Tensor, g: Tensor, w_block: Tensor) -> None:
    """``dhidden += g @ w_block`` with g relative to its rows' offsets. dhidden (N, H), g (N, W), w_block (W, H)."""
    if w_block.dtype == torch.float16:  # exp(z - k) reaches e^30: bring each row into fp16's range for its GEMM
        peak = g.amax(dim=1).clamp_(min=1e-30) / FP16_SCALE
        product = torch.zeros_like(dhidden)
        mm_accumulate(product, (g / peak[:, None]).to(w_block.dtype), w_block)
        dhidden.addcmul_(product, peak[:, None])
    else:
        mm_accumulate(dhidden, g.to(w_block.dtype), w_block)


def finish_unit(
    x: Tensor,  # (N, H)
    weight: Tensor | HeadRows,  # (V, H)
    labels: Tensor,  # (N,)
    stats: RowStats,
    head: HeadSpec,
    dhidden: Tensor,  # (N, H) sums of ``add_unit``, gets d logps / d hidden
) -> None:
    """Adds the labels' share and scales the rows. Labels outside of the weight's rows have ``sum_others`` 0."""
    labels = labels.clamp(0, len(weight) - 1)
    entry, scale = target_entry(stats), -head.slope * (-stats.log_denom).exp()
    for r0, r1 in blocks(len(x), max(1, ROW_ELEMENTS // max(1, x.shape[1]))):
        w_y = weight.index_select(0, labels[r0:r1]).to(x.dtype)
        dhidden[r0:r1].sub_(w_y * entry[r0:r1, None]).mul_(scale[r0:r1, None])
