"""The label's entry of each row: its logit, its entry of the gradient tile, and its share of dX, dW and db."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.blocking import ROW_ELEMENTS, blocks
from ..core.head_spec import HeadSpec
from ..core.stats import RowStats
from ..core.weight_rows import HeadRows, JoinedRows
from .head_gradient import HeadGradient


def target_logit_and_slope(
    raw: Tensor,  # (N,) raw logits of the labels
    head: HeadSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits of the labels, the offset to subtract from logits (finite), and with a soft-cap ``1 - tanh^2``. Each (N,)."""
    squared = head.transform_(raw)
    return raw, raw.clamp(min=-1e30), None if squared is None else 1 - squared


def targets_in_tile(device: torch.device) -> bool:
    """Whether a gradient tile holds its labels' entries when it meets a GEMM.

    Such an entry is as large as all others of its row together. A CPU's bf16 GEMM rounds its result, so there the entries
    are added beside it, in float32. On a GPU the GEMM keeps float32, and adding to rows of dW would need atomics, whose order
    changes from run to run.
    """
    return device.type != "cpu"


def target_entry(stats: RowStats) -> Tensor:
    """``R * (1 - tanh^2)``, the gradient tile's entry at the target up to its sign. (N,)."""
    return stats.sum_others if stats.target_slope is None else stats.sum_others * stats.target_slope


def add_targets(
    x: Tensor,  # (N, H)
    weight: Tensor | HeadRows,  # (V, H)
    labels: Tensor,  # (N,)
    values: Tensor,  # (N,) dLoss / d raw logit of the target
    dhidden: Tensor | None,
    head_gradient: HeadGradient | None,
) -> None:
    """The target's share of all gradients, in float32, beside the GEMMs: see ``targets_in_tile``.

    Labels outside of the weight's rows are another rank's; their ``values`` are 0.
    """
    own = labels.clamp(0, len(weight) - 1)
    if dhidden is not None:
        for r0, r1 in blocks(len(x), max(1, ROW_ELEMENTS // x.shape[1])):
            w = weight.index_select(0, own[r0:r1])
            w = (w if isinstance(weight, JoinedRows) else w.to(x.dtype)).to(dhidden.dtype)
            dhidden[r0:r1].addcmul_(w, values[r0:r1, None])
    if head_gradient is not None:
        if torch.equal(own, labels):
            head_gradient.add_rows(labels, values, x)
        else:
            here = (own == labels).nonzero()[:, 0]
            head_gradient.add_rows(labels[here], values[here], x[here])


def put_targets(
    tile: Tensor,  # (N, V), written
    labels: Tensor,  # (N,); those outside of the tile's columns are another rank's
    values: Tensor,  # (N,)
) -> None:
    """Write the labels' entries of a tile, without a synchronisation."""
    column = labels.clamp(0, tile.shape[1] - 1)[:, None]
    there = tile.gather(1, column)
    tile.scatter_(1, column, torch.where(column == labels[:, None], values[:, None].to(tile.dtype), there))
