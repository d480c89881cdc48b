"""The collectives of a sharded head. Tensors without elements are not sent: their size is the same on all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.autograd import once_differentiable


def start_sum(values: Tensor, group: dist.ProcessGroup | None) -> Any:
    """Start to add up a contiguous tensor over the ranks, in place. Returns a handle with ``wait()``; ``None``: done."""
    return dist.all_reduce(values, group=group, async_op=True) if values.numel() else None


def sum_(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Add up a contiguous tensor over the ranks, in place."""
    handle = start_sum(values, group)
    if handle is not None:
        handle.wait()
    return values


def gather(values: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The tensors of all ranks, of one shape."""
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    if values.numel():
        dist.all_gather(parts, values, group=group)
    return parts


def _padded(rows: Tensor, count: int) -> Tensor:
    """``rows`` (n, H) with rows of 0 up to ``count``."""
    return torch.nn.functional.pad(rows, (0, 0, 0, count - len(rows)))


class GatherRows(torch.autograd.Function):
    """The rows (n_r, H) of all ranks, one rank after the other, (sum of n_r, H).

    Ranks hold partial gradients of all rows. The backward pass adds them up and leaves each rank its own rows (a
    reduce-scatter).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        parts = gather(_padded(rows, max(sizes)), group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        sizes, group = ctx.sizes, ctx.group
        largest, own = max(sizes), sizes[dist.get_rank(group)]
        parts = torch.cat([_padded(part, largest) for part in grad.split(sizes)])
        out = torch.empty((largest, grad.shape[1]), dtype=grad.dtype, device=grad.device)
        if out.numel():
            dist.reduce_scatter_tensor(out, parts, group=group)
        return out[:own], None, None
