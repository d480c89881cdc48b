"""Process groups of ``torch.distributed`` as arguments, and collectives on small tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def check_group(name: str, group: Any) -> None:
    """``group`` is a ``torch.distributed.ProcessGroup`` that this process is in."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup that this process is in, such as device_mesh.get_group('cp'), "
            f"or None, got {group!r}"
        )


def gather_from_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The values of every rank, stacked: (W, ...). Each rank passes the same shape and dtype."""
    values = values.contiguous()
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, values, group=group)
    return torch.stack(gathered)


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a tensor over the ranks, the same bits on each. Each rank passes the same shape and dtype."""
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
